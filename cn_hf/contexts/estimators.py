"""Clustering over chunks of vectors: Gaussian mixtures by EM, k-means by Lloyd's algorithm, mini-batches of both.

The vectors may be uint8 pixels, read as ``x / 255`` a chunk at a time, so that a data set of images is never held as
floats; they may lie in a file, and be shared by several processes. A clustering starts from the best of a few k-means
on a small sample, each begun by k-means++ (Arthur and Vassilvitskii 2007), then settles on a larger sample. From there,

- where all vectors are not far more than that sample (131,072 at most), full passes over them follow until it settles;
- where they are more, one pass in mini-batches comes first: stepwise EM (Cappe and Moulines 2009), which moves the
  running means of an E-step's sums towards each batch's, less and less, and takes an M-step at once; with k-means' hard
  E-step it is a mini-batch k-means (Sculley 2010). At most three full passes then take the noise of the batches out.

Components that lose (nearly) all their vectors are set anew, without randomness: the largest component is split in two.

Shape legend: ``N`` vectors, ``F`` features, ``K`` components.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.contexts.chunks import Rows, as_float
from cn_hf.contexts.shared_rows import SharedRows
from cn_hf.contexts.steps import Clustering, GaussianSteps, KMeansSteps, Steps, Sums, assign
from cn_hf.norm.functional import kmeans_plusplus

__all__ = ["Clustering", "Stopping", "assign", "cluster", "full_passes", "lloyd", "sizes_of"]

_START_VECTORS = 2048
_START_ELEMENTS = 2**26  # 256 MiB in float32, which bounds the sample where images are large
_STARTS = 4
_SAMPLE_VECTORS = 8192
_SAMPLE_ELEMENTS = 2**29
_MOST_FULL_PASSES_OVER = 16 * _SAMPLE_VECTORS
_LAST_PASSES = 3
_FORGETTING = 0.6  # batch t moves the means by t^-0.6; they converge for exponents in (0.5, 1]
_MAX_REVIVALS = 3  # per component


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When an iterative fit ends, and which components it sets anew.

    Attributes:
        max_iterations: at most this many passes over the vectors.
        tol: of a mixture, a change of the mean log-likelihood of a vector; of k-means, see ``lloyd``.
        min_share: a component with less than this part of an equal share (``N / K``) of the vectors is set anew, at
            most three times a component; 0 keeps all as they are.
    """

    max_iterations: int = 100
    tol: float = 1e-3
    min_share: float = 0.0

    def fewest(self, num_vectors: int, num_components: int) -> float:
        """A component with less of the vectors is lost."""
        return max(0.5, self.min_share * num_vectors / num_components) if self.min_share else -1.0


def cluster(
    x: Rows | SharedRows,
    num_components: int,
    *,
    method: str,
    seed: int = 0,
    stopping: Stopping = Stopping(min_share=0.01),  # immutable
    reg_covar: float = 1e-3,
) -> Clustering:
    """Cluster vectors from scratch.

    Args:
        x: ``(N, F)``, floating point or uint8. On several processes the result is the same on all of them.
        num_components: ``K``, at most ``N``.
        method: ``"gmm"`` or ``"kmeans"``.
        seed: of the samples, of k-means++ and of mini-batches.
        stopping: applies at each stage.
        reg_covar: added to every variance (mixtures).

    Returns:
        The components, on the device that the vectors are worked on.
    """
    data = SharedRows.of(x)
    generator = torch.Generator().manual_seed(seed)
    fitted, shift, spread = _start(data, num_components, method, generator, stopping, reg_covar)
    steps = _steps(method, shift.to(data.device), spread.to(data.device), reg_covar)
    fitted, batch_passes = fitted.to(data.device), 0
    if data.count > _MOST_FULL_PASSES_OVER:
        fitted, batch_passes = _mini_batches(data, fitted, steps, stopping, generator)
        stopping = dataclasses.replace(stopping, max_iterations=min(_LAST_PASSES, stopping.max_iterations))
    fitted = full_passes(data, fitted, steps, stopping)
    return dataclasses.replace(fitted, num_iterations=fitted.num_iterations + batch_passes)


