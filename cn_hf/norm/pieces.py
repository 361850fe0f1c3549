"""CN+ and MN of large inputs in torch's own operators: a piece after another, so that little is kept.

``cpu_mixture`` does instead what it can of the forward, in one piece.

A piece is some vectors ``(M, C)``, or maps ``(N, C, L)`` where the positions of a feature lie together in memory, so
that nothing is moved. ``combine`` is CN+ and MN without gradients; ``mixture_norm`` and ``mixture_norm_backward`` are
MN in training, as ``triton_mixture`` has them on a GPU, which says what backward computes.

Shape legend: ``N`` samples, ``L`` positions of a sample, ``C`` features, ``K`` components (contexts), ``M`` vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cn_hf.norm import cpu_mixture
from cn_hf.norm.combination import (
    Combination,
    affine,
    component_statistics_of_pieces,
    weighted_sum,
)
from cn_hf.norm.em import Densities, along_features, product
from cn_hf.norm.layout import lies_in_rows

__all__ = ["MixtureKept", "combine", "mixture_norm", "mixture_norm_backward"]

_PIECE = {"cpu": 2**21}  # numbers of a piece, and of its posteriors: partly in caches, and threads meet rarely
_LARGE_PIECE = 2**26  # elsewhere, where small ones would be launches only

Cut = tuple[slice, ...]


class MixtureKept(NamedTuple):
    """What backward needs of forward beside its inputs, in the dtype of the statistics.

    ``log_tau``, ``(K, M)`` or as the pieces have it; ``log_total`` ``(K,)``, the logarithm of the sum of posteriors
    over the batch; ``center`` ``(K, C)``, each component's mean less the shift of the densities; ``rstd`` ``(K, C)``,
    one over its deviation.
    """

    log_tau: Tensor
    log_total: Tensor
    center: Tensor
    rstd: Tensor


class _Pieces:
    """How an input of this shape and storage order is walked through."""

    def __init__(self, x: Tensor, feature_dim: int, num_components: int) -> None:
        maps = x.movedim(feature_dim, 1)
        self.in_rows = bool(lies_in_rows(x, feature_dim)) and maps.shape[2:].numel() > 1
        self.shape, self.feature_dim = maps.shape, feature_dim
        samples, features = maps.shape[:2]
        positions = maps.shape[2:].numel()
        size = max(1, _PIECE.get(x.device.type, _LARGE_PIECE) // max(1, features, num_components))
        step = max(1, size // max(1, positions))
        self.cuts: list[Cut] = []
        for sample in range(0, samples, step):
            for position in range(0, positions, size):
                within = slice(position, position + size)
                self.cuts.append((slice(sample, sample + step), *([slice(None)] if self.in_rows else []), within))

    def arranged(self, x: Tensor) -> Tensor:
        """``(N, C, L)`` or ``(N, L, C)``: a view where ``x`` lies as the input does."""
        maps = x.movedim(self.feature_dim, 1)
        return maps.flatten(2) if self.in_rows else maps.movedim(1, -1).reshape(len(x), -1, maps.shape[1])

    def restored(self, arranged: Tensor) -> Tensor:
        """What ``arranged`` made, in the shape of the input."""
        samples, features, *positions = self.shape
        if self.in_rows:
            return arranged.view(self.shape).movedim(1, self.feature_dim)
        return arranged.view(samples, *positions, features).movedim(-1, self.feature_dim)

    def empty(self, features: int, like: Tensor) -> Tensor:
        """``(N, features, L)`` or ``(N, L, features)``, to be written piece by piece."""
        samples, positions = self.shape[0], self.shape[2:].numel()
        return like.new_empty((samples, features, positions) if self.in_rows else (samples, positions, features))

    def read(self, arranged: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
        """A piece of it, maps or vectors."""
        part = arranged[cut].to(dtype)
        return part if self.in_rows else part.flatten(0, 1)

    def write(self, arranged: Tensor, cut: Cut, part: Tensor) -> None:
        """What ``read`` reads."""
        place = arranged[cut]
        place.copy_(part.view(place.shape))


def combine(
    x: Tensor,
    densities: Densities,
    factor: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``combination.combine`` of an ``x`` that is not empty; statistics of the batch take memory for all posteriors."""
    return _combine(x, densities, factor, statistics, eps, feature_dim, weight, bias)[:2]


