"""The maths of context normalization and of its mixture forms, as functions of tensors. Start reading here.

Implements Eq. 8 (CN), Eq. 9 (CN+) and Eqs. 5-7 (mixture normalization, MN) of Faye et al., "Context Normalization Layer
with Applications", ICDM-W 2023. Densities and expectation maximisation are in ``em`` and re-exported here.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts (``K`` components), ``M`` feature vectors (every pixel or
token of every sample), ``x`` is ``(N, C, ...)`` with ``feature_dim=1`` or ``(N, ..., C)`` with ``feature_dim=-1``.

Statistics, log-densities and reductions are float32 at least, whatever the dtype of ``x`` and whatever autocast says
(products of matrices that are torch's are as precise as torch is told that float32 is); results come back in the dtype
of ``x``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from cn_hf.errors import ContextIdError
from cn_hf.norm import cpu_combination
from cn_hf.norm.choices import check_choice
from cn_hf.norm.combination import batch_statistics, combine, combine_in_pieces, component_statistics, mixture
from cn_hf.norm.em import (
    Densities,
    Mixture,
    MixtureStatistics,
    fit_mixture,
    full_precision,
    gaussian_log_density,
    kmeans_plusplus,
    mixture_statistics,
    mixture_update,
    posteriors,
    seed_mixture,
    statistics_dtype,
    wide_dtype,
)
from cn_hf.norm.fused import formulas, operators
from cn_hf.norm.fused.layout import check_devices
from cn_hf.norm.sample_posterior import combined, sample_moments

__all__ = [
    "Mixture",
    "MixtureStatistics",
    "Standardization",
    "component_statistics",
    "context_norm",
    "context_norm_plus",
    "context_rows",
    "fit_mixture",
    "gaussian_log_density",
    "kmeans_plusplus",
    "mixture",
    "mixture_norm",
    "mixture_statistics",
    "mixture_update",
    "norm_shift_scale",
    "normalize_rows",
    "posteriors",
    "scale_rows",
    "seed_mixture",
    "shift_scale",
]


_SMALL = 8192
"""Numbers of ``x`` up to which torch's own operators are quicker on a CPU than a call of a kernel of ours."""


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None = None, *, feature_dim: int) -> Tensor:
    """``(x - center) * scale + offset`` with one row of coefficients a sample.

    Subtracting first keeps full precision where ``|mean|`` is much larger than the standard deviation. Backward needs
    ``x`` only, and reduces over all positions of a sample before anything is summed over samples. See ``operators``.

    Args:
        x: ``(N, ..., C)`` or ``(N, C, ...)``, floating point.
        center: ``(N, C)`` or ``(1, C)``, float32 at least.
        scale: same shape and dtype as ``center``.
        offset: same shape and dtype as ``center``, or None.
        feature_dim: the axis of ``x`` that holds the features: 1 or -1.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    if _seen(x, center, scale, offset):
        check_devices(x, center, scale, offset)
        return formulas.shift_scale(x, center, scale, offset, feature_dim)
    if x.device.type == "cpu" and x.numel() <= _SMALL:
        operators.check_rows(x, feature_dim, center, scale, offset)
        return formulas.shift_scale(x, center, scale, offset, feature_dim)
    return operators.shift_scale(x, center, scale, offset, feature_dim)


def norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None = None, *, eps: float, centered: bool
) -> Tensor:
    """``shift_scale`` of ``x`` standardised over its last axis: a layer norm (or RMS norm) and what follows, in one.

    Backward needs ``x`` and two numbers a vector, as that of the layer norm alone does.

    Args:
        x: ``(N, ..., C)``, floating point.
        center: ``(N, C)`` or ``(1, C)``, float32 at least.
        scale: same shape and dtype as ``center``.
        offset: same shape and dtype as ``center``, or None.
        eps: added to the variance (or mean square) of each vector.
        centered: subtract each vector's mean, as a layer norm does; an RMS norm does not.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    check_devices(x, center, scale, offset)
    if torch.compiler.is_compiling():
        opaque = not torch.compiler.is_exporting() and operators.fused(x.device.type, x.dtype)
    else:
        opaque = not _looked_into(x, center, scale, offset)
    if not opaque:
        return formulas.composed(x, center, scale, offset, eps, centered)
    return operators.norm_shift_scale(x, center, scale, offset, eps, centered)


def _seen(*tensors: Tensor | None) -> bool:
    """True if torch's own operators are wanted, for a compiler to fuse or for others to see."""
    return torch.compiler.is_compiling() or _looked_into(*tensors)


def _looked_into(*tensors: Tensor | None) -> bool:
    """True if torch must see its own operators: to trace or transform them, or for subclasses with their own rules."""
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return True
    return False


