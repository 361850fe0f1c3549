"""CN+ and MN against float64 formulas term for term: by the CPU's compiled kernel, and piece by piece in torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from kernel_cases import MAPS, Case, draw
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from cn_hf.norm import combination, cpu_combination
from cn_hf.norm.em import Densities, Mixture
from cn_hf.norm.functional import component_statistics, context_norm_plus, mixture_norm
from cn_hf.norm.fused import native, operators

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-3
LAYOUTS = [
    "map",
    "map-7x7",
    "map-one-channel",
    "map-one-pixel",
    "sequence",
    "vectors",
    "channels_last",
    "channels_last-3",
    "channels_last-197",
    "map-transposed",
    "map-strided",
    "tokens",
    "tokens-channels-first",
    "tokens-strided",
    "tokens-one-feature",
]
SHAPES = [
    Case((3, 6, 7, 7), 1),
    Case((5, 1, 40), 1),
    Case((2, 5, 1), 1),
    Case((70, 3), -1),
    Case((2, 130, 33), 1),
    Case((9, 130), -1),
]


@pytest.fixture
def compiled() -> None:
    if native.library() is None:
        assert "CI" not in os.environ, "the continuous integration has a compiler"
        pytest.skip("there is no C++ compiler with OpenMP here")


def statistics(case: Case, components: int) -> tuple[Tensor, Tensor]:
    features = case.shape[case.feature_dim]
    mean, var = torch.randn(2, components, features, dtype=torch.float64)
    return (mean * 2 / features**0.5 + 0.5).float(), (var.square() + 1).float()


def reference(
    x: Tensor, mean: Tensor, var: Tensor, case: Case, *, batch: bool, rows: tuple[Tensor, ...] = ()
) -> Tensor:
    """CN+ in float64, term for term: no shift, no expanded square."""
    wide, mean, var = x.double().movedim(case.feature_dim, -1), mean.double(), var.double()
    vectors = wide.reshape(-1, wide.shape[-1])[:, None]
    log_tau = (((vectors - mean).square() / (var + EPS) + (var + EPS).log()).sum(-1) / -2).log_softmax(dim=1)
    if batch:
        share = log_tau.softmax(dim=0)[..., None]
        mean = (share * vectors).sum(dim=0)
        var = (share * (vectors - mean).square()).sum(dim=0)
    out = (log_tau.exp()[..., None] * (vectors - mean) / (var + EPS).sqrt()).sum(dim=1)
    out = out * rows[0].double() + rows[1].double() if rows else out
    return out.reshape(wide.shape).movedim(-1, case.feature_dim)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Of the largest result, and a rounding to the dtype."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    allowed = tolerance * expected.abs().amax() + torch.finfo(actual.dtype).eps * expected.abs()
    assert (error <= allowed).all(), f"off by {float((error / allowed).max()):.3g} times the tolerance"


def found_natively(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels called from now on."""
    called: list[str] = []
    call = native.call
    monkeypatch.setattr(
        native, "call", lambda name, *arguments, **more: (called.append(name), call(name, *arguments, **more))
    )
    return called


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stats", ["learned", "batch"])
def test_compiled(name: str, dtype: torch.dtype, stats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MAPS[name]
    called = found_natively(monkeypatch)
    x, _ = draw(case, dtype, "cpu")
    (mean, var), rows = statistics(case, 3), torch.randn(2, case.shape[case.feature_dim])
    options = {"eps": EPS, "feature_dim": case.feature_dim, "plus_stats": stats, "weight": rows[0], "bias": rows[1]}
    out = context_norm_plus(x, mean, var, **options)
    assert called == ["combine"]
    assert out.dtype == dtype
    close(out, reference(x, mean, var, case, batch=stats == "batch", rows=tuple(rows)), 2e-5)


@pytest.mark.parametrize("size", [2**18, 100, 1])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stats", ["learned", "batch"])
def test_in_pieces(name: str, stats: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "piece_size", lambda device: size)
    case = MAPS[name]
    x, _ = draw(case, torch.float64, "cpu")
    (mean, var), rows = statistics(case, 3), torch.randn(2, case.shape[case.feature_dim]).double()
    options = {"eps": EPS, "feature_dim": case.feature_dim, "plus_stats": stats, "weight": rows[0], "bias": rows[1]}
    out = context_norm_plus(x, mean.double(), var.double(), **options)
    close(out, reference(x, mean, var, case, batch=stats == "batch", rows=tuple(rows)), 1e-10)
    if x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous():
        assert out.stride() == x.stride()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("contexts", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_numbers_of_contexts_and_features(case: Case, contexts: int) -> None:
    x, _ = draw(case, torch.float32, "cpu")
    mean, var = statistics(case, contexts)
    actual = context_norm_plus(x, mean, var, feature_dim=case.feature_dim, eps=EPS)
    close(actual, reference(x, mean, var, case, batch=False), 2e-5)


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


def test_far_vectors_are_finite_and_belong_to_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, var = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    x = torch.tensor([[1e30, 0.0], [-3e38, 1.0], [0.5, -1e25]])
    out = context_norm_plus(x, mean, var)
    monkeypatch.setattr(cpu_combination, "combine", lambda *arguments, **options: None)
    torch.testing.assert_close(out, context_norm_plus(x, mean, var))
    assert out.isfinite().all()


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


@pytest.mark.usefixtures("compiled")
def test_equal_contexts_give_context_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    called = found_natively(monkeypatch)
    x, row = torch.randn(6, 40, 12) * 2 + 3, torch.rand(2, 1, 12) + 0.5
    out = context_norm_plus(x, *row.expand(2, 10_000, 12))
    assert called == ["combine"]
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
    with operators.use_kernels("reference"):
        context_norm_plus(torch.randn(4, 8, 9), *torch.rand(2, 5, 8) + 0.5, feature_dim=1)
    assert not called


@pytest.mark.usefixtures("compiled")
def test_small_posteriors_keep_their_digits() -> None:
    mean, var = torch.tensor([[0.0], [4.0]]), torch.ones(2, 1)
    x = torch.linspace(-16, 12, 777)[:, None]
    densities, factor = Densities.of(mean.double(), var.double()), torch.tensor([0.0, 1.0])
    out = cpu_combination.combine(
        x, densities, factor, (mean - densities.shift, var), eps=0.0, feature_dim=-1, weight=None, bias=None
    )
    assert out is not None
    wide = x.double()
    log_tau = ((wide - mean.double().T).square() / -2).log_softmax(dim=1)
    torch.testing.assert_close(out.double(), log_tau[:, 1:].exp() * (wide - 4), rtol=1e-4, atol=1e-37)


def test_a_context_of_infinite_variance_gets_nothing() -> None:
    x, mean, var = torch.randn(5, 4, 3), torch.randn(3, 3), torch.ones(3, 3)
    var[1] = float("inf")
    out = context_norm_plus(x, mean, var)
    torch.testing.assert_close(out, context_norm_plus(x, mean[::2], var[::2]))


@pytest.mark.parametrize("size", [2**18, 100])
@pytest.mark.parametrize("components", [1, 5, 40])
def test_batch_statistics(components: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vectors far from zero, and of a component so far from all of them that posteriors underflow."""
    monkeypatch.setattr(combination, "piece_size", lambda device: size)
    x, mean = torch.randn(5, 6, 70) * 3 + 100, torch.randn(components, 6) + 100
    mean[-1] += 300
    densities = Densities.of(mean.double(), torch.ones(components, 6).double())
    actual = combination.batch_statistics(x, densities, 1)
    vectors = x.movedim(1, -1).flatten(0, 1).double() - densities.shift
    share = densities.log_posteriors(vectors).softmax(dim=0)[..., None]
    expected = (share * vectors[:, None]).sum(dim=0)
    spread = (share * (vectors[:, None] - expected).square()).sum(dim=0)
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[1], spread, rtol=1e-9, atol=1e-9)
    whole = component_statistics(vectors, densities.log_posteriors(vectors))
    torch.testing.assert_close(whole, actual, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
def test_narrow_contexts_far_apart_keep_their_posteriors(plus_stats: str) -> None:
    """An expanded square cancels by (30 / 0.03)^2: no digit of a posterior is left of it in float32."""
    mean = torch.tensor([[-30.0], [30.0], [30.05]])
    var, x = torch.full((3, 1), 0.03**2), torch.cat([mean + 0.03 * torch.randn(3, 500)]).reshape(-1, 1)
    case = Case(tuple(x.shape), -1)
    expected = reference(x, mean, var, case, batch=plus_stats == "batch")
    for leaf in (x, x.clone().requires_grad_()):
        out = context_norm_plus(leaf, mean, var, eps=EPS, plus_stats=plus_stats)
        assert (out.double() - expected).abs().max() < 3e-3  # an input of 30 is known to 1e-6: 6e-5 deviations


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


@pytest.mark.usefixtures("compiled")
def test_far_contexts_do_not_cost_digits() -> None:
    """One far away moves the shift that all are taken about."""
    case = Case((200, 16), -1)
    mean, var = torch.randn(5, 16), torch.rand(5, 16) + 0.5
    mean[4] += 450
    x = torch.randn(200, 16)
    close(context_norm_plus(x, mean, var, eps=EPS), reference(x, mean, var, case, batch=False), 4e-4)


def test_want_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: 0

    monkeypatch.setattr(native, "library", Full)
    with pytest.raises(MemoryError, match="combine of 105 numbers"):
        context_norm_plus(torch.randn(1, 35, 2), torch.randn(3, 2), torch.ones(3, 2))


# ------------------------------------------------------------------------------------------------------------------ MN


@pytest.mark.parametrize("feature_dim", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_mixture_norm_is_differentiated_twice(affine: bool, feature_dim: int) -> None:
    shape = (4, 3, 2) if feature_dim == 1 else (4, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []
    prior = torch.tensor([0.6, 0.4], dtype=torch.float64)
    theta = Mixture(torch.randn(2, 3).double(), torch.rand(2, 3).double() + 0.5, prior, prior.new_zeros(()), 0)

    def run(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_mixture_norm_and_gradients_in_other_precisions(dtype: torch.dtype) -> None:
    x, grad = (torch.randn(6, 5, 4) * 2 + 100).to(dtype), torch.randn(6, 5, 4).to(dtype)
    theta = Mixture(
        x.double().flatten(0, 1)[:3], torch.ones(3, 4).double(), torch.full((3,), 1 / 3), torch.zeros(()), 0
    )
    found = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        out, _ = mixture_norm(leaf, theta)
        found.append((out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))))
    assert found[0][0].dtype == found[0][1].dtype == dtype
    for actual, expected in zip(*found, strict=True):
        close(actual, expected.detach(), 2e-5)
