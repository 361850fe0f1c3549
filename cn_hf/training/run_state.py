"""Everything of a run that changes while it trains: saved in checkpoints and put back bit for bit.

Tensors sharded over processes (DTensor, as FSDP2 makes them) are stored as each process's own part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cn_hf.errors import ConfigError, TrainingError
from cn_hf.training.checkpoints import find_checkpoint, save_checkpoint
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.preparation import is_sharded

__all__ = ["Place", "RunState", "WeightAverage"]


@dataclasses.dataclass(slots=True)
class Place:
    """The place of a run: epoch, step and what was seen.

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
        """Return the files of this process: its random numbers, and its part of the rest, or all of it in one."""
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
        found = find_checkpoint(folder)
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


class WeightAverage:
    """Averages of all parameters and floating-point buffers of a network: ``a <- decay a + (1 - decay) w`` per step.

    Other buffers are taken as they are.

    Args:
        network: Whose weights; must not change its structure afterwards.
        decay: In [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._network = network
        self._averages = {name: tensor.detach().clone() for name, tensor in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._network.state_dict().items() if isinstance(tensor, Tensor)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights of now into the averages."""
        for name, weight in self._weights().items():
            if weight.is_floating_point():
                self._averages[name].lerp_(weight.detach(), 1 - self.decay)
            else:
                self._averages[name].copy_(weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averages within the block, and its own weights again afterwards."""
        own = {name: tensor.detach().clone() for name, tensor in self._weights().items()}
        self.copy_to_network()
        try:
            yield
        finally:
            self._network.load_state_dict(own, strict=False)

    def copy_to_network(self) -> None:
        """The network gets the averages for good."""
        self._network.load_state_dict(self._averages, strict=False)

    def state(self) -> dict[str, Tensor]:
        """A copy of this process's part of the averages on the CPU."""
        copied: dict[str, Tensor] = local_copy(self._averages)
        return copied

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave."""
        for name, average in self._averages.items():
            average.copy_(as_part_of(average, state[name]))


def local_copy(state: Any) -> Any:
    """A state dict with every tensor replaced by a copy of this process's part of it on the CPU."""
    if isinstance(state, Tensor):
        local = state.to_local() if isinstance(state, DTensor) else state
        return local.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: local_copy(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(local_copy(value) for value in state)
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what ``local_copy(model.state_dict())`` took."""
    current = model.state_dict()
    model.load_state_dict({name: as_part_of(current.get(name), value) for name, value in state.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what ``local_copy(optimizer.state_dict())`` took."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {name: as_part_of(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def as_part_of(like: Any, value: Any) -> Any:
    """``value`` as this process's part of a tensor sharded as ``like`` is; as it is where that is not sharded."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.ndim != like.ndim:
        return value
    part = value.to(like.to_local().device)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def random_state(device: torch.device) -> dict[str, Any]:
    """The random generators of Python, NumPy and torch, also of a CUDA ``device``, in this process."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what ``random_state`` took."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
