"""Vectors collected one batch after another: in memory up to a budget, beyond it once in a temporary file.

The file has no name in the file system, so it is gone when it is closed, and also when the process is killed. It is
read a chunk at a time into memory that is freed again; nothing is mapped, so that resident memory stays small.

Shape legend: ``M`` vectors, ``F`` features.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
from collections import deque
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from cn_hf.contexts.chunks import Rows
from cn_hf.errors import ContextSourceError

__all__ = ["FileRows", "RowStore"]

_READ_BYTES = 2**25


class RowStore:
    """Collects vectors of one width; a context manager that frees them at its end.

    Args:
        memory_budget_bytes: vectors beyond so many bytes go to a file in the folder for temporary files (``TMPDIR``).
        expected: how many vectors there will be, where that is known: the budget and the disk are then judged at once.
    """

    def __init__(self, memory_budget_bytes: int, expected: int | None = None) -> None:
        self.budget = memory_budget_bytes
        self.expected = expected
        self.count = 0
        self._parts: deque[Tensor] = deque()
        self._file: FileRows | None = None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the vectors, and remove the file."""
        self._parts.clear()
        if self._file is not None:
            self._file.close()

    def append(self, vectors: Tensor) -> None:
        """Add vectors ``(M, F)``.

        Raises:
            ContextSourceError: the disk has no room for them.
        """
        held = self.count * vectors[:1].nbytes + vectors.nbytes
        if self._file is None and self.count and held > self.budget:
            self._spill(vectors, held)
        elif self._file is None and self.expected and self.expected > len(vectors):
            whole = self.expected * vectors[:1].nbytes
            if whole > self.budget:
                self._spill(vectors, whole)
        self.count += len(vectors)
        if self._file is None:
            self._parts.append(vectors)
        else:
            self._file.append(vectors)

    def _spill(self, like: Tensor, needed: int) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise _no_room(f"{needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")
        self._file = FileRows(like.shape[1], like.dtype)
        while self._parts:
            self._file.append(self._parts.popleft())

    def rows(self, width: int, dtype: torch.dtype) -> Rows:
        """All vectors ``(M, F)``; of ``width`` and ``dtype`` where there are none."""
        if self._file is not None:
            return self._file
        if not self._parts:
            return torch.empty(0, width, dtype=dtype)
        if len(self._parts) > 1:
            whole = self._parts[0].new_empty(self.count, self._parts[0].shape[1])
            start = 0
            while self._parts:  # each is freed once copied: there is never room for all of them twice
                part = self._parts.popleft()
                whole[start : start + len(part)] = part
                start += len(part)
            self._parts.append(whole)
        return self._parts[0]


class FileRows:
    """Vectors in a temporary file, indexed as a tensor ``(M, F)`` would be: by a slice, or by a tensor of places."""

    device = torch.device("cpu")

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._width = width
        self._count = 0
        self._row_bytes = width * dtype.itemsize
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed by close()
        self._lock = threading.Lock()  # a position is sought and read by one thread at a time

    @property
    def shape(self) -> torch.Size:
        """``(M, F)``."""
        return torch.Size((self._count, self._width))

    def __len__(self) -> int:
        return self._count

    def append(self, vectors: Tensor) -> None:
        """Add vectors ``(m, F)`` at the end.

        Raises:
            ContextSourceError: the disk is full.
        """
        self._write(self._count, vectors)
        self._count += len(vectors)

    def div_(self, divisor: float) -> FileRows:
        """Divide all vectors in place."""
        step = max(1, _READ_BYTES // self._row_bytes)
        for start in range(0, self._count, step):
            self._write(start, self[start : start + step].div_(divisor))
        return self

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        if isinstance(key, Tensor):
            vectors = torch.empty(len(key), self._width, dtype=self.dtype)
            ends = [*((key.diff() != 1).nonzero().flatten() + 1).tolist(), len(key)]
            for first, end in zip([0, *ends], ends, strict=False):  # neighbours are read together
                if first < end:
                    self._read(int(key[first]), vectors[first:end])
            return vectors
        start, stop, _ = key.indices(self._count)
        vectors = torch.empty(max(0, stop - start), self._width, dtype=self.dtype)
        self._read(start, vectors)
        return vectors

    def _read(self, row: int, vectors: Tensor) -> None:
        left = _bytes_of(vectors)
        with self._lock:
            self._file.seek(row * self._row_bytes)
            while left:  # one call moves 2 GiB at most
                got = self._file.readinto(left)  # type: ignore[attr-defined]
                if not got:
                    raise ContextSourceError("The temporary file of training images has been cut short by another.")
                left = left[got:]

    def _write(self, row: int, vectors: Tensor) -> None:
        vectors = vectors.cpu().contiguous()
        left = _bytes_of(vectors)
        try:
            with self._lock:
                self._file.seek(row * self._row_bytes)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _no_room(f"it was full after {self._count * self._row_bytes / 2**30:.2f} GiB") from error


def _bytes_of(vectors: Tensor) -> memoryview:
    return memoryview(vectors.view(torch.uint8).flatten().numpy().data)


def _no_room(state: str) -> ContextSourceError:
    return ContextSourceError(
        f"The decoded training images are more than memory_budget_bytes and go to a temporary file, for which "
        f"{tempfile.gettempdir()} has no room: {state}. Set TMPDIR to a folder on a larger disk, or fit on fewer, "
        "fit_samples=..., or on smaller ones, decode_size=..."
    )
