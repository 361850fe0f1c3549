"""Clusters of vectors in memory: Gaussian mixtures by ``norm.em``, k-means by scikit-learn, components by torch.

Shape legend: ``N`` vectors, ``F`` features, ``K`` components of a clustering, ``D`` principal components.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cn_hf.contexts.sample import as_float
from cn_hf.devices import torch_threads
from cn_hf.norm.em import Mixture, fit_mixture, log_posteriors, seed_mixture

__all__ = ["Clustering", "assign", "fit_gaussians", "fit_k_means", "principal_components", "project"]

_START_VECTORS, _START_ITERATIONS, _FINALISTS = 2048, 30, 3
_MORE_VECTORS = 8192
_PART_ELEMENTS = 2**26  # 256 MiB in float32, which bounds the parts where images are large
_CHUNK_ELEMENTS = 2**20  # 4 MiB in float32: a chunk and what is made of it stay near a CPU's cache
_THREADS_LOCK = threading.Lock()  # torch's number of threads belongs to the whole process


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


def fit_gaussians(
    x: Tensor, num_components: int, *, seed: int, n_init: int, max_iterations: int, tol: float, reg_covar: float
) -> Clustering:
    """Fit a mixture of diagonal Gaussians by expectation maximisation.

    EM starts ``n_init`` times from k-means++ on a few of the vectors. The two with the greatest likelihood, those
    without empty components first, and k-means' centres go on with more of them, and the likeliest of these with all.

    Args:
        x: float32 ``(N, F)``.
        num_components: ``K``, at most ``N``.
        seed: of the few, and of k-means++.
        n_init: number of starts.
        max_iterations: passes over all vectors.
        tol: EM stops once the mean log-likelihood of a vector changes by less.
        reg_covar: added to every variance.

    Returns:
        The components, on the CPU. ``objective`` is not finite where the fit left the range of float32.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    seeds = torch.randint(2**31, (n_init,), generator=generator).tolist()

    def part(most: int) -> Tensor:
        size = min(most, max(10 * num_components, _PART_ELEMENTS // x.shape[1]))
        return x if size >= len(x) else x[order[:size].sort().values.to(x.device)]

    def fitted(vectors: Tensor, start: Mixture, iterations: int, tol: float) -> Mixture:
        mean, var, prior, *_ = start
        rows = _chunk_rows(x) if x.device.type == "cpu" else None
        options: dict[str, Any] = {"num_iterations": iterations, "tol": tol, "reg_covar": reg_covar, "chunk_rows": rows}
        with _workers(vectors) as each:
            return fit_mixture(vectors, mean, var, prior, **options, each=each)

    few, more = part(_START_VECTORS), part(_MORE_VECTORS)

    def rank(mixture: Mixture) -> tuple[bool, float]:
        level = float(mixture.log_likelihood)
        sizes = assign(few, _clustering(mixture)).bincount(minlength=num_components)
        return bool(sizes.min() > 0), level if math.isfinite(level) else -math.inf

    seeded = [seed_mixture(few, num_components, seed=each, reg_covar=reg_covar) for each in seeds]
    started = sorted((fitted(few, start, _START_ITERATIONS, tol) for start in seeded), key=rank, reverse=True)
    k_means = fit_k_means(few.clone(), num_components, seed=seed, n_init=n_init, max_iterations=100, tol=1e-4)
    centers = k_means.mean.to(x)
    var, prior = few.var(dim=0, correction=0).expand_as(centers) + reg_covar, centers.new_ones(num_components)
    from_k_means = Mixture(centers, var, prior / num_components, centers.new_zeros(()), 0)
    finalists = [*started[: _FINALISTS - 1], from_k_means]
    best = max((fitted(more, start, max_iterations, tol) for start in finalists), key=rank)
    return _clustering(best if more is x else fitted(x, best, max_iterations, tol))


def _clustering(mixture: Mixture) -> Clustering:
    return Clustering(
        mean=mixture.mean.cpu(),
        var=mixture.var.cpu(),
        prior=mixture.prior.cpu(),
        objective=float(mixture.log_likelihood),
        num_iterations=mixture.num_iterations,
    )


def fit_k_means(
    x: Tensor, num_components: int, *, seed: int, n_init: int, max_iterations: int, tol: float
) -> Clustering:
    """Fit k-means by scikit-learn's ``KMeans``, whose arguments these are; ``x`` is float32 ``(N, F)``."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    estimator = KMeans(
        num_components, n_init=n_init, max_iter=max_iterations, tol=tol, random_state=seed % 2**32, copy_x=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than clusters: the caller's error
        estimator.fit(x.cpu().numpy())
    return Clustering(
        mean=torch.from_numpy(estimator.cluster_centers_).float(),
        var=None,
        prior=None,
        objective=float(estimator.inertia_) / len(x),
        num_iterations=int(estimator.n_iter_),
    )


def assign(x: Tensor, clustering: Clustering, *, device: torch.device | None = None) -> Tensor:
    """The component each vector belongs to: the likeliest, or for k-means the nearest.

    In float64, so that how the vectors are split into batches changes no id.

    Args:
        x: ``(N, F)``, floating point or uint8.
        clustering: on any device.
        device: where to compute; None: where ``x`` is.

    Returns:
        int64 ``(N,)``, on the device of ``x``.
    """
    target = device or x.device
    mean = clustering.mean.to(target, torch.float64)
    var = torch.ones_like(mean) if clustering.var is None else clustering.var.to(mean)
    prior = None if clustering.prior is None else clustering.prior.to(mean)

    def best(chunk: Tensor) -> Tensor:
        vectors = as_float(chunk.to(target), torch.float64)
        return log_posteriors(vectors, mean, var, prior).argmax(dim=1).to(x.device)

    with _workers(x) as each:
        return torch.cat(list(each(best, torch.split(x, _chunk_rows(x)))))


def principal_components(x: Tensor, num_components: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Leading principal components, by ``torch.pca_lowrank``.

    Args:
        x: float32 ``(N, F)``; its mean is subtracted in place.
        num_components: ``D``, at most ``min(N, F)``.
        seed: of the random start.

    Returns:
        mean ``(F,)`` and orthonormal components ``(D, F)``, strongest first; float32, on the device of ``x``.
    """
    mean = x.mean(dim=0)
    width = min(*x.shape, num_components + 10)  # oversampling, as Halko, Martinsson and Tropp (2011) advise
    with torch.random.fork_rng(devices=[] if x.device.type == "cpu" else [x.device]):
        torch.manual_seed(seed)
        directions: Tensor = torch.pca_lowrank(x.sub_(mean), q=width, center=False, niter=4)[2]
    return mean, directions[:, :num_components].T.contiguous()


def project(x: Tensor, mean: Tensor, components: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Coordinates of vectors along principal components.

    Args:
        x: ``(N, F)``, floating point or uint8.
        mean: ``(F,)``.
        components: ``(D, F)``.
        device: where to compute; None: where ``x`` is.

    Returns:
        float64 ``(N, D)``, on the device of ``x``.
    """
    target = device or x.device
    mean, components = mean.to(target, torch.float64), components.to(target, torch.float64)

    def coordinates(chunk: Tensor) -> Tensor:
        return ((as_float(chunk.to(target), torch.float64) - mean) @ components.T).to(x.device)

    with _workers(x) as each:
        return torch.cat(list(each(coordinates, torch.split(x, _chunk_rows(x)))))


def _chunk_rows(x: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, x.shape[1]))


@contextlib.contextmanager
def _workers(x: Tensor) -> Iterator[Any]:
    """``map`` over chunks of vectors; on a CPU by as many threads as torch has, each with one thread of torch's.

    Left alone, torch would split every small operation over all threads and make them wait for one another thousands of
    times a pass, which on a machine with other work costs ten times the time.
    """
    count = min(torch.get_num_threads(), len(x) // _chunk_rows(x))
    if count < 2 or x.device.type != "cpu":
        yield map
        return
    with _THREADS_LOCK, torch_threads(1), ThreadPoolExecutor(count) as pool:
        yield pool.map
