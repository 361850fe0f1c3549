"""A network and its optimizer made ready by Accelerate: whole or sharded, and left as they were afterwards.

Under FSDP2 every process holds a part of each parameter, its gradient and its optimizer state. Accelerate takes its
FSDP settings from the launcher (``accelerate launch --use_fsdp --fsdp_version 2``), but passes over them on a CPU;
``obey_fsdp_settings`` makes it shard there as it does elsewhere. What is sharded is a copy of the network, since torch
knows no way back: the network itself stays whole, and gets the trained weights at the end.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cn_hf.errors import TrainingError
from cn_hf.norm.fused.agreement import allow_kernels, usable_kernels
from cn_hf.processes import gathered
from cn_hf.training.config import TrainingConfig
from cn_hf.training.objective import TrainingBatches, forward_logits, on_device
from cn_hf.training.optimization import build_optimizer

__all__ = [
    "check_equal_lengths",
    "find_unused_parameters",
    "is_sharded",
    "make_accelerator",
    "obey_fsdp_settings",
    "prepared",
    "reset_loss_scale",
    "trained_as_a_whole",
]


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator for a run: its processes and devices from the launcher, its precision from the config if given.

    Raises:
        TrainingError: This device lacks the precision, or the process already runs with another one.
    """
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    except ValueError as error:
        raise TrainingError(
            f"mixed_precision {config.mixed_precision!r} is not available: {error} "
            "Choose 'no', or start the run in another process if this one began with another precision."
        ) from error
    accelerator.gradient_accumulation_steps = 1  # a launcher's setting would divide the gradients once more
    _agree_on_kernels(accelerator)
    return accelerator


def _agree_on_kernels(accelerator: Accelerator) -> None:
    """Use the compiled kernels that work in every process of the run, now, so that no forward has to ask the others."""
    allow_kernels(None)
    if accelerator.num_processes > 1:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        usable = usable_kernels(accelerator.device, {torch.float32, half})
        allow_kernels(frozenset.intersection(*gathered([usable])))


def check_equal_lengths(steps: int) -> None:
    """Raise TrainingError where processes have different numbers of steps: they would wait for each other forever."""
    lengths = gathered([steps])
    if len(set(lengths)) > 1:
        raise TrainingError(f"every process needs the same number of batches, got {lengths} by rank; shard them evenly")


def find_unused_parameters(model: nn.Module, batches: TrainingBatches, accelerator: Accelerator) -> None:
    """Prepare DistributedDataParallel for parameters that the first batch gives no gradient, in any process.

    Without that it waits for them for ever. The batch is tried on a copy in evaluation mode, which moves no
    statistics; every process must call it.
    """
    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    batches.set_epoch(0)
    batch = on_device(next(iter(batches)), accelerator.device)
    part = {name: value[:2] for name, value in batch.items()}
    tried = copy.deepcopy(model).to(accelerator.device).eval()
    torch.autograd.backward(forward_logits(tried, part).sum())
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in tried.parameters())
    if any(gathered([unused])):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """True if every process holds only a part of each parameter."""
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


@contextlib.contextmanager
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


def reset_loss_scale(accelerator: Accelerator) -> None:
    """Begin with the loss scale of a new run, whatever was trained before."""
    scaler = accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        # torch's default; the scaler's own start is overwritten when a checkpoint is loaded
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**16, "_growth_tracker": 0})


@contextlib.contextmanager
def prepared(model: nn.Module, config: TrainingConfig, accelerator: Accelerator) -> Iterator[tuple[nn.Module, Any]]:
    """Model and optimizer as Accelerate wraps them; afterwards the model has its own ``forward`` back."""
    names = ("forward", "_original_forward", "_compiled_call_impl")
    own: dict[str, Any] = {name: model.__dict__[name] for name in names if name in model.__dict__}
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    try:
        yield accelerator.prepare(model, build_optimizer(model, config))
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        accelerator.free_memory()
