"""Everything of a run that changes while it trains: taken down in checkpoints and put back bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from cn_hf.errors import ConfigError, TrainingError
from cn_hf.training.averaging import WeightAverage
from cn_hf.training.checkpoints import find_checkpoint, save_checkpoint
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.sharding import is_sharded
from cn_hf.training.tensors import (
    load_model_state,
    load_optimizer_state,
    local_copy,
    random_state,
    set_random_state,
)

__all__ = ["Place", "RunState"]


@dataclasses.dataclass(slots=True)
class Place:
    """Where a run is.

    Attributes:
        epoch: Epochs done.
        batch: Batches done of the epoch that is under way.
        step: Optimizer steps done.
        finished: Whether nothing is left to do.
        seconds: Training time of the epoch under way.
        totals: Its sums of losses, right answers and images, then those of the objective's further metrics.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    finished: bool = False
    seconds: float = 0.0
    totals: list[float] = dataclasses.field(default_factory=list)


class RunState:
    """Weights, their average, optimizer, loss scale, random numbers, history and place of a run.

    Args:
        network: The network inside all wrappers.
        optimizer: As Accelerate prepared it.
        config: Of the run; a checkpoint of another is refused.
        accelerator: Whose processes share the run.
        fingerprint: Of the training data; a checkpoint of other data is refused.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Any,
        config: TrainingConfig,
        accelerator: Accelerator,
        fingerprint: str | None,
    ) -> None:
        self.network, self.optimizer, self.config = network, optimizer, config
        self.accelerator, self.fingerprint = accelerator, fingerprint
        self.average = None if config.ema_decay is None else WeightAverage(network, config.ema_decay)
        self.place, self.history = Place(), History()
        self.best_weights: dict[str, Any] | None = None
        self._saved: tuple[int, Path] | None = None

    def keep_as_best(self) -> None:
        """Remember the weights the network has now as the best so far."""
        self.best_weights = local_copy(self.network.state_dict())

    def settle(self) -> None:
        """Give the network the weights that the run ends with."""
        if self.best_weights is not None:
            load_model_state(self.network, self.best_weights)
        elif self.average is not None:
            self.average.copy_to_network()

    def save(self, folder: Path) -> Path:
        """Write a checkpoint into ``folder`` unless this step has one; every process must call it.

        Raises:
            CheckpointError: It cannot be written.
        """
        step, keep = self.place.step, self.config.keep_checkpoints
        if self._saved is None or self._saved[0] != step:
            path = save_checkpoint(folder, step, self.files(), keep=keep, accelerator=self.accelerator)
            self._saved = step, path
        return self._saved[1]

    def files(self) -> dict[str, Any]:
        """What this process has to write down: its random numbers, and its part of the rest, or all of it in one."""
        rank, scaler = self.accelerator.process_index, self.accelerator.scaler
        files: dict[str, Any] = {f"random-{rank:05d}.pt": random_state(self.accelerator.device)}
        if rank == 0 or is_sharded(self.accelerator):
            files[f"state-{rank:05d}.pt"] = {
                "config": self.config.to_dict(),
                "data": self.fingerprint,
                "processes": self.accelerator.num_processes,
                "sharded": is_sharded(self.accelerator),
                "place": dataclasses.asdict(self.place),
                "history": self.history.to_dict(),
                "model": local_copy(self.network.state_dict()),
                "optimizer": local_copy(self.optimizer.state_dict()),
                "scaler": None if scaler is None else scaler.state_dict(),
                "average": None if self.average is None else self.average.state(),
                "best": self.best_weights,
            }
        return files

    def resume(self, folder: Path, description: str) -> None:
        """Put back the newest whole checkpoint of ``folder``; where there is none, say so and leave all as it is.

        Raises:
            ConfigError: The checkpoint is of a run with another config; what differs is listed.
            TrainingError: It is of other data, or holds no part for this process.
            CheckpointError: No checkpoint is whole.
        """
        say = self.accelerator.print
        found = find_checkpoint(folder, self.accelerator)
        if found is None:
            say(f"{description}: no checkpoint yet, starting from the beginning")
            return
        for problem in found.damaged:
            say(f"{description}: passed over the damaged checkpoint {problem}")
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        state = found.read(f"state-{rank if is_sharded(self.accelerator) else 0:05d}.pt")
        self._check_same_run(found.path, state)
        self.place, self.history = Place(**state["place"]), History.from_dict(state["history"])
        self.best_weights = state["best"]
        load_model_state(self.network, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])
        if state["processes"] == processes:
            set_random_state(found.read(f"random-{rank:05d}.pt"), self.accelerator.device)
        else:
            set_seed(self.config.seed + self.place.step, device_specific=True)
            say(
                f"{description}: the checkpoint is of {state['processes']} processes, this run has {processes}; "
                "dropout and the like will differ from a run that never stopped"
            )
        self._saved = self.place.step, found.path
        say(f"{description}: going on after step {self.place.step} ({found.path.name})")

    def _check_same_run(self, path: Path, state: Any) -> None:
        sharded = is_sharded(self.accelerator)
        if state is None or state["sharded"] != sharded:
            raise TrainingError(f"{path} is of a run {'without' if sharded else 'with'} FSDP; start it as it was then")
        if sharded and state["processes"] != self.accelerator.num_processes:
            raise TrainingError(
                f"{path} is of {state['processes']} processes, each of which had a part of the weights; use as many"
            )
        if listed := self.config.differences_in_words(state["config"]):
            raise ConfigError(f"{path} is of a run with another config ({listed}); use the same, or another folder")
        if state["data"] != self.fingerprint:
            raise TrainingError(
                f"the training data is not what {path} was trained on: images, labels or contexts have changed since; "
                "restore them, or start anew with --overwrite"
            )
