"""Triton kernels of context normalization (Eq. 8) on CUDA, alone and after a per-token standardization.

Each tensor crosses memory once: forward reads ``x`` and writes ``y``; backward reads ``x`` and ``grad``, writes
``grad_x``, and reduces in the same pass. No atomics: what programs share, they write as partial sums that are added in
a fixed order, and how the work is cut depends on shapes alone, so results are the same in every run.

Two views cover all layouts. *Rows*, for maps stored as NCHW: ``N * C`` rows of ``L`` positions with one coefficient a
row; a program holds one tile of them. *Columns*, for tokens and channels_last maps: ``N`` matrices of ``L`` positions
by ``C`` features; a program walks along a segment of positions with its coefficients in registers.

Importing this module needs triton. Tensors are on CUDA, or anywhere with ``TRITON_INTERPRET=1`` set before the import.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions (pixels or tokens) of a sample; coefficients ``(N, C)`` or
``(1, C)`` are float32, and float64 where ``x`` is.
"""
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cn_hf.norm.fused import formulas
from cn_hf.norm.fused.cache import Remembered, private_folder
from cn_hf.norm.fused.layout import arranged, stored
from cn_hf.norm.fused.triton_launch import aligned, on_device_of, sizes_of, stages

__all__ = [
    "DTYPES",
    "agreed",
    "norm_shift_scale",
    "norm_shift_scale_backward",
    "shift_scale",
    "shift_scale_backward",
    "versions",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of ``x`` there are kernels for; coefficients are float32, or float64 where ``x`` is."""


def versions() -> str:
    """Return what the kernels are compiled by and run on, in one line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, triton {triton.__version__}, {gpu}"


def agreed(device: torch.device) -> Remembered:
    """Return the names of the kernels that agreed with the formulas on such a device, in any process of this user."""
    sources = [Path(__file__).read_text(encoding="utf-8"), Path(formulas.__file__).read_text(encoding="utf-8")]
    where = ["" if device.type != "cuda" else repr(torch.cuda.get_device_properties(device))]
    mark = "\0".join([*sources, *where, versions(), str(torch.version.cuda)])
    try:
        return Remembered(private_folder() / f"{hashlib.sha256(mark.encode()).hexdigest()[:20]}.agreed")
    except (OSError, RuntimeError):
        return Remembered(None)


@triton.jit
def _row_tile(rows, length, features, segments, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    program = tl.program_id(0)
    segment = program % segments
    first = (program // segments).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    position = segment * BLOCK_L + tl.arange(0, BLOCK_L)
    known = first + row < rows
    mask = known[:, None] & (position < length)[None, :]
    offsets = row[:, None] * length + position[None, :]
    feature = (first % features).to(tl.int32) + row  # counts on through the samples that follow
    sample = first // features + feature // features
    return segment, first, row, known, first * length, offsets, mask, sample, feature % features


@triton.jit
def _rows_forward(
    x_ptr, y_ptr, center_ptr, scale_ptr, offset_ptr, center_stride, scale_stride, offset_stride, rows, features,
    segments, units, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    _, _, _, known, start, offsets, mask, sample, feature = _row_tile(
        rows, units * ALIGN, features, segments, BLOCK_R, BLOCK_L
    )
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0)
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)
    scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)
    y = (x.to(center.dtype) - center[:, None]) * scale[:, None]
    if offset_ptr is not None:
        y += tl.load(offset_ptr + sample * offset_stride + feature, mask=known, other=0)[:, None]
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_backward(
    grad_ptr, x_ptr, grad_x_ptr, sums_ptr, dots_ptr, center_ptr, scale_ptr, center_stride, scale_stride, rows,
    features, segments, units, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    segment, first, row, known, start, offsets, mask, sample, feature = _row_tile(
        rows, units * ALIGN, features, segments, BLOCK_R, BLOCK_L
    )
    grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0)
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)
    grad = grad.to(center.dtype)
    if grad_x_ptr is not None:
        scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)
        tl.store(grad_x_ptr + start + offsets, (grad * scale[:, None]).to(grad_x_ptr.dtype.element_ty), mask=mask)
    products = tl.where(mask, grad * (x.to(center.dtype) - center[:, None]), 0.0)
    partial = (first + row) * segments + segment
    tl.store(sums_ptr + partial, tl.sum(grad, axis=1), mask=known)
    tl.store(dots_ptr + partial, tl.sum(products, axis=1), mask=known)