def context_rows(table: Tensor, context_ids: Tensor | int, *, sparse: bool = False) -> Tensor:
    """The row of ``table`` that belongs to each sample: a look-up for hard ids, a weighted mean for soft ones.

    In an exported graph, where nothing checks them, ids outside ``0..T-1`` give rows of NaN.

    Args:
        table: ``(T, C)``.
        context_ids: int64 ``(N,)``, a Python int, or float weights ``(N, T)``.
        sparse: give ``table`` a sparse gradient where ``context_ids`` are int64 and nothing is being compiled.

    Returns:
        ``(N, C)``; ``(1, C)`` for a Python int.

    Raises:
        ContextIdError: a Python int is no context.
        InputDeviceError: the ids are not where the table is.
    """
    if isinstance(context_ids, int):
        if not 0 <= context_ids < len(table):
            raise ContextIdError(f"context_ids must lie in 0..{len(table) - 1}, received {context_ids}.")
        return table[context_ids : context_ids + 1]
    check_devices(table, context_ids)
    if context_ids.is_floating_point():
        with full_precision(table.device):
            return context_ids.to(table.dtype) @ table
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        none = len(table)  # an index of ONNX counts from the end if it is negative, and one too large stops the run
        context_ids = torch.where((context_ids < 0) | (context_ids >= none), none, context_ids)
        table = F.pad(table, (0, 0, 0, 1), value=math.nan)
    return F.embedding(context_ids, table, sparse=sparse and not torch.compiler.is_compiling())


class Standardization(NamedTuple):
    """A standardisation of each feature vector: mean 0 and variance 1 (``centered``: layer norm), or mean square 1.

    ``eps`` is added to its variance or mean square.
    """

    centered: bool
    eps: float


