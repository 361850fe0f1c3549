"""All vectors that a clustering is of, whichever process and memory or file they lie in, and sums over them.

Shape legend: ``N`` vectors of all processes, ``M`` of this one, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.contexts.chunks import Rows, sum_chunks
from cn_hf.contexts.processes import ALONE, Processes

__all__ = ["SharedRows"]

_RUN_ROWS = 16  # neighbours that mini-batches keep together: a file is then read in larger pieces
_BATCH_RUNS = 512  # 8192 vectors
_BATCH_ELEMENTS = 2**26

ChunkSums = Callable[[Tensor], Sequence[Tensor]]
"""From a chunk ``(m, F)`` to tensors of the same shapes each time."""


class SharedRows:
    """Vectors and where to work on them; its methods are collectives, see ``Processes``.

    Args:
        rows: ``(M, F)``, those of this process.
        processes: which share the vectors.
        device: where chunks are worked on; None: where the rows are.
    """

    def __init__(self, rows: Rows, processes: Processes = ALONE, device: torch.device | None = None) -> None:
        self.rows = rows
        self.processes = processes
        self.device = device or rows.device
        [count] = processes.sum([torch.tensor(len(rows), dtype=torch.float64)])
        self.count = int(count)

    @classmethod
    def of(cls, x: Rows | SharedRows) -> SharedRows:
        """``x`` itself, or vectors of this process alone."""
        return x if isinstance(x, SharedRows) else cls(x)

    @property
    def num_features(self) -> int:
        """How many features a vector has (``F``)."""
        return self.rows.shape[1]

    def sum(self, function: ChunkSums, dtype: torch.dtype, progress: str | None = None) -> list[Tensor]:
        """``sum_chunks`` over the vectors of all processes, on the device. Collective.

        Args:
            function: of a chunk on the device.
            dtype: of the chunks.
            progress: text before process 0's progress bar.
        """
        shown = progress if self.processes.first else None
        return self._reduced(lambda: sum_chunks(self.rows, dtype, function, device=self.device, progress=shown))

    def sums_of_batches(
        self, dtype: torch.dtype, generator: torch.Generator, progress: str
    ) -> Iterator[Callable[[ChunkSums], list[Tensor]]]:
        """For each mini-batch of all vectors, drawn without replacement, what sums over it. Collective.

        Runs of a few neighbours are drawn: a batch is spread over all the data, in whatever order those are.
        """
        starts = torch.randperm(-(-self.count // _RUN_ROWS), generator=generator) * _RUN_ROWS
        runs = max(1, min(_BATCH_RUNS, _BATCH_ELEMENTS // (self.num_features * _RUN_ROWS)))
        hidden = None if self.processes.first else True
        with tqdm(total=len(starts), desc=progress, unit="run", disable=hidden, leave=False) as bar:
            for batch in starts.tensor_split(-(-len(starts) // runs)):
                yield self._sum_of_runs(batch.sort().values, dtype)
                bar.update(len(batch))

    def sample(self, places: Tensor) -> Tensor:
        """On process 0 the vectors at some places, in their order, on the device; elsewhere none. Collective."""
        own, local = self.processes.places(places)
        mine = self.processes.attempt(lambda: self.rows[local.to(self.rows.device)])
        if self.processes.count == 1:
            return mine.to(self.device)
        parts = self.processes.gather_on_first((own, mine.cpu()))
        whole = torch.empty(len(places) if self.processes.first else 0, self.num_features, dtype=mine.dtype)
        for part, vectors in parts:
            whole[part] = vectors
        return whole.to(self.device)

    def _sum_of_runs(self, starts: Tensor, dtype: torch.dtype) -> Callable[[ChunkSums], list[Tensor]]:
        def read() -> Tensor:
            _, local = self.processes.places(starts)
            places = (local[:, None] + torch.arange(_RUN_ROWS)).flatten()
            return self.rows[places[places < len(self.rows)].to(self.rows.device)]

        return lambda function: self._reduced(lambda: sum_chunks(read(), dtype, function, device=self.device))

    def _reduced(self, local: Callable[[], list[Tensor]]) -> list[Tensor]:
        return self.processes.sum(self.processes.attempt(local))
