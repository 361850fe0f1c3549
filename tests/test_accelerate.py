"""Patched models whose weights lie elsewhere: accelerate's offloading and device maps, torch's sharded state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_module
from models_for_tests import hf_vit, images, logits, small_convnet, tell_apart, vit
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import cn_hf
from cn_hf import PatchError

IDS = torch.tensor([0, 2, 1, 1])
CASES: list[Any] = [
    pytest.param(small_convnet, {"mode": "cn"}, id="maps"),
    pytest.param(small_convnet, {"mode": "cn-channels", "where": "input"}, id="input"),
    pytest.param(small_convnet, {"mode": "dsbn"}, id="dsbn"),
    pytest.param(small_convnet, {"mode": "bn", "where": "norms"}, id="bn"),
    pytest.param(small_convnet, {"mode": "mn", "where": "norms"}, id="mn"),
    pytest.param(vit, {"mode": "cn"}, id="tokens"),
    pytest.param(vit, {"where": "embed"}, id="embed"),
    pytest.param(hf_vit, {"mode": "cn"}, id="transformers"),
]


def patched(make: Callable[[], nn.Module], options: dict[str, Any]) -> nn.Module:
    model = cn_hf.patch_model(make(), **options)
    return tell_apart(model).eval() if cn_hf.context_parameters(model) else model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    given = logits(model(images(), context_ids=IDS))
    return given if model.context_config.mode == "dsbn" else torch.cat([given, logits(model(images()))])


def on_the_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, str(folder), execution_device="cpu")
    return model


def on_both(model: nn.Module, folder: Path) -> nn.Module:
    places = {name: ("cpu", "disk")[index % 2] for index, (name, _) in enumerate(model.named_children())}
    places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    empty = copy.deepcopy(model)
    for name, parameter in [*empty.named_parameters()]:
        owner = empty.get_submodule(name.rpartition(".")[0])
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(parameter.to("meta"))
    return load_checkpoint_and_dispatch(empty, str(folder / "model.safetensors"), device_map={"": "cpu"})


def distributed(model: nn.Module, folder: Path) -> nn.Module:
    state = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    assert state.keys() == model.state_dict().keys()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    set_model_state_dict(model, state)
    return model


@pytest.mark.parametrize("place", [on_the_cpu, on_disk, on_both, loaded, distributed], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("make", "options"), CASES)
def test_equal_to_the_model_at_rest(
    make: Callable[[], nn.Module], options: dict[str, Any], place: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = patched(make, options)
    expected = outputs(model)
    assert torch.equal(outputs(place(model, tmp_path)), expected)


@pytest.mark.parametrize(("make", "options"), [CASES[0], CASES[5], CASES[7]])
def test_a_device_map_keeps_slots_whole(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model: Any = patched(make, options)
    classes = model._no_split_modules
    slots = [row.name for row in cn_hf.patch_report(model)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    used: set[Any] = set()
    for percent in range(5, 100, 5):
        memory = {0: total * percent // 100, 1: 2 * total, "cpu": 4 * total}
        devices = infer_auto_device_map(model, memory, no_split_module_classes=classes)
        used |= set(devices.values())
        for slot in slots:
            assert not [key for key in devices if key.startswith(f"{slot}.")], percent
    assert used >= {0, 1}


def test_transformers_own_classes_stay_whole_too() -> None:
    plain: Any = hf_vit()
    before = set(plain._no_split_modules)
    model: Any = cn_hf.patch_model(plain)
    assert before < model._no_split_modules
    model._no_split_modules = {"Another"}
    assert model._no_split_modules == {"Another", "ContextLayerNorm"}
    assert set(cn_hf.unpatch_model(model)._no_split_modules) == {"Another"}


def test_what_needs_the_weights_refuses_an_offloaded_model(tmp_path: Path) -> None:
    model = on_disk(patched(small_convnet, {"mode": "cn"}), tmp_path)
    for change in (
        lambda: cn_hf.calibrate(model, [{"pixel_values": images(), "context_ids": IDS}]),
        lambda: cn_hf.fold_context(model, 0),
        lambda: cn_hf.unpatch_model(model),
    ):
        with pytest.raises(PatchError, match="remove_hook_from_module"):
            change()


def test_hooks_come_off_and_the_model_goes_on() -> None:
    model = patched(small_convnet, {"mode": "cn"})
    expected = outputs(model)
    remove_hook_from_module(on_the_cpu(model, Path()), recurse=True)
    assert torch.equal(outputs(model), expected)
    assert outputs_of_plain(cn_hf.unpatch_model(model)).equal(outputs_of_plain(small_convnet()))


@torch.no_grad()
def outputs_of_plain(model: nn.Module) -> Tensor:
    return model(images())
