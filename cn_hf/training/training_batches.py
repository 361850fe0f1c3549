"""What the training loops need of their data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cn_hf.training.validation import Batch

__all__ = ["TrainingBatches"]


class TrainingBatches(Protocol):
    """What the loop needs of training data: one pass per epoch, a length in batches, a shuffle per epoch."""

    @property
    def num_samples(self) -> int:
        """Images of an epoch over all processes."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Pick the shuffle and augmentation of epoch ``epoch`` and the batch to begin with, both counted from 0."""

    def fingerprint(self) -> str:
        """A text that differs where the data does."""
