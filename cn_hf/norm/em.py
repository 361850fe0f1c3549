"""Mixtures of diagonal Gaussians: densities, posteriors, and expectation maximisation.

The E-step's posteriors are tau of Eqs. 5, 6 and 9 of the paper. The statistics of an E-step are additive, so the same
functions serve a batch on its device, chunks of a dataset larger than memory, and several processes.

Shape legend: ``M`` vectors, ``C`` features, ``K`` components. Everything is float32 at least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cn_hf.errors import InputTypeError

__all__ = [
    "Densities",
    "Mixture",
    "MixtureStatistics",
    "SumOverProcesses",
    "data_shift",
    "fit_mixture",
    "full_precision",
    "gaussian_log_density",
    "kmeans_plusplus",
    "log_posteriors",
    "mixture_statistics",
    "mixture_update",
    "piece_size",
    "place_among_processes",
    "posteriors",
    "reduce_over_processes",
    "seed_mixture",
    "statistics_dtype",
    "sum_over_processes",
    "wide_dtype",
]


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype statistics are computed in: the widest of ``tensors``, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:  # torch has no arithmetic in 8 bits
            raise InputTypeError(
                f"Expected floating point activations, received {tensor.dtype}. Convert images first: x.float() / 255."
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def piece_size(device: torch.device) -> int:
    """Numbers that are computed with at a time: in caches on a CPU, elsewhere few launches in little memory."""
    return 2**18 if device.type == "cpu" else 2**26


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which sums of squares keep their digits: float64, or ``statistics_dtype`` on MPS, which has none.

    ``x^2 - 2 x mean + mean^2`` cancels by the square of the distance in standard deviations between the shift and a
    component: float32 has no digit left a few thousand deviations away.
    """
    dtype = statistics_dtype(*tensors)
    return dtype if tensors[0].device.type == "mps" else torch.float64


class Densities(NamedTuple):
    """Log-densities of diagonal Gaussians about a shared shift, prepared for many chunks of vectors.

    ``shift`` ``(C,)``, ``squared`` and ``linear`` ``(C, K)``, ``constant`` ``(K,)``; in ``wide_dtype``.
    """

    shift: Tensor
    squared: Tensor
    linear: Tensor
    constant: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, prior: Tensor | None = None, shift: Tensor | None = None) -> Densities:
        """Of means and positive variances ``(K, C)``, times priors ``(K,)``; without a shift, the mean of the means."""
        shift = mean.mean(dim=0) if shift is None else shift
        mean, precision = mean - shift, var.reciprocal()
        constant = -0.5 * (mean.square() * precision + var.log() + math.log(2 * math.pi)).sum(dim=1)
        if prior is not None:
            constant = constant + prior.to(constant.dtype).log()
        return cls(shift, -0.5 * precision.T, (mean * precision).T, constant)

    def log(self, centered: Tensor, square: Tensor | None = None) -> Tensor:
        """``(M, K)`` of vectors ``(M, C)`` that the shift has been subtracted from, and of their squares."""
        square = centered.square() if square is None else square
        return torch.addmm(torch.addmm(self.constant, square, self.squared), centered, self.linear)

    def log_posteriors(self, centered: Tensor, square: Tensor | None = None) -> Tensor:
        """Logarithm of the probability of each component given a vector, ``(M, K)``; arguments of ``log``."""
        return self.log(centered, square).log_softmax(dim=1)


def _densities_at(x: Tensor, mean: Tensor, var: Tensor, prior: Tensor | None) -> tuple[Densities, Tensor, torch.dtype]:
    """Densities, the vectors less their shift, and the dtype of results."""
    dtype = wide_dtype(x, mean, var)
    densities = Densities.of(mean.to(dtype), var.to(dtype), prior)
    return densities, x.to(dtype) - densities.shift, statistics_dtype(x, mean, var)


