"""Walking over many vectors in chunks that fit a CPU's cache, several chunks side by side.

On a CPU each chunk is worked on by one thread. Left alone, torch would split every small operation over all threads and
make them wait for one another thousands of times a pass, which on a machine with other work costs ten times the time.

Shape legend: ``M`` vectors, ``F`` features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["as_float", "map_chunks", "sum_chunks"]

Result = TypeVar("Result")

_CHUNK_ELEMENTS = 2**20  # 4 MiB in float32
_THREADS_LOCK = threading.Lock()  # torch's number of threads belongs to the whole process


def as_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors as ``dtype``; uint8 pixels are scaled to [0, 1]."""
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype)


def map_chunks(x: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``function`` of each chunk, in order.

    Args:
        x: ``(M, F)``, floating point or uint8.
        dtype: of the chunks.
        function: of a chunk ``(m, F)``.
    """
    stripes = _over_stripes(x, lambda chunks: [function(as_float(chunk, dtype)) for chunk in chunks])
    places = range(sum(map(len, stripes)))
    return [stripes[place % len(stripes)][place // len(stripes)] for place in places]


def sum_chunks(x: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """Sums over all chunks of what ``function`` makes of each, in float64: float32 would lose digits over many chunks.

    Args:
        x: ``(M, F)``, floating point or uint8, not empty.
        dtype: of the chunks.
        function: of a chunk ``(m, F)``; gives tensors of the same shapes each time.
    """

    def total(chunks: Iterator[Tensor]) -> list[Tensor]:
        sums = [part.double() for part in function(as_float(next(chunks), dtype))]
        for chunk in chunks:
            for held, part in zip(sums, function(as_float(chunk, dtype)), strict=True):
                held += part
        return sums

    first, *others = _over_stripes(x, total)
    for other in others:
        for held, part in zip(first, other, strict=True):
            held += part
    return first


def _over_stripes(x: Tensor, function: Callable[[Iterator[Tensor]], Result]) -> list[Result]:
    """``function`` of every k-th chunk, for each of k threads; in this thread alone where there is no use for more."""
    size = max(1, _CHUNK_ELEMENTS // max(1, x.shape[1]))
    starts = range(0, len(x), size)
    threads = torch.get_num_threads()
    count = 1 if x.device.type != "cpu" else max(1, min(threads, len(starts)))

    def stripe(first: int) -> Result:
        return function(x[start : start + size] for start in starts[first::count])

    if count == 1:
        return [stripe(0)]
    with _THREADS_LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(stripe, range(count)))
        finally:
            torch.set_num_threads(threads)
