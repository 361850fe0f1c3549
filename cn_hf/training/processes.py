"""What the processes of a run tell each other beside gradients."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cn_hf.errors import TrainingError

__all__ = ["check_equal_lengths", "gathered", "share_buffers", "summed"]


def summed(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum of ``values`` over all processes."""
    if accelerator.num_processes == 1:
        return values
    total: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return total


def gathered(values: list[Any], accelerator: Accelerator) -> list[Any]:
    """The processes' lists, in rank order, as one."""
    if accelerator.num_processes == 1:
        return values
    everything: list[Any] = gather_object(values)
    return everything


def check_equal_lengths(steps: int, accelerator: Accelerator) -> None:
    """Raise TrainingError where processes have different numbers of steps: they would wait for each other forever."""
    lengths = gathered([steps], accelerator)
    if len(set(lengths)) > 1:
        raise TrainingError(f"every process needs the same number of batches, got {lengths} by rank; shard them evenly")


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main one's running statistics, so that all validate and keep the same network."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
