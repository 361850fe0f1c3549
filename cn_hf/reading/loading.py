"""A dataset by Hub id or folder, as named splits; its image and label columns.

Splits are chosen by name and never guessed; a validation split that the dataset lacks is cut from the training split,
the same way for the same seed. Whatever is missing is an error that names what exists.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import torch
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from sklearn.model_selection import train_test_split
from torch import Tensor

from cn_hf.errors import ConfigError, DatasetError, DatasetFileError, nearest
from cn_hf.reading.access import CONTEXT_COLUMN, features_of
from cn_hf.reading.images import find_image_column as image_column_of

__all__ = [
    "check_context_feature",
    "check_labels",
    "find_image_column",
    "find_label_column",
    "label_columns",
    "label_names",
    "load_split",
    "load_splits",
    "read_context_ids",
    "read_labels",
    "take_shuffled",
]

# A Dataset or an IterableDataset; a DatasetDict of either. The datasets library is untyped.
AnyDataset: TypeAlias = Any
AnySplits: TypeAlias = Any

# Names that say which of several columns is meant: the first of them that holds labels.
LABEL_NAMES = ("label", "labels", "fine_label")


def load_splits(
    path_or_id: str | Path,
    *,
    name: str | None = None,
    train_split: str | None = "train",
    validation_split: str | None = None,
    validation_fraction: float | None = None,
    test_split: str | None = "test",
    label_column: str | None = None,
    max_train_images: int | None = None,
    max_test_images: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> AnySplits:
    """Load a dataset and give its splits the names ``train``, ``validation`` and ``test``.

    Args:
        path_or_id: A Hub id (``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``), a folder that ``datasets.load_dataset``
            reads (data files, or one folder of images per class), or a folder written by ``save_to_disk``.
        name: Configuration of the dataset, where it has several and the id does not say which.
        train_split: Which split trains; None for none. Slices such as ``"train[:10%]"`` are understood, not streaming.
        validation_split: Which split validates; None for none, or for one cut by ``validation_fraction``.
        validation_fraction: Part of the training split, in (0, 1), that becomes the validation split: drawn by
            ``seed``, each class in proportion where labels and counts allow; both parts keep the dataset's order.
        test_split: Which split tests; None for none.
        label_column: Column to draw in proportion by; None: the one ``find_label_column`` finds, if any.
        max_train_images: Train on so many images only, the first of a shuffle by ``seed`` (after the cut).
        max_test_images: Likewise for the test split.
        seed: See above.
        streaming: Read rows when they are asked for instead of loading the dataset first.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Where the datasets library keeps what it has read; its own default if None.

    Returns:
        A DatasetDict (IterableDatasetDict when streaming) with the keys that were asked for.

    Raises:
        DatasetFileError: There is no such folder or Hub dataset, or it cannot be read.
        DatasetError: The dataset lacks a configuration or split, or the validation split would be empty.
        ConfigError: Options contradict one another or are out of range.
    """
    _check_options(validation_split, validation_fraction, streaming, max_train_images, max_test_images)
    wanted = {"train": train_split, "validation": validation_split, "test": test_split}
    wanted = {role: split for role, split in wanted.items() if split is not None}
    if not wanted:
        raise ConfigError("no split asked for; give train_split, validation_split or test_split")
    if validation_fraction is not None and train_split is None:
        raise ConfigError("validation_fraction cuts from the training split, but train_split is None")
    _check_distinct(wanted)
    available = _load(path_or_id, name=name, streaming=streaming, revision=revision, cache_dir=cache_dir)
    splits = {role: _pick(available, split, str(path_or_id), streaming) for role, split in wanted.items()}
    if validation_fraction is not None:
        kept, cut = _cut_validation(splits["train"], validation_fraction, label_column, seed)
        splits = {"train": kept, "validation": cut, **{role: s for role, s in splits.items() if role != "train"}}
    for role, limit in (("train", max_train_images), ("test", max_test_images)):
        if role in splits and limit is not None:
            splits[role] = take_shuffled(splits[role], limit, seed)
    container = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    return container(splits)


def load_split(path_or_id: str | Path, split: str | None = None, *, default: str = "test") -> AnyDataset:
    """Load one split of a dataset.

    Args:
        path_or_id: See ``load_splits``.
        split: Its name or a slice such as ``"test[:10%]"``; None for ``default``, or for the only one there is.
        default: See ``split``.

    Raises:
        DatasetFileError: There is no such folder or Hub dataset, or it cannot be read.
        DatasetError: The dataset lacks the split.
    """
    available = _load(path_or_id, name=None, streaming=False, revision=None, cache_dir=None)
    if split is None:
        split = next(iter(available)) if len(available) == 1 else default
    return _pick(available, split, str(path_or_id), False)


def take_shuffled(dataset: AnyDataset, count: int, seed: int) -> AnyDataset:
    """The first ``count`` rows of a shuffle by ``seed``, in the dataset's order; all rows where it has no more.

    Of a stream: the first ``count`` rows of the stream shuffled in buffers of 10,000 rows.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset.shuffle(seed=seed, buffer_size=10_000).take(count)
    if count >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count]))


