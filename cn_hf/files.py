"""Files of checkpoints: written whole or not at all, and read with a clear word where they are not as they must be."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError, InputTypeError

__all__ = [
    "MOST_YAML",
    "as_path",
    "check_regular",
    "read_bounded",
    "read_description",
    "read_json",
    "sha256_of",
    "write_json",
    "write_whole",
    "written_whole",
]

_CHUNK = 1 << 20  # bytes hashed at a time
_MOST_BYTES, _MOST_VALUES = 1 << 25, 1_000_000  # of a file read as text: results of 100,000 images need 6 MB
MOST_YAML = 100_000
"""Bytes of a configuration in YAML, which takes a second to parse when it is as long."""


def as_path(folder: str | os.PathLike[str]) -> Path:
    """Return ``folder`` as a path.

    Raises:
        CheckpointError: no file system could hold it: it has NUL or a lone surrogate.
        InputTypeError: it is no path, or empty.
    """
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str) or not os.fspath(folder):
        raise InputTypeError(f"folder must be a path, received {folder!r}.")
    try:
        usable = b"\0" not in os.fsencode(folder)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise CheckpointError(f"folder must be a path that a file system can hold, received {os.fspath(folder)!r}.")
    return Path(folder)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, renamed at the end of the block; missing folders are made.

    A reader, or a run killed half-way, meets the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written to, or is full; a file that was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path`` as ``written_whole`` does.

    Raises:
        OSError: the folder cannot be written to, or is full; a file that was there before is untouched.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` to ``path`` as JSON to be read by people, whole or not at all.

    Raises:
        TypeError: it has no JSON form; nothing is written.
        OSError: the folder cannot be written to, or is full; a file that was there before is untouched.
    """
    return write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def check_regular(path: Path) -> Path:
    """Return ``path`` if it is a regular file, or a link to one: a pipe or a device would block, or never end.

    Raises:
        OSError: the file is missing or cannot be looked at; a ``CheckpointError`` if it is anything else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"Expected a file, received {path}, which is a folder, a pipe or a device.")
    return path


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Raises:
        OSError: the file cannot be read, or is none.
    """
    digest = hashlib.sha256()
    with check_regular(Path(path)).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_bounded(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Content of a file of text from outside: JSON or YAML, which take many times their size when parsed.

    Raises:
        OSError: the file cannot be read; a ``CheckpointError`` if it is no file, or larger than such files are.
    """
    with check_regular(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    values = sum(map(content.count, (b",", b"[", b"{"))) if len(content) > _MOST_VALUES else 0
    if len(content) > most_bytes or values > _MOST_VALUES:
        raise CheckpointError(
            f"Expected at most {most_bytes:,} bytes and {_MOST_VALUES:,} values, received more in {path}."
        )
    return content


def read_json(path: Path) -> Any:
    """Value of a JSON file from outside: of bounded size, and with each key once.

    Raises:
        OSError: the file cannot be read; a ``CheckpointError`` if it is no file, or larger than such files are.
        ValueError: the content is no such JSON.
    """
    try:
        return json.loads(read_bounded(path), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


def read_description(path: Path, *, newest: int, what: str) -> dict[str, Any]:
    """Read a JSON object that carries the number of its format.

    Args:
        path: the file.
        newest: the highest ``"format"`` this version reads.
        what: what the file describes, for messages.

    Raises:
        CheckpointError: it is missing, truncated, of another kind or of a newer format.
    """
    try:
        description = read_json(path)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"No {what} in {path.parent}: {path.name} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or no JSON ({error}). Save it again.") from error
    version = description.get("format") if isinstance(description, dict) else None
    if not isinstance(description, dict) or type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not a {what} of cn_hf: it has no format number from 1, but {version!r}.")
    if description["format"] > newest:
        raise CheckpointError(
            f"{path} has format {description['format']}, this version reads up to {newest}: update cn_hf."
        )
    return description
