"""The network of a run: made by its name, patched, and its norms started from training images."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import nn

import cn_hf
from cn_hf.data import Batches, PreparedData
from cn_hf.errors import ConfigError
from cn_hf.patching.calibrate import record_moments
from cn_hf.patching.config import BASELINES, CN_MODES, ContextNormConfig
from cn_hf.patching.patch import named_slots
from cn_hf.patching.router import ContextSourceLike
from cn_hf.patching.routing import RoutedModel
from cn_hf.training.config import TrainingConfig
from cn_hf.training.networks import create_network

__all__ = ["build_classifier", "keep_moments", "start_norms"]


def build_classifier(config: TrainingConfig, data: PreparedData) -> nn.Module:
    """The network of ``config`` for ``data``, patched, its norms started from training images where that is needed.

    The same ``seed`` gives the same base weights whatever ``mode`` is.

    Raises:
        ConfigError: The network or an option is unknown, or a cn mode finds no contexts in the data.
        PatchError: The network has no slot of the mode's kind, or a pattern matches nothing.
    """
    norms = _norm_config(config, data)
    set_seed(config.seed)
    model = create_network(
        config.model,
        num_classes=data.num_classes,
        input_size=data.input_size,
        model_args=config.model_args,
        pretrained=config.pretrained,
    )
    if norms is None:
        return model
    calibrates = norms.mode in CN_MODES and config.calibrate != "never"
    with warnings.catch_warnings():
        if calibrates:  # what the warning advises is done next
            warnings.filterwarnings("ignore", message=".*never saw data")
        cn_hf.patch_model(model, config=norms)
    assert data.train is not None  # load_data names a training split
    if calibrates:
        model.to(data.train.device)
        start_norms(model, data.train, config)
    if norms.mode not in BASELINES:
        source = cast("ContextSourceLike | None", data.context_source)  # one that cannot predict says so when asked
        cn_hf.set_inference(model, norms.inference, source=source, mean=data.mean, std=data.std)
    return model


def start_norms(model: nn.Module, batches: Batches, config: TrainingConfig) -> bool:
    """Calibrate a patched model on training images: always, or where a BatchNorm it replaced had never seen any.

    Every process uses the same whole batches, so all start alike.

    Returns:
        Whether it was done.
    """
    fresh = [slot for _, slot in named_slots(model) if _never_saw_data(slot)]
    if config.calibrate == "auto" and not fresh:
        return False
    chosen = list(itertools.islice(_whole_batches(batches), config.calibration_batches))
    # An embedder narrower than the contexts still starts as near to them as it can.
    held = sum(len(batch["pixel_values"]) for batch in chosen)
    cn_hf.calibrate(model, chosen, max_images=max(1, held), approximate=True)
    return True


def keep_moments(model: nn.Module, data: PreparedData) -> None:
    """Let a trained network keep the moments of its contexts, on training images as evaluation prepares them.

    With them ``cn_hf.adapt`` needs no reference images. Every process reads the same images.
    """
    if not isinstance(model, RoutedModel) or model.context_config.mode in BASELINES or data.train is None:
        return
    batches = copy.copy(data.train)
    evaluated = data.validation if data.test is None else data.test
    if evaluated is not None:
        batches.augment = evaluated.augment
    first = next(_whole_batches(batches), None)
    if first is None or "context_ids" not in first or first["context_ids"].is_floating_point():
        return
    contexts = model.context_config.num_contexts
    most = min(512, max(64, 5120 // contexts))
    enough = -(-most * contexts // batches.batch_size)
    record_moments(model, itertools.islice(_whole_batches(batches), enough), max_images=most)


def _whole_batches(batches: Batches) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the images and contexts of the first epoch's batches, whole on every process."""
    whole = copy.copy(batches)
    whole.num_processes, whole.process_index = 1, 0
    whole.mixing = None  # statistics of each context are those of its own images
    whole.set_epoch(0)
    for batch in whole:
        yield {name: batch[name] for name in ("pixel_values", "context_ids") if name in batch}


def _never_saw_data(slot: Any) -> bool:
    tracked = getattr(slot, "num_batches_tracked", None)
    return isinstance(tracked, torch.Tensor) and int(tracked) == 0


def _norm_config(config: TrainingConfig, data: PreparedData) -> ContextNormConfig | None:
    if config.mode in ("none", *BASELINES):
        return config.context_norm_config()
    if data.context_names is None:
        raise ConfigError(
            f"mode {config.mode!r} needs contexts and the data has none; say where they come from, e.g. "
            "--contexts clusters:gmm:3 or --contexts column:NAME (a column context_ids counts if it is a ClassLabel, "
            "which names them)"
        )
    count = len(data.context_names)
    if config.num_contexts is not None and config.num_contexts != count:
        raise ConfigError(f"num_contexts is {config.num_contexts}, but contexts {config.contexts!r} are {count}")
    return config.context_norm_config(count, data.context_names)
