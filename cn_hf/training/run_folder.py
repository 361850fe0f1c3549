"""The folder of a run: whose it is, and when it may be used.

``run.json`` is written first and says which run the folder belongs to, ``results.json`` last and says that it is
finished. No other run gets the folder without ``overwrite``, which removes what a run writes and nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.files import read_description, write_json, write_whole
from cn_hf.training.config import TrainingConfig

__all__ = ["CHECKPOINT", "CHECKPOINTS", "RESULTS", "RUN", "RUN_FILES", "check_folder", "check_writable", "claim_folder"]

FORMAT = 1
RUN, RESULTS, CHECKPOINT, CHECKPOINTS = "run.json", "results.json", "checkpoint", "checkpoints"
RUN_FILES = (
    RUN, RESULTS, CHECKPOINTS, "config.yaml", "history.json", "table.md", "curves.png", "protocols.png", CHECKPOINT,
    "baseline", "logs", "networks", "report.md", "contexts.png", "contact_sheet.png",
)  # fmt: skip
"""What a run may leave in its folder."""


def check_folder(folder: Path, config: TrainingConfig, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Whether a run may have the folder: better known before data is loaded than after.

    Args:
        folder: Made if need be.
        config: Of the run.
        resume: Go on with the run that the folder holds, if it holds one.
        overwrite: Remove the run that the folder holds, if it holds one.

    Returns:
        Whether the folder holds this very run, finished.

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
    if present and resume:
        return finished
    try:
        # run.json goes last and comes first, so that a folder half-emptied or half-filled is still known as a run's.
        for name in reversed(present):
            (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
        write_json(folder / RUN, {"format": FORMAT, "config": config.to_dict()})
        write_whole(folder / "config.yaml", config.to_yaml().encode())
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