def sizes_of(data: SharedRows, clustering: Clustering) -> list[int]:
    """How many vectors of all processes belong to each component. Collective."""

    def local() -> Tensor:
        shown = "assigning" if data.processes.first else None
        ids = assign(data.rows, clustering, device=data.device, progress=shown)
        return torch.bincount(ids.cpu(), minlength=len(clustering.mean)).double()

    [sizes] = data.processes.sum([data.processes.attempt(local)])
    return [int(size) for size in sizes]


def _start(
    data: SharedRows,
    num_components: int,
    method: str,
    generator: torch.Generator,
    stopping: Stopping,
    reg_covar: float,
) -> tuple[Clustering, Tensor, Tensor]:
    """Components fitted on samples, by process 0 alone, and mean and variance ``(F,)`` of the smaller one."""
    order = torch.randperm(data.count, generator=generator)
    seeds = torch.randint(2**31, (_STARTS,), generator=generator).tolist()
    size = min(_START_VECTORS, max(10 * num_components, _START_ELEMENTS // data.num_features), data.count)
    sampled = min(_SAMPLE_VECTORS, max(size, _SAMPLE_ELEMENTS // data.num_features), data.count)
    places = order[: sampled if sampled < data.count else size]
    vectors = data.sample(places)

    def start() -> tuple[Clustering, Tensor, Tensor]:
        few = as_float(vectors[:size], torch.float32)
        shift, spread = few.mean(dim=0), few.var(dim=0, correction=0)
        steps = _steps(method, shift, spread, reg_covar)
        fitted = _from_k_means(few, num_components, seeds, steps, stopping)
        if sampled < data.count:
            sample = SharedRows(vectors[places.argsort().to(vectors.device)])
            fitted = full_passes(sample, fitted, steps, stopping)
        return fitted.to("cpu"), shift.cpu(), spread.cpu()

    return data.processes.on_first(start)


def _steps(method: str, shift: Tensor, spread: Tensor, reg_covar: float) -> Steps:
    return GaussianSteps(shift, spread, reg_covar) if method == "gmm" else KMeansSteps(shift, spread)


def _from_k_means(x: Tensor, num_components: int, seeds: list[int], steps: Steps, stopping: Stopping) -> Clustering:
    """The best k-means of a small sample, and for a mixture the components that its clusters make."""
    on_cpu = x.cpu()  # each kind of device draws other random numbers
    centers = [kmeans_plusplus(on_cpu, num_components, seed=seed).to(x) for seed in seeds]
    starts = [lloyd(x, mean, shift=steps.shift, spread=steps.spread, stopping=stopping) for mean in centers]
    fitted = min(starts, key=lambda clustering: clustering.objective)
    return _hard_update(x, fitted, steps) if isinstance(steps, GaussianSteps) else fitted


def _hard_update(x: Tensor, clustering: Clustering, steps: GaussianSteps) -> Clustering:
    """A mixture's start from k-means: each centre's own vectors' mean, variance and part (``spread`` without any)."""
    nearest = assign(x, clustering)
    mean, var = clustering.mean.clone(), steps.spread.expand_as(clustering.mean) + steps.reg_covar
    for component in range(len(mean)):
        members = x[nearest == component]
        if len(members):
            mean[component] = members.mean(dim=0)
            var[component] = members.var(dim=0, correction=0) + steps.reg_covar
    prior = torch.bincount(nearest, minlength=len(mean)).clamp_min(1).to(mean.dtype)
    return dataclasses.replace(clustering, mean=mean, var=var, prior=prior / prior.sum())


def lloyd(
    x: Rows | SharedRows,
    mean: Tensor,
    *,
    shift: Tensor,
    spread: Tensor,
    stopping: Stopping = Stopping(),  # immutable
) -> Clustering:
    """Lloyd's algorithm for k-means from given centres.

    Args:
        x: ``(N, F)``, floating point or uint8.
        mean: centres ``(K, F)``.
        shift: ``(F,)``, near the data's mean.
        spread: variance of each feature ``(F,)``: the scale of ``tol``, and of splits.
        stopping: its ``tol`` is the sum of all centres' squared shifts, in units of the mean variance.

    Returns:
        The centres after the last update.
    """
    start = Clustering(mean=mean, var=None, prior=None, objective=math.inf, num_iterations=0)
    data = SharedRows.of(x)
    return full_passes(data, start, KMeansSteps(shift.to(mean), spread), stopping)


def full_passes(data: SharedRows, start: Clustering, steps: Steps, stopping: Stopping) -> Clustering:
    """E-steps over all vectors, an M-step after each, until the clustering has settled."""
    fitted, objective, passes = dataclasses.replace(start, objective=math.inf), math.inf, 0
    revivals = _MAX_REVIVALS * len(fitted.mean)
    for _ in _progress(data, stopping.max_iterations, f"fitting {steps.name}"):
        passes += 1
        text = f"fitting {steps.name}, pass {passes}"
        sums = Sums(*data.sum(steps.expectation(fitted), fitted.mean.dtype, text))
        before, (fitted, total) = fitted, _updated(data, sums, fitted, steps)
        objective = float(sums.objective / sums.num_vectors)
        fitted = dataclasses.replace(fitted, objective=objective)
        lost = (total < stopping.fewest(data.count, len(total))).nonzero().flatten().tolist()
        if lost and revivals > 0:
            revivals -= len(lost)
            fitted = dataclasses.replace(_split_largest(fitted, total, steps.spread, lost), objective=math.inf)
        elif steps.settled(before, fitted, stopping.tol):
            break
    return dataclasses.replace(fitted, objective=objective, num_iterations=passes)


def _progress(data: SharedRows, max_iterations: int, description: str) -> Iterator[int]:
    hidden = None if data.processes.first else True
    yield from tqdm(range(max_iterations), desc=description, unit="pass", disable=hidden, leave=False)


def _mini_batches(
    data: SharedRows, start: Clustering, steps: Steps, stopping: Stopping, generator: torch.Generator
) -> tuple[Clustering, int]:
    """One pass in mini-batches, once more after each that lost a component; and how many there were."""
    fitted = start
    for number in range(1 + _MAX_REVIVALS):
        means: Sums | None = None
        text = f"fitting {steps.name} in mini-batches"
        for t, sum_over in enumerate(data.sums_of_batches(fitted.mean.dtype, generator, text)):
            sums = Sums(*sum_over(steps.expectation(fitted)))
            batch = Sums(*(part / sums.num_vectors for part in sums))
            rate = (t + 1) ** -_FORGETTING
            means = batch if means is None else means.towards(batch, rate)
            fitted, share = _updated(data, means, fitted, steps)
        lost = (share * data.count < stopping.fewest(data.count, len(share))).nonzero().flatten().tolist()
        if not lost or number == _MAX_REVIVALS:
            break
        fitted = _split_largest(fitted, share, steps.spread, lost)
    return fitted, number + 1


def _updated(data: SharedRows, sums: Sums, fitted: Clustering, steps: Steps) -> tuple[Clustering, Tensor]:
    """The M-step, alike on all processes, and the vectors' parts in each component."""
    updated = steps.maximisation(sums, fitted)
    if updated.var is None or updated.prior is None:
        total, mean = data.processes.of_first([sums.total, updated.mean])
        return dataclasses.replace(updated, mean=mean), total
    total, mean, var, prior = data.processes.of_first([sums.total, updated.mean, updated.var, updated.prior])
    return dataclasses.replace(updated, mean=mean, var=var, prior=prior), total


def _split_largest(clustering: Clustering, total: Tensor, spread: Tensor, lost: list[int]) -> Clustering:
    """Each lost component becomes one half of the then largest one, half a standard deviation to either side."""
    mean = clustering.mean.clone()
    var = spread.expand_as(mean).clone() if clustering.var is None else clustering.var.clone()
    prior = (total / total.sum()).to(mean.dtype)
    prior[lost] = 0
    for component in lost:
        largest = int(prior.argmax())
        offset = var[largest].sqrt() / 2
        mean[component] = mean[largest] + offset
        mean[largest] -= offset
        var[component] = var[largest]
        prior[component] = prior[largest] = prior[largest] / 2
    if clustering.var is None:
        return dataclasses.replace(clustering, mean=mean)
    return dataclasses.replace(clustering, mean=mean, var=var, prior=prior / prior.sum())
