"""From loaded splits to batches: contexts applied, images decoded and kept if they fit, normalisation measured.

Shapes: N images of a split, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch

from cn_hf.contexts import CONTEXT_COLUMN, ContextSource, drop_corrupt_images
from cn_hf.data.augment import Augmentation
from cn_hf.data.batches import Batches, BatchOptions, DeviceBatches
from cn_hf.data.mixing import Mixing, MixingConfig
from cn_hf.data.streaming import StreamedBatches
from cn_hf.errors import ConfigError, DatasetError, nearest
from cn_hf.reading.access import features_of
from cn_hf.reading.decoded import DecodedImages, OnError, check_on_error, decode_images, image_shape
from cn_hf.reading.images import accepts_image_size, iter_decoded, stack_arrays
from cn_hf.reading.loading import (
    find_image_column,
    find_label_column,
    label_names,
    read_context_ids,
    read_labels,
    take_shuffled,
)
from cn_hf.reading.statistics import ChannelSums

__all__ = ["PreparedData", "prepare_data"]

SPLITS = ("train", "validation", "test")
# Images that mean and std are measured on where the training split is not held in memory.
STATISTICS_IMAGES = 10_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a training script, and what it must know of it.

    Attributes:
        train: Shuffled, augmented batches; None without that split.
        validation: Batches in the dataset's order, not augmented but resized alike; None without that split.
        test: Likewise.
        num_classes: Number of classes.
        class_names: Their names; None where labels are plain integers.
        context_names: Names of the T contexts; None where the data has none, or has context ids without names.
        context_source: The fitted source that named them, to be saved with the model; None where none was given.
        input_size: (C, H, W) of what the network gets.
        mean: Of each channel, which was subtracted.
        std: Of each channel, which was divided by.
        skipped: Unreadable rows of each split held in memory; streamed ones count theirs in ``.skipped``.
    """

    train: Batches | None
    validation: Batches | None
    test: Batches | None
    num_classes: int
    class_names: tuple[str, ...] | None
    context_names: tuple[str, ...] | None
    context_source: ContextSource | None
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: dict[str, tuple[int, ...]]

    def splits(self) -> dict[str, Batches]:
        """The batches of the splits there are."""
        return {name: batches for name in SPLITS if (batches := getattr(self, name)) is not None}


