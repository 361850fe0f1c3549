"""Contexts by origin: several datasets blended into one; the context is the dataset a sample is from (paper IV-D, F).

    source = OriginContexts({"cifar100": cifar, "mnist": mnist}, labels="offset")
    blended = source.blend()                           # both, with columns image, label, context_ids
    digits = source.apply(mnist, origin="mnist")       # one of them alone, in the same form

Blending gives all datasets one image column, one image mode and size, and one label column; other columns are left out.
Whether class 3 of one means class 3 of another cannot be told from data, so the caller says it:

- ``labels="offset"``: each dataset keeps its own classes, one after the other (CIFAR-100 + MNIST: 110 classes);
- ``labels="shared"``: the datasets have the same classes, matched by name (MNIST and SVHN: 10 classes);
- ``labels="none"``: labels are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
from torch import Tensor

from cn_hf.contexts.base import ContextSource, check_column_name, check_flag, check_names, check_number
from cn_hf.contexts.blending import Blend, Origin, blended_label_column, first_image_size, unify
from cn_hf.contexts.column import Categories
from cn_hf.errors import (
    CheckpointError,
    CnHfError,
    ConfigError,
    ContextSourceError,
    DatasetError,
    InputTypeError,
    nearest,
)
from cn_hf.reading.access import (
    CONTEXT_COLUMN,
    DatasetLike,
    Split,
    check_split,
    column_exists,
    features_of,
    is_split_dict,
    map_splits,
    training_split,
)
from cn_hf.reading.images import accepts_image_size, check_image_options, find_image_column

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OriginContexts"]

LABELS = ("offset", "shared", "none")
_SHUFFLE_BUFFER = 1000


class OriginContexts(ContextSource):
    """Blends datasets; the context of a sample is the dataset it came from.

    Args:
        origins: datasets by name, in the order of the context ids: all ``Dataset``, all ``DatasetDict`` (blended split
            by split), or all streams of either kind.
        labels: ``"offset"``, ``"shared"`` or ``"none"``; see the module. Required.
        image_columns: image column by origin; those not named are found by their feature.
        label_columns: label column by origin; those not named are found as ``cn_hf.data.find_label_column`` finds them.
        image_column: its name in the blend.
        label_column: its name in the blend.
        image_mode: ``"RGB"`` or ``"L"``, of all images.
        decode_size: int or (height, width), of all images; None resizes only if the origins' first images differ in
            size, and then all to the largest height and width of those; ``"keep"`` never resizes.
        shuffle_seed: shuffles what ``blend`` returns (streams take from the origins in turn, then shuffle in a buffer
            of 1,000); None keeps the origins one after the other.

    Raises:
        ConfigError: ``labels`` is not said, or an option is out of range.
        ContextSourceError: a column is named for an unknown origin.
        DatasetError: a column is missing, or labels said to be shared differ; names the origin.
        InputTypeError: not a dict of datasets of one kind.
    """

    type = "origin"
    has_tensors = False

    @accepts_image_size
    def __init__(
        self,
        origins: Mapping[str, DatasetLike],
        labels: str | None = None,
        *,
        image_columns: Mapping[str, str] | None = None,
        label_columns: Mapping[str, str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        image_mode: str = "RGB",
        decode_size: int | Sequence[int] | str | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if is_split_dict(origins) or not isinstance(origins, Mapping):
            raise InputTypeError(f"Expected a dict from names to datasets, received {type(origins).__name__}.")
        if labels not in LABELS:
            raise ConfigError(
                f"labels is {labels!r}. Say how the datasets' labels go together: 'offset' (each has its own classes, "
                "one after the other), 'shared' (the same classes, matched by name) or 'none'."
            )
        names = check_names(list(origins), "names of origins")
        if shuffle_seed is not None:
            check_number("shuffle_seed", shuffle_seed, least=0, integer=True)
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            if not isinstance(column, str) or not column:
                raise ConfigError(f"Expected {option} to be the name of a column, received {column!r}.")
        for option, named in (("image_columns", image_columns), ("label_columns", label_columns)):
            if named is not None and not isinstance(named, Mapping):
                raise ConfigError(f"Expected {option} to be a dict from origins to columns, received {named!r}.")
            for column in (named or {}).values():
                check_column_name(option, column)
        if image_column == label_column:
            raise ConfigError(f"image_column and label_column are both {image_column!r}.")
        size = None if isinstance(decode_size, str) else check_image_options(image_mode, decode_size)
        if isinstance(decode_size, str) and decode_size != "keep":
            raise ConfigError(f"decode_size is {decode_size!r}; expected an int, (height, width), 'keep' or None.")
        _check_same_kind(origins)
        image_columns, label_columns = image_columns or {}, label_columns or {}
        _check_known((*image_columns, *label_columns), names)
        described = []
        for index, name in enumerate(names):
            with _naming(name):
                split = training_split(origins[name])
                columns = image_columns.get(name), label_columns.get(name)
                described.append(_describe_origin(index, split, labels, *columns))
        self._names = names
        self.labels = labels
        self.shuffle_seed = shuffle_seed
        self.datasets: dict[str, DatasetLike] | None = dict(origins)
        class_names, self._origins = _number_classes(names, labels, described)
        self._form = Blend(
            image_column=image_column,
            label_column=label_column,
            image_mode=image_mode,
            decode_size=_common_size(origins, self._origins) if decode_size is None else size,
            names=names,
            class_names=class_names,
        )

    def __repr__(self) -> str:
        return f"OriginContexts({list(self.names)}, labels={self.labels!r})"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Classes of the blend, in the order of its labels; None without labels."""
        return self._form.class_names

    def fit(self, dataset: DatasetLike = None) -> Self:
        """Nothing is left to learn: the datasets were given when the source was made."""
        return self

    def blend(self, origins: Mapping[str, DatasetLike] | None = None) -> DatasetLike:
        """The datasets as one, with the columns image, label and ``context_ids``.

        Args:
            origins: other datasets of the same names, all or some; None for those the source was made with.

        Returns:
            A dataset of their kind. Of dicts, the splits that all of them have; a warning names the others.

        Raises:
            ContextSourceError: a name is none of the source's, or a loaded source is given no datasets.
        """
        return self.apply(origins)

    def apply(
        self,
        dataset: DatasetLike | Mapping[str, DatasetLike] = None,
        *,
        overwrite: bool = False,
        origin: str | None = None,
    ) -> DatasetLike:
        """A blend, or one dataset in the form of the blend.

        Args:
            dataset: a dict from origins to datasets, or None for those the source was made with: blended. Or one
                dataset, of ``origin``: brought into the blend's form, with that origin's labels and context.
            overwrite: accept datasets that have a column ``context_ids``; it is replaced.
            origin: name of the one dataset's origin; not needed for an object the source was made with.

        Raises:
            ContextSourceError: the origin is unknown or not said.
            DatasetError: a column is missing, or a label unknown; names origin and row.
            DatasetFileError: an image cannot be read; names origin and row.
        """
        if dataset is None:
            dataset = self.datasets
        if dataset is None:
            raise ContextSourceError("A saved source holds no datasets. Give them: blend({name: dataset, ...}).")
        if isinstance(dataset, Mapping) and not is_split_dict(dataset):
            if origin is not None:
                raise ConfigError(f"origin={origin!r} is for one dataset; a dict of datasets names its origins itself.")
            return self._blend(dataset, overwrite)
        name = origin if origin is not None else self._recognise(dataset)
        _check_known([name], self.names)
        return self._unified(name, dataset, overwrite)

    def _recognise(self, dataset: DatasetLike) -> str:
        for name, known in (self.datasets or {}).items():
            if known is dataset or (is_split_dict(known) and any(split is dataset for split in known.values())):
                return name
        raise ContextSourceError(
            f"Of which origin is this dataset? Say it: apply(dataset, origin=...), one of {list(self.names)}."
        )

    def _blend(self, origins: Mapping[str, DatasetLike], overwrite: bool) -> DatasetLike:
        _check_known(origins, self.names)
        _check_same_kind(origins)
        parts = [self._unified(name, origins[name], overwrite) for name in self.names if name in origins]
        if not is_split_dict(parts[0]):
            return self._combine(parts)
        shared = [split for split in parts[0] if all(split in part for part in parts)]
        others = sorted({split for part in parts for split in part} - set(shared))
        if not shared:
            raise DatasetError(f"The datasets have no split in common: {[list(part) for part in parts]}.")
        if others:
            warnings.warn(f"Left out splits that not all of {list(origins)} have: {others}.", stacklevel=4)
        return type(parts[0])({split: self._combine([part[split] for part in parts]) for split in shared})

    def _unified(self, name: str, dataset: DatasetLike, overwrite: bool) -> DatasetLike:
        def one(split: Split) -> Split:
            if CONTEXT_COLUMN in features_of(split) and not overwrite:
                raise column_exists()
            return unify(split, self._origins[self.names.index(name)], self._form)

        with _naming(name):
            return map_splits(dataset, one)

    def _combine(self, parts: list[Split]) -> Split:
        if self.shuffle_seed is None:
            return datasets.concatenate_datasets(parts)
        if isinstance(parts[0], datasets.Dataset):
            return datasets.concatenate_datasets(parts).shuffle(seed=self.shuffle_seed)
        mixed = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        return mixed.shuffle(seed=self.shuffle_seed, buffer_size=_SHUFFLE_BUFFER)

    def _apply_split(self, split: Split, overwrite: bool) -> Split:
        return self.apply(split, overwrite=overwrite)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "labels": self.labels,
            "shuffle_seed": self.shuffle_seed,
            "form": dataclasses.asdict(self._form),
            "origins": [dataclasses.asdict(origin) for origin in self._origins],
        }
        return config, {}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        form, names = dict(config["form"]), check_names(config["names"])
        if "image_size" in form:  # its name before
            form["decode_size"] = form.pop("image_size")
        for key in ("names", "class_names", "decode_size"):
            form[key] = None if form[key] is None else tuple(form[key])
        source = cls.__new__(cls)  # not through __init__, which needs the datasets
        source._names, source._form = names, Blend(**form)
        source.labels, source.shuffle_seed = config["labels"], config["shuffle_seed"]
        source.datasets = None
        source._origins = tuple(_read_origin(origin) for origin in config["origins"])
        if source._form.names != names or len(source._origins) != len(names) or source.labels not in LABELS:
            raise CheckpointError(f"The saved blend of {list(names)} contradicts itself.")
        source._check_saved()
        return source

    def _check_saved(self) -> None:
        """Refuse what no ``save`` writes."""
        form = self._form
        if self.shuffle_seed is not None:
            check_number("shuffle_seed", self.shuffle_seed, least=0, integer=True)
        check_image_options(form.image_mode, form.decode_size)
        for column in (form.image_column, form.label_column):
            check_column_name("form", column)
        classes = () if form.class_names is None else check_names(form.class_names, "class names")
        if (form.class_names is None) != (self.labels == "none") or form.image_column == form.label_column:
            raise ConfigError("The form of the saved blend does not fit its labels.")
        for index, origin in enumerate(self._origins):
            check_column_name("image_column", origin.image_column)
            check_column_name("label_column", origin.label_column)
            check_number("offset", origin.offset, least=0, integer=True)
            known = () if origin.categories is None else origin.categories.names
            if origin.index != index or origin.offset + len(known) > len(classes) or bool(known) != bool(classes):
                raise ConfigError(f"The saved origin {self.names[index]!r} contradicts the blend.")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors inside say which dataset they are about."""
    try:
        yield
    except CnHfError as error:
        raise type(error)(f"Dataset {name!r}: {error}") from error


def _check_known(given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise ContextSourceError(f"Unknown origin {name!r}; {nearest(str(name), names)}")


def _check_same_kind(origins: Mapping[str, DatasetLike]) -> None:
    """Refuse an empty dict, things that are no datasets, and datasets of different kinds."""
    kinds = {}
    for name, dataset in origins.items():
        with _naming(name):
            kinds[name] = type(dataset) if is_split_dict(dataset) else type(check_split(dataset))
    if len(set(kinds.values())) != 1:
        found = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items()) or "no dataset"
        raise InputTypeError(
            f"Datasets of one kind can be blended, received {found}. Pick splits, or stream all or none."
        )


def _describe_origin(
    index: int, split: Split, labels: str, image_column: str | None, label_column: str | None
) -> Origin:
    """The facts of an origin before it is numbered among the others: its columns and classes."""
    features = features_of(split)
    find_image_column(features, image_column)
    categories = None
    if labels != "none":
        label_column = blended_label_column(features, label_column)
        categories = Categories.of(split, label_column)
    return Origin(index=index, image_column=image_column, label_column=label_column, categories=categories)


def _number_classes(
    names: Sequence[str], labels: str, origins: Sequence[Origin]
) -> tuple[tuple[str, ...] | None, tuple[Origin, ...]]:
    """Class names of the blend, and the origins with their labels' place among them."""
    known = [origin.categories for origin in origins if origin.categories is not None]
    if labels == "none":
        return None, tuple(origins)
    if labels == "shared":
        first = known[0]
        for name, categories in zip(names, known, strict=True):
            if set(categories.names) != set(first.names):
                odd = sorted(set(categories.names) ^ set(first.names))
                raise DatasetError(
                    f"labels='shared', but the classes of {name!r} differ from those of {names[0]!r}: only one of them "
                    f"has {odd[:10]}{' ...' if len(odd) > 10 else ''}. Rename them, or use labels='offset'."
                )
        shared = [dataclasses.replace(categories, names=first.names) for categories in known]
        numbered = zip(origins, shared, strict=True)
        return first.names, tuple(dataclasses.replace(origin, categories=own) for origin, own in numbered)
    counts = Counter(name for categories in known for name in categories.names)
    class_names: list[str] = []
    offsets = []
    for name, categories in zip(names, known, strict=True):
        offsets.append(len(class_names))
        class_names += [f"{name}/{label}" if counts[label] > 1 else label for label in categories.names]
    with_offsets = zip(origins, offsets, strict=True)
    return check_names(class_names, "class names"), tuple(
        dataclasses.replace(origin, offset=offset) for origin, offset in with_offsets
    )


def _common_size(origins: Mapping[str, DatasetLike], described: Sequence[Origin]) -> tuple[int, int] | None:
    """The largest height and width of the origins' first images, if those differ."""
    sizes = []
    for (name, dataset), origin in zip(origins.items(), described, strict=True):
        with _naming(name):
            size = first_image_size(training_split(dataset), origin.image_column)
        if size is not None:
            sizes.append(size)
    if len(set(sizes)) < 2:
        return None
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _read_origin(config: Mapping[str, Any]) -> Origin:
    values, categories = dict(config), config["categories"]
    if categories is not None:
        check_flag("numbered", categories["numbered"])
        names = check_names(categories["names"])
        values["categories"] = Categories(column=categories["column"], names=names, numbered=categories["numbered"])
    return Origin(**values)
