"""The fused operators: the CPU's kernels against float64 formulas, gradients, torch's registrations, doing without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cn_hf
from cn_hf.errors import ConfigError, InputDeviceError, InputShapeError
from cn_hf.norm import functional
from cn_hf.norm.em import Mixture
from cn_hf.norm.functional import context_norm, context_norm_plus, mixture_norm, norm_shift_scale
from cn_hf.norm.fused import cpu_kernels, formulas, native, operators

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5

LAYOUTS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "maps": (lambda: torch.randn(4, 6, 5, 7), 1),
    "maps of one pixel": (lambda: torch.randn(4, 6, 1, 1), 1),
    "maps longer than a block": (lambda: torch.randn(2, 3, 65, 67), 1),
    "channels_last": (lambda: torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last), 1),
    "channels_last_3d": (lambda: torch.randn(2, 3, 3, 5, 7).to(memory_format=torch.channels_last_3d), 1),
    "volumes": (lambda: torch.randn(2, 3, 3, 5, 7), 1),
    "a large sample, channels_last": (lambda: torch.randn(1, 5, 40, 43).to(memory_format=torch.channels_last), 1),
    "tokens": (lambda: torch.randn(5, 11, 13), -1),
    "many tokens": (lambda: torch.randn(2, 197, 9), -1),
    "grids of tokens": (lambda: torch.randn(3, 4, 5, 17), -1),
    "tokens that lie as maps": (lambda: torch.randn(4, 6, 5, 7).flatten(2).transpose(1, 2), -1),
    "vectors": (lambda: torch.randn(7, 33), -1),
    "vectors, axis 1": (lambda: torch.randn(7, 33), 1),
    "one feature": (lambda: torch.randn(3, 1, 8, 8), 1),
    "one number": (lambda: torch.randn(1, 1), -1),
    "every second row": (lambda: torch.randn(4, 6, 10, 7)[:, :, ::2], 1),
    "samples behind": (lambda: torch.randn(11, 5, 13).transpose(0, 1), -1),
}
ROWS = ("a row a sample", "one row", "one row expanded", "every second row")


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None = None, *, feature_dim: int) -> Tensor:
    """The operator also where ``functional.shift_scale`` prefers torch's own."""
    return operators.shift_scale(x, center, scale, offset, feature_dim)


@pytest.fixture
def compiled() -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler with OpenMP here, so there are no CPU kernels to test")


def coefficients(samples: int, features: int, rows: str = ROWS[0], *, offset: bool = True) -> list[Tensor | None]:
    made = []
    for _ in range(3):
        if rows == "a row a sample":
            made.append(torch.rand(samples, features) + 0.5)
        elif rows == "every second row":
            made.append((torch.rand(2 * samples, features) + 0.5)[::2])
        else:
            row = torch.rand(1, features) + 0.5
            made.append(row if rows == "one row" else row.expand(samples, features))
    return [*made[:2], made[2] if offset else None]


