"""One dataset's split in the form that several datasets share: same columns, one image mode and size, one label space.

Of a ``Dataset``, images of the right size keep their encoded bytes, and their mode is converted where they are decoded;
only images of another size are written anew (PNG, lossless). Streams do all of it as they are read.

Shape legend: ``N`` rows; labels and ids are int64 ``(N,)``.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image

from cn_hf.contexts.column import Categories
from cn_hf.reading.access import (
    CONTEXT_COLUMN,
    Split,
    check_columns,
    features_of,
    map_stream,
    raw_batches,
    raw_features,
    with_features,
)
from cn_hf.reading.images import DECODE_ERRORS, decode_rows, find_image_column, open_image, to_image, unreadable
from cn_hf.reading.loading import LABEL_NAMES, find_label_column, label_columns

__all__ = ["Blend", "Origin", "blended_label_column", "first_image_size", "unify"]

UNLABELLED = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """The form shared by all: output columns, image mode and size (height, width; None leaves sizes), and names."""

    image_column: str
    label_column: str
    image_mode: str
    decode_size: tuple[int, int] | None
    names: tuple[str, ...]
    class_names: tuple[str, ...] | None

    @property
    def features(self) -> datasets.Features:
        """Features of a blended dataset."""
        features: dict[str, Any] = {self.image_column: datasets.Image(mode=self.image_mode)}
        if self.class_names is not None:
            features[self.label_column] = datasets.ClassLabel(names=list(self.class_names))
        return datasets.Features({**features, CONTEXT_COLUMN: datasets.ClassLabel(names=list(self.names))})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One dataset in a blend: its ``index`` among the names, columns, and labels as ``categories`` plus ``offset``."""

    index: int
    image_column: str | None
    label_column: str | None
    categories: Categories | None
    offset: int = 0

    def labels(self, values: Sequence[Any], rows: Sequence[int], feature: Any) -> npt.NDArray[np.int64]:
        """Labels of the blend; -1 stays -1, which is how ``ClassLabel`` marks unlabelled rows."""
        assert self.categories is not None  # asked only where the blend has labels
        ids = self.categories.ids(values, rows, feature, unlabelled=UNLABELLED)
        return np.where(ids == UNLABELLED, ids, ids + self.offset)


def blended_label_column(features: Mapping[str, Any], label_column: str | None = None) -> str:
    """The column of class labels: the one named, or what ``find_label_column`` finds; else strings of a usual name.

    Raises:
        DatasetError: no such column, none at all, or several to choose from.
    """
    if label_column is None:
        strings = [name for name in LABEL_NAMES if name in features and not label_columns(features)]
        return strings[0] if strings else find_label_column(features)
    check_columns(features, [label_column])
    return label_column


def first_image_size(split: Split, image_column: str | None) -> tuple[int, int] | None:
    """Height and width of a split's first image; None of an empty split."""
    column = find_image_column(features_of(split), image_column)
    for rows, batch in raw_batches(split, [column], 1):
        image = open_image(batch[column][0], rows[0], column, None)
        return image.height, image.width
    return None


