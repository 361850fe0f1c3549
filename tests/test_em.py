"""norm/em.py against tests/reference.py and scikit-learn, from the same start."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import reference
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cn_hf.errors import CnHfError
from cn_hf.norm import em


def blobs(num_vectors: int = 600, *, num_features: int = 4, seed: int = 0) -> Tensor:
    """Three overlapping clusters, float64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, num_features, generator=generator, dtype=torch.float64) * 2
    which = torch.randint(3, (num_vectors,), generator=generator)
    noise = torch.randn(num_vectors, num_features, generator=generator, dtype=torch.float64)
    return centers[which] + noise * (0.5 + which[:, None])


def start_of(x: Tensor, num_components: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    mean = x[:num_components].clone()
    var = torch.ones_like(mean) * torch.linspace(0.5, 2, num_components, dtype=x.dtype)[:, None]
    prior = torch.linspace(1, 2, num_components, dtype=x.dtype)
    return mean, var, prior / prior.sum()


def sklearn_fit(
    x: Tensor, start: tuple[Tensor, Tensor, Tensor], *, max_iter: int, tol: float, reg_covar: float = 1e-6
) -> GaussianMixture:
    mean, var, prior = (tensor.double().numpy() for tensor in start)
    model = GaussianMixture(
        len(mean),
        covariance_type="diag",
        tol=tol,
        reg_covar=reg_covar,
        max_iter=max_iter,
        means_init=mean,
        precisions_init=1 / var,
        weights_init=prior / prior.sum(),
        init_params="random_from_data",
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x.double().numpy())


def assert_same_mixture(actual: em.Mixture, expected: GaussianMixture, tolerance: float = 1e-6) -> None:
    for mine, theirs in (
        (actual.mean, expected.means_),
        (actual.var, expected.covariances_),
        (actual.prior, expected.weights_),
    ):
        np.testing.assert_allclose(mine.double().numpy(), theirs, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------- densities and posteriors


@pytest.mark.parametrize("num_components", [1, 2, 5])
def test_log_density_and_posteriors(num_components: int) -> None:
    x, (mean, var, prior) = blobs(12), start_of(blobs(12), num_components)
    vectors = reference.vectors_of(x, -1)
    expected = torch.stack(
        [torch.stack([reference.log_normal(vector, mean[k], var[k]) for k in range(len(mean))]) for vector in vectors]
    )
    torch.testing.assert_close(em.gaussian_log_density(x, mean, var), expected, atol=1e-10, rtol=1e-10)
    scipy_like = torch.distributions.Normal(mean, var.sqrt()).log_prob(x[:, None]).sum(-1)
    torch.testing.assert_close(em.gaussian_log_density(x, mean, var), scipy_like, atol=1e-10, rtol=1e-10)
    for chosen, weights in ((prior, prior), (None, torch.full_like(prior, 1 / num_components))):
        logs = torch.stack([torch.stack(row) for row in reference.log_tau(vectors, mean, var, weights)])
        torch.testing.assert_close(em.posteriors(x, mean, var, chosen), logs.exp(), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(em.log_posteriors(x, mean, var, chosen), logs, atol=1e-9, rtol=1e-9)


def test_posteriors_gradcheck() -> None:
    x, (mean, var, prior) = blobs(5, num_features=2), start_of(blobs(5, num_features=2))
    inputs = tuple(tensor.clone().requires_grad_() for tensor in (x, mean, var, prior))
    assert torch.autograd.gradcheck(em.posteriors, inputs)
    assert torch.autograd.gradcheck(em.gaussian_log_density, inputs[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_posteriors_are_float32_at_least_and_sum_to_one(dtype: torch.dtype) -> None:
    x, (mean, var, prior) = blobs(50), start_of(blobs(50))
    out = em.posteriors(x.to(dtype), mean.to(dtype), var.to(dtype), prior.to(dtype))
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.sum(1), torch.ones(50, dtype=out.dtype))


def test_posteriors_of_vectors_far_from_all_components() -> None:
    mean, var = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    x = torch.tensor([[1e4], [-1e4], [3e6]], requires_grad=True)
    out = em.posteriors(x, mean, var)
    torch.testing.assert_close(out, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    (grad,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("center", [0.0, 1e3, -1e5])
def test_float32_posteriors_far_from_zero(center: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = (torch.randn(5, 8, generator=generator) * 0.5 + center).float()
    var = torch.rand(5, 8, generator=generator) * 0.5 + 0.1
    x = mean[torch.arange(100) % 5] + 0.5 * torch.randn(100, 8, generator=generator)
    exact = em.posteriors(x.double(), mean.double(), var.double())
    torch.testing.assert_close(em.posteriors(x, mean, var).double(), exact, atol=2e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------- EM


@pytest.mark.parametrize("num_components", [1, 2, 4])
def test_one_iteration_is_the_em_step(num_components: int) -> None:
    x = blobs(30, num_features=3)
    start = start_of(x, num_components)
    *expected, likelihood = reference.em_step(x, *start, reg_covar=1e-3)
    fitted = em.fit_mixture(x, *start, num_iterations=1, reg_covar=1e-3)
    for actual, slow in zip(
        (fitted.mean, fitted.var, fitted.prior, fitted.log_likelihood), (*expected, likelihood), strict=True
    ):
        torch.testing.assert_close(actual, slow, atol=1e-9, rtol=1e-9)
    assert fitted.num_iterations == 1


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_em_agrees_with_scikit_learn(num_iterations: int, offset: float) -> None:
    x = blobs() + offset
    start = start_of(x)
    fitted = em.fit_mixture(x, *start, num_iterations=num_iterations, tol=0.0)
    expected = sklearn_fit(x, start, max_iter=num_iterations, tol=0.0)
    assert fitted.num_iterations == num_iterations == expected.n_iter_
    assert_same_mixture(fitted, expected)
    assert float(fitted.log_likelihood) == pytest.approx(expected.lower_bound_, abs=1e-6)
    untimed = em.fit_mixture(x, *start, num_iterations=num_iterations, tol=None)
    assert all(torch.equal(a, b) for a, b in zip(untimed[:4], fitted[:4], strict=True))


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_em_stops_where_scikit_learn_stops(tol: float) -> None:
    x = blobs(seed=3)
    start = start_of(x)
    fitted = em.fit_mixture(x, *start, num_iterations=500, tol=tol)
    expected = sklearn_fit(x, start, max_iter=500, tol=tol)
    assert expected.converged_
    assert fitted.num_iterations == expected.n_iter_ < 500
    assert_same_mixture(fitted, expected)
    assert float(fitted.log_likelihood) == pytest.approx(expected.lower_bound_, abs=1e-6)


@pytest.mark.parametrize("reg_covar", [1e-6, 1e-2])
def test_constant_features_and_reg_covar(reg_covar: float) -> None:
    x = blobs()
    x[:, 1] = 7.0
    start = start_of(x)
    fitted = em.fit_mixture(x, *start, num_iterations=5, tol=0.0, reg_covar=reg_covar)
    assert_same_mixture(fitted, sklearn_fit(x, start, max_iter=5, tol=0.0, reg_covar=reg_covar))
    torch.testing.assert_close(fitted.var[:, 1], torch.full((3,), reg_covar, dtype=torch.float64), atol=1e-9, rtol=1e-5)


def test_log_likelihood_never_falls() -> None:
    x = blobs(seed=5)
    mixture = em.Mixture(*start_of(x), x.new_full((), -math.inf), 0)
    for _ in range(20):
        after = em.fit_mixture(x, *mixture[:3], num_iterations=1, tol=None, reg_covar=0.0)
        assert after.log_likelihood >= mixture.log_likelihood - 1e-12
        mixture = after


def test_float32_em_is_close_to_float64() -> None:
    x = (blobs() * 0.1 + 50).float()
    start = start_of(x)
    narrow = em.fit_mixture(x, *start, num_iterations=10, tol=None)
    wide = em.fit_mixture(x.double(), *(tensor.double() for tensor in start), num_iterations=10, tol=None)
    assert narrow.mean.dtype == torch.float32
    torch.testing.assert_close(narrow.mean.double(), wide.mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(narrow.var.double(), wide.var, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize(("num_features", "gap", "deviation"), [(8, 30.0, 0.03), (1, 100.0, 1e-3), (3, 1000.0, 0.05)])
def test_float32_em_of_narrow_components_far_apart(num_features: int, gap: float, deviation: float) -> None:
    """Sums of squares about one point cancel by (gap / deviation)^2: beyond all digits of float32."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([-gap, gap, gap + 8 * deviation])[torch.arange(3000) % 3, None]
    x = centers + deviation * torch.randn(3000, num_features, generator=generator)
    start = x[:3].clone(), torch.full((3, num_features), 4 * deviation**2), torch.full((3,), 1 / 3)
    narrow, wide = (
        em.fit_mixture(x.to(dtype), *(part.to(dtype) for part in start), num_iterations=10, tol=None, reg_covar=1e-9)
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(wide.var, torch.full_like(wide.var, deviation**2 + 1e-9), rtol=0.15, atol=0)
    torch.testing.assert_close(narrow.var.double(), wide.var, rtol=1e-2, atol=0)
    assert float(narrow.log_likelihood) == pytest.approx(float(wide.log_likelihood), abs=0.02)
    tau = em.posteriors(x, *narrow[:3])
    torch.testing.assert_close(tau.double(), em.posteriors(x.double(), *(part.double() for part in narrow[:3])))


def test_a_variance_that_rounding_makes_negative_is_none() -> None:
    """Second moments less squared means: of equal vectors that is a rounding of either sign."""
    one = torch.ones(1, 1, dtype=torch.float64)
    stats = em.MixtureStatistics(one[0], one, one * (1 - 1e-3), one[0, 0], one[0, 0])
    for reg_covar in (1e-6, 0.0):
        _, var, _ = em.mixture_update(stats, shift=torch.zeros(1, dtype=torch.float64), reg_covar=reg_covar)
        assert var.item() == reg_covar


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_fitted_in_float32(dtype: torch.dtype) -> None:
    x = blobs(200).to(dtype)
    start = tuple(tensor.to(dtype) for tensor in start_of(x.double()))
    narrow = em.fit_mixture(x, *start, num_iterations=3, tol=None)
    wide = em.fit_mixture(x.float(), *(tensor.float() for tensor in start), num_iterations=3, tol=None)
    assert {tensor.dtype for tensor in narrow[:4]} == {torch.float32}
    torch.testing.assert_close(narrow.mean, wide.mean, atol=1e-4, rtol=1e-4)
    assert em.kmeans_plusplus(x, 3).dtype == torch.float32
    assert em.seed_mixture(x, 3).mean.dtype == torch.float32


def test_em_on_a_component_without_vectors() -> None:
    x = blobs(50)
    mean, var, prior = start_of(x)
    mean[2] = 200.0
    fitted = em.fit_mixture(x, mean, var, prior, num_iterations=1, tol=None)
    assert all(tensor.isfinite().all() for tensor in fitted[:4])
    expected = sklearn_fit(x, (mean, var, prior), max_iter=1, tol=0.0)
    assert float(fitted.prior[2]) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(fitted.mean[:2].numpy(), expected.means_[:2], atol=1e-6)
    np.testing.assert_allclose(fitted.prior.numpy(), expected.weights_, atol=1e-6)
    again = em.fit_mixture(x, *fitted[:3], num_iterations=5, tol=None)
    assert all(tensor.isfinite().all() for tensor in again[:4])


@pytest.mark.parametrize("run", ["fit_mixture", "seed_mixture", "mixture_statistics"])
def test_autocast_changes_nothing(run: str) -> None:
    x = blobs(200).float() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    start = start_of(x)
    runs = {
        "fit_mixture": lambda: em.fit_mixture(x, *start, num_iterations=5, tol=None)[:3],
        "seed_mixture": lambda: em.seed_mixture(x, 3)[:3],
        "mixture_statistics": lambda: em.mixture_statistics(x, *start, shift=x.mean(0))[:3],
    }
    expected = runs[run]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = runs[run]()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_em_leaves_its_inputs_and_the_graph_alone() -> None:
    x = blobs(50)
    start = start_of(x)
    before = [tensor.clone() for tensor in (x, *start)]
    em.fit_mixture(x, *start, num_iterations=3)
    em.seed_mixture(x, 3)
    assert all(torch.equal(a, b) for a, b in zip((x, *start), before, strict=True))


# ------------------------------------------------------------------------------------------ statistics, chunk by chunk


@pytest.mark.parametrize("sizes", [[100], [1, 99], [0, 40, 60], [25, 25, 25, 25]])
def test_statistics_of_chunks_add_up_to_the_whole(sizes: list[int]) -> None:
    x = blobs(100)
    start, shift = start_of(x), x.mean(0)
    chunks = [em.mixture_statistics(part, *start, shift=shift) for part in x.split(sizes)]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total.plus(chunk)
    whole = em.mixture_statistics(x, *start, shift=shift)
    for a, b in zip(total, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert float(whole.num_vectors) == 100
    *expected, likelihood = reference.em_step(x, *start)
    for a, b in zip(em.mixture_update(total, shift=shift), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(total.log_likelihood / total.num_vectors, likelihood)


def test_the_shift_does_not_matter() -> None:
    x = blobs(100)
    start = start_of(x)
    updates = []
    for shift in (x.mean(0), torch.zeros_like(x[0]), x[0]):
        updates.append(em.mixture_update(em.mixture_statistics(x, *start, shift=shift), shift=shift))
    for other in updates[1:]:
        for a, b in zip(updates[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_the_shift_is_the_mean_and_may_come_from_the_caller() -> None:
    x = blobs(100)
    torch.testing.assert_close(em.data_shift(x), x.mean(0))
    assert torch.equal(em.data_shift(x[:0]), torch.zeros(4, dtype=x.dtype))
    start = start_of(x)
    for shift in (em.data_shift(x), x[0]):
        for actual, expected in (
            (em.fit_mixture(x, *start, num_iterations=3, shift=shift), em.fit_mixture(x, *start, num_iterations=3)),
            (em.seed_mixture(x, 3, shift=shift), em.seed_mixture(x, 3)),
        ):
            for a, b in zip(actual[:3], expected[:3], strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ seeding


def test_kmeans_plusplus_draws_vectors_of_the_data_deterministically() -> None:
    x = blobs(300)
    centers = em.kmeans_plusplus(x, 5, seed=1)
    assert centers.shape == (5, 4)
    rows = [int((x == center).all(1).nonzero()[0]) for center in centers]
    assert len(set(rows)) == 5
    assert torch.equal(centers, em.kmeans_plusplus(x, 5, seed=1))
    assert any(not torch.equal(centers, em.kmeans_plusplus(x, 5, seed=seed)) for seed in range(2, 6))
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    em.kmeans_plusplus(x, 5, seed=1)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator must not move"


def test_kmeans_plusplus_draws_in_proportion_to_the_squared_distance() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64)
    draws = 4000
    first, pairs = torch.zeros(4), torch.zeros(4, 4)
    for seed in range(draws):
        a, b = (int((x[:, 0] == value).nonzero()) for value in em.kmeans_plusplus(x, 2, seed=seed)[:, 0])
        first[a] += 1
        pairs[a, b] += 1
    torch.testing.assert_close(first / draws, torch.full((4,), 0.25), atol=0.03, rtol=0)
    squared = (x - x.T).square().float()
    expected = squared / squared.sum(1, keepdim=True)
    torch.testing.assert_close(pairs / pairs.sum(1, keepdim=True), expected, atol=0.06, rtol=0)


def test_kmeans_plusplus_finds_far_clusters() -> None:
    x = torch.cat([torch.randn(50, 2) + torch.tensor(center) for center in ([0.0, 0], [1000.0, 0], [0, 1000.0])])
    for seed in range(20):
        nearest = torch.cdist(em.kmeans_plusplus(x, 3, seed=seed), x[[0, 50, 100]]).argmin(1)
        assert sorted(nearest.tolist()) == [0, 1, 2]


def test_kmeans_plusplus_with_fewer_different_vectors_than_components() -> None:
    centers = em.kmeans_plusplus(torch.tensor([[1.0, 2.0]] * 4 + [[3.0, 4.0]]), 4)
    assert {tuple(row.tolist()) for row in centers} == {(1.0, 2.0), (3.0, 4.0)}
    mixture = em.seed_mixture(torch.ones(1, 3), 3)
    fitted = em.fit_mixture(torch.ones(1, 3), *mixture[:3], num_iterations=3)
    assert all(tensor.isfinite().all() for tensor in (*mixture[:3], *fitted[:4]))


def test_no_vectors_is_an_error() -> None:
    with pytest.raises(CnHfError):
        em.kmeans_plusplus(torch.zeros(0, 3), 2)
    with pytest.raises(CnHfError):
        em.seed_mixture(torch.zeros(0, 3), 2)


def test_seed_mixture_gives_every_vector_to_its_nearest_center() -> None:
    x = blobs(80)
    centers = em.kmeans_plusplus(x, 3, seed=7)
    mixture = em.seed_mixture(x, 3, seed=7, reg_covar=1e-4)
    owner = [min(range(3), key=lambda k: float((vector - centers[k]).square().sum())) for vector in x]
    for k in range(3):
        mine = x[[i for i, other in enumerate(owner) if other == k]]
        torch.testing.assert_close(mixture.mean[k], mine.mean(0), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(mixture.var[k], mine.var(0, correction=0) + 1e-4, atol=1e-9, rtol=1e-9)
        assert float(mixture.prior[k]) == pytest.approx(len(mine) / 80)
