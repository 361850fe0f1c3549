"""The datasets of the paper's experiments: where they are read from, and what must be in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from datasets import ClassLabel

from cn_hf.data import load_splits
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError, nearest

__all__ = ["DATASETS", "NeededDataset", "check_datasets", "find_datasets"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NeededDataset:
    """A dataset: its id on the Hub, and the columns of class labels that an experiment reads, with their classes.

    Of an id with a configuration (``OWNER/NAME:CONFIGURATION``) it is the configuration that is meant.
    """

    hub_id: str
    classes: dict[str, int]


DATASETS = {
    "cifar10": NeededDataset(hub_id="uoft-cs/cifar10", classes={"label": 10}),
    "cifar100": NeededDataset(hub_id="uoft-cs/cifar100", classes={"fine_label": 100, "coarse_label": 20}),
    "mnist": NeededDataset(hub_id="ylecun/mnist", classes={"label": 10}),
    "svhn": NeededDataset(hub_id="ufldl-stanford/svhn:cropped_digits", classes={"label": 10}),
}


def find_datasets(names: Iterable[str], data_root: Path | None) -> dict[str, str]:
    """Return the origin of each dataset: its folder under ``data_root``, or its id on the Hub.

    Raises:
        ConfigError: A name is unknown.
        DatasetFileError: Folders are missing; all are named, and how to get them.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in DATASETS:
            raise ConfigError(f"unknown dataset {name!r}; {nearest(name, DATASETS)}")
    if data_root is None:
        return {name: DATASETS[name].hub_id for name in wanted}
    places = {name: data_root.expanduser() / name for name in wanted}
    missing = [name for name, place in places.items() if not place.is_dir()]
    if missing:
        expected = "; ".join(f"{places[name]} with {_in_words(DATASETS[name])}" for name in missing)
        commands = "; ".join(
            f"hf download --repo-type dataset {DATASETS[name].hub_id.partition(':')[0]} --local-dir {places[name]}"
            for name in missing
        )
        raise DatasetFileError(
            f"no dataset {' and no dataset '.join(missing)} under --data-root. Expected, in a form that "
            f"datasets.load_dataset reads: {expected}. To get it: {commands}. Without --data-root the Hub's is read"
        )
    return {name: str(place) for name, place in places.items()}


def check_datasets(places: dict[str, str]) -> None:
    """See that every dataset can be read and has the splits, columns and classes it needs, before anything is trained.

    Raises:
        DatasetFileError: A dataset cannot be read.
        DatasetError: A split or column is missing, or has other classes than the paper's.
    """
    for name, place in places.items():
        for split, dataset in load_splits(place).items():
            for column, count in DATASETS[name].classes.items():
                feature = dataset.features.get(column)
                if not isinstance(feature, ClassLabel) or feature.num_classes != count:
                    found = "no such column" if feature is None else f"{getattr(feature, 'num_classes', 'no')} classes"
                    raise DatasetError(
                        f"dataset {name!r} from {place}, split {split!r}, column {column!r}: found {found}, expected "
                        f"{count} classes. Use the dataset of the paper: {DATASETS[name].hub_id}"
                    )


def _in_words(dataset: NeededDataset) -> str:
    columns = " and ".join(f"{column!r} ({count} classes)" for column, count in dataset.classes.items())
    return f"splits 'train' and 'test', an image column and {columns}"
