"""PEFT's vision cases: a file of tests for ``suites.py``.

They come from the checkout. The tiny ResNet and the picture that they load from the Hub are made here.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from scripts.coverage.suite_plugin import checkout_module, patched


def _tiny_resnet(*args: Any, **kwargs: Any) -> Any:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3, hidden_act="relu"
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    torch.random.set_rng_state(state)
    return patched(model.eval())


def _pixels(*args: Any, **kwargs: Any) -> Any:
    return lambda *_, **__: {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))}


checkout_module("testing_utils").load_cat_image = lambda: None  # type: ignore[attr-defined]
cases: Any = checkout_module("test_vision_models")
cases.AutoModelForImageClassification = types.SimpleNamespace(from_pretrained=_tiny_resnet)
cases.AutoImageProcessor = types.SimpleNamespace(from_pretrained=_pixels)
TestResnet = cases.TestResnet
