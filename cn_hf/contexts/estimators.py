"""Clustering and principal components over chunks of vectors: Gaussian mixtures by EM, k-means, PCA.

The vectors may be uint8 pixels, read as ``x / 255`` a chunk at a time, so that a data set of images is never held as
floats. A clustering starts from the best of a few k-means on a small sample, each begun by k-means++ (Arthur and
Vassilvitskii 2007), then settles on a larger sample and at last on all vectors. Statistics are sums over chunks.
Components that lose (nearly) all their vectors are set anew, without randomness: the largest component is split in two.

Shape legend: ``M`` vectors, ``F`` features, ``K`` components, ``D`` principal components.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.contexts.chunks import as_float, map_chunks, sum_chunks
from cn_hf.norm.functional import (
    MixtureStatistics,
    gaussian_log_density,
    kmeans_plusplus,
    mixture_statistics,
    mixture_update,
)

__all__ = [
    "Clustering",
    "Stopping",
    "assign",
    "cluster",
    "expectation_maximisation",
    "lloyd",
    "principal_components",
    "project",
]

_START_VECTORS = 2048
_START_ELEMENTS = 2**26  # 256 MiB in float32, which bounds the sample where images are large
_STARTS = 4
_SAMPLE_VECTORS = 8192
_MAX_REVIVALS = 3  # per component


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """Fitted components: ``mean`` ``(K, F)``; for mixtures also ``var`` ``(K, F)`` and ``prior`` ``(K,)``; float32.

    ``objective`` is the mean log-likelihood of a vector (mixtures), or its mean squared distance to its centre
    (k-means); ``num_iterations`` counts passes over all vectors.
    """

    mean: Tensor
    var: Tensor | None
    prior: Tensor | None
    objective: float
    num_iterations: int


def assign(x: Tensor, clustering: Clustering) -> Tensor:
    """The component each vector belongs to: the likeliest, or for k-means the nearest.

    In float64, so that how the vectors are split into batches changes no id.

    Args:
        x: ``(M, F)``, floating point or uint8.
        clustering: on any device.

    Returns:
        int64 ``(M,)``, on the device of ``x``.
    """
    mean = clustering.mean.to(x.device, torch.float64)
    var = torch.ones_like(mean) if clustering.var is None else clustering.var.to(mean)
    bias = mean.new_zeros(()) if clustering.prior is None else clustering.prior.to(mean).log()
    parts = map_chunks(x, torch.float64, lambda chunk: (gaussian_log_density(chunk, mean, var) + bias).argmax(dim=1))
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.int64)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When an iterative fit ends, and which components it sets anew.

    Attributes:
        max_iterations: at most this many passes over the vectors.
        tol: see ``expectation_maximisation`` and ``lloyd``.
        min_share: a component with less than this part of an equal share (``M / K``) of the vectors is set anew, at
            most three times a component; 0 keeps all as they are.
    """

    max_iterations: int = 100
    tol: float = 1e-3
    min_share: float = 0.0


def cluster(
    x: Tensor,
    num_components: int,
    *,
    method: str,
    seed: int = 0,
    stopping: Stopping = Stopping(min_share=0.01),  # immutable
    reg_covar: float = 1e-3,
) -> Clustering:
    """Cluster vectors from scratch.

    Args:
        x: ``(M, F)``, floating point or uint8.
        num_components: ``K``, at most ``M``.
        method: ``"gmm"`` or ``"kmeans"``.
        seed: of the samples and of k-means++.
        stopping: applies at each stage.
        reg_covar: added to every variance (mixtures).

    Returns:
        The components, on the device of ``x``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    size = min(_START_VECTORS, max(10 * num_components, _START_ELEMENTS // x.shape[1]))
    start = as_float(x[order[:size]], torch.float32)
    shift, spread = start.mean(dim=0), start.var(dim=0, correction=0)
    seeds = torch.randint(2**31, (_STARTS,), generator=generator).tolist()
    centers = (kmeans_plusplus(start, num_components, seed=each) for each in seeds)
    starts = [lloyd(start, mean, shift=shift, spread=spread, stopping=stopping) for mean in centers]
    fitted = min(starts, key=lambda clustering: clustering.objective)
    if method == "gmm":
        fitted = _hard_update(start, fitted, spread, reg_covar)
    sample = x[order[:_SAMPLE_VECTORS].sort().values]
    for vectors in (sample, x) if len(x) > len(sample) else (x,):
        if method == "kmeans":
            fitted = lloyd(vectors, fitted.mean, shift=shift, spread=spread, stopping=stopping)
        else:
            assert fitted.var is not None
            assert fitted.prior is not None
            theta = fitted.mean, fitted.var, fitted.prior
            fitted = expectation_maximisation(vectors, *theta, shift=shift, stopping=stopping, reg_covar=reg_covar)
    return fitted


def _hard_update(x: Tensor, clustering: Clustering, spread: Tensor, reg_covar: float) -> Clustering:
    """A mixture's start from k-means: each centre's own vectors' mean, variance and part (``spread`` without any)."""
    nearest = assign(x, clustering)
    mean, var = clustering.mean.clone(), spread.expand_as(clustering.mean) + reg_covar
    for component in range(len(mean)):
        members = x[nearest == component]
        if len(members):
            mean[component] = members.mean(dim=0)
            var[component] = members.var(dim=0, correction=0) + reg_covar
    prior = torch.bincount(nearest, minlength=len(mean)).clamp_min(1).to(mean.dtype)
    return dataclasses.replace(clustering, mean=mean, var=var, prior=prior / prior.sum())


