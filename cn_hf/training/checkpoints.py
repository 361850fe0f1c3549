"""Training checkpoints on disk: each written whole or not at all, the last few kept, a damaged one passed over.

A checkpoint is a folder ``step-00000120`` of files from every process and ``manifest.json`` with their sizes and
checksums. It is made under a hidden name and renamed when everything is in it, so that a run killed at any moment
leaves the checkpoints it had. Nothing in it is executed when it is read (``weights_only``). With several machines the
folder must be one that all of them share.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cn_hf.errors import CheckpointError
from cn_hf.files import read_description, sha256_of, write_json
from cn_hf.processes import gathered, on_main, together

__all__ = ["Checkpoint", "find_checkpoint", "newest_step", "save_checkpoint", "write_together"]

FORMAT = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found whole.

    Attributes:
        path: Its folder.
        step: Optimizer steps done.
        damaged: Newer checkpoints that had to be passed over, each with what is wrong with it.
    """

    path: Path
    step: int
    damaged: tuple[str, ...]

    def read(self, name: str) -> Any:
        """Load what ``save_checkpoint`` was given under ``name``, tensors on the CPU; None where there is no such file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        file = self.path / name
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def save_checkpoint(
    folder: Path, step: int, files: Mapping[str, Any], *, keep: int, accelerator: Accelerator, prefix: str = "step"
) -> Path:
    """Write a checkpoint of all processes, then remove all but the newest ``keep``; every process must call it.

    Args:
        folder: Where checkpoints are; made if need be.
        step: Optimizer steps done.
        files: File name to what ``torch.save`` writes into it; names differ between processes.
        keep: How many checkpoints to keep.
        accelerator: Whose processes take part.
        prefix: Another one makes a checkpoint that is neither counted, removed nor resumed from.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: A file cannot be written; the older checkpoints are untouched.
    """
    final = folder / f"{prefix}-{step:08d}"
    partial = folder / f".{final.name}.partial"
    described: dict[str, dict[str, Any]] = {}

    def publish() -> None:
        _publish(partial, final, step, everything)
        if prefix == "step":
            _prune(folder, step, keep)

    try:
        on_main(_explained(lambda: _clear(folder, partial), folder))
        together(_explained(lambda: _write(partial, files, described), folder))
        everything = {name: facts for part in gathered([described]) for name, facts in part.items()}
        on_main(_explained(publish, folder))
    except CheckpointError:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def newest_step(folder: Path) -> int:
    """Steps done at the newest checkpoint in the folder, whole or not; 0 where there is none."""
    return max(map(_step_of, _checkpoints(folder)), default=0)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, the same in every process; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged.
    """
    name, damaged = on_main(lambda: _newest_whole(folder))
    if name is not None:
        path = folder / name
        return Checkpoint(path=path, step=_step_of(path), damaged=tuple(damaged))
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Start anew with --overwrite, or another folder."
        )
    return None


def _newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    damaged: list[str] = []
    for path in sorted(_checkpoints(folder), key=_step_of, reverse=True):
        problem = _damage(path)
        if problem is None:
            return path.name, damaged
        damaged.append(f"{path.name} ({problem})")
    return None, damaged


def _damage(path: Path) -> str | None:
    """Return the fault of a checkpoint in words; None if it has none."""
    try:
        manifest = read_description(path / _MANIFEST, newest=FORMAT, what="training checkpoint")
    except CheckpointError as error:
        return str(error)
    try:
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != facts["bytes"]:
                return f"{name} has {size:,} of {facts['bytes']:,} bytes"
            if sha256_of(file) != facts["sha256"]:
                return f"{name} has another checksum than it was written with"
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return repr(error)
    return None


def _checkpoints(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _clear(folder: Path, partial: Path) -> None:
    """Make room, without what a killed run left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(".*.partial"), *folder.glob(".*.removed")):
        shutil.rmtree(left)
    partial.mkdir()


def _write(partial: Path, files: Mapping[str, Any], described: dict[str, dict[str, Any]]) -> None:
    for name, content in files.items():
        path = partial / name
        with path.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        described[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _publish(partial: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    write_json(partial / _MANIFEST, {"format": FORMAT, "step": step, "files": files})
    if final.exists():
        _remove(final)
    partial.rename(final)
    _sync_folder(final.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep``; those of later steps were passed over as damaged, and go first."""
    paths = sorted(_checkpoints(folder), key=_step_of)
    later = [path for path in paths if _step_of(path) > step]
    for path in (*later, *paths[: len(paths) - len(later)][:-keep]):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; if killed meanwhile, what is left no longer has a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_together(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole, in the main process; every process must call it.

    Raises:
        CheckpointError: It cannot be written; in every process.
    """
    on_main(_explained(lambda: write_json(path, value), path.parent))


def _explained(write: Callable[[], object], folder: Path) -> Callable[[], None]:
    """Return ``write`` with a clear error; a full disk is an OSError, but a RuntimeError in ``torch.save``."""

    def call() -> None:
        try:
            write()
        except (OSError, RuntimeError) as error:
            free = f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free)" if folder.is_dir() else ""
            raise CheckpointError(
                f"a checkpoint cannot be written: {type(error).__name__}: {error}{free}; the ones before it are whole. "
                "Make room or give another folder, then go on with --resume."
            ) from error

    return call
