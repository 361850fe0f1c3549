"""Patched models through timm's own doors: what timm makes, saves and publishes keeps its contexts, or says why not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset, Features, Image
from hub_server import HubServer, run_python
from models_for_tests import settle, tell_apart, tensors_of
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import cn_hf
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.hub import timm_models
from cn_hf.hub.base_model import build_base, describe_base

NAMES = ["day", "night", "dusk", "fog"]
IDS = torch.tensor([0, 3, 2])
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def patched(name: str, mode: str = "cn", where: str | list[str] | None = None, **arguments) -> nn.Module:
    """A timm model whose contexts differ, with running statistics as after training."""
    model = settle(timm.create_model(name, **arguments))
    return tell_apart(cn_hf.patch_model(model, mode, where=where, context_names=NAMES)).eval()


def loaded(folder: Path, pretrained: bool = True, **overrides) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **overrides).eval()


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, size, size)


def same(first: nn.Module, second: nn.Module) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


CASES = {
    "vit": ("test_vit", {}, {"num_classes": 5}, 160),
    "vit of another size, input and embedding": (
        "test_vit",
        {"where": "paper"},
        {"num_classes": 5, "img_size": 64, "in_chans": 1},
        64,
    ),
    "vit, average pooling": ("test_vit", {}, {"num_classes": 5, "global_pool": "avg"}, 160),
    "resnet of four channels": ("test_resnet", {"mode": "cn-channels"}, {"num_classes": 5, "in_chans": 4}, 64),
    "resnet, input, drop rates": (
        "test_resnet",
        {"mode": "cn-channels", "where": "input"},
        {"drop_rate": 0.1, "drop_path_rate": 0.1},
        64,
    ),
    "convnext, patterns": ("test_convnext", {"where": [r"stages\.1\..*norm"]}, {"num_classes": 5}, 64),
    "paper's ConvNet, mixture": ("cn_cifar_convnet", {"mode": "mn"}, {}, 32),
    "paper's WRN": ("cn_wrn28_2", {"mode": "cn-channels"}, {"num_classes": 6}, 32),
    "paper's ViT": ("cn_paper_vit", {}, {}, 72),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case, tmp_path):
    name, options, arguments, size = CASES[case]
    model = patched(name, **options, **arguments)
    channels = arguments.get("in_chans", 3)
    statistics = {"mean": (0.5, 0.4, 0.3, 0.2)[:channels], "std": (0.2, 0.25, 0.3, 0.35)[:channels]}
    cn_hf.set_inference(model, "cn+" if options.get("mode") == "mn" else "average", **statistics)
    cn_hf.save_pretrained(model, tmp_path)
    again = loaded(tmp_path)
    assert same(model, again)
    x = images(size, channels)
    assert torch.equal(again(x), model(x))
    if options.get("mode") != "mn":
        assert torch.equal(again(x, context_ids=IDS), model(x, context_ids=IDS))
        assert torch.equal(again(x, context_ids="fog"), model(x, context_ids=3))
        assert not torch.equal(again(x, context_ids="fog"), again(x, context_ids="day"))
    assert again.context_config == model.context_config
    assert (again.router.pixel_mean, again.router.pixel_std) == (statistics["mean"], statistics["std"])
    assert isinstance(again, type(timm.create_model(name)))
    assert again.num_classes == model.num_classes
    assert again.pretrained_cfg["architecture"] == name

    config, own = resolve_model_data_config(again), resolve_model_data_config(timm.create_model(name))
    expected_size = arguments.get("img_size", own["input_size"][-1])
    assert tuple(config["input_size"]) == (channels, expected_size, expected_size)
    assert (tuple(config["mean"]), tuple(config["std"])) == (statistics["mean"], statistics["std"])
    assert config["interpolation"] == own["interpolation"]


def test_without_pixel_statistics_those_of_the_base_stay(tmp_path):
    model = patched("test_vit")
    cn_hf.save_pretrained(model, tmp_path)
    config = resolve_model_data_config(loaded(tmp_path))
    assert {name: tuple(value) for name, value in config.items() if name in ("mean", "std")} == {
        name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")
    }


def test_a_model_that_was_not_asked_to_be_pretrained_is_patched_and_fresh(tmp_path):
    model = patched("test_vit", num_classes=5)
    cn_hf.save_pretrained(model, tmp_path)
    fresh = loaded(tmp_path, pretrained=False)
    assert fresh.context_config == model.context_config
    assert tensors_of(fresh).keys() == tensors_of(model).keys()
    assert not torch.equal(fresh.head.weight, model.head.weight)
    x = images(160)
    assert torch.equal(fresh(x, context_ids=0), fresh(x, context_ids=3))  # contexts at their start
    (tmp_path / "model.safetensors").unlink()  # timm reads none here
    loaded(tmp_path, pretrained=False)


def test_models_come_in_training_mode_as_timm_gives_them(tmp_path):
    cn_hf.save_pretrained(patched("test_vit"), tmp_path)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).training


def test_a_loaded_model_is_saved_again_patched_and_unpatched(tmp_path):
    model = patched("test_resnet", "cn-channels", num_classes=5)
    cn_hf.save_pretrained(model, tmp_path / "first")
    again = loaded(tmp_path / "first")
    cn_hf.save_pretrained(again, tmp_path / "second")
    assert same(loaded(tmp_path / "second"), model)
    timm.models.save_for_hf(cn_hf.unpatch_model(again), tmp_path / "plain", model_args={"num_classes": 5})
    plain = loaded(tmp_path / "plain")
    assert not hasattr(plain, "context_config")
    assert same(plain, again)


def test_a_context_source_travels_along(tmp_path):
    bright, dark = torch.full((3, 16, 16), 220, dtype=torch.uint8), torch.full((3, 16, 16), 20, dtype=torch.uint8)
    shown = [image.permute(1, 2, 0).numpy() for image in (bright, dark) * 4]
    data = Dataset.from_dict({"image": shown}, features=Features({"image": Image()}))
    source = BrightnessContexts().fit(data)
    model = timm.create_model("test_resnet", num_classes=5)
    model = tell_apart(cn_hf.patch_model(model, "cn-channels", where="input", context_names=source.names)).eval()
    cn_hf.set_inference(model, "predict", source=source, **STATISTICS)
    cn_hf.save_pretrained(model, tmp_path)
    pixels = torch.stack([bright, dark, dark])
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    x = (pixels / 255 - mean) / std
    again = loaded(tmp_path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again(x), model(x, context_ids=source.predict(pixels)))
    assert not torch.equal(again(x), model(x, context_ids=1 - source.predict(pixels)))


@pytest.mark.skipif(not hasattr(timm.models, "resolve_model_input_args"), reason="timm before 1.0.31 has none")
def test_what_timms_scripts_make_of_a_checkpoint(tmp_path):
    model = patched("test_vit", num_classes=5)
    cn_hf.save_pretrained(model, tmp_path)
    arguments = timm.models.resolve_model_input_args(f"local-dir:{tmp_path}", {"img_size": 160})
    assert arguments["model_name"] == "context_norm"
    assert same(timm.create_model(pretrained=True, **arguments), model)


# ----------------------------------------------------------------------------------------------------------- overrides


OVERRIDES = {
    "classes": ("test_resnet", {"num_classes": 7}),
    "no classifier": ("test_vit", {"num_classes": 0}),
    "one channel": ("test_resnet", {"in_chans": 1}),
    "five channels": ("test_vit", {"in_chans": 5}),
    "size": ("test_vit", {"img_size": 96, "dynamic_img_size": False}),
    "classes and size": ("test_vit", {"num_classes": 7, "img_size": 96}),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides_do_to_the_base_what_timm_does(case, tmp_path):
    name, overrides = OVERRIDES[case]
    model = patched(name)
    cn_hf.save_pretrained(model, tmp_path / "patched")
    plain = cn_hf.unpatch_model(patched(name))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".normalizer." not in key})
    timm.models.save_for_hf(plain, tmp_path / "plain")
    torch.manual_seed(1)
    ours = loaded(tmp_path / "patched", **overrides)
    expected = loaded(tmp_path / "plain", **overrides).state_dict()
    contexts, base = {}, {}
    for key, value in ours.state_dict().items():
        (contexts if ".normalizer." in key else base)[key] = value
    assert base.keys() == expected.keys()
    fresh = {"fc.weight", "fc.bias", "head.weight", "head.bias"}  # a head of another size is drawn anew
    assert all(torch.equal(value, expected[key]) for key, value in base.items() if key not in fresh)
    assert {key: value.shape for key, value in base.items()} == {key: value.shape for key, value in expected.items()}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in contexts.items())
    assert "state_dict" not in ours.pretrained_cfg
    assert ours.pretrained_cfg["file"] == str(tmp_path / "patched")


def test_contexts_of_a_stem_with_other_channels_start_anew_with_a_warning(tmp_path):
    model = patched("test_resnet", "cn-channels", "input")
    cn_hf.save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="start anew"):
        ours = loaded(tmp_path, in_chans=1)
    x = images(64, 1)
    assert torch.equal(ours(x, context_ids=0), cn_hf.unpatch_model(ours)(x))


def test_a_pretrained_cfg_is_overlaid_as_in_timm(tmp_path):
    model = patched("test_vit")
    cn_hf.save_pretrained(model, tmp_path)
    ours = loaded(tmp_path, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}, num_classes=7)
    assert ours.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert torch.equal(ours.blocks[0].norm1.weight, model.blocks[0].norm1.weight)


def test_drop_rates_are_no_part_of_a_checkpoint_and_can_be_given(tmp_path):
    cn_hf.save_pretrained(patched("test_vit", drop_path_rate=0.2), tmp_path)
    assert not [m for m in loaded(tmp_path).modules() if type(m).__name__ == "DropPath"]
    assert [m for m in loaded(tmp_path, drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]


FEATURES = {
    "resnet": ("test_resnet", {}, {"out_indices": (1, 3)}),
    "resnet, input": ("test_resnet", {"mode": "cn-channels", "where": "input"}, {}),
    "vit": ("test_vit", {}, {"out_indices": (0, 2)}),
    "convnext": ("test_convnext", {}, {}),
    "convnext, hooks": ("test_convnext", {}, {"feature_cls": "hook"}),
    "resnet, graph": ("test_resnet", {}, {"feature_cls": "fx", "out_indices": (0, 2)}),
    "wrn": ("cn_wrn28_2", {"mode": "cn-channels"}, {"feature_cls": "dict"}),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features_only_has_the_contexts_of_the_whole_model(case, tmp_path):
    name, options, overrides = FEATURES[case]
    model = patched(name, **options)
    cn_hf.save_pretrained(model, tmp_path)
    features = loaded(tmp_path, features_only=True, **overrides)
    x = images(160 if "vit" in name else 64)
    outputs = features(x, context_ids=IDS)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    with cn_hf.use_contexts(model, IDS):
        expected = model.forward_intermediates(
            x, indices=list(features.feature_info.out_indices), intermediates_only=True
        )
    assert len(outputs) == len(expected)
    assert all(torch.equal(output, other) for output, other in zip(outputs, expected, strict=True))
    assert [output.shape[1] for output in outputs] == features.feature_info.channels()


def test_a_feature_extractor_can_itself_be_saved(tmp_path):
    arguments = {"features_only": True, "out_indices": [1, 2]}
    model = patched("test_convnext", **arguments)
    cn_hf.save_pretrained(model, tmp_path, model_args=arguments)
    x = images(64)
    for again in (loaded(tmp_path), cn_hf.from_pretrained(tmp_path)):
        assert all(map(torch.equal, again(x, context_ids=IDS), model(x, context_ids=IDS)))


def test_arguments_that_leave_contexts_without_a_slot_are_an_error(tmp_path):
    cn_hf.save_pretrained(patched("test_convnext", where=[r"stages\.3\..*norm"]), tmp_path)
    with pytest.raises(CheckpointError, match="no place in the FeatureListNet"):
        loaded(tmp_path, features_only=True, out_indices=(0, 1))
    with pytest.raises(CheckpointError, match="no place in the FeatureGraphNet"):  # torch.fx dissolves its norms
        loaded(tmp_path, features_only=True, feature_cls="fx")


def test_contexts_that_do_not_fit_the_description_are_an_error(tmp_path):
    folder = cn_hf.save_pretrained(patched("test_convnext"), tmp_path)
    config = json.loads((folder / "context_norm.json").read_text())["config"]
    for changes in ({"num_contexts": 9, "context_names": None}, {"where": "input"}, {"parametrization": "table"}):
        edit(folder / "context_norm.json", config=config | changes)
        with pytest.raises(CheckpointError, match="do not fit"):
            loaded(folder)


# ---------------------------------------------------------------------------------------------------- timm's own saving


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_timms_own_saving_keeps_the_contexts(safe, tmp_path):
    model = patched("test_resnet", "cn-channels", num_classes=5)
    cn_hf.set_inference(model, "cn+", plus_stats="batch", **STATISTICS)
    labels = ["a", "b", "c", "d", "e"]
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": labels}, safe_serialization=safe)
    x = images(64)
    for again in (loaded(tmp_path), cn_hf.from_pretrained(tmp_path)):
        assert same(again, model)
        assert torch.equal(again(x), model(x))
        assert torch.equal(again(x, context_ids=IDS), model(x, context_ids=IDS))
        assert again.context_config == model.context_config
    assert loaded(tmp_path).pretrained_cfg["label_names"] == labels
    cfg, architecture, _ = timm.models._hub.load_model_config_from_path(tmp_path)
    assert architecture == "context_norm"
    assert (cfg["num_classes"], tuple(cfg["mean"])) == (5, STATISTICS["mean"])


def test_timms_own_saving_writes_current_weights_over_those_of_an_earlier_save(tmp_path):
    timm.models.save_for_hf(patched("test_vit"), tmp_path, safe_serialization=True)
    second = patched("test_vit")
    tell_apart(second)
    timm.models.save_for_hf(second, tmp_path)  # pickled only, as is timm's default
    assert same(loaded(tmp_path), second)


def test_timms_own_saving_takes_arguments_that_it_did_not_record(tmp_path):
    model = patched("test_vit", img_size=96)
    timm.models.save_for_hf(model, tmp_path, model_args={"img_size": 96})
    assert same(loaded(tmp_path), model)
    with pytest.raises(ConfigError, match="model_args"):
        timm.models.save_for_hf(model, tmp_path / "other", model_args={"img_size": 64})


def test_labels_are_those_of_the_classes_that_the_model_has(tmp_path):
    labels = tuple(f"class {index}" for index in range(5))
    model = patched("test_resnet", num_classes=5, pretrained_cfg_overlay={"num_classes": 5, "label_names": labels})
    model.pretrained_cfg["label_offset"] = 1
    cn_hf.save_pretrained(model, tmp_path)
    again = loaded(tmp_path, in_chans=1)
    assert tuple(again.pretrained_cfg["label_names"]) == labels
    assert torch.equal(again.fc.weight, model.fc.weight)
    model.reset_classifier(2)
    config = timm_models.timm_config(model)
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 2
    assert "label_names" not in config["pretrained_cfg"]


def test_timms_own_saving_of_a_plain_model_is_as_it_was(tmp_path):
    model = timm.create_model("test_resnet")
    timm.models.save_for_hf(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_resnet"
    assert not hasattr(loaded(tmp_path), "context_config")


def test_registering_again_changes_nothing():
    before = timm.models._hub.save_config_for_hf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_models.register()
    assert timm.models._hub.save_config_for_hf is before
    assert timm.is_model("context_norm")
    assert "context_norm" not in timm.list_models()


# --------------------------------------------------------------------------------------------------------------- errors


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_checkpoints_are_one_clear_error(tmp_path):
    folder = cn_hf.save_pretrained(patched("test_resnet", "cn-channels"), tmp_path / "checkpoint")
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "context_norm.json", "config.json")}
    weights, description = folder / "model.safetensors", folder / "context_norm.json"
    base = json.loads(description.read_bytes())["base"]

    def refused(words: str, **options) -> None:
        with pytest.raises(CheckpointError, match=words):
            loaded(folder, **options)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    edit(description, format=99)
    refused("update cn_hf", pretrained=False)
    edit(description, base=base | {"architecture": "resnet_of_tomorrow"})
    refused("does not know the architecture 'resnet_of_tomorrow'")
    edit(description, base=base | {"architecture": "context_norm"})
    refused("does not know the architecture 'context_norm'")
    edit(description, base=base | {"architecture": ["test_resnet"]})
    refused("does not know the architecture")
    edit(description, base=base | {"library": "transformers"})
    refused("no whole checkpoint of a timm model")
    edit(description, norms_only=True)
    refused("no whole checkpoint of a timm model")
    description.unlink()
    refused(r"context_norm\.json is missing")
    weights.write_bytes(files["model.safetensors"][:-100])
    refused("truncated, changed")
    weights.write_bytes(files["model.safetensors"][:-1] + bytes([files["model.safetensors"][-1] ^ 1]))
    refused("truncated, changed")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused("never loads")


def test_a_checkpoint_cannot_name_files_to_be_read(tmp_path):
    folder = cn_hf.save_pretrained(patched("test_resnet", "cn-channels"), tmp_path)
    evil = tmp_path / "evil.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), evil)
    config, description = folder / "config.json", folder / "context_norm.json"
    text, content = config.read_text(), json.loads(config.read_text())
    edit(config, model_args=content["model_args"] | {"checkpoint_path": str(evil)})
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        loaded(folder, pretrained=False)
    config.write_text(text)
    base = json.loads(description.read_text())["base"]
    edit(description, base=base | {"model_args": base["model_args"] | {"checkpoint_path": str(evil)}})
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        loaded(folder, pretrained=False)


def test_the_name_alone_is_no_model():
    with pytest.raises(CheckpointError, match="no architecture of its own"):
        timm.create_model("context_norm", pretrained=True)


def test_arguments_that_are_no_json_are_asked_for(tmp_path):
    model = timm.create_model("test_resnet", norm_layer="groupnorm1")
    model = cn_hf.patch_model(model, "cn-channels")
    again = build_base(describe_base(model, {"norm_layer": "groupnorm1"}))
    assert tensors_of(again).keys() == tensors_of(cn_hf.unpatch_model(model)).keys()
    with pytest.raises(ConfigError, match="JSON"):
        describe_base(cn_hf.patch_model(model, "cn-channels"), {"norm_layer": nn.BatchNorm2d})


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


PUSH = """
    import json, sys, timm, torch, cn_hf
    sys.path.insert(0, {tests!r})
    from models_for_tests import settle, tell_apart
    torch.manual_seed(0)
    names = ["day", "night"]
    model = tell_apart(cn_hf.patch_model(settle(timm.create_model("test_vit", num_classes=3)), context_names=names))
    x = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
    cn_hf.push_to_hub(model, "tester/ours")
    timm.models.push_to_hf_hub(model, "tester/timms")
    logits = [model(x).tolist(), *(model(x, context_ids=name).tolist() for name in names)]
    cn_hf.push_to_hub(tell_apart(model), "tester/ours", revision="more")
    print(json.dumps([logits, model(x, context_ids="day").tolist()]))