def widened(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() if actual.numel() else torch.zeros(())
    assert error <= tolerance * expected.abs().max().clamp_min(1), f"{error:.2e}"


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_scale_and_its_backward(layout: str, rows: str, dtype: torch.dtype) -> None:
    make, axis = LAYOUTS[layout]
    x = make().to(dtype)
    given = coefficients(x.shape[0], x.shape[axis], rows)
    leaves = [x.detach().requires_grad_(), *(t.detach().requires_grad_() for t in given if t is not None)]
    wide = widened([x, *given])
    out, expected = shift_scale(*leaves, feature_dim=axis), formulas.shift_scale(*wide, axis)  # type: ignore[arg-type, call-arg]
    assert out.dtype == dtype
    close(out, expected, TOLERANCE[dtype])
    grad = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, leaves, grad)
    for mine, theirs in zip(actual, torch.autograd.grad(expected, wide, grad.double()), strict=True):  # type: ignore[arg-type]
        close(mine, theirs, TOLERANCE[dtype] if mine.shape == x.shape else 4e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("layout", [name for name, (_, axis) in LAYOUTS.items() if axis == -1])
@pytest.mark.parametrize("rows", ROWS)
def test_norm_shift_scale_and_its_backward(layout: str, rows: str, centered: bool, dtype: torch.dtype) -> None:
    x = (3 + 2 * LAYOUTS[layout][0]()).to(dtype)
    given = coefficients(x.shape[0], x.shape[-1], rows)
    leaves = [x.detach().requires_grad_(), *(t.detach().requires_grad_() for t in given if t is not None)]
    wide = widened([x, *given])
    out = norm_shift_scale(*leaves, eps=EPS, centered=centered)  # type: ignore[misc]
    expected = formulas.composed(*wide, EPS, centered)  # type: ignore[arg-type, call-arg]
    assert out.dtype == dtype
    close(out, expected, TOLERANCE[dtype])
    grad = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, leaves, grad)
    for mine, theirs in zip(actual, torch.autograd.grad(expected, wide, grad.double()), strict=True):  # type: ignore[arg-type]
        close(mine, theirs, 4 * TOLERANCE[dtype] if mine.shape == x.shape else 4e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    center, scale = (torch.rand(shape[0], shape[-1], requires_grad=True) for _ in range(2))
    for out in (
        shift_scale(x, center, scale, feature_dim=-1),
        norm_shift_scale(x, center, scale, eps=1e-5, centered=True),
    ):
        assert out.shape == x.shape
        for gradient, leaf in zip(torch.autograd.grad(out.sum(), [x, center, scale]), (x, center, scale), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("shape", [(3, 13), (6, 13), (1, 12), (5, 14), (13,), (5, 1)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_that_do_not_fit_are_an_error(shape: tuple[int, ...], which: int) -> None:
    """The kernels would read memory that is not theirs."""
    x, rows = torch.randn(5, 11, 13), coefficients(5, 13)
    rows[which] = torch.rand(shape)
    for run in (
        lambda: shift_scale(x, *rows, feature_dim=-1),  # type: ignore[arg-type]
        lambda: shift_scale(x.mT.contiguous(), *rows, feature_dim=1),  # type: ignore[arg-type]
        lambda: norm_shift_scale(x, *rows, eps=EPS, centered=True),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputShapeError, match="one row a sample"):
            run()


def test_fewer_ids_than_samples_are_an_error() -> None:
    mean, var = torch.randn(2, 3), torch.rand(2, 3)
    for ids in (torch.tensor([0, 1, 1]), torch.full((2, 2), 0.5), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(InputShapeError, match="one context id a sample"):
            context_norm(torch.randn(5, 4, 3), mean, var, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_other_dtypes(of_x: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5).to(of_x).requires_grad_()
    center, scale, _ = (row if row is None else row.to(dtype) for row in coefficients(4, 5))
    out = shift_scale(x, center, scale, feature_dim=-1)  # type: ignore[arg-type]
    close(out, (x.double() - center[:, None]) * scale[:, None], 2**-7)  # type: ignore[index]
    [grad] = torch.autograd.grad(out.sum(), x)
    close(grad, scale.double()[:, None].expand(x.shape), 2**-7)  # type: ignore[union-attr]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("standardised", [False, True])
def test_our_kernels_compute_both_directions(
    standardised: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[str, bool] = {}

    def watch(name: str) -> None:
        kernel = getattr(cpu_kernels, name)

        def watched(*arguments: Any) -> Any:
            out = kernel(*arguments)
            computed[name] = out is not None  # None leaves it to torch
            return out

        monkeypatch.setattr(cpu_kernels, name, watched)

    operator = "norm_shift_scale" if standardised else "shift_scale"
    watch(operator)
    watch(operator + "_backward")
    x = torch.randn(4, 6, 5).to(dtype).requires_grad_()
    center, scale, offset = coefficients(4, 5)
    assert center is not None
    assert scale is not None
    if standardised:
        out = norm_shift_scale(x, center, scale, offset, eps=EPS, centered=True)
    else:
        out = shift_scale(x, center, scale, offset, feature_dim=-1)
    out.sum().backward()
    assert computed == {operator: True, operator + "_backward": True}


@pytest.mark.parametrize(
    ("axis", "shape"), [(-3, (4, 6, 5, 7)), (2, (4, 5, 6, 7)), (-2, (4, 5, 6, 7)), (3, (4, 5, 7, 6))]
)
def test_features_along_any_axis(axis: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    reference = torch.ops.cn_hf.shift_scale
    monkeypatch.setattr(
        torch.ops.cn_hf, "shift_scale", lambda *arguments: (met.append(arguments[4]), reference(*arguments))[1]
    )
    x, maps = torch.randn(shape), 1
    monkeypatch.setattr(functional, "_SMALL", 0)
    moved = x.movedim(axis, maps)
    mean, var, ids = torch.randn(3, 6), torch.rand(3, 6) + 0.5, torch.tensor([0, 2, 1, 0])
    out = context_norm(x, mean, var, ids, feature_dim=axis)
    torch.testing.assert_close(out.movedim(axis, maps), context_norm(moved, mean, var, ids, feature_dim=maps))
    assert set(met) <= {1, -1}, "the operator is told of no other axis"
    for plus_stats in ("learned", "batch"):
        out = context_norm_plus(x, mean, var, feature_dim=axis, plus_stats=plus_stats)
        expected = context_norm_plus(moved, mean, var, feature_dim=maps, plus_stats=plus_stats)
        torch.testing.assert_close(out.movedim(axis, maps), expected)
    theta = Mixture(mean, var, torch.full((3,), 1 / 3), torch.zeros(()), 0)
    out, (by_mean, by_var) = mixture_norm(x, theta, feature_dim=axis)
    expected, statistics = mixture_norm(moved, theta, feature_dim=maps)
    torch.testing.assert_close((out.movedim(axis, maps), by_mean, by_var), (expected, *statistics))


@pytest.mark.usefixtures("compiled")
def test_nearly_constant_vectors_have_no_negative_variance() -> None:
    level = 1e4 * (1 + torch.rand(500, 1))
    x = torch.where(torch.rand(500, 8192) < 2 / 8192, torch.nextafter(level, 2 * level), level)
    out = norm_shift_scale(x, torch.zeros(1, 8192), torch.ones(1, 8192), eps=1e-12, centered=True)
    assert out.isfinite().all()


@pytest.mark.usefixtures("compiled")
def test_far_from_zero_nothing_cancels() -> None:
    x = 1e4 + torch.randn(3, 5, 31)
    center, scale = 1e4 + torch.randn(3, 31), torch.ones(3, 31)
    close(shift_scale(x, center, scale, feature_dim=-1), x.double() - center.double()[:, None], 1e-6)
    wide = F.layer_norm(x.double(), (31,))
    close(norm_shift_scale(x, 0 * center, scale, eps=1e-5, centered=True), wide, 3e-4)  # its mean is a float32


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = torch.ones(4, 2, 40, dtype=dtype)
    x[0, 0, 3], x[1, 1, 5], x[2, 0, 7] = float("nan"), float("inf"), -float("inf")
    rows = torch.zeros(4, 2), torch.ones(4, 2)
    assert torch.equal(shift_scale(x, *rows, feature_dim=1).isnan(), x.isnan())
    assert torch.equal(shift_scale(x, *rows, feature_dim=1).isinf(), x.isinf())
    nan = torch.full((4, 2), 2**31 - 1, dtype=torch.int32).view(torch.float32)  # a rounding would carry into its sign
    assert shift_scale(torch.ones_like(x), nan, nan, feature_dim=1).isnan().all()
    tokens = x.transpose(1, 2).contiguous()
    spoilt = norm_shift_scale(tokens, *rows, eps=1e-5, centered=True).isnan().any(-1)
    assert torch.equal(spoilt, ~tokens.isfinite().all(-1))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("shape", "axis"), [((3, 50, 900), -1), ((2, 40, 40, 40), 1), ((1, 4, 300, 300), 1)])
def test_the_same_bits_every_time_and_for_any_number_of_threads(shape: tuple[int, ...], axis: int) -> None:
    x, grad = torch.randn(shape), torch.randn(shape)
    center, scale, _ = coefficients(shape[0], shape[axis])
    before = torch.get_num_threads()

    def results() -> list[Tensor]:
        found = [*torch.ops.cn_hf.shift_scale_backward(grad, x, center, scale, axis, True)]
        if axis == -1:
            out, mean, rstd = torch.ops.cn_hf.norm_shift_scale(x, center, scale, None, EPS, True)
            found += [out, *torch.ops.cn_hf.norm_shift_scale_backward(grad, x, mean, rstd, center, scale, True, True)]
        return found

    try:
        first = results()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["expanded", "channels_last", "strided"])
def test_gradients_that_lie_otherwise_than_x(kind: str) -> None:
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    center, scale, _ = coefficients(3, 4)
    given = {
        "expanded": torch.randn(3, 4, 1, 1).expand(3, 4, 6, 6),
        "channels_last": torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last),
        "strided": torch.randn(3, 4, 6, 12)[..., ::2],
    }[kind]
    [actual] = torch.autograd.grad(shift_scale(x, center, scale, feature_dim=1), x, given)  # type: ignore[arg-type]
    assert torch.equal(actual, given * scale[:, :, None, None])  # type: ignore[index]


@pytest.mark.parametrize("centered", [True, False])
def test_gradients_and_their_gradients(centered: bool) -> None:
    """In float64 by finite differences; in float32, where the CPU's kernels run, against the formulas."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = [t.double().requires_grad_() for t in coefficients(3, 5) if t is not None]

    def chain(*inputs: Tensor) -> Tensor:
        return norm_shift_scale(*inputs, eps=1e-3, centered=centered)  # type: ignore[misc]

    for function in (lambda *inputs: shift_scale(*inputs, feature_dim=-1), chain):
        assert torch.autograd.gradcheck(function, (x, *rows))
        assert torch.autograd.gradgradcheck(function, (x, *rows))
    small = [t.detach().float().requires_grad_() for t in (x, *rows)]

    def penalty(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    actual = penalty(chain(*small), small)
    for mine, theirs in zip(actual, penalty(formulas.composed(*small, 1e-3, centered), small), strict=True):  # type: ignore[call-arg]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "needed", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
@pytest.mark.parametrize("standardised", [True, False])
def test_gradients_of_some_inputs_only(needed: tuple[bool, ...], standardised: bool) -> None:
    tensors = [torch.randn(2, 3, 5), *coefficients(2, 5)]
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, needed, strict=True) if t is not None]
    out = norm_shift_scale(*leaves, eps=EPS, centered=True) if standardised else shift_scale(*leaves, feature_dim=-1)  # type: ignore[misc]
    out.square().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needed)


# ----------------------------------------------------------------------------------------------- registered with torch


@pytest.mark.parametrize("name", ["shift_scale", "norm_shift_scale"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_torch_finds_the_operators_in_order(name: str, channels_last: bool) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, checked by torch itself."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, 3, 4).to(memory_format=format).requires_grad_()
    rows = [t.requires_grad_() for t in coefficients(2, 4) if t is not None]
    rest: tuple[Any, ...] = (1,) if name == "shift_scale" else (EPS, True)
    torch.use_deterministic_algorithms(False)  # NaN in fresh memory is not equal to itself
    torch.library.opcheck(getattr(torch.ops.cn_hf, name).default, (x, *rows, *rest))
    plain = [t.detach() for t in (x, *rows[:2])]
    if name == "shift_scale":
        torch.library.opcheck(torch.ops.cn_hf.shift_scale_backward.default, (plain[0], *plain, 1, False))
    else:
        _, mean, rstd = torch.ops.cn_hf.norm_shift_scale(*plain, None, EPS, True)
        arguments = (plain[0], plain[0], mean, rstd, *plain[1:], True, True)
        torch.library.opcheck(torch.ops.cn_hf.norm_shift_scale_backward.default, arguments)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "like x": lambda grad: torch.empty_like(grad).copy_(grad),
    "contiguous": lambda grad: grad.contiguous(),
    "transposed": lambda grad: grad.mT.contiguous().mT if grad.dim() > 2 else grad.T.contiguous().T,
    "expanded": lambda grad: grad[..., :1].expand_as(grad),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed maps", "transposed vectors"])
def test_fake_kernels_report_what_real_ones_return(layout: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides, and no result that shares memory with an input."""
    other = {"transposed maps": (torch.randn(4, 6, 5, 7).mT, 1), "transposed vectors": (torch.randn(33, 7).T, -1)}
    x, axis = other[layout] if layout in other else (LAYOUTS[layout][0](), LAYOUTS[layout][1])
    x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
    wide = torch.promote_types(dtype, torch.float32)
    center, scale, offset = (row.to(wide) for row in coefficients(len(x), x.shape[axis]) if row is not None)
    torch.use_deterministic_algorithms(False)  # NaN in fresh memory is not equal to itself
    ops, checks = torch.ops.cn_hf, {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.shift_scale.default, (x, center, scale, offset, axis), **checks)
    for kind, stored in GRADIENTS.items():
        grad = stored(x.clone())
        need_x = kind != "expanded"
        torch.library.opcheck(ops.shift_scale_backward.default, (grad, x, center, scale, axis, need_x), **checks)
        if axis == -1:
            for centered in (True, False):
                forward = x, center, scale, offset, EPS, centered
                torch.library.opcheck(ops.norm_shift_scale.default, forward, **checks)
                _, mean, rstd = ops.norm_shift_scale(*forward)
                backward = grad, x, mean, rstd, center, scale, need_x, centered
                torch.library.opcheck(ops.norm_shift_scale_backward.default, backward, **checks)


@pytest.mark.parametrize("which", ["x", "center", "scale", "offset"])
@pytest.mark.parametrize("other", ["cpu", "meta"])
def test_mixed_devices_are_an_error(which: str, other: str) -> None:
    """The fake kernel must not answer with memory that nobody wrote, nor torch multiply by a matrix without storage."""
    home = "meta" if other == "cpu" else "cpu"
    given = dict(zip(("x", "center", "scale", "offset"), (torch.ones(4, 3, 8), *coefficients(4, 8)), strict=True))
    x, center, scale, offset = (t.to(other if name == which else home) for name, t in given.items())  # type: ignore[union-attr]
    kept = torch.ones(4, 3, device=home)
    ops = torch.ops.cn_hf
    for run in (
        lambda: shift_scale(x, center, scale, offset, feature_dim=-1),
        lambda: norm_shift_scale(x, center, scale, offset, eps=EPS, centered=True),
        lambda: ops.shift_scale(x, center, scale, offset, -1),
        lambda: ops.norm_shift_scale(x, center, scale, offset, EPS, True),
        lambda: ops.shift_scale_backward(offset[:, None].expand(4, 3, 8), x, center, scale, -1, True),
        lambda: ops.norm_shift_scale_backward(
            offset[:, None].expand(4, 3, 8), x, kept, kept, center, scale, True, True
        ),
    ):
        with pytest.raises(InputDeviceError, match="Expected all tensors to be on"):
            run()
        with operators.use_kernels("reference"), pytest.raises(RuntimeError):
            run()


class Seen(TorchDispatchMode):
    """The names of the operators that run inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Normed(nn.Module):
    """A norm layer as a model of its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def patched(norm: nn.Module, **options: Any) -> nn.Module:
    model = cn_hf.patch_model(Normed(norm), where="norms", num_contexts=3, **options)
    for parameter in cn_hf.context_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model.train()


NORMS = {
    "layer norm": lambda: nn.LayerNorm(8),
    "RMS norm": lambda: nn.RMSNorm(8),
    "RMS norm with an eps": lambda: nn.RMSNorm(8, eps=0.1),
    "layer norm without a bias": lambda: nn.LayerNorm(8, bias=False),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_patched_layer_norm_is_one_operator_in_each_direction(kind: str, dtype: torch.dtype) -> None:
    norm = NORMS[kind]()
    model = patched(norm, mode="cn-patches").to(dtype)
    x, ids = torch.randn(5, 7, 8).to(dtype).requires_grad_(), torch.tensor([0, 2, 1, 2, 0])
    with Seen() as seen:
        out = model(x, context_ids=ids)
        out.sum().backward()
    large = [name for name in seen.names if "norm" in name]
    assert large == ["cn_hf::norm_shift_scale", "cn_hf::norm_shift_scale_backward"]
    assert out.dtype == x.grad.dtype == dtype  # type: ignore[union-attr]
    layer = model.norm.normalizer
    mean, var = (t.double() for t in layer.statistics(ids))
    wide = formulas.standardized(
        x.detach().double(),
        getattr(norm, "eps", None) or torch.finfo(torch.float32).eps,
        isinstance(norm, nn.LayerNorm),
    )
    expected = (wide - mean[:, None]) * torch.rsqrt(var + layer.eps)[:, None] * model.norm.weight.double()
    if getattr(norm, "bias", None) is not None:
        expected = expected + model.norm.bias.double()
    close(out, expected, {torch.float16: 2**-10, torch.float64: 1e-6}.get(dtype, TOLERANCE.get(dtype, 0)))


def test_a_patched_batch_norm_is_one_operator_in_each_direction() -> None:
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(8, 4, 5, 5))
    model = patched(norm, mode="cn-channels")
    x = torch.randn(6, 4, 40, 40, requires_grad=True)
    with Seen() as seen:
        model(x, context_ids=torch.arange(6) % 3).sum().backward()
    assert [name for name in seen.names if name.startswith("cn_hf")] == [
        "cn_hf::shift_scale",
        "cn_hf::shift_scale_backward",
    ]


def saved_bytes(run: Callable[[], Any]) -> int:
    """Of the tensors that backward keeps, each storage once; parameters and inputs too."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("kernels_used", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_patched_layer_norm_keeps_no_more_for_backward(dtype: torch.dtype, kernels_used: str) -> None:
    plain = nn.LayerNorm(64, dtype=dtype)
    model = patched(nn.LayerNorm(64), mode="cn-patches").to(dtype)
    x, ids = torch.randn(8, 300, 64, dtype=dtype, requires_grad=True), torch.arange(8) % 3
    with operators.use_kernels(kernels_used):
        extra = saved_bytes(lambda: model(x, context_ids=ids)) - saved_bytes(lambda: plain(x))
    coefficients_of_all_samples = 4 * 8 * 64
    assert extra <= 9 * coefficients_of_all_samples < x.nbytes / 16 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_operators_alone(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 8)
    center, scale, offset = coefficients(4, 8)
    for function in (
        lambda: shift_scale(x, center, scale, offset, feature_dim=-1),  # type: ignore[arg-type]
        lambda: norm_shift_scale(x, center, scale, offset, eps=EPS, centered=True),  # type: ignore[arg-type]
    ):
        expected = function()
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(function(), expected)


def test_the_chain_is_one_node_of_a_compiled_graph_and_none_of_an_exported_one() -> None:
    model = patched(nn.LayerNorm(8), mode="cn-patches").eval()
    x, ids = torch.randn(2, 3, 8), torch.tensor([0, 1])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(model, backend=backend, fullgraph=True)(x, context_ids=ids)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    told_apart = not torch.compile(torch.compiler.is_exporting, backend="eager", fullgraph=True)()  # not by torch 2.11
    assert ("cn_hf.norm_shift_scale" in called) == (native.library() is not None and told_apart)
    exported = torch.export.export(model, (x,), {"context_ids": ids})
    assert not any("cn_hf" in str(node.target) for node in exported.graph.nodes)


def test_transforms_reach_through() -> None:
    """Per-sample gradients, forward mode and the Hessian see torch's own operators."""
    x = torch.randn(3, 4, 5)
    center, scale, _ = coefficients(1, 5)

    def loss(center: Tensor, sample: Tensor) -> Tensor:
        return norm_shift_scale(sample[None], center, scale, eps=EPS, centered=True).square().sum()  # type: ignore[arg-type]

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(center, x)
    for sample, gradient in zip(x, each, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(center, sample))
    _, along = torch.func.jvp(lambda c: loss(c, x[0]), (center,), (torch.ones(1, 5),))
    torch.testing.assert_close(along, torch.func.grad(loss)(center, x[0]).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(center, torch.ones(1, 5))
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual, x[0])).tangent
    torch.testing.assert_close(tangent, along)


# -------------------------------------------------------------------------------------------------------- doing without


def test_the_reference_can_be_asked_for() -> None:
    x, (center, scale, _) = torch.randn(2, 3, 8), coefficients(2, 8)
    with operators.use_kernels("reference"):
        assert not operators.fused("cpu", torch.float32)
        assert operators.describe() == f"torch {torch.__version__}"
        out = shift_scale(x, center, scale, feature_dim=-1)  # type: ignore[arg-type]
        assert torch.equal(out, (x - center[:, None]) * scale[:, None])  # type: ignore[index]
    with pytest.raises(ConfigError, match="did you mean 'reference'"), operators.use_kernels("referense"):
        pass
    assert operators.fused("cpu", torch.float32) == (native.library() is not None)


PROGRAM = """
import torch
from cn_hf.norm import functional
from cn_hf.norm.fused import native, operators
x, rows = torch.randn(4, 3, 8, requires_grad=True), [torch.rand(4, 8) for _ in range(2)]
functional.norm_shift_scale(x, *rows, eps=1e-5, centered=True).sum().backward()
assert torch.isfinite(x.grad).all()
used = native.library.cache_info().currsize and native.library()
print("native" if used else "torch", operators.describe().split()[0])
"""


def program(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "CN_HF_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"CXX": "no-such-compiler"}, ""),
        ({"CXX": "false"}, "are not used"),
        ({"CN_HF_KERNELS": "reference"}, ""),
    ],
)
def test_without_a_compiler_all_goes_on(tmp_path: Path, environment: dict[str, str], warned: str) -> None:
    done = program(tmp_path, **environment)
    assert done.stdout.split() == ["torch", "torch"], done.stderr
    assert (warned in done.stderr) if warned else done.stderr == ""
    assert not list(tmp_path.rglob("*.so"))


def test_the_environment_names_what_is_known(tmp_path: Path) -> None:
    done = program(tmp_path, CN_HF_KERNELS="fast")
    assert "Unknown kernels 'fast'" in done.stderr


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc here to list the loaded libraries")
def test_one_openmp_runtime_is_loaded() -> None:
    operators.shift_scale(torch.randn(2, 3), torch.zeros(1, 3), torch.ones(1, 3), None, 1)
    loaded = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith((".so", ".1"))
    }
    torch_folder = str(Path(torch.__file__).parent.parent)
    runtimes = {Path(name) for name in loaded if "libgomp" in name and (torch_folder in name or "python" not in name)}
    assert len(runtimes) == 1
