"""Contexts from a column that is there already: CIFAR-100's superclasses (paper IV-C), a domain, a camera, a season.

A ``ClassLabel`` column brings its names with it. Integers, booleans and strings get theirs from the distinct values of
the training split, sorted; a value that the training split lacks has no context.

Shape legend: ``N`` rows; ids are int64 ``(N,)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import numpy.typing as npt
from torch import Tensor

from cn_hf.contexts.base import RowContextSource, check_flag, check_names
from cn_hf.errors import ConfigError, DatasetError, nearest
from cn_hf.reading.access import (
    DatasetLike,
    Split,
    check_columns,
    check_split,
    features_of,
    is_split_dict,
    raw_batches,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Categories", "ColumnContexts"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Categories:
    """The distinct values of a column, numbered: ids are places in ``names``.

    Values are matched by name, so that a ``ClassLabel`` whose names stand in another order, or the names as strings,
    mean the same. Plain integers, where the names were learned from a ``ClassLabel``, are its numbers.
    """

    column: str
    names: tuple[str, ...]
    numbered: bool

    @classmethod
    def of(cls, split: Split, column: str) -> Categories:
        """The categories of a split's column.

        Raises:
            DatasetError: no such column, one of another kind, or without any value.
        """
        features = features_of(split)
        check_columns(features, [column])
        feature = features[column]
        if isinstance(feature, datasets.ClassLabel):
            return cls(column=column, names=check_names(feature.names), numbered=True)
        _check_kind(column, feature)
        if isinstance(split, datasets.Dataset):
            values = set(split.unique(column))
        else:
            values = {value for _, batch in raw_batches(split, [column], 1000) for value in batch[column]}
        values.discard(None)
        if not values:
            raise DatasetError(f"Column {column!r} holds no value in the training split.")
        return cls(column=column, names=check_names([str(value) for value in sorted(values)]), numbered=False)

    def ids(
        self, values: Sequence[Any], rows: Sequence[int], feature: Any, *, unlabelled: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Places of values in ``names``.

        Args:
            values: of the column, ``N``.
            rows: theirs, for messages.
            feature: the column's, in the dataset the values are from.
            unlabelled: the id of -1 in a ``ClassLabel`` column and of None; None makes those an error.

        Raises:
            DatasetError: a value is none of the names; names value and row.
        """
        _check_kind(self.column, feature)
        place = {name: index for index, name in enumerate(self.names)}
        named = feature.names if isinstance(feature, datasets.ClassLabel) else None
        if named is None and self.numbered and feature.dtype not in ("string", "large_string"):
            named = self.names
        ids = np.empty(len(values), dtype=np.int64)
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            if unlabelled is not None and (value is None or (named is not None and value == -1)):
                ids[index] = unlabelled
                continue
            inside = value is not None and (named is None or 0 <= value < len(named))
            name = str(value if named is None else named[value]) if inside else None
            if name not in place:
                raise self._unknown(row, value, name)
            ids[index] = place[name]
        return ids

    def _unknown(self, row: int, value: object, name: str | None) -> DatasetError:
        shown = repr(value) if name is None or name == str(value) else f"{value!r} ({name})"
        known = f"expected 0 to {len(self.names) - 1}." if name is None else nearest(name, self.names)
        return DatasetError(
            f"Row {row} of column {self.column!r} has {shown}, none of the {len(self.names)} values known from "
            f"training; {known}"
        )


def _check_kind(column: str, feature: Any) -> None:
    if isinstance(feature, datasets.ClassLabel):
        return
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if not (dtype in ("bool", "string", "large_string") or dtype.startswith(("int", "uint"))):
        raise DatasetError(
            f"Column {column!r} is {feature}; expected class labels, integers, booleans or strings, one a row."
        )


class ColumnContexts(RowContextSource):
    """The context of a sample is its value in one column.

    Where the column is a ``ClassLabel``, ``apply`` works without ``fit``: the feature holds the names.

    Args:
        column: the column's name, e.g. ``"coarse_label"``.
    """

    type = "column"
    has_tensors = False

    def __init__(self, column: str) -> None:
        if not isinstance(column, str) or not column:
            raise ConfigError(f"Expected the name of a column, received {column!r}.")
        self.column = column
        self._categories: Categories | None = None

    def __repr__(self) -> str:
        return f"ColumnContexts({self.column!r})"

    def _fit_split(self, split: Split) -> None:
        self._set(Categories.of(split, self.column))

    def _set(self, categories: Categories) -> None:
        self._categories = categories
        self._names = categories.names

    def _prepare(self, dataset: DatasetLike) -> None:
        if self.fitted:
            return
        splits = dict(dataset) if is_split_dict(dataset) else {"train": dataset}
        if not splits:
            return
        split = check_split(splits.get("train", next(iter(splits.values()))))
        features = features_of(split)
        check_columns(features, [self.column])
        if isinstance(features[self.column], datasets.ClassLabel):
            self._set(Categories.of(split, self.column))

    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        return [self.column]

    def _batch_ids(
        self, batch: Mapping[str, list[Any]], rows: list[int], features: Mapping[str, Any]
    ) -> npt.NDArray[np.int64]:
        assert self._categories is not None  # apply has checked that the source is fitted
        return self._categories.ids(batch[self.column], rows, features[self.column])

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert self._categories is not None
        return {"column": self.column, "numbered": self._categories.numbered}, {}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        source = cls(config["column"])
        check_flag("numbered", config["numbered"])
        names = check_names(config["names"])
        source._set(Categories(column=source.column, names=names, numbered=config["numbered"]))
        return source
