"""The start of a run, and its folder: to whom that belongs, and when it may be used.

``run.json`` is written first and says which run the folder belongs to, ``results.json`` last and says that it is
finished. No other run gets the folder without ``overwrite``, which removes what a run writes and nothing else; while a
run is going on, nothing gets it. The lock is the operating system's, so that it does not outlive a killed process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.files import read_description, write_json, write_whole
from cn_hf.processes import explain_lost_process, on_main
from cn_hf.training.config import TrainingConfig
from cn_hf.training.networks import check_network_name
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.tracking import check_trackers

__all__ = [
    "CHECKPOINT",
    "CHECKPOINTS",
    "RESULTS",
    "RUN",
    "RUN_FILES",
    "OpenFolder",
    "StartedRun",
    "check_folder",
    "check_writable",
    "claim_folder",
    "held_folder",
    "is_held",
    "started_run",
]

FORMAT = 1
LOCK = ".lock"
RUN, CONFIG, RESULTS, CHECKPOINT, CHECKPOINTS = "run.json", "config.yaml", "results.json", "checkpoint", "checkpoints"
RUN_FILES = (
    RUN, RESULTS, CHECKPOINTS, CONFIG, "history.json", "table.md", "curves.png", "protocols.png", CHECKPOINT,
    "baseline", "logs", "networks", "report.md", "contexts.png", "contact_sheet.png",
)  # fmt: skip
"""Names that a run may leave in its folder."""


class OpenFolder:
    """A folder that is written to for a long time: notices that it was removed or replaced meanwhile.

    Args:
        path: Made if need be.

    Raises:
        CheckpointError: It cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # As long as it is open, no other folder gets its number.
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"output_dir {path} cannot be written to: {error}; give another folder") from error

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def check(self) -> None:
        """Look whether the folder is still the same.

        Raises:
            CheckpointError: It was removed or replaced.
        """
        if not _is_open_at(self._descriptor, self.path):
            raise CheckpointError(
                f"{self.path} was removed or replaced while the run was writing to it, so what it held is gone. Start "
                "the run again."
            )


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[OpenFolder]:
    """Keep other runs out of a folder for the block.

    Raises:
        CheckpointError: A run that is going on has it, or it cannot be written to.
    """
    check_writable(path)
    with OpenFolder(path) as folder:
        try:
            descriptor = _locked(path / LOCK)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{path} belongs to a run that is going on in another process. Wait for it to end, or give another "
                "folder."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path / LOCK} cannot be locked: {error}; give another folder") from error
        try:
            yield folder
        finally:
            if _is_open_at(descriptor, path / LOCK):
                (path / LOCK).unlink()
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """True if a run is going on in the folder."""
    try:
        os.close(_locked(path / LOCK, make=False))
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _locked(path: Path, *, make: bool = True) -> int:
    """Return the descriptor of a file with the operating system's lock on it.

    Raises:
        BlockingIOError: Another process, or another descriptor of this one, has the lock.
        OSError: The file cannot be made, or its file system has no locks.
    """
    import fcntl  # Unix only

    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_open_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile


def _is_open_at(descriptor: int, path: Path) -> bool:
    """True if the path leads to the open file or folder."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartedRun:
    """A run whose options are checked and whose folder is kept for it.

    Attributes:
        config: Its options.
        accelerator: Whose processes share the run.
        folder: Its output folder, if it has one.
        finished: True if the folder holds this run, finished.
        resume: See ``check_folder``.
        overwrite: See ``check_folder``.
        opened: The folder in the main process, if it is going to be written to.
    """

    config: TrainingConfig
    accelerator: Accelerator
    folder: Path | None
    finished: bool
    resume: bool
    overwrite: bool
    opened: OpenFolder | None

    def claim(self) -> None:
        """Make the folder this run's own: after all that may be wrong with the options, so that a typo loses nothing.

        Every process must call it.

        Raises:
            CheckpointError: It cannot be written to.
        """
        if (folder := self.folder) is not None:
            on_main(lambda: claim_folder(folder, self.config, resume=self.resume, overwrite=self.overwrite))

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Give True in the main process of a run with a folder, which then writes; an error there is raised in all.

        Raises:
            CheckpointError: The folder was removed or replaced, before or meanwhile.
        """
        error: list[Exception] = []
        writes = self.opened is not None
        try:
            if self.opened is not None:
                self.opened.check()
            yield writes
            if self.opened is not None:
                self.opened.check()
        except Exception as caught:
            error.append(caught)

        def report() -> None:
            if error:
                raise error[0]

        on_main(report)


