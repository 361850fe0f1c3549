"""One step of a clustering: what a chunk of vectors adds to its sums, and the components that those sums call for.

Gaussian mixtures (``GaussianSteps``) and k-means (``KMeansSteps``) differ in this alone. A vector ``a`` about a fixed
shift has, for a component, the score ``constant + linear . a + quadratic . a^2``: with the transposed chunk on the
right, two products of matrices that read it at the speed of memory, and two more give the sums.

Shape legend: ``M`` vectors, ``F`` features, ``K`` components.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cn_hf.contexts.chunks import Rows, map_chunks
from cn_hf.norm.em import Densities
from cn_hf.norm.functional import MixtureStatistics, mixture_update

__all__ = ["Clustering", "GaussianSteps", "KMeansSteps", "Steps", "Sums", "assign"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """Fitted components: ``mean`` ``(K, F)``; for mixtures also ``var`` ``(K, F)`` and ``prior`` ``(K,)``; float32.

    ``objective`` is the mean log-likelihood of a vector (mixtures), or its mean squared distance to its centre
    (k-means); ``num_iterations`` counts passes over all vectors, that over their mini-batches among them.
    """

    mean: Tensor
    var: Tensor | None
    prior: Tensor | None
    objective: float
    num_iterations: int

    def to(self, device: torch.device | str) -> Clustering:
        """The same components on a device."""
        var, prior = (None if part is None else part.to(device) for part in (self.var, self.prior))
        return dataclasses.replace(self, mean=self.mean.to(device), var=var, prior=prior)


class Sums(NamedTuple):
    """What an E-step leaves, additive over chunks, batches and processes.

    ``num_vectors`` ``()``; ``objective`` ``()``, log-likelihoods or squared distances; ``total`` ``(K,)``, the vectors'
    parts in each component; ``first`` ``(K, F)``, moments about the shift; ``second`` ``(K, F)``, of k-means ``(0,)``.
    """

    num_vectors: Tensor
    objective: Tensor
    total: Tensor
    first: Tensor
    second: Tensor

    def towards(self, other: Sums, rate: float) -> Sums:
        """The weighted mean of both, ``rate`` being the weight of ``other``."""
        return Sums(*(torch.lerp(mine, its, rate) for mine, its in zip(self, other, strict=True)))


class _Scores:
    """Log-densities of Gaussians with their priors, or of k-means' centres: greatest for the nearest."""

    def __init__(self, clustering: Clustering, shift: Tensor) -> None:
        mean = clustering.mean.to(shift)
        self.quadratic: Tensor | None = None
        if clustering.var is None:
            self.linear = mean - shift
            self.constant = self.linear.square().sum(dim=1, keepdim=True) / -2
        else:
            assert clustering.prior is not None
            densities = Densities.of(mean, clustering.var.to(shift), clustering.prior.to(shift), shift)
            self.linear, self.quadratic = densities.linear.T, densities.squared.T
            self.constant = densities.constant[:, None]

    def __call__(self, centered: Tensor, squared: Tensor) -> Tensor:
        """``(K, M)`` for vectors about the shift, and their squares."""
        scores = torch.addmm(self.constant, self.linear, centered.T)
        return scores if self.quadratic is None else scores.addmm_(self.quadratic, squared.T)


def assign(
    x: Rows, clustering: Clustering, *, device: torch.device | None = None, progress: str | None = None
) -> Tensor:
    """The component each vector belongs to: the likeliest, or for k-means the nearest.

    In float64, so that how the vectors are split into batches changes no id.

    Args:
        x: ``(M, F)``, floating point or uint8.
        clustering: on any device.
        device: where to compute; None: where ``x`` is.
        progress: text before a progress bar.

    Returns:
        int64 ``(M,)``, on the device of ``x``.
    """
    shift = clustering.mean.to(device or x.device, torch.float64).mean(dim=0)
    scores = _Scores(clustering, shift)

    def best(chunk: Tensor) -> Tensor:
        chunk = chunk - shift
        return scores(chunk, chunk if scores.quadratic is None else chunk.square()).argmax(dim=0)

    ids = torch.empty(len(x), dtype=torch.int64, device=shift.device)
    return map_chunks(x, torch.float64, best, ids, progress=progress).to(x.device)