@triton.jit
def _columns_forward(
    x_ptr, y_ptr, center_ptr, scale_ptr, offset_ptr, center_stride, scale_stride, offset_stride, length, blocks,
    segments, tiles, units, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    features = units * ALIGN
    program = tl.program_id(0)
    segment = program // blocks % segments
    sample = (program // blocks // segments).to(tl.int64)
    row = tl.arange(0, BLOCK_L)
    feature = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = feature < features
    offsets = row[:, None] * features + feature[None, :]
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)[None, :]
    scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + sample * offset_stride + feature, mask=known, other=0)[None, :]
    for tile in tl.range(tiles, num_stages=STAGES):
        first = (segment * tiles + tile) * BLOCK_L
        start = (sample * length + first) * features
        mask = (first + row < length)[:, None] & known[None, :]
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0)
        y = (x.to(center.dtype) - center) * scale
        if offset_ptr is not None:
            y += offset
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns_backward(
    grad_ptr, x_ptr, grad_x_ptr, sums_ptr, dots_ptr, center_ptr, scale_ptr, center_stride, scale_stride, length,
    blocks, segments, tiles, units, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    features = units * ALIGN
    program = tl.program_id(0)
    segment = program // blocks % segments
    sample = (program // blocks // segments).to(tl.int64)
    row = tl.arange(0, BLOCK_L)
    feature = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = feature < features
    offsets = row[:, None] * features + feature[None, :]
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)[None, :]
    scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)[None, :]
    sums = tl.full([BLOCK_L, BLOCK_C], 0.0, center.dtype)
    dots = tl.full([BLOCK_L, BLOCK_C], 0.0, center.dtype)
    for tile in tl.range(tiles, num_stages=STAGES):
        first = (segment * tiles + tile) * BLOCK_L
        start = (sample * length + first) * features
        mask = (first + row < length)[:, None] & known[None, :]
        grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0).to(center.dtype)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(center.dtype)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + start + offsets, (grad * scale).to(grad_x_ptr.dtype.element_ty), mask=mask)
        sums += grad
        dots += tl.where(mask, grad * (x - center), 0.0)
    partial = (sample * segments + segment) * features
    tl.store(sums_ptr + partial + feature, tl.sum(sums, axis=0), mask=known)
    tl.store(dots_ptr + partial + feature, tl.sum(dots, axis=0), mask=known)


