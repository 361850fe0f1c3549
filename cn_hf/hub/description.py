"""``context_norm.json``: what a checkpoint is. Everything a loader needs besides the weights, as plain JSON."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from cn_hf.contexts import ContextSource
from cn_hf.contexts.storage import CONFIG_FILE as SOURCE_FILE
from cn_hf.errors import CheckpointError, ConfigError, ContextIdError, ContextSourceError, InputTypeError
from cn_hf.files import read_description as read_json
from cn_hf.files import sha256_of, write_json
from cn_hf.hub.moments import MOMENTS_FILE, read_moments
from cn_hf.hub.weights import is_weights_name
from cn_hf.patching import ContextNormConfig
from cn_hf.patching.inference import check_channels, check_fits, per_channel, restore_settings
from cn_hf.patching.router import ContextSourceLike
from cn_hf.patching.routing import router_of

__all__ = [
    "CLASSIFICATION",
    "CONFIG_FILE",
    "EMBEDDING",
    "SOURCE_FOLDER",
    "Description",
    "attach_source",
    "check_task",
    "context_source_of",
    "described",
    "read_description",
]

FORMAT = 1  # raised when a release can no longer be read by the ones before
CONFIG_FILE = "context_norm.json"
SOURCE_FOLDER = "context_source"
CLASSIFICATION, EMBEDDING = "image-classification", "image-feature-extraction"
_TASKS = {
    CLASSIFICATION: "classifies images",
    EMBEDDING: "embeds images to compare them (a Siamese network), and knows no classes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The content of ``context_norm.json``.

    Attributes:
        config: how the model is patched.
        base: what ``describe_base`` says of the model under the patches, with the ``id`` and ``revision`` it came from.
        base_fingerprint: of the base model's weights, for checkpoints of the context parameters alone.
        norms_only: the weights are the context parameters alone.
        weights: SHA-256 by file name.
        context_source: a context source is in ``context_source/``.
        context_source_sha256: of its JSON, which has the checksum of its tensors.
        context_moments_sha256: of ``context_moments.safetensors``, the moments of the slots' inputs; None without it.
        pixel_mean: what was subtracted from pixels in 0..1 before they reach the model, one a channel.
        pixel_std: what they were divided by.
        task: what the model was trained for, as transformers' pipelines call it; None if nobody said.
        unknown: how samples run that the context source knows no context of, as ``set_inference`` was told.
        track: ``"rate"`` and ``"contexts"`` that follow their images; None where none does.
    """

    config: ContextNormConfig
    base: dict[str, Any]
    base_fingerprint: str | None = None
    norms_only: bool = False
    weights: dict[str, str]
    context_source: bool = False
    context_source_sha256: str | None = None
    context_moments_sha256: str | None = None
    pixel_mean: tuple[float, ...] = (0.0,)
    pixel_std: tuple[float, ...] = (1.0,)
    task: str | None = None
    unknown: int | str | None = None
    track: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the fields that no other class checks.

        Raises:
            ConfigError: a file name leads elsewhere, or a value has another type or is out of range.
        """
        for flag in ("norms_only", "context_source"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(f"Expected true or false as {flag}, received {getattr(self, flag)!r}")
        for text in ("base_fingerprint", "context_source_sha256", "context_moments_sha256"):
            if not isinstance(getattr(self, text), (str, type(None))):
                raise ConfigError(f"Expected a checksum or nothing as {text}, received {getattr(self, text)!r}")
        per_channel("mean", self.pixel_mean)
        per_channel("std", self.pixel_std)
        for name, checksum in self.weights.items():
            if not is_weights_name(name):
                raise ConfigError(f"weights name {name!r}, which is no safetensors file of the checkpoint's own folder")
            if not re.fullmatch("[0-9a-f]{64}", str(checksum)):
                raise ConfigError(f"weights have {checksum!r} for the checksum of {name}")
        if not self.weights:
            raise ConfigError("weights name no file")
        if not isinstance(self.task, (str, type(None))):
            raise ConfigError(f"task is {self.task!r}, which is no text")

    def write(self, folder: Path) -> None:
        """Write the file, whole.

        Raises:
            OSError: the folder cannot be written to.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_json(folder / CONFIG_FILE, {"format": FORMAT, **fields, "config": self.config.to_dict()})

    def files(self) -> list[str]:
        """Patterns of all files of the checkpoint but this one, relative to its folder."""
        moments = [] if self.context_moments_sha256 is None else [MOMENTS_FILE]
        return ["*.json", f"{SOURCE_FOLDER}/*", *moments, *self.weights]


