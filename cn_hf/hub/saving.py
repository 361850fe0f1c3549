"""What every way of saving shares: cn_hf's own, timm's and transformers'."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from cn_hf.contexts import ContextSource
from cn_hf.contexts.storage import CONFIG_FILE as SOURCE_FILE
from cn_hf.errors import CheckpointError
from cn_hf.files import sha256_of
from cn_hf.hub.base_model import describe_base
from cn_hf.hub.base_weights import base_fingerprint, base_origin
from cn_hf.hub.description import SOURCE_FOLDER, Description, context_source_of
from cn_hf.hub.weights import checksums, weights_in
from cn_hf.patching.routing import router_of

__all__ = ["describe_saved", "origin_of", "write_description", "writing_to"]


def describe_saved(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``context_norm.json`` and the context source beside weights that transformers has just saved.

    Raises:
        OSError: the folder cannot be written to.
        ConfigError: the base model could not be built again from its description.
    """
    path = Path(folder)
    base = describe_base(model) | origin_of(model, None)
    write_description(model, path, base, weights_in(path), context_source_of(model, None), norms_only=False)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """An OSError in the block becomes a CheckpointError that names the folder; a CheckpointError stays as it is."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot write a checkpoint to {path}: {error}") from error


def origin_of(model: nn.Module, base_id: str | None) -> dict[str, str]:
    """Return ``id`` and ``revision`` of the base model's weights: from ``"user/name@revision"``, else as it says."""
    if base_id is None:
        return base_origin(model)
    name, _, revision = base_id.partition("@")
    return {"id": name, "revision": revision} if revision else {"id": name}


def write_description(
    model: nn.Module,
    path: Path,
    base: dict[str, Any],
    names: list[str],
    source: ContextSource | None,
    norms_only: bool,
) -> None:
    """Write ``context_norm.json`` and the context source beside the weights ``names`` in ``path``."""
    router = router_of(model)
    if source is not None:
        source.save(path / SOURCE_FOLDER)
    Description(
        config=router.config,
        base=base,
        base_fingerprint=base_fingerprint(model) if norms_only else None,
        norms_only=norms_only,
        weights=checksums(path, names),
        context_source=source is not None,
        context_source_sha256=None if source is None else sha256_of(path / SOURCE_FOLDER / SOURCE_FILE),
        pixel_mean=router.pixel_mean,
        pixel_std=router.pixel_std,
        task=router.task,
    ).write(path)
