"""Walking over many vectors in chunks that fit a CPU's cache, several chunks side by side.

On a CPU each chunk is worked on by one thread. Left alone, torch would split every small operation over all threads and
make them wait for one another thousands of times a pass, which on a machine with other work costs ten times the time.
On an accelerator the host only queues the work: no chunk waits for the one before.

A chunk never crosses a multiple of ``BLOCK_ROWS``. Processes that share vectors out by such blocks so sum over the very
chunks that one process alone would sum over.

Shape legend: ``M`` vectors, ``F`` features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.devices import torch_threads
from cn_hf.norm.em import full_precision

__all__ = ["BLOCK_ROWS", "Rows", "as_float", "map_chunks", "sum_chunks"]

Result = TypeVar("Result")

BLOCK_ROWS = 256
_CHUNK_ELEMENTS = 2**20  # 4 MiB in float32
_BAR_AFTER = 2.0  # seconds: shorter walks show no bar
_THREADS_LOCK = threading.Lock()  # torch's number of threads belongs to the whole process


class Rows(Protocol):
    """Vectors ``(M, F)``, floating point or uint8, of which parts can be had: a tensor, or one that lies in a file."""

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice | Tensor, /) -> Tensor: ...
    def div_(self, divisor: float, /) -> object: ...  # noqa: D102


def as_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors as ``dtype``; uint8 pixels are scaled to [0, 1]."""
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype)


def map_chunks(
    x: Rows,
    dtype: torch.dtype,
    function: Callable[[Tensor], Tensor],
    out: Tensor,
    *,
    progress: str | None = None,
) -> Tensor:
    """``function`` of each chunk, one after another in ``out``.

    Small results kept one by one between large chunks that are freed would leave memory in pieces too small for the
    next chunk, and take that of many.

    Args:
        x: ``(M, F)``, floating point or uint8.
        dtype: of the chunks.
        function: of a chunk ``(m, F)``; gives ``(m, ...)``.
        out: ``(M, ...)``, filled and returned; chunks are worked on on its device.
        progress: text before a progress bar, which long walks show on a terminal; None shows none.
    """

    def fill(chunks: Iterator[tuple[int, Tensor]]) -> None:
        for start, chunk in chunks:
            out[start : start + len(chunk)] = function(chunk)

    _over_stripes(x, dtype, fill, out.device, progress)
    return out


def sum_chunks(
    x: Rows,
    dtype: torch.dtype,
    function: Callable[[Tensor], Sequence[Tensor]],
    *,
    device: torch.device | None = None,
    progress: str | None = None,
) -> list[Tensor]:
    """Sums over all chunks of what ``function`` makes of each, in float64: float32 would lose digits over many chunks.

    Args:
        x: ``(M, F)``, floating point or uint8; where there are none, ``function`` gets one empty chunk.
        dtype: of the chunks.
        function: of a chunk ``(m, F)``; gives tensors of the same shapes each time.
        device: where chunks are worked on, and the sums are; None: where ``x`` is.
        progress: text before a progress bar, which long walks show on a terminal; None shows none.
    """

    def total(chunks: Iterator[tuple[int, Tensor]]) -> list[Tensor]:
        sums = [part.double() for part in function(next(chunks)[1])]
        for _, chunk in chunks:
            for held, part in zip(sums, function(chunk), strict=True):
                held += part
        return sums

    first, *others = _over_stripes(x, dtype, total, device, progress)
    for other in others:
        for held, part in zip(first, other, strict=True):
            held += part
    return first


def _chunk_rows(features: int) -> int:
    """A power of two, so that blocks hold whole chunks."""
    fitting = max(1, _CHUNK_ELEMENTS // max(1, features))
    return min(BLOCK_ROWS, 1 << (fitting.bit_length() - 1))


def _over_stripes(
    x: Rows,
    dtype: torch.dtype,
    function: Callable[[Iterator[tuple[int, Tensor]]], Result],
    device: torch.device | None,
    progress: str | None,
) -> list[Result]:
    """``function`` of every k-th chunk and its start, for each of k threads; of all where there is no use for more."""
    size, device = _chunk_rows(x.shape[1]), device or x.device
    starts = range(0, max(1, len(x)), size)
    count = 1 if device.type != "cpu" else max(1, min(torch.get_num_threads(), len(starts)))
    hidden = None if progress else True
    with tqdm(total=len(x), desc=progress, unit="image", disable=hidden, leave=False, delay=_BAR_AFTER) as bar:

        def chunks(first: int) -> Iterator[tuple[int, Tensor]]:
            for start in starts[first::count]:
                chunk = x[start : start + size]
                yield start, as_float(chunk.to(device, non_blocking=True), dtype)
                bar.update(len(chunk))

        def stripe(first: int) -> Result:
            with full_precision(device):
                return function(chunks(first))

        if count == 1:
            return [stripe(0)]
        with _THREADS_LOCK, torch_threads(1), ThreadPoolExecutor(count) as pool:
            return list(pool.map(stripe, range(count)))
