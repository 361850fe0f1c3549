"""Patched models of classes with huggingface_hub's PyTorchModelHubMixin: no way of saving loses contexts in silence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import cn_hf
from cn_hf.errors import PatchError


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(2, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).mean((2, 3))


def patched() -> Net:
    model = cn_hf.patch_model(Net(width=4), mode="cn-channels", context_names=["day", "night"]).eval()
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_its_own_saving_is_refused_and_says_what_to_do(copied, tmp_path):
    model = copied(patched())
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(PatchError, match=r"cn_hf\.save_pretrained\(model, folder\)"):
            save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_the_way_it_says_keeps_the_contexts(tmp_path):
    model, x = patched(), torch.randn(2, 3, 6, 6)
    cn_hf.save_pretrained(model, tmp_path)
    again = cn_hf.from_pretrained(tmp_path, model=Net(width=4))
    assert torch.equal(again(x, context_ids="night"), model(x, context_ids="night"))
    assert not torch.equal(again(x, context_ids="night"), again(x, context_ids="day"))


def test_an_unpatched_model_saves_as_before(tmp_path):
    model = cn_hf.unpatch_model(patched())
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), model(x))


def test_its_class_does_not_load_the_weights_as_a_plain_model(tmp_path):
    cn_hf.save_pretrained(patched(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Net.from_pretrained(tmp_path, width=4)


def test_a_checkpoint_with_the_old_name_of_weights_still_loads_and_is_replaced(tmp_path):
    model, x = patched(), torch.randn(2, 3, 6, 6)
    cn_hf.save_pretrained(model, tmp_path)
    (tmp_path / "patched_model.safetensors").rename(tmp_path / "model.safetensors")
    description = tmp_path / "context_norm.json"
    description.write_text(description.read_text().replace("patched_model.safetensors", "model.safetensors"))
    again = cn_hf.from_pretrained(tmp_path, model=Net(width=4))
    assert torch.equal(again(x, context_ids="night"), model(x, context_ids="night"))
    cn_hf.save_pretrained(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