def unify(split: Split, origin: Origin, blend: Blend) -> Split:
    """A split in the blend's form.

    Args:
        split: a ``Dataset`` or ``IterableDataset`` from ``origin``.
        origin: where it is from.
        blend: the form.

    Returns:
        A split of the same kind with the features ``blend.features``, and no output format.

    Raises:
        DatasetError: a column is missing, or a label unknown; names its row.
        DatasetFileError: an image cannot be read; names its row.
    """
    features = features_of(split)
    columns = {find_image_column(features, origin.image_column): blend.image_column}
    if blend.class_names is not None:
        columns[blended_label_column(features, origin.label_column)] = blend.label_column
    if isinstance(split, datasets.IterableDataset):
        return _unify_stream(split, features, columns, origin, blend)
    image, label = next(iter(columns)), next(reversed(columns))
    unified = with_features(split.with_format(None), raw_features(features)).select_columns([image])
    unified = unified.rename_columns({image: blend.image_column}) if image != blend.image_column else unified
    resize = _Resize(blend, image)
    if blend.decode_size is not None and resize.needed(unified):
        unified = unified.map(
            resize,
            batched=True,
            batch_size=256,
            with_indices=True,
            features=unified.features,
            desc="resizing images",
        )
    unified = with_features(unified, datasets.Features({blend.image_column: blend.features[blend.image_column]}))
    if blend.class_names is not None:
        batches, feature = raw_batches(split, [label], 1000), features[label]
        labels = [origin.labels(batch[label], rows, feature) for rows, batch in batches]
        values = np.concatenate([np.empty(0, dtype=np.int64), *labels])
        unified = unified.add_column(blend.label_column, values, feature=blend.features[blend.label_column])
    ids = np.full(len(unified), origin.index, dtype=np.int64)
    return unified.add_column(CONTEXT_COLUMN, ids, feature=blend.features[CONTEXT_COLUMN])


def _unify_stream(
    split: datasets.IterableDataset,
    features: datasets.Features,
    columns: Mapping[str, str],
    origin: Origin,
    blend: Blend,
) -> datasets.IterableDataset:
    # Undecoded while columns are renamed, which a stream does by a map that would encode images again.
    raw = with_features(split.with_format(None), raw_features(features)).select_columns(list(columns))
    renamed = raw.rename_columns({old: new for old, new in columns.items() if old != new})
    label = next((features[old] for old, new in columns.items() if new == blend.label_column), None)
    return map_stream(renamed, _UnifyBatch(origin, blend, label), blend.features, batch_size=256)


class _UnifyBatch:
    """The function mapped over a stream; a class, so that data workers can pickle it."""

    def __init__(self, origin: Origin, blend: Blend, label: Any) -> None:
        self.origin = origin
        self.blend = blend
        self.label = label

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {CONTEXT_COLUMN: [self.origin.index] * len(rows)}
        if self.blend.class_names is not None:
            labels = self.origin.labels(batch[self.blend.label_column], rows, self.label)
            columns[self.blend.label_column] = labels.tolist()
        if self.blend.decode_size is not None:
            columns |= _Resize(self.blend, self.blend.image_column)(batch, rows)
        return columns


class _Resize:
    """Images of another size than the blend's, resized and written as PNG; all others pass as they are."""

    def __init__(self, blend: Blend, column: str) -> None:
        self.blend = blend
        self.column = column  # its name before the blend, for messages

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        values = batch[self.blend.image_column]
        return {
            self.blend.image_column: [
                value if self._fits(value, row) else self._resized(value, row)
                for value, row in zip(values, rows, strict=True)
            ]
        }

    def needed(self, split: datasets.Dataset) -> bool:
        """True if any image has another size; reads headers only."""
        column = self.blend.image_column
        for rows, batch in raw_batches(split, [column], 256):
            if not all(self._fits(value, row) for value, row in zip(batch[column], rows, strict=True)):
                return True
        return False

    def _fits(self, value: Any, row: int) -> bool:
        if not isinstance(value, dict) or value["bytes"] is None:
            image = open_image(value, row, self.column, None)
            return (image.height, image.width) == self.blend.decode_size
        try:
            image = PIL.Image.open(io.BytesIO(value["bytes"]))  # reads the header, decodes nothing
            sideways = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
        except DECODE_ERRORS as error:
            raise unreadable(row, self.column, f"{type(error).__name__}: {error}") from error
        size = (image.width, image.height) if sideways else (image.height, image.width)
        return size == self.blend.decode_size

    def _resized(self, value: Any, row: int) -> dict[str, Any]:
        blend = self.blend
        [array] = decode_rows([value], [row], self.column, mode=blend.image_mode, size=blend.decode_size)
        buffer = io.BytesIO()
        to_image(array).save(buffer, format="PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}
