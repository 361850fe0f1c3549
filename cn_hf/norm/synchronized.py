"""Batch normalization (Eqs. 1-3) over the batches of all processes together, on any device.

Processes hold contiguous parts of one global batch, of any sizes. Each gathers the count, mean and summed squared
deviation of every part, and merges them by the formula of Chan, Golub and LeVeque (1979); backward sums what the
statistics contribute to the gradient. So a step costs one collective forward and one backward, and gives what one
process would give on the whole batch. ``torch.nn.SyncBatchNorm`` does the same on GPUs only.

Shape legend: ``N`` samples, ``C`` features, ``M`` feature vectors (every pixel or token of every sample), ``P``
processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cn_hf.errors import InputShapeError
from cn_hf.norm.em import full_precision, statistics_dtype, sum_over_processes
from cn_hf.norm.fused.formulas import along

__all__ = ["recomputing", "several_processes", "synchronized_batch_norm", "synchronized_forward"]


def recomputing() -> bool:
    """True if activation checkpointing is running a forward a second time, during backward."""
    return torch._C._current_graph_task_id() != -1


def several_processes() -> bool:
    """True if a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Moments(NamedTuple):
    """Of the vectors of all processes: their number ``total`` ``()``, ``mean`` ``(C,)``, biased ``var`` ``(C,)``."""

    total: Tensor
    mean: Tensor
    var: Tensor


def synchronized_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    feature_dim: int = 1,
) -> Tensor:
    """``F.batch_norm`` in training, over the vectors of all processes of the default group.

    Every process must call it, and run backward through it, the same number of times in the same order, also one whose
    part of the batch is empty. Gradients of ``weight`` and ``bias`` are those of this process's part, to be summed or
    averaged by whoever does so for all parameters. Cannot be differentiated twice.

    Args:
        x: this process's part, ``(N, C, ...)`` or ``(N, ..., C)``, floating point.
        running_mean: ``(C,)``, moved in place; None for none.
        running_var: ``(C,)``, moved in place by the unbiased variance; None for none.
        weight: optional affine scale ``(C,)``.
        bias: optional affine offset ``(C,)``.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        feature_dim: the axis of ``x`` that holds the features: 1 or -1.

    Returns:
        Tensor of the shape and dtype of ``x``; statistics are float32 at least.

    Raises:
        InputShapeError: there is one vector in all processes together, which has no variance.
        InputTypeError: ``x`` is not floating point.
    """
    with full_precision(x.device):
        with torch.no_grad():
            moments = _moments(x, feature_dim)
            if _several_vectors(x, moments.total, feature_dim):
                _track(running_mean, moments.mean, momentum)
                _track(running_var, moments.var * (moments.total / (moments.total - 1)), momentum)
        out: Tensor = _Normalize.apply(x, weight, bias, *moments, eps, feature_dim)
        return out


@torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable, but importing the compiler only when used
def synchronized_forward(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, *, feature_dim: int = 1) -> Tensor:
    """The forward of a batch norm module in training, over the vectors of all processes.

    Counts batches as the module itself does; running statistics move once under activation checkpointing.

    Args:
        norm: the module whose options, parameters and buffers are meant.
        x: see ``synchronized_batch_norm``.
        feature_dim: see ``synchronized_batch_norm``.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    momentum = norm.momentum
    running_mean, running_var = norm.running_mean, norm.running_var
    if not norm.track_running_stats or recomputing():
        running_mean = running_var = None
    elif norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(norm.num_batches_tracked)
    return synchronized_batch_norm(
        x,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        momentum=momentum or 0.0,
        eps=norm.eps,
        feature_dim=feature_dim,
    )


def _moments(x: Tensor, feature_dim: int) -> _Moments:
    wide = x.to(statistics_dtype(x))
    features = x.shape[feature_dim]
    count = x.numel() // max(features, 1)
    mean = wide.sum(_vector_dims(x, feature_dim)) / max(count, 1)
    deviation = wide - along(mean, x, feature_dim)
    squared = deviation.square_().sum(_vector_dims(x, feature_dim))
    own = torch.cat([mean.new_full((1,), count), mean, squared])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    counts, means, squares = torch.split(torch.stack(parts), [1, features, features], dim=1)
    total = counts.sum()
    divisor = total.clamp_min(1)
    mean = (counts * means).sum(dim=0) / divisor
    var = (squares.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)) / divisor
    return _Moments(total, mean, var)


def _several_vectors(x: Tensor, total: Tensor, feature_dim: int) -> bool:
    """True if the processes hold more than one vector together; False for none, an error for one.

    The total is read, which on a GPU means to wait for it, only where this process's own part leaves it open.
    """
    if x.numel() > x.shape[feature_dim]:
        return True
    if total == 1:
        raise InputShapeError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} on this process "
            "and 1 value in all processes together."
        )
    return bool(total > 1)


def _track(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_(running.to(value.dtype).lerp(value, momentum))


def _vector_dims(x: Tensor, feature_dim: int) -> list[int]:
    """All axes of ``x`` but the features'."""
    return [dim for dim in range(x.dim()) if dim != feature_dim % x.dim()]


class _Normalize(torch.autograd.Function):
    """Normalise by given statistics; backward is exact through the vectors of all processes they were taken over."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # torch's untyped protocol
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        total: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        feature_dim: int,
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, total, mean, rstd)
        ctx.feature_dim = feature_dim
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale = rstd if weight is None else rstd * weight
        out = (x - along(mean, x, feature_dim)).mul_(along(scale, x, feature_dim))
        if bias is not None:
            out.add_(along(bias, x, feature_dim))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]  # torch's untyped protocol
        x, weight, total, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        with full_precision(x.device):
            dims, wide = _vector_dims(x, ctx.feature_dim), grad.to(rstd.dtype)
            normalized = (x - along(mean, x, ctx.feature_dim)).mul_(along(rstd, x, ctx.feature_dim))
            grad_bias, grad_weight = wide.sum(dims), (wide * normalized).sum(dims)
            grad_x = None
            if need_x:
                first, second = (
                    along(summed / total.clamp_min(1), x, ctx.feature_dim)
                    for summed in sum_over_processes((grad_bias, grad_weight))
                )
                scale = rstd if weight is None else rstd * weight
                grad_x = (wide - first).sub_(normalized.mul_(second)).mul_(along(scale, x, ctx.feature_dim))
                grad_x = grad_x.to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(ctx.bias_dtype) if need_bias else None,
            *(None,) * 5,
        )
