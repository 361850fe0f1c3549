"""A network and its optimizer made ready for training by Accelerate, and left as they were afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cn_hf.training.config import TrainingConfig
from cn_hf.training.optimization import build_optimizer

__all__ = ["prepared", "reset_loss_scale"]


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
