"""Saving over an older checkpoint: killed at any moment, it leaves the old one or the new one, never a mixture.

A save writes all files into a hidden folder inside the checkpoint's, renames that to ``.cn_hf-saved``, puts its files
in their places, ``config.json`` first, and removes it. A reader takes ``.cn_hf-saved``, whole from its first moment to
its last, for the checkpoint once its ``config.json`` is in place: by that file timm and transformers begin. Until then
no file outside has been touched. The next save into the folder finishes what a killed one had begun, and sweeps its
leftovers.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError

__all__ = ["settled", "staged", "visible_files"]

CONFIG, DESCRIPTION = "config.json", "context_norm.json"
fcntl: Any = None  # Windows has no locks on folders: of two saves into one folder at once, one may fail
with suppress(ImportError):
    fcntl = importlib.import_module("fcntl")
SAVED = ".cn_hf-saved"
_SAVING = ".cn_hf-saving-"
_OWN_FILES = re.compile(
    r"((patched_)?model(-\d{5}-of-\d{5})?|context_norm|context_moments)\.safetensors"
    r"|(patched_)?model\.safetensors\.index\.json|context_source/[^/]+"
)
"""Files of a checkpoint that another reader would take for the new one's, if the new one has none of that name."""


def _is_leftover(name: str) -> bool:
    """True if only a killed save, of this or an earlier version, leaves a file or folder of this name."""
    return re.fullmatch(rf"{re.escape(_SAVING)}[0-9a-f]{{32}}|\..+\.[0-9a-f]{{32}}\.tmp", name) is not None


def settled(folder: Path) -> Path:
    """Return the folder that holds the whole checkpoint: ``folder``, or the one inside it that a killed save left."""
    return folder / SAVED if _in_force(folder) else folder


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; at the end of the block its files replace those of ``folder``.

    Files of other names stay, but for weights and context source of the checkpoint that was there. After an error in
    the block ``folder`` is as it was.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    if folder.name.startswith(_SAVING):  # a part of a checkpoint that is being written
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{_SAVING}{uuid.uuid4().hex}"
    with _locked(folder):
        _finish(folder)
        _sweep(folder)
        staging.mkdir()
        mine = _lock(staging, wait=False)
    try:
        yield staging
        for path in visible_files(staging):
            if (folder / path).is_dir():
                raise CheckpointError(f"{folder / path} is a folder; the checkpoint has a file of that name.")
            with (staging / path).open("rb") as file:
                os.fsync(file.fileno())
        with _locked(folder):
            _finish(folder)
            staging.rename(folder / SAVED)
            _put_in_place(folder)
    finally:
        if mine is not None:
            os.close(mine)
        shutil.rmtree(staging, ignore_errors=True)


def _in_force(folder: Path) -> bool:
    saved = folder / SAVED
    if not saved.is_dir():
        return False
    with suppress(FileNotFoundError):
        return (saved / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    return not (saved / CONFIG).exists()


def _finish(folder: Path) -> None:
    """Finish or undo what a killed save had begun; the caller holds the folder's lock."""
    if _in_force(folder):
        _put_in_place(folder)
    elif (folder / SAVED).is_dir():
        _discard(folder / SAVED)


def _sweep(folder: Path) -> None:
    """Remove what killed saves left, but for folders that a living one holds; the caller holds the folder's lock."""
    for path in [path for path in folder.iterdir() if _is_leftover(path.name)]:
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif fcntl is None:
            shutil.rmtree(path, ignore_errors=True)
        elif (lock := _lock(path, wait=False)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _put_in_place(folder: Path) -> None:
    saved = folder / SAVED
    names = visible_files(saved)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(saved / name, folder / name)
    if DESCRIPTION in names:
        for path in [*folder.iterdir(), *(folder / "context_source").glob("*")]:
            name = path.relative_to(folder).as_posix()
            if _OWN_FILES.fullmatch(name) and name not in names:
                path.unlink(missing_ok=True)
    _discard(saved)


def visible_files(folder: Path) -> list[str]:
    """Return the paths of the files in a folder that are not hidden, relative to it, ``config.json`` first."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    visible = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(visible, key=lambda name: (name != CONFIG, name))


def _replace(source: Path, target: Path) -> None:
    """Give the file another name as well, in the place of what has it."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # not every file system has hard links
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    gone = folder.with_name(f"{_SAVING}{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other saves; where the file system has no locks, do without."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until the handle returned is closed, or the process ends; None if that is not possible."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
