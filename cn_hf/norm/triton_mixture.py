"""Triton kernels of mixture normalization (Eqs. 5-7) in training on CUDA.

A program holds tiles of all features of some vectors. Forward reads ``x`` twice and writes ``y``; backward reads ``x``
and its gradient twice each and writes one gradient: what batch norm moves in training, and ``K`` log-posteriors a
vector, which are written once and read three times. The sums over the batch of each component are weighted by a softmax
of those; every lane keeps the peak of its own vectors and fades its sums whenever that rises, so that no pass only
looks for it. Sums are taken about each program's own first tile, and moved to the mean when they are merged.

With ``tau`` the posteriors, ``a = tau / sqrt(prior)``, ``w = tau / (sum of tau over the batch)``, ``r = 1 / sqrt(var +
eps)``, ``d = x - mean`` and ``g`` the gradient of the output before the affine map, all of a component ``k``:

    y = sum_k a d r,    mean = sum_m w x,    var = sum_m w d^2
    P = dL/dmean = -r sum_m a g                             Q = dL/dvar = -r^3 / 2 sum_m a g d
    D = dL/dlog tau = sum_c [a g d r + w (P d + Q (d^2 - var))]
    J = dL/d(joint log-density) = D - tau sum_k D
    dL/dx = sum_k [a g r + w (P + 2 Q d) + J (linear + 2 squared bounded)]

where ``joint = constant + sum_c (linear bounded + squared bounded^2)`` and ``bounded`` is ``x`` within ``reach``. The
sums over ``m`` take the first pass of backward, those over ``c`` are within a tile of the second.

All is arithmetic of the tables' dtype, float32 or float64, never rounded to tf32. No atomics: programs write
partial sums that are added in a fixed order, and how the work is cut depends on shapes alone.

Importing this module needs triton. Tensors are on CUDA, or anywhere with ``TRITON_INTERPRET=1`` set before the import.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions of a sample, ``K`` components (contexts), ``M = N * L``
vectors.
"""
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, assignment, misc"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cn_hf.norm.em import Densities
from cn_hf.norm.layout import arranged, stored
from cn_hf.norm.pieces import MixtureKept
from cn_hf.norm.triton_launch import MOST, aligned, on_device_of, sizes_of, stages

__all__ = ["handles_mixture_norm", "mixture_norm", "mixture_norm_backward"]

_MOST_COMPONENTS, _MOST_FEATURES = 8, 2048  # whose sums fit the registers, and whose code compiles in seconds


