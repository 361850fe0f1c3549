"""Files of checkpoints: written whole or not at all, and read with a clear word where they are not as they must be."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError

__all__ = ["read_description", "sha256_of", "write_json", "write_whole", "written_whole"]

_CHUNK = 1 << 20  # bytes hashed at a time


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
    return write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
        description = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"No {what} in {path.parent}: {path.name} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or no JSON ({error}). Save it again.") from error
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise CheckpointError(f"{path} is not a {what} of cn_hf: it has no format number.")
    if description["format"] > newest:
        raise CheckpointError(
            f"{path} has format {description['format']}, this version reads up to {newest}: update cn_hf."
        )
    return description
