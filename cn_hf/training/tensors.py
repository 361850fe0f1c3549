"""What a running training consists of besides its data: taken down, and put back bit for bit.

Tensors sharded over processes (DTensor, as FSDP2 makes them) are stored as each process's own part.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = [
    "as_part_of",
    "load_model_state",
    "load_optimizer_state",
    "local_copy",
    "random_state",
    "set_random_state",
]


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