@triton.jit
def _tile(tile, features, samples, sample_step, position_step, feature_step, length, BLOCK_P: tl.constexpr,
          BLOCK_C: tl.constexpr):  # fmt: skip
    vector = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    feature = tl.arange(0, BLOCK_C)
    present = vector < samples * length
    known = feature < features
    start = (vector // length).to(tl.int64) * sample_step + (vector % length).to(tl.int64) * position_step
    places = start[:, None] + feature.to(tl.int64)[None, :] * feature_step
    return vector, present, feature, known, places, present[:, None] & known[None, :]


@triton.jit
def _mixture_statistics(
    x_ptr, log_tau_ptr, pilots_ptr, peaks_ptr, totals_ptr, firsts_ptr, seconds_ptr, shift_ptr, squared_ptr, linear_ptr,
    constant_ptr, reach_ptr, tiles, features, samples, sample_step, position_step, feature_step, units,
    ALIGN: tl.constexpr, COMPONENTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LOWEST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    length = units * ALIGN
    vectors = (samples * length).to(tl.int64)
    program = tl.program_id(0)
    feature = tl.arange(0, BLOCK_C)
    known = feature < features
    shift = tl.load(shift_ptr + feature, mask=known, other=0)[None, :]
    reach = tl.load(reach_ptr)
    squared, linear, constant, peak, total, first, second = (), (), (), (), (), (), ()
    for component in tl.static_range(COMPONENTS):
        squared += (tl.load(squared_ptr + component * features + feature, mask=known, other=0)[None, :],)
        linear += (tl.load(linear_ptr + component * features + feature, mask=known, other=0)[None, :],)
        constant += (tl.load(constant_ptr + component),)
        peak += (tl.full([BLOCK_P], LOWEST, shift.dtype),)
        total += (tl.full([BLOCK_P], 0.0, shift.dtype),)
        first += (tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype),)
        second += (tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype),)

    _, present, _, _, places, mask = _tile(
        program * tiles, features, samples, sample_step, position_step, feature_step, length, BLOCK_P, BLOCK_C
    )
    x = tl.load(x_ptr + places, mask=mask, other=0).to(shift.dtype)
    pilot = (tl.sum(tl.where(mask, x - shift, 0.0), axis=0) / tl.sum(present.to(shift.dtype), axis=0))[None, :]
    for tile in tl.range(program * tiles, program * tiles + tiles, num_stages=STAGES):
        vector, present, _, _, places, mask = _tile(
            tile, features, samples, sample_step, position_step, feature_step, length, BLOCK_P, BLOCK_C
        )
        x = tl.load(x_ptr + places, mask=mask, other=0).to(shift.dtype) - shift
        bounded = tl.clamp(x, -reach, reach, propagate_nan=tl.PropagateNan.ALL)
        square = bounded * bounded
        joint = ()
        for component in tl.static_range(COMPONENTS):
            terms = square * squared[component] + bounded * linear[component]
            joint += (tl.sum(terms, axis=1) + constant[component],)
        highest = joint[0]
        for component in tl.static_range(1, COMPONENTS):
            highest = tl.maximum(highest, joint[component])
        norm = tl.full([BLOCK_P], 0.0, shift.dtype)
        for component in tl.static_range(COMPONENTS):
            norm += tl.exp(joint[component] - highest)
        norm = tl.log(norm)
        x -= pilot
        peaks, totals, firsts, seconds = (), (), (), ()
        for component in tl.static_range(COMPONENTS):
            log_tau = joint[component] - highest - norm
            tl.store(log_tau_ptr + component * vectors + vector, log_tau, mask=present)
            log_tau = tl.where(present, log_tau, LOWEST)
            higher = tl.maximum(peak[component], log_tau, propagate_nan=tl.PropagateNan.ALL)
            fade = tl.exp(peak[component] - higher)
            weight = tl.where(present, tl.exp(log_tau - higher), 0.0)
            weighted = weight[:, None] * x
            peaks += (higher,)
            totals += (total[component] * fade + weight,)
            firsts += (first[component] * fade[:, None] + weighted,)
            seconds += (second[component] * fade[:, None] + weighted * x,)
        peak, total, first, second = peaks, totals, firsts, seconds

    tl.store(pilots_ptr + program * features + feature, tl.sum(pilot, axis=0), mask=known)
    for component in tl.static_range(COMPONENTS):
        row = program * COMPONENTS + component
        highest = tl.max(peak[component], axis=0)
        fade = tl.exp(peak[component] - highest)
        tl.store(peaks_ptr + row, highest)
        tl.store(totals_ptr + row, tl.sum(total[component] * fade, axis=0))
        row = row.to(tl.int64) * features + feature
        tl.store(firsts_ptr + row, tl.sum(first[component] * fade[:, None], axis=0), mask=known)
        tl.store(seconds_ptr + row, tl.sum(second[component] * fade[:, None], axis=0), mask=known)


