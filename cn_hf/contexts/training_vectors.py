"""The training images as vectors to cluster: decoded once, by each process its own part, and held in a ``RowStore``.

Shape legend: ``M`` vectors of one process, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cn_hf.contexts.image_source import PixelChunk
from cn_hf.contexts.processes import Processes
from cn_hf.contexts.row_store import RowStore
from cn_hf.contexts.shared_rows import SharedRows
from cn_hf.errors import ContextSourceError, DatasetError
from cn_hf.reading.images import size_mismatch

__all__ = ["Seen", "collect", "divide_by_deviation"]


class Seen(NamedTuple):
    """What a process saw of its images: the first one's row, their (C, H, W), what is held of each, and a probe."""

    row: int
    shape: tuple[int, int, int]
    width: int
    dtype: torch.dtype
    probe: Tensor | None


def collect(
    chunks: Iterable[PixelChunk],
    store: RowStore,
    vectors_of: Callable[[Tensor], Tensor],
    probe: Callable[[Sequence[int]], Tensor | None],
    processes: Processes,
    device: torch.device | None,
) -> tuple[SharedRows, Seen]:
    """Walk once over the images, each process over its own, and keep vectors of them. Collective.

    Args:
        chunks: images of this process.
        store: takes their vectors.
        vectors_of: from pixels ``(M, C, H, W)`` to vectors ``(M, F)``.
        probe: of the images' (C, H, W), called once before ``vectors_of``.
        processes: which share the images.
        device: see ``SharedRows``.

    Raises:
        DatasetError: no process has an image, or two differ in size.
    """

    def walk() -> Seen | None:
        seen: Seen | None = None
        for rows, pixels in chunks:
            if not rows:
                continue
            shape: Any = tuple(pixels.shape[1:])
            if seen is not None and shape != seen.shape:
                raise size_mismatch(rows[0], shape[1:], seen.row, seen.shape[1:])
            fingerprint = probe(shape) if seen is None else seen.probe
            vectors = _vectors(vectors_of, pixels, rows)
            seen = seen or Seen(rows[0], shape, vectors.shape[1], vectors.dtype, fingerprint)
            store.append(vectors)
        return seen

    everywhere = _agreed(processes.gather(processes.attempt(walk)))
    rows = processes.attempt(lambda: store.rows(everywhere.width, everywhere.dtype))
    return SharedRows(rows, processes, device), everywhere


def _vectors(vectors_of: Callable[[Tensor], Tensor], pixels: Tensor, rows: Sequence[int]) -> Tensor:
    try:
        return vectors_of(pixels)
    except ContextSourceError as error:
        if rows[0] == 0:
            raise
        raise ContextSourceError(f"Of the images from row {rows[0]} on: {error}") from error


def _agreed(seen: Sequence[Seen | None]) -> Seen:
    having = sorted((each for each in seen if each is not None), key=lambda each: each.row)
    if not having:
        raise DatasetError("The training split has no images to fit contexts on.")
    for other in having:
        if other.shape != having[0].shape:
            raise size_mismatch(other.row, other.shape[1:], having[0].row, having[0].shape[1:])
    return having[0]


def divide_by_deviation(vectors: SharedRows) -> float:
    """Divide vectors, in place, by the root of their features' mean variance, which is returned. Collective."""
    [total] = vectors.sum(lambda chunk: [chunk.sum(dim=0, dtype=torch.float64)], torch.float32)
    mean = (total / vectors.count).float()
    [squares] = vectors.sum(lambda chunk: [(chunk - mean).square().sum(dtype=torch.float64)], torch.float32)
    [variance] = vectors.processes.of_first([squares / vectors.count / vectors.num_features])
    scale = float(variance.sqrt()) or 1.0
    vectors.processes.attempt(lambda: vectors.rows.div_(scale))
    return scale
