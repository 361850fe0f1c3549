"""Fused forms of Eq. 8 as torch operators: one pass over ``x`` forward, one over ``x`` and its gradient backward.

| operator | it computes |
|---|---|
| ``cn_hf::shift_scale`` | ``(x - center) * scale + offset`` |
| ``cn_hf::norm_shift_scale`` | the same of ``x`` standardised over its last axis, as by a layer or RMS norm |

Each has a ``_backward``. They are registered with ``torch.library``, so that autograd, autocast, ``torch.compile`` and
fake tensors know them. A CUDA device runs ``triton_kernels``, a CPU ``cpu_kernels``; everywhere else, and for dtypes
these do not have, it is ``formulas``: torch's own operators, the same results, what the others are tested against.

Sums over positions come out a row a sample, in the same order every time; what adds up the samples of a context is the
backward of the row look-up in ``functional``.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions (pixels or tokens) of a sample. Coefficients are ``(N, C)``
or ``(1, C)``, float32, or float64 where ``x`` is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cn_hf.errors import ConfigError, InputShapeError, nearest
from cn_hf.norm import cpu_kernels, formulas, native
from cn_hf.norm.formulas import Gradients
from cn_hf.norm.layout import check_devices, stored_like

__all__ = ["describe", "fused", "norm_shift_scale", "reference", "shift_scale", "use_kernels"]

CHOICES = ("auto", "reference")


# ------------------------------------------------------------------------------------------------------- which kernels


def _chosen(name: str) -> str:
    if name not in CHOICES:
        raise ConfigError(f"Unknown kernels {name!r}; {nearest(name, CHOICES)}")
    return name


_choice = [_chosen(os.environ.get("CN_HF_KERNELS") or "auto")]


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in all threads of the process.

    The environment's ``CN_HF_KERNELS`` chooses for as long as the process lives.

    Args:
        name: ``"auto"``, the fastest there is; ``"reference"``, torch's own operators.

    Raises:
        ConfigError: it is neither.
    """
    _choice.append(_chosen(name))
    try:
        yield
    finally:
        _choice.pop()


def reference() -> bool:
    """Whether torch's own operators have been chosen."""
    return _choice[-1] == "reference"