@triton.jit
def _merge_statistics(
    pilots_ptr, peaks_ptr, totals_ptr, firsts_ptr, seconds_ptr, shift_ptr, log_total_ptr, center_ptr, mean_ptr, var_ptr,
    rstd_ptr, eps, programs, features, COMPONENTS: tl.constexpr, LOWEST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    component = tl.program_id(0) % COMPONENTS
    feature = tl.program_id(0) // COMPONENTS * BLOCK_C + tl.arange(0, BLOCK_C)
    known = feature < features
    index = tl.arange(0, BLOCK_S)
    peaks_ptr += component
    totals_ptr += component
    firsts_ptr += component * features
    seconds_ptr += component * features

    peak = tl.full([BLOCK_S], LOWEST, peaks_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_S):
        program = start + index
        peaks = tl.load(peaks_ptr + program * COMPONENTS, mask=program < programs, other=LOWEST)
        peak = tl.maximum(peak, peaks, propagate_nan=tl.PropagateNan.ALL)
    peak = tl.max(peak, axis=0)
    total = tl.full([BLOCK_S], 0.0, peaks_ptr.dtype.element_ty)
    first = tl.full([BLOCK_S, BLOCK_C], 0.0, peaks_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_S):
        program = start + index
        there = program < programs
        mask = there[:, None] & known[None, :]
        place = program.to(tl.int64)[:, None] * features + feature[None, :]
        fade = tl.exp(tl.load(peaks_ptr + program * COMPONENTS, mask=there, other=LOWEST) - peak)
        totals = tl.load(totals_ptr + program * COMPONENTS, mask=there, other=0) * fade
        pilots = tl.load(pilots_ptr + place, mask=mask, other=0)
        place = program.to(tl.int64)[:, None] * COMPONENTS * features + feature[None, :]
        total += totals
        first += pilots * totals[:, None] + tl.load(firsts_ptr + place, mask=mask, other=0) * fade[:, None]
    total = tl.sum(total, axis=0)
    mean = tl.sum(first, axis=0) / total
    second = tl.full([BLOCK_S, BLOCK_C], 0.0, peaks_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_S):
        program = start + index
        there = program < programs
        mask = there[:, None] & known[None, :]
        place = program.to(tl.int64)[:, None] * features + feature[None, :]
        fade = tl.exp(tl.load(peaks_ptr + program * COMPONENTS, mask=there, other=LOWEST) - peak)[:, None]
        totals = tl.load(totals_ptr + program * COMPONENTS, mask=there, other=0)[:, None]
        moved = tl.where(mask, tl.load(pilots_ptr + place, mask=mask, other=0) - mean[None, :], 0.0)
        place = program.to(tl.int64)[:, None] * COMPONENTS * features + feature[None, :]
        about_pilot = tl.load(seconds_ptr + place, mask=mask, other=0)
        firsts = tl.load(firsts_ptr + place, mask=mask, other=0)
        second += (about_pilot + moved * (2.0 * firsts + moved * totals)) * fade
    var = tl.maximum(tl.sum(second, axis=0) / total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    row = component * features + feature
    shift = tl.load(shift_ptr + feature, mask=known, other=0)
    tl.store(center_ptr + row, mean, mask=known)
    tl.store(mean_ptr + row, mean + shift, mask=known)
    tl.store(var_ptr + row, var, mask=known)
    tl.store(rstd_ptr + row, tl.rsqrt(var + eps), mask=known)
    tl.store(log_total_ptr + component, peak + tl.log(total))


@triton.jit
def _mixture_forward(
    x_ptr, y_ptr, log_tau_ptr, shift_ptr, center_ptr, rstd_ptr, prior_ptr, weight_ptr, bias_ptr, features, samples,
    sample_step, position_step, feature_step, units, ALIGN: tl.constexpr, COMPONENTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    length = units * ALIGN
    vectors = (samples * length).to(tl.int64)
    vector, present, feature, known, places, mask = _tile(
        tl.program_id(0), features, samples, sample_step, position_step, feature_step, length, BLOCK_P, BLOCK_C
    )
    shift = tl.load(shift_ptr + feature, mask=known, other=0)[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0).to(shift.dtype) - shift
    y = tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype)
    for component in tl.static_range(COMPONENTS):
        log_tau = tl.load(log_tau_ptr + component * vectors + vector, mask=present, other=0)
        coefficient = (tl.exp(log_tau) * tl.rsqrt(tl.load(prior_ptr + component)))[:, None]
        center = tl.load(center_ptr + component * features + feature, mask=known, other=0)[None, :]
        rstd = tl.load(rstd_ptr + component * features + feature, mask=known, other=0)[None, :]
        y += (x - center) * rstd * coefficient
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + feature, mask=known, other=0).to(shift.dtype)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + feature, mask=known, other=0).to(shift.dtype)[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mixture_sums(
    grad_ptr, x_ptr, log_tau_ptr, sums_ptr, dots_ptr, shift_ptr, center_ptr, prior_ptr, tiles, features, samples,
    sample_step, position_step, feature_step, units, ALIGN: tl.constexpr, COMPONENTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    length = units * ALIGN
    vectors = (samples * length).to(tl.int64)
    program = tl.program_id(0)
    feature = tl.arange(0, BLOCK_C)
    known = feature < features
    shift = tl.load(shift_ptr + feature, mask=known, other=0)[None, :]
    center, root, sums, dots = (), (), (), ()
    for component in tl.static_range(COMPONENTS):
        center += (tl.load(center_ptr + component * features + feature, mask=known, other=0)[None, :],)
        root += (tl.rsqrt(tl.load(prior_ptr + component)),)
        sums += (tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype),)
        dots += (tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype),)
    for tile in tl.range(program * tiles, program * tiles + tiles, num_stages=STAGES):
        vector, present, _, _, places, mask = _tile(
            tile, features, samples, sample_step, position_step, feature_step, length, BLOCK_P, BLOCK_C
        )
        grad = tl.load(grad_ptr + places, mask=mask, other=0).to(shift.dtype)
        x = tl.load(x_ptr + places, mask=mask, other=0).to(shift.dtype) - shift
        added, added_dots = (), ()
        for component in tl.static_range(COMPONENTS):
            log_tau = tl.load(log_tau_ptr + component * vectors + vector, mask=present, other=0)
            scaled = grad * (tl.exp(log_tau) * root[component])[:, None]
            added += (sums[component] + scaled,)
            added_dots += (dots[component] + scaled * (x - center[component]),)
        sums, dots = added, added_dots
    for component in tl.static_range(COMPONENTS):
        row = (program * COMPONENTS + component).to(tl.int64) * features + feature
        tl.store(sums_ptr + row, tl.sum(sums[component], axis=0), mask=known)
        tl.store(dots_ptr + row, tl.sum(dots[component], axis=0), mask=known)