@accepts_image_size
def prepare_data(
    splits: Any,
    *,
    context_source: ContextSource | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    decode_size: int | tuple[int, int] | None = None,
    image_mode: str = "RGB",
    augment: Augmentation | None = None,
    mixing: MixingConfig | None = None,
    balance_contexts: bool = False,
    batch_size: int,
    eval_batch_size: int | None = None,
    drop_last: bool = False,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    num_processes: int = 1,
    process_index: int = 0,
    dtype: torch.dtype = torch.float32,
    memory_budget_bytes: int = 4 * 2**30,
    on_error: OnError = "raise",
    num_workers: int = 0,
    progress: bool = False,
) -> PreparedData:
    """Make batches of the splits ``train``, ``validation`` and ``test`` that ``load_splits`` gave.

    Contexts come from ``context_source``: fitted on ``train`` alone if it is not fitted yet, then applied to all
    splits; without one, from a column ``context_ids`` if the data has it. Splits are decoded into memory in the order
    train, validation, test while they fit what is left of the budget, and are streamed otherwise.

    Args:
        splits: A DatasetDict or IterableDatasetDict.
        context_source: See above.
        image_column: None: the one there is.
        label_column: None: the one there is.
        decode_size: One number or (height, width) to resize to while decoding; None: as stored.
        image_mode: "RGB" or "L".
        augment: For training batches; its resize also for the others.
        mixing: For training batches alone, whose labels and contexts it turns into weights.
        balance_contexts: Draw every context equally often in training; see ``Batches``.
        batch_size: Images of a global training batch.
        eval_batch_size: Of the other splits; None: the same.
        drop_last: Leave out the last training batch of an epoch where it is smaller.
        seed: Of training order and augmentation.
        mean: Of each channel (white is 1); None: measured on ``train``, or on 10,000 of its images if streamed.
        std: Likewise.
        device: Where batches are.
        num_processes: Processes that share each batch.
        process_index: Which of them this is.
        dtype: Of ``pixel_values``.
        memory_budget_bytes: For decoded images, on ``device``.
        on_error: "raise" at an image that cannot be read, or "skip" it.
        num_workers: Processes that decode; 0: this one.
        progress: Show progress bars on a terminal.

    Raises:
        DatasetError: A column is missing, splits disagree about classes, or a label is out of range (row named).
        DatasetFileError: An image cannot be read (row named).
        ConfigError: An option is out of range, ``train`` is missing where something must be measured on it, or has no
            contexts, or no known number of them, where ``balance_contexts`` or ``mixing`` need that.
        ContextSourceError: The source cannot name contexts of this data.
    """
    check_on_error(on_error)
    _check_splits(splits, context_source, mean, std)
    reading = _Reading(
        image_column=find_image_column(splits, image_column),
        label_column=find_label_column(splits, label_column),
        decoding={"decode_size": decode_size, "image_mode": image_mode},
        on_error=on_error,
        num_workers=num_workers,
        progress=progress,
    )
    held = reading.decode_within(splits, memory_budget_bytes)
    readable = reading.readable(splits, held, has_source=context_source is not None)
    if context_source is not None:
        if not context_source.fitted:
            context_source.fit(readable["train"])
        readable = {name: context_source.apply(split) for name, split in readable.items()}
    class_names, num_classes = _classes(readable, reading.label_column)
    if mean is None or std is None:
        measured = reading.mean_and_std(held, readable["train"], seed)
        mean, std = (measured[0] if mean is None else mean), (measured[1] if std is None else std)
    context_names = _context_names(readable)
    shared: BatchOptions = {
        "seed": seed,
        "mean": mean,
        "std": std,
        "device": device,
        "num_processes": num_processes,
        "process_index": process_index,
        "dtype": dtype,
        "augment": _augment_for(augment, False),
    }
    size = batch_size if eval_batch_size is None else eval_batch_size
    batches = {
        name: reading.batches(split, held.get(name), num_classes, size, shared)
        for name, split in readable.items()
        if name != "train"
    }
    if "train" in readable:
        own: BatchOptions = {
            "shuffle": True,
            "drop_last": drop_last,
            "augment": _augment_for(augment, True),
            "mixing": _mixing_for(mixing, readable["train"], num_classes, context_names),
            "balance_contexts": balance_contexts,
        }
        train = reading.batches(readable["train"], held.get("train"), num_classes, batch_size, {**shared, **own})
        batches["train"] = train
    return PreparedData(
        train=batches.get("train"),
        validation=batches.get("validation"),
        test=batches.get("test"),
        num_classes=num_classes,
        class_names=class_names,
        context_names=context_names,
        context_source=context_source,
        input_size=_input_size(reading.first_shape(held, readable), augment),
        mean=tuple(mean),
        std=tuple(std),
        skipped={name: decoded.skipped for name, decoded in held.items()},
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """Columns that are read, and options of decoding; arguments of ``prepare_data``, whose steps these are."""

    image_column: str
    label_column: str
    decoding: dict[str, Any]
    on_error: OnError
    num_workers: int
    progress: bool

    def decode_within(self, splits: Any, budget: int) -> dict[str, DecodedImages]:
        """Return the pixels of the splits that fit into ``budget`` bytes, by name."""
        held = {}
        for name in SPLITS:
            split = splits.get(name)
            if split is None or not isinstance(split, datasets.Dataset):
                continue
            if len(split) == 0:
                raise DatasetError(f"split {name!r} has no rows")
            size = math.prod(image_shape(split, self.image_column, **self.decoding)) * len(split)
            if size > budget:
                continue
            held[name] = decode_images(
                split,
                self.image_column,
                **self.decoding,
                on_error=self.on_error,
                num_workers=self.num_workers,
                progress=f"decode {name}" if self.progress else None,
            )
            budget -= size
        return held

    def readable(self, splits: Any, held: dict[str, DecodedImages], *, has_source: bool) -> dict[str, Any]:
        """Return the splits without rows known to be unreadable, which a context source must not meet either."""
        readable = {}
        for name, split in splits.items():
            if name in held:
                readable[name] = split.select(held[name].rows.numpy()) if held[name].skipped else split
            else:
                checked = self.on_error == "skip" and has_source
                readable[name] = drop_corrupt_images(split, self.image_column) if checked else split
        return readable

    def mean_and_std(
        self, held: dict[str, DecodedImages], train: Any, seed: int
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Measure each channel on the training split."""
        sums = ChannelSums()
        if "train" in held:
            sums.update(held["train"].images)
        else:
            in_memory = isinstance(train, datasets.Dataset)
            sample = take_shuffled(train, STATISTICS_IMAGES, seed) if in_memory else train.take(STATISTICS_IMAGES)
            mode, size = self.decoding["image_mode"], self.decoding["decode_size"]
            for rows, arrays in iter_decoded(sample, self.image_column, mode=mode, size=size, skip_corrupt=True):
                if rows:
                    sums.update(stack_arrays(arrays, rows))
        return sums.mean_and_std()

    def first_shape(self, held: dict[str, DecodedImages], splits: dict[str, Any]) -> tuple[int, int, int]:
        """Return (C, H, W) of decoded images, the same for all splits held in memory."""
        shapes = {name: tuple(decoded.images.shape[1:]) for name, decoded in held.items()}
        if len(set(shapes.values())) > 1:
            raise DatasetError(f"splits differ in the size of their images (C, H, W): {shapes}; give an image size")
        if shapes:
            channels, height, width = next(iter(shapes.values()))
            return channels, height, width
        return image_shape(next(iter(splits.values())), self.image_column, **self.decoding)

    def batches(
        self, split: Any, decoded: DecodedImages | None, num_classes: int, batch_size: int, options: BatchOptions
    ) -> Batches:
        """Return batches of a split: of its pixels, or else streamed."""
        if decoded is not None:
            labels = torch.from_numpy(read_labels(split, self.label_column, num_classes))
            contexts = read_context_ids(split)
            return DeviceBatches(decoded.images, labels, contexts, rows=decoded.rows, batch_size=batch_size, **options)
        return StreamedBatches(
            split,
            image_column=self.image_column,
            label_column=self.label_column,
            on_error=self.on_error,
            num_workers=self.num_workers,
            batch_size=batch_size,
            **self.decoding,
            **options,
        )


def _input_size(shape: tuple[int, int, int], augment: Augmentation | None) -> tuple[int, int, int]:
    """Return (C, H, W) of what the network gets: decoded images of this shape, resized by the augmentation."""
    resized = None if augment is None else augment.config.image_size
    height, width = shape[1:] if resized is None or isinstance(resized, int) else resized
    return shape[0], height, width


def _check_splits(
    splits: Any, context_source: ContextSource | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    if not isinstance(splits, dict) or not splits:
        raise DatasetError(f"splits must be a DatasetDict with train, validation or test; got {type(splits).__name__}")
    for name in splits:
        if name not in SPLITS:
            raise DatasetError(f"unknown split {name!r}; load_splits names them. {nearest(str(name), SPLITS)}")
    if "train" not in splits:
        if mean is None or std is None:
            raise ConfigError("mean and std are measured on the training split; there is none, so give both")
        if context_source is not None and not context_source.fitted:
            raise ConfigError("contexts are fitted on the training split; there is none, so give a fitted source")


def _classes(splits: dict[str, Any], label_column: str) -> tuple[tuple[str, ...] | None, int]:
    """Class names, where there are any, and their number, the same for all splits."""
    names = {name: label_names(split, label_column) for name, split in splits.items()}
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise DatasetError(f"splits {first!r} and {other!r} have different classes in column {label_column!r}")
    class_names = names[first]
    if class_names is not None:
        return class_names, len(class_names)
    split = splits.get("train", splits[first])
    if not isinstance(split, datasets.Dataset):
        raise DatasetError(
            f"column {label_column!r} of this stream holds plain integers, so the number of classes is unknown; "
            "cast it to datasets.ClassLabel(num_classes=...)"
        )
    return None, int(read_labels(split, label_column).max()) + 1


def _augment_for(augment: Augmentation | None, training: bool) -> Augmentation | None:
    if augment is None:
        return None
    augment = augment if training else augment.evaluation()
    return None if augment.is_identity else augment


def _mixing_for(
    mixing: MixingConfig | None, train: Any, num_classes: int, context_names: tuple[str, ...] | None
) -> Mixing | None:
    if mixing is None or mixing.is_identity:
        return None
    num_contexts = None if context_names is None else len(context_names)
    if num_contexts is None and isinstance(features_of(train).get(CONTEXT_COLUMN), datasets.Value):
        if not isinstance(train, datasets.Dataset):
            raise ConfigError(
                f"mixing makes weights of contexts, and column {CONTEXT_COLUMN!r} of this stream holds plain integers, "
                "so their number is unknown; cast it to datasets.ClassLabel(num_classes=...)"
            )
        num_contexts = int(read_labels(train, CONTEXT_COLUMN).max()) + 1
    return Mixing(mixing, num_classes=num_classes, num_contexts=num_contexts)


def _context_names(splits: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the contexts, where there are any, the same for all splits that have them."""
    features = {name: features_of(split).get(CONTEXT_COLUMN) for name, split in splits.items()}
    names = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    for name, others in names.items():
        first = next(iter(names))
        if others != names[first]:
            raise DatasetError(
                f"splits {first!r} and {name!r} number their contexts differently in column {CONTEXT_COLUMN!r}: "
                f"{names[first]} and {others}; apply one fitted context source to both"
            )
    return tuple(next(iter(names.values()))) if names else None