def find_image_column(dataset: AnyDataset, column: str | None = None) -> str:
    """The one column that holds images, or ``column`` once it is known to hold them.

    Raises:
        DatasetError: No such column, no images in it, no image column at all, or several to choose from.
    """
    return image_column_of(_features(dataset), column)


def find_label_column(dataset: AnyDataset, column: str | None = None) -> str:
    """The column that holds class labels, or ``column`` once it is known to hold them.

    The first of ``label``, ``labels`` and ``fine_label`` that holds ``ClassLabel`` or integers is taken; without one,
    the only ``ClassLabel`` column besides ``context_ids``.

    Args:
        dataset: A dataset, a dict of splits, or their features.
        column: Its name, where the caller knows it.

    Raises:
        DatasetError: No such column, no labels in it, none at all, or several to choose from.
    """
    features = _features(dataset)
    if column is not None:
        if column not in features:
            raise DatasetError(f"no column {column!r}: {nearest(column, features)}")
        if not _is_label(features[column]):
            raise DatasetError(
                f"column {column!r} holds {_kind(features[column])}, not class labels; for names, "
                f"dataset.class_encode_column({column!r}) numbers them"
            )
        return column
    labels = label_columns(features)
    if not labels:
        raise DatasetError(f"no column of class labels; the columns are {_described(features)}")
    if len(labels) > 1:
        counted = [f"{key!r} ({features[key].num_classes} classes)" for key in labels]
        raise DatasetError(
            f"{len(labels)} columns hold class labels: {', '.join(counted)}; name the one to be learnt, for example "
            f"label_column={labels[0]!r} (label_columns={{origin: {labels[0]!r}}} where origins are blended)"
        )
    return labels[0]


def label_columns(dataset: AnyDataset) -> list[str]:
    """The columns that may be meant by ``find_label_column``; of a dataset without labels, none."""
    features = _features(dataset)
    usual = [key for key in LABEL_NAMES if key in features and _is_label(features[key])]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return usual[:1] or [key for key in classes if key != CONTEXT_COLUMN]


def label_names(dataset: AnyDataset, column: str) -> tuple[str, ...] | None:
    """Names of the classes of ``column``, in the order of their numbers; None for a plain integer column."""
    feature = _features(dataset)[column]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def read_labels(dataset: AnyDataset, column: str, num_classes: int | None = None) -> npt.NDArray[np.int64]:
    """All labels of a Dataset, checked.

    Args:
        dataset: A Dataset, not a stream.
        column: Its label column.
        num_classes: How many classes there are; None: as many as the ``ClassLabel`` names, or no upper limit.

    Returns:
        Labels (N,), int64.

    Raises:
        DatasetError: A label is missing, negative, or no class; the message names its row.
    """
    values = dataset.with_format("arrow").select_columns([column])[:].column(column)
    if num_classes is None:
        names = label_names(dataset, column)
        num_classes = None if names is None else len(names)
    if values.null_count:
        row = next(i for i, value in enumerate(values) if not value.is_valid)
        raise DatasetError(f"row {row} has no {column!r}: every row needs a label")
    labels: npt.NDArray[np.int64] = values.to_numpy().astype(np.int64)
    check_labels(labels, range(len(labels)), column, num_classes)
    return labels


