"""Experiment trackers (tensorboard, wandb, trackio, ...) as Accelerate runs them.

Accelerate leaves out a tracker that is not installed without a word; here it is an error. Numbers then go to all of
them by ``accelerator.log({name: number}, step=step)``; each tracker's ``finish()`` closes it.

Files lie under ``<output folder>/logs``: tensorboard's in ``cn_hf``, wandb's in ``wandb``. Without a network, wandb
needs ``WANDB_MODE=offline`` in the environment (``wandb sync`` uploads later); trackio stores locally anyway, where
``trackio show`` finds it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from cn_hf.errors import CheckpointError, ConfigError, nearest
from cn_hf.files import write_whole
from cn_hf.processes import on_main
from cn_hf.training.config import TrainingConfig

__all__ = ["check_trackers", "start_trackers", "tracked"]

PROJECT = "cn_hf"
FOLDER = "logs"
RUN_ID = "run_id"
# Values that trackers take as a run's options.
Option = str | int | float | bool | None


def check_trackers(names: Sequence[str], *, has_folder: bool = True) -> None:
    """Check that every tracker is known and installed, better before training than after.

    Args:
        names: As Accelerate knows them: "tensorboard", "wandb", "trackio", "comet_ml", ...
        has_folder: Whether the run has an output folder, which some of them write into.

    Raises:
        ConfigError: One is unknown (the nearest is named), not installed (the command is named), needs a folder, or is
            named twice.
    """
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    installed = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown tracker {name!r}; {nearest(name, known)}")
        if names.count(name) > 1:
            raise ConfigError(f"tracker {name!r} is named more than once")
        if name not in installed:
            raise ConfigError(f"tracker {name!r} is not installed; pip install {name.replace('_', '-')}")
        if not has_folder and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            raise ConfigError(f"tracker {name!r} writes files; give an output_dir for them")


def start_trackers(accelerator: Accelerator, config: TrainingConfig, folder: Path | None, *, step: int = 0) -> None:
    """Start the trackers that ``config`` names, in the main process, and give them the config as the run's options.

    A run that goes on in its folder goes on as the same run of wandb and trackio, which find its id in the folder.

    Args:
        accelerator: Of the run; call it in every process.
        config: Of the run.
        folder: Of the run, or None.
        step: That the run goes on after. Tensorboard then shows nothing that was logged for later steps before.

    Raises:
        ConfigError: See ``check_trackers``.
        CheckpointError: The folder cannot be written to.
    """
    check_trackers(config.trackers, has_folder=folder is not None)
    if not config.trackers:
        return
    logs = None if folder is None else folder / FOLDER
    options: dict[str, dict[str, Any]] = {}
    run_id = on_main(lambda: _run_id(logs))
    if accelerator.is_main_process:
        name = run_id if folder is None else f"{folder.resolve().name}-{run_id}"
        options["tensorboard"] = {"purge_step": step + 1}
        options["wandb"] = {"id": run_id, "name": name, "resume": "allow", "dir": None if logs is None else str(logs)}
        options["trackio"] = {"name": name, "resume": "allow"}
    accelerator.log_with = list(config.trackers)
    accelerator.project_configuration.logging_dir = None if logs is None else str(logs)
    accelerator.init_trackers(PROJECT, _flat(config.to_dict()), options)


@contextmanager
def tracked(accelerator: Accelerator, config: TrainingConfig, folder: Path | None, *, step: int) -> Iterator[None]:
    """``start_trackers`` for the block, at whose end, also after an error, each of them is closed."""
    start_trackers(accelerator, config, folder, step=step)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would end the processes' group, too
            tracker.finish()


def _run_id(logs: Path | None) -> str:
    """The id under which a run was first tracked, or a new one."""
    new = uuid.uuid4().hex[:8]
    if logs is None:
        return new
    path = logs / RUN_ID
    try:
        if path.is_file():
            return path.read_text(encoding="ascii").strip()
        write_whole(path, new.encode())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the trackers' folder {logs} cannot be used: {error}") from error
    return new


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Option]:
    """Nested options as ``{"norm_options.eps": 0.001}``: tensorboard takes neither mappings nor lists."""
    flat: dict[str, Option] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, str | int | float):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat
