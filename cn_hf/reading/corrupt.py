"""Leaving out images that cannot be decoded: asked for by name, counted, never silent."""

from __future__ import annotations

import warnings
from typing import Any

import datasets

from cn_hf.errors import DatasetFileError
from cn_hf.reading.access import DatasetLike, Split, features_of, map_splits, map_stream
from cn_hf.reading.images import decode_image, find_image_column, iter_decoded

__all__ = ["drop_corrupt_images"]


def drop_corrupt_images(dataset: DatasetLike, image_column: str | None = None) -> DatasetLike:
    """The dataset without the rows whose image cannot be decoded; a warning says how many and which.

    Streams are filtered as they are read, so nothing can be counted beforehand: each row left out warns by itself.

    Args:
        dataset: ``Dataset``, ``DatasetDict``, ``IterableDataset`` or ``IterableDatasetDict``; left as it is.
        image_column: found by its feature when None.

    Returns:
        A dataset of the same kind.
    """
    return map_splits(dataset, lambda split: _drop_corrupt(split, image_column))


def _drop_corrupt(split: Split, image_column: str | None) -> Split:
    features = features_of(split)
    column = find_image_column(features, image_column)
    if isinstance(split, datasets.IterableDataset):
        return map_stream(split, _DropRows(column), features, batch_size=256)
    batches = iter_decoded(split, column, skip_corrupt=True, progress="checking images")
    good = [row for batch in batches for row in batch.rows]
    if len(good) == len(split):
        return split
    bad = sorted(set(range(len(split))) - set(good))
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    warnings.warn(f"Left out {len(bad)} of {len(split)} images that cannot be read: rows {shown}.", stacklevel=4)
    return split.select(good)


class _DropRows:
    """A stream's batches without the rows whose image does not decode."""

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        good = []
        for place, (row, value) in enumerate(zip(rows, batch[self.column], strict=True)):
            try:
                decode_image(value)
                good.append(place)
            except DatasetFileError as error:
                warnings.warn(f"Left out image {row} of column {self.column!r}: {error}.", stacklevel=2)
        return {name: [values[place] for place in good] for name, values in batch.items()}
