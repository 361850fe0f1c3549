"""The operators on a CPU: calls of the compiled kernels, one pass over ``x`` each, for what ``formulas`` computes.

Inputs are not empty, and features lie innermost or with a sample's positions right behind them.

Shape legend: as in ``formulas``; ``L`` positions of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cn_hf.norm.fused import native
from cn_hf.norm.fused.formulas import Gradients
from cn_hf.norm.fused.layout import in_rows
from cn_hf.norm.fused.native import DTYPES, agreed, versions

__all__ = [
    "DTYPES",
    "agreed",
    "norm_shift_scale",
    "norm_shift_scale_backward",
    "shift_scale",
    "shift_scale_backward",
    "versions",
]

_FEWEST_POSITIONS, _MOST_SEGMENTS = 64, 64


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    """See ``formulas``."""
    out, rows = torch.empty_like(x), native.Coefficients.of(center, scale, offset)
    samples, features = x.shape[0], x.shape[feature_dim]
    positions = x.numel() // (samples * features)
    if in_rows(x, feature_dim):
        native.call("rows_forward", x.dtype, out, x, rows, samples, features, positions)
    else:
        native.call("vectors_forward", x.dtype, out, None, None, x, rows, samples, positions, features, 0.0, 0)
    return out


def shift_scale_backward(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, feature_dim: int, need_x: bool
) -> Gradients:
    """See ``formulas``."""
    grad, rows = _like(grad, x), native.Coefficients.of(center, scale)
    samples, features = x.shape[0], x.shape[feature_dim]
    positions = x.numel() // (samples * features)
    grad_x = torch.empty_like(x) if need_x else None
    if in_rows(x, feature_dim):
        sums, dots = center.new_empty(samples, features), center.new_empty(samples, features)
        native.call("rows_backward", x.dtype, grad_x, sums, dots, grad, x, rows, samples, features, positions)
    else:
        segments = _segments(samples, positions)
        partial = [center.new_empty(samples, segments, features) for _ in range(2)]
        native.call(
            "vectors_backward", x.dtype, grad_x, *partial, grad, x, None, None, rows, samples, positions,
            features, segments, 0,
        )  # fmt: skip
        sums, dots = _sum_segments(partial)
    return grad_x, sums, dots


def norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``formulas``."""
    x = x.contiguous()
    samples, features = x.shape[0], x.shape[-1]
    out, rstd = torch.empty_like(x), center.new_empty(x.shape[:-1])
    mean, rows = torch.empty_like(rstd), native.Coefficients.of(center, scale, offset)
    native.call(
        "vectors_forward", x.dtype, out, mean, rstd, x, rows, samples, x.numel() // samples // features, features, eps,
        int(centered),
    )  # fmt: skip
    return out, mean if centered else center.new_empty(0), rstd


def norm_shift_scale_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, center: Tensor, scale: Tensor, need_x: bool, centered: bool
) -> Gradients:
    """See ``formulas``."""
    x = x.contiguous()
    grad, rows = _like(grad, x), native.Coefficients.of(center, scale)
    samples, features = x.shape[0], x.shape[-1]
    positions = x.numel() // samples // features
    segments = _segments(samples, positions)
    grad_x = torch.empty_like(x) if need_x else None
    partial = [center.new_empty(samples, segments, features) for _ in range(2)]
    mean = mean if centered else torch.zeros_like(rstd)
    native.call(
        "vectors_backward", x.dtype, grad_x, *partial, grad, x, mean, rstd, rows, samples, positions, features,
        segments, int(centered),
    )  # fmt: skip
    return grad_x, *_sum_segments(partial)


def _segments(samples: int, positions: int) -> int:
    """Into how many parts a sample's positions go: by shape alone, so that results depend on nothing else."""
    return max(1, min(_MOST_SEGMENTS // samples, positions // _FEWEST_POSITIONS))


def _sum_segments(partial: list[Tensor]) -> tuple[Tensor, Tensor]:
    sums, dots = (part[:, 0] if part.shape[1] == 1 else part.sum(1) for part in partial)
    return sums, dots


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` as ``x`` lies in memory."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)