"""
LOAD = """
    import json, sys, cn_hf, timm
    assert timm.is_model("context_norm") and "datasets" not in sys.modules  # timm is imported as fast as without cn_hf
    import torch
    x = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
    logits = []
    for repository in ("tester/ours", "tester/timms"):
        model = timm.create_model("hf-hub:" + repository, pretrained=True).eval()
        cfg, name, args = timm.models.load_model_config_from_hf(repository)
        assert (name, cfg["num_classes"], args["num_classes"]) == ("context_norm", 3, 3), (name, cfg, args)
        logits.append([model(x).tolist(), *(model(x, context_ids=name).tolist() for name in ("day", "night"))])
    model = timm.create_model("hf-hub:tester/ours@more", pretrained=True).eval()
    print(json.dumps([*logits, model(x, context_ids="day").tolist()]))
"""
WITHOUT = """
    import json, timm
    for options in ({"pretrained": True}, {}, {"pretrained": True, "num_classes": 7}):
        try:
            timm.create_model("hf-hub:tester/ours", **options)
        except RuntimeError as error:
            assert "Unknown model" in str(error), error
        else:
            raise AssertionError("a plain model came out")
    print(json.dumps("refused"))
"""


def test_push_in_one_process_and_load_in_another(hub, tmp_path):
    source = PUSH.replace("{tests!r}", repr(str(Path(__file__).parent)))
    pushed, on_branch = run_python(source, hub, tmp_path / "pusher").result
    assert len({str(logits) for logits in (*pushed, on_branch)}) == 4
    assert run_python(LOAD, hub, tmp_path / "loader").result == [pushed, pushed, on_branch]
    assert not [request for request in hub.requests if request[0] == "GET" and request[1].endswith(".bin")]
    assert run_python(WITHOUT, hub, tmp_path / "without").result == "refused"


@pytest.mark.parametrize("where", [None, ["bn"], ["stages.0.blocks.0.dw0.m.bn"]])
def test_a_new_classifier_has_slots_as_the_old_one(where: Any, tmp_path: Path) -> None:
    """EfficientViT-M, LeViT, RepViT and iFormer have a batch norm in their classifier."""
    model: Any = tell_apart(cn_hf.patch_model(settle(timm.create_model("efficientvit_m0")), "cn", where=where))
    before = [row.name for row in cn_hf.patch_report(model)]
    assert ("head.bn" in before) == (where != ["stages.0.blocks.0.dw0.m.bn"])
    model.reset_classifier(0)
    assert "head.bn" not in [row.name for row in cn_hf.patch_report(model)]
    model.reset_classifier(7)
    assert [row.name for row in cn_hf.patch_report(model)] == before
    cn_hf.save_pretrained(model.eval(), tmp_path)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(cn_hf.from_pretrained(tmp_path).eval()(x, context_ids=[0, 2]), model(x, context_ids=[0, 2]))
