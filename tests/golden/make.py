"""Makes the golden checkpoints: one of each kind, tiny, with the logits it gave when it was written.

They stand for what users have saved. Run this for a kind that is new, never for one that exists: a release that cannot
load an old one has broken somebody's checkpoint.

    python tests/golden/make.py
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import cn_hf
import cn_hf.models
from cn_hf.contexts import BrightnessContexts

HERE = Path(__file__).parent
NAMES = ["day", "night"]


def images(size: int) -> torch.Tensor:
    """Two images, the same everywhere."""
    return torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size).sin()


def tiny_timm() -> nn.Module:
    """A vision transformer of a few thousand weights."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )


def tiny_transformers() -> nn.Module:
    """The same of transformers."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config)


def convolutional() -> nn.Module:
    """A module of neither library."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))


def moved(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """All of a model's weights away from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def known_base() -> nn.Module:
    """A base model whose weights are the same everywhere, whatever its library draws."""
    model = tiny_timm().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).add(number).sin().view_as(parameter))
    return model


def brightness() -> BrightnessContexts:
    """A fitted source of contexts."""
    shown = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (20, 230) * 4]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=1)})
    return BrightnessContexts().fit(Dataset.from_dict({"image": shown, "label": [0] * 8}, features=features))


def make(kind: str) -> tuple[nn.Module, dict[str, object]]:
    """A patched model of the kind, and how it is saved."""
    if kind == "norms-only":
        model = cn_hf.patch_model(known_base(), context_names=NAMES, parametrization="table")
        with torch.no_grad():
            for parameter in cn_hf.context_parameters(model):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return model, {"norms_only": True}
    if kind == "timm":
        return moved(cn_hf.patch_model(tiny_timm(), context_names=NAMES, variance_activation="exp")), {}
    if kind == "transformers":
        return moved(cn_hf.patch_model(tiny_transformers(), context_names=NAMES)), {}
    if kind == "sharded":
        return moved(cn_hf.patch_model(tiny_transformers(), mode="cn", num_contexts=2)), {"max_shard_size": "2KB"}
    if kind == "source":
        model = cn_hf.patch_model(
            tiny_timm(), mode="cn-channels", where="input", context_names=list(brightness().names)
        )
        cn_hf.set_inference(moved(model), "predict", source=brightness(), mean=(0.5,) * 3, std=(0.25,) * 3)
        return model, {}
    if kind == "mixture":
        model = cn_hf.patch_model(convolutional(), mode="mn", where=["1"])
        model.train()(images(16))
        return moved(model), {}
    assert kind == "other"
    model = convolutional()
    model.train()(images(16))
    return moved(cn_hf.patch_model(model, mode="cn-channels", num_contexts=2, init="random")), {}


KINDS = ("timm", "transformers", "sharded", "norms-only", "source", "other", "mixture")


def logits(model: nn.Module) -> dict[str, list[float]]:
    """What the model says with each context, and without any."""
    found: dict[str, list[float]] = {}
    contexts = () if model.context_config.mode == "mn" else range(2)
    with torch.no_grad():
        for context in (*contexts, None):
            output = model(images(16)) if context is None else model(images(16), context_ids=context)
            output = output if isinstance(output, torch.Tensor) else output.logits
            found[str(context)] = output.flatten().tolist()
    return found


def main() -> None:
    """Write the kinds that are not there yet."""
    for kind in KINDS:
        folder = HERE / kind
        if folder.exists():
            continue
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # batch norms that never saw data
            model, options = make(kind)
        cn_hf.save_pretrained(model, folder, **options)
        (folder / "expected.json").write_text(json.dumps({"logits": logits(model)}, indent=1) + "\n")
        print(kind, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), file=sys.stderr)


if __name__ == "__main__":
    main()
