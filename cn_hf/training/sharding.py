"""FSDP2 under Accelerate: every process holds a part of each parameter, its gradient and its optimizer state.

Accelerate takes its FSDP settings from the launcher (``accelerate launch --use_fsdp --fsdp_version 2``), but passes
over them on a CPU; ``obey_fsdp_settings`` makes it shard there as it does elsewhere. What is sharded is a copy of the
network, since torch knows no way back: the network itself stays whole, and gets the trained weights at the end.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cn_hf.errors import TrainingError

__all__ = ["is_sharded", "obey_fsdp_settings", "trained_as_a_whole"]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds a part of each parameter only."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def obey_fsdp_settings(accelerator: Accelerator) -> None:
    """Make Accelerate shard on a CPU, too, where the launcher asks for FSDP; check what it was asked for.

    Raises:
        TrainingError: FSDP is asked for in its first version, whose flat parameters belong to no layer.
    """
    on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU
    asked = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if not (on_cpu and asked) and not is_sharded(accelerator):
        return
    version = int(os.environ.get("FSDP_VERSION", "1")) if on_cpu else accelerator.state.fsdp_plugin.fsdp_version
    if version != 2:
        raise TrainingError(f"FSDP version {version} cannot be used here; launch with --fsdp_version 2")
    if on_cpu:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    # It sends weights from the main process, but fails on buffers; ``trained_as_a_whole`` sends both.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False


@contextmanager
def trained_as_a_whole(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """The network to prepare and train in the block: ``model`` itself, or a copy if it is going to be sharded.

    At the end of the block the weights of a sharded copy go to ``model``, in every process. After an error ``model`` is
    as it was before.
    """
    if not is_sharded(accelerator):
        yield model
        return
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            sent = tensor.to(accelerator.device)
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)
    yield copied
    # One after the other: the whole network need not fit on the device.
    whole = {name: _whole(value) for name, value in copied.state_dict().items()}
    model.load_state_dict(whole)
    model.to(accelerator.device)


def _whole(value: object) -> object:
    """The value of a sharded tensor in all processes together, on the CPU; a collective call."""
    if not isinstance(value, Tensor):
        return value
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
