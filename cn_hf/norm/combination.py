"""All components at once: what CN+ (Eq. 9) and MN (Eqs. 5-7) share, and how a large input is walked through in pieces.

Shape legend: ``N`` samples, ``L`` positions of a sample, ``C`` features, ``K`` components, ``M`` feature vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cn_hf.norm.em import (
    SumOverProcesses,
    along_features,
    data_shift,
    full_precision,
    plus_product,
    reduce_over_processes,
)

__all__ = ["Combination", "component_statistics", "component_statistics_of_pieces", "mixture", "pieces"]

_PIECE = {"cpu": 2**18}  # numbers of a piece, and of its posteriors: what stays in a core's cache
_LARGE_PIECE = 2**26  # elsewhere, where small ones would be launches only


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
        sums = _weighted_sums(x, log_tau, peak, shift)
    return _moments(SumOverProcesses.apply(*sums) if distributed else sums, shift)


def component_statistics_of_pieces(parts: Iterable[tuple[Tensor, Tensor]], shift: Tensor) -> tuple[Tensor, Tensor]:
    """``component_statistics`` of an input that comes in pieces, the largest weight met so far kept at one.

    Args:
        parts: vectors ``(M, C)`` or maps ``(N, C, L)``, and their ``log_tau``.
        shift: ``(C,)``, near the mean of all vectors.

    Returns:
        mean ``(K, C)`` and biased variance ``(K, C)``.
    """
    peak: Tensor | None = None
    sums: tuple[Tensor, ...] = ()
    for x, log_tau in parts:
        before, largest = peak, log_tau.amax(_vectors_of(log_tau))
        peak = largest if before is None else torch.maximum(before, largest)
        own = _weighted_sums(x, log_tau, peak, shift)
        if before is not None:
            kept = (before - peak).exp()[:, None]
            own = tuple(held * kept + part for held, part in zip(sums, own, strict=True))
        sums = own
    return _moments(sums, shift)


def _moments(sums: tuple[Tensor, ...], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(K, C)`` of ``_weighted_sums``."""
    total, first, second = sums
    mean = first / total
    return mean + shift, (second / total - mean.square()).clamp_min(0)


def _weighted_sums(x: Tensor, log_tau: Tensor, peak: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Of weights ``exp(log_tau - peak)``: their total ``(K, 1)``, and moments about the shift, both ``(K, C)``."""
    weight = (log_tau - along_features(peak, log_tau)).exp()
    centered = x - along_features(shift, x)
    total = weight.sum(_vectors_of(weight))[:, None]
    return total, _weighted_sum(weight, centered), _weighted_sum(weight, centered.square())


def _vectors_of(x: Tensor) -> tuple[int, ...]:
    """The dimensions of vectors ``(M, C)`` or maps ``(N, C, L)`` that are not features."""
    return (0,) if x.dim() == 2 else (0, 2)


def _weighted_sum(weight: Tensor, x: Tensor) -> Tensor:
    """``(K, C)`` of weights ``(M, K)`` and vectors ``(M, C)``, or of ``(N, K, L)`` and ``(N, C, L)``."""
    if x.dim() == 2:
        return weight.T @ x
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
        scale = plus_product(shared, coefficient, self.scales)
        zero = torch.zeros_like(self.shift)
        return torch.addcmul(plus_product(zero, coefficient, self.offsets), x - along_features(self.shift, x), scale)


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


def pieces(x: Tensor, num_components: int, feature_dim: int) -> Iterator[tuple[slice, ...]]:
    """Where a piece after another lies in ``(N, C, L)`` or ``(N, L, C)``, each small with all its posteriors."""
    samples, features = x.shape[0], x.shape[feature_dim]
    positions = x.numel() // max(1, samples * features)
    size = max(1, _PIECE.get(x.device.type, _LARGE_PIECE) // max(1, features, num_components))
    step = max(1, size // max(1, positions))
    for sample in range(0, samples, step):
        for position in range(0, positions, size):
            within = slice(position, position + size)
            yield slice(sample, sample + step), *((slice(None), within) if feature_dim == 1 else (within,))
