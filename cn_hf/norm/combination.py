"""All components at once: what CN+ (Eq. 9) and MN (Eqs. 5-7) share, in operators that torch differentiates.

Shape legend: ``N`` samples, ``L`` positions of a sample, ``C`` features, ``K`` components, ``M`` feature vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cn_hf.norm.em import (
    Densities,
    SumOverProcesses,
    along_features,
    data_shift,
    full_precision,
    product,
    reduce_over_processes,
)

__all__ = [
    "Combination",
    "affine",
    "combine",
    "component_statistics",
    "component_statistics_of_pieces",
    "mixture",
    "moments",
    "weighted_sum",
]


def component_statistics(x: Tensor, log_tau: Tensor, *, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of each component over a batch, weighted by the normalised posteriors (Eqs. 7 and 9).

    The weights are a softmax over the batch of ``log_tau``, so a component far from every vector still gets finite
    statistics instead of 0/0. Differentiable in both arguments.

    Args:
        x: ``(M, C)``, float32 at least.
        log_tau: ``(M, K)``.
        distributed: sum over all processes of the default group.

    Returns:
        mean ``(K, C)`` and biased variance ``(K, C)``.
    """
    detached = log_tau.detach()
    peak = detached.amax(dim=0) if len(detached) else detached.new_full(detached.shape[1:], -math.inf)
    shift = data_shift(x.detach(), distributed)
    if distributed:
        peak = reduce_over_processes(peak, dist.ReduceOp.MAX)
    with full_precision(x.device):
        sums = _weighted_sums(x - shift, log_tau, peak)
    mean, var = moments(SumOverProcesses.apply(*sums) if distributed else sums)
    return mean + shift, var


def component_statistics_of_pieces(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``component_statistics`` of an input that comes in pieces, the largest weight met so far kept at one.

    Args:
        parts: vectors ``(M, C)`` or maps ``(N, C, L)``, less a point near the mean of all, and their ``log_tau``.

    Returns:
        mean ``(K, C)`` about that point, biased variance ``(K, C)``, logarithm of each sum of posteriors ``(K,)``.
    """
    peak: Tensor | None = None
    sums: tuple[Tensor, ...] = ()
    for x, log_tau in parts:
        before, largest = peak, log_tau.amax(_vectors_of(log_tau))
        peak = largest if before is None else torch.maximum(before, largest)
        own = _weighted_sums(x, log_tau, peak)
        if before is not None:
            kept = (before - peak).exp()[:, None]
            own = tuple(held * kept + part for held, part in zip(sums, own, strict=True))
        sums = own
    if peak is None:
        raise ValueError("There must be a piece, received none.")
    return *moments(sums), peak + sums[0][:, 0].log()


def moments(sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(K, C)``, of sums of weights ``(K, 1)``, of weighted vectors and of their squares."""
    total, first, second = sums
    mean = first / total
    return mean, (second / total - mean.square()).clamp_min(0)


def _weighted_sums(x: Tensor, log_tau: Tensor, peak: Tensor) -> tuple[Tensor, ...]:
    """Of weights ``exp(log_tau - peak)``: their total ``(K, 1)``, and the first and second moments, both ``(K, C)``."""
    weight = (log_tau - along_features(peak, log_tau)).exp()
    total = weight.sum(_vectors_of(weight))[:, None]
    return total, weighted_sum(weight, x), weighted_sum(weight, x.square())


def _vectors_of(x: Tensor) -> tuple[int, ...]:
    """The dimensions of vectors ``(M, C)`` or maps ``(N, C, L)`` that are not features."""
    return (0,) if x.dim() == 2 else (0, 2)


def weighted_sum(weight: Tensor, x: Tensor) -> Tensor:
    """``(K, C)`` of weights ``(M, K)`` and vectors ``(M, C)``, or of ``(N, K, L)`` and ``(N, C, L)``."""
    if x.dim() == 2:
        return weight.T @ x
    if weight.shape[2] >= weight.shape[1]:  # the sums of each sample take no more memory than x
        return torch.bmm(weight, x.transpose(1, 2)).sum(dim=0)
    return weight.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T


class Combination(NamedTuple):
    """``sum_k coefficient_k (x - mean_k) / sqrt(var_k + eps)``, prepared for many chunks of vectors.

    What the components share is kept out of the products, so that equal components give the exact result however many
    there are: ``shift`` and ``shared`` ``(C,)``, ``scales`` and ``offsets`` ``(K, C)``.
    """

    shift: Tensor
    shared: Tensor
    scales: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, eps: float) -> Combination:
        """Of statistics ``(K, C)``."""
        shift, rstd = mean.mean(dim=0), torch.rsqrt(var + eps)
        shared = rstd.mean(dim=0)
        return cls(shift, shared, rstd - shared, (shift - mean) * rstd)

    def apply(self, x: Tensor, coefficient: Tensor) -> Tensor:
        """``(M, C)`` of vectors ``(M, C)`` and coefficients ``(M, K)``; ``(N, C, L)`` of the same and ``(N, K, L)``."""
        shared = coefficient.sum(dim=1, keepdim=True) * along_features(self.shared, x)
        scale = product(coefficient, self.scales, shared)
        return torch.addcmul(product(coefficient, self.offsets), x - along_features(self.shift, x), scale)


def mixture(x: Tensor, coefficient: Tensor, mean: Tensor, var: Tensor, *, eps: float) -> Tensor:
    """``sum_k coefficient_k (x - mean_k) / sqrt(var_k + eps)``: the aggregation shared by CN+ (Eq. 9) and MN (Eq. 6).

    Two matrix products; no copy of ``x`` a component is made.

    Args:
        x: ``(M, C)``, float32 at least.
        coefficient: ``(M, K)``.
        mean: ``(K, C)``.
        var: ``(K, C)``.
        eps: added to ``var``.

    Returns:
        ``(M, C)``.
    """
    with full_precision(x.device):
        return Combination.of(mean, var, eps).apply(x, coefficient)


def _feature_vectors(x: Tensor, feature_dim: int) -> Tensor:
    """All feature vectors of ``x`` as ``(M, C)``."""
    return x.movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim])


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x * weight + bias`` of vectors ``(M, C)`` or maps ``(N, C, L)``, each ``(C,)`` where there is one."""
    x = x if weight is None else x * along_features(weight, x)
    return x if bias is None else x + along_features(bias, x)


def _restored(vectors: Tensor, like: Tensor, feature_dim: int) -> Tensor:
    """Vectors ``(M, C)`` in the shape, dtype and storage order of the input they come from."""
    shape = like.movedim(feature_dim, -1).shape
    out = vectors.to(like.dtype).reshape(shape).movedim(-1, feature_dim)
    if feature_dim == 1 and like.is_contiguous() and not torch.compiler.is_compiling():
        out = out.contiguous()
    return out


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
    vectors = _feature_vectors(x, feature_dim).to(densities.shift.dtype) - densities.shift
    log_tau = densities.log(vectors).log_softmax(dim=1)
    used = component_statistics(vectors, log_tau, distributed=distributed) if statistics is None else statistics
    combined = affine(mixture(vectors, log_tau.exp() * factor, *used, eps=eps), weight, bias)
    return _restored(combined, x, feature_dim), used
