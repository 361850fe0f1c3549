"""All components at once: what CN+ (Eq. 9) and MN (Eqs. 5-7) share, in operators that torch differentiates.

Everything is computed in ``wide_dtype`` on feature vectors; results are of the dtype of the input.

Shape legend: ``N`` samples, ``C`` features, ``K`` components (contexts), ``M`` feature vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cn_hf.norm.em import (
    Densities,
    SumOverProcesses,
    full_precision,
    piece_size,
    reduce_over_processes,
    statistics_dtype,
    wide_dtype,
)

__all__ = ["batch_statistics", "combine", "combine_in_pieces", "component_statistics", "mixture"]


def component_statistics(x: Tensor, log_tau: Tensor, *, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of each component over a batch, weighted by the normalised posteriors (Eqs. 7 and 9).

    The weights are a softmax over the batch of ``log_tau``, so a component far from every vector still gets finite
    statistics instead of 0/0. Differentiable in both arguments.

    Args:
        x: ``(M, C)``.
        log_tau: ``(M, K)``.
        distributed: sum over all processes of the default group.

    Returns:
        mean ``(K, C)`` and biased variance ``(K, C)``, float32 at least.
    """
    wide, dtype = wide_dtype(x, log_tau), statistics_dtype(x, log_tau)
    mean, var = _component_statistics([(x.to(wide), x.to(wide).square(), log_tau.to(wide))], distributed)
    return mean.to(dtype), var.to(dtype)


def _component_statistics(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], distributed: bool = False
) -> tuple[Tensor, Tensor]:
    """``component_statistics`` of parts: vectors, squares, posteriors; the largest weight so far is kept at one."""
    peak: Tensor | None = None
    sums: tuple[Tensor, ...] = ()
    for x, square, log_tau in parts:
        found = log_tau.detach()
        largest = found.amax(dim=0) if len(found) else found.new_full(found.shape[1:], -math.inf)
        before, peak = peak, largest if peak is None else torch.maximum(peak, largest)
        with full_precision(x.device):
            weight = (log_tau - peak).exp()
            own = weight.sum(dim=0)[:, None], weight.T @ x, weight.T @ square
        sums = own if before is None else _plus(sums, (before - peak).exp(), own)
    assert peak is not None, "a batch has at least one part"
    if distributed:
        most = reduce_over_processes(peak, dist.ReduceOp.MAX)
        sums = SumOverProcesses.apply(*(part * (peak - most).exp()[:, None] for part in sums))
    total, first, second = sums
    mean = first / total
    return mean, (second / total - mean.square()).clamp_min(0)


def _plus(held: tuple[Tensor, ...], kept: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a * kept[:, None] + b for a, b in zip(held, own, strict=True))


def mixture(
    x: Tensor, coefficient: Tensor, mean: Tensor, var: Tensor, *, eps: float, weight: Tensor | None = None
) -> Tensor:
    """``sum_k coefficient_k (x - mean_k) / sqrt(var_k + eps)``: the aggregation shared by CN+ (Eq. 9) and MN (Eq. 6).

    Two matrix products; no copy of ``x`` a component is made.

    Args:
        x: ``(M, C)``.
        coefficient: ``(M, K)``.
        mean: ``(K, C)``.
        var: ``(K, C)``.
        eps: added to ``var``.
        weight: optional factor of each feature, ``(C,)``.

    Returns:
        ``(M, C)``, float32 at least.
    """
    wide = wide_dtype(x, coefficient, mean, var)
    with full_precision(x.device):
        coefficient, scale = coefficient.to(wide), torch.rsqrt(var.to(wide) + eps)
        scale = scale if weight is None else scale * weight
        out = torch.addcmul(coefficient @ (-mean.to(wide) * scale), x.to(wide), coefficient @ scale)
    return out.to(statistics_dtype(x, coefficient, mean, var))


def _vectors_of(x: Tensor, feature_dim: int, shift: Tensor) -> Tensor:
    """All feature vectors of ``x`` less the shift, ``(M, C)``."""
    return x.movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim]).to(shift.dtype) - shift


def combine(
    x: Tensor,
    densities: Densities,
    factor: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    feature_dim: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    distributed: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All components of every vector, weighted by its posteriors times a factor; torch differentiates it.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``.
        densities: of the components, with their priors.
        factor: ``(K,)`` or ``()``.
        statistics: mean and variance of each component about the shift of the densities, ``(K, C)`` each; None: those
            of the batch.
        eps: added to the variances under the root.
        feature_dim: 1 or -1.
        weight: optional affine scale ``(C,)``.
        bias: optional affine offset ``(C,)``.
        distributed: the batch is that of all processes.

    Returns:
        The output, of the shape and dtype of ``x``, and the statistics.
    """
    vectors = _vectors_of(x, feature_dim, densities.shift)
    square = vectors.square()
    log_tau = densities.log_posteriors(vectors, square)
    used = _component_statistics([(vectors, square, log_tau)], distributed) if statistics is None else statistics
    out = mixture(vectors, log_tau.exp() * factor, *used, eps=eps, weight=weight)
    out = out if bias is None else out + bias
    restored = out.to(x.dtype).reshape(x.movedim(feature_dim, -1).shape).movedim(-1, feature_dim)
    if feature_dim == 1 and x.is_contiguous() and not torch.compiler.is_compiling():
        restored = restored.contiguous()
    return restored, used


def combine_in_pieces(
    x: Tensor, densities: Densities, factor: Tensor, statistics: tuple[Tensor, Tensor], **options: Any
) -> Tensor:
    """``combine`` with given statistics and without gradients, a piece after another: little memory beside ``x``."""
    out = torch.empty_like(x)
    most, feature_dim = _piece_numbers(x, densities), options["feature_dim"]
    for part, into in zip(_pieces(x, feature_dim, most), _pieces(out, feature_dim, most), strict=True):
        into.copy_(combine(part, densities, factor, statistics, **options)[0])
    return out


def batch_statistics(x: Tensor, densities: Densities, feature_dim: int) -> tuple[Tensor, Tensor]:
    """The statistics that ``combine`` finds in a batch that is not empty, without gradients, a piece after another."""

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in _pieces(x, feature_dim, _piece_numbers(x, densities)):
            vectors = _vectors_of(part, feature_dim, densities.shift)
            square = vectors.square()
            yield vectors, square, densities.log_posteriors(vectors, square)

    return _component_statistics(parts())


def _piece_numbers(x: Tensor, densities: Densities) -> int:
    """Numbers of ``x`` in a piece, of which neither vectors nor posteriors are more than ``piece_size``."""
    features, components = densities.squared.shape
    return piece_size(x.device) * features // max(features, components)


def _pieces(x: Tensor, feature_dim: int, most: int) -> list[Tensor]:
    """Views of at most ``most`` numbers each, or of one vector; axes are halved from the first on."""
    axes = [axis for axis in range(x.dim()) if axis != feature_dim % x.dim() and x.shape[axis] > 1]
    if x.numel() <= most or not axes:
        return [x]
    return [piece for half in x.tensor_split(2, axes[0]) for piece in _pieces(half, feature_dim, most)]