@triton.jit
def _merge_sums(
    sums_ptr, dots_ptr, rstd_ptr, prior_ptr, weight_ptr, grad_mean_ptr, grad_var_ptr, by_mean_ptr, by_var_ptr,
    grad_weight_ptr, grad_bias_ptr, programs, features, COMPONENTS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = feature < features
    index = tl.arange(0, BLOCK_S)
    dtype = sums_ptr.dtype.element_ty
    grad_weight = tl.full([BLOCK_C], 0.0, dtype)
    grad_bias = tl.full([BLOCK_C], 0.0, dtype)
    for component in range(COMPONENTS):
        row = component * features + feature
        sums = tl.full([BLOCK_S, BLOCK_C], 0.0, dtype)
        dots = tl.full([BLOCK_S, BLOCK_C], 0.0, dtype)
        for start in range(0, programs, BLOCK_S):
            program = start + index
            mask = (program < programs)[:, None] & known[None, :]
            place = program.to(tl.int64)[:, None] * (COMPONENTS * features) + row[None, :]
            sums += tl.load(sums_ptr + place, mask=mask, other=0)
            dots += tl.load(dots_ptr + place, mask=mask, other=0)
        rstd = tl.load(rstd_ptr + row, mask=known, other=0)
        by_mean = -tl.sum(sums, axis=0) * rstd
        dot = tl.sum(dots, axis=0) * rstd
        grad_weight += dot
        # Posteriors sum to one: what each component has of the gradients gives their sum.
        grad_bias += tl.sum(sums, axis=0) * tl.sqrt(tl.load(prior_ptr + component))
        by_var = -0.5 * dot * rstd * rstd
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + feature, mask=known, other=0).to(dtype)
            by_mean *= weight
            by_var *= weight
        if grad_mean_ptr is not None:
            by_mean += tl.load(grad_mean_ptr + row, mask=known, other=0)
        if grad_var_ptr is not None:
            by_var += tl.load(grad_var_ptr + row, mask=known, other=0)
        tl.store(by_mean_ptr + row, by_mean, mask=known)
        tl.store(by_var_ptr + row, by_var, mask=known)
    tl.store(grad_weight_ptr + feature, grad_weight, mask=known)
    tl.store(grad_bias_ptr + feature, grad_bias, mask=known)


