"""The rows of each batch of an epoch, and those of each process: functions of seed and epoch alone.

Shapes: N images in all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["balanced_order", "epoch_order", "process_slice", "stream_seed"]


def stream_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers of 0 or more, such as (seed, epoch, batch); near ones give unlike seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def process_slice(total: int, num_processes: int, process_index: int, *, group: int = 1) -> slice:
    """The contiguous part of ``total`` images that process ``process_index`` takes.

    Args:
        total: Images of a global batch.
        num_processes: P.
        process_index: Which of them.
        group: Images at places ``group * i`` to ``group * (i + 1) - 1`` are never parted.

    Returns:
        Parts that in rank order are the whole, and differ by ``group`` images at most.
    """
    groups = -(-total // group)
    first, stop = (groups * rank // num_processes * group for rank in (process_index, process_index + 1))
    return slice(min(first, total), min(stop, total))


def epoch_order(num_rows: int, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """Rows (N,) in the order of an epoch, int64, on the CPU."""
    if not shuffle:
        return torch.arange(num_rows)
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(stream_seed(seed, epoch)))


def balanced_order(context_ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Rows of an epoch of N images in which every context that has rows is drawn equally often, to one image.

    The rows of a context are gone through in a random order, and again in another one until there are enough; a
    context with more rows than that gives as many of them, each once.

    Args:
        context_ids: (N,) int64, on the CPU.
        seed: Of the draw.
        epoch: Likewise.

    Returns:
        (N,) int64, shuffled; some rows several times, others not at all.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
    counts = context_ids.bincount()
    present = counts.nonzero().flatten()
    rows_of = torch.split(context_ids.argsort(stable=True), counts[present].tolist())
    share, left_over = divmod(len(context_ids), len(present))
    # Which contexts give one image more changes from epoch to epoch.
    quota = share + (torch.randperm(len(present), generator=generator) < left_over).long()
    drawn = []
    for rows, count in zip(rows_of, quota.tolist(), strict=True):
        cycles = -(-count // len(rows))
        keys = torch.rand(cycles, len(rows), generator=generator, dtype=torch.float64)
        drawn.append(rows[keys.argsort(dim=1, stable=True).flatten()[:count]])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]