def context_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    context_ids: Tensor | int,
    *,
    eps: float = 1e-5,
    feature_dim: int = -1,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Context normalization (Eq. 8): each sample by the mean and variance of its own context.

    Args:
        x: activations ``(N, ..., C)`` or ``(N, C, ...)``, floating point.
        mean: ``(T, C)``.
        var: ``(T, C)``, positive.
        context_ids: int64 ``(N,)``, a Python int, or float weights ``(N, T)`` whose rows sum to one; not checked here.
        eps: added to ``var``.
        feature_dim: 1 for NCHW maps, -1 for tokens.
        weight: optional affine scale ``(C,)``.
        bias: optional affine offset ``(C,)``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        InputTypeError: ``x`` is not floating point.
        InputDeviceError: the tensors are on different devices.
    """
    dtype = statistics_dtype(x, mean, var)
    rows = context_rows(mean.to(dtype), context_ids), context_rows(var.to(dtype), context_ids)
    return normalize_rows(x, *rows, eps=eps, feature_dim=feature_dim, weight=weight, bias=bias)


def normalize_rows(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    feature_dim: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    standardize: Standardization | None = None,
) -> Tensor:
    """Eq. 8 with the statistics of each sample already looked up: ``mean`` and ``var`` are ``(N, C)`` or ``(1, C)``.

    With ``standardize`` each vector of ``x`` is standardised over its features first, in the same pass.
    """
    check_devices(x, mean, var, weight, bias)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    return scale_rows(x, mean, scale, bias, feature_dim, standardize)


def scale_rows(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    feature_dim: int,
    standardize: Standardization | None = None,
) -> Tensor:
    """``normalize_rows`` with ``scale``, the weight over ``sqrt(var + eps)``, already computed."""
    offset = None if bias is None else bias.to(scale.dtype)
    if offset is not None and offset.dim() == 1:
        offset = offset.unsqueeze(0)
    if standardize is None:
        return shift_scale(x, mean, scale, offset, feature_dim=feature_dim)
    tokens = x if feature_dim == -1 else x.movedim(feature_dim, -1)
    out = norm_shift_scale(tokens, mean, scale, offset, eps=standardize.eps, centered=standardize.centered)
    return out if feature_dim == -1 else out.movedim(-1, feature_dim)


def context_norm_plus(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float = 1e-5,
    feature_dim: int = -1,
    plus_stats: str = "learned",
    plus_scale: str = "none",
    plus_posterior: str = "vector",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """CN+ (Eq. 9): all contexts combined by their posteriors, priors 1/T, for inputs whose context is unknown.

    Time is that of ``T`` contexts for each vector. Without gradients, memory beyond ``x``, its result and the
    statistics is bounded; with them all ``M x T`` posteriors are held a few times, never ``T`` copies of ``x``.

    Args:
        x: activations ``(N, ..., C)`` or ``(N, C, ...)``.
        mean: ``(T, C)``.
        var: ``(T, C)``, positive.
        eps: added to ``var``.
        feature_dim: 1 for NCHW maps, -1 for tokens.
        plus_stats: ``"batch"``, the paper's: each context's mean and variance re-estimated on this batch, so an output
            depends on the rest of the batch; ``"learned"``: ``mean`` and ``var`` themselves, each vector for itself.
        plus_scale: ``"sqrt_t"``, the paper's factor sqrt(T), which training never sees; ``"none"``.
        plus_posterior: ``"vector"``, the paper's: each vector has its own; ``"sample"``: all vectors of a sample (a row
            of ``x``) share one, since a context belongs to a sample.
        weight: optional affine scale ``(C,)``.
        bias: optional affine offset ``(C,)``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        ConfigError: ``plus_stats``, ``plus_scale`` or ``plus_posterior`` is neither of its values.
    """
    check_choice("plus_stats", plus_stats)
    check_choice("plus_scale", plus_scale)
    check_choice("plus_posterior", plus_posterior)
    if plus_posterior == "sample":
        return _by_sample(x, mean, var, eps, feature_dim, plus_stats == "batch", plus_scale == "sqrt_t", weight, bias)
    if feature_dim not in (1, -1):
        out = context_norm_plus(
            x.movedim(feature_dim, 1), mean, var, eps=eps, feature_dim=1, plus_stats=plus_stats, plus_scale=plus_scale,
            weight=weight, bias=bias,
        )  # fmt: skip
        return out.movedim(1, feature_dim)
    check_devices(x, mean, var, weight, bias)
    dtype = wide_dtype(x, mean, var)
    with full_precision(x.device):
        mean, var = mean.to(dtype), var.to(dtype)
        shift = mean.mean(dim=0).float().to(dtype)  # a number that the CPU's kernel can subtract
        densities = Densities.of(mean, var + eps, shift=shift)
        factor = mean.new_full((), math.sqrt(len(mean)) if plus_scale == "sqrt_t" else 1.0)
        given = (mean - shift, var) if plus_stats == "learned" else None
        options: dict[str, Any] = {"eps": eps, "feature_dim": feature_dim, "weight": weight, "bias": bias}
        inputs = x, mean, var, weight, bias
        if _seen(*inputs) or _differentiated(*inputs) or x.numel() == 0:
            return combine(x, densities, factor, given, **options)[0]
        given = batch_statistics(x, densities, feature_dim) if given is None else given
        done = cpu_combination.combine(x, densities, factor, given, **options)
        return combine_in_pieces(x, densities, factor, given, **options) if done is None else done


def _by_sample(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    feature_dim: int,
    by_batch: bool,
    by_sqrt_t: bool,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return CN+ with one posterior a sample: an affine map of each sample."""
    check_devices(x, mean, var, weight, bias)
    dtype = statistics_dtype(x, mean, var)
    if x.numel() == 0:
        return x
    with full_precision(x.device):
        center, scale = combined(sample_moments(x, feature_dim), mean, var + eps, eps=eps, by_batch=by_batch)
    scale = scale.to(dtype) * (math.sqrt(len(mean)) if by_sqrt_t else 1.0)
    scale = scale if weight is None else scale * weight
    offset = None if bias is None else bias.to(scale.dtype).expand_as(scale)
    return shift_scale(x, center.to(dtype), scale, offset, feature_dim=feature_dim)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def mixture_norm(
    x: Tensor,
    theta: Mixture,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    feature_dim: int = -1,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    distributed: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mixture normalization (Eqs. 5-7; Kalayeh and Shah 2019) for a given mixture, which is a constant in backward.

    Args:
        x: activations ``(N, ..., C)`` or ``(N, C, ...)``.
        theta: the mixture: means ``(K, C)``, variances ``(K, C)``, priors ``(K,)``.
        statistics: mean and variance of each component, ``(K, C)`` each, for evaluation; None computes them from ``x``
            (training), and gradients flow through them.
        eps: added to the variances under the root.
        feature_dim: 1 for maps, -1 for tokens.
        weight: optional affine scale ``(C,)``.
        bias: optional affine offset ``(C,)``.
        distributed: compute the statistics over all processes.

    Returns:
        The output, of the shape and dtype of ``x``, and the statistics that were used.
    """
    if feature_dim not in (1, -1):
        out, used = mixture_norm(
            x.movedim(feature_dim, 1), theta, statistics=statistics, eps=eps, feature_dim=1, weight=weight, bias=bias,
            distributed=distributed,
        )  # fmt: skip
        return out.movedim(1, feature_dim), used
    check_devices(x, *theta[:3], *(statistics or ()), weight, bias)
    dtype = wide_dtype(x, theta.mean)
    with full_precision(x.device):
        mean, var, prior = (part.detach().to(dtype) for part in theta[:3])
        densities = Densities.of(mean, var, prior)
        options: dict[str, Any] = {"eps": eps, "feature_dim": feature_dim, "weight": weight, "bias": bias}
        if statistics is None:
            out, (center, var) = combine(x, densities, prior.rsqrt(), None, distributed=distributed, **options)
            kept = statistics_dtype(x, theta.mean)
            return out, ((center + densities.shift).to(kept), var.to(kept))
        inputs = x, weight, bias, *statistics
        given = statistics[0].to(dtype) - densities.shift, statistics[1].to(dtype)
        if _seen(*inputs) or _differentiated(*inputs) or x.numel() == 0:
            return combine(x, densities, prior.rsqrt(), given, **options)[0], statistics
        return combine_in_pieces(x, densities, prior.rsqrt(), given, **options), statistics