def expectation_maximisation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    prior: Tensor,
    *,
    shift: Tensor,
    stopping: Stopping = Stopping(),  # immutable
    reg_covar: float = 1e-3,
) -> Clustering:
    """EM for diagonal Gaussians from a given start, as scikit-learn's ``GaussianMixture(covariance_type="diag")``.

    Args:
        x: ``(M, F)``, floating point or uint8.
        mean: ``(K, F)``.
        var: ``(K, F)``.
        prior: ``(K,)``.
        shift: ``(F,)``, near the data's mean.
        stopping: its ``tol`` is a change of the mean log-likelihood of a vector.
        reg_covar: added to every variance.

    Returns:
        The components after the last M-step.
    """
    fewest, revivals = _fewest(x, mean, stopping.min_share), _MAX_REVIVALS * len(mean)
    previous, objective, passes = -math.inf, -math.inf, 0
    for _ in _progress(stopping.max_iterations, "fitting the mixture"):
        passes += 1
        stats = _mixture_statistics(x, mean, var, prior, shift)
        updated = mixture_update(stats, shift=shift.double(), reg_covar=reg_covar)
        mean, var, prior = (part.to(mean.dtype) for part in updated)
        objective = float(stats.log_likelihood / stats.num_vectors)
        lost = (stats.total < fewest).nonzero().flatten().tolist()
        if lost and revivals > 0:
            revivals -= len(lost)
            mean, var, prior = _split_largest(mean, var, prior, lost)
            previous = -math.inf
        elif abs(objective - previous) < stopping.tol:
            break
        else:
            previous = objective
    return Clustering(mean=mean, var=var, prior=prior, objective=objective, num_iterations=passes)


def _progress(max_iterations: int, description: str) -> Iterator[int]:
    yield from tqdm(range(max_iterations), desc=description, unit="pass", disable=None, leave=False)


def _fewest(x: Tensor, mean: Tensor, min_share: float) -> float:
    return max(0.5, min_share * len(x) / len(mean)) if min_share else -1.0


def _mixture_statistics(x: Tensor, mean: Tensor, var: Tensor, prior: Tensor, shift: Tensor) -> MixtureStatistics:
    sums = sum_chunks(x, mean.dtype, lambda chunk: mixture_statistics(chunk, mean, var, prior, shift=shift))
    return MixtureStatistics(*sums)


