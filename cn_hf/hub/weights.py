"""Weights of a checkpoint: safetensors files, one or several with an index, each known by its checksum.

Names and layout are those of transformers and huggingface_hub: ``model.safetensors``, or
``model-00001-of-00003.safetensors`` and so on beside ``model.safetensors.index.json``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.files import check_regular, read_json, sha256_of, write_json, written_whole

__all__ = [
    "INDEX_FILE",
    "NORMS_FILE",
    "PATCHED_FILE",
    "WEIGHTS_FILE",
    "check_shard_size",
    "check_weights",
    "checksums",
    "fingerprint",
    "is_weights_name",
    "read_header",
    "read_weights",
    "weights_in",
    "write_weights",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NORMS_FILE = "context_norm.safetensors"
PATCHED_FILE = "patched_model.safetensors"
"""Weights of a ``PyTorchModelHubMixin``, whose own loader would take ``model.safetensors`` for a plain model's."""
_LONGEST_HEADER = 1 << 24  # bytes, of 150,000 tensors
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_weights_name(name: object) -> bool:
    """True if ``name`` is a plain name of a safetensors file: no folder, nothing that leads out of one."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors", name) is not None


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, name: str = WEIGHTS_FILE, max_shard_size: int | str = "5GB"
) -> list[str]:
    """Write tensors into one file, or into several with an index where one would exceed ``max_shard_size``.

    Args:
        folder: where to; made if need be.
        tensors: by name, on any device; tied ones are stored once, under their first name.
        name: of the file.
        max_shard_size: bytes, or words such as ``"5GB"``.

    Returns:
        Names of the files that hold tensors.

    Raises:
        OSError: the folder cannot be written to.
    """
    kept = _without_aliases(tensors)
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    split = huggingface_hub.split_torch_state_dict_into_shards(
        kept, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        part = {key: kept[key].detach().cpu().contiguous() for key in names}
        with written_whole(folder / file) as temporary:
            safetensors.torch.save_file(part, temporary, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{name}.index.json", index)
    return list(split.filename_to_tensors)


def check_shard_size(size: int | str) -> None:
    """Raise ``ConfigError`` unless ``size`` is a number of bytes above 0, or words such as ``"5GB"``."""
    words = isinstance(size, str) and re.fullmatch(r"\d+(\.\d+)? *(KB|MB|GB|TB)", size.strip().upper())
    if not words and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f'max_shard_size must be a number of bytes, or words such as "5GB"; received {size!r}.')


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        kept.setdefault(key, name)
    storages: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name in kept.values():  # views of one storage are no aliases, but safetensors wants storages of their own
        tensor = state[name]
        pointer = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.detach().clone() if pointer in storages else tensor
        storages.add(pointer)
    return whole


def weights_in(folder: Path) -> list[str]:
    """Names of the files of full weights in a folder: those the index names, or the one file.

    Raises:
        CheckpointError: the index is no index, or names a file outside the folder.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).exists() or not index.exists():
        return [WEIGHTS_FILE]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is truncated or no index of weights ({error!r}). Save it again.") from error
    for name in names:
        if not is_weights_name(name):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file of its own folder.")
    return names


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: sha256_of(folder / name) for name in names}


def check_weights(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare files with their checksums.

    Raises:
        CheckpointError: a file is missing, or not what was saved.
    """
    if NORMS_FILE not in expected:
        unknown = sorted(set(weights_in(folder)) - set(expected))
        if unknown and (folder / unknown[0]).exists():
            raise CheckpointError(f"{folder} has {unknown[0]}, which its description does not know. Save it again.")
    for name, checksum in expected.items():
        try:
            found = sha256_of(folder / name)
        except FileNotFoundError as error:
            raise _missing(folder, name) from error
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        if found != checksum:
            raise CheckpointError(
                f"{folder / name} is truncated, changed, or of another save than the description beside it. Save it "
                "again, or download it again with force_download=True."
            )


def read_header(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the tensors in files that may be of anybody's making, without reading the tensors.

    Returns:
        Tensors on the meta device.

    Raises:
        CheckpointError: a file is missing or no safetensors file, or has values that are no weights of a model.
    """
    header: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        try:
            with check_regular(path).open("rb") as file:
                if int.from_bytes(file.read(8), "little") > _LONGEST_HEADER:
                    raise CheckpointError(
                        f"{path} is truncated, changed or no safetensors file: its header is too long."
                    )
            with safetensors.safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  # no mapping
                    entry = file.get_slice(key)
                    if entry.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"Expected {', '.join(_DTYPES)} in {path}, received {entry.get_dtype()} as {key}."
                        )
                    header[key] = torch.empty(entry.get_shape(), dtype=_DTYPES[entry.get_dtype()], device="meta")
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise _missing(folder, name) from error
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path} is truncated, changed or no safetensors file: {error}") from error
    return header


def _missing(folder: Path, name: str) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    words = f" ({pickles[0]} is a pickle, which cn_hf never loads)" if pickles else ""
    return CheckpointError(f"The weights are missing: {folder / name}{words}")


def read_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """All tensors of the files, on the CPU.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / name} is no safetensors file: {error}") from error
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values: equal if and only if all of these are."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
