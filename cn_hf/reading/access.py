"""The four kinds of datasets seen as one: walk their splits, read rows undecoded, add the column of context ids.

The kinds are ``Dataset``, ``DatasetDict``, ``IterableDataset`` and ``IterableDatasetDict`` of the datasets library. No
function changes what it is given, and none re-encodes an image: images pass through as the bytes they were.

Shape legend: ``N`` rows of a split or batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
from datasets.table import ConcatenationTable

from cn_hf.errors import CnHfError, DatasetError, InputTypeError, nearest

__all__ = [
    "CONTEXT_COLUMN",
    "DatasetLike",
    "Split",
    "check_columns",
    "check_split",
    "column_exists",
    "features_of",
    "is_split_dict",
    "map_splits",
    "map_stream",
    "raw_batches",
    "raw_features",
    "restore_format",
    "training_split",
    "warn_of_test_split",
    "with_context_ids",
    "with_features",
]

CONTEXT_COLUMN = "context_ids"

Split: TypeAlias = Any
"""A ``Dataset`` or ``IterableDataset``; the library is untyped."""
DatasetLike: TypeAlias = Any
"""A ``Split``, or a ``DatasetDict`` or ``IterableDatasetDict`` of them."""
ComputeIds: TypeAlias = Callable[[dict[str, list[Any]], list[int]], npt.NDArray[np.int64]]
"""From a batch with undecoded images, and its rows, to int64 ids ``(N,)``. Must be picklable for data workers."""

_SAMPLE = 16  # rows from which the features of an untyped stream are told


def is_split_dict(dataset: object) -> bool:
    """True if the dataset holds splits by name."""
    return isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict)


def map_splits(dataset: DatasetLike, function: Callable[[Split], Split]) -> DatasetLike:
    """Apply ``function`` to the dataset, or to each of its splits; an error then says which split it was.

    Raises:
        InputTypeError: not a dataset of the datasets library.
    """
    if not is_split_dict(dataset):
        return function(check_split(dataset))
    mapped = {}
    for name, split in dataset.items():
        try:
            mapped[name] = function(check_split(split))
        except CnHfError as error:
            raise type(error)(f"Split {name!r}: {error}") from error
    return type(dataset)(mapped)


def check_split(split: object) -> Split:
    """The split itself, if it is one.

    Raises:
        InputTypeError: not a ``Dataset`` or ``IterableDataset``.
    """
    if not isinstance(split, datasets.Dataset | datasets.IterableDataset):
        raise InputTypeError(
            "Expected a Dataset, DatasetDict, IterableDataset or IterableDatasetDict of `datasets`, received "
            f"{type(split).__name__}. Load one with datasets.load_dataset, or make one with datasets.Dataset.from_dict."
        )
    return split


def training_split(dataset: DatasetLike) -> Split:
    """The split that sources are fitted on: ``"train"`` of a dict, a single split itself.

    Raises:
        DatasetError: a dict without ``"train"``.
        InputTypeError: not a dataset.
    """
    if is_split_dict(dataset):
        if "train" not in dataset:
            raise DatasetError(
                f"No split 'train' among {list(dataset)}. Contexts are fitted on the training split alone: give it by "
                "itself, fit(dataset[...]), or rename it to 'train'."
            )
        return check_split(dataset["train"])
    return check_split(dataset)


def warn_of_test_split(split: Split) -> None:
    """Warn if what is about to be fitted on calls itself a test split."""
    if split.split is not None and str(split.split).startswith("test"):
        warnings.warn(
            f"Fitting contexts on split {str(split.split)!r}: contexts of test data must come from training data.",
            stacklevel=4,
        )


def features_of(split: Split) -> datasets.Features:
    """The features of a split; those of an untyped stream are told from its first rows.

    Raises:
        DatasetError: an untyped stream without rows.
    """
    if split.features is not None:
        return split.features
    rows = list(split.with_format(None).take(_SAMPLE))
    if not rows:
        raise DatasetError("The stream has no rows, and no features to tell its columns from.")
    return datasets.Dataset.from_list(rows).features


def check_columns(features: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Check that all ``columns`` exist.

    Raises:
        DatasetError: names the first missing one and the nearest that exists.
    """
    for column in columns:
        if column not in features:
            raise DatasetError(f"No column {column!r} in the dataset; {nearest(column, features)}")


def raw_features(features: Mapping[str, Any]) -> datasets.Features:
    """The same features with images left as their encoded bytes or path."""
    return datasets.Features(
        {
            name: datasets.Image(mode=feature.mode, decode=False) if isinstance(feature, datasets.Image) else feature
            for name, feature in features.items()
        }
    )


def with_features(split: Split, features: datasets.Features) -> Split:
    """The split read through other features of the same storage (decoded or not, another image mode)."""
    if isinstance(split, datasets.IterableDataset):
        return split.cast(features)
    for name, feature in features.items():
        if split.features[name] != feature:
            split = _without_empty_blocks(split).cast_column(name, feature)
    return split


