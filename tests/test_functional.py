"""norm/functional.py against tests/reference.py: values, gradients, dtypes, layouts, memory."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cn_hf.errors import CnHfError
from cn_hf.norm import combination, functional
from cn_hf.norm.em import Mixture

EPS = 1e-3
LAYOUTS = {
    "nchw": ((3, 2, 2, 3), 1),
    "nlc": ((3, 4, 2), -1),
    "nhwc": ((2, 3, 2, 2), -1),
    "nc, axis 1": ((4, 2), 1),
    "nc, axis -1": ((4, 2), -1),
    "ncdhw": ((2, 2, 2, 1, 3), 1),
    "one sample": ((1, 2, 3, 1), 1),
    "one number": ((1, 1), -1),
}
PLUS = [(stats, scale) for stats in ("learned", "batch") for scale in ("none", "sqrt_t")]


def tables(num_contexts: int, num_features: int, *, grad: bool = True) -> tuple[Tensor, Tensor]:
    mean = torch.randn(num_contexts, num_features, dtype=torch.float64)
    var = torch.rand(num_contexts, num_features, dtype=torch.float64) + 0.3
    return mean.requires_grad_(grad), var.requires_grad_(grad)


def activations(shape: tuple[int, ...], *, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul(1.5).requires_grad_(grad)


def ids_of(kind: str, batch_size: int, num_contexts: int) -> Tensor | int:
    if kind == "int":
        return num_contexts - 1
    if kind == "hard":
        return torch.arange(batch_size).mul(2) % num_contexts
    return torch.rand(batch_size, num_contexts, dtype=torch.float64).softmax(1).requires_grad_()


def affine_of(num_features: int, wanted: bool) -> dict[str, Tensor]:
    if not wanted:
        return {}
    return {name: torch.randn(num_features, dtype=torch.float64).requires_grad_() for name in ("weight", "bias")}


def assert_same_values_and_gradients(actual: Tensor, expected: Tensor, inputs: list[Any], atol: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-9)
    wanted = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    assert wanted
    direction = torch.randn_like(expected)
    mine = torch.autograd.grad(actual, wanted, direction)
    slow = torch.autograd.grad(expected, wanted, direction)
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-8)


# --------------------------------------------------------------------------------------------------------- CN, Eq. 8


@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("kind", ["int", "hard", "soft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_norm_is_eq_8(layout: str, kind: str, with_affine: bool) -> None:
    shape, feature_dim = LAYOUTS[layout]
    mean, var = tables(3, shape[feature_dim])
    x, ids, affine = activations(shape), ids_of(kind, shape[0], 3), affine_of(shape[feature_dim], with_affine)
    options = {"eps": EPS, "feature_dim": feature_dim, **affine}
    actual = functional.context_norm(x, mean, var, ids, **options)
    expected = reference.context_norm(x, mean, var, ids, **options)
    assert_same_values_and_gradients(actual, expected, [x, mean, var, ids, *affine.values()])


@pytest.mark.parametrize("layout", ["nchw", "nlc", "nc, axis 1", "ncdhw"])
def test_context_norm_gradients_are_those_derived_by_hand(layout: str) -> None:
    shape, feature_dim = LAYOUTS[layout]
    mean, var = tables(4, shape[feature_dim])
    x, ids = activations(shape), torch.tensor([1, 3, 1, 0])[: shape[0]]
    grad = torch.randn(shape, dtype=torch.float64)
    out = functional.context_norm(x, mean, var, ids, eps=EPS, feature_dim=feature_dim)
    actual = torch.autograd.grad(out, (x, mean, var), grad)
    with torch.no_grad():
        expected = reference.context_norm_gradients(x, mean, var, ids, grad, eps=EPS, feature_dim=feature_dim)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert (actual[1][2] == 0).all(), "a context absent from the batch has no gradient"
    assert (actual[2][2] == 0).all()


@pytest.mark.parametrize("kind", ["int", "hard", "soft"])
@pytest.mark.parametrize(("shape", "feature_dim"), [((3, 2, 2, 2), 1), ((3, 2, 2), -1)])
def test_context_norm_gradcheck(kind: str, shape: tuple[int, ...], feature_dim: int) -> None:
    mean, var = tables(3, 2)
    x, weight, bias = activations(shape), *affine_of(2, True).values()
    ids = ids_of(kind, shape[0], 3)
    soft = [ids] if isinstance(ids, Tensor) and ids.requires_grad else []

    def run(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *soft: Tensor) -> Tensor:
        chosen = soft[0] if soft else ids
        return functional.context_norm(x, mean, var, chosen, eps=EPS, feature_dim=feature_dim, weight=weight, bias=bias)

    inputs = (x, mean, var, weight, bias, *soft)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_context_norm_gradient_of_only_some_inputs() -> None:
    for wanted in range(3):
        mean, var = tables(2, 2, grad=False)
        inputs = [activations((3, 4, 2), grad=False), mean, var]
        inputs[wanted].requires_grad_()
        ids = torch.tensor([0, 1, 1])
        out = functional.context_norm(*inputs, ids, eps=EPS)
        assert_same_values_and_gradients(out, reference.context_norm(*inputs, ids, eps=EPS, feature_dim=-1), inputs)


def test_one_hot_weights_equal_hard_ids() -> None:
    mean, var = tables(5, 3)
    x, ids = activations((6, 2, 3)), torch.tensor([4, 0, 2, 2, 1, 3])
    hard = functional.context_norm(x, mean, var, ids)
    soft = functional.context_norm(x, mean, var, torch.nn.functional.one_hot(ids, 5).double())
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize("num_contexts", [1, 2, 20, 100, 1000, 10_000])
def test_context_norm_for_any_number_of_contexts(num_contexts: int) -> None:
    mean, var = tables(num_contexts, 3)
    x, ids = activations((5, 3, 2)), torch.tensor([0, num_contexts - 1, num_contexts // 2, 0, num_contexts // 3])
    out = functional.context_norm(x, mean, var, ids, eps=EPS, feature_dim=1)
    expected = reference.context_norm(x, mean, var, ids, eps=EPS, feature_dim=1)
    assert_same_values_and_gradients(out, expected, [x, mean, var])


def test_empty_batches() -> None:
    mean, var = tables(3, 4)
    for shape, feature_dim in (((0, 4, 2, 2), 1), ((0, 5, 4), -1), ((0, 4), 1), ((2, 0, 4), -1)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        outs = [
            functional.context_norm_plus(x, mean, var, feature_dim=feature_dim, plus_stats=stats) for stats, _ in PLUS
        ]
        hard = torch.zeros(shape[0], dtype=torch.int64)
        outs += [functional.context_norm(x, mean, var, ids, feature_dim=feature_dim) for ids in (hard, 1)]
        soft = torch.full((shape[0], 3), 1 / 3)
        outs.append(functional.context_norm(x, mean, var, soft, feature_dim=feature_dim))
        for out in outs:
            assert out.shape == x.shape
            grads = torch.autograd.grad(out.sum(), (x, mean, var), allow_unused=True)
            assert all(grad is None or (grad == 0).all() for grad in grads)


def test_a_sample_is_its_own_affair() -> None:
    mean, var = tables(3, 2)
    x, ids = activations((4, 5, 2), grad=False), torch.tensor([0, 1, 2, 1])
    spoilt = x.clone()
    spoilt[2] = math.nan
    kept = torch.tensor([0, 1, 3])
    for run in (
        lambda x: functional.context_norm(x, mean, var, ids),
        lambda x: functional.context_norm_plus(x, mean, var, plus_stats="learned"),
    ):
        torch.testing.assert_close(run(spoilt)[kept], run(x)[kept], rtol=0, atol=0)
        assert run(spoilt)[2].isnan().all()


# -------------------------------------------------------------------------------------------------------- CN+, Eq. 9


@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize(("plus_stats", "plus_scale"), PLUS)
@pytest.mark.parametrize("layout", ["nchw", "nlc", "nhwc", "nc, axis 1", "ncdhw", "one number"])
def test_context_norm_plus_is_eq_9(layout: str, plus_stats: str, plus_scale: str, with_affine: bool) -> None:
    shape, feature_dim = LAYOUTS[layout]
    mean, var = tables(3, shape[feature_dim])
    x, affine = activations(shape), affine_of(shape[feature_dim], with_affine)
    options = {"eps": EPS, "feature_dim": feature_dim, "plus_stats": plus_stats, "plus_scale": plus_scale, **affine}
    actual = functional.context_norm_plus(x, mean, var, **options)
    expected = reference.context_norm_plus(x, mean, var, **options)
    inputs = [x, *affine.values()] if plus_stats == "batch" and x.numel() == 1 else [x, mean, var, *affine.values()]
    assert_same_values_and_gradients(actual, expected, inputs)


@pytest.mark.parametrize(("plus_stats", "plus_scale"), PLUS)
def test_context_norm_plus_gradcheck(plus_stats: str, plus_scale: str) -> None:
    mean, var = tables(3, 2)
    x, weight, bias = activations((3, 2, 2)), *affine_of(2, True).values()

    def run(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"plus_stats": plus_stats, "plus_scale": plus_scale, "eps": EPS, "feature_dim": 1}
        return functional.context_norm_plus(x, mean, var, weight=weight, bias=bias, **options)

    assert torch.autograd.gradcheck(run, (x, mean, var, weight, bias))


@pytest.mark.parametrize("plus_scale", ["none", "sqrt_t"])
def test_one_context_cn_plus_is_cn(plus_scale: str) -> None:
    mean, var = tables(1, 3)
    x = activations((4, 3, 2, 2))
    plus = functional.context_norm_plus(x, mean, var, feature_dim=1, plus_scale=plus_scale)
    torch.testing.assert_close(plus, functional.context_norm(x, mean, var, 0, feature_dim=1), atol=1e-12, rtol=1e-12)
    batch = functional.context_norm_plus(x, mean, var, feature_dim=1, plus_stats="batch", plus_scale=plus_scale)
    standard = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(batch, standard, atol=1e-10, rtol=1e-10)


def test_equal_contexts_cn_plus_is_cn() -> None:
    mean, var = (table.detach().expand(20, -1) for table in tables(1, 3))
    x = activations((4, 7, 3))
    torch.testing.assert_close(functional.context_norm_plus(x, mean, var), functional.context_norm(x, mean, var, 7))


def test_sqrt_t_is_a_factor_before_the_affine_map() -> None:
    mean, var = tables(4, 3)
    x, affine = activations((4, 7, 3)), affine_of(3, True)
    for stats in ("learned", "batch"):
        plain = functional.context_norm_plus(x, mean, var, plus_stats=stats)
        scaled = functional.context_norm_plus(x, mean, var, plus_stats=stats, plus_scale="sqrt_t", **affine)
        torch.testing.assert_close(scaled, 2 * plain * affine["weight"] + affine["bias"])


@pytest.mark.parametrize("option", ["plus_stats", "plus_scale"])
def test_an_unknown_switch_is_an_error_that_names_the_valid_ones(option: str) -> None:
    mean, var = tables(2, 3)
    with pytest.raises((CnHfError, ValueError), match="bath"):
        functional.context_norm_plus(activations((4, 3)), mean, var, **{option: "bath"})


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
@pytest.mark.parametrize("center", [1e2, 1e4, -3e4])
def test_float32_cn_plus_far_from_zero(center: float, plus_stats: str) -> None:
    mean, var = tables(4, 6, grad=False)
    mean = (mean * 0.5 + center).float()
    var = (var * 0.2).float()
    x = (mean[torch.arange(64) % 4] + 0.4 * torch.randn(64, 6)).float()
    exact = functional.posteriors(x.double(), mean.double(), var.double())
    assert (exact.amax(1) < 0.99).any(), "the case must be one in which contexts overlap"
    torch.testing.assert_close(functional.posteriors(x, mean, var), exact.float(), atol=2e-5, rtol=0)
    with torch.no_grad():
        options = {"eps": EPS, "feature_dim": -1, "plus_stats": plus_stats, "plus_scale": "none"}
        expected = reference.context_norm_plus(x.double(), mean.double(), var.double(), **options)
    actual = functional.context_norm_plus(x, mean, var, **options)
    torch.testing.assert_close(actual.double(), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cn_plus_batch_with_a_context_far_from_every_vector(dtype: torch.dtype) -> None:
    mean = torch.tensor([[0.0, 0.0], [1.0, -1.0], [500.0, -800.0]], dtype=dtype, requires_grad=True)
    var = torch.full((3, 2), 0.5, dtype=dtype, requires_grad=True)
    x = torch.randn(6, 2, dtype=dtype, requires_grad=True)
    assert (functional.posteriors(x, mean, var)[:, 2] == 0).all(), "its posterior must underflow"
    options = {"eps": EPS, "feature_dim": -1, "plus_stats": "batch", "plus_scale": "sqrt_t"}
    out = functional.context_norm_plus(x, mean, var, **options)
    grads = torch.autograd.grad(out.square().sum(), (x, mean, var))
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, mean, var)]
    expected = reference.context_norm_plus(*wide, **options)
    slow = torch.autograd.grad(expected.square().sum(), wide)
    # In float32 the far mean pulls the shift away from the data, which costs the others' posteriors some digits.
    tolerance = 1e-2 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(grads, slow, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=3 * tolerance)


def test_batch_statistics_of_contexts_that_lie_far_apart() -> None:
    gaps = torch.tensor([[0.0], [100.0], [300.0]])
    x = (gaps[torch.arange(300) % 3] + torch.randn(300, 1)).requires_grad_()
    options = {"eps": 1e-5, "plus_stats": "batch"}
    actual = functional.context_norm_plus(x, gaps, torch.ones(3, 1), **options)
    exact = functional.context_norm_plus(x.double(), gaps.double(), torch.ones(3, 1).double(), **options)
    torch.testing.assert_close(actual.double(), exact, atol=5e-3, rtol=5e-3)


# ------------------------------------------------------------------------------------------------------ MN, Eqs. 5-7


def theta_of(num_components: int, num_features: int) -> Mixture:
    mean, var = tables(num_components, num_features, grad=False)
    prior = torch.rand(num_components, dtype=torch.float64).softmax(0)
    return Mixture(mean, var, prior, torch.zeros((), dtype=torch.float64), 0)


@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nlc", "nhwc", "nc, axis -1", "ncdhw"])
def test_mixture_norm_is_eqs_5_to_7(layout: str, with_affine: bool) -> None:
    shape, feature_dim = LAYOUTS[layout]
    theta, x, affine = theta_of(3, shape[feature_dim]), activations(shape), affine_of(shape[feature_dim], with_affine)
    options = {"eps": EPS, "feature_dim": feature_dim, **affine}
    actual, (m, v) = functional.mixture_norm(x, theta, **options)
    expected, slow_m, slow_v = reference.mixture_norm(x, *theta[:3], **options)
    torch.testing.assert_close(m, slow_m, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(v, slow_v, atol=1e-10, rtol=1e-10)
    assert_same_values_and_gradients(actual, expected, [x, *affine.values()])


def test_mixture_norm_with_given_statistics() -> None:
    theta, x, statistics = theta_of(3, 2), activations((4, 3, 2)), tables(3, 2)
    actual, used = functional.mixture_norm(x, theta, statistics=statistics, eps=EPS)
    expected, *_ = reference.mixture_norm(x, *theta[:3], statistics=statistics, eps=EPS, feature_dim=-1)
    assert_same_values_and_gradients(actual, expected, [x])
    assert all(torch.equal(a, b) for a, b in zip(used, statistics, strict=True))


def test_mixture_norm_gradcheck_with_theta_constant() -> None:
    theta = theta_of(3, 2)
    x, weight, bias = activations((3, 2, 2)), *affine_of(2, True).values()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.mixture_norm(x, theta, eps=EPS, feature_dim=1, weight=weight, bias=bias)[0]

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_mixture_norm_does_not_differentiate_theta() -> None:
    theta = theta_of(2, 2)
    for parameter in theta[:3]:
        parameter.requires_grad_()
    out, _ = functional.mixture_norm(activations((4, 3, 2)), theta)
    grads = torch.autograd.grad(out.square().sum(), theta[:3], allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)


def test_mixture_norm_with_one_component_is_batch_norm() -> None:
    x = activations((4, 3, 5))
    theta = Mixture(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1), torch.zeros(()), 0)
    out, (m, v) = functional.mixture_norm(x, theta, eps=1e-5, feature_dim=1)
    torch.testing.assert_close(out, torch.nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(m[0], x.mean((0, 2)))
    torch.testing.assert_close(v[0], x.var((0, 2), correction=0))


def test_cn_plus_is_mixture_norm_with_equal_priors() -> None:
    mean, var = tables(4, 3, grad=False)
    theta = Mixture(mean, var + EPS, torch.full((4,), 0.25, dtype=torch.float64), mean.new_zeros(()), 0)
    x = activations((5, 6, 3))
    plus = functional.context_norm_plus(x, mean, var, eps=EPS, plus_stats="batch", plus_scale="sqrt_t")
    torch.testing.assert_close(plus, functional.mixture_norm(x, theta, eps=EPS)[0])


def test_cn_plus_and_mn_share_one_mixture_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    routine = combination.mixture
    monkeypatch.setattr(combination, "mixture", lambda *given, **more: calls.append(1) or routine(*given, **more))
    functional.context_norm_plus(activations((4, 2)), *tables(3, 2))
    functional.mixture_norm(activations((4, 2)), theta_of(3, 2))
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------- dtypes and layouts


def all_forms(num_features: int, num_contexts: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    mean, var = (table.detach().to(dtype) for table in tables(num_contexts, num_features))
    theta = Mixture(mean, var, torch.full((num_contexts,), 1 / num_contexts), mean.new_zeros(()), 0)
    hard = lambda x: torch.arange(len(x)) % num_contexts  # noqa: E731
    soft = lambda x: torch.rand(len(x), num_contexts).softmax(1).to(x.dtype)  # noqa: E731
    forms: dict[str, Any] = {
        "hard": lambda x, **k: functional.context_norm(x, mean, var, hard(x), **k),
        "int": lambda x, **k: functional.context_norm(x, mean, var, 0, **k),
        "soft": lambda x, **k: functional.context_norm(x, mean, var, soft(x), **k),
        "mn": lambda x, **k: functional.mixture_norm(x, theta, **k)[0],
    }
    for stats, scale in PLUS:
        forms[f"{stats}, {scale}"] = lambda x, stats=stats, scale=scale, **k: functional.context_norm_plus(
            x, mean, var, plus_stats=stats, plus_scale=scale, **k
        )
    return forms


FORMS = list(all_forms(1, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded(dtype: torch.dtype, form: str) -> None:
    run = all_forms(3, 4)[form]
    x = torch.randn(6, 3, 4).to(dtype)
    affine = {"weight": torch.randn(3).to(dtype), "bias": torch.randn(3).to(dtype)}
    for options in ({}, affine):
        torch.manual_seed(1)
        narrow = run(x.requires_grad_(), feature_dim=1, **options)
        torch.manual_seed(1)
        wide = run(x.float(), feature_dim=1, **{name: value.float() for name, value in options.items()})
        tolerance = {"atol": torch.finfo(dtype).eps * 0.1, "rtol": torch.finfo(dtype).eps}
        if form == "soft":  # weights given in half precision are themselves rounded
            tolerance = {"atol": 2e-2, "rtol": 2e-2}
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.float(), wide, **tolerance)
        (grad,) = torch.autograd.grad(narrow.sum(), x)
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_wider_parameters_or_inputs_keep_the_dtype_of_x(form: str) -> None:
    for x_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for table_dtype in (torch.bfloat16, torch.float32, torch.float64):
            out = all_forms(3, 4, table_dtype)[form](torch.randn(6, 5, 3).to(x_dtype))
            assert out.dtype == x_dtype
            assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("mean", "std"), [(6e4, 40.0), (-6e4, 1e3), (0.0, 2e4), (1e-3, 1e-4), (0.0, 1e-7), (250.0, 0.5)]
)
def test_half_precision_is_finite_where_the_exact_value_fits(mean: float, std: float, dtype: torch.dtype) -> None:
    eps = min(1e-5, std**2)
    x = (mean + std * torch.randn(8, 4, 3)).clamp(-6e4, 6e4).to(dtype)
    means, variances = torch.full((2, 3), mean), torch.full((2, 3), std**2)
    means[1] += std
    ids = torch.arange(8) % 2
    x.requires_grad_()
    runs = {
        "cn": lambda x, m, v: functional.context_norm(x, m, v, ids, eps=eps),
        "learned": lambda x, m, v: functional.context_norm_plus(x, m, v, eps=eps),
        "batch": lambda x, m, v: functional.context_norm_plus(x, m, v, eps=eps, plus_stats="batch"),
    }
    for name, run in runs.items():
        out = run(x, means, variances)
        exact = run(x.double(), means.double(), variances.double())
        assert exact.abs().max() < 6e4, name
        torch.testing.assert_close(
            out.double(),
            exact,
            rtol=2 * torch.finfo(dtype).eps,
            atol=4e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        (grad,) = torch.autograd.grad(run(x, means, variances).float().mul(std * 1e-3).sum(), x)
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("size", [1e18, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_activations_stay_finite(dtype: torch.dtype, size: float) -> None:
    x = torch.tensor([[size, -size], [size, 1.0], [0.5, -0.5]]).to(dtype)
    mean, var = torch.zeros(3, 2), torch.ones(3, 2) - 1e-5
    exact = x.double() / 1.0
    for out in (
        functional.context_norm(x, mean, var, 1),
        functional.context_norm(x, mean, var, torch.full((3, 3), 1 / 3)),
        functional.context_norm_plus(x, mean, var),
    ):
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_affine", [False, True])
def test_memory_formats_are_kept(form: str, with_affine: bool) -> None:
    run = all_forms(3, 2)[form]
    affine = {"weight": torch.randn(3), "bias": torch.randn(3)} if with_affine else {}

    def check(x: Tensor, feature_dim: int, memory_format: torch.memory_format) -> None:
        torch.manual_seed(2)
        out = run(x, feature_dim=feature_dim, **affine)
        assert out.is_contiguous(memory_format=memory_format)
        torch.manual_seed(2)
        plain = run(x.contiguous(), feature_dim=feature_dim, **affine)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)

    nchw = torch.randn(4, 3, 5, 6)
    check(nchw, 1, torch.contiguous_format)
    check(nchw.to(memory_format=torch.channels_last), 1, torch.channels_last)
    check(torch.randn(4, 3, 2, 5, 6).to(memory_format=torch.channels_last_3d), 1, torch.channels_last_3d)
    check(torch.randn(4, 3, 2, 5, 6), 1, torch.contiguous_format)
    check(torch.randn(4, 5, 3), -1, torch.contiguous_format)
    check(torch.randn(4, 5, 6, 3), -1, torch.contiguous_format)


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs(form: str) -> None:
    run = all_forms(3, 2)[form]
    base = torch.randn(8, 6, 10, 4)
    cases = [
        (base[::2, ::2, 1::3], 1),
        (base[:, :3].transpose(2, 3), 1),
        (base[:1, :3].expand(4, -1, -1, -1), 1),
        (base[..., :3], -1),
        (base[:, :, :3, 0].transpose(1, 2).transpose(1, 2), -1),
        (base[:, :3].permute(0, 2, 3, 1), -1),
        (base[:, :3].flip(0).flatten(2).transpose(1, 2), -1),
    ]
    for x, feature_dim in cases:
        torch.manual_seed(3)
        out = run(x, feature_dim=feature_dim)
        torch.manual_seed(3)
        expected = run(x.clone(memory_format=torch.contiguous_format), feature_dim=feature_dim)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_inputs_are_left_as_they_were() -> None:
    for run in all_forms(3, 2).values():
        x = torch.randn(4, 5, 3)
        before = x.clone()
        run(x)
        assert torch.equal(x, before)


def test_integers_are_an_error() -> None:
    for run in all_forms(3, 2).values():
        with pytest.raises(TypeError, match=r"uint8"):
            run(torch.zeros(2, 5, 3, dtype=torch.uint8))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form: str) -> None:
    run = all_forms(3, 4)[form]
    x = torch.randn(16, 5, 3) * torch.tensor([1.0, 2.0, 3.0])
    torch.manual_seed(4)
    expected = run(x)
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(x)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_autocast_changes_nothing_in_the_parts() -> None:
    x, (mean, var) = torch.randn(64, 3) * 3, (table.detach().float() for table in tables(4, 3))
    log_tau = functional.posteriors(x, mean, var).log()
    parts = {
        "component_statistics": lambda: torch.stack(functional.component_statistics(x, log_tau)),
        "mixture": lambda: functional.mixture(x, log_tau.exp(), mean, var, eps=EPS),
        "posteriors": lambda: functional.posteriors(x, mean, var),
        "context_rows": lambda: functional.context_rows(mean, log_tau.exp()),
    }
    for name, part in parts.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = part()
        torch.testing.assert_close(inside, part(), atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
def test_tf32_does_not_reach_the_densities() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mean, var = (table.detach().float().cuda() for table in tables(4, 32))
    mean = mean * 3
    x = mean[torch.arange(512, device="cuda") % 4] + torch.randn(512, 32, device="cuda")
    exact = functional.context_norm_plus(x.double(), mean.double(), var.double()).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        out = functional.context_norm_plus(x, mean, var)
        soft = functional.context_norm(x, mean, var, functional.posteriors(x, mean, var))
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(out, exact, atol=1e-4, rtol=1e-4)
    weights = functional.posteriors(x.double(), mean.double(), var.double())
    exact = functional.context_norm(x.double(), mean.double(), var.double(), weights).float()
    torch.testing.assert_close(soft, exact, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active: the most alive at once, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in before or key in self._known:
                continue
            self._known.add(key)
            weakref.finalize(storage, self._release, key, size)
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        return out


def measured(run: Any) -> LiveBytes:
    with LiveBytes() as meter:
        run()
    return meter


def t_fold(x: Tensor, mean: Tensor) -> Tensor:
    return (x[:, None, :] - mean[None]).square().sum(-1)


def one_context_after_another(x: Tensor, mean: Tensor) -> Tensor:
    return torch.stack([(x - row).square().sum(-1) for row in mean.unbind()], 1)


def test_the_meter_sees_t_fold_copies() -> None:
    x, mean = torch.randn(512, 64, requires_grad=True), torch.randn(100, 64)
    assert measured(lambda: t_fold(x, mean)).largest >= 100 * x.nbytes
    looped = measured(lambda: one_context_after_another(x, mean).sum().backward())
    assert looped.largest < 10 * x.nbytes
    assert looped.peak >= 100 * x.nbytes
    freed = measured(lambda: [(x.detach() - row).square().sum(-1) for row in mean.unbind()])
    assert freed.peak < 10 * x.nbytes


@pytest.mark.parametrize(("plus_stats", "plus_scale"), PLUS)
@pytest.mark.parametrize("backward", [False, True])
def test_cn_plus_makes_no_t_fold_copy(backward: bool, plus_stats: str, plus_scale: str) -> None:
    num_contexts, num_features, num_vectors = 100, 96, 2048
    mean, var = (table.detach().float().requires_grad_(backward) for table in tables(num_contexts, num_features))
    x = torch.randn(num_vectors // 64, num_features, 8, 8, requires_grad=backward)

    def run() -> None:
        options = {"feature_dim": 1, "plus_stats": plus_stats, "plus_scale": plus_scale}
        out = functional.context_norm_plus(x, mean, var, **options)
        if backward:
            out.backward(torch.ones_like(out))

    meter = measured(run)
    unit = 8 * num_vectors * max(num_contexts, num_features)  # computed in float64
    assert meter.largest <= 1.1 * unit
    assert meter.peak <= (25 if backward else 11) * unit, "T-fold would be 96 units"


def test_mn_makes_no_k_fold_copy() -> None:
    x = torch.randn(2048, 64, requires_grad=True)
    theta = Mixture(torch.randn(64, 64), torch.ones(64, 64), torch.full((64,), 1 / 64), torch.zeros(()), 0)
    meter = measured(lambda: functional.mixture_norm(x, theta)[0].sum().backward())
    unit = 8 * x.numel()  # computed in float64
    assert meter.largest <= 1.1 * unit
    assert meter.peak <= 25 * unit


@pytest.mark.parametrize("kind", ["hard", "int", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_norm_keeps_x_alone_for_backward(dtype: torch.dtype, kind: str) -> None:
    mean, var = (table.detach().float().requires_grad_() for table in tables(3, 8))
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    x = torch.randn(4, 300, 8).to(dtype).requires_grad_()  # a tiny map takes torch's own operators
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = ids_of(kind, 4, 3)
        functional.context_norm(x, mean, var, ids, weight=weight, bias=bias)
    large = [size for size in kept.values() if size > x.nbytes // 4]
    assert large == [x.nbytes]
