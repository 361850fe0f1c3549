"""The outcome of each test sample, gathered over processes so that every sample is counted once.

Each process keeps its own samples' outcomes and they are gathered once, at the end: no process waits for another
between batches, so shares may be uneven. Samples that a sharding loader repeats to fill its last batch are recognised
by their dataset row and dropped.

Shapes: N samples of the whole test set, n of one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cn_hf.errors import DatasetError
from cn_hf.processes import gathered

__all__ = ["Records", "SampleRecorder"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Outcomes of the whole test set, in the order of dataset rows where those are known, else of arrival.

    Attributes:
        labels: (N,) int64.
        context_ids: (N,) int64, or None.
        index: (N,) int64 dataset rows, or None.
        ranks: per protocol that met every sample, (N,) int64 ranks of the true class.
    """

    labels: Tensor
    context_ids: Tensor | None
    index: Tensor | None
    ranks: Mapping[str, Tensor]


class SampleRecorder:
    """Collects the outcomes of one process's samples, then merges those of all processes.

    Args:
        accelerator: the ``accelerate.Accelerator`` whose processes share the test set, or None for one process.

    Attributes:
        num_samples: samples added so far.
        largest_batch: size of the largest batch added so far.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._several = accelerator is not None and accelerator.num_processes > 1
        self._columns: dict[str, list[Tensor]] = {}
        self.num_samples = 0
        self.largest_batch = 0

    def add(
        self, *, labels: Tensor, context_ids: Tensor | None, index: Tensor | None, ranks: Mapping[str, Tensor]
    ) -> None:
        """Add a batch: (n,) int64 tensors on any device.

        Raises:
            DatasetError: there are several processes and the batch has no dataset rows.
        """
        if self._several and index is None:
            raise DatasetError(
                "with several processes each batch needs 'index', the dataset rows of its samples, so that samples "
                "repeated to fill the last batch are counted once"
            )
        columns = {"labels": labels, "context_ids": context_ids, "index": index}
        columns |= {f"ranks/{name}": column for name, column in ranks.items()}
        for name, column in columns.items():
            if column is not None:
                self._columns.setdefault(name, []).append(column.detach().to("cpu", torch.int64))
        self.num_samples += labels.numel()
        self.largest_batch = max(self.largest_batch, labels.numel())

    def merged(self) -> Records:
        """Outcomes of all processes, the same on each; with several processes all must call it.

        Raises:
            DatasetError: there are no samples, only some batches have contexts or rows, or a row occurs twice with
                different labels, or twice in one process alone.
        """
        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        shares = [share for share in (gathered([columns]) if self._several else [columns]) if share]
        total = sum(share["labels"].numel() for share in shares)
        if total == 0:
            raise DatasetError("the test set gave no samples; check the split's name and its length")
        merged = {name: torch.cat([share[name] for share in shares if name in share]) for name in shares[0]}
        for name in ("context_ids", "index"):
            given = sum(share[name].numel() for share in shares if name in share)
            if given not in (0, total):
                raise DatasetError(f"only some test batches have {name!r}; give it in all of them, or in none")
        complete = {name: column for name, column in merged.items() if column.numel() == total}
        if "index" in complete:
            complete = _each_row_once(complete, repeats_allowed=self._several)
        return Records(
            labels=complete["labels"],
            context_ids=complete.get("context_ids"),
            index=complete.get("index"),
            ranks={
                name.removeprefix("ranks/"): column for name, column in complete.items() if name.startswith("ranks/")
            },
        )


def _each_row_once(columns: Mapping[str, Tensor], *, repeats_allowed: bool) -> dict[str, Tensor]:
    """Sorted by dataset row, the first of repeated rows kept."""
    index, order = columns["index"].sort(stable=True)
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[1:] = index[1:] == index[:-1]
    if repeated.any():
        row = int(index[repeated][0])
        labels = columns["labels"][order]
        differ = (labels[1:] != labels[:-1]) & repeated[1:]
        if not repeats_allowed or differ.any():
            raise DatasetError(
                f"dataset row {row} occurs twice in one pass over the test set; 'index' must name each sample once"
            )
    return {name: column[order][~repeated] for name, column in columns.items()}