def _split_largest(mean: Tensor, var: Tensor, prior: Tensor, lost: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each lost component becomes one half of the then largest one, half a standard deviation to either side."""
    mean, var, prior = mean.clone(), var.clone(), prior.clone()
    prior[lost] = 0
    for component in lost:
        largest = int(prior.argmax())
        offset = var[largest].sqrt() / 2
        mean[component] = mean[largest] + offset
        mean[largest] -= offset
        var[component] = var[largest]
        prior[component] = prior[largest] = prior[largest] / 2
    return mean, var, prior / prior.sum()


def lloyd(
    x: Tensor,
    mean: Tensor,
    *,
    shift: Tensor,
    spread: Tensor,
    stopping: Stopping = Stopping(),  # immutable
) -> Clustering:
    """Lloyd's algorithm for k-means from given centres.

    Args:
        x: ``(M, F)``, floating point or uint8.
        mean: centres ``(K, F)``.
        shift: ``(F,)``, near the data's mean.
        spread: variance of each feature ``(F,)``: the scale of ``tol``, and of splits.
        stopping: its ``tol`` is the sum of all centres' squared shifts, in units of the mean variance.

    Returns:
        The centres after the last update.
    """
    fewest, revivals = _fewest(x, mean, stopping.min_share), _MAX_REVIVALS * len(mean)
    objective, passes = math.inf, 0
    for _ in _progress(stopping.max_iterations, "fitting k-means"):
        passes += 1
        count, first, distance = _nearest_statistics(x, mean, shift)
        objective = float(distance / len(x))
        updated = torch.where(count[:, None] > 0, first / count.clamp_min(1)[:, None] + shift.double(), mean.double())
        moved, mean = float((updated - mean.double()).square().sum()), updated.to(mean.dtype)
        lost = (count < fewest).nonzero().flatten().tolist()
        if lost and revivals > 0:
            revivals -= len(lost)
            mean, _, _ = _split_largest(mean, spread.expand_as(mean), (count / count.sum()).to(mean.dtype), lost)
        elif moved <= stopping.tol * float(spread.mean()):
            break
    return Clustering(mean=mean, var=None, prior=None, objective=objective, num_iterations=passes)


def _nearest_statistics(x: Tensor, mean: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the vectors nearest to each centre: count ``(K,)``, sum about ``shift`` ``(K, F)``; all squared distances."""
    centered = mean - shift

    def statistics(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunk = chunk - shift
        score = chunk @ centered.T - centered.square().sum(dim=1) / 2
        best, nearest = score.max(dim=1)
        weight = torch.nn.functional.one_hot(nearest, len(mean)).to(chunk.dtype)
        distance = (chunk.square().sum(dim=1) - 2 * best).clamp_min(0).sum()
        return weight.sum(dim=0), weight.T @ chunk, distance

    count, first, distance = sum_chunks(x, mean.dtype, statistics)
    return count, first, distance


def principal_components(
    x: Tensor, num_components: int, *, seed: int = 0, num_passes: int = 4
) -> tuple[Tensor, Tensor]:
    """Leading principal components by randomised subspace iteration (Halko, Martinsson and Tropp 2011) over chunks.

    Args:
        x: ``(M, F)``, floating point or uint8.
        num_components: ``D``, at most ``min(M, F)``.
        seed: of the random start.
        num_passes: passes over ``x`` that turn the subspace.

    Returns:
        mean ``(F,)`` and orthonormal components ``(D, F)``, strongest first; float32.
    """
    features = x.shape[1]
    [total] = sum_chunks(x, torch.float32, lambda chunk: [chunk.sum(dim=0, dtype=torch.float64)])
    mean = (total / len(x)).float()
    width = min(features, num_components + 10)  # oversampling, as the paper advises
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, width, generator=generator).to(x.device)).Q
    for _ in range(num_passes):
        basis = torch.linalg.qr(_covariance_times(x, mean, basis)).Q
    small = basis.T @ _covariance_times(x, mean, basis)
    rotation = torch.linalg.eigh((small + small.T) / 2).eigenvectors.flip(1)[:, :num_components]
    return mean, (basis @ rotation).T.contiguous()


def _covariance_times(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    def product(chunk: Tensor) -> list[Tensor]:
        chunk = chunk - mean
        return [chunk.T @ (chunk @ basis)]

    [total] = sum_chunks(x, torch.float32, product)
    return (total / len(x)).float()


def project(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Coordinates of vectors along principal components.

    Args:
        x: ``(M, F)``, floating point or uint8.
        mean: ``(F,)``.
        components: ``(D, F)``.

    Returns:
        float64 ``(M, D)``, on the device of ``x``.
    """
    mean, components = mean.to(x.device, torch.float64), components.to(x.device, torch.float64)
    parts = map_chunks(x, torch.float64, lambda chunk: (chunk - mean) @ components.T)
    return torch.cat(parts) if parts else components.new_empty(0, len(components))
