"""The folder that compiled kernels are kept in: private, so that what is loaded from it is what this user compiled.

Everything in it is named by a hash of what it depends on (sources, compiler, processor, versions). Beside a library
stands its checksum, and beside both a list of the kernels that agreed with the formulas.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cn_hf.files import sha256_of, write_whole

__all__ = ["Remembered", "intact", "private_folder", "sweep", "write_checksum"]


def private_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/cn_hf/kernels``, or the same in ``~/.cache``; missing folders are made, for this user.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG specification asks.

    Raises:
        OSError: it cannot be made, is a link, belongs to another user, or other users may replace it.
        RuntimeError: there is no home folder.
    """
    if os.name != "posix":
        raise OSError("Compiled kernels are kept where files have owners; this system's have none.")
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = base.resolve()
    for place in (base, *base.parents):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                f"Every user may replace what is in {place}. Set XDG_CACHE_HOME to a folder of yours."
            )
    folder = base
    for name in ("cn_hf", "kernels"):
        folder /= name
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(
                f"Expected {folder} to be a folder of this user, received a link or another user's. Remove it, or set "
                "XDG_CACHE_HOME to a folder of yours."
            )
        if status.st_mode & 0o022 or name == "kernels":
            folder.chmod(0o700)
    return folder


def intact(path: Path) -> bool:
    """True if ``path`` is a file of this user with the checksum that ``write_checksum`` took."""
    checksum = _checksum_of(path)
    try:
        return _own(path) and _own(checksum) and checksum.read_bytes().strip() == sha256_of(path).encode()
    except OSError:
        return False


def write_checksum(path: Path) -> None:
    """Take down the checksum of a library that is complete."""
    write_whole(_checksum_of(path), sha256_of(path).encode())


def sweep(folder: Path) -> None:
    """Remove what compilers that were killed left half-made. For the process that holds the folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class Remembered:
    """Names in a file, one a line, that processes add to. A folder that cannot be written to is no error.

    Args:
        path: of the file; None: nothing is remembered.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        try:
            return self.path is not None and _own(self.path) and name.encode() in self.path.read_bytes().split(b"\n")
        except OSError:
            return False

    def add(self, name: str) -> None:
        """Add a name, in one write: several processes may do so at once."""
        try:
            if self.path is not None:
                with self.path.open("ab", buffering=0) as file:
                    file.write(f"{name}\n".encode())
        except OSError:
            pass


def _checksum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _own(path: Path) -> bool:
    """True for a file of this user: in a private folder nobody else can have written to it.

    Raises:
        OSError: there is none.
    """
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
