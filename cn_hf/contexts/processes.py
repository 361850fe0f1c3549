"""Processes that fit together: who holds which rows, sums over all of them, errors that all of them meet.

Rows are shared out in blocks: block ``b`` belongs to process ``b % count``. Every method named below is a collective,
which all processes must call in the same order; alone, each does at once what it says and needs no process group.

Shape legend: ``M`` vectors of one process, ``F`` features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cn_hf.contexts.chunks import BLOCK_ROWS
from cn_hf.errors import CnHfError, ConfigError, ContextSourceError
from cn_hf.norm.em import sum_over_processes

__all__ = ["ALONE", "Processes"]

Result = TypeVar("Result")


class Processes:
    """The processes of the default group, or this one alone.

    Attributes:
        count: how many there are.
        rank: which one this is.
    """

    def __init__(self, count: int = 1, rank: int = 0) -> None:
        self.count = count
        self.rank = rank

    @classmethod
    def of_group(cls) -> Processes:
        """All processes of the default group; this one alone where only one was started.

        Raises:
            ConfigError: several were started, and have no group yet.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "distributed=True, but these processes have no process group yet. Create an accelerate.Accelerator(), "
                "or call torch.distributed.init_process_group(), first."
            )
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is process 0, which shows progress and decides for all."""
        return self.rank == 0

    def owns(self, row: int) -> bool:
        """Whether a row, counted over all processes, is this one's."""
        return row // BLOCK_ROWS % self.count == self.rank

    def own_rows(self, count: int) -> list[int]:
        """This process's rows of ``count``."""
        starts = range(self.rank * BLOCK_ROWS, count, self.count * BLOCK_ROWS)
        return [row for start in starts for row in range(start, min(start + BLOCK_ROWS, count))]

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some rows are this process's, bool, and the places of those among its own."""
        own = rows // BLOCK_ROWS % self.count == self.rank
        mine = rows[own]
        return own, mine // (BLOCK_ROWS * self.count) * BLOCK_ROWS + mine % BLOCK_ROWS

    def attempt(self, function: Callable[[], Result]) -> Result:
        """``function()`` in every process; an error of any of them is raised by all. Collective."""
        if self.count == 1:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:  # whatever it is, the others must not wait for this process for ever
            error = caught
        told = error if error is None or isinstance(error, CnHfError) else f"{type(error).__name__}: {error}"
        for rank, other in enumerate(self.gather(told)):
            if error is not None:
                raise error
            if isinstance(other, CnHfError):
                raise type(other)(f"Process {rank}: {other}")
            if other is not None:
                raise ContextSourceError(f"Process {rank} failed: {other}")
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank. Collective."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_on_first(self, value: Any) -> list[Any]:
        """On process 0 every process's value, by rank; elsewhere nothing. Collective."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values)
        return values or []

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over processes of float64 tensors, alike to the last bit everywhere. Collective."""
        if self.count == 1:
            return tensors
        moved = tuple(tensor.to(self._device) for tensor in tensors)
        return [part.to(tensors[0].device) for part in sum_over_processes(moved)]

    def of_first(self, tensors: list[Tensor]) -> list[Tensor]:
        """Process 0's tensors in place of this one's: another kind of processor may round otherwise. Collective."""
        if self.count == 1:
            return tensors
        flat = torch.cat([tensor.double().flatten() for tensor in tensors]).to(self._device)
        dist.broadcast(flat, src=0)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor).to(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """``function()`` of process 0, its result (on the CPU) everywhere. Collective."""
        result = self.attempt(lambda: function() if self.first else None)
        if self.count > 1:
            values = [result]
            dist.broadcast_object_list(values, src=0)
            [result] = values
        assert result is not None
        return result

    @property
    def _device(self) -> torch.device:
        """One that the group can send from."""
        backend = dist.get_backend()
        accelerator = None if "gloo" in backend or "mpi" in backend else torch.accelerator.current_accelerator()
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())


ALONE = Processes()
