"""Descriptions that ask for other files, for more than the weights hold, or for what no constructor takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cn_hf
from cn_hf.contexts import BrightnessContexts, ClusterContexts, ContextSource
from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.experiments.spec import read_experiment
from cn_hf.files import read_json
from cn_hf.hub.inspection import inspect_checkpoint
from cn_hf.hub.transformers_config import ContextConfig
from cn_hf.training.config import read_options_file

DESCRIPTION, CONFIG = "context_norm.json", "config.json"
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 5}


def timm_vit() -> nn.Module:
    return cn_hf.patch_model(timm.create_model("test_vit", **VIT), num_contexts=2)


def transformers_vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return cn_hf.patch_model(ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)), num_contexts=2)


def wrapper() -> nn.Module:
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cn_hf.patch_model(model, "cn-channels", num_contexts=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A fresh copy of a checkpoint of each kind."""
    root = tmp_path_factory.mktemp("saved")
    made: dict[str, int] = {}
    for make in (timm_vit, transformers_vit, wrapper):
        cn_hf.save_pretrained(make(), root / make.__name__)
    cn_hf.save_pretrained(timm_vit(), root / "norms", norms_only=True)
    named = cn_hf.patch_model(timm.create_model("test_vit", **VIT), context_names=["day", "night"])
    cn_hf.save_pretrained(named, root / "source", context_source=BrightnessContexts(100.0))

    def copy(kind: str) -> Path:
        made[kind] = made.get(kind, 0) + 1
        return Path(shutil.copytree(root / kind, root / f"{kind}-{made[kind]}"))

    return copy


def edit(file: Path, keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    *outer, last = keys.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(content))


def edit_both(folder: Path, timm_key: str, value: Any) -> None:
    """In both files, as far as a file has the place."""
    for file, place in (
        (DESCRIPTION, "base.model_args."),
        (DESCRIPTION, "base.config."),
        (CONFIG, "model_args."),
        (CONFIG, "base_config."),
    ):
        try:
            edit(folder / file, place + timm_key, value)
        except (KeyError, FileNotFoundError):
            continue


def load_by_timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


ROADS: dict[str, list[Callable[[Path], Any]]] = {
    "timm_vit": [cn_hf.from_pretrained, inspect_checkpoint, load_by_timm],
    "transformers_vit": [cn_hf.from_pretrained, inspect_checkpoint, AutoModelForImageClassification.from_pretrained],
    "wrapper": [cn_hf.from_pretrained, inspect_checkpoint, AutoModelForImageClassification.from_pretrained],
}


