"""CN+ and MN by the CPU's compiled kernels: against float64 formulas term for term."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from kernel_cases import MAPS, Case, draw
from mixture_cases import (
    EPS,
    LAYOUTS,
    affine,
    close,
    combined,
    laid_out,
    log_posteriors,
    mixture_of,
    statistics,
    vectors_of,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from cn_hf.norm import cpu_mixture, kernels, native, pieces
from cn_hf.norm.em import Densities, Mixture
from cn_hf.norm.functional import context_norm_plus, mixture_norm
from cn_hf.norm.layout import arranged

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    Case((3, 6, 7, 7), 1),
    Case((5, 1, 40), 1),
    Case((2, 5, 1), 1),
    Case((70, 3), -1),
    Case((2, 130, 33), 1),
    Case((9, 130), -1),
]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.library() is None:
        assert "CI" not in os.environ, "the continuous integration has a compiler"
        pytest.skip("there is no C++ compiler with OpenMP here")


def found_natively(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels called from now on."""
    called: list[str] = []
    call = native.call
    monkeypatch.setattr(
        native, "call", lambda name, *arguments, **more: (called.append(name), call(name, *arguments, **more))
    )
    return called


def log_tau_of(x: Tensor, densities: Densities, case: Case, in_rows: bool) -> Tensor:
    """``(M, K)``, of a kernel."""
    features = arranged(x, case.feature_dim, in_rows)
    flat = features.flatten(2) if in_rows else features.flatten(1, -2) if features.dim() > 2 else features[:, None]
    found, peak = cpu_mixture.log_posteriors(flat, densities, in_rows)
    log_tau = (found.movedim(1, -1) if in_rows else found).flatten(0, 1)
    assert torch.equal(peak, log_tau.amax(dim=0))
    return log_tau


