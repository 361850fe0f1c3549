"""The data of AdaMatch: which images are labelled, and batches of labelled and unlabelled ones in two views.

Both kinds are gone through again and again, each in random orders of its own, so that every step has as many of each;
an epoch is one pass over the unlabelled ones. What a step holds depends on the seed and its number alone, and several
processes take parts of the same global batch.

Shapes: n_L labelled and n_U unlabelled images of a batch on this process, K classes, C channels, H and W.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cn_hf.data import Batches, DeviceBatches, PreparedData
from cn_hf.data.augment import Augment, InTurn
from cn_hf.data.batches import Batch
from cn_hf.data.order import epoch_order, process_slice, stream_seed
from cn_hf.errors import ConfigError, DatasetError, TrainingError
from cn_hf.reading.loading import find_label_column, label_columns
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.neighbours import Neighbours
from cn_hf.recipes.adamatch.randaugment import RandAugment
from cn_hf.recipes.adamatch.random_convolution import RandomConvolution
from cn_hf.recipes.classifier.data import load_data, read_splits
from cn_hf.training.config import TrainingConfig

__all__ = ["UNLABELLED", "ImageStandardization", "TwoViewBatches", "load_adamatch_data"]

UNLABELLED = -1
SOURCE, TARGET = 0, 1  # context ids where contexts are origins
# Random numbers of a step that must not be the same: of either kind of images, and of the weights of logits.
LABELLED, OTHERS, INTERPOLATION = 0, 1, 2
ORDER, WEAK, BEFORE_STRONG, STRONG, BESIDE = 0, 1, 2, 3, 4


class ImageStandardization:
    """Each channel of each image to mean 0 and standard deviation 1, after an augmentation, if there is one.

    Args:
        augment: See ``cn_hf.data.augment.Augment``, whose call this has.
    """

    def __init__(self, augment: Augment | None = None) -> None:
        self.augment = augment

    def __call__(self, images: Tensor, *, seed: int, places: Tensor, total: int) -> Tensor:
        """Standardised images (N, C, H, W); a channel that is constant becomes 0."""
        if self.augment is not None:
            images = self.augment(images, seed=seed, places=places, total=total)
        mean = images.mean((-2, -1), keepdim=True)
        deviation = (images - mean).square().mean((-2, -1), keepdim=True).sqrt()
        return (images - mean) / deviation.clamp_min(1 / 255)


class TwoViewBatches(Batches):
    """Batches of labelled and unlabelled images, each in a weak and a strong view; see ``AdaMatch`` for what they hold.

    ``index`` (n_L + n_U,) are the images' rows. ``context_ids`` are there where the data has them.

    Args:
        labelled: Images, labels, and the options of batches; its ``augment`` makes weak views.
        unlabelled: Images; labels play no part.
        unlabelled_ratio: Unlabelled images of a step for each of ``labelled.batch_size``.
        strong: Makes strong views out of weak ones.
        num_classes: K.
        per_image: Standardise each image by itself, instead of by the mean and std of ``labelled``.
        neighbours: What labelled images undergo before both views.

    Raises:
        ConfigError: A step has fewer images of a kind than there are processes.
    """

    def __init__(
        self,
        labelled: DeviceBatches,
        unlabelled: DeviceBatches,
        *,
        unlabelled_ratio: int,
        strong: Augment,
        num_classes: int,
        per_image: bool = False,
        neighbours: Augment | None = None,
    ) -> None:
        super().__init__(
            batch_size=labelled.batch_size,
            shuffle=True,
            seed=labelled.seed,
            augment=labelled.augment,
            mean=labelled.mean,
            std=labelled.std,
            device=labelled.device,
            num_processes=labelled.num_processes,
            process_index=labelled.process_index,
            dtype=labelled.dtype,
        )
        if self.batch_size < self.num_processes:
            raise ConfigError(
                f"batch_size {self.batch_size} leaves some of {self.num_processes} processes without labelled images; "
                f"use {self.num_processes} or more"
            )
        self.labelled, self.unlabelled = labelled, unlabelled
        self.unlabelled_batch_size = unlabelled_ratio * self.batch_size
        self.strong, self.num_classes, self.per_image = strong, num_classes, per_image
        self.neighbours = neighbours
        self._orders: dict[int, tuple[int, Tensor]] = {}

    @property
    def num_rows(self) -> int:
        """Labelled and unlabelled images."""
        return len(self.labelled.images) + len(self.unlabelled.images)

    @property
    def num_samples(self) -> int:
        """Labelled images of a whole epoch, over all processes, each as often as it is met."""
        return len(self) * self.batch_size

    @property
    def context_ids(self) -> Tensor | None:
        """Of all images, labelled ones first; None where there are none."""
        if self.labelled.context_ids is None or self.unlabelled.context_ids is None:
            return None
        return torch.cat([self.labelled.context_ids, self.unlabelled.context_ids])

    def __len__(self) -> int:
        """Steps of an epoch: one pass over the unlabelled images, less what does not fill a batch."""
        return max(1, len(self.unlabelled.images) // self.unlabelled_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch from number ``start`` on, this process's part of each."""
        for number in range(self.start, len(self)):
            step = self.epoch * len(self) + number
            known = self._views(LABELLED, self.labelled, self.batch_size, step)
            others = self._views(OTHERS, self.unlabelled, self.unlabelled_batch_size, step)
            batch = {name: torch.cat([value, others[name]]) for name, value in known.items() if name != "labels"}
            yield {**batch, "labels": known["labels"], "interpolation": self._interpolation(step)}

    def fingerprint(self) -> str:
        """Hex digest of all pixels, rows, contexts, and labels that are given."""
        return hashlib.sha256((self.labelled.fingerprint() + self.unlabelled.fingerprint()).encode()).hexdigest()

    def _views(self, kind: int, pool: DeviceBatches, size: int, step: int) -> Batch:
        part = process_slice(size, self.num_processes, self.process_index)
        places = torch.arange(part.start, part.stop)
        mine = self._rows_of(kind, len(pool.images), step * size + places).to(pool.images.device)
        images = pool.images.index_select(0, mine).to(torch.float32).div_(255)

        def view(augment: Augment | None, images: Tensor, stream: int) -> Tensor:
            if augment is None:
                return images
            seed = stream_seed(self.seed, step, kind, stream)
            return augment(images, seed=seed, places=places, total=size)

        if kind == LABELLED:
            images = view(self.neighbours, images, BESIDE)
        strong = view(self.strong, view(self.augment, images, BEFORE_STRONG), STRONG)
        batch = {
            "pixel_values": self._normalized(view(self.augment, images, WEAK)),
            "strong_pixel_values": self._normalized(strong),
            "labels": pool.labels.index_select(0, mine),
            "index": pool.rows.index_select(0, mine),
        }
        if pool.context_ids is not None:
            batch["context_ids"] = pool.context_ids.index_select(0, mine)
        return batch

    def _rows_of(self, kind: int, count: int, numbers: Tensor) -> Tensor:
        """The images met as number 0, 1, ... of all steps: one random order of all ``count`` after the other."""
        rows = torch.empty_like(numbers)
        for turn in torch.unique(numbers // count).tolist():
            known = self._orders.get(kind)
            if known is None or known[0] != turn:
                known = turn, epoch_order(count, True, stream_seed(self.seed, kind, ORDER), turn)
                self._orders[kind] = known
            inside = numbers // count == turn
            rows[inside] = known[1][numbers[inside] % count]
        return rows

    def _normalized(self, images: Tensor) -> Tensor:
        if self.per_image:
            images = ImageStandardization()(images, seed=0, places=torch.arange(len(images)), total=len(images))
            return images.to(self.dtype)
        mean, std = self._mean_and_std(images.device)
        return images.sub(mean).div_(std).to(self.dtype)

    def _interpolation(self, step: int) -> Tensor:
        """Weights (n_L, 2, K) of this process's images, the same whatever the number of processes."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, step, INTERPOLATION, 0))
        weights = torch.rand(self.batch_size, 2, self.num_classes, generator=generator)
        return weights[process_slice(self.batch_size, self.num_processes, self.process_index)].to(self.device)


def load_adamatch_data(config: TrainingConfig, accelerator: Accelerator) -> PreparedData:
    """``load_data``, then the training images parted into labelled and unlabelled ones as the setting says.

    Labels of unlabelled images are dropped, and those of the target's validation images, too, which train unlabelled:
    validation sees labelled images of the source alone.

    Raises:
        ConfigError: An option is out of range or contradicts another.
        DatasetError: A domain has no images, the classes differ between domains, there is one class only, or a class
            has fewer images than are to be labelled; besides those of ``load_data``.
        TrainingError: The training images do not fit into ``memory``.
    """
    assert isinstance(config, AdaMatchConfig)
    splits = read_splits(config, accelerator, prepare=partial(_with_placeholders, config=config))
    data = load_data(config, accelerator, splits=splits)
    train, validation = data.train, data.validation
    if not isinstance(train, DeviceBatches) or not isinstance(validation, DeviceBatches | None):
        raise TrainingError(
            f"AdaMatch holds its images in memory, and they take more than memory={config.memory:g} GiB; raise it, or "
            "use fewer or smaller images (max_train_images, image_size)"
        )
    if data.num_classes < 2:
        raise DatasetError(f"there is one class only ({data.class_names}); a classifier needs two or more")
    known, others = _parted(train, config, data)
    if validation is not None and config.setting != "ssl":
        of_source, of_target = _by_domain(validation)
        others, validation = _joined(others, of_target), of_source
    if len(torch.unique(known.labels)) < 2:
        raise DatasetError("all labelled images are of one class; a classifier needs two or more")
    per_image = config.standardize == "image"
    others = copy.copy(others)
    others.labels = torch.full_like(others.labels, UNLABELLED)
    batches = TwoViewBatches(
        known,
        others,
        unlabelled_ratio=config.unlabelled_ratio,
        strong=_strong_augmentation(config),
        num_classes=data.num_classes,
        per_image=per_image,
        neighbours=Neighbours(known.images, config.labelled_neighbours) if config.labelled_neighbours else None,
    )
    data = dataclasses.replace(data, train=batches, validation=validation)
    return _standardized(data) if per_image else data


def _strong_augmentation(config: AdaMatchConfig) -> Augment:
    randaugment = RandAugment(config.strong_operations, config.strong_magnitude)
    if not config.strong_convolution:
        return randaugment
    return InTurn(RandomConvolution(config.strong_convolution), randaugment)


def _with_placeholders(loaded: list[Any], *, config: AdaMatchConfig) -> list[Any]:
    """Placeholders where ``uda``'s target has no labels, whose training images need none; test images do."""
    if config.setting != "uda":
        return loaded
    source, target = loaded
    names = target["train"].column_names
    if label_columns(target["train"]) or config.label_column in names:
        return loaded
    known = config.label_column if config.label_column in source["train"].column_names else None
    column = find_label_column(source["train"], known)
    feature = source["train"].features[column]
    warnings.warn(
        f"{config.dataset[1]!r} has no column of class labels (it has {names}): it is adapted to, and not evaluated",
        stacklevel=2,
    )
    filled = {
        name: (split.select([]) if name == "test" else split).add_column(
            column, np.zeros(0 if name == "test" else len(split), np.int64), feature=feature
        )
        for name, split in target.items()
    }
    return [source, datasets.DatasetDict(filled)]


def _parted(train: DeviceBatches, config: AdaMatchConfig, data: PreparedData) -> tuple[DeviceBatches, DeviceBatches]:
    """Labelled and unlabelled training images; those of the target with a label are among both."""
    if config.setting == "ssl":
        return _selected(train, _few_of_each(train, torch.ones_like(train.labels, dtype=torch.bool), config)), train
    assert train.context_ids is not None
    assert data.context_names is not None
    for domain, name in enumerate(data.context_names):
        if not bool((train.context_ids == domain).any()):
            raise DatasetError(f"domain {name!r} has no training image; check train_split and max_train_images")
    source, target = train.context_ids == SOURCE, train.context_ids == TARGET
    labelled = source | _few_of_each(train, target, config) if config.setting == "ssda" else source
    return _selected(train, labelled), _selected(train, target)


def _few_of_each(train: DeviceBatches, among: Tensor, config: AdaMatchConfig) -> Tensor:
    """Return the labelled images, (N,) bool: of each class as many as the config says, drawn by its seed."""
    assert config.labels_per_class is not None
    chosen = torch.zeros_like(among)
    order = epoch_order(len(among), True, config.seed, 0).to(among.device)
    for label in torch.unique(train.labels[among]).tolist():
        rows = order[(among & (train.labels == label))[order]]
        if len(rows) < config.labels_per_class:
            raise DatasetError(
                f"class {label} has {len(rows)} training images, fewer than labels_per_class {config.labels_per_class}"
            )
        chosen[rows[: config.labels_per_class]] = True
    return chosen


def _by_domain(validation: DeviceBatches) -> tuple[DeviceBatches, DeviceBatches]:
    """Validation images of the source and of the target.

    Raises:
        DatasetError: One of them has none.
    """
    assert validation.context_ids is not None
    of_source, of_target = (validation.context_ids == domain for domain in (SOURCE, TARGET))
    for name, chosen in (("source", of_source), ("target", of_target)):
        if not bool(chosen.any()):
            raise DatasetError(
                f"no image of the {name} is left for validation; raise validation_fraction or set it to 0"
            )
    return _selected(validation, of_source), _selected(validation, of_target)


def _selected(batches: DeviceBatches, chosen: Tensor) -> DeviceBatches:
    """The same batches of some of the images, (N,) bool."""
    selected = copy.copy(batches)
    selected.images, selected.labels = batches.images[chosen], batches.labels[chosen]
    selected.rows = batches.rows[chosen]
    if batches.context_ids is not None:
        selected.context_ids = batches.context_ids[chosen]
    return selected


def _joined(first: DeviceBatches, second: DeviceBatches) -> DeviceBatches:
    """The first, with the images of the second besides."""
    joined = copy.copy(first)
    for name in ("images", "labels", "rows", "context_ids"):
        own = getattr(first, name)
        setattr(joined, name, None if own is None else torch.cat([own, getattr(second, name)]))
    return joined


def _standardized(data: PreparedData) -> PreparedData:
    """Validation and test images standardised each by itself, as in training."""
    replaced = {}
    for name in ("validation", "test"):
        batches = getattr(data, name)
        if batches is not None:
            batches = copy.copy(batches)
            batches.augment = ImageStandardization(batches.augment)
            batches.mean, batches.std, batches._tables = (0.0,), (1.0,), None
        replaced[name] = batches
    channels = data.input_size[0]
    return dataclasses.replace(data, **replaced, mean=(0.0,) * channels, std=(1.0,) * channels)
