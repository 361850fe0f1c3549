"""Parameter groups, optimizers and learning-rate schedules, from a ``TrainingConfig``.

A schedule is a function of the step number alone, so it holds no state that a resumed run could lose.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cn_hf.errors import ConfigError, TrainingError, nearest
from cn_hf.patching.patch import context_parameters
from cn_hf.patching.routing import RoutedModel
from cn_hf.training.config import TrainingConfig

__all__ = ["build_optimizer", "learning_rate_at", "parameter_groups", "set_learning_rate"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_USES_MOMENTUM = ("rmsprop", "sgd")


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The trainable parameters in at most two groups: with and without weight decay.

    The parameters CN added are not decayed unless ``decay_context_parameters``; biases, norm weights and what the model
    itself lists in ``no_weight_decay()`` (timm) are not if ``decay_one_dimensional`` is off.

    Raises:
        TrainingError: No parameter is trainable.
    """
    added: set[int] = set()
    if isinstance(model, RoutedModel):
        added = {id(parameter) for parameter in context_parameters(model)}
    no_weight_decay = getattr(model, "no_weight_decay", None)
    listed: set[str] = set(no_weight_decay()) if callable(no_weight_decay) else set()
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in added:
            decay = config.decay_context_parameters
        else:
            decay = config.decay_one_dimensional or (parameter.ndim > 1 and name not in listed)
        (decayed if decay else spared).append(parameter)
    if not decayed and not spared:
        raise TrainingError("no parameter of the model has requires_grad=True; unfreeze the ones to train")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over ``parameter_groups(model, config)``.

    Raises:
        ConfigError: ``optimizer_args`` holds a name or value that the torch optimizer does not take.
        TrainingError: No parameter is trainable.
    """
    factory = _OPTIMIZERS[config.optimizer]
    known = [name for name in inspect.signature(factory).parameters if name not in ("params", "lr", "weight_decay")]
    for name in config.optimizer_args:
        if name not in known:
            raise ConfigError(f"unknown optimizer_args entry {name!r} for {config.optimizer}; {nearest(name, known)}")
    options: dict[str, Any] = {"momentum": config.momentum} if config.optimizer in _USES_MOMENTUM else {}
    options |= config.optimizer_args
    groups = parameter_groups(model, config)
    try:
        return factory(groups, lr=config.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"torch's {config.optimizer} refuses optimizer_args {config.optimizer_args}: {error}"
        ) from error


def learning_rate_at(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then the schedule over the remaining steps."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1.0, config.epochs * steps_per_epoch - warmup)
        swing = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return config.minimum_learning_rate + (config.learning_rate - config.minimum_learning_rate) * swing
    if config.schedule == "step":
        drops = sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs)
        return float(config.learning_rate * config.step_factor**drops)
    return config.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group this learning rate; in place where a group holds it as a tensor (compiled optimizers)."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
