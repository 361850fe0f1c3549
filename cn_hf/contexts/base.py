"""The base of every context source: names, fit on the training split, apply to any split, predict, save, load.

A source says which context each sample of a dataset belongs to: it adds an int64 ``ClassLabel`` column
``context_ids``. Most differ in three hooks only: what they fit, which columns they read, and how a batch of those
becomes ids.

Shape legend: ``N`` samples, ``T`` contexts; ids are int64 ``(N,)`` in ``0..T-1``.
"""

from __future__ import annotations

import copy
import importlib
import math
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import numpy as np
import numpy.typing as npt
from torch import Tensor

from cn_hf.contexts.storage import CONFIG_FILE, read_source, write_source
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError, DatasetError, nearest
from cn_hf.reading.access import (
    CONTEXT_COLUMN,
    DatasetLike,
    Split,
    check_columns,
    features_of,
    map_splits,
    raw_batches,
    training_split,
    with_context_ids,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ContextSource", "RowContextSource", "check_column_name", "check_flag", "check_names", "check_number"]

_MODULES = ("clusters", "column", "origin", "rules", "statistics")


def check_names(names: object, what: str = "context names") -> tuple[str, ...]:
    """Names as a tuple: at least one, non-empty strings, all different.

    Raises:
        ConfigError: they are not.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"Expected a list of {what}, received {names!r}.")
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"Expected {what} that are non-empty strings, all different; received {list(names)!r}.")
    return tuple(names)


_ENDLESS = 2**31  # a limit against sizes beyond reason: named where it is the one that is broken


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    integer: bool = False,
) -> None:
    """Check that an option is a finite number, and no bool, within limits.

    Args:
        name: of the option, for the message.
        value: anything.
        least: the smallest valid number.
        above: valid numbers are greater.
        below: valid numbers are smaller.
        most: the largest valid number.
        integer: only integers are valid.

    Raises:
        ConfigError: it is not.
    """
    kind: type[Any] = numbers.Integral if integer else numbers.Real
    fitting = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not fitting or not (least <= value <= most and above < value < below):  # type: ignore[operator]  # a number, by now
        limits = ((" of at least ", least), (" above ", above), (" below ", below), (" up to ", most))
        broken = fitting and value >= _ENDLESS  # type: ignore[operator]
        named = [(word, limit) for word, limit in limits if math.isfinite(limit) and (limit < _ENDLESS or broken)]
        words = "".join(f"{word}{limit:g}" for word, limit in named)
        what = "an integer" if integer else "a number"
        raise ConfigError(f"Expected {name} to be {what}{words}, received {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Check that an option is True or False, and nothing that only counts as such.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"Expected {name} to be True or False, received {value!r}.")


def check_column_name(name: str, value: object) -> None:
    """Check that an option names a column, or is None.

    Raises:
        ConfigError: it is anything else.
    """
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"Expected {name} to be the name of a column or None, received {value!r}.")


class ContextSource(ABC):
    """Names the context of each sample.

    Subclasses set ``type``, the name in saved files, and define ``_apply_split`` (most by ``RowContextSource``) and
    ``_from_state``; those that learn from data ``_fit_split``, those that can be asked about images alone ``predict``.
    """

    type: ClassVar[str]
    format: ClassVar[int] = 1
    """Number of the form of its saved files: raised when releases before can no longer read them."""
    has_tensors: ClassVar[bool] = True
    """True if ``_state`` may give tensors."""
    given: ClassVar[tuple[str, ...]] = ()
    """Arguments of ``load`` that stand for parts that are not saved."""
    names_unknown: ClassVar[bool] = False
    """True if ``predict`` may say -1: of no known context."""
    _names: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Context names, in the order of their ids.

        Raises:
            ContextSourceError: they come from data and the source is not fitted yet.
        """
        if self._names is None:
            raise self._not_fitted()
        return self._names

    @property
    def num_contexts(self) -> int:
        """The number of contexts ``T``."""
        return len(self.names)

    @property
    def fitted(self) -> bool:
        """True if the source can name contexts now."""
        return self._names is not None

    def fit(self, dataset: DatasetLike) -> Self:
        """Learn the contexts from the training split alone.

        Args:
            dataset: ``DatasetDict`` or ``IterableDatasetDict``, of which ``"train"`` is used and nothing else; or one
                ``Dataset`` or ``IterableDataset``, taken to be the training split.

        Returns:
            The source itself. After an error it is as it was before.

        Raises:
            DatasetError: no split ``"train"``, a missing column, a value that cannot be used.
            DatasetFileError: an image cannot be decoded; names its row.
        """
        self._fit_split(training_split(dataset))
        return self

    def apply(self, dataset: DatasetLike, *, overwrite: bool = False) -> DatasetLike:
        """A dataset of the same kind with the column ``context_ids``: int64, a ``ClassLabel`` with the context names.

        Streams compute it as they are read. The dataset given is not changed; format and other columns stay.

        Args:
            dataset: ``Dataset``, ``DatasetDict``, ``IterableDataset`` or ``IterableDatasetDict``.
            overwrite: replace an existing column ``context_ids``.

        Raises:
            ContextSourceError: the source is not fitted.
            DatasetError: the column exists already, or one the source reads is missing or holds an unknown value; names
                the row.
            DatasetFileError: an image cannot be decoded; names its row.
        """
        self._prepare(dataset)
        self._check_fitted()
        snapshot = copy.copy(self)  # streams compute later: fitting this source again must not change them
        return map_splits(dataset, lambda split: snapshot._apply_split(split, overwrite))

    @property
    def can_predict(self) -> bool:
        """True if ``predict`` can tell contexts from pixels."""
        return type(self).predict is not ContextSource.predict

    def predict(self, images: Any) -> Tensor:
        """Contexts of images.

        Args:
            images: uint8 tensor ``(N, C, H, W)``, or a list of PIL images.

        Returns:
            int64 ids ``(N,)``, on the images' device.

        Raises:
            ContextSourceError: the context cannot be told from pixels, or the source is not fitted.
        """
        raise ContextSourceError(
            f"{self.__class__.__name__} cannot tell a context from pixels alone. Use ClusterContexts, "
            "BrightnessContexts or RuleContexts(on='image') to predict, or give context_ids."
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the source into ``folder``, whole or not at all: JSON and safetensors, see ``storage``.

        Raises:
            ContextSourceError: the source is not fitted.
            CheckpointError: the folder cannot be written.
        """
        self._check_fitted()
        config, tensors = self._state()
        write_source(folder, {"format": self.format, "type": self.type, "names": list(self.names), **config}, tensors)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        features: Callable[..., Any] | None = None,
        fn: Callable[..., Any] | None = None,
    ) -> Self:
        """Read a source saved by ``save``. Called on ``ContextSource`` it returns whichever source was saved.

        Args:
            folder: where it was saved.
            features: the embedding model of a ``ClusterContexts`` that was fitted with one; models are not saved.
            fn: the function of a ``RuleContexts``; code is not saved.

        Raises:
            CheckpointError: no source there, files truncated or newer than this version, or a source of another class.
            ContextSourceError: ``features`` or ``fn`` is needed and missing, or is not what the source was fitted with.
        """
        config, tensors = read_source(folder)
        known, kind = _known_sources(), str(config.get("type"))
        if kind not in known:
            raise CheckpointError(f"{folder} holds a context source of unknown type; {nearest(kind, known)}")
        source = known[kind]
        if not issubclass(source, cls):
            raise CheckpointError(f"{folder} holds a {source.__name__}, not a {cls.__name__}.")
        given = {name: value for name, value in (("features", features), ("fn", fn)) if value is not None}
        for name in given:
            if name not in source.given:
                raise ContextSourceError(f"A {source.__name__} is whole as saved and takes no {name}=.")
        try:
            if tensors and not source.has_tensors:
                raise ConfigError(f"Expected no tensors, received {sorted(tensors)}.")
            loaded: Self = source._from_state(config, tensors, given)
        except ContextSourceError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{CONFIG_FILE} in {folder} does not describe a {source.__name__} ({type(error).__name__}: {error})."
            ) from error
        return loaded

    def _fit_split(self, split: Split) -> None:  # noqa: B027  # doing nothing is a valid choice
        """Learn from the training split; the default knows all it needs. Assigns nothing before all has succeeded."""

    def _prepare(self, dataset: DatasetLike) -> None:  # noqa: B027  # doing nothing is a valid choice
        """Before ``apply``: where a source can be fitted from a dataset's features alone."""

    @abstractmethod
    def _apply_split(self, split: Split, overwrite: bool) -> Split:
        """The split with its ids added."""

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the values that ``save`` writes besides type and names: JSON values and tensors."""
        return {}, {}

    @classmethod
    @abstractmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        """The source that ``_state`` described; ``given`` are the parts that cannot be saved."""

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise self._not_fitted()

    def _not_fitted(self) -> ContextSourceError:
        return ContextSourceError(
            f"This {self.__class__.__name__} is not fitted: call fit(dataset) with training data, or load a saved one."
        )


class RowContextSource(ContextSource):
    """A source whose ids are a function of each row: subclasses say of which columns, and how a batch becomes ids."""

    batch_size: ClassVar[int] = 1000

    @abstractmethod
    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        """The columns the source reads, which exist."""

    @abstractmethod
    def _batch_ids(
        self, batch: Mapping[str, list[Any]], rows: list[int], features: Mapping[str, Any]
    ) -> npt.NDArray[np.int64]:
        """Ids ``(N,)`` of a batch whose images are undecoded; ``features`` are the dataset's, ``rows`` for messages."""

    def _apply_split(self, split: Split, overwrite: bool) -> Split:
        features = features_of(split)
        columns = self._columns(features)
        check_columns(features, columns)
        if CONTEXT_COLUMN in columns and overwrite:
            raise DatasetError(f"Contexts are read from column {CONTEXT_COLUMN!r}: it cannot be overwritten too.")
        return with_context_ids(
            split,
            self.names,
            _BatchIds(self, features),
            ids=lambda: self._split_ids(split, features, columns),
            overwrite=overwrite,
            batch_size=self.batch_size,
        )

    def _split_ids(
        self, split: datasets.Dataset, features: Mapping[str, Any], columns: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """All ids of a ``Dataset``."""
        batches = raw_batches(split, columns, self.batch_size)
        parts = [self._batch_ids(batch, rows, features) for rows, batch in batches]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])


class _BatchIds:
    """A source and a stream's features as the function mapped over that stream."""

    def __init__(self, source: RowContextSource, features: Mapping[str, Any]) -> None:
        self.source = source
        self.features = features

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> npt.NDArray[np.int64]:
        return self.source._batch_ids(batch, rows, self.features)


def _known_sources() -> dict[str, Any]:
    """Sources by ``type``: the package's and every subclass a user has defined."""
    for module in _MODULES:
        importlib.import_module(f"cn_hf.contexts.{module}")
    known: dict[str, Any] = {}
    waiting: list[Any] = [ContextSource]
    while waiting:
        for source in waiting.pop().__subclasses__():
            waiting.append(source)
            if "type" in vars(source):
                known[source.type] = source
    return known
