"""transformers' ``ModelTesterMixin`` on small vision models: a file of tests for ``suites.py``.

The mixin comes from the checkout; its configurations stand in files that a source distribution lacks, so those of
``transformers_models.py`` are used. A patched model is built and loaded by its own class, from its own config.
"""

from __future__ import annotations

import copy
import sys
import types
import unittest
from typing import Any

import torch
from torch import nn

from cn_hf.hub.transformers_config import written_config
from scripts.coverage.suite_plugin import checkout_module, patched
from scripts.coverage.transformers_models import TRANSFORMERS

FAMILIES = ("vit", "deit", "swin", "convnext", "dinov2", "resnet", "beit", "siglip_vision")
TOKENS = {"deit": 2, "siglip_vision": 0}
"""Tokens besides the patches; one elsewhere."""
WITHOUT_ATTENTION = ("convnext", "resnet")

for missing, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    stub = types.ModuleType(missing)
    setattr(stub, mixin, type(mixin, (), {}))
    sys.modules[f"checkout_tests.{missing}"] = stub
    sys.modules.setdefault(f"checkout_tests.{missing.partition('.')[0]}", types.ModuleType(missing.partition(".")[0]))
COMMON: Any = checkout_module("test_modeling_common")


class _ModelTester:
    """The tester that the mixin asks for."""

    is_training = True
    batch_size = 3

    def __init__(self, config: Any, inputs: dict[str, Any], tokens: int) -> None:
        self.config, self.inputs = config, inputs
        size = inputs["pixel_values"].shape[-1]
        patch = getattr(config, "patch_size", None)
        self.mask_length = 0 if patch is None else (size // patch) ** 2
        self.seq_length, self.num_masks = self.mask_length + tokens, self.mask_length // 2
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))

    def get_config(self) -> Any:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return self.get_config(), {name: value.clone() for name, value in self.inputs.items()}


def _case(family: str, model_class: Any, config: Any, inputs: dict[str, Any]) -> type:
    model = patched(model_class(config))

    def set_up(self: Any) -> None:
        own = config if type(model) is model_class else written_config(model)
        self.model_tester = _ModelTester(own, inputs, TOKENS.get(family, 1))

    namespace = {
        "all_model_classes": (type(model),),
        "has_attentions": family not in WITHOUT_ATTENTION,
        "test_resize_embeddings": False,
        "setUp": set_up,
    }
    return type(f"{model_class.__name__}Test", (COMMON.ModelTesterMixin, unittest.TestCase), namespace)


def _model_classes(model: nn.Module) -> list[type]:
    return list(dict.fromkeys((type(model.base_model), type(model))))


for name in FAMILIES:
    torch.manual_seed(0)
    built, batch = TRANSFORMERS[name]()
    for each in _model_classes(built):
        test_case = _case(name, each, copy.deepcopy(built.config), batch)
        globals()[test_case.__name__] = test_case
del test_case  # pytest collects what is left
