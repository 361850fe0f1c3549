"""The input pipeline: the training loop on real batches against the same loop on one batch given again and again.

Small images are held on the device and augmented there; JPEGs of a folder are decoded by worker processes and resized
to 224 pixels. Both are made here, of noise and structure. A turn is one call of ``fit``: the first steps, in which the
workers start, do not count, and the workers have more batches before them than the loop takes, so that they never rest.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cn_hf.devices import usable_cores
from scripts.benchmark.networks import CLASSES, CONTEXTS, noise_data
from scripts.benchmark.rows import SPEED, Row, Trial, compared
from scripts.benchmark.scale import drawn_images
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import in_turn, wait

if TYPE_CHECKING:
    from cn_hf.data import Batches, PreparedData

__all__ = ["TimedBatches", "trials"]

REAL, FIXED = "real batches", "one fixed batch"
STORED_SIDE, SIDE = 256, 224  # of JPEGs, as stored and as the network gets them
FILES = 256  # different JPEGs; the data set names each several times


def trials(settings: Settings) -> list[Trial]:
    """Both kinds of data; JPEGs take too long for a quick run."""
    small = _trial("32-pixel images held on the device", _small_images, _small_plan(settings), settings)
    if settings.size == "quick":
        return [small]
    return [small, _trial("224-pixel JPEGs, decoded by workers", _jpegs, _jpeg_plan(settings), settings)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a turn: images of a batch, steps before those that count, steps that count, decoding processes."""

    model: str
    side: int
    batch: int
    skipped: int
    counted: int
    workers: int = 0

    @property
    def steps(self) -> int:
        """Of a turn; the last is where the count ends."""
        return self.skipped + self.counted + 1

    @property
    def images(self) -> int:
        """Of the data set: what the loop takes, and what the workers get ahead of it."""
        return (self.steps + 2 * self.workers) * self.batch


def _small_plan(settings: Settings) -> Plan:
    batch, counted = settings.of(full=(64, 5), quick=(16, 4), smoke=(4, 2), gpu=(256, 100))
    return Plan(model="cn_cifar_convnet", side=32, batch=batch, skipped=1, counted=counted)


def _jpeg_plan(settings: Settings) -> Plan:
    workers = min(usable_cores(), 16)
    model = settings.of(full="resnet18", quick="resnet18", smoke="test_resnet", gpu="resnet50")
    batch, times = settings.of(full=(4, 4), quick=(4, 4), smoke=(2, 1), gpu=(128, 2))
    return Plan(model=model, side=SIDE, batch=batch, skipped=workers, counted=times * workers, workers=workers)


def _trial(name: str, load: Callable[[Plan, Settings, Path], PreparedData], plan: Plan, settings: Settings) -> Trial:
    row = Row(
        what=f"training on {name}",
        rival=FIXED,
        shape=f"({plan.batch}, 3, {plan.side}, {plan.side})",
        dtype="bfloat16" if settings.on_gpu else "float32",
        unit=SPEED,
        limit=0.95,
        at_least=True,
        headline=True,
        note=f"{plan.model}{f', {plan.workers} workers' if plan.workers else ''}",
    )

    def measure() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            turns = _turns(load(plan, settings, Path(folder)), plan, settings)
            for turn in turns.values():
                turn()
            seconds = in_turn(turns, settings, title=row.what)
        return [compared(row, seconds[REAL], seconds[FIXED], amount=(plan.batch, "images/s"))]

    return Trial(row.what, (row,), measure)


def _turns(data: PreparedData, plan: Plan, settings: Settings) -> dict[str, Callable[[], float]]:
    """Functions that train for one turn and give the seconds of a step."""
    from accelerate import PartialState

    from cn_hf.recipes.classifier.network import build_classifier
    from cn_hf.training.config import TrainingConfig
    from cn_hf.training.preparation import make_accelerator
    from cn_hf.training.supervised import fit

    config = TrainingConfig(
        model=plan.model, mode="cn-channels", where=("norms",), epochs=1, batch_size=plan.batch, optimizer="sgd",
        learning_rate=1e-5, keep_best=False, progress=False, calibrate="never",
        mixed_precision="bf16" if settings.on_gpu else "no",
    )  # fmt: skip
    PartialState(cpu=not settings.on_gpu)
    accelerator = make_accelerator(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never saw data")  # time does not depend on it
        model = build_classifier(config, data).to(settings.device)
    assert data.train is not None
    fixed = next(iter(data.train))

    def turn(batches: Iterable[dict[str, Tensor]]) -> float:
        timed = TimedBatches(batches, plan, settings.device)
        fit(model, timed, None, config=config, accelerator=accelerator)
        return timed.seconds

    return {REAL: lambda: turn(_required(data)), FIXED: lambda: turn([fixed] * plan.steps)}


class TimedBatches:
    """The first batches of a source, as the training loop takes them, and how long the counted ones took.

    Args:
        source: Gives at least ``plan.steps`` batches.
        plan: How many there are, and which of them count.
        device: Waited for whenever the clock is read.
    """

    def __init__(self, source: Iterable[dict[str, Tensor]], plan: Plan, device: torch.device) -> None:
        self.source, self.plan, self.device = source, plan, device
        self._marks: list[float] = []

    @property
    def seconds(self) -> float:
        """Of a counted step, with what it takes to get the next batch."""
        return (self._marks[1] - self._marks[0]) / self.plan.counted

    @property
    def num_samples(self) -> int:
        """Images of a turn."""
        return self.plan.steps * self.plan.batch

    def __len__(self) -> int:
        """Batches of a turn."""
        return self.plan.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches; the loop ends with the last of them and so never asks for one more."""
        for number, batch in enumerate(self.source):
            if number in (self.plan.skipped, self.plan.steps - 1):
                wait(self.device)
                self._marks.append(time.perf_counter())
            yield batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """There is one epoch, from its beginning."""

    def fingerprint(self) -> str:
        """Nothing is resumed."""
        return ""


# ------------------------------------------------------------------------------------------------------------- the data


def _required(data: PreparedData) -> Batches:
    assert data.train is not None
    return data.train


def _small_images(plan: Plan, settings: Settings, folder: Path) -> PreparedData:
    from cn_hf.data import build_augmentation

    augmentation = build_augmentation(("flip", "crop"))
    return noise_data(
        plan.side, plan.images, settings.device, batch_size=plan.batch, shuffle=True, augment=augmentation
    )


def _jpegs(plan: Plan, settings: Settings, folder: Path) -> PreparedData:
    import datasets

    from cn_hf.data import prepare_data

    paths = _written_jpegs(min(plan.images, FILES), folder)
    places = range(plan.images)
    columns = {
        "image": [paths[place % len(paths)] for place in places],
        "label": [place % CLASSES for place in places],
        "context_ids": [place % CONTEXTS for place in places],
    }
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(num_classes=CLASSES),
        "context_ids": datasets.ClassLabel(num_classes=CONTEXTS),
    }
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return prepare_data(
        datasets.DatasetDict({"train": data}), decode_size=plan.side, batch_size=plan.batch, mean=(0.5,) * 3,
        std=(0.25,) * 3, device=settings.device, memory_budget_bytes=0, num_workers=plan.workers,
    )  # fmt: skip


def _written_jpegs(count: int, folder: Path) -> list[str]:
    import PIL.Image

    paths = [str(folder / f"{number}.jpg") for number in range(count)]
    for path, array in zip(paths, drawn_images(count, side=STORED_SIDE), strict=True):
        PIL.Image.fromarray(array).save(path, quality=90)
    return paths