@triton.jit
def _mixture_backward(
    grad_ptr, x_ptr, grad_x_ptr, log_tau_ptr, shift_ptr, squared_ptr, linear_ptr, reach_ptr, center_ptr, var_ptr,
    rstd_ptr, prior_ptr, log_total_ptr, by_mean_ptr, by_var_ptr, weight_ptr, features, samples, sample_step,
    position_step, feature_step, units, ALIGN: tl.constexpr, COMPONENTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    length = units * ALIGN
    vectors = (samples * length).to(tl.int64)
    vector, present, feature, known, places, mask = _tile(
        tl.program_id(0), features, samples, sample_step, position_step, feature_step, length, BLOCK_P, BLOCK_C
    )
    shift = tl.load(shift_ptr + feature, mask=known, other=0)[None, :]
    grad = tl.load(grad_ptr + places, mask=mask, other=0).to(shift.dtype)
    x = tl.load(x_ptr + places, mask=mask, other=0).to(shift.dtype) - shift
    if weight_ptr is not None:
        grad *= tl.load(weight_ptr + feature, mask=known, other=0).to(shift.dtype)[None, :]
    grad_x = tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype)
    by_log_tau = ()
    total = tl.full([BLOCK_P], 0.0, shift.dtype)
    for component in tl.static_range(COMPONENTS):
        row = component * features + feature
        log_tau = tl.load(log_tau_ptr + component * vectors + vector, mask=present, other=0)
        coefficient = (tl.exp(log_tau) * tl.rsqrt(tl.load(prior_ptr + component)))[:, None]
        weight = tl.exp(log_tau - tl.load(log_total_ptr + component))[:, None]
        deviation = x - tl.load(center_ptr + row, mask=known, other=0)[None, :]
        by_mean = tl.load(by_mean_ptr + row, mask=known, other=0)[None, :]
        by_var = tl.load(by_var_ptr + row, mask=known, other=0)[None, :]
        var = tl.load(var_ptr + row, mask=known, other=0)[None, :]
        through = grad * tl.load(rstd_ptr + row, mask=known, other=0)[None, :] * coefficient
        slope = by_var * deviation
        grad_x += through + weight * (by_mean + 2.0 * slope)
        terms = deviation * (through + weight * (by_mean + slope)) - weight * (by_var * var)
        by_log_tau += (tl.sum(terms, axis=1),)
        total += by_log_tau[component]
    reach = tl.load(reach_ptr)
    by_bounded = tl.full([BLOCK_P, BLOCK_C], 0.0, shift.dtype)
    for component in tl.static_range(COMPONENTS):
        row = component * features + feature
        log_tau = tl.load(log_tau_ptr + component * vectors + vector, mask=present, other=0)
        by_joint = (by_log_tau[component] - tl.exp(log_tau) * total)[:, None]
        squared = tl.load(squared_ptr + row, mask=known, other=0)[None, :]
        linear = tl.load(linear_ptr + row, mask=known, other=0)[None, :]
        by_bounded += by_joint * (linear + 2.0 * squared * x)
    grad_x += tl.where(tl.abs(x) <= reach, by_bounded, 0.0)
    tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


class _Tiles(NamedTuple):
    """``in_all`` tiles of ``values``, ``tiles`` of them for each of ``programs`` that add up; ``sizes`` as above."""

    programs: int
    tiles: int
    in_all: int
    values: int
    sizes: tuple[int, ...]
    warps: int


