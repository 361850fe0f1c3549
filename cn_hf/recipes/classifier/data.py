"""A run's data and contexts, from the two options ``dataset`` and ``contexts``.

| ``contexts`` | context of an image |
|---|---|
| ``none`` | the dataset's own column ``context_ids`` if it has one, else there is none |
| ``column:NAME`` | its value in that column |
| ``origin`` or ``origin:NAME,NAME,...`` | the dataset it came from, of several ``dataset`` options |
| ``clusters:METHOD:K:FEATURES`` | its cluster; gmm or kmeans, pixels or pca; all may be left out |
| ``brightness`` or ``brightness:LUMA`` | day or night by its mean luma; the threshold is found if not given |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor

from cn_hf.contexts import (
    CONTEXT_COLUMN,
    BrightnessContexts,
    ClusterContexts,
    ColumnContexts,
    ContextSource,
    OriginContexts,
)
from cn_hf.data import (
    Batches,
    DeviceBatches,
    MixingConfig,
    PreparedData,
    StreamedBatches,
    build_augmentation,
    find_image_column,
    find_label_column,
    load_splits,
    prepare_data,
)
from cn_hf.errors import ConfigError, DatasetError, nearest
from cn_hf.reading.decoded import image_shape
from cn_hf.reading.loading import read_context_ids, read_labels
from cn_hf.training.config import TrainingConfig
from cn_hf.training.networks import published_normalization

__all__ = [
    "CONTEXT_KINDS",
    "class_counts",
    "context_source",
    "data_options",
    "datasets_bars",
    "load_data",
    "read_splits",
]

CONTEXT_KINDS = ("none", "column", "origin", "clusters", "brightness")


def load_data(
    config: TrainingConfig, accelerator: Accelerator, *, splits: tuple[Any, OriginContexts | None] | None = None
) -> PreparedData:
    """Load, blend, give contexts, decode and batch what ``config`` asks for, this process's share of each batch.

    Args:
        config: Of the run.
        accelerator: Whose processes share the batches.
        splits: From ``read_splits``, their columns changed perhaps; None: read now.

    Raises:
        ConfigError: An option is out of range or contradicts another.
        DatasetError: A split or column is missing, or a label is out of range.
        DatasetFileError: A dataset or image cannot be read.
        ContextSourceError: The contexts cannot be named.
    """
    with datasets_bars(config.progress and accelerator.is_main_process):
        return _load_data(config, accelerator, splits)


def read_splits(
    config: TrainingConfig, accelerator: Accelerator, *, prepare: Callable[[list[Any]], list[Any]] | None = None
) -> tuple[Any, OriginContexts | None]:
    """The splits that ``config`` names, blended where there are several datasets, and then the source that did it.

    Args:
        config: Of the run.
        accelerator: The main process reads first.
        prepare: What the datasets' splits undergo before they are blended.

    Raises:
        ConfigError: An option is out of range or contradicts another.
        DatasetError: A split or column is missing.
        DatasetFileError: A dataset cannot be read.
    """
    if not config.dataset:
        raise ConfigError("no dataset given; name a load_dataset id or a folder (--dataset)")
    shown = config.progress and accelerator.is_main_process
    with datasets_bars(shown), accelerator.main_process_first():  # the others then find what the first has cached
        return _load_splits(config, prepare)


def data_options(config: TrainingConfig) -> dict[str, Any]:
    """The options that decide what ``load_data`` gives: runs that agree in them can share it."""
    named = [field.name for field in dataclasses.fields(config) if field.metadata["section"] == "data"]
    named += ["contexts", "balance_contexts", "batch_size", "seed"]
    options = {name: getattr(config, name) for name in named}
    kind, arguments = context_kind(config)
    if kind == "clusters" and len(arguments) < 2:
        options["num_contexts"] = config.num_contexts
    if config.pretrained:  # its normalisation is the data's
        options["model"] = config.model
    return options


def class_counts(batches: Batches, num_classes: int, num_contexts: int, config: TrainingConfig) -> Tensor | None:
    """Images of each class in each context, (T, C) int64, for the leak check; None where they cannot be counted."""
    if isinstance(batches, DeviceBatches):
        labels, contexts = batches.labels.cpu(), batches.context_ids
    elif isinstance(batches, StreamedBatches) and not batches.is_stream:
        column = find_label_column(batches.dataset, _own_column(config, config.label_column))
        labels = torch.from_numpy(read_labels(batches.dataset, column, num_classes))
        contexts = read_context_ids(batches.dataset)
    else:
        return None
    if contexts is None or contexts.is_floating_point():
        return None
    cells = contexts.cpu() * num_classes + labels
    return torch.bincount(cells, minlength=num_contexts * num_classes).view(num_contexts, num_classes)


def context_source(config: TrainingConfig) -> ContextSource | None:
    """The source, not fitted yet, that ``config.contexts`` names; None for "none" and "origin".

    Raises:
        ConfigError: An unknown kind, or arguments that it does not take.
    """
    kind, arguments = context_kind(config)
    image_column = _own_column(config, config.image_column)
    if kind == "column":
        return ColumnContexts(_only(arguments, config, "column:NAME"))
    if kind == "clusters":
        return _clusters(arguments, config)
    if kind == "brightness":
        if not arguments:
            return BrightnessContexts(image_column=image_column)
        threshold = _number(_only(arguments, config, "brightness:LUMA"), config)
        return BrightnessContexts(threshold, image_column=image_column)
    return None


def context_kind(config: TrainingConfig) -> tuple[str, list[str]]:
    """The word before the first colon of ``config.contexts``, and those after it.

    Raises:
        ConfigError: An unknown kind, or "origin" and a single dataset (or the reverse).
    """
    kind, *arguments = config.contexts.split(":")
    if kind not in CONTEXT_KINDS:
        raise ConfigError(f"unknown contexts {config.contexts!r}; {nearest(kind, CONTEXT_KINDS)}")
    if kind == "none" and arguments:
        raise ConfigError(f"contexts 'none' takes nothing after it, got {config.contexts!r}")
    if kind == "origin" and len(config.dataset) < 2:
        raise ConfigError("contexts 'origin' are those of several datasets; give --dataset more than once")
    return kind, arguments


def _load_data(
    config: TrainingConfig, accelerator: Accelerator, loaded: tuple[Any, OriginContexts | None] | None
) -> PreparedData:
    for name in ("names", "image_size"):
        if name in config.augment_options:
            raise ConfigError(f"augment_options holds {name!r}, which has an option of its own")
    augmentation = build_augmentation(config.augment, image_size=config.image_size, **config.augment_options)
    source = context_source(config)
    splits, origins = read_splits(config, accelerator) if loaded is None else loaded
    mean, std = (config.mean or None), (config.std or None)
    if mean is None and config.pretrained and (published := published_normalization(config.model)) is not None:
        mean, std = published
    prepared = prepare_data(
        splits,
        context_source=source,
        image_column=_own_column(config, config.image_column),
        label_column=_own_column(config, config.label_column),
        decode_size=_decode_size(config, splits),
        augment=augmentation,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        mixing=_mixing(config),
        balance_contexts=config.balance_contexts,
        seed=config.seed,
        mean=mean,
        std=std,
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        memory_budget_bytes=int(config.memory * 2**30),
        num_workers=config.num_workers,
        on_error="skip" if config.skip_corrupt else "raise",
        progress=config.progress and accelerator.is_main_process,
    )
    return prepared if source is not None else dataclasses.replace(prepared, context_source=origins)


def _mixing(config: TrainingConfig) -> MixingConfig | None:
    if not config.mixup and not config.cutmix:
        return None
    return MixingConfig(
        mixup=config.mixup,
        cutmix=config.cutmix,
        probability=config.mix_probability,
        switch_probability=config.mix_switch_probability,
    )


@contextlib.contextmanager
def datasets_bars(shown: bool) -> Iterator[None]:
    """The datasets library's own progress bars, on or off."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def _load_splits(
    config: TrainingConfig, prepare: Callable[[list[Any]], list[Any]] | None
) -> tuple[Any, OriginContexts | None]:
    """The splits, blended where there are several datasets, and then the source that blended them."""
    kind, arguments = context_kind(config)
    test_split = None if config.test_split in (None, "none") else config.test_split
    fraction = config.validation_fraction if config.validation_split is None and config.validation_fraction else None
    loaded = [
        load_splits(
            dataset,
            name=config.dataset_config,
            train_split=config.train_split,
            validation_split=config.validation_split,
            validation_fraction=fraction,
            test_split=test_split,
            label_column=_own_column(config, config.label_column),
            max_train_images=config.max_train_images,
            max_test_images=config.max_test_images,
            seed=config.seed,
            streaming=config.streaming,
        )
        for dataset in config.dataset
    ]
    loaded = loaded if prepare is None else prepare(loaded)
    if len(loaded) == 1:
        return loaded[0], None
    names = _origin_names(config, arguments if kind == "origin" else [])
    origins = OriginContexts(
        dict(zip(names, loaded, strict=True)),
        labels="shared" if config.share_labels else "offset",
        decode_size=config.decode_size,
        image_columns=_named_columns(names, loaded, config.image_column),
        label_columns=_named_columns(names, loaded, config.label_column),
    )
    blended = origins.blend()
    return (blended, origins) if kind == "origin" else (blended.remove_columns(CONTEXT_COLUMN), None)


