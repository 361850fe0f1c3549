"""CN+ with one posterior a sample: a context belongs to a sample, so all of its vectors share one (Eq. 9's tau).

The posterior is the softmax over contexts of the sum of log-densities over a sample's vectors, which depends on their
mean and variance alone. So the combination of all contexts is one affine map a sample: one pass over ``x``, and no
``M x T`` posteriors.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts, ``L`` vectors (pixels or tokens) of a sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cn_hf.norm.em import Densities, statistics_dtype, wide_dtype

__all__ = ["SampleMoments", "combined", "sample_log_posteriors", "sample_moments"]


class SampleMoments(NamedTuple):
    """Mean and biased variance of each sample's vectors, ``(N, C)``, in ``wide_dtype``, and their number ``L``."""

    mean: Tensor
    variance: Tensor
    vectors: int


def sample_moments(x: Tensor, feature_dim: int) -> SampleMoments:
    """Return the moments of each sample of ``x``, ``(N, ..., C)`` or ``(N, C, ...)``."""
    vectors = x.movedim(feature_dim, 1).flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    variance, mean = torch.var_mean(vectors.to(statistics_dtype(x)), dim=2, correction=0)
    wide = wide_dtype(x)
    return SampleMoments(mean.to(wide), variance.to(wide), vectors.shape[2])


def sample_log_posteriors(moments: SampleMoments, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the log-posterior of each context for each sample, ``(N, T)``; priors are 1/T.

    Args:
        moments: of the samples.
        mean: ``(T, C)``.
        variance: ``(T, C)``, variance + eps.
    """
    densities = Densities.of(mean.to(moments.mean), variance.to(moments.mean))
    own = moments.mean - densities.shift
    return (moments.vectors * densities.log(own, moments.variance + own.square())).log_softmax(dim=1)


def combined(
    moments: SampleMoments, mean: Tensor, variance: Tensor, *, eps: float, by_batch: bool
) -> tuple[Tensor, Tensor]:
    """Return center and scale ``(N, C)`` of each sample's combination of all contexts: ``(x - center) * scale``.

    Args:
        moments: of the samples.
        mean: ``(T, C)``.
        variance: ``(T, C)``, variance + eps.
        eps: added to variances of the batch.
        by_batch: each context's mean and variance are re-estimated on this batch, weighted by the posteriors (Eq. 9's
            ``m_r`` and ``v_r``).
    """
    log_posterior = sample_log_posteriors(moments, mean, variance)
    mean, variance = mean.to(moments.mean), variance.to(moments.mean)
    if by_batch:
        weights = torch.softmax(log_posterior, dim=0).T  # (T, N)
        mean = weights @ moments.mean
        spread = moments.variance + (moments.mean - mean[:, None]).square()  # (T, N, C)
        variance = torch.einsum("tn,tnc->tc", weights, spread) + eps
    posterior = log_posterior.exp()
    rstd = variance.rsqrt()
    scale = posterior @ rstd
    return posterior @ (mean * rstd) / scale, scale
