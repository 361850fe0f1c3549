"""Files of a saved context source: ``context_source.json`` and, where it has tensors, ``context_source-….safetensors``.

Each file is written whole under a temporary name and then renamed. The tensors' file bears their checksum in its name
and the JSON, written last, says which: a save killed at any moment leaves the old source or the new one, no mixture.
Nothing in them is executed when read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cn_hf.errors import CheckpointError
from cn_hf.files import as_path, read_description, write_json, write_whole

__all__ = ["CONFIG_FILE", "read_source", "write_source"]

CONFIG_FILE = "context_source.json"
NEWEST_FORMAT = 2


def write_source(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into ``folder``, which is made if need be; its other files are left alone.

    Args:
        folder: where to.
        config: JSON values, with the source's ``"format"`` and ``"type"``.
        tensors: by name; none leaves no tensor file.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = as_path(folder)
    content = dict(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if tensors:
            data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
            write_whole(path / _tensors_file(content["tensors_sha256"]), data)
        write_json(path / CONFIG_FILE, content)
        kept = _tensors_file(content["tensors_sha256"]) if tensors else None
        for old in path.glob(_tensors_file("*")):
            if old.name != kept:
                old.unlink()
    except OSError as error:
        raise CheckpointError(f"Cannot write the context source to {path}: {error}") from error


def _tensors_file(checksum: str) -> str:
    return f"context_source-{checksum[:16]}.safetensors"


def read_source(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files, checked against each other.

    Returns:
        The JSON's content and the tensors.

    Raises:
        CheckpointError: a file is missing, truncated, of a newer format, or not the other's counterpart.
    """
    path = as_path(folder) / CONFIG_FILE
    config = read_description(path, newest=NEWEST_FORMAT, what="context source")
    checksum = config.pop("tensors_sha256", None)
    if checksum is None:
        return config, {}
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CheckpointError(f"{path} has {checksum!r} for the checksum of its tensors. Save the source again.")
    return config, _read_tensors(path.with_name(_tensors_file(checksum)), checksum)


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}, which {CONFIG_FILE} goes with, cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise CheckpointError(f"{path} is truncated or changed. Save the source again.")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return tensors