@triton.jit
def _norm_forward(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, center_ptr, scale_ptr, offset_ptr, center_stride, scale_stride, offset_stride,
    eps, length, segments, tiles, units, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    features = units * ALIGN
    segment = tl.program_id(0) % segments
    sample = (tl.program_id(0) // segments).to(tl.int64)
    row = tl.arange(0, BLOCK_L)
    feature = tl.arange(0, BLOCK_C)
    known = feature < features
    offsets = row[:, None] * features + feature[None, :]
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)[None, :]
    scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + sample * offset_stride + feature, mask=known, other=0)[None, :]
    for tile in tl.range(tiles, num_stages=STAGES):
        first = (segment * tiles + tile) * BLOCK_L
        token = sample * length + first
        present = first + row < length
        mask = present[:, None] & known[None, :]
        xhat = tl.load(x_ptr + token * features + offsets, mask=mask, other=0).to(center.dtype)
        if mean_ptr is not None:
            # The mean in two steps: what rounding left of a large first one would be an error of every feature.
            rough = tl.sum(xhat, axis=1) / features
            xhat = tl.where(mask, xhat - rough[:, None], 0.0)
            rest = tl.sum(xhat, axis=1) / features
            xhat = tl.where(mask, xhat - rest[:, None], 0.0)
            tl.store(mean_ptr + token + row, rough + rest, mask=present)
        rstd = tl.rsqrt(tl.sum(xhat * xhat, axis=1) / features + eps)
        tl.store(rstd_ptr + token + row, rstd, mask=present)
        y = (xhat * rstd[:, None] - center) * scale
        if offset_ptr is not None:
            y += offset
        tl.store(y_ptr + token * features + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    grad_ptr, x_ptr, grad_x_ptr, sums_ptr, dots_ptr, mean_ptr, rstd_ptr, center_ptr, scale_ptr, center_stride,
    scale_stride, length, segments, tiles, units, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    features = units * ALIGN
    segment = tl.program_id(0) % segments
    sample = (tl.program_id(0) // segments).to(tl.int64)
    row = tl.arange(0, BLOCK_L)
    feature = tl.arange(0, BLOCK_C)
    known = feature < features
    offsets = row[:, None] * features + feature[None, :]
    center = tl.load(center_ptr + sample * center_stride + feature, mask=known, other=0)
    scale = tl.load(scale_ptr + sample * scale_stride + feature, mask=known, other=0)
    sums = tl.full([BLOCK_C], 0.0, center.dtype)
    dots = tl.full([BLOCK_C], 0.0, center.dtype)
    for tile in tl.range(tiles, num_stages=STAGES):
        first = (segment * tiles + tile) * BLOCK_L
        token = sample * length + first
        present = first + row < length
        mask = present[:, None] & known[None, :]
        grad = tl.load(grad_ptr + token * features + offsets, mask=mask, other=0).to(center.dtype)
        xhat = tl.load(x_ptr + token * features + offsets, mask=mask, other=0).to(center.dtype)
        rstd = tl.load(rstd_ptr + token + row, mask=present, other=0)[:, None]
        if mean_ptr is not None:
            xhat -= tl.load(mean_ptr + token + row, mask=present, other=0)[:, None]
        xhat = tl.where(mask, xhat * rstd, 0.0)
        sums += tl.sum(grad, axis=0)
        dots += tl.sum(tl.where(mask, grad * (xhat - center[None, :]), 0.0), axis=0)
        if grad_x_ptr is not None:
            scaled = grad * scale[None, :]
            change = scaled - xhat * (tl.sum(scaled * xhat, axis=1) / features)[:, None]
            if mean_ptr is not None:
                change -= (tl.sum(scaled, axis=1) / features)[:, None]
            grad_x = (change * rstd).to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + token * features + offsets, grad_x, mask=mask)
    partial = (sample * segments + segment) * features
    tl.store(sums_ptr + partial + feature, sums, mask=known)
    tl.store(dots_ptr + partial + feature, dots, mask=known)


class _Launch(NamedTuple):
    """A cut of the work: ``sizes`` are a kernel's last arguments, from the sizes of ``x`` to those of a tile."""

    grid: tuple[int]
    segments: int
    sizes: tuple[int, ...]
    warps: int


@functools.lru_cache(maxsize=256)
def _row_launch(samples: int, features: int, length: int) -> _Launch:
    """Tiles of 1024 to 4096 values, the largest that give 1024 programs; long rows are whole where rows are many."""
    rows = samples * features
    values = min(4096, max(1024, triton.next_power_of_2(rows * length // 1024 + 1) // 2))
    block_l = min(triton.next_power_of_2(length), 4096 if rows >= 256 else values)
    block_r = max(1, values // block_l)
    segments = triton.cdiv(length, block_l)
    sizes = rows, features, segments, *aligned(length), block_r, block_l
    return _Launch((triton.cdiv(rows, block_r) * segments,), segments, sizes, 4)


def _segments(programs: int, length: int, block_l: int, block_c: int, wanted: int) -> tuple[int, int]:
    """Segments of a sample and tiles of a segment.

    ``wanted`` programs in all, as far as each has 8192 values to share its coefficients among; and 64 tiles at most,
    which bounds the terms of a running sum.
    """
    tiles = triton.cdiv(length, block_l)
    segments = max(min(wanted // programs, length * block_c // 8192), triton.cdiv(tiles, 64), 1)
    tiles_each = triton.cdiv(tiles, segments)
    return triton.cdiv(tiles, tiles_each), tiles_each


@functools.lru_cache(maxsize=256)
def _column_launch(
    samples: int, features: int, length: int, *, wanted: int, values: int, warps: int, bytes_each: int
) -> _Launch:
    """Tiles of ``values`` values, of the widest of 256, 128 and 64 features that leaves the fewest lanes idle."""
    block_c = triton.next_power_of_2(features)
    if features > 64:
        block_c = min((256, 128, 64), key=lambda width: triton.cdiv(features, width) * width)
    block_l = min(values // block_c, triton.next_power_of_2(length))
    blocks = triton.cdiv(features, block_c)
    segments, tiles = _segments(samples * blocks, length, block_l, block_c, wanted)
    tile = block_l, block_c, stages(block_l * block_c, bytes_each)
    sizes = length, blocks, segments, tiles, *aligned(features), *tile
    return _Launch((samples * blocks * segments,), segments, sizes, warps)


@functools.lru_cache(maxsize=256)
def _norm_launch(samples: int, features: int, length: int, *, wanted: int, values: int, bytes_each: int) -> _Launch:
    """Tiles of whole tokens, 8 features of a token a thread, as many tokens as make ``values`` a thread."""
    block_c = triton.next_power_of_2(features)
    warps = min(16, max(1, block_c // 256))
    block_l = min(max(1, values * 32 * warps // block_c), triton.next_power_of_2(length))
    segments, tiles = _segments(samples, length, block_l, block_c, wanted)
    tile = block_l, block_c, stages(block_l * block_c, bytes_each)
    sizes = length, segments, tiles, *aligned(features), *tile
    return _Launch((samples * segments,), segments, sizes, warps)


def _coefficients(*tables: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """The tables with their features side by side in memory, then the step of each from a sample's row to the next."""
    dense = [t if t is None or t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous() for t in tables]
    return *dense, *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in dense)


def _add_segments(partial: Tensor, dim: int) -> Tensor:
    return partial.squeeze(dim) if partial.shape[dim] == 1 else partial.sum(dim)


def shift_scale(x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, feature_dim: int) -> Tensor:
    """``(x - center) * scale + offset`` with one row of coefficients a sample.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``, floating point, of any strides.
        center: ``(N, C)`` or ``(1, C)``, float32, or float64 where ``x`` is; rows may be expanded.
        scale: like ``center``.
        offset: like ``center``, or None.
        feature_dim: the axis of ``x`` that holds the features: 1 or -1.

    Returns:
        Tensor of the shape and dtype of ``x``, stored like it where features come second or last in memory, else
        contiguous.

    Raises:
        InputShapeError: a sample has more than 2**30 positions.
    """
    x, in_rows = stored(x, feature_dim)
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    sizes = sizes_of(x, feature_dim)
    if in_rows:
        launch = _row_launch(*sizes)
    else:
        launch = _column_launch(*sizes, wanted=4096, values=4096, warps=4, bytes_each=x.itemsize)
    kernel = _rows_forward if in_rows else _columns_forward
    with on_device_of(x):
        kernel[launch.grid](
            x, y, *_coefficients(center, scale, offset), *launch.sizes, num_warps=launch.warps, enable_fp_fusion=True
        )
    return y


def shift_scale_backward(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, feature_dim: int, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the parts of the gradients of ``shift_scale``, in one pass over ``grad`` and ``x``.

    Args:
        grad: gradient of the output, of the shape of ``x``.
        x: the input.
        center: ``(N, C)`` or ``(1, C)``, as in forward.
        scale: like ``center``.
        feature_dim: 1 or -1.
        need_x: whether to write the gradient of ``x``.

    Returns:
        ``grad * scale`` in the dtype of ``x``, or None; then, each ``(N, C)`` in the dtype of ``center``, the sums over
        a sample's positions of ``grad`` and of ``grad * (x - center)``.

    Raises:
        InputShapeError: a sample has more than 2**30 positions.
    """
    x, in_rows = stored(x, feature_dim)
    grad = arranged(grad, feature_dim, in_rows)
    grad_x = torch.empty_like(x) if need_x else None
    if x.numel() == 0:
        sums = center.new_zeros(x.shape[0], x.shape[feature_dim])
        return grad_x, sums, torch.zeros_like(sums)
    samples, features, length = sizes_of(x, feature_dim)
    if in_rows:
        launch = _row_launch(samples, features, length)
    else:
        both = x.itemsize + grad.itemsize
        launch = _column_launch(samples, features, length, wanted=2048, values=2048, warps=8, bytes_each=both)
    kernel = _rows_backward if in_rows else _columns_backward
    parts = (samples, features, launch.segments) if in_rows else (samples, launch.segments, features)
    sums, dots = center.new_empty(parts), center.new_empty(parts)
    tensors = grad, x, grad_x, sums, dots, *_coefficients(center, scale)
    with on_device_of(x):
        kernel[launch.grid](*tensors, *launch.sizes, num_warps=launch.warps, enable_fp_fusion=True)
    dim = 2 if in_rows else 1
    return grad_x, _add_segments(sums, dim), _add_segments(dots, dim)


def norm_shift_scale(
    x: Tensor, center: Tensor, scale: Tensor, offset: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(xhat - center) * scale + offset`` where ``xhat`` is each token of ``x`` standardized over its features.

    Tokens of up to 8192 features are held in registers. Wider ones spill to local memory: slower, with the same result.

    Args:
        x: ``(N, ..., C)``, floating point, of any strides.
        center: ``(N, C)`` or ``(1, C)``, float32, or float64 where ``x`` is; rows may be expanded.
        scale: like ``center``.
        offset: like ``center``, or None.
        eps: added to the biased variance, or to the mean square, under the root.
        centered: subtract the mean (LayerNorm), or divide by the root mean square alone (RMSNorm).

    Returns:
        The output, of the shape and dtype of ``x``, contiguous; the mean of each token, ``x.shape[:-1]`` in the dtype
        of ``center``, or an empty tensor unless ``centered``; and one over its standard deviation, likewise.

    Raises:
        InputShapeError: a sample has more than 2**30 tokens.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = center.new_empty(x.shape[:-1])
    mean = torch.empty_like(rstd) if centered else center.new_empty(0)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    launch = _norm_launch(*sizes_of(x, -1), wanted=4096, values=32, bytes_each=x.itemsize)
    tensors = x, y, mean if centered else None, rstd, *_coefficients(center, scale, offset)
    with on_device_of(x):
        _norm_forward[launch.grid](*tensors, eps, *launch.sizes, num_warps=launch.warps, enable_fp_fusion=True)
    return y, mean, rstd


def norm_shift_scale_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    center: Tensor,
    scale: Tensor,
    need_x: bool,
    centered: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the parts of the gradients of ``norm_shift_scale``, in one pass over ``grad`` and ``x``.

    Args:
        grad: gradient of the output, ``(N, ..., C)``.
        x: the input.
        mean: of each token, as forward returned it; not read unless ``centered``.
        rstd: of each token, as forward returned it.
        center: ``(N, C)`` or ``(1, C)``, as in forward.
        scale: like ``center``.
        need_x: whether to write the gradient of ``x``.
        centered: as in forward.

    Returns:
        The gradient of ``x`` in its dtype, or None; then, each ``(N, C)`` in the dtype of ``center``, the sums over a
        sample's tokens of ``grad`` and of ``grad * (xhat - center)``.

    Raises:
        InputShapeError: a sample has more than 2**30 tokens.
    """
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x) if need_x else None
    if x.numel() == 0:
        sums = center.new_zeros(x.shape[0], x.shape[-1])
        return grad_x, sums, torch.zeros_like(sums)
    samples, features, length = sizes_of(x, -1)
    both = x.itemsize + grad.itemsize
    launch = _norm_launch(samples, features, length, wanted=2048, values=16, bytes_each=both)
    parts = samples, launch.segments, features
    sums, dots = center.new_empty(parts), center.new_empty(parts)
    statistics = mean.contiguous() if centered else None, rstd.contiguous()
    tensors = grad, x, grad_x, sums, dots, *statistics, *_coefficients(center, scale)
    with on_device_of(x):
        _norm_backward[launch.grid](*tensors, *launch.sizes, num_warps=launch.warps, enable_fp_fusion=True)
    return grad_x, _add_segments(sums, 1), _add_segments(dots, 1)
