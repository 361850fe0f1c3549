"""Networks by name: the size of the images reaches them, and wrong names and sizes are clear errors."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import transformers

from cn_hf.errors import ConfigError
from cn_hf.training.networks import (
    check_network_name,
    create_network,
    published_normalization,
    save_plain,
    timm_arguments,
)


def test_networks_of_fixed_input_size_are_built_for_the_images() -> None:
    network = create_network(
        "vit_tiny_patch16_224", num_classes=4, input_size=(3, 48, 48), model_args={"depth": 1, "patch_size": 8}
    )
    assert network.training
    assert network(torch.zeros(2, 3, 48, 48)).shape == (2, 4)
    given = timm_arguments("vit_tiny_patch16_224", num_classes=4, input_size=(3, 48, 48), model_args={"depth": 1})
    assert given == {"num_classes": 4, "in_chans": 3, "depth": 1, "img_size": 48}
    assert "img_size" not in timm_arguments("resnet18", num_classes=4, input_size=(1, 30, 40), model_args={})
    assert create_network("resnet18", num_classes=4, input_size=(1, 30, 40))(torch.zeros(1, 1, 30, 40)).shape == (1, 4)


def test_published_normalization() -> None:
    mean, std = published_normalization("resnet18") or ((), ())
    assert mean == (0.485, 0.456, 0.406)
    assert len(std) == 3


@pytest.mark.parametrize(
    ("name", "size", "model_args", "message"),
    [
        ("resnet81", 32, {}, "'resnet18'"),
        ("cn_paper_vit", 32, {}, "its own image_size is 72"),
        ("resnet18", 32, {"widht": 3}, "widht"),
        ("cn_digits_convnet", 32, {"num_classes": 7}, r"shape \(1, 7\)"),
        ("inception_v3", 8, {}, "cannot take images"),
    ],
)
def test_wrong_names_arguments_and_sizes(name: str, size: int, model_args: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_network(name, num_classes=3, input_size=(3, size, size), model_args=model_args)


def test_a_mistyped_name_needs_no_network_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address))
    with pytest.raises(ConfigError):
        check_network_name("nobody/no-such-model")
    assert asked or huggingface_hub.constants.HF_HUB_OFFLINE  # so the network would be noticed
    asked.clear()
    with pytest.raises(ConfigError, match="'cn_cifar_convnet'"):
        check_network_name("cn_cifar_convet")
    assert not asked
    check_network_name("cn_cifar_convnet")


def test_transformers_folder(tmp_path: Path) -> None:
    small = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    transformers.ViTForImageClassification(small).save_pretrained(tmp_path)
    check_network_name(str(tmp_path))
    fresh = create_network(str(tmp_path), num_classes=5, input_size=(3, 24, 24))
    assert fresh(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 5)
    loaded = create_network(str(tmp_path), num_classes=5, input_size=(3, 16, 16), pretrained=True)
    assert loaded(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 5)
    with pytest.raises(ConfigError, match="give image_size=16"):
        create_network(str(tmp_path), num_classes=5, input_size=(3, 24, 24), pretrained=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_network_name(str(tmp_path))


def test_a_plain_network_in_channels_last_layout_is_saved_and_stays_so(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last)
    before = {name: tensor.stride() for name, tensor in network.state_dict().items()}
    save_plain(network, tmp_path / "saved")
    assert {name: tensor.stride() for name, tensor in network.state_dict().items()} == before
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    torch.testing.assert_close(again.state_dict(), network.state_dict())
