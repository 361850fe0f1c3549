"""Mean and variance of a slot's real inputs, context by context, and the statistics that follow from them.

A context need not be learned: its row can be measured on unlabelled images in a trained network (adaptive batch norm,
Li et al. 2016, with a context for each sample; the prior is that of Schneider et al. 2020).

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts, ``R`` contexts that are measured together, ``L`` positions
(pixels or tokens) of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "Rows", "StoredMoments", "implied_moments", "moved_moments", "relative_rows", "shrunk_rows"]

_BLOCK = 2**24  # elements that are looked at together, so that copies stay small


class Rows(NamedTuple):
    """Mean and variance + eps of contexts, each ``(R, C)``, float64."""

    mean: Tensor
    variance: Tensor

    def weighted(self, weights: Tensor) -> Rows:
        """Return their mean by ``weights`` ``(1, R)``."""
        return Rows(weights @ self.mean, weights @ self.variance)

    def cpu(self) -> Rows:
        """Return them on the CPU."""
        return Rows(self.mean.cpu(), self.variance.cpu())


class Moments:
    """Running mean and sum of squared deviations of each context, in float64, merged as Chan et al. (1983) do."""

    def __init__(self, num_contexts: int, num_features: int, device: torch.device) -> None:
        self.count = torch.zeros(num_contexts, 1, dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_contexts, num_features, dtype=torch.float64, device=device)
        self.deviation = torch.zeros_like(self.mean)

    def add(self, x: Tensor, ids: Tensor, feature_dim: int) -> None:
        """Take in activations.

        Args:
            x: ``(N, ..., C)`` or ``(N, C, ...)``.
            ids: int64 ``(N,)`` or ``(1,)`` in ``0..R-1``, or float weights ``(N, R)``.
            feature_dim: the axis of the features, -1 or 1.
        """
        if x.numel() == 0:
            return
        ids = ids.expand(len(x), *ids.shape[1:]).to(x.device)
        samples = max(1, _BLOCK // max(1, x[0].numel()))
        for block, block_ids in zip(torch.split(x, samples), torch.split(ids, samples), strict=True):
            self._add_block(block.movedim(feature_dim, -1), block_ids)

    def _add_block(self, x: Tensor, ids: Tensor) -> None:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (value.double() for value in torch.var_mean(x, dim=1, correction=0))
        deviation, positions = variance * x.shape[1], x.shape[1]

        def total(values: Tensor) -> Tensor:
            if ids.is_floating_point():
                return ids.T.double() @ values
            return values.new_zeros(len(self.count), values.shape[1]).index_add_(0, ids, values)

        shift = mean.mean(dim=0)
        centered = mean - shift
        weight = total(mean.new_ones(len(mean), 1))
        context_mean = total(centered) / weight.clamp_min(1e-300)
        between = (total(centered.square()) - weight * context_mean.square()).clamp_min(0)
        self._merge(weight * positions, context_mean + shift, total(deviation) + positions * between)

    def _merge(self, count: Tensor, mean: Tensor, deviation: Tensor) -> None:
        total = self.count + count
        safe = total.clamp_min(1e-300)
        delta = mean - self.mean
        self.mean += torch.where(count > 0, delta * count / safe, 0.0)
        self.deviation += deviation + torch.where(count > 0, delta.square() * self.count * count / safe, 0.0)
        self.count = total

    @property
    def present(self) -> Tensor:
        """True for contexts that were seen, ``(R,)``."""
        return self.count[:, 0] > 0

    def rows(self) -> Rows:
        """Mean and biased variance, exactly 0 where a feature is constant but for rounding."""
        variance = self.deviation / self.count.clamp_min(1e-300)
        # Rounding leaves a constant feature a variance of about (|mean| * 2^-24)^2, not 0.
        constant = variance <= (self.mean.abs() * 1e-6).square() + 1e-30
        return Rows(self.mean, variance.masked_fill(constant, 0.0))


def relative_rows(measured: Rows, row: Rows, reference: Rows | None) -> Rows:
    """Return the statistics under which a context's output has the moments that the reference's has.

    ``variance = v_r (s_c / s_ref)^2`` and ``mean = m_c + (m_r - m_ref) s_c / s_ref``: the weights behind a trained slot
    expect what the reference context gave them. Where a feature is constant in the context or in the reference, the
    ratio is 1.

    Args:
        measured: moments ``(m_c, s_c^2)`` of the context's inputs, ``(R, C)``.
        row: the reference context's own statistics ``(m_r, v_r)``, ``(1, C)``.
        reference: moments ``(m_ref, s_ref^2)`` of the reference context's inputs, ``(1, C)``. None where they are
            ``row``, as in a batch norm; then the result is ``measured``.
    """
    reference = row if reference is None else reference
    known = (measured.variance > 0) & (reference.variance > 0)
    ratio = torch.where(known, measured.variance / reference.variance.clamp_min(1e-300), 1.0)
    mean = measured.mean + (row.mean - reference.mean) * ratio.sqrt()
    return Rows(mean, row.variance * ratio)


def implied_moments(rows: Rows, row: Rows, reference: Rows) -> Rows:
    """Return the moments ``(R, C)`` from which ``relative_rows`` gives ``rows``; variance 0 where any does.

    Args:
        rows: statistics of contexts, ``(R, C)``.
        row: as in ``relative_rows``.
        reference: as in ``relative_rows``.
    """
    known = reference.variance > 0
    ratio = torch.where(known, rows.variance / row.variance, 1.0)
    mean = rows.mean - (row.mean - reference.mean) * ratio.sqrt()
    return Rows(mean, reference.variance * ratio)


def moved_moments(old: Rows, new: Rows, share: float, *, is_vector: bool) -> Rows:
    """Return the moments of ``1 - share`` parts of old inputs and ``share`` parts of new ones.

    A feature that is constant in the new inputs keeps its variance: units that are off say nothing of their scale.

    Args:
        old: ``(R, C)``.
        new: ``(R, C)``.
        share: in 0..1.
        is_vector: the new inputs are one vector, which has no variance but tells of that between inputs.
    """
    delta = new.mean - old.mean
    variance = (1 - share) * old.variance + share * new.variance + share * (1 - share) * delta.square()
    if not is_vector:
        variance = torch.where(new.variance > 0, variance, old.variance)
    return Rows(old.mean + share * delta, variance)


def shrunk_rows(rows: Rows, row: Rows, images: Tensor, prior: float) -> Rows:
    """Return ``(prior * row + images * rows) / (prior + images)``, Schneider et al. 2020, Eq. 2.

    Args:
        rows: what was measured, ``(R, C)``.
        row: the reference, ``(1, C)``.
        images: how many images each of ``rows`` was measured on, ``(R,)``.
        prior: how many images the reference counts for.
    """
    share = (images / (images + prior).clamp_min(1e-300)).to(rows.mean).unsqueeze(1)
    return Rows(*(share * new + (1 - share) * old for new, old in zip(rows, row, strict=True)))


@dataclass(slots=True)
class StoredMoments:
    """Moments of a slot's real inputs, kept beside the model so that later contexts need no reference images.

    Attributes:
        mean: ``(T, C)``, float32, on the CPU.
        variance: ``(T, C)``, float32.
        images: ``(T,)``, float32: how many images they were measured on; 0 where a context was not measured.
    """

    mean: Tensor
    variance: Tensor
    images: Tensor

    @classmethod
    def unknown(cls, num_contexts: int, num_features: int) -> StoredMoments:
        """Return moments of contexts none of which was measured."""
        zeros = torch.zeros(num_contexts, num_features, dtype=torch.float32)
        return cls(zeros, zeros.clone(), torch.zeros(num_contexts, dtype=torch.float32))

    def put(self, context: int, rows: Rows, images: float) -> None:
        """Keep the moments ``(1, C)`` of one context."""
        self.mean[context] = rows.mean[0].float().cpu()
        self.variance[context] = rows.variance[0].float().cpu()
        self.images[context] = images

    def weighted(self, weights: Tensor) -> Rows | None:
        """Return the mean of contexts' moments by ``weights`` ``(1, T)``, or None where one with weight is unknown."""
        if bool((self.images[weights[0] > 0] == 0).any()):
            return None
        return Rows(self.mean.double(), self.variance.double()).weighted(weights)

    def select(self, contexts: list[int]) -> StoredMoments:
        """Return those of some contexts, in that order."""
        return StoredMoments(self.mean[contexts], self.variance[contexts], self.images[contexts])

    def grown(self, count: int) -> StoredMoments:
        """Return them with ``count`` contexts more that were not measured."""
        more = StoredMoments.unknown(count, self.mean.shape[1])
        return StoredMoments(
            torch.cat([self.mean, more.mean]),
            torch.cat([self.variance, more.variance]),
            torch.cat([self.images, more.images]),
        )