def read_description(path: Path) -> Description:
    """Read ``context_norm.json``; fields of later releases of the same format are left aside.

    Raises:
        CheckpointError: it is missing, truncated, of a newer format, or does not describe a patched model.
    """
    content = read_json(path, newest=FORMAT, what="checkpoint")
    known = {field.name for field in dataclasses.fields(Description)}
    values = {name: value for name, value in content.items() if name in known}
    try:
        values["config"] = ContextNormConfig.from_dict(values["config"])
        for name in ("base", "weights"):
            if not isinstance(values[name], dict):
                raise ConfigError(f"Expected a mapping as {name}, received {values[name]!r}")
        for name in ("pixel_mean", "pixel_std"):
            values[name] = per_channel(name.removeprefix("pixel_"), values.get(name, getattr(_DEFAULTS, name)))
        return Description(**values)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a patched model: {error}.") from error


_DEFAULTS = Description(config=ContextNormConfig(), base={}, weights={"model.safetensors": "0" * 64})


def context_source_of(model: nn.Module, given: ContextSource | None) -> ContextSource | None:
    """The source that travels with a checkpoint: the given one, else the one attached to the model.

    Raises:
        InputTypeError: it is no context source.
        ConfigError: it names another number of contexts than the model has, or numbers them otherwise.
    """
    router = router_of(model)
    source = router.source if given is None else given
    if source is not None and not isinstance(source, ContextSource):
        raise InputTypeError(f"context_source must be a ContextSource, received {type(source).__name__}.")
    if source is not None:
        check_fits(source, router.config)
    return source


def attach_source(model: nn.Module, folder: Path, description: Description) -> None:
    """Give a loaded model what its checkpoint says of pixels and of prediction, its context source and its moments.

    A source that cannot be loaded without the user's own code is left out with a warning.

    Raises:
        CheckpointError: a file of the source is missing or damaged, or does not fit the model.
    """
    source = None
    try:
        check_channels(model, description.pixel_mean, description.pixel_std)
        if description.context_source:
            source = _source(folder / SOURCE_FOLDER, description)
        restore_settings(model, description.unknown, description.track)
    except (ConfigError, ContextIdError) as error:
        raise CheckpointError(f"{folder} contradicts itself: {error}") from error
    router = router_of(model)
    router.pixel_mean, router.pixel_std = description.pixel_mean, description.pixel_std
    router.task = description.task
    router.source = cast(ContextSourceLike | None, source)
    if description.context_moments_sha256 is not None:
        router.moments = read_moments(model, folder, description.context_moments_sha256)


def _source(folder: Path, description: Description) -> ContextSource | None:
    try:
        source = ContextSource.load(folder)
    except ContextSourceError as error:
        warnings.warn(f"The checkpoint's context source is not attached: {error}", UserWarning, stacklevel=5)
        return None
    if description.context_source_sha256 not in (None, sha256_of(folder / SOURCE_FILE)):
        raise CheckpointError(f"{folder / SOURCE_FILE} is of another save than {CONFIG_FILE}. Save it again.")
    check_fits(source, description.config)
    return source


def check_task(model: nn.Module, wanted: str) -> None:
    """Raise ``ConfigError`` if a model's checkpoint says that it was trained for something else than ``wanted``."""
    task = router_of(model).task
    if task not in (None, wanted):
        does = _TASKS.get(str(task), f"is for {str(task)!r}")
        raise ConfigError(f"Expected a checkpoint that {_TASKS[wanted]}; this one {does}. Give another checkpoint.")


def described(values: Mapping[str, Any]) -> str:
    """The base model of a description in words."""
    name = f"{values.get('library')} model {values.get('architecture')!r}"
    return f"{name} ({values['id']})" if values.get("id") else name