@pytest.mark.parametrize("in_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("components", [1, 3, 4, 9, 40])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_log_posteriors(case: Case, components: int, in_rows: bool) -> None:
    if in_rows and len(case.shape) == 2:
        case = Case((*case.shape, 1), 1)
    x, _ = draw(case, torch.float32, "cpu")
    mean, var, prior = mixture_of(case, components, "cpu", torch.float32)
    actual = log_tau_of(x, Densities.of(mean, var, prior), case, in_rows)
    expected = log_posteriors(vectors_of(x, case).double(), mean.double(), var.double(), prior.double())
    close(actual, expected, 4e-6)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("given", [True, False], ids=["learned", "batch"])
def test_combine(name: str, dtype: torch.dtype, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MAPS[name]
    called = found_natively(monkeypatch)
    x, _ = draw(case, dtype, "cpu")
    mean, var, prior = mixture_of(case, 3, "cpu", torch.float32)
    factor, (weight, bias) = torch.rand(3), affine(case, "cpu")
    densities = Densities.of(mean, var, prior)
    out, _ = pieces.combine(
        x, densities, factor, (mean - densities.shift, var) if given else None, eps=EPS, feature_dim=case.feature_dim,
        weight=weight, bias=bias,
    )  # fmt: skip
    sums = [] if given else ["mixture_forward", "mixture_sums"]
    assert called == [*sums, "mixture_forward"] or "strided" in name
    vectors = vectors_of(x, case).double()
    log_tau = log_posteriors(vectors, mean.double(), var.double(), prior.double())
    wide_mean, wide_var = mean.double(), var.double()
    if not given:
        share = log_tau.softmax(dim=0)[..., None]
        wide_mean = (share * vectors[:, None]).sum(dim=0)
        wide_var = (share * (vectors[:, None] - wide_mean).square()).sum(dim=0)
    expected = combined(vectors, log_tau.exp() * factor.double(), wide_mean, wide_var, EPS)
    close(out, laid_out(expected * weight.double() + bias.double(), x, case), 2e-5)
    assert out.dtype == dtype


@pytest.mark.parametrize("contexts", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_numbers_of_contexts_and_features(case: Case, contexts: int) -> None:
    x, _ = draw(case, torch.float32, "cpu")
    mean, var = statistics(case, contexts, "cpu")
    actual = context_norm_plus(x, mean, var, feature_dim=case.feature_dim)
    expected = context_norm_plus(x.double(), mean.double(), var.double(), feature_dim=case.feature_dim)
    close(actual, expected, 2e-5)


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
def test_does_not_depend_on_threads(plus_stats: str) -> None:
    x, (mean, var) = torch.randn(64, 24, 140), torch.rand(2, 5, 24) + 0.5
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(context_norm_plus(x, mean, var, feature_dim=1, plus_stats=plus_stats))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_far_vectors_belong_to_the_context_that_bounded_ones_do() -> None:
    mean, var = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    x = torch.tensor([[1e30, 0.0], [-3e38, 1.0], [0.5, -1e25]])
    densities = Densities.of(mean, var)
    actual = cpu_mixture.log_posteriors(x[None], densities, False)[0][0]
    torch.testing.assert_close(actual, densities.log(x - densities.shift).log_softmax(dim=1))
    out = context_norm_plus(x, mean, var)
    with kernels.use_kernels("reference"):
        torch.testing.assert_close(out, context_norm_plus(x, mean, var))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_vector(value: float) -> None:
    x, (mean, var) = torch.randn(2, 8, 50), torch.rand(2, 5, 8) + 0.5
    expected = context_norm_plus(x, mean, var, feature_dim=1)
    x[1, 3, 17] = value
    actual = context_norm_plus(x, mean, var, feature_dim=1)
    assert not actual[1, 3, 17].isfinite()
    kept = torch.ones(2, 50, dtype=torch.bool)
    kept[1, 17] = False
    assert torch.equal(actual.movedim(1, -1)[kept], expected.movedim(1, -1)[kept])


def test_posteriors_that_underflow_have_logarithms() -> None:
    mean, var = torch.tensor([[0.0], [30.0]]), torch.ones(2, 1)
    log_tau, peak = cpu_mixture.log_posteriors(torch.tensor([[[0.0], [30.0]]]), Densities.of(mean, var), False)
    torch.testing.assert_close(log_tau[0], torch.tensor([[0.0, -450.0], [-450.0, 0.0]]))
    assert torch.equal(peak, torch.zeros(2))
    out = context_norm_plus(torch.tensor([[0.0], [30.0]]), mean, var)
    torch.testing.assert_close(out, torch.zeros(2, 1))


def test_equal_contexts_give_context_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    called = found_natively(monkeypatch)
    x, row = torch.randn(6, 40, 12) * 2 + 3, torch.rand(2, 1, 12) + 0.5
    out = context_norm_plus(x, *row.expand(2, 10_000, 12))
    assert called == ["mixture_forward"]
    torch.testing.assert_close(out, (x - row[0]) / (row[1] + 1e-5).sqrt(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = found_natively(monkeypatch)
    x, (mean, var) = torch.randn(4, 8, 9).to(dtype), torch.rand(2, 5, 8) + 0.5
    out = context_norm_plus(x, mean, var, feature_dim=1)
    assert out.dtype == dtype
    assert not called


def test_reference_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called = found_natively(monkeypatch)
    with kernels.use_kernels("reference"):
        context_norm_plus(torch.randn(4, 8, 9), *torch.rand(2, 5, 8) + 0.5, feature_dim=1)
    assert not called


def test_small_posteriors_keep_their_digits() -> None:
    mean, var = torch.tensor([[0.0], [4.0]]), torch.ones(2, 1)
    x = torch.linspace(-16, 12, 777)[:, None]
    densities = Densities.of(mean, var)
    out, _ = pieces.combine(
        x, densities, torch.tensor([0.0, 1.0]), (mean - densities.shift, var), eps=0.0, feature_dim=-1, weight=None,
        bias=None,
    )  # fmt: skip
    wide = x.double()
    expected = log_posteriors(wide, mean.double(), var.double(), torch.ones(2).double())[:, 1:].exp() * (wide - 4)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-37)


def test_a_context_of_infinite_variance_gets_nothing() -> None:
    x, mean, var = torch.randn(5, 4, 3), torch.randn(3, 3), torch.ones(3, 3)
    var[1] = float("inf")
    out = context_norm_plus(x, mean, var)
    torch.testing.assert_close(out, context_norm_plus(x, mean[::2], var[::2]))


@pytest.mark.parametrize("in_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(2, 3, 1), (5, 6, 700), (3, 35, 1024), (900, 2, 7)], ids=str)
@pytest.mark.parametrize("components", [1, 5, 40])
def test_component_statistics(
    shape: tuple[int, int, int], components: int, in_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of vectors far from zero, and of components so far from all vectors that posteriors underflow."""
    monkeypatch.setattr(cpu_mixture, "_MOST_SEGMENTS", 2)  # so that one has several spans
    samples, features, positions = shape
    x = torch.randn(samples, features, positions) * torch.rand(features, 1) * 3 + 100
    x = x if in_rows else x.movedim(1, -1).contiguous()
    vectors = (x.movedim(1, -1) if in_rows else x).reshape(-1, features)
    log_tau = torch.randn(len(vectors), components).mul(3).log_softmax(dim=1)
    log_tau[:, -1] -= 200
    arranged_tau = log_tau.view(samples, positions, components)
    arranged_tau = arranged_tau.movedim(-1, 1).contiguous() if in_rows else arranged_tau
    point, peak = vectors.mean(dim=0), log_tau.amax(dim=0)
    mean, var, log_total = cpu_mixture.component_statistics(x, arranged_tau, peak, point, in_rows)
    share, wide = log_tau.double().softmax(dim=0)[..., None], vectors.double() - point.double()
    expected = (share * wide[:, None]).sum(dim=0)
    spread = (share * (wide[:, None] - expected).square()).sum(dim=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), spread, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_total.double(), log_tau.double().logsumexp(dim=0), rtol=1e-6, atol=1e-5)


# ------------------------------------------------------------------------------------ what is left to torch's operators


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
@pytest.mark.parametrize(
    ("shape", "weight"), [((2, 5, 3), None), ((2, 100_000, 3), None), ((2, 3, 9), 2), ((2, 4, 9), 3)], ids=str
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], weight: int | None, plus_stats: str) -> None:
    mean, var = torch.randn(3, 4), torch.ones(3, 4)
    rows = None if weight is None else torch.ones(weight)
    with pytest.raises(RuntimeError):
        context_norm_plus(torch.randn(shape), mean, var, feature_dim=1, plus_stats=plus_stats, weight=rows)


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
@pytest.mark.parametrize("rows", [torch.tensor(2.0), torch.tensor([2.0])], ids=["number", "one"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_affine_map_of_one_number_is_broadcast(name: str, rows: Tensor, plus_stats: str) -> None:
    x, (mean, var) = torch.randn(5, 4, 7), torch.rand(2, 3, 4) + 0.5
    plain = context_norm_plus(x, mean, var, feature_dim=1, plus_stats=plus_stats)
    out = context_norm_plus(x, mean, var, feature_dim=1, plus_stats=plus_stats, **{name: rows})
    torch.testing.assert_close(out, plain * 2 if name == "weight" else plain + 2)


def test_negative_views_are_negative() -> None:
    x, (mean, var) = torch.randn(5, 4, 7), torch.rand(2, 3, 4) + 0.5
    weight = torch.rand(4)
    expected = context_norm_plus(-x, mean, var, feature_dim=1, weight=-weight)
    actual = context_norm_plus(torch._neg_view(x), mean, var, feature_dim=1, weight=torch._neg_view(weight))
    torch.testing.assert_close(actual, expected)


def test_dispatch_modes_see_operators() -> None:
    x, (mean, var) = torch.randn(5, 4, 7), torch.rand(2, 3, 4) + 0.5
    with FlopCounterMode(display=False) as counter:
        context_norm_plus(x, mean, var, feature_dim=1)
    assert counter.get_total_flops() == 4 * 2 * 35 * 4 * 3
    traced = make_fx(lambda x: context_norm_plus(x, mean, var, feature_dim=1))(x)
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), context_norm_plus(other, mean, var, feature_dim=1))


def test_subclasses_keep_their_rules() -> None:
    x, (mean, var) = torch.randn(5, 4), torch.rand(2, 3, 4) + 0.5
    weight = TwoTensor(torch.ones(4), torch.full((4,), 3.0))
    out = context_norm_plus(x, mean, var, weight=weight)
    torch.testing.assert_close(out.a * 3, out.b)  # type: ignore[attr-defined]


def test_given_statistics_of_mixtures_have_gradients() -> None:
    x, prior = torch.randn(6, 4), torch.tensor([0.5, 0.5])
    theta = Mixture(torch.randn(2, 4), torch.ones(2, 4), prior, prior.sum(), 1)
    mean, var = torch.randn(2, 4, requires_grad=True), torch.ones(2, 4)
    out, _ = mixture_norm(x, theta, statistics=(mean, var))
    (grad,) = torch.autograd.grad(out.sum(), mean)
    assert grad.abs().sum() > 0


def test_far_contexts_do_not_cost_digits() -> None:
    """One far away moves the shift that all are taken about."""
    mean, var = torch.randn(5, 16), torch.rand(5, 16) + 0.5
    mean[4] += 450
    x = torch.randn(1, 200, 16)
    log_tau, _ = cpu_mixture.log_posteriors(x, Densities.of(mean, var), False)
    wide = log_posteriors(x[0].double(), mean.double(), var.double(), torch.ones(5).double())
    assert (log_tau[0].double().exp() - wide.exp()).abs().max() < 2e-4


def test_want_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: 0

    monkeypatch.setattr(native, "library", Full)
    with pytest.raises(MemoryError, match="mixture_forward of 105 numbers"):
        cpu_mixture.log_posteriors(torch.randn(1, 35, 2), Densities.of(torch.randn(3, 2), torch.ones(3, 2)), False)