def fused(device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels of our own for ``x`` on such a device and of such a dtype."""
    if reference():
        return False
    if device_type == "cpu":
        return dtype in native.DTYPES and native.library() is not None
    return device_type == "cuda" and _triton_works()


# As torch.compiler.assume_constant_result does, which would import the compiler.
fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_works() -> bool:
    """Whether triton can compile and launch here, which needs a C compiler and a GPU that is not too old: once tried.

    Fake tensors of a GPU that is not there are not computed, so triton need only be installed.
    """
    if find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():
        return True
    try:
        with _disable_current_modes():  # such as that of fake tensors, while a graph is traced
            one = torch.ones(1, 1, 1, device="cuda")
            triton_kernels = import_module("cn_hf.norm.triton_kernels")
            triton_kernels.shift_scale(one, one[0], one[0], None, 1)
    except Exception as error:  # of triton, of the compiler it calls, or of the driver
        warnings.warn(
            f"The CUDA kernels of context normalization are not used, torch's operators are: {str(error)[-500:]} "
            "(CN_HF_KERNELS=reference never compiles).",
            stacklevel=2,
        )
        return False
    return True


def describe(device_type: str = "cpu") -> str:
    """What computes on a device of this type, in a few words: for tables of measurements."""
    if not fused(device_type, torch.float32):
        return f"torch {torch.__version__}"
    return f"triton {import_module('triton').__version__}" if device_type == "cuda" else "native"


# ------------------------------------------------------------------------------------------------------- the operators

_LIBRARY = torch.library.Library("cn_hf", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it untyped
for _signature in (
    "shift_scale(Tensor x, Tensor center, Tensor scale, Tensor? offset, int feature_dim) -> Tensor",
    "shift_scale_backward(Tensor grad, Tensor x, Tensor center, Tensor scale, int feature_dim, bool need_x) "
    "-> (Tensor, Tensor, Tensor)",
    "norm_shift_scale(Tensor x, Tensor center, Tensor scale, Tensor? offset, float eps, bool centered) "
    "-> (Tensor, Tensor, Tensor)",
    "norm_shift_scale_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor center, Tensor scale, "
    "bool need_x, bool centered) -> (Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_signature)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    """``(x - center) * scale + offset``, which keeps ``x`` and the coefficients for backward.

    Args:
        x: ``(N, C, ...)`` with ``feature_dim=1`` or ``(N, ..., C)`` with ``feature_dim=-1``.
        center: ``(N, C)`` or ``(1, C)``.
        scale: likewise.
        offset: likewise, or None.
        feature_dim: 1 or -1; any other axis is moved to 1 first.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        InputShapeError: the coefficients are not one row a sample, or one for all.
    """
    _check_rows(x, feature_dim, center, scale, offset)
    if feature_dim not in (1, -1):  # the axes that the operator knows
        return shift_scale(x.movedim(feature_dim, 1), center, scale, offset, 1).movedim(1, feature_dim)
    out: Tensor = torch.ops.cn_hf.shift_scale(x, center, scale, offset, feature_dim)
    return out


def norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> Tensor:
    """``(standardised x - center) * scale + offset``, which keeps ``x`` and two numbers a vector for backward.

    Args:
        x: ``(N, ..., C)``.
        center: ``(N, C)`` or ``(1, C)``.
        scale: likewise.
        offset: likewise, or None.
        eps: under the root of the standardisation.
        centered: standardise as a layer norm does; if not, as an RMS norm.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        InputShapeError: the coefficients are not one row a sample, or one for all.
    """
    _check_rows(x, -1, center, scale, offset)
    out: Tensor = torch.ops.cn_hf.norm_shift_scale(x, center, scale, offset, eps, centered)[0]
    return out


def _check_rows(x: Tensor, feature_dim: int, *rows: Tensor | None) -> None:
    """The kernels read memory as these shapes say."""
    samples, features = x.shape[0], x.shape[feature_dim]
    for row in rows:
        if row is not None and row.shape != (samples, features) and row.shape != (1, features):
            raise InputShapeError(
                f"Statistics of a batch of shape {tuple(x.shape)} must be ({samples}, {features}), one row a sample, "
                f"or (1, {features}), received {tuple(row.shape)}: is there one context id a sample?"
            )


# --------------------------------------------------------------------------------------------------- what computes them


def _register(name: str) -> None:
    reference = getattr(formulas, name)

    def everywhere(*arguments: Any) -> Any:
        _check(name, arguments)
        return _as_declared(name, reference(*arguments), arguments)

    def on_cpu(*arguments: Any) -> Any:
        _check(name, arguments)
        out = getattr(cpu_kernels, name)(*arguments) if _known("cpu", name, arguments) else None
        return _as_declared(name, reference(*arguments) if out is None else out, arguments)

    def on_cuda(*arguments: Any) -> Any:
        _check(name, arguments)
        if not _known("cuda", name, arguments):
            return _as_declared(name, reference(*arguments), arguments)
        from cn_hf.norm import triton_kernels

        return _as_declared(name, getattr(triton_kernels, name)(*arguments), arguments)

    for function, key in ((everywhere, "CompositeExplicitAutograd"), (on_cpu, "CPU"), (on_cuda, "CUDA")):
        _LIBRARY.impl(name, function, key)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _check(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise unless all tensors are on one device: torch runs the fake kernel for a mix with the meta device."""
    x = _input(name, arguments)
    check_devices(x, *(argument for argument in arguments if isinstance(argument, Tensor)))


def _input(name: str, arguments: tuple[Any, ...]) -> Tensor:
    x: Tensor = arguments[1 if name.endswith("_backward") else 0]  # the gradient comes before x
    return x


def _known(device_type: str, name: str, arguments: tuple[Any, ...]) -> bool:
    """True if our kernels know such arguments: statistics in float32 and their rows in order."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    x, rows = _input(name, arguments), tensors[2 if name.endswith("_backward") else 1 :]
    wide = torch.promote_types(x.dtype, torch.float32)
    return fused(device_type, x.dtype) and all(
        row.dtype == wide and (row.dim() != 2 or row.stride(-1) == 1) for row in rows
    )


def _as_declared(name: str, out: Any, arguments: tuple[Any, ...]) -> Any:
    """What an operator returns, with the strides that its fake kernel promises.

    The result of ``shift_scale`` and its gradient lie in memory like ``x``, all else is contiguous. A gradient that was
    not asked for is an empty tensor.
    """
    x = _input(name, arguments)
    if name == "shift_scale":
        return stored_like(out, x)
    first, *rest = out
    if first is None:
        first = x.new_empty(0)
    else:
        first = stored_like(first, x) if name == "shift_scale_backward" else first.contiguous()
    return first, *(part.contiguous() for part in rest)


for _name in ("shift_scale", "shift_scale_backward", "norm_shift_scale", "norm_shift_scale_backward"):
    _register(_name)


# ------------------------------------------------------------------------------------------------ shapes and gradients


def _shift_scale_fake(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    check_devices(x, center, scale, offset)
    return torch.empty_like(x)


def _shift_scale_backward_fake(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, feature_dim: int, need_x: bool
) -> tuple[Tensor, ...]:
    check_devices(x, grad, center, scale)
    sums = center.new_empty(x.shape[0], x.shape[feature_dim])
    return torch.empty_like(x) if need_x else x.new_empty(0), sums, torch.empty_like(sums)


def _norm_shift_scale_fake(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, ...]:
    check_devices(x, center, scale, offset)
    rstd = center.new_empty(x.shape[:-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(rstd) if centered else center.new_empty(0), rstd


def _norm_shift_scale_backward_fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, center: Tensor, scale: Tensor, need_x: bool, centered: bool
) -> tuple[Tensor, ...]:
    check_devices(x, grad, mean, rstd, center, scale)
    sums = center.new_empty(x.shape[0], x.shape[-1])
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return grad_x, sums, torch.empty_like(sums)


def _keep_for_shift_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, center, scale, offset, ctx.feature_dim = inputs
    ctx.save_for_backward(x, center, scale)
    ctx.offset_shape = None if offset is None else offset.shape


def _differentiate_shift_scale(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, center, scale = ctx.saved_tensors
    twice = torch.is_grad_enabled()  # the gradient itself is to be differentiated
    backward: Any = formulas.shift_scale_backward if twice else torch.ops.cn_hf.shift_scale_backward
    gradients = backward(grad, x, center, scale, ctx.feature_dim, ctx.needs_input_grad[0])
    return *_by_input(ctx, gradients, center, scale), None


def _keep_for_norm_shift_scale(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, center, scale, offset, ctx.eps, ctx.centered = inputs
    ctx.save_for_backward(x, center, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.offset_shape = None if offset is None else offset.shape


def _differentiate_norm_shift_scale(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    x, center, scale, *kept = ctx.saved_tensors
    backward: Any = torch.ops.cn_hf.norm_shift_scale_backward
    if torch.is_grad_enabled():  # the gradient itself is to be differentiated, and so are the vectors' statistics
        kept = formulas.vector_statistics(x.to(scale.dtype), ctx.eps, ctx.centered)
        backward = formulas.norm_shift_scale_backward
    gradients = backward(grad, x, *kept, center, scale, ctx.needs_input_grad[0], ctx.centered)
    return *_by_input(ctx, gradients, center, scale), None, None


def _by_input(ctx: Any, gradients: Gradients, center: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by x, center, scale and offset; None for those not needed."""
    need_x, need_center, need_scale, need_offset, *_ = ctx.needs_input_grad
    by_x, sums, dots = gradients
    return (
        by_x if need_x else None,
        -(sums * scale).sum_to_size(center.shape) if need_center else None,
        dots.sum_to_size(scale.shape) if need_scale else None,
        sums.sum_to_size(ctx.offset_shape) if need_offset and ctx.offset_shape is not None else None,
    )


for _name, _fake in (
    ("shift_scale", _shift_scale_fake),
    ("shift_scale_backward", _shift_scale_backward_fake),
    ("norm_shift_scale", _norm_shift_scale_fake),
    ("norm_shift_scale_backward", _norm_shift_scale_backward_fake),
):
    torch.library.register_fake(f"cn_hf::{_name}", _fake, lib=_LIBRARY)
for _name, _backward, _keep in (
    ("shift_scale", _differentiate_shift_scale, _keep_for_shift_scale),
    ("norm_shift_scale", _differentiate_norm_shift_scale, _keep_for_norm_shift_scale),
):
    torch.library.register_autograd(f"cn_hf::{_name}", _backward, setup_context=_keep, lib=_LIBRARY)
