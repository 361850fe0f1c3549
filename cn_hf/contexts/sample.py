"""A sample of vectors drawn in one pass and in bounded memory: of a stream the same rows as of a ``Dataset``.

Every row gets a random number by the seed, in the order of the rows, and those with the smallest numbers are kept. A
row that cannot be among them is known before its image is decoded.

Shape legend: ``N`` rows, ``M`` of them sampled, ``F`` features.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sample", "as_float"]

_COPIED_ELEMENTS = 2**24


def as_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors as ``dtype``; uint8 pixels are scaled to [0, 1]."""
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype)


class Sample:
    """Vectors of at most ``size`` rows, each row as likely as any other.

    Args:
        size: the largest number of rows; None for all that ``budget_bytes`` holds.
        seed: of the draw.
        budget_bytes: of the vectors as float32. Where fewer than ``size`` fit, fewer are kept.
    """

    def __init__(self, size: int | None, seed: int, budget_bytes: int) -> None:
        self.size = size
        self.budget_bytes = budget_bytes
        self._asked, self._seen = size, 0
        self._random = np.random.default_rng(seed)
        self._numbers: list[tuple[float, int]] = []  # a heap of (minus a row's number, row), the largest number first
        self._held: set[int] = set()
        self._places: dict[int, int] = {}
        self._free: list[int] = []
        self._vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self._places)

    @property
    def cut(self) -> bool:
        """True if the budget holds fewer rows than there are and were asked for."""
        wanted = self._seen if self._asked is None else min(self._seen, self._asked)
        return self.size is not None and self.size < wanted

    def wants(self, row: int) -> bool:
        """True if the next row, ``row``, is among the sample so far. To be asked once of each row, in order."""
        entry = (-self._random.random(), row)
        self._seen += 1
        if self.size is None or len(self._numbers) < self.size:
            heapq.heappush(self._numbers, entry)
        elif entry < self._numbers[0]:
            return False
        else:
            self._drop(heapq.heapreplace(self._numbers, entry)[1])
        self._held.add(row)
        return True

    def choose(self, count: int) -> list[int]:
        """The sampled rows of ``count``, in order: as if ``wants`` had been asked of each."""
        numbers, self._seen = -self._random.random(count), count
        rows = np.arange(count)
        if self.size is not None and self.size < count:
            rows = np.sort(np.argpartition(numbers, count - self.size)[count - self.size :])
        self._numbers = list(zip(numbers[rows].tolist(), rows.tolist(), strict=True))
        heapq.heapify(self._numbers)
        self._held = set(rows.tolist())
        return [int(row) for row in rows]

    def holds(self, row: int) -> bool:
        """True if a row that was wanted is still among the sample."""
        return row in self._held

    def take(self, rows: Sequence[int], vectors: Tensor) -> None:
        """Keep the vectors ``(m, F)`` of those rows that are among the sample."""
        if self._vectors is None:
            fitting = max(1, self.budget_bytes // (4 * vectors.shape[1]))
            self.size = fitting if self.size is None else min(self.size, fitting)
            while len(self._numbers) > self.size:
                self._drop(heapq.heappop(self._numbers)[1])
            self._vectors = vectors.new_empty(0, vectors.shape[1])
        for row, vector in zip(rows, vectors, strict=True):
            if row in self._held:
                place = self._places[row] = self._free.pop() if self._free else len(self._places)
                self._room(place)[place] = vector

    def vectors(self) -> Tensor:
        """The vectors, float32 ``(M, F)``, in the order of their rows; the sample lets go of them."""
        assert self._vectors is not None  # asked of a sample that has rows
        places = torch.tensor([self._places[row] for row in sorted(self._places)])
        out = torch.empty(len(places), self._vectors.shape[1], device=self._vectors.device)
        step = max(1, _COPIED_ELEMENTS // out.shape[1])
        for start in range(0, len(places), step):
            out[start : start + step] = as_float(
                self._vectors[places[start : start + step].to(out.device)], torch.float32
            )
        self._vectors = None
        return out

    def _drop(self, row: int) -> None:
        self._held.discard(row)
        if row in self._places:
            self._free.append(self._places.pop(row))

    def _room(self, place: int) -> Tensor:
        """The vectors, with room at ``place``: it grows by halves, so that a short stream costs little."""
        assert self._vectors is not None
        if place >= len(self._vectors):
            assert self.size is not None
            grown = self._vectors.new_empty(min(self.size, max(256, place * 3 // 2)), self._vectors.shape[1])
            grown[: len(self._vectors)] = self._vectors
            self._vectors = grown
        return self._vectors
