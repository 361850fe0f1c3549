"""Saving models whose weights no file can hold as they are: sharded, quantised, pruned, offloaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from accelerate import disk_offload
from models_for_tests import hf_vit, images, logits, settle, tell_apart
from processes import free_port
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import parametrizations, parametrize, prune

import cn_hf
from cn_hf import PatchError


def timm_resnet() -> nn.Module:
    return settle(timm.create_model("test_resnet", num_classes=5))


MODELS: list[Callable[[], nn.Module]] = [timm_resnet, hf_vit]


def patched(make: Callable[[], nn.Module]) -> Any:
    return tell_apart(cn_hf.patch_model(make()))


def head(model: Any) -> nn.Module:
    return model.fc if hasattr(model, "fc") else model.classifier


def refused(model: Any, folder: Path, words: str) -> None:
    """By every road, and nothing is written."""
    roads: list[Callable[[], Any]] = [lambda: cn_hf.save_pretrained(model, folder)]
    if hasattr(model, "save_pretrained"):
        roads.append(lambda: model.save_pretrained(folder))
    for save in roads:
        with pytest.raises(PatchError, match=words):
            save()
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_computed_weights(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = patched(make)
    slot = model.get_submodule(cn_hf.patch_report(model)[0].name)
    prune.l1_unstructured(slot, "weight", 0.5)
    refused(model, tmp_path / "pruned", r"prune\.remove")
    prune.remove(slot, "weight")
    parametrizations.weight_norm(head(model))
    refused(model, tmp_path / "parametrized", r"remove_parametrizations")
    parametrize.remove_parametrizations(head(model), "weight")
    cn_hf.save_pretrained(model, tmp_path / "plain")
    again = cn_hf.from_pretrained(tmp_path / "plain")
    x = images(2, 16)
    assert torch.equal(logits(again(x, context_ids=1)), logits(model.eval()(x, context_ids=1)))


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_quantised_weights(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        model = torch.ao.quantization.quantize_dynamic(patched(make), {nn.Linear}, dtype=torch.qint8)
    refused(model, tmp_path, "Save it before it is quantised")


def test_offloaded_weights(tmp_path: Path) -> None:
    model = patched(timm_resnet)
    disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
    refused(model, tmp_path / "saved", "remove_hook_from_module")


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_sharded_weights(make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    model = patched(make)
    expected, whole = copy.deepcopy(model).eval(), cn_hf.patch_model(make())
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        refused(model, tmp_path / "sharded", "get_model_state_dict")
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    finally:
        dist.destroy_process_group()
    whole.load_state_dict(state)
    cn_hf.save_pretrained(whole, tmp_path / "whole")
    x = images(2, 16)
    again = cn_hf.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again(x, context_ids=1)), logits(expected(x, context_ids=1)))