@functools.lru_cache(maxsize=256)
def _tiles(samples: int, features: int, length: int, components: int, in_rows: bool) -> _Tiles:
    """Tiles of all features of some vectors, 16 values a thread for up to three components, else 8."""
    block_c = triton.next_power_of_2(features)
    warps = 8 if block_c > 256 else 4
    block_p = max(1, min(256, (16 if components <= 3 else 8) * 32 * warps // block_c))
    in_all = triton.cdiv(samples * length, block_p)
    tiles = max(4, triton.cdiv(in_all, 512))
    steps = (features * length, 1, length) if in_rows else (0, features, 1)
    parts, of = (samples, length) if in_rows else (1, samples * length)
    sizes = features, parts, *steps, *aligned(of), components, block_p, block_c
    return _Tiles(triton.cdiv(in_all, tiles), tiles, in_all, block_p * block_c, sizes, warps)


def handles_mixture_norm(x: Tensor, num_components: int, feature_dim: int) -> bool:
    """Whether ``mixture_norm`` is for such an ``x``: up to 8 components, 2048 features, 2**30 vectors, and not none."""
    features = x.shape[feature_dim]
    small = num_components <= _MOST_COMPONENTS and 0 < features <= _MOST_FEATURES
    return small and 0 < x.numel() // features <= MOST


def mixture_norm(
    x: Tensor,
    densities: Densities,
    prior: Tensor,
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, MixtureKept]:
    """Mixture normalization (Eqs. 5-7) in training: the statistics of each component are those of this batch.

    For what ``handles_mixture_norm`` says it is for.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``, floating point, of any strides.
        densities: of the mixture, with its priors; float32, or float64 where ``x`` is, as all that follows.
        prior: ``(K,)``.
        eps: added to the variances under the root.
        feature_dim: 1 or -1.
        weight: affine scale ``(C,)``, or None.
        bias: affine offset ``(C,)``, or None.

    Returns:
        The output, of the shape and dtype of ``x``, stored like it where features come second or last in memory, else
        contiguous; mean and biased variance of each component ``(K, C)``; what backward needs.

    Raises:
        InputShapeError: a sample has more than 2**30 positions.
    """
    shift, squared, linear, constant, reach, _ = densities
    features, components = squared.shape
    x, in_rows = stored(x, feature_dim)
    samples, _, length = sizes_of(x, feature_dim)
    plan = _tiles(samples, features, length, components, in_rows)
    y = torch.empty_like(x)
    log_tau = shift.new_empty(components, samples * length)
    log_total = shift.new_empty(components)
    center, mean, var, rstd = (shift.new_empty(components, features) for _ in range(4))
    pilots = shift.new_empty(plan.programs, features)
    peaks, totals = (shift.new_empty(plan.programs, components) for _ in range(2))
    firsts, seconds = (shift.new_empty(plan.programs, components, features) for _ in range(2))
    partial = pilots, peaks, totals, firsts, seconds
    lowest = torch.finfo(shift.dtype).min
    shift, prior, constant = (row.contiguous() for row in (shift, prior.to(shift.dtype), constant))
    tables = shift, squared.T.contiguous(), linear.T.contiguous(), constant, reach
    affine = (None if row is None else row.contiguous() for row in (weight, bias))
    ahead, width = stages(plan.values, x.itemsize), min(triton.next_power_of_2(features), 32)
    with on_device_of(x):
        _mixture_statistics[(plan.programs,)](
            x, log_tau, *partial, *tables, plan.tiles, *plan.sizes, lowest, ahead, num_warps=plan.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        _merge_statistics[(components * triton.cdiv(features, width),)](
            *partial, shift, log_total, center, mean, var, rstd, eps, plan.programs, features, components, lowest, 64,
            width, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _mixture_forward[(plan.in_all,)](
            x, y, log_tau, shift, center, rstd, prior, *affine, *plan.sizes, num_warps=plan.warps, enable_fp_fusion=True
        )
    return y, mean, var, MixtureKept(log_tau, log_total, center, rstd)


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
    """The gradients of ``mixture_norm``.

    Args:
        grad: of the output.
        x: the input of forward, as are the others up to ``weight``.
        var: ``(K, C)``, as forward has returned it.
        kept: likewise.
        densities: likewise.
        prior: ``(K,)``.
        feature_dim: 1 or -1.
        weight: ``(C,)``, or None.
        grad_mean: of the mean that forward has returned ``(K, C)``, or None.
        grad_var: of its variance ``(K, C)``, or None.

    Returns:
        The gradient of ``x`` in its dtype, those of ``weight`` and ``bias`` ``(C,)`` in the dtype of the densities.
    """
    shift, squared, linear, _, reach, _ = densities
    features, components = squared.shape
    x, in_rows = stored(x, feature_dim)
    grad = arranged(grad, feature_dim, in_rows)
    samples, _, length = sizes_of(x, feature_dim)
    plan = _tiles(samples, features, length, components, in_rows)
    sums, dots = (shift.new_empty(plan.programs, components, features) for _ in range(2))
    by_mean, by_var = (shift.new_empty(components, features) for _ in range(2))
    grad_weight, grad_bias = (shift.new_empty(features) for _ in range(2))
    grad_x = torch.empty_like(x)
    shift, prior, var = shift.contiguous(), prior.to(shift.dtype).contiguous(), var.contiguous()
    others = (None if row is None else row.contiguous() for row in (weight, grad_mean, grad_var))
    weight, grad_mean, grad_var = others
    ahead, width = stages(plan.values, x.itemsize + grad.itemsize), min(triton.next_power_of_2(features), 16)
    with on_device_of(x):
        _mixture_sums[(plan.programs,)](
            grad, x, kept.log_tau, sums, dots, shift, kept.center, prior, plan.tiles, *plan.sizes, ahead,
            num_warps=plan.warps, enable_fp_fusion=True,
        )  # fmt: skip
        _merge_sums[(triton.cdiv(features, width),)](
            sums, dots, kept.rstd, prior, weight, grad_mean, grad_var, by_mean, by_var, grad_weight, grad_bias,
            plan.programs, features, components, 128, width, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _mixture_backward[(plan.in_all,)](
            grad, x, grad_x, kept.log_tau, shift, squared.T.contiguous(), linear.T.contiguous(), reach, kept.center,
            var, kept.rstd, prior, kept.log_total, by_mean, by_var, weight, *plan.sizes, num_warps=plan.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
