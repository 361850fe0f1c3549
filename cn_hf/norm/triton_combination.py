"""A Triton kernel of CN+ (Eq. 9) in evaluation on CUDA: all contexts combined by their posteriors.

A thread holds the logarithms, then the posteriors, of a few vectors in registers, and walks along their features, then
back: a vector's posteriors need all of its features before its first result. On the way back it finds ``x`` in the
cache as far as the vectors of all running programs fit there. What is multiplied with a posterior comes two numbers a
load, packed in 64 bits, so that multiply-adds and not loads bound the time.

All is arithmetic in float32, never rounded to tf32, without atomics; how the work is cut depends on shapes alone.

Importing this module needs triton. Tensors are on CUDA, or anywhere with ``TRITON_INTERPRET=1`` set before the import.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions of a sample, ``K`` contexts, ``M = N * L`` vectors.
"""
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, assignment, misc"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cn_hf.norm.combination import Combination
from cn_hf.norm.em import Densities
from cn_hf.norm.layout import stored
from cn_hf.norm.triton_launch import MOST, aligned, on_device_of, sizes_of

__all__ = ["combine"]

_MOST_CONTEXTS = 64  # whose posteriors fit a thread's registers, and whose code compiles in seconds

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _pack(low, high):
    return (low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (
        high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    )


@triton.jit
def _unpack(pair):
    low, high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _pack_tables(
    squared_ptr, linear_ptr, scales_ptr, offsets_ptr, densities_ptr, terms_ptr, features, COMPONENTS: tl.constexpr,
    BLOCK_K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    step = tl.program_id(0)
    component = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, LANES)
    feature = step * LANES + lane
    present = (component < COMPONENTS)[:, None]
    mask = present & (feature < features)[None, :]
    source = component[:, None] * features + feature[None, :]
    target = (step * COMPONENTS + component)[:, None] * LANES + lane[None, :]
    squared = tl.load(squared_ptr + source, mask=mask, other=0.0)
    linear = tl.load(linear_ptr + source, mask=mask, other=0.0)
    tl.store(densities_ptr + target, _pack(squared, linear), mask=present)
    scales = tl.load(scales_ptr + source, mask=mask, other=0.0)
    offsets = tl.load(offsets_ptr + source, mask=mask, other=0.0)
    tl.store(terms_ptr + target, _pack(scales, offsets), mask=present)


# The compiler is not to know that features may be side by side: it would give a thread several of one vector's, and
# with them as many more sums, where several vectors' share what is loaded.
@triton.jit(do_not_specialize=["feature_step"])
def _combine(
    x_ptr, y_ptr, densities_ptr, terms_ptr, constant_ptr, reach_ptr, shift_ptr, center_ptr, shared_ptr, weight_ptr,
    bias_ptr, factor, feature_step, features, samples, sample_step, position_step, units, ALIGN: tl.constexpr,
    COMPONENTS: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    length = units * ALIGN
    vector = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, LANES)
    present = (vector < samples * length)[:, None]
    start = (vector // length).to(tl.int64) * sample_step + (vector % length).to(tl.int64) * position_step
    start = start[:, None] + (lane * feature_step)[None, :]
    stride = feature_step.to(tl.int64)
    reach = tl.load(reach_ptr)
    zero = tl.full([BLOCK_M, LANES], 0.0, tl.float32)

    sums = ()
    for _ in tl.static_range(COMPONENTS):
        sums += (zero,)
    ahead = tl.load(x_ptr + start, mask=present & (lane < features)[None, :], other=0)
    for first in range(0, features, LANES):
        feature = first + lane
        x = ahead.to(tl.float32)
        more = present & (feature + LANES < features)[None, :]
        ahead = tl.load(x_ptr + start + (first + LANES) * stride, mask=more, other=0)
        x -= tl.load(shift_ptr + feature, mask=feature < features, other=0)[None, :]
        x = tl.clamp(x, -reach, reach, propagate_nan=tl.PropagateNan.ALL)
        square = x * x
        added = ()
        for component in tl.static_range(COMPONENTS):
            squared, linear = _unpack(tl.load(densities_ptr + (first * COMPONENTS + component * LANES) + lane))
            added += (sums[component] + square * squared[None, :] + x * linear[None, :],)
        sums = added

    logs = ()
    for component in tl.static_range(COMPONENTS):
        logs += (tl.sum(sums[component], axis=1) + tl.load(constant_ptr + component),)
    peak = logs[0]
    for component in tl.static_range(1, COMPONENTS):
        peak = tl.maximum(peak, logs[component])
    weights = ()
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    for component in tl.static_range(COMPONENTS):
        weights += (tl.exp(logs[component] - peak),)
        total += weights[component]
    share = factor / total
    coefficients = ()
    whole = tl.full([BLOCK_M], 0.0, tl.float32)
    for component in tl.static_range(COMPONENTS):
        coefficients += ((weights[component] * share)[:, None],)
        whole += weights[component] * share

    last = (features - 1) // LANES * LANES
    for walked in range(0, features, LANES):
        first = last - walked  # backwards: what was read last is still in the cache
        feature = first + lane
        known = feature < features
        mask = present & known[None, :]
        x = tl.load(x_ptr + start + first * stride, mask=mask, other=0).to(tl.float32)
        scale = whole[:, None] * tl.load(shared_ptr + feature, mask=known, other=0)[None, :]
        offset = zero
        for component in tl.static_range(COMPONENTS):
            scales, offsets = _unpack(tl.load(terms_ptr + (first * COMPONENTS + component * LANES) + lane))
            scale += coefficients[component] * scales[None, :]
            offset += coefficients[component] * offsets[None, :]
        x -= tl.load(shift_ptr + feature, mask=known, other=0)[None, :]
        y = (x - tl.load(center_ptr + feature, mask=known, other=0)[None, :]) * scale + offset
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + feature, mask=known, other=0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + feature, mask=known, other=0).to(tl.float32)[None, :]
        tl.store(y_ptr + start + first * stride, y.to(y_ptr.dtype.element_ty), mask=mask)


class _Launch(NamedTuple):
    """How the work is cut: ``sizes`` are a kernel's last arguments."""

    grid: tuple[int]
    sizes: tuple[int, ...]
    registers: int | None


@functools.lru_cache(maxsize=256)
def _combine_launch(samples: int, features: int, length: int, components: int, lanes: int) -> _Launch:
    """One thread for each of ``lanes`` of a vector's features, four to one vectors each: few enough sums to hold."""
    vectors = samples * length
    each = 4 if components <= 24 else 2 if components <= 48 else 1
    while each > 1 and triton.cdiv(vectors * lanes, each * 128) < 256:
        each //= 2
    block = each * 128 // lanes
    steps = (features * length, 1) if lanes == 1 else (0, features)
    parts, of = (samples, length) if lanes == 1 else (1, vectors)
    sizes = length if lanes == 1 else 1, features, parts, *steps, *aligned(of), components, block, lanes
    # Where the compiler would take more than three programs on a processor have, for no gain.
    registers = None if lanes == 1 else 168
    return _Launch((triton.cdiv(vectors, block),), sizes, registers)


def combine(
    x: Tensor,
    densities: Densities,
    combination: Combination,
    factor: float,
    weight: Tensor | None,
    bias: Tensor | None,
    feature_dim: int,
) -> Tensor | None:
    """CN+ (Eq. 9) with given statistics: all contexts combined by their posteriors, in one kernel.

    Memory beyond the result is two tables of the size of the statistics.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``, float32, bfloat16 or float16, of any strides.
        densities: of the contexts, float32, as all that follows.
        combination: of their statistics about the shift of the densities.
        factor: every posterior is multiplied by it.
        weight: affine scale ``(C,)``, or None.
        bias: affine offset ``(C,)``, or None.
        feature_dim: 1 or -1.

    Returns:
        Tensor of the shape and dtype of ``x``, stored like it where features come second or last in memory, else
        contiguous. None, with nothing done, for more than 64 contexts or 2**30 vectors, or for other dtypes.

    Raises:
        InputShapeError: a sample has more than 2**30 positions.
    """
    shift, squared, linear, constant, reach, _ = densities
    center, shared, scales, offsets = combination
    features, components = squared.shape
    if components > _MOST_CONTEXTS or x.dtype not in _DTYPES or squared.dtype != torch.float32:
        return None
    x, in_rows = stored(x, feature_dim)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    samples, features, length = sizes_of(x, feature_dim)
    if samples * length > MOST:
        return None
    lanes = 1 if in_rows and length > 1 else 32 // x.itemsize
    launch = _combine_launch(samples, features, length, components, lanes)
    steps = triton.cdiv(features, lanes)
    densities, terms = torch.empty(2, steps * components * lanes, dtype=torch.int64, device=x.device)
    tables = squared.T.contiguous(), linear.T.contiguous(), scales.contiguous(), offsets.contiguous()
    rows = (row if row is None else row.contiguous() for row in (shift, center, shared, weight, bias))
    with on_device_of(x):
        block = triton.next_power_of_2(components)
        _pack_tables[(steps,)](*tables, densities, terms, features, components, block, lanes, num_warps=1)
        tensors = x, y, densities, terms, constant.contiguous(), reach, *rows
        options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
        if launch.registers is not None and torch.version.hip is None:
            options["maxnreg"] = launch.registers
        _combine[launch.grid](*tensors, factor, *launch.sizes, **options)
    return y