def _without_empty_blocks(split: datasets.Dataset) -> datasets.Dataset:
    """The same rows and columns. Where one added in memory was removed, a block of none stays, and a cast breaks it."""
    blocks = getattr(split.data, "blocks", None)
    if blocks is None or all(block.num_columns for row in blocks for block in row) or not split.column_names:
        return split
    split = copy.copy(split)
    split._data = ConcatenationTable.from_blocks([[block for block in row if block.num_columns] for row in blocks])
    return split


def raw_batches(
    split: Split, columns: Sequence[str], batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
    """Batches of ``columns`` with images undecoded, and the rows they are: all, or those of a ``Dataset`` asked for."""
    features = features_of(split)
    check_columns(features, columns)
    if rows is not None:
        split = split.select(rows)
    raw = with_features(split.with_format(None), raw_features(features)).select_columns(list(columns))
    start = 0
    for batch in raw.iter(batch_size=batch_size):
        stop = start + len(batch[columns[0]])
        yield list(range(start, stop) if rows is None else rows[start:stop]), batch
        start = stop


def with_context_ids(
    split: Split,
    names: Sequence[str],
    compute: ComputeIds,
    *,
    ids: Callable[[], npt.NDArray[np.int64]],
    overwrite: bool,
    batch_size: int,
) -> Split:
    """The split with an int64 ``ClassLabel`` column ``context_ids``, its format kept.

    Args:
        split: a ``Dataset``, for which ``ids()`` gives all ids at once, or a stream, for which ``compute`` is mapped.
        names: the contexts' names.
        compute: see ``ComputeIds``.
        ids: all ids of a ``Dataset``, int64 ``(N,)``.
        overwrite: replace a column of that name instead of refusing.
        batch_size: rows per call of ``compute``.

    Raises:
        DatasetError: the column exists already.
    """
    if CONTEXT_COLUMN in features_of(split):
        if not overwrite:
            raise column_exists()
        if isinstance(split, datasets.Dataset):
            split = restore_format(split.remove_columns(CONTEXT_COLUMN), split)
    label = datasets.ClassLabel(names=list(names))
    if isinstance(split, datasets.Dataset):
        added = split.add_column(CONTEXT_COLUMN, np.asarray(ids(), dtype=np.int64), feature=label)
        return restore_format(added, split)
    return map_stream(split, _AddIds(compute), {**features_of(split), CONTEXT_COLUMN: label}, batch_size=batch_size)


def column_exists() -> DatasetError:
    """The error for a dataset that has context ids already."""
    return DatasetError(
        f"The dataset has a column {CONTEXT_COLUMN!r} already. Replace it with apply(dataset, overwrite=True)."
    )


def map_stream(
    split: Split,
    function: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    features: Mapping[str, Any],
    *,
    batch_size: int,
) -> Split:
    """A stream with columns added or replaced, typed by ``features``, its format kept.

    Args:
        split: an ``IterableDataset``.
        function: from a batch with undecoded images, and its rows, to the columns to add or replace.
        features: of the result.
        batch_size: rows per call.
    """
    raw = with_features(split.with_format(None), raw_features(features_of(split)))
    # Typed by a cast after the map: a map given features= would decode images there and ignore every later cast.
    mapped = raw.map(_KeepImages(function), batched=True, batch_size=batch_size, with_indices=True)
    return restore_format(with_features(mapped, datasets.Features(features)), split)


class _AddIds:
    """Batch to context ids; a class, so that data workers can pickle it."""

    def __init__(self, compute: ComputeIds) -> None:
        self.compute = compute

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        return {CONTEXT_COLUMN: self.compute(batch, rows).tolist()}


class _KeepImages:
    """Calls the mapped function; images that an earlier map decoded go on losslessly.

    The library would encode them again in the format they came in, JPEG for one; a copy forgets that format.
    """

    def __init__(self, function: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]) -> None:
        self.function = function

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        kept = {
            name: [value.copy() if isinstance(value, PIL.Image.Image) else value for value in values]
            for name, values in batch.items()
            if any(isinstance(value, PIL.Image.Image) for value in values)
        }
        return {**kept, **self.function(batch, list(rows))}


def restore_format(split: Split, original: Split) -> Split:
    """The split with the output format of ``original``, which adding a column drops."""
    if isinstance(original, datasets.IterableDataset):
        formatting = getattr(original, "_formatting", None)  # streams have no public way to ask
        kind = getattr(formatting, "format_type", None)
        return split if kind is None else split.with_format(kind)
    form = original.format
    hidden = set(original.column_names) - set(form["columns"])
    columns = [name for name in split.column_names if name not in hidden] if hidden else None
    return split.with_format(
        form["type"], columns=columns, output_all_columns=form["output_all_columns"], **form["format_kwargs"]
    )