def read_context_ids(dataset: AnyDataset) -> Tensor | None:
    """Column ``context_ids`` of a Dataset: (N,) int64, or (N, T) float32 weights; None without that column.

    Raises:
        DatasetError: An id is missing or out of range, its row is named; or the column holds no integers.
    """
    if CONTEXT_COLUMN not in dataset.features:
        return None
    feature = dataset.features[CONTEXT_COLUMN]
    check_context_feature(feature)
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        weights = dataset.with_format("numpy").select_columns([CONTEXT_COLUMN])[:][CONTEXT_COLUMN]
        return torch.from_numpy(np.stack(list(weights)).astype(np.float32))
    return torch.from_numpy(read_labels(dataset, CONTEXT_COLUMN))


def check_context_feature(feature: Any) -> None:
    """Raise DatasetError for a column ``context_ids`` of single values that are no integers."""
    if isinstance(feature, datasets.Value) and not _is_label(feature) and feature.dtype != "bool":
        raise DatasetError(
            f"column {CONTEXT_COLUMN!r} holds {feature.dtype}, not integers 0 to T - 1 (nor lists of T weights); for "
            "names, a context source numbers them: cn_hf.contexts.ColumnContexts(column).fit(data).apply(data)"
        )


def check_labels(labels: npt.NDArray[np.int64], rows: Any, column: str, num_classes: int | None) -> None:
    """Raise DatasetError naming the first of ``rows`` whose label is negative or not less than ``num_classes``."""
    too_large = labels >= num_classes if num_classes is not None else np.zeros(len(labels), dtype=bool)
    wrong = np.flatnonzero((labels < 0) | too_large)
    if len(wrong):
        upper = " or more" if num_classes is None else f" to {num_classes - 1}"
        unlabelled = "; -1 often marks a split without labels" if labels[wrong[0]] == -1 else ""
        raise DatasetError(
            f"row {rows[int(wrong[0])]} has {column!r} {int(labels[wrong[0]])}; labels must be 0{upper}{unlabelled} "
            f"({len(wrong)} such rows)"
        )