class Steps(abc.ABC):
    """The steps of one method; subclasses define the E-step, the M-step and when they have settled.

    Args:
        shift: ``(F,)``, near the data's mean: sums are taken about it for precision.
        spread: ``(F,)``, each feature's variance: the scale of splits, and of k-means' ``tol``.
    """

    name = ""

    def __init__(self, shift: Tensor, spread: Tensor) -> None:
        self.shift = shift
        self.spread = spread

    @abc.abstractmethod
    def expectation(self, fitted: Clustering) -> Callable[[Tensor], Sums]:
        """The E-step as a function of chunks ``(m, F)``, which are on the device of ``shift``."""

    @abc.abstractmethod
    def maximisation(self, sums: Sums, fitted: Clustering) -> Clustering:
        """The M-step: the components that ``sums`` of all vectors (or their means) call for; ``objective`` is kept."""

    @abc.abstractmethod
    def settled(self, before: Clustering, after: Clustering, tol: float) -> bool:
        """Whether a pass has changed little enough."""


class GaussianSteps(Steps):
    """EM for diagonal Gaussians, as scikit-learn's ``GaussianMixture(covariance_type="diag")``.

    Args:
        shift: see ``Steps``.
        spread: see ``Steps``.
        reg_covar: added to every variance.
    """

    name = "the mixture"

    def __init__(self, shift: Tensor, spread: Tensor, reg_covar: float) -> None:
        super().__init__(shift, spread)
        self.reg_covar = reg_covar

    def expectation(self, fitted: Clustering) -> Callable[[Tensor], Sums]:
        """See ``Steps``."""
        scores, shift = _Scores(fitted, self.shift), self.shift

        def sums(chunk: Tensor) -> Sums:
            centered = chunk - shift
            squared = centered.square()
            joint = scores(centered, squared)
            log_norm = joint.logsumexp(dim=0)
            weight = (joint - log_norm).exp_()
            count = joint.new_full((), len(chunk))
            return Sums(count, log_norm.double().sum(), weight.sum(dim=1), weight @ centered, weight @ squared)

        return sums

    def maximisation(self, sums: Sums, fitted: Clustering) -> Clustering:
        """See ``Steps``."""
        stats = MixtureStatistics(sums.total, sums.first, sums.second, sums.objective, sums.num_vectors)
        updated = mixture_update(stats, shift=self.shift.double(), reg_covar=self.reg_covar)
        mean, var, prior = (part.to(fitted.mean.dtype) for part in updated)
        return dataclasses.replace(fitted, mean=mean, var=var, prior=prior)

    def settled(self, before: Clustering, after: Clustering, tol: float) -> bool:
        """Whether the mean log-likelihood of a vector has changed by less than ``tol``."""
        return abs(after.objective - before.objective) < tol


class KMeansSteps(Steps):
    """Lloyd's algorithm for k-means."""

    name = "k-means"

    def expectation(self, fitted: Clustering) -> Callable[[Tensor], Sums]:
        """See ``Steps``."""
        scores, shift = _Scores(fitted, self.shift), self.shift
        components = torch.arange(len(fitted.mean), device=shift.device)[:, None]

        def sums(chunk: Tensor) -> Sums:
            centered = chunk - shift
            best, nearest = scores(centered, centered).max(dim=0)
            weight = (nearest == components).to(chunk.dtype)
            distance = (torch.linalg.vecdot(centered, centered) - 2 * best).clamp_min(0)
            count = chunk.new_full((), len(chunk))
            return Sums(count, distance.double().sum(), weight.sum(dim=1), weight @ centered, chunk.new_empty(0))

        return sums

    def maximisation(self, sums: Sums, fitted: Clustering) -> Clustering:
        """See ``Steps``; a centre without vectors stays where it is."""
        total = sums.total[:, None]
        centers = sums.first / total.clamp_min(torch.finfo(total.dtype).tiny) + self.shift.double()
        mean = torch.where(total > 0, centers, fitted.mean.double())
        return dataclasses.replace(fitted, mean=mean.to(fitted.mean.dtype))

    def settled(self, before: Clustering, after: Clustering, tol: float) -> bool:
        """Whether all centres' squared shifts sum to at most ``tol``, in units of the mean variance."""
        moved = float((after.mean - before.mean).double().square().sum())
        return moved <= tol * float(self.spread.mean())
