"""The record of a training run: one entry per epoch, and which epoch was best.

The same object feeds ``results.json``, the curves and the printed summary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["EpochRecord", "History"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch, over all processes: means per image, rates in [0, 1], seconds of training without validation.

    ``epoch`` and ``step`` count from 1 and name the end of the epoch. ``train_loss`` and ``train_accuracy`` are of the
    augmented images as the changing network met them. ``further`` holds what else the objective measures on them.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    seconds: float
    images_per_second: float
    further: dict[str, float] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """All that was measured, by name."""
        values = dataclasses.asdict(self)
        further = values.pop("further")
        return {name: value for name, value in {**values, **further}.items() if value is not None}


@dataclasses.dataclass(slots=True, kw_only=True)
class History:
    """The epochs of a run in order. ``best_epoch`` has the highest validation accuracy, the earliest if several do."""

    epochs: list[EpochRecord] = dataclasses.field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False

    def append(self, record: EpochRecord) -> bool:
        """Add an epoch; true if it is the best so far."""
        self.epochs.append(record)
        accuracy = record.validation_accuracy
        if accuracy is None:
            return False
        best = None if self.best_epoch is None else self.epochs[self.best_epoch - 1].validation_accuracy
        if best is not None and accuracy <= best:
            return False
        self.best_epoch = record.epoch
        return True

    def curve(self, name: str) -> list[float]:
        """One number, by its name in ``EpochRecord`` or ``further``, epoch by epoch; none where it was not measured."""
        return [numbers[name] for record in self.epochs if name in (numbers := record.numbers())]

    @property
    def seconds(self) -> float:
        """Training time without validation, in seconds."""
        return sum(record.seconds for record in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """The inverse of ``to_dict``."""
        epochs = [EpochRecord(**record) for record in values["epochs"]]
        return cls(epochs=epochs, best_epoch=values["best_epoch"], stopped_early=values["stopped_early"])
