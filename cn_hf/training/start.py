"""How a run starts, whatever it trains: options checked, processes joined, the output folder looked at."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cn_hf.errors import ConfigError
from cn_hf.training.config import TrainingConfig
from cn_hf.training.networks import check_network_name
from cn_hf.training.run_folder import check_folder, claim_folder
from cn_hf.training.supervised import make_accelerator
from cn_hf.training.tracking import check_trackers

__all__ = ["claim_run", "start_run"]


def start_run(
    config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool
) -> tuple[Accelerator, Path | None, bool]:
    """Everything before data is loaded; every process must call it, and all get the same answer.

    Args:
        config: Of the run.
        resume: See ``check_folder``.
        overwrite: See ``check_folder``.
        dry_run: Leave the folder as it is.

    Returns:
        The accelerator, the output folder if there is one, and whether that holds this run, finished; it is then said.

    Raises:
        CnHfError: The config, network or folder is not as it must be; see the class raised.
    """
    if config.output_dir is None and (resume or overwrite):
        raise ConfigError("resume and overwrite are about the run in an output folder; give output_dir")
    check_trackers(config.trackers, has_folder=config.output_dir is not None)
    accelerator = make_accelerator(config)
    folder = None if config.output_dir is None else Path(config.output_dir)
    if folder is not None and not dry_run:
        finished = [accelerator.is_main_process and check_folder(folder, config, resume=resume, overwrite=overwrite)]
        broadcast_object_list(finished)
        if finished[0]:
            accelerator.print(f"{folder} holds this run, finished; nothing to do")
            return accelerator, folder, True
    check_network_name(config.model)
    return accelerator, folder, False


def claim_run(
    config: TrainingConfig, accelerator: Accelerator, folder: Path | None, *, resume: bool, overwrite: bool
) -> None:
    """Make the folder this run's own: after all that may be wrong with the options, so that nothing is lost by a typo.

    Every process must call it; arguments as of ``start_run``, and what that returned.

    Raises:
        CheckpointError: Another run has taken the folder since, or it cannot be written to.
    """
    if folder is not None and accelerator.is_main_process:
        claim_folder(folder, config, resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()
