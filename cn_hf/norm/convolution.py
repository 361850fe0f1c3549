"""Context normalization of images followed by a convolution, as one function: the norm as an added first layer.

Composed of Eq. 8 and a convolution, backward needs the convolution's gradient by its input, of every pixel, only to sum
it into one number a sample and channel: the most expensive part of the layer. Both sums follow from less. With
``u = x - mean``, ``y = conv(scale * u, W)`` (the convolution pads what is normalised with zeros) and ``g`` the gradient
by ``y``,

- by the scale: ``sum_{o,k} W[o,c,k] G[n,o,c,k]``, with ``G[n,o,c,k] = sum_l g[n,o,l] u[n,c,l+k]``, a sample's own
  weight gradient;
- by the mean: ``-scale[n,c] sum_{o,l} g[n,o,l] R[c,o,l]``, with ``R[c]`` what the convolution makes of an image of ones
  in channel ``c`` and zeros elsewhere;
- and the gradient by the weight, ``sum_n scale[n,c] G[n,o,c,k]``, comes with the first.

Shape legend: ``N`` samples, ``C`` channels, ``O`` output channels, ``L`` output positions, ``k`` one of the kernel's
``K`` taps; ``x`` is ``(N, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from cn_hf.norm.em import full_precision, statistics_dtype
from cn_hf.norm.functional import normalize_rows, shift_scale

__all__ = ["normalized_conv2d"]

_MOST_CHANNELS, _FEWEST_POSITIONS = 4, 128
# Where the function is the faster one, by measurement: kernels of an input gradient work on blocks of many channels, of
# which an image fills few; and on tiny maps there is little to save.

_CHUNK = 2**21
# Numbers held for one chunk of samples (columns and output gradient): what stays in a core's cache.


def normalized_conv2d(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``conv2d((x - mean) / sqrt(var + eps))``: Eq. 8 with the statistics of each sample, then a convolution.

    Where ``x`` needs no gradient but a statistic does, on a CPU, backward computes no gradient by the convolution's
    input; everywhere else this is ``normalize_rows`` and ``conv2d``. The results are the same up to rounding.

    Args:
        x: ``(N, C, H, W)``, floating point.
        mean: ``(N, C)`` or ``(1, C)``.
        var: same shape as ``mean``.
        weight: of the convolution, ``(O, C / groups, kernel height, kernel width)``.
        bias: of the convolution, ``(O,)``, or None.
        eps: added to ``var``.
        stride: of the convolution.
        padding: of the convolution, with zeros after the normalization; a pair, ``"same"`` or ``"valid"``.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        What ``conv2d`` returns.

    Raises:
        InputTypeError: ``x`` is not floating point.
    """
    dtype = statistics_dtype(x, mean)
    mean, var = mean.to(dtype), var.to(dtype)
    if not isinstance(padding, str) and _saves_input_gradient(x, mean, var, weight, bias):
        height, width = (
            (size + 2 * pad - step * (taps - 1) - 1) // hop + 1
            for size, pad, step, taps, hop in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
        )
        if height > 0 and width > 0 and height * width >= _FEWEST_POSITIONS:
            scale = torch.rsqrt(var + eps)
            out: Tensor = _NormalizedConv2d.apply(x, mean, scale, weight, bias, stride, padding, dilation)
            return out
    normalized = normalize_rows(x, mean, var, eps=eps, feature_dim=1)
    return F.conv2d(normalized, weight, bias, stride, padding, dilation, groups)


def _saves_input_gradient(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True if the input gradient is to be had cheaper, and by what ``_NormalizedConv2d`` can do."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled() or x.requires_grad or not (mean.requires_grad or var.requires_grad):
        return False
    tensors = [tensor for tensor in (x, mean, var, weight, bias) if tensor is not None]
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == weight.dim() == 4
        and len(x) > 0
        and x.shape[1] == mean.shape[1] == weight.shape[1] <= _MOST_CHANNELS  # hence one group
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)  # no subclass with rules of its own
        and all(tensor.device == x.device and tensor.dtype == mean.dtype for tensor in tensors)
        and all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)  # type: ignore[no-untyped-call]
    )


_Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int]]  # stride, padding, dilation


class _NormalizedConv2d(torch.autograd.Function):
    """The convolution of ``(x - center) * scale`` for an ``x`` without gradient; its backward can be differentiated."""

    @staticmethod
    def forward(
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        return F.conv2d(shift_scale(x, center, scale, feature_dim=1), weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's untyped protocol
        x, center, scale, weight, _, *geometry = inputs
        ctx.save_for_backward(x, center, scale, weight)
        ctx.geometry = tuple(geometry)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]  # torch's untyped protocol
        x, center, scale, weight = ctx.saved_tensors
        _, need_center, need_scale, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_center = grad_scale = grad_weight = grad_bias = None
        with full_precision(x.device):
            constant, by_scale, by_weight = _gradient_sums(grad, x, center, scale, weight, ctx.geometry)
            if need_center:
                grad_center = -(constant * scale).sum_to_size(center.shape)
            if need_scale:
                grad_scale = by_scale.sum_to_size(scale.shape)
            if need_weight:
                grad_weight = by_weight
            if need_bias:
                grad_bias = grad.sum((0, 2, 3))
        return None, grad_center, grad_scale, grad_weight, grad_bias, None, None, None


def _gradient_sums(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, weight: Tensor, geometry: _Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by a constant added to each channel and by the scale, ``(N, C)`` each, and by the weight.

    A chunk of samples after the other, whose columns are used while they are in the cache. Out of place, so that it can
    be differentiated.
    """
    channels = weight.shape[1]
    taps = weight.permute(1, 2, 3, 0)  # (C, kernel height, kernel width, O)
    one_channel = torch.eye(channels, dtype=x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    response = F.conv2d(one_channel, weight, None, *geometry).flatten(1)  # R, (C, O L)
    positions = grad.shape[2] * grad.shape[3]
    size = max(1, _CHUNK // (positions * (weight[0].numel() + len(weight))))
    rows = center.expand(len(x), -1), scale.expand(len(x), -1)
    chunks = zip(*(torch.split(tensor, size) for tensor in (x, grad, *rows)), strict=True)
    by_constant, by_scale, by_weight = [], [], torch.zeros_like(taps).flatten(1)
    for x_part, grad_part, center_part, scale_part in chunks:
        samples, outputs = grad_part.shape[:2]
        grad_part = grad_part.contiguous()
        columns = _columns(x_part - center_part[:, :, None, None], weight.shape[2:], *geometry)
        own = torch.bmm(columns, grad_part.reshape(samples, outputs, -1).mT).reshape(samples, channels, -1)  # G
        by_constant.append((response @ grad_part.reshape(samples, -1).T).T)
        by_scale.append((own * taps.flatten(1)).sum(2))
        by_weight = by_weight + (own * scale_part[:, :, None]).sum(0)
    return torch.cat(by_constant), torch.cat(by_scale), by_weight.view_as(taps).permute(3, 0, 1, 2)


def _columns(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the inputs of each tap at each position, ``(N, C K, L)``: ``F.unfold``, faster as a copy of a view."""
    windows = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis, (taps, hop, step) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, step * (taps - 1) + 1, hop)[..., ::step]
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