def gaussian_log_density(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Log-density of vectors under diagonal Gaussians, by matrix products.

    Args:
        x: ``(M, C)``.
        mean: ``(K, C)``.
        var: ``(K, C)``, positive.

    Returns:
        ``(M, K)``, float32 at least.
    """
    with full_precision(x.device):
        densities, centered, dtype = _densities_at(x, mean, var, None)
        return densities.log(centered).to(dtype)


def log_posteriors(x: Tensor, mean: Tensor, var: Tensor, prior: Tensor | None) -> Tensor:
    """Logarithm of ``posteriors``, same arguments: finite where the posterior itself underflows."""
    with full_precision(x.device):
        densities, centered, dtype = _densities_at(x, mean, var, prior)
        return densities.log_posteriors(centered).to(dtype)


def posteriors(x: Tensor, mean: Tensor, var: Tensor, prior: Tensor | None = None) -> Tensor:
    """Probability of each component given a vector, tau of Eqs. 6 and 9.

    Args:
        x: ``(M, C)``.
        mean: ``(K, C)``.
        var: ``(K, C)``, positive (with eps already added where eps belongs to the model).
        prior: ``(K,)``, summing to one; None for equal priors.

    Returns:
        ``(M, K)``, float32 at least, rows sum to one.
    """
    return log_posteriors(x, mean, var, prior).exp()


class Mixture(NamedTuple):
    """A mixture of diagonal Gaussians: ``mean`` ``(K, C)``, ``var`` ``(K, C)``, ``prior`` ``(K,)``.

    ``log_likelihood`` is the mean log-likelihood of a vector at the last E-step.
    """

    mean: Tensor
    var: Tensor
    prior: Tensor
    log_likelihood: Tensor
    num_iterations: int


class MixtureStatistics(NamedTuple):
    """Sums of one E-step, additive over chunks of data and over processes.

    ``total`` ``(K,)`` responsibilities, ``first`` and ``second`` ``(K, C)`` moments about a fixed shift (sums),
    ``log_likelihood`` ``()`` summed over vectors, ``num_vectors`` ``()``.
    """

    total: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    num_vectors: Tensor

    def plus(self, other: MixtureStatistics) -> MixtureStatistics:
        """Statistics of both sets of vectors together."""
        return MixtureStatistics(*(a + b for a, b in zip(self, other, strict=True)))


class SumOverProcesses(torch.autograd.Function):
    """Sum tensors over all processes, in forward and in backward, in one collective each."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]  # torch's untyped protocol
        """The sums."""
        return sum_over_processes(tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]  # torch's untyped protocol
        """The sums of their gradients."""
        return sum_over_processes(grads)


def reduce_over_processes(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """The tensors of all processes in one, by ``op``."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=op)
    return tensor


def sum_over_processes(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each tensor summed over all processes, in one collective; all are of one dtype."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def place_among_processes(count: int, device: torch.device) -> tuple[int, int]:
    """Place of this process's first vector among those of all processes in rank order, and the number of those.

    Args:
        count: vectors of this process.
        device: one the process group can send from.
    """
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(count, dtype=torch.int64, device=device))
    values = [int(value) for value in counts]
    return sum(values[: dist.get_rank()]), sum(values)


def data_shift(x: Tensor, distributed: bool = False) -> Tensor:
    """The mean ``(C,)`` of vectors ``(M, C)``, those of all processes if asked: what statistics are taken about."""
    total = torch.cat([x.sum(dim=0), x.new_full((1,), len(x))])
    if distributed:
        dist.all_reduce(total)
    return total[:-1] / total[-1].clamp_min(1)


def mixture_statistics(x: Tensor, mean: Tensor, var: Tensor, prior: Tensor, *, shift: Tensor) -> MixtureStatistics:
    """E-step on a chunk of vectors.

    Args:
        x: ``(M, C)``.
        mean: ``(K, C)``.
        var: ``(K, C)``.
        prior: ``(K,)``.
        shift: ``(C,)``, near the data's mean, the same for every chunk: sums are taken about it for precision.

    Returns:
        The chunk's statistics, in ``wide_dtype``.
    """
    dtype = wide_dtype(x, mean, var)

    def responsibilities(centered: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        joint = densities.log(centered, square)
        log_norm = joint.logsumexp(dim=1)
        return (joint - log_norm[:, None]).exp(), log_norm.sum()

    with full_precision(x.device):
        densities = Densities.of(mean.to(dtype), var.to(dtype), prior, shift.to(dtype))
        return _weighted_statistics(x, shift, responsibilities)


def _weighted_statistics(
    x: Tensor, shift: Tensor, weigh: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> MixtureStatistics:
    """Statistics about a shift, a piece after another: ``weigh`` returns a piece's weights and log-likelihood."""
    dtype = wide_dtype(x, shift)
    parts = []
    for part in torch.split(x, max(1, piece_size(x.device) // x.shape[1])):
        centered = part.to(dtype) - shift
        square = centered.square()
        weight, log_likelihood = weigh(centered, square)
        first, second = weight.T @ centered, weight.T @ square
        parts.append(
            MixtureStatistics(weight.sum(dim=0), first, second, log_likelihood, weight.new_full((), len(part)))
        )
    return functools.reduce(MixtureStatistics.plus, parts)


def mixture_update(
    stats: MixtureStatistics, *, shift: Tensor, reg_covar: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """M-step, as scikit-learn's ``GaussianMixture(covariance_type="diag")`` does it.

    Args:
        stats: statistics of all the data.
        shift: the shift they were taken about.
        reg_covar: added to every variance.

    Returns:
        mean ``(K, C)``, var ``(K, C)``, prior ``(K,)``.
    """
    count = stats.total + 10 * torch.finfo(stats.total.dtype).eps
    mean = stats.first / count[:, None]
    var = (stats.second / count[:, None] - mean.square()).clamp_min(0) + reg_covar
    return mean + shift, var, count / count.sum()


def kmeans_plusplus(x: Tensor, num_components: int, *, seed: int = 0, distributed: bool = False) -> Tensor:
    """Start centres by k-means++ (Arthur and Vassilvitskii 2007): each drawn with probability ~ squared distance.

    The draw is an arg-max of log-probabilities plus Gumbel noise indexed by the vector's place among the vectors of all
    processes in rank order, so that the result does not depend on how many processes share them.

    Args:
        x: ``(M, C)``; on several processes, this one's part.
        num_components: ``K``.
        seed: of the noise.
        distributed: draw over the vectors of all processes of the default group.

    Returns:
        ``(K, C)``, float32 at least.
    """
    x = x.to(statistics_dtype(x))
    first, total = place_among_processes(len(x), x.device) if distributed else (0, len(x))
    if total == 0:
        raise InputTypeError("k-means++ needs at least one vector, received none.")
    generator = torch.Generator(x.device).manual_seed(seed)
    distance = x.new_full((len(x),), math.inf)
    log_weight = x.new_zeros(len(x))
    centers: list[Tensor] = []
    for _ in range(num_components):
        uniform = torch.rand(total, generator=generator, device=x.device, dtype=x.dtype)[first : first + len(x)]
        score = log_weight - torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
        center = _argmax_vector(x, score, distributed)
        centers.append(center)
        distance = torch.minimum(distance, (x - center).square().sum(dim=1))
        log_weight = distance.clamp_min(torch.finfo(x.dtype).tiny).log()
    return torch.stack(centers)


def _argmax_vector(x: Tensor, score: Tensor, distributed: bool) -> Tensor:
    if not distributed:
        return x.index_select(0, score.argmax().view(1))[0]
    best = torch.cat([x.new_full((1,), -math.inf), x.new_zeros(x.shape[1])])
    if len(x):
        index = score.argmax().view(1)
        best = torch.cat([score.index_select(0, index), x.index_select(0, index)[0]])
    gathered = [torch.empty_like(best) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, best)
    rows = torch.stack(gathered)
    return rows.index_select(0, rows[:, 0].argmax().view(1))[0, 1:]


def seed_mixture(
    x: Tensor,
    num_components: int,
    *,
    seed: int = 0,
    reg_covar: float = 1e-6,
    distributed: bool = False,
    shift: Tensor | None = None,
) -> Mixture:
    """A start for EM: k-means++ centres, then one M-step with every vector given to its nearest centre.

    Args:
        x: ``(M, C)``.
        num_components: ``K``.
        seed: of k-means++.
        reg_covar: added to every variance.
        distributed: over the vectors of all processes.
        shift: ``data_shift`` of the vectors, where the caller has it.

    Returns:
        The start; its ``log_likelihood`` is nan.
    """
    x = x.to(statistics_dtype(x))
    centers = kmeans_plusplus(x, num_components, seed=seed, distributed=distributed)
    shift = data_shift(x, distributed) if shift is None else shift

    def nearest(centered: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.cdist(centered, (centers - shift).to(centered.dtype)).argmin(dim=1)
        return F.one_hot(places, num_components).to(centered.dtype), centered.new_zeros(())

    with full_precision(x.device):
        stats = _weighted_statistics(x, shift, nearest)
    if distributed:
        stats = MixtureStatistics(*sum_over_processes(stats))
    mean, var, prior = (part.to(x.dtype) for part in mixture_update(stats, shift=shift, reg_covar=reg_covar))
    return Mixture(mean, var, prior, x.new_full((), math.nan), 0)


def fit_mixture(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    prior: Tensor,
    *,
    num_iterations: int = 100,
    tol: float | None = 1e-3,
    reg_covar: float = 1e-6,
    distributed: bool = False,
    shift: Tensor | None = None,
    chunk_rows: int | None = None,
    each: Callable[..., Iterable[MixtureStatistics]] = map,
) -> Mixture:
    """Expectation maximisation from a given start, on the device of ``x``.

    Args:
        x: ``(M, C)``.
        mean: ``(K, C)``.
        var: ``(K, C)``.
        prior: ``(K,)``.
        num_iterations: at most this many iterations.
        tol: stop once the mean log-likelihood changes by less; None runs all iterations and never waits for the device.
        reg_covar: added to every variance.
        distributed: sum the statistics over all processes of the default group.
        shift: ``data_shift`` of the vectors, where the caller has it.
        chunk_rows: vectors of one E-step, which bounds the memory beside ``x``; None takes all at once.
        each: ``map``, or that of a pool of threads, over the chunks.

    Returns:
        The fitted mixture.
    """
    x = x.to(statistics_dtype(x, mean))
    shift = data_shift(x, distributed) if shift is None else shift
    chunks = torch.split(x, chunk_rows or max(1, len(x)))
    log_likelihood, previous, iterations = x.new_full((), -math.inf), -math.inf, 0
    while iterations < num_iterations:
        iterations += 1
        e_step = functools.partial(mixture_statistics, mean=mean, var=var, prior=prior, shift=shift)
        stats = functools.reduce(MixtureStatistics.plus, each(e_step, chunks))
        if distributed:
            stats = MixtureStatistics(*sum_over_processes(stats))
        mean, var, prior = mixture_update(stats, shift=shift, reg_covar=reg_covar)
        log_likelihood = stats.log_likelihood / stats.num_vectors
        if tol is not None:
            current = float(log_likelihood)
            if abs(current - previous) < tol:
                break
            previous = current
    mean, var, prior, log_likelihood = (part.to(x.dtype) for part in (mean, var, prior, log_likelihood))
    return Mixture(mean, var, prior, log_likelihood, iterations)
