"""CN+ and MN piece by piece: against float64 formulas term for term, and against what torch differentiates."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MAPS, Case, draw
from mixture_cases import (
    EPS,
    LAYOUTS,
    check_mixture,
    combined,
    laid_out,
    log_posteriors,
    mixture,
    mixture_of,
    vectors_of,
)

from cn_hf.norm import combination, pieces
from cn_hf.norm.em import Densities, Mixture
from cn_hf.norm.functional import mixture_norm

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=[2**21, 100, 1], ids=lambda size: f"pieces-of-{size}")
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pieces._PIECE, "cpu", request.param)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("name", LAYOUTS)
def test_mixture(name: str) -> None:
    check_mixture(pieces, MAPS[name], 3, torch.float64, "cpu", 1e-10)


@pytest.mark.parametrize("components", [1, 2, 5, 40])
def test_mixture_for_numbers_of_components(components: int) -> None:
    check_mixture(pieces, Case((3, 6, 7, 7), 1), components, torch.float64, "cpu", 1e-10)


@pytest.mark.parametrize("name", ["map", "map-7x7", "channels_last", "tokens"])
def test_mixture_single_precision(name: str) -> None:
    check_mixture(pieces, MAPS[name], 3, torch.float32, "cpu", 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixture_half_precision(dtype: torch.dtype) -> None:
    check_mixture(pieces, MAPS["map"], 3, dtype, "cpu", 2e-5)


def test_mixture_far_from_zero() -> None:
    check_mixture(pieces, MAPS["map"], 3, torch.float32, "cpu", 1e-3, mean=1e3)


def test_pieces_of_many_features_keep_their_digits() -> None:
    """A large constant under the logarithm costs none of them."""
    check_mixture(pieces, Case((30, 130, 8, 8), 1), 3, torch.float32, "cpu", 6e-5)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("given", [True, False], ids=["learned", "batch"])
def test_combine(name: str, given: bool) -> None:
    case = MAPS[name]
    x, _ = draw(case, torch.float64, "cpu")
    mean, var, prior = mixture_of(case, 3, "cpu", torch.float64)
    densities, vectors = Densities.of(mean, var, prior), vectors_of(x, case)
    log_tau = log_posteriors(vectors, mean, var, prior)
    if not given:
        share = log_tau.softmax(dim=0)[..., None]
        mean = (share * vectors[:, None]).sum(dim=0)
        var = (share * (vectors[:, None] - mean).square()).sum(dim=0)
    factor = torch.rand(3, dtype=torch.float64)
    expected = laid_out(combined(vectors, log_tau.exp() * factor, mean, var, EPS), x, case)
    out, (center, spread) = pieces.combine(
        x, densities, factor, (mean - densities.shift, var) if given else None, eps=EPS, feature_dim=case.feature_dim,
        weight=None, bias=None,
    )  # fmt: skip
    assert out.dtype == x.dtype
    for actual, wanted in ((out, expected), (center + densities.shift, mean), (spread, var)):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_twice_is_equal_and_shares_nothing() -> None:
    case = MAPS["channels_last"]
    x, grad = draw(case, torch.float32, "cpu")
    theta = mixture_of(case, 3, "cpu", torch.float32)
    first, second = (mixture(pieces, x, theta, (None, None), case, (grad, None, None)) for _ in "ab")
    assert all(map(torch.equal, first, second))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert first[0].stride() == first[3].stride() == x.stride()


@pytest.mark.parametrize("feature_dim", [1, -1])
def test_posteriors_have_no_gradient_beyond_reach(feature_dim: int) -> None:
    case = Case((4, 3, 5), feature_dim)
    x, grad = draw(case, torch.float64, "cpu")
    mean, var, prior = mixture_of(case, 2, "cpu", torch.float64)
    densities = Densities.of(mean, var, prior)._replace(reach=torch.tensor(1.0, dtype=torch.float64))
    assert 10 < (x.abs() > 1).sum() < 50
    _, _, own_var, kept = pieces.mixture_norm(x, densities, prior, EPS, feature_dim, None, None)
    actual, *_ = pieces.mixture_norm_backward(grad, x, own_var, kept, densities, prior, feature_dim, None)
    leaf = x.requires_grad_()
    out, _ = combination.combine(leaf, densities, prior.rsqrt(), None, eps=EPS, feature_dim=feature_dim)
    torch.testing.assert_close(actual, torch.autograd.grad(out, leaf, grad)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature_dim", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_mixture_norm_is_differentiated_twice(affine: bool, feature_dim: int) -> None:
    shape = (4, 3, 2) if feature_dim == 1 else (4, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []
    prior = torch.tensor([0.6, 0.4], dtype=torch.float64)
    theta = Mixture(torch.randn(2, 3).double(), torch.rand(2, 3).double() + 0.5, prior, prior.new_zeros(()), 0)

    def run(x: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight, bias = rows or (None, None)
        out, statistics = mixture_norm(x, theta, eps=EPS, feature_dim=feature_dim, weight=weight, bias=bias)
        return out, *statistics

    assert torch.autograd.gradcheck(run, (x, *rows))
    assert torch.autograd.gradgradcheck(run, (x, *rows))


@pytest.mark.parametrize("twice", [False, True])
def test_backward_is_as_precise_under_autocast(twice: bool) -> None:
    x, theta = torch.randn(64, 8), (torch.randn(3, 8), torch.rand(3, 8) + 0.5, torch.tensor([0.5, 0.3, 0.2]))
    grads = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        out, _ = mixture_norm(leaf, Mixture(*theta, torch.zeros(()), 0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=twice)
    torch.testing.assert_close(*grads)


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, weight = torch.randn(4, 3), torch.rand(3, requires_grad=True)
    theta = Mixture(torch.randn(2, 3), torch.ones(2, 3), torch.tensor([0.5, 0.5]), torch.zeros(()), 0)
    out, _ = mixture_norm(x, theta, weight=weight)
    (by_weight,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    assert by_weight.shape == (3,)