def test_each_road_loads_what_was_saved(saved):
    for kind, roads in ROADS.items():
        folder = saved(kind)
        for road in roads:
            road(folder)


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        # files and repositories of the writer's choice
        ("timm_vit", "checkpoint_path", "/etc/passwd", "checkpoint_path"),
        ("timm_vit", "pretrained_cfg", {"file": "/etc/passwd"}, "pretrained_cfg"),
        ("wrapper", "model_args", {"checkpoint_path": "/etc/passwd"}, "checkpoint_path"),
        ("wrapper", "model_args", {"pretrained": True}, "pretrained"),
        ("wrapper", "architecture", "local-dir:/tmp", "architecture"),
        ("wrapper", "architecture", "hf-hub:somebody/else", "architecture"),
        ("transformers_vit", "attn_implementation", "somebody/kernel", "names code elsewhere"),
        ("transformers_vit", "backbone", "somebody/else", "backbone"),
        # sizes
        ("timm_vit", "depth", 10**6, "than the weights can fill"),
        ("timm_vit", "depth", 10**12, "at most"),
        ("timm_vit", "embed_dim", 2**20, "than the weights can fill"),
        ("timm_vit", "embed_dim", 32, "do not fit"),
        ("transformers_vit", "num_hidden_layers", 10**7, "than the weights can fill"),
        ("transformers_vit", "hidden_size", 10**9, "at most"),
        ("transformers_vit", "intermediate_size", 2**23, "than the weights can fill"),
        # what constructors refuse
        ("timm_vit", "patch_size", 0, "patch_size=0"),
        ("timm_vit", "norm_layer", "nope", "norm_layer='nope'"),
        ("timm_vit", "no_such_argument", 1, "no_such_argument=1"),
        ("transformers_vit", "hidden_act", "nope", "hidden_act='nope'"),
        ("transformers_vit", "patch_size", 0, "patch_size=0"),
        ("wrapper", "model_args", [], "model_args"),
        ("wrapper", "model_args", {"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_each_road_refuses_the_same(kind, key, value, words, saved):
    folder = saved(kind)
    edit_both(folder, key, value)
    for road in ROADS[kind]:
        if (key, road) != ("pretrained_cfg", load_by_timm):  # timm itself refuses it in its config.json
            with pytest.raises(CheckpointError, match=words):
                road(folder)


@pytest.mark.parametrize("value", [None, [], "depth", 3])
def test_model_args_are_a_mapping(value, saved):
    folder = saved("timm_vit")
    edit(folder / DESCRIPTION, "base.model_args", value)
    for road in ROADS["timm_vit"]:
        with pytest.raises(CheckpointError, match="model_args"):
            road(folder)


@pytest.mark.parametrize(("option", "value"), [("num_contexts", 10**12), ("embedding_dim", 10**9)])
def test_contexts_are_as_many_as_the_weights_hold(option, value, saved):
    for kind in ("timm_vit", "transformers_vit"):
        folder = saved(kind)
        edit(folder / DESCRIPTION, f"config.{option}", value)
        if kind == "transformers_vit":
            edit(folder / CONFIG, f"context_norm.config.{option}", value)
        for road in ROADS[kind]:
            with pytest.raises(CheckpointError, match=r"than the weights can fill|must be at most"):
                road(folder)
    folder, model = saved("norms"), timm.create_model("test_vit", **VIT)
    edit(folder / DESCRIPTION, f"config.{option}", value)
    with pytest.raises(CheckpointError, match=r"than the weights can fill|must be at most"):
        cn_hf.from_pretrained(folder, model=model)
    assert type(model).__name__ == "VisionTransformer"
    cn_hf.patch_model(model)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    edit(folder / DESCRIPTION, "weights", {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "1 unknown"),
        (lambda tensors: tensors.pop("norm.weight"), "1 missing"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(3)}), "expected"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(16, dtype=torch.int64)}), "int64"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(16).to(torch.float8_e4m3fn)}), "F8_E4M3"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(16, dtype=torch.complex64)}), "C64"),
    ],
    ids=["extra", "missing", "shape", "integers", "fp8", "complex"],
)
def test_weights_that_do_not_fit_leave_a_model_as_it_was(change, words, saved):
    folder = rewritten(saved("timm_vit"), change)
    model = timm.create_model("test_vit", **VIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for road in (*ROADS["timm_vit"], lambda path: cn_hf.from_pretrained(path, model=model)):
        with pytest.raises(CheckpointError, match=words):
            road(folder)
    assert type(model).__name__ == "VisionTransformer"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [DESCRIPTION, "model.safetensors"])
def test_a_pipe_or_device_is_no_file(name, saved):
    folder = saved("timm_vit")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for _ in range(2):
        for road in (cn_hf.from_pretrained, inspect_checkpoint):
            with pytest.raises(CheckpointError, match="a pipe or a device"):
                road(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")


def test_json_from_outside_is_bounded(saved, tmp_path):
    file = tmp_path / "file.json"
    file.write_text('{"a": {"b": 1, "c": [1, 2]}}')
    assert read_json(file) == {"a": {"b": 1, "c": [1, 2]}}
    for text, words in (
        ("[" * 2 * 10**6, "more"),
        ("[" * 10**5 + "]" * 10**5, "deep"),
        ("[" + "0," * 3 * 10**6 + "0]", "more"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands there twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' stands there twice"),
    ):
        file.write_text(text)
        with pytest.raises((CheckpointError, ValueError), match=words):
            read_json(file)
        folder = saved("timm_vit")
        (folder / DESCRIPTION).write_text(text)
        with pytest.raises(CheckpointError):
            cn_hf.from_pretrained(folder)


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "1", None])
def test_a_format_is_a_number_from_1(number, saved):
    folder = saved("transformers_vit")
    edit(folder / CONFIG, "context_norm.format", number)
    for road in (cn_hf.from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(CheckpointError, match="format"):
            road(folder)
    folder = saved("timm_vit")
    edit(folder / DESCRIPTION, "format", number)
    for road in ROADS["timm_vit"]:
        with pytest.raises(CheckpointError, match="no format number"):
            road(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", [float("nan")]), ("mean", []), ("mean", ["a"]), ("mean", [0.0, 0.0]), ("std", [0.0]), ("std", [1e999])],
)
def test_pixel_statistics_are_finite_and_one_a_channel(key, value, saved):
    folder = saved("timm_vit")
    edit(folder / DESCRIPTION, f"pixel_{key}", value)
    for road in (cn_hf.from_pretrained, load_by_timm):
        with pytest.raises(CheckpointError, match=key):
            road(folder)
    folder = saved("transformers_vit")
    edit(folder / CONFIG, f"context_norm.pixel_{key}", value)
    if len(value) != 2:
        with pytest.raises(CheckpointError, match=key):
            AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match=key):
        cn_hf.set_inference(timm_vit(), "cn+", **{key: value})


