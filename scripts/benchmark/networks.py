"""The time of a training step of the paper's networks with each norm.

BN, CN as an added first layer, CN in conv3's place, MN; of the ViT also CN on tokens. A step is what
``training/supervised.py`` does of it: normalise a batch held on the device, forward, backward, optimizer. Images are
noise, since time does not depend on what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from scripts.benchmark.races import Duel, race
from scripts.benchmark.rows import Row, Trial
from scripts.benchmark.settings import PRECISIONS, Settings
from scripts.benchmark.timing import Run

if TYPE_CHECKING:
    from cn_hf.data import PreparedData
    from cn_hf.training.config import TrainingConfig

__all__ = ["VARIANTS", "noise_data", "trials"]

CONTEXTS, CLASSES = 3, 10

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "convnet": {
        "BN": {"mode": "none"},
        "CN-Channels, added first layer": {"mode": "cn-channels", "where": ["input"]},
        "CN-Channels in conv3's place": {"mode": "cn-channels", "where": ["bn3"]},
        "MN in conv3's place": {"mode": "mn", "where": ["paper"]},
    },
    "vit": {
        "ViT": {"mode": "none"},
        "BN on the input": {"mode": "bn", "where": ["input"]},
        "CN-Patches": {"mode": "cn-patches", "where": ["embed"]},
        "CN-Patches, every norm": {"mode": "cn-patches", "where": ["norms"]},
        "CN-Channels": {"mode": "cn-channels", "where": ["input"]},
    },
}
"""What is compared for each network; the first is what the others are measured against."""

_NETWORKS: dict[str, dict[str, Any]] = {
    "convnet": {"model": "cn_cifar_convnet", "optimizer": "rmsprop"},
    "vit": {"model": "cn_paper_vit", "image_size": 72, "optimizer": "adamw"},
}
_SIDES = {"convnet": 32, "vit": 72}
_BATCHES = {"convnet": 256, "vit": 32}


def trials(settings: Settings) -> list[Trial]:
    """A race of all variants for each network that the options name."""
    chosen = [*VARIANTS] if settings.networks.network is None else [settings.networks.network]
    return [_network(name, settings) for name in chosen]


def _network(network: str, settings: Settings) -> Trial:
    options = settings.networks
    default = settings.of(full=_BATCHES[network], quick=8, smoke=6, gpu=256)
    batch_size = default if options.batch_size is None else options.batch_size
    variants = VARIANTS[network]
    base, *others = variants
    asked = {"channels-last": options.channels_last, "compiled": options.compile}
    rows = [
        Row(
            what=f"{network}, step with {name}",
            rival=base,
            shape=f"({batch_size}, 3, {_SIDES[network]}, {_SIDES[network]})",
            dtype="float32" if options.mixed_precision == "no" else "bfloat16",
            note=", ".join(name for name, given in asked.items() if given),
        )
        for name in others
    ]
    duels = [Duel(name, row, (batch_size, "images/s")) for name, row in zip(others, rows, strict=True)]

    def contestants() -> Mapping[str, Run]:
        from cn_hf.training.config import TrainingConfig

        data = noise_data(_SIDES[network], batch_size, settings.device)
        shared = {
            **_NETWORKS[network],
            "batch_size": batch_size,
            "channels_last": options.channels_last,
            "compile": options.compile,
        }
        precision = PRECISIONS[options.mixed_precision]
        return {
            name: _stepper(TrainingConfig.from_dict({**shared, **variant}), data, precision)
            for name, variant in variants.items()
        }

    return race(f"steps of {network}", duels, contestants, settings, calls=options.steps)


def noise_data(side: int, num_images: int, device: torch.device, **options: Any) -> PreparedData:
    """Random images (num_images, 3, side, side) on the device, with labels and contexts.

    Args:
        side: Of the images.
        num_images: One batch holds all of them, unless ``options`` says otherwise.
        device: Where they are.
        **options: Of ``DeviceBatches``.
    """
    from cn_hf.data import DeviceBatches, PreparedData

    generator = torch.Generator().manual_seed(0)
    batches = DeviceBatches(
        torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.randint(CLASSES, (num_images,), generator=generator),
        torch.arange(num_images) % CONTEXTS,
        mean=(0.5,),
        std=(0.25,),
        device=device,
        **{"batch_size": num_images, **options},
    )
    return PreparedData(
        train=batches, validation=None, test=None, num_classes=CLASSES, class_names=None,
        context_names=tuple(f"context_{number}" for number in range(CONTEXTS)), context_source=None,
        input_size=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3, skipped={},
    )  # fmt: skip


def _stepper(config: TrainingConfig, data: PreparedData, dtype: torch.dtype | None) -> Callable[[], None]:
    """A function that trains the variant for one step."""
    from cn_hf.recipes.classifier.network import build_classifier
    from cn_hf.training.objective import forward_logits
    from cn_hf.training.optimization import build_optimizer

    batches = data.train
    assert batches is not None
    model = build_classifier(config, data).to(batches.device).train()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    optimizer = build_optimizer(model, config)

    def step() -> None:
        (batch,) = batches
        if config.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        with torch.autocast(batches.device.type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(forward_logits(model, batch), batch["labels"])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step
