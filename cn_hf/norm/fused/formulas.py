"""The fused kernels' formulas in torch's own operators: the reference, and the fall-back without kernels.

``shift_scale`` and ``composed`` can be differentiated, exported and transformed in every way torch knows; the others
are the forward and backward of the operators in ``kernels``.

Shape legend: ``N`` samples, ``C`` features. Coefficients are ``(N, C)`` or ``(1, C)``, float32, or float64 where ``x``
is.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Gradients",
    "along",
    "composed",
    "norm_shift_scale",
    "norm_shift_scale_backward",
    "shift_scale",
    "shift_scale_backward",
    "standardized",
    "vector_statistics",
]

Gradients: TypeAlias = tuple[Tensor | None, Tensor, Tensor]
"""By ``x``, None where not asked for; by the offset and by the scale of each sample, ``(N, C)`` float32 or float64."""


def along(row: Tensor, x: Tensor, feature_dim: int) -> Tensor:
    """``(C,)``, ``(1, C)`` or ``(N, C)``, shaped to broadcast to ``x``."""
    shape = [1] * x.dim()
    shape[feature_dim] = row.shape[-1]
    if row.dim() == 2:
        shape[0] = row.shape[0]
    return row.reshape(shape)


def _sum_positions(x: Tensor, feature_dim: int) -> Tensor:
    """``(N, C)``."""
    dims = [dim for dim in range(1, x.dim()) if dim != feature_dim % x.dim()]
    return x.sum(dims) if dims else x.clone(memory_format=torch.contiguous_format)


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    """``(x - center) * scale + offset``, in the dtype of ``x``."""
    centered, scale = x - along(center, x, feature_dim), along(scale, x, feature_dim)
    out = centered * scale if offset is None else torch.addcmul(along(offset, x, feature_dim), centered, scale)
    return out.to(x.dtype)


def standardized(x: Tensor, eps: float, centered: bool) -> Tensor:
    """``x`` standardised over its last axis, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    shape = x.shape[-1:]
    return F.layer_norm(wide, shape, None, None, eps) if centered else F.rms_norm(wide, shape, None, eps)


def composed(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool) -> Tensor:
    """``(standardized(x) - center) * scale + offset``, in the dtype of ``x``."""
    return shift_scale(standardized(x, eps, centered), center, scale, offset, -1).to(x.dtype)


def shift_scale_backward(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, feature_dim: int, need_x: bool
) -> Gradients:
    """The backward of ``shift_scale``."""
    wide = grad.to(scale.dtype)
    grad_x = (wide * along(scale, x, feature_dim)).to(x.dtype) if need_x else None
    dots = _sum_positions(wide * (x - along(center, x, feature_dim)), feature_dim)
    return grad_x, _sum_positions(wide, feature_dim), dots


def vector_statistics(x: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """Mean (empty unless ``centered``) and ``1 / sqrt(variance + eps)`` of each vector, ``(N, ...)``."""
    mean = x.mean(-1) if centered else x.new_empty(0)
    deviation = x - mean.unsqueeze(-1) if centered else x
    return mean, torch.rsqrt(deviation.square().mean(-1) + eps)


def norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``composed``, then ``vector_statistics``."""
    wide = x.to(scale.dtype)
    if centered:
        normalized, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    else:
        mean, rstd = vector_statistics(wide, eps, centered)
        normalized = wide * rstd.unsqueeze(-1)
    return shift_scale(normalized, center, scale, offset, -1).to(x.dtype), mean, rstd


def norm_shift_scale_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, center: Tensor, scale: Tensor, need_x: bool, centered: bool
) -> Gradients:
    """The backward of ``norm_shift_scale``, from what it has returned."""
    wide, unit = x.to(scale.dtype), rstd.unsqueeze(-1)
    normalized = (wide - mean.unsqueeze(-1) if centered else wide) * unit
    through, sums, dots = shift_scale_backward(grad.to(scale.dtype), normalized, center, scale, -1, need_x)
    if through is None:
        return None, sums, dots
    grad_x = through - normalized * (through * normalized).mean(-1, keepdim=True)
    if centered:
        grad_x = grad_x - through.mean(-1, keepdim=True)
    return (grad_x * unit).to(x.dtype), sums, dots