@contextlib.contextmanager
def started_run(config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> Iterator[StartedRun]:
    """Start a run: everything before data is loaded. Every process must enter it, and all get the same answer.

    Args:
        config: Of the run.
        resume: See ``check_folder``.
        overwrite: See ``check_folder``.
        dry_run: Leave the folder as it is.

    Raises:
        CnHfError: The config, network or folder is not as it must be; see the class raised.
        TrainingError: Another process ended within the block.
    """
    if config.output_dir is None and (resume or overwrite):
        raise ConfigError("resume and overwrite are about the run in an output folder; give output_dir")
    check_trackers(config.trackers, has_folder=config.output_dir is not None)
    accelerator = make_accelerator(config)
    folder = None if config.output_dir is None else Path(config.output_dir)
    with explain_lost_process(), contextlib.ExitStack() as stack:
        opened: list[OpenFolder] = []
        finished = False
        if folder is not None and not dry_run:
            finished = on_main(lambda: _enter(folder, config, resume, overwrite, stack, opened))
        if finished:
            accelerator.print(f"{folder} holds this run, finished; nothing to do")
        else:
            check_network_name(config.model)
        yield StartedRun(
            config=config,
            accelerator=accelerator,
            folder=folder,
            finished=finished,
            resume=resume,
            overwrite=overwrite,
            opened=opened[0] if opened else None,
        )


def _enter(
    folder: Path,
    config: TrainingConfig,
    resume: bool,
    overwrite: bool,
    stack: contextlib.ExitStack,
    opened: list[OpenFolder],
) -> bool:
    """Take the folder until the stack ends, and return the answer of ``check_folder``."""
    opened.append(stack.enter_context(held_folder(folder)))
    return check_folder(folder, config, resume=resume, overwrite=overwrite)


def check_folder(folder: Path, config: TrainingConfig, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Check that a run may have the folder: better known before data is loaded than after.

    Args:
        folder: Made if need be.
        config: Of the run.
        resume: Go on with the run that the folder holds, if it holds one.
        overwrite: Remove the run that the folder holds, if it holds one.

    Returns:
        True if the folder holds this very run, finished.

    Raises:
        ConfigError: Both ``resume`` and ``overwrite``, or the run in the folder has another config (differences are
            listed).
        CheckpointError: The folder holds a run and neither was given, or it cannot be written to.
    """
    if resume and overwrite:
        raise ConfigError("resume goes on with the run in the folder and overwrite removes it; give one of them")
    check_writable(folder)
    present = [name for name in RUN_FILES if (folder / name).exists()]
    if present and RUN not in present:
        raise CheckpointError(
            f"{folder} holds {', '.join(present)}, but not of a run of this program; give another folder"
        )
    if present and not resume and not overwrite:
        state = "a finished run" if RESULTS in present else "a run that was stopped"
        raise CheckpointError(
            f"{folder} holds {state}; go on with it (--resume), remove it (--overwrite) or give another folder"
        )
    if present and resume:
        described = read_description(folder / RUN, newest=FORMAT, what="description of a run")
        if listed := config.differences_in_words(described["config"]):
            raise ConfigError(f"{folder} holds a run with another config ({listed}); use the same, or another folder")
        return RESULTS in present
    return False


def claim_folder(folder: Path, config: TrainingConfig, *, resume: bool = False, overwrite: bool = False) -> bool:
    """``check_folder``, then make the folder this run's own: only once everything else that it needs is known to be.

    Files that are not a run's stay.
    """
    finished = check_folder(folder, config, resume=resume, overwrite=overwrite)
    present = [name for name in RUN_FILES if (folder / name).exists()]
    try:
        if present and resume:
            if not (folder / CONFIG).is_file():  # killed between the two
                write_whole(folder / CONFIG, config.to_yaml().encode())
            return finished
        # run.json goes last and comes first, so that a folder half-emptied or half-filled is still known as a run's.
        for name in reversed(present):
            (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
        write_json(folder / RUN, {"format": FORMAT, "config": config.to_dict()})
        write_whole(folder / CONFIG, config.to_yaml().encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be prepared for the run: {error}") from error
    return False


def check_writable(folder: Path) -> None:
    """Make the folder and try to write into it, better before training than after.

    Raises:
        CheckpointError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # on Linux it has no name that a killed run could leave behind
    except OSError as error:
        raise CheckpointError(f"output_dir {folder} cannot be written to: {error}; give another folder") from error
