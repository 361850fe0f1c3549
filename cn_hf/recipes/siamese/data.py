"""The data of a Siamese run: splits, identities, contexts, and batches of pairs.

Identities are numbered over all splits together, so that a test split may hold objects that training never shows
(re-identification) as well as the same ones (a closed set); which of both it is, is part of the result.

N images of a split.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator

from cn_hf.data import DeviceBatches, PreparedData, find_image_column, find_label_column
from cn_hf.errors import ConfigError, ContextIdError, DatasetError, nearest
from cn_hf.patching.config import BASELINES
from cn_hf.recipes.classifier.data import datasets_bars, load_data, read_splits
from cn_hf.recipes.siamese.config import VIEWS, SiameseConfig
from cn_hf.recipes.siamese.pairs import PairBatches

__all__ = ["SiameseData", "load_siamese_data"]

IDENTITY = "identity_number"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiameseData:
    """The data of a Siamese run.

    Attributes:
        prepared: Images of each split with their identities as labels, in the dataset's order but for training.
        pairs: Training pairs.
        views: Whether the same object is the same image in two views.
        identities: Names of the identities.
        pictures: The splits themselves, undecoded.
        image_column: Of ``pictures``.
    """

    prepared: PreparedData
    pairs: PairBatches
    views: bool
    identities: tuple[str, ...]
    pictures: Any
    image_column: str

    @property
    def held_out(self) -> str:
        """The split that is reported on."""
        return "test" if self.prepared.test is not None else "validation"

    def images(self, split: str) -> DeviceBatches:
        """A split's images.

        Raises:
            DatasetError: There is no such split.
        """
        batches = getattr(self.prepared, split)
        if batches is None:
            raise DatasetError(f"the data has no {split} split; name one, or give validation_fraction")
        return cast(DeviceBatches, batches)

    def judged(self, split: str) -> DeviceBatches:
        """A split's images as its pairs are judged on: augmented where pairs are two views."""
        batches = copy.copy(self.images(split))
        if self.views:
            batches.augment = self.images("train").augment
        return batches

    def calibration(self) -> PreparedData:
        """The data with training images that are not augmented: their own statistics are wanted."""
        train, held_out = copy.copy(self.images("train")), self.images(self.held_out)
        train.augment = held_out.augment  # the resize alone
        return dataclasses.replace(self.prepared, train=train)


def load_siamese_data(config: SiameseConfig, accelerator: Accelerator) -> SiameseData:
    """Load what ``config`` asks for, this process's share of each batch.

    Raises:
        ConfigError: No identity column is named (the columns are listed), an option is out of range, or the images do
            not fit into ``memory``.
        DatasetError: A split or column is missing, there are fewer than two identities or contexts, or a context has
            no image in a split that needs it.
        DatasetFileError: A dataset or image cannot be read.
        ContextIdError: ``source_context`` or ``target_context`` is no context of the data.
        ContextSourceError: The contexts cannot be named.
    """
    with datasets_bars(config.progress and accelerator.is_main_process):
        return _load(config, accelerator)


def _load(config: SiameseConfig, accelerator: Accelerator) -> SiameseData:
    several, views = len(config.dataset) > 1, config.identity_column == VIEWS
    named = None if views or not several else config.identity_column  # several are blended by their label columns
    splits, origins = read_splits(config.as_training_config(label_column=named), accelerator)
    column = find_label_column(splits) if several else config.identity_column
    pictures, names = _numbered(splits, VIEWS if views else column, replaced=column if several else None)
    labelled = config.as_training_config(label_column=None if several else IDENTITY)
    prepared = load_data(labelled, accelerator, splits=(pictures, origins))
    _check(config, prepared)
    return SiameseData(
        prepared=prepared,
        pairs=PairBatches(cast(DeviceBatches, prepared.train), views=views),
        views=views,
        identities=names,
        pictures=pictures,
        image_column=find_image_column(pictures, None if several else config.image_column),
    )


def _numbered(splits: Any, column: str | None, *, replaced: str | None) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """The splits with identities numbered over all of them, as a column of its own or in place of one; their names."""
    features = next(iter(splits.values())).features
    if column is None:
        listed = ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in features.items())
        raise ConfigError(
            f"say which column tells what object an image shows: --identity-column NAME, of {listed}; or "
            f"--identity-column {VIEWS}, where nothing tells, to make pairs of two views of an image"
        )
    if column == VIEWS:
        numbers = itertools.count()
        values = {name: [f"image {next(numbers)}" for _ in range(len(split))] for name, split in splits.items()}
    else:
        values = {name: _values(split, column, name) for name, split in splits.items()}
    number = {
        value: place for place, value in enumerate(sorted({value for listed in values.values() for value in listed}))
    }
    feature = datasets.ClassLabel(names=list(number))
    numbered = datasets.DatasetDict()
    for name, split in splits.items():
        bare = split if replaced is None else split.remove_columns(replaced)
        numbered[name] = bare.add_column(
            replaced or IDENTITY, [number[value] for value in values[name]], feature=feature
        )
    return numbered, tuple(number)


def _values(split: datasets.Dataset, column: str, name: str) -> list[str]:
    """A column's values as text.

    Raises:
        DatasetError: No such column, a value is missing, or values that name nothing.
    """
    if column not in split.features:
        raise DatasetError(f"no column {column!r} of identities; {nearest(column, [*split.features, VIEWS])}")
    feature = split.features[column]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value) or getattr(feature, "dtype", "").startswith(
        "float"
    ):
        raise DatasetError(
            f"column {column!r} is {feature}; identities are ClassLabels, integers or text, one for each image"
        )
    values = list(split[column])
    for row, value in enumerate(values):
        if value is None or (isinstance(feature, datasets.ClassLabel) and value < 0):
            raise DatasetError(f"row {row} of split {name!r} has no identity in column {column!r}")
    return [feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value) for value in values]


def _check(config: SiameseConfig, prepared: PreparedData) -> None:
    """That the images are held in memory, and that contexts have images where they are needed."""
    for split, batches in prepared.splits().items():
        if not isinstance(batches, DeviceBatches):
            raise ConfigError(f"the images of split {split!r} do not fit into memory {config.memory:g} GiB; give more")
    if prepared.validation is None:
        raise DatasetError("the threshold is chosen on validation pairs; give validation_split or validation_fraction")
    names = prepared.context_names
    if config.mode in ("none", *BASELINES) and names is None:
        return
    if names is None:
        raise ConfigError(
            f"mode {config.mode!r} needs contexts and the data has none; say where they come from: --contexts "
            "column:NAME (a folder's name is column:label), origin (of several datasets) or brightness"
        )
    if len(names) < 2:
        raise DatasetError(f"restyling needs two contexts at least; contexts {config.contexts!r} give {list(names)}")
    for name in (config.source_context, config.target_context):
        if name not in names:
            raise ContextIdError(f"unknown context {name!r} (source_context, target_context); {nearest(name, names)}")
    for split in ("train", "validation" if prepared.test is None else "test"):
        contexts = getattr(prepared, split).context_ids
        if contexts.is_floating_point():
            raise DatasetError("contexts must be one for each image, not weights of several")
        counts = dict(zip(names, torch.bincount(contexts.cpu(), minlength=len(names)).tolist(), strict=True))
        wanted = names if split == "train" else (config.source_context, config.target_context)
        if empty := [name for name in wanted if not counts[name]]:
            raise DatasetError(
                f"split {split!r} has no image of context {', '.join(map(repr, empty))} (images: "
                f"{', '.join(f'{name} {count}' for name, count in counts.items())}); contexts were {config.contexts!r}"
            )
