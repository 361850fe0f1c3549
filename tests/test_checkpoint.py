"""Checkpoints: what is saved comes back bit-equal; what does not fit is one clear error and leaves nothing behind."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import cn_hf
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import CheckpointError, ConfigError, InputTypeError, PatchError


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def transformers_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config)


BUILDERS = {
    "timm-vit": (lambda: timm.create_model("test_vit", num_classes=5), "cn-patches", (2, 3, 160, 160)),
    "timm-resnet": (lambda: timm.create_model("test_resnet", num_classes=5), "cn-channels", (2, 3, 64, 64)),
    "transformers": (transformers_vit, "cn-patches", (2, 3, 32, 32)),
    "other": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), "cn-patches", (2, 3, 4)),
}


def trained(kind: str, **options) -> nn.Module:
    build, mode, _ = BUILDERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cn_hf.patch_model(build(), mode=mode, context_names=["a", "b", "c", "d"], **options)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_round_trip_is_bit_equal(kind, parametrization, tmp_path):
    build, _, shape = BUILDERS[kind]
    model = trained(kind, parametrization=parametrization)
    cn_hf.save_pretrained(model, tmp_path / "checkpoint")
    base = build() if kind == "other" else None
    loaded = cn_hf.from_pretrained(tmp_path / "checkpoint", model=base)
    x = torch.randn(shape)
    assert torch.equal(logits(loaded(x, context_ids="b")), logits(model(x, context_ids="b")))
    assert loaded.context_config == model.context_config
    assert not loaded.training
    files = {file.name for file in (tmp_path / "checkpoint").iterdir()}
    own_library = set() if kind == "other" else {"config.json"}
    assert files == {"context_norm.json", "model.safetensors"} | own_library


@pytest.mark.parametrize("kind", BUILDERS)
def test_norms_only_goes_onto_any_copy_of_the_base(kind, tmp_path):
    model = trained(kind)
    folder = cn_hf.save_pretrained(model, tmp_path, norms_only=True)
    base = cn_hf.unpatch_model(copy.deepcopy(model))
    loaded = cn_hf.from_pretrained(folder, model=base)
    x = torch.randn(BUILDERS[kind][2])
    assert loaded is base
    assert torch.equal(logits(loaded(x, context_ids=3)), logits(model(x, context_ids=3)))
    with pytest.raises(CheckpointError, match="pass model="):
        cn_hf.from_pretrained(folder)


def test_dtype_and_flags_are_kept(tmp_path):
    model = trained("timm-resnet").to(torch.bfloat16)
    cn_hf.save_pretrained(model, tmp_path)
    base = timm.create_model("test_resnet", num_classes=5).requires_grad_(False)
    loaded = cn_hf.from_pretrained(tmp_path, model=base)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.conv1[0].weight.requires_grad
    assert all(parameter.requires_grad for parameter in cn_hf.context_parameters(loaded))


def test_constructor_arguments_travel_or_are_asked_for(tmp_path):
    model = cn_hf.patch_model(timm.create_model("test_vit", num_classes=5, img_size=80)).eval()
    cn_hf.save_pretrained(model, tmp_path, model_args={"img_size": 80})
    loaded = cn_hf.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 80, 80)
    assert torch.equal(loaded(x), model(x))
    model.head = nn.Linear(model.num_features, 9)
    with pytest.raises(ConfigError, match="head"):
        cn_hf.save_pretrained(model, tmp_path / "other", model_args={"img_size": 80})
    assert not (tmp_path / "other").exists()


def test_context_source_travels_along(tmp_path):
    bright, dark = torch.full((3, 16, 16), 220, dtype=torch.uint8), torch.full((3, 16, 16), 20, dtype=torch.uint8)
    images = [image.permute(1, 2, 0).numpy() for image in (bright, dark) * 4]
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"])})
    data = Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    source = BrightnessContexts().fit(data)
    model = cn_hf.patch_model(
        timm.create_model("test_resnet", num_classes=5), mode="cn-channels", where="input", context_names=source.names
    )
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    cn_hf.set_inference(model.eval(), "predict", source=source, mean=(0.5,) * 3, std=(0.25,) * 3)
    cn_hf.save_pretrained(model, tmp_path)
    loaded = cn_hf.from_pretrained(tmp_path)
    pixels = torch.stack([bright, dark, dark])
    x = (pixels / 255 - 0.5) / 0.25
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded(x), model(x, context_ids=source.predict(pixels)))
    assert loaded.context_config.context_names == tuple(source.names)
    with pytest.raises(ConfigError, match="2 contexts"):
        cn_hf.save_pretrained(trained("timm-vit"), tmp_path / "other", context_source=source)


def test_files_that_are_wrong_are_named(tmp_path):
    model = trained("timm-resnet")
    folder = cn_hf.save_pretrained(model, tmp_path / "saved")
    weights, description = folder / "model.safetensors", folder / "context_norm.json"
    whole, text = weights.read_bytes(), description.read_text()

    with pytest.raises(CheckpointError, match="no folder"):
        cn_hf.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"context_norm\.json is missing"):
        cn_hf.from_pretrained(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        cn_hf.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="weights are missing"):
        cn_hf.from_pretrained(folder)
    weights.write_bytes(whole)
    description.write_text(text[:50])
    with pytest.raises(CheckpointError, match="truncated or no JSON"):
        cn_hf.from_pretrained(folder)
    description.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(CheckpointError, match="update cn_hf"):
        cn_hf.from_pretrained(folder)
    values = json.loads(text)
    values["config"]["num_contexts"] = 9
    values["config"]["context_names"] = None
    description.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="do not fit"):
        cn_hf.from_pretrained(folder)


def test_other_architecture_or_number_of_contexts_leaves_the_model_unchanged(tmp_path):
    folder = cn_hf.save_pretrained(trained("timm-resnet"), tmp_path)
    other = timm.create_model("test_vit")
    with pytest.raises(CheckpointError, match="test_resnet"):
        cn_hf.from_pretrained(folder, model=other)
    assert type(other).__name__ == "VisionTransformer"
    assert not hasattr(other, "context_config")

    wider = timm.create_model("test_resnet", num_classes=7)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(CheckpointError, match="do not fit"):
        cn_hf.from_pretrained(folder, model=wider)
    after = wider.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fewer = cn_hf.patch_model(timm.create_model("test_resnet", num_classes=5), mode="cn-channels", num_contexts=2)
    with pytest.raises(CheckpointError, match="num_contexts=4"):
        cn_hf.from_pretrained(folder, model=fewer)


def test_a_patched_model_takes_a_checkpoint_only_of_the_same_meaning(tmp_path):
    model = trained("timm-vit")
    cn_hf.set_inference(model, "average")
    folder = cn_hf.save_pretrained(model, tmp_path)
    for options in ({"variance_activation": "exp"}, {"eps": 1e-3}, {"keep_statistics": False}):
        other = cn_hf.patch_model(timm.create_model("test_vit", num_classes=5), num_contexts=4, **options)
        with pytest.raises(CheckpointError, match=next(iter(options))):
            cn_hf.from_pretrained(folder, model=other)
    alike = cn_hf.patch_model(timm.create_model("test_vit", num_classes=5), num_contexts=4)
    loaded = cn_hf.from_pretrained(folder, model=alike)
    x = torch.randn(1, 3, 160, 160)
    assert loaded.context_config == model.context_config
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded(x, context_ids="c"), model(x, context_ids="c"))


def test_files_of_two_saves_do_not_mix(tmp_path):
    first = cn_hf.save_pretrained(trained("timm-vit"), tmp_path / "first")
    second = cn_hf.save_pretrained(trained("timm-vit"), tmp_path / "second")
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="another save"):
        cn_hf.from_pretrained(first)


def test_saving_again_replaces_and_a_plain_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    first, second = trained("timm-vit"), trained("timm-vit")
    cn_hf.save_pretrained(first, tmp_path)
    cn_hf.save_pretrained(second, tmp_path)
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(cn_hf.from_pretrained(tmp_path)(x, context_ids=0), second(x, context_ids=0))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(PatchError, match="not a patched model"):
        cn_hf.save_pretrained(timm.create_model("test_vit"), tmp_path)
    blocked = tmp_path / "notes.txt" / "inside"
    with pytest.raises(CheckpointError, match="Cannot write"):
        cn_hf.save_pretrained(first, blocked)


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.norm(self.embed(tokens)))

    model = cn_hf.patch_model(Tied(), num_contexts=2).eval()
    cn_hf.save_pretrained(model, tmp_path)
    loaded = cn_hf.from_pretrained(tmp_path, model=Tied())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens, context_ids=1), model(tokens, context_ids=1))


@pytest.mark.parametrize("kind", ["timm-vit", "transformers"])
def test_a_models_dtype_is_kept_or_chosen(kind, tmp_path):
    model = trained(kind).to(torch.bfloat16)
    cn_hf.save_pretrained(model, tmp_path)
    added = {id(parameter) for parameter in cn_hf.context_parameters(model)}
    assert added
    for asked, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        loaded = cn_hf.from_pretrained(tmp_path, dtype=asked)
        kept = {id(parameter) for parameter in cn_hf.context_parameters(loaded)}
        assert {p.dtype for p in loaded.parameters() if id(p) not in kept} == {expected}
    loaded = cn_hf.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in cn_hf.context_parameters(loaded)} == {torch.float32}
    for wrong in ("float17", torch.int8):
        with pytest.raises(ConfigError, match="dtype"):
            cn_hf.from_pretrained(tmp_path, dtype=wrong)
    with pytest.raises(ConfigError, match="not both"):
        cn_hf.from_pretrained(tmp_path, device="cpu", device_map="auto")


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be had: .* Here there is cpu"):
        cn_hf.from_pretrained(tmp_path / "absent", device="gpu")
    cn_hf.save_pretrained(trained("timm-vit"), tmp_path)
    with pytest.raises(ConfigError, match="device 'gpu' cannot be had"):
        cn_hf.from_pretrained(tmp_path, device_map="gpu")
    assert next(cn_hf.from_pretrained(tmp_path, device=torch.device("cpu")).parameters()).device.type == "cpu"


@pytest.mark.parametrize("content", ['{"a', "", None], ids=["truncated", "empty", "missing"])
def test_a_damaged_config_of_transformers_is_one_clear_error(content, tmp_path):
    folder = cn_hf.save_pretrained(trained("transformers"), tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is missing, truncated or no config\. Save it again"):
        cn_hf.from_pretrained(folder)


def test_the_folder_of_a_run_is_taken_for_the_checkpoint_in_it(tmp_path):
    model = trained("timm-resnet")
    cn_hf.save_pretrained(model, tmp_path / "checkpoint")
    loaded = cn_hf.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model, path: cn_hf.from_pretrained(None), TypeError, "received None"),
        (lambda model, path: cn_hf.from_pretrained(path, model=3), TypeError, "model must be an nn.Module"),
        (lambda model, path: cn_hf.from_pretrained(path, device_map={"blocks": "cpu"}), ConfigError, "does not fit"),
        (lambda model, path: cn_hf.save_pretrained(model, None), TypeError, "folder must be a path"),
        (lambda model, path: cn_hf.save_pretrained(model, ""), TypeError, "folder must be a path"),
        (lambda model, path: cn_hf.save_pretrained(model, path, max_shard_size="10XB"), ConfigError, "10XB"),
        (lambda model, path: cn_hf.save_pretrained(model, path, max_shard_size=0), ConfigError, "received 0"),
    ],
)
def test_wrong_arguments(call, error, message, tmp_path):
    model = trained("timm-vit")
    folder = cn_hf.save_pretrained(model, tmp_path / "saved", max_shard_size="1.5MB")
    with pytest.raises(error, match=message) as caught:
        call(model, folder)
    assert isinstance(caught.value, cn_hf.CnHfError)


@pytest.mark.parametrize("folder", ["a\0b", "\ud800", b"bytes", None, 3, ""])
def test_what_is_no_folder_is_refused_everywhere(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = cn_hf.patch_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), "cn-channels")
    source = BrightnessContexts(0.5)
    for call in (
        lambda: cn_hf.save_pretrained(model, folder),
        lambda: source.save(folder),
        lambda: source.load(folder),
    ):
        with pytest.raises((CheckpointError, InputTypeError), match="folder must be a path"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"model_args": 3}, {"model_args": "x"}, {"base_id": 0}, {"base_id": b"x"}])
def test_arguments_of_saving_have_their_types(options, tmp_path):
    model = cn_hf.patch_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), "cn-channels")
    with pytest.raises(InputTypeError, match="model_args must be a mapping and base_id a string"):
        cn_hf.save_pretrained(model, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