def test_a_context_source_is_the_one_that_was_saved(saved):
    folder = saved("source")
    assert cn_hf.from_pretrained(folder).router.source.names == ("day", "night")
    source = folder / "context_source" / "context_source.json"
    text = source.read_text()
    source.write_text(text.replace("100.0", "200.0"))
    with pytest.raises(CheckpointError, match="of another save"):
        cn_hf.from_pretrained(folder)
    edit(source, "names", ["night", "day"])
    edit(folder / DESCRIPTION, "context_source_sha256", None)  # as in checkpoints of before
    for road in (cn_hf.from_pretrained, load_by_timm):
        with pytest.raises(CheckpointError, match="would be taken for others"):
            road(folder)
    source.write_text(text)
    assert cn_hf.from_pretrained(folder).router.source.threshold == 100.0


def test_true_is_no_number_of_a_source():
    with pytest.raises(ConfigError, match=r"threshold to be a number .*received True"):
        BrightnessContexts(True)
    for options in ({"tol": True}, {"mean": True}, {"std": (1.0, 1.0, float("nan"))}):
        with pytest.raises(ConfigError):
            ClusterContexts(2, **options)
    assert issubclass(BrightnessContexts, ContextSource)


def test_a_dtype_by_either_name(saved):
    folder = saved("transformers_vit")
    for options in ({"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
        assert cn_hf.from_pretrained(folder, **options).classifier.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="torch_dtype"):
        cn_hf.from_pretrained(folder, dtype="auto", torch_dtype="auto")
    patched = type(transformers_vit())
    assert patched.from_pretrained(folder, torch_dtype="auto").classifier.weight.dtype == torch.float32
    assert patched.from_pretrained(folder, torch_dtype=torch.bfloat16).classifier.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_no_config_of_transformers_hides_a_name_of_ours():
    own = {name for name in {**vars(ContextConfig), **ContextConfig.__annotations__} if not name.startswith("__")}
    own -= {"to_dict", "to_diff_dict", "from_dict"}  # which are its own of a base, made anew
    assert {"context_norm", "context_norm_architecture", "context_norm_base"} <= own
    for model_type in CONFIG_MAPPING:
        base = CONFIG_MAPPING[model_type]
        fields = {field.name for field in dataclasses.fields(base)}
        assert not own & (set(dir(base)) | fields | set(base.attribute_map)) or model_type == "context_norm", model_type


def test_saving_tries_the_road_that_loading_takes(monkeypatch, tmp_path):
    model = wrapper()
    monkeypatch.setattr(
        type(model.config), "context_norm_architecture", "resnet10t", raising=False
    )  # a field of a base
    assert cn_hf.from_pretrained(cn_hf.save_pretrained(model, tmp_path)).config.architecture == "test_resnet"
    monkeypatch.setattr(ContextConfig, "context_norm_plain", lambda self: ViTConfig())
    with pytest.raises(ConfigError, match="cannot be built again"):
        cn_hf.save_pretrained(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ["[" * 50_000, "a: [" + "0, " * 10**6 + "]"], ids=["nested", "long"])
def test_yaml_from_outside_is_bounded(text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read in (read_options_file, lambda path: read_experiment(path.stem, path.parent)):
        with pytest.raises(ConfigError):
            read(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "1 unexpected"),
        (lambda tensors: tensors.pop("classifier.bias"), "1 missing"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(2, dtype=torch.int32)}), "int32"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(7)}), "do not fit"),
    ],
    ids=["extra", "missing", "integers", "shape"],
)
def test_weights_of_transformers_that_do_not_fit(change, words, saved):
    folder = rewritten(saved("transformers_vit"), change)
    with pytest.raises(CheckpointError, match=words):
        cn_hf.from_pretrained(folder)
