"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write ``content`` under a temporary name beside ``path``, then rename it; missing folders are made.

    A reader, or a run killed half-way, meets the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written to, or is full; a file that was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
