"""Fused forms of Eq. 8 as torch operators: one pass over ``x`` forward, one over ``x`` and its gradient backward.

| operator | it computes |
|---|---|
| ``cn_hf::shift_scale`` | ``(x - center) * scale + offset`` |
| ``cn_hf::norm_shift_scale`` | the same of ``x`` standardised over its last axis, as by a layer or RMS norm |

Each has a ``_backward``. They are registered with ``torch.library``, so that autograd, autocast, ``torch.compile`` and
fake tensors know them. A CUDA device runs ``triton_kernels``, a CPU ``cpu_kernels``; everywhere else, and for dtypes
these do not have, it is ``formulas``: torch's own operators, the same results, what the others are tested against.
``agreement`` says which of them can be trusted.

Sums over positions come out a row a sample, in the same order every time; what adds up the samples of a context is the
backward of the row look-up in ``functional``.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions (pixels or tokens) of a sample. Coefficients are ``(N, C)``
or ``(1, C)``, float32, or float64 where ``x`` is.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cn_hf.errors import CnHfError, InputShapeError
from cn_hf.norm.fused import formulas
from cn_hf.norm.fused.agreement import distrust, module_for, reference, trusted, use_kernels
from cn_hf.norm.fused.formulas import Gradients
from cn_hf.norm.fused.layout import check_devices, in_rows, stored, stored_like

__all__ = ["check_rows", "describe", "fused", "norm_shift_scale", "reference", "shift_scale", "use_kernels"]


def fused(device_type: str, dtype: torch.dtype) -> bool:
    """True if our kernels standardise and normalise ``x`` on such a device and of such a dtype.

    Fake tensors of a GPU that is not there are not computed, so triton need only be installed.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        return not reference() and find_spec("triton") is not None
    if device_type not in ("cpu", "cuda"):
        return False
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    return trusted("norm", device, dtype) and trusted("norm_backward", device, dtype)


# As torch.compiler.assume_constant_result does, which would import the compiler.
fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe(device_type: str = "cpu") -> str:
    """Name what computes on a device of this type, in a few words: for tables of measurements."""
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
    out: Tensor = torch.ops.cn_hf.norm_shift_scale(x, center, scale, offset, eps, centered)[0]
    return out


# --------------------------------------------------------------------------------------------------- what computes them


def _shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    check_rows(x, feature_dim, center, scale, offset)
    held, kernel = _prepared(x, feature_dim, center, scale, offset)
    out: Tensor = _run("shift_scale", kernel, held, (held, center, scale, offset, feature_dim))
    return stored_like(out, x)


def _shift_scale_backward(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, feature_dim: int, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(x, feature_dim, center, scale, grad=grad)
    held, kernel = _prepared(x, feature_dim, center, scale)
    arguments = grad, held, center, scale, feature_dim, need_x
    by_x, sums, dots = _run("shift_scale_backward", kernel and f"{kernel}_backward", held, arguments)
    return x.new_empty(0) if by_x is None else stored_like(by_x, x), sums.contiguous(), dots.contiguous()


def _norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, ...]:
    check_rows(x, -1, center, scale, offset)
    kernel = "norm" if _ordered(x, center, scale, offset) else None
    outputs = _run("norm_shift_scale", kernel, x, (x, center, scale, offset, eps, centered))
    return tuple([output.contiguous() for output in outputs])


def _norm_shift_scale_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, center: Tensor, scale: Tensor, need_x: bool, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(x, -1, center, scale, grad=grad)
    check_devices(x, mean, rstd)
    kernel = "norm_backward" if _ordered(x, center, scale) and mean.dtype == rstd.dtype == scale.dtype else None
    arguments = grad, x, mean, rstd, center, scale, need_x, centered
    by_x, sums, dots = _run("norm_shift_scale_backward", kernel, x, arguments)
    return x.new_empty(0) if by_x is None else by_x.contiguous(), sums.contiguous(), dots.contiguous()


def check_rows(
    x: Tensor,
    feature_dim: int,
    center: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """Raise unless all is on one device and there is one row of coefficients a sample, or one for all.

    The kernels read memory as these shapes say; for a mix with the meta device torch would run the fake kernels.

    Raises:
        InputDeviceError: the tensors are on different devices.
        InputShapeError: the shapes do not fit.
    """
    check_devices(x, center, scale, offset, grad)
    samples, features = x.shape[0], x.shape[feature_dim]
    for row in (center, scale, offset):
        if row is not None and row.shape != (samples, features) and row.shape != (1, features):
            raise InputShapeError(
                f"Statistics of a batch of shape {tuple(x.shape)} must be ({samples}, {features}), one row a sample, "
                f"or (1, {features}), received {tuple(row.shape)}: is there one context id a sample?"
            )
    if grad is not None and grad.shape != x.shape:
        raise InputShapeError(f"Expected a gradient of shape {tuple(x.shape)}, received {tuple(grad.shape)}.")


def _prepared(
    x: Tensor, feature_dim: int, center: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, str | None]:
    """``x`` in rows or columns, copied if it is in neither, and the kernel for it; None where there is none."""
    if not _ordered(x, center, scale, offset):
        return x, None
    if x.is_contiguous():
        return x, "rows" if feature_dim == 1 and x.numel() > x.shape[0] * x.shape[1] else "vectors"
    held, _ = stored(x, feature_dim)
    return held, "rows" if in_rows(held, feature_dim) else "vectors"


def _ordered(x: Tensor, *rows: Tensor | None) -> bool:
    """True if kernels can take these: something to do, coefficients in float32 (float64 as ``x``), rows in order."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for row in rows:
        if row is not None and (row.dtype != wide or row.stride(-1) != 1):
            return False
    return x.numel() > 0


def _run(operator: str, kernel: str | None, x: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The result of our kernel where it can be trusted, else of the formulas."""
    if kernel is not None and trusted(kernel, x.device, x.dtype):
        module = module_for(x.device.type)
        try:
            return getattr(module, operator)(*arguments)
        except (CnHfError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler or driver may fail for these sizes alone
            distrust(kernel, x.device, x.dtype, f"{type(error).__name__}: {str(error)[-300:]}")
    return getattr(formulas, operator)(*arguments)


for _name, _function in (
    ("shift_scale", _shift_scale),
    ("shift_scale_backward", _shift_scale_backward),
    ("norm_shift_scale", _norm_shift_scale),
    ("norm_shift_scale_backward", _norm_shift_scale_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch leaves it so


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