def _combine(
    x: Tensor,
    densities: Densities,
    factor: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """``combine``, and where the statistics are the batch's, ``log_tau`` as arranged and ``log_total``."""
    shift, dtype = densities.shift, densities.shift.dtype
    pieces = _Pieces(x, feature_dim, len(densities.constant))
    source = pieces.arranged(x)
    native = cpu_mixture.handles(source, pieces.in_rows, densities, statistics, factor, weight, bias)
    kept: tuple[Tensor, Tensor] | None = None

    def centered(cut: Cut, point: Tensor = shift) -> Tensor:
        part = pieces.read(source, cut, dtype)
        return part - along_features(point, part)

    if statistics is None:
        middle = source.mean((0, 2) if pieces.in_rows else (0, 1), dtype=dtype)
        if native:
            log_tau, peak = cpu_mixture.log_posteriors(source, densities, pieces.in_rows)
            mean, var, log_total = cpu_mixture.component_statistics(source, log_tau, peak, middle, pieces.in_rows)
        else:
            log_tau = pieces.empty(len(densities.constant), shift)
            for cut in pieces.cuts:
                pieces.write(log_tau, cut, densities.log(centered(cut)).log_softmax(dim=1))
            parts = ((centered(cut, middle), pieces.read(log_tau, cut, dtype)) for cut in pieces.cuts)
            mean, var, log_total = component_statistics_of_pieces(parts)
        statistics, kept = (mean + (middle - shift), var), (log_tau, log_total)
    combination = Combination.of(*statistics, eps)
    if native:
        known = densities if kept is None else kept[0]
        out = cpu_mixture.combine(source, known, combination, shift, factor, weight, bias, pieces.in_rows)
        return pieces.restored(out), statistics, kept
    out = pieces.empty(x.shape[feature_dim], x)
    for cut in pieces.cuts:
        vectors = centered(cut)
        tau = densities.log(vectors).softmax(dim=1) if kept is None else pieces.read(kept[0], cut, dtype).exp()
        pieces.write(out, cut, affine(combination.apply(vectors, tau * along_features(factor, tau)), weight, bias))
    return pieces.restored(out), statistics, kept


def mixture_norm(
    x: Tensor,
    densities: Densities,
    prior: Tensor,
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, MixtureKept]:
    """``triton_mixture.mixture_norm``, for any number of components and features; ``x`` is not empty."""
    out, (center, var), kept = _combine(x, densities, prior.rsqrt(), None, eps, feature_dim, weight, bias)
    assert kept is not None  # the statistics are the batch's
    return out, center + densities.shift, var, MixtureKept(*kept, center, torch.rsqrt(var + eps))


def mixture_norm_backward(
    grad: Tensor,
    x: Tensor,
    var: Tensor,
    kept: MixtureKept,
    densities: Densities,
    prior: Tensor,
    feature_dim: int,
    weight: Tensor | None,
    grad_mean: Tensor | None = None,
    grad_var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``triton_mixture.mixture_norm_backward``."""
    (shift, squared, linear, *_), (log_tau, log_total, center, rstd) = densities, kept
    pieces = _Pieces(x, feature_dim, len(center))
    source, grads = pieces.arranged(x), pieces.arranged(grad)

    def parts(cut: Cut) -> tuple[Tensor, ...]:
        """Vectors less the shift, gradients before the affine map's scale, logarithm of posteriors, coefficients."""
        vectors, through, logs = (pieces.read(tensor, cut, shift.dtype) for tensor in (source, grads, log_tau))
        coefficient = logs.exp() * along_features(prior.rsqrt(), logs)
        return vectors - along_features(shift, vectors), through, logs, coefficient

    sums, dots = torch.zeros_like(center), torch.zeros_like(center)
    for cut in pieces.cuts:
        vectors, through, _, coefficient = parts(cut)
        sums += weighted_sum(coefficient, through)
        dots += weighted_sum(coefficient, through * vectors)
    dots = (dots - center * sums) * rstd
    by_weight = dots.sum(dim=0)
    by_bias = (sums * prior.sqrt()[:, None]).sum(dim=0)  # posteriors sum to one: so do these parts of the gradients
    factor = rstd if weight is None else rstd * weight
    by_mean, by_var = -sums * factor, -0.5 * dots * rstd * factor
    by_mean = by_mean if grad_mean is None else by_mean + grad_mean
    by_var = by_var if grad_var is None else by_var + grad_var

    slope = by_mean - 2 * by_var * center
    level = (by_var * (center.square() - var) - by_mean * center).sum(dim=1)
    out = pieces.empty(x.shape[feature_dim], x)
    for cut in pieces.cuts:
        vectors, through, logs, coefficient = parts(cut)
        share = (logs - along_features(log_total, logs)).exp()
        of_output = product(through, -(factor * center).T, product(through * vectors, factor.T))
        of_statistics = product(vectors, slope.T, product(vectors.square(), by_var.T, level))
        by_log_tau = coefficient * of_output + share * of_statistics
        by_joint = by_log_tau - logs.exp() * by_log_tau.sum(dim=1, keepdim=True)
        bounded = densities.bounded(vectors)
        by_bounded = torch.addcmul(product(by_joint, linear.T), bounded, product(by_joint, 2 * squared.T))
        by_vectors = torch.addcmul(product(share, slope), vectors, product(share, 2 * by_var))
        by_vectors.addcmul_(through, product(coefficient, factor))
        pieces.write(out, cut, by_vectors.add_(by_bounded.masked_fill_(bounded != vectors, 0)))
    return pieces.restored(out), by_weight, by_bias