def _origin_names(config: TrainingConfig, arguments: list[str]) -> list[str]:
    names = arguments[0].split(",") if arguments else [Path(dataset).name for dataset in config.dataset]
    if len(names) != len(config.dataset) or len(set(names)) != len(names) or not all(names):
        raise ConfigError(
            f"{len(config.dataset)} datasets need as many different names, got {names}; "
            "write --contexts origin:NAME,NAME,..."
        )
    return names


def _named_columns(names: list[str], loaded: list[Any], column: str | None) -> dict[str, str]:
    """The datasets that have this column; the others' is found by its kind.

    Raises:
        DatasetError: None of them has it.
    """
    if column is None:
        return {}
    having = {
        name: column for name, splits in zip(names, loaded, strict=True) if column in splits["train"].column_names
    }
    if not having:
        known = {known for splits in loaded for known in splits["train"].column_names}
        raise DatasetError(f"none of the datasets has a column {column!r}; {nearest(column, known)}")
    return having


def _own_column(config: TrainingConfig, column: str | None) -> str | None:
    """A column of the one dataset; blended ones have columns of one name, which are found by their kind."""
    return column if len(config.dataset) == 1 else None


def _decode_size(config: TrainingConfig, splits: Any) -> int | None:
    """Small images are enlarged last, on the device; large ones are reduced as they are decoded."""
    if config.decode_size is not None or config.image_size is None:
        return config.decode_size
    split = splits["train"]
    _, height, width = image_shape(split, find_image_column(split, _own_column(config, config.image_column)))
    return None if height < config.image_size and width < config.image_size else config.image_size


def _clusters(arguments: list[str], config: TrainingConfig) -> ClusterContexts:
    image_column = _own_column(config, config.image_column)
    if len(arguments) > 3:
        raise ConfigError(f"contexts {config.contexts!r} has too many parts; write clusters:METHOD:K:FEATURES")
    options: dict[str, Any] = dict(zip(("method", "num_contexts", "features"), arguments, strict=False))
    if "num_contexts" in options:
        options["num_contexts"] = int(_number(options["num_contexts"], config))
    elif config.num_contexts is not None:
        options["num_contexts"] = config.num_contexts
    return ClusterContexts(**options, image_column=image_column, decode_size=config.image_size, seed=config.seed)


def _only(arguments: list[str], config: TrainingConfig, form: str) -> str:
    text = ":".join(arguments)  # a column's name may hold colons
    if not text:
        raise ConfigError(f"contexts {config.contexts!r} is incomplete; write {form}")
    return text


def _number(text: str, config: TrainingConfig) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} in contexts {config.contexts!r} must be a number") from None