def _check_options(
    validation_split: str | None,
    validation_fraction: float | None,
    streaming: bool,
    max_train_images: int | None,
    max_test_images: int | None,
) -> None:
    if validation_fraction is not None:
        if validation_split is not None:
            raise ConfigError(
                f"validation_split={validation_split!r} and validation_fraction={validation_fraction} "
                "exclude each other; give one"
            )
        if not 0 < validation_fraction < 1:
            raise ConfigError(f"validation_fraction must be between 0 and 1; got {validation_fraction}")
        if streaming:
            raise ConfigError("validation_fraction needs the length of the data; when streaming, name a split")
    for option, value in (("max_train_images", max_train_images), ("max_test_images", max_test_images)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1; got {value}")


def _check_distinct(wanted: dict[str, str | None]) -> None:
    roles: dict[str | None, str] = {}
    for role, split in wanted.items():
        if split in roles:
            raise ConfigError(f"{roles[split]} and {role} are both split {split!r}; a result on it would mean nothing")
        roles[split] = role


def _load(
    path_or_id: str | Path,
    *,
    name: str | None,
    streaming: bool,
    revision: str | None,
    cache_dir: str | Path | None,
) -> AnySplits:
    folder = Path(path_or_id).expanduser()
    if ":" in str(path_or_id) and not folder.exists() and not _looks_local(path_or_id):
        path_or_id, _, own = str(path_or_id).partition(":")
        if name not in (None, own):
            raise ConfigError(f"{path_or_id!r} is given two configurations, {own!r} and {name!r}; give one")
        name = own
    if folder.is_file():
        raise DatasetFileError(f"{folder} is a file; give the folder it is in: {folder.parent}")
    if not folder.is_dir() and _looks_local(path_or_id):
        raise DatasetFileError(_no_such_folder(folder))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            saved = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            if not streaming:
                return saved
            return {split: dataset.to_iterable_dataset() for split, dataset in saved.items()}
        source = str(folder) if folder.is_dir() else str(path_or_id)
        cache = None if cache_dir is None else str(cache_dir)
        return datasets.load_dataset(source, name=name, streaming=streaming, revision=revision, cache_dir=cache)
    except DatasetGenerationError as error:
        raise DatasetFileError(f"cannot read dataset {str(path_or_id)!r}: {error.__cause__ or error}") from error
    except (DatasetsError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise DatasetFileError(f"cannot load dataset {str(path_or_id)!r}: {error}") from error
    except ValueError as error:
        raise DatasetError(f"cannot load dataset {str(path_or_id)!r}: {error}") from error


def _looks_local(path_or_id: str | Path) -> bool:
    """True if the text cannot be a Hub id (``name`` or ``owner/name``), or lies in a folder that exists here."""
    text = str(path_or_id)
    in_folder = "/" in text and Path(text).expanduser().parent.is_dir()
    return isinstance(path_or_id, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or in_folder


def _no_such_folder(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f"no folder {folder}, nor is there a folder {folder.parent}"
    beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    return f"no folder {folder}: {nearest(folder.name, beside)}" if beside else f"no folder {folder}"


def _pick(available: AnySplits, split: str | None, source: str, streaming: bool) -> AnyDataset:
    """One split by name or slice expression."""
    assert split is not None
    if split in available:
        return available[split]
    named = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for base in named:
        if base not in available:
            raise DatasetError(f"{source} has no split {base!r}: {nearest(base, available)} For no split, give none")
    if streaming:
        raise ConfigError(f"split {split!r} is a slice, which a stream cannot give; use one of {list(available)}")
    lengths = {key: len(dataset) for key, dataset in available.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"cannot read split {split!r}: {error}; write for example 'train[:10%]'") from error
    chosen = [available[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _cut_validation(
    dataset: AnyDataset, fraction: float, label_column: str | None, seed: int
) -> tuple[AnyDataset, AnyDataset]:
    """(rest, validation), both in the dataset's order."""
    count = round(len(dataset) * fraction)
    if count < 1 or count >= len(dataset):
        raise DatasetError(
            f"validation_fraction={fraction} of {len(dataset)} training images is {count} images; "
            "both parts need at least one"
        )
    labels = _stratification(dataset, label_column, count)
    rest, cut = train_test_split(np.arange(len(dataset)), test_size=count, random_state=seed, stratify=labels)
    return dataset.select(np.sort(rest)), dataset.select(np.sort(cut))


def _stratification(dataset: AnyDataset, label_column: str | None, count: int) -> npt.NDArray[np.int64] | None:
    """Labels to cut in proportion by; None without an unambiguous label column or with too few images of a class."""
    if label_column is None:
        try:
            label_column = find_label_column(dataset)
        except DatasetError:
            return None
    labels = read_labels(dataset, find_label_column(dataset, label_column))
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    enough = counts.min() >= 2 and count >= len(counts) and len(labels) - count >= len(counts)
    return labels if enough else None


def _features(dataset: AnyDataset) -> Any:
    if isinstance(dataset, datasets.Features):
        return dataset
    if isinstance(dataset, dict):
        if not dataset:
            raise DatasetError("the dataset has no splits")
        dataset = next(iter(dataset.values()))
    return features_of(dataset)


def _is_label(feature: Any) -> bool:
    integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    return integer or isinstance(feature, datasets.ClassLabel)


def _kind(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _described(features: Any) -> str:
    return ", ".join(f"{key!r} ({_kind(feature)})" for key, feature in features.items())
