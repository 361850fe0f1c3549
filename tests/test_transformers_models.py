"""Patched transformers models in transformers' own formats: Auto classes, pipelines, Trainer, the Hub."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from datasets import Dataset
from hub_server import OWNER, HubServer, run_python
from models_for_tests import hf_vit, settle
from PIL import Image
from processes import leave
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    Dinov2Config,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

import cn_hf
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import CheckpointError, InputTypeError, PatchError
from cn_hf.hub.transformers_models import load_transformers, save_transformers

VIT = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": 5,
}  # fmt: skip
WRAPPED = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 5, "label_names": list("abcde"),
    "model_args": {"img_size": 16, "patch_size": 4, "depth": 2},
    "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}  # fmt: skip
ARCHITECTURES: dict[str, Callable[[], tuple[str, Any]]] = {
    "vit": lambda: ("ViTForImageClassification", ViTConfig(**VIT)),  # other names on disk than in memory
    "dinov2": lambda: ("Dinov2ForImageClassification", Dinov2Config(**VIT)),  # tensors split and joined on disk
    "deit-teacher": lambda: ("DeiTForImageClassificationWithTeacher", DeiTConfig(**VIT)),  # not the config's first
    "swin": lambda: (
        "SwinForImageClassification",
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
    ),
    "resnet": lambda: (
        "ResNetForImageClassification",
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5),
    ),
    "timm": lambda: ("TimmWrapperForImageClassification", TimmWrapperConfig.from_dict(copy.deepcopy(WRAPPED))),
}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([0, 1, 1, 0])


def trained(kind: str = "vit", **options: Any) -> Any:
    """A patched model whose contexts differ, in evaluation mode."""
    torch.manual_seed(1)
    name, config = ARCHITECTURES[kind]()
    model = settle(getattr(transformers, name)(config))
    options = {"context_names": ("day", "night"), "mode": "cn", "where": "norms"} | options
    cn_hf.patch_model(model, **options)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def logits(model: nn.Module, ids: Any = None, images: torch.Tensor = IMAGES) -> torch.Tensor:
    side = 32 if type(model).__name__.startswith("ResNet") else 16
    with torch.no_grad():
        output = model(images[..., :side, :side].to(next(model.parameters()).dtype), context_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_same(model: nn.Module, other: nn.Module) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    for ids in (IDS, "night", None):
        assert torch.equal(logits(model, ids), logits(other, ids))


# --------------------------------------------------------------------------------------------------------- Auto classes


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_auto_class_loads_what_save_pretrained_wrote(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    cn_hf.set_inference(model, "average", mean=(0.4,) * 3, std=(0.2,) * 3)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).original_class is type(model).original_class
    assert type(loaded.config) is type(model.config)
    assert loaded.config.id2label == model.config.id2label
    assert loaded.context_config == model.context_config
    assert loaded.router.pixel_std == model.router.pixel_std
    assert not loaded.training
    assert_same(model, loaded)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    plain = cn_hf.unpatch_model(loaded)  # has forgotten where it came from
    plain.save_pretrained(again)
    assert "context_norm" not in (again / "config.json").read_text()


@pytest.mark.parametrize("mode", ["bn", "mn"])
def test_baselines_load(mode: str, tmp_path: Path) -> None:
    model = trained("resnet", mode=mode, context_names=None)
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForImageClassification.from_pretrained(tmp_path))


def test_all_ways_to_save_and_load_agree(tmp_path: Path) -> None:
    model = trained()
    own = model.config
    cn_hf.save_pretrained(model, tmp_path / "ours")
    save_transformers(model, tmp_path / "bare")
    assert model.config is own
    assert type(own) is ViTConfig
    for folder in (tmp_path / "ours", tmp_path / "bare"):
        assert_same(model, AutoModelForImageClassification.from_pretrained(folder))
        assert_same(model, load_transformers(folder))
        assert_same(model, type(model).from_pretrained(folder))
    assert_same(model, cn_hf.from_pretrained(tmp_path / "ours"))


def test_config_alone_builds_a_patched_model(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=7)
    assert isinstance(config, ViTConfig)
    assert config.num_labels == 7
    for same in (config, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        fresh = AutoModelForImageClassification.from_config(same).eval()
        assert fresh.context_config.context_names == ("day", "night")
        assert logits(fresh, "day").shape == (4, 7)
        torch.testing.assert_close(logits(fresh, "day"), logits(fresh, "night"))  # untrained: contexts are alike


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_config_class_takes_what_to_dict_gives(kind: str, tmp_path: Path) -> None:
    trained(kind).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    again = type(config)(**config.to_diff_dict(), attn_implementation="eager")
    assert again._attn_implementation == "eager"
    assert again.context_norm == config.context_norm
    assert again.context_norm_plain().to_diff_dict() == config.context_norm_plain().to_diff_dict()
    with pytest.raises(CheckpointError, match="does not describe"):
        type(config)(**{**config.to_dict(), "context_norm": {}})


@pytest.mark.parametrize("where", ["norms", ["vit.layernorm", r".*layers\.\d\.layernorm_before"], ["layernorm_after"]])
def test_base_model_and_task_model_load_each_others_checkpoints(where: Any, tmp_path: Path) -> None:
    model = trained(mode="cn-patches", where=where)
    model.save_pretrained(tmp_path / "task")
    base = AutoModel.from_pretrained(tmp_path / "task")
    assert type(base).__name__ == "ViTModel"
    assert base.context_config.replace(where=None) == model.context_config.replace(where=None)
    slots = {name.removeprefix("vit.") for name, *_ in cn_hf.patch_report(model)}
    assert {name for name, *_ in cn_hf.patch_report(base)} == slots
    with cn_hf.use_contexts(model, IDS), torch.no_grad():
        expected = model.vit(IMAGES[..., :16, :16]).last_hidden_state
    assert torch.equal(logits(base, IDS), expected)
    base.save_pretrained(tmp_path / "base")
    task = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    expected_state = {f"vit.{key}": value for key, value in base.state_dict().items() if "pooler" not in key}
    assert all(torch.equal(task.state_dict()[key], value) for key, value in expected_state.items())


def test_slots_of_a_new_head_start_as_after_patching(tmp_path: Path) -> None:
    base = cn_hf.patch_model(settle(transformers.LevitModel(small_levit())), mode="cn-channels", num_contexts=2)
    base.save_pretrained(tmp_path)
    task = AutoModelForImageClassification.from_pretrained(tmp_path)
    head = task.classifier.batch_norm
    assert isinstance(head.normalizer, cn_hf.ContextNorm)
    mean, var = head.normalizer.statistics()
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(var + head.normalizer.eps, torch.ones_like(var))
    assert torch.equal(head._buffers["running_var"], torch.ones_like(head._buffers["running_var"]))
    assert torch.equal(head.weight, torch.ones_like(head.weight))


def small_levit() -> Any:
    return transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )


# ------------------------------------------------------------------------------------ options of any transformers model


def test_sharded_weights(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(model, AutoModelForImageClassification.from_pretrained(tmp_path))
    assert_same(model, cn_hf.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same(model, cn_hf.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_weights_and_of_contexts(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "float32")
    cast = AutoModelForImageClassification.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert cast.vit.layers[0].mlp.fc1.weight.dtype == cast.vit.layernorm.weight.dtype == dtype
    kept = torch.promote_types(dtype, torch.float32)  # half precision would lose what identity needs
    assert {parameter.dtype for parameter in cn_hf.context_parameters(cast)} == {kept}
    torch.testing.assert_close(logits(cast, IDS).float(), logits(model, IDS), rtol=0.05, atol=0.05)
    cast.save_pretrained(tmp_path / "cast")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "cast")
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in cast.parameters()]
    assert_same(cast, again)


def test_device_map_and_offloading(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "model")
    assert_same(model, AutoModelForImageClassification.from_pretrained(tmp_path / "model", device_map="cpu"))
    places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    offloaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.vit.layers[0].mlp.fc1.weight.is_meta
    for ids in (IDS, None):
        assert torch.equal(logits(offloaded, ids), logits(model, ids))


def test_subfolder_and_another_number_of_classes(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "inner")
    assert_same(model, AutoModelForImageClassification.from_pretrained(tmp_path, subfolder="inner"))
    assert_same(model, type(model).from_pretrained(tmp_path, subfolder="inner", dtype=torch.float32))
    wider = AutoModelForImageClassification.from_pretrained(
        tmp_path / "inner", num_labels=9, ignore_mismatched_sizes=True
    )
    assert logits(wider, IDS).shape == (4, 9)
    assert torch.equal(wider.vit.layernorm.normalizer.mean_weight, model.vit.layernorm.normalizer.mean_weight)


def test_context_source_travels_along(tmp_path: Path) -> None:
    model = trained()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    source = BrightnessContexts().fit(Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]}))
    cn_hf.set_inference(model, "predict", source=source, mean=(0.5,) * 3, std=(0.5,) * 3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.router.source.names == source.names
    assert_same(model, loaded)


# ------------------------------------------------------------------------------------------------ what must be refused


def test_classes_of_transformers_do_not_load_it_as_a_plain_model(tmp_path: Path) -> None:
    for kind in ("vit", "timm", "swin"):
        model = trained(kind)
        model.save_pretrained(tmp_path / kind)
        with pytest.raises(Exception, match="import cn_hf"):
            model.original_class.from_pretrained(tmp_path / kind)


def test_plain_checkpoints_are_refused_by_the_patched_class(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "patched")
    cn_hf.unpatch_model(trained()).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="call cn_hf"):
        type(model).from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="plain transformers model"):
        load_transformers(tmp_path / "plain")
    config = AutoConfig.from_pretrained(tmp_path / "patched")
    with pytest.raises(CheckpointError, match="lacks parameters of its contexts"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "plain", config=config)


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for name, value in values.items():
        outer, _, inner = name.partition("__")
        if inner:
            content[outer][inner] = value
        else:
            content[outer] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"context_norm__format": 99}, "update cn_hf"),
        ({"base_model_type": "vti"}, "base model type 'vti'"),
        ({"context_norm__config": {"mode": "cn-patchs"}}, "does not describe"),
        ({"context_norm__slots": "all"}, "does not describe"),
        ({"base_config": None}, "does not describe"),
        ({"context_norm": []}, "does not describe"),
    ],
)
def test_damaged_config(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(CheckpointError, match=words):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], whole[:5]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated, changed"):
            AutoModelForImageClassification.from_pretrained(tmp_path)
    tensors = safetensors.torch.load(whole)
    lost = next(key for key in tensors if ".normalizer." in key)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != lost}, file, {"format": "pt"})
    (tmp_path / "context_norm.json").unlink()
    with pytest.raises(CheckpointError, match="lacks parameters of its contexts"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises((CheckpointError, ValueError), match="lacks parameters of its contexts"):
        pipeline("image-classification", model=str(tmp_path), image_processor=PROCESSOR, device="cpu")


def test_loading_state_dicts_in_place(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    on_disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not on_disk.keys() <= model.state_dict().keys()  # what makes this a case
    fresh = cn_hf.patch_model(model.original_class(ViTConfig(**VIT)), num_contexts=2).eval()
    parameters = list(fresh.parameters())
    assert not fresh.load_state_dict(on_disk).missing_keys
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))  # an optimizer may hold them
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in model.state_dict().items())
    lost = next(key for key in on_disk if ".normalizer." in key)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({key: value for key, value in on_disk.items() if key != lost})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(on_disk | {"surplus": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------------------ pipelines


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
PICTURES = [
    Image.fromarray(pixels) for pixels in np.random.default_rng(3).integers(0, 255, (3, 20, 24, 3), dtype=np.uint8)
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    folder = tmp_path_factory.mktemp("published")
    model = trained()
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return model, str(folder)


def scores(model: Any, images: Any, ids: Any) -> list[list[float]]:
    pixels = PROCESSOR(images, return_tensors="pt").pixel_values
    return [sorted(row, reverse=True) for row in logits(model, ids, pixels).softmax(-1).tolist()]


def test_pipeline_in_contexts(published: tuple[Any, str]) -> None:
    model, folder = published
    pipe = pipeline("image-classification", model=folder, device="cpu")

    def given(*args: Any, **kwargs: Any) -> list[list[float]]:
        found = list(pipe(*args, **kwargs))
        found = found if isinstance(found[0], list) else [found]
        return [[entry["score"] for entry in entries] for entries in found]

    def expect(found: list[list[float]], images: Any, ids: Any) -> None:
        np.testing.assert_allclose(found, scores(model, images, ids), atol=1e-6)

    one = PICTURES[0]
    expect(given(one), [one], None)
    expect(given(one, context_ids=1), [one], 1)
    expect(given(one, context="night"), [one], 1)
    expect(given(PICTURES, context="night"), PICTURES, 1)
    expect(given(PICTURES, context=["night", "day", "night"]), PICTURES, [1, 0, 1])
    expect(given(PICTURES, context_ids=torch.tensor([1, 0, 0]), batch_size=2), PICTURES, [1, 0, 0])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    expect(given(PICTURES, context_ids=weights, batch_size=3), PICTURES, weights)
    expect(given((image for image in PICTURES), context=["day", "night", "day"], batch_size=2), PICTURES, [0, 1, 0])
    fixed = pipeline("image-classification", model=model, image_processor=PROCESSOR, context="night", device="cpu")
    np.testing.assert_allclose([entry["score"] for entry in fixed(one)], scores(model, [one], 1)[0], atol=1e-6)
    features = pipeline("image-feature-extraction", model=folder, device="cpu")
    assert not np.array_equal(features(one, context="day"), features(one, context="night"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": "nigth"}, "did you mean 'night'"),
        ({"context_ids": 2}, r"0\.\.1"),
        ({"context_ids": [0, 1]}, "2 context_ids for 3 images"),
        ({"context": "day", "context_ids": 0}, "not both"),
    ],
)
def test_pipeline_refuses_wrong_contexts(published: tuple[Any, str], given: dict[str, Any], words: str) -> None:
    model, _ = published
    pipe = pipeline("image-classification", model=model, image_processor=PROCESSOR, device="cpu")
    with pytest.raises(cn_hf.ContextIdError, match=words):
        pipe(PICTURES, **given)
    with pytest.raises(cn_hf.ContextIdError, match="another number of images"):
        list(pipe((image for image in PICTURES), context_ids=[0, 1, 1, 0]))
    assert len(pipe(PICTURES)) == 3


def test_pipeline_of_a_plain_model_is_as_it_was() -> None:
    plain = cn_hf.unpatch_model(trained())
    pipe = pipeline("image-classification", model=plain, image_processor=PROCESSOR, device="cpu")
    assert len(pipe(PICTURES[0], top_k=2)) == 2
    with pytest.raises(InputTypeError, match="patched models"):
        pipe(PICTURES[0], context="day")


def test_image_processor_of_a_wrapped_timm_model(tmp_path: Path) -> None:
    trained("timm").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(PICTURES, return_tensors="pt").pixel_values.shape == (3, 3, 16, 16)
    pipe = pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert {entry["label"] for entry in pipe(PICTURES[0], context="day")} == set("abcde")


# -------------------------------------------------------------------------------------------------------------- Trainer


def rows(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    columns: dict[str, Any] = {
        "pixel_values": torch.randn(count, 3, 16, 16, generator=generator).tolist(),
        "labels": torch.randint(5, (count,), generator=generator).tolist(),
        "context_ids": torch.randint(2, (count,), generator=generator).tolist(),
        "file_name": ["x"] * count,
    }
    return Dataset.from_dict(columns).with_format("torch")


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4, save_steps=2, eval_steps=2,
        eval_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(8))


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_trainer_trains_saves_resumes_and_loads_the_best(kind: str, tmp_path: Path) -> None:
    first = trainer(trained(kind), tmp_path / "run", load_best_model_at_end=True)
    start = copy.deepcopy(first.model.state_dict())
    first.train()
    contexts = [key for key in start if ".normalizer." in key]
    assert contexts
    assert any(not torch.equal(start[key], first.model.state_dict()[key]) for key in contexts)
    best = AutoModelForImageClassification.from_pretrained(first.state.best_model_checkpoint)
    first.model.eval()
    assert_same(first.model, best)
    assert first.evaluate()["eval_loss"] == pytest.approx(trainer(best, tmp_path / "best").evaluate()["eval_loss"])
    with torch.no_grad():
        batch = rows(8)[:]
        expected = first.model(batch["pixel_values"], context_ids=batch["context_ids"]).logits
    np.testing.assert_allclose(first.predict(rows(8)).predictions, expected, atol=1e-6)

    resumed = trainer(trained(kind), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    resumed.model.eval()
    assert_same(resumed.model, last)
    resumed.save_model(str(tmp_path / "saved"))
    assert_same(resumed.model, AutoModelForImageClassification.from_pretrained(tmp_path / "saved"))


def test_trainer_on_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    ended = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("whole", "resumed")]
    assert_same(*ended)
    assert any(not torch.equal(tensor, ended[0].state_dict()[key]) for key, tensor in trained().state_dict().items())


def run_on_two_processes(folder: Path) -> None:
    # Without an optimizer's state, which transformers 5.17 cannot read back on several processes without a GPU.
    options: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "save_only_model": True}
    whole = trainer(trained(), folder / "run", **options)
    assert whole.accelerator.num_processes == 2
    whole.train()
    assert whole.predict(rows(8)).predictions.shape == (8, 5)
    whole.save_model(str(folder / "whole"))
    resumed = trainer(trained(), folder / "run", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    resumed.save_model(str(folder / "resumed"))


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


PUSH = """
    import cn_hf
    import json, sys, torch
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor

    model = ViTForImageClassification(ViTConfig(**json.loads(sys.argv[1])))
    cn_hf.patch_model(model, context_names=("day", "night"))
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.push_to_hub("tester/model", private=True)
    model.save_pretrained("folder", push_to_hub=True, repo_id="tester/saved")
    arguments = TrainingArguments("run", hub_model_id="tester/trained", report_to=[], use_cpu=True)
    Trainer(model, arguments, processing_class=ViTImageProcessor(size={"height": 16, "width": 16})).push_to_hub()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.eval()
    print(json.dumps([model(images, context_ids=ids).logits.tolist() for ids in (["day", "night"], None)]))
"""
LOAD = """
    import json, torch
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

    try:
        AutoModelForImageClassification.from_pretrained("tester/model")
    except ValueError as error:
        assert "model type `context_norm`" in str(error)
    else:
        raise AssertionError("transformers alone has loaded a patched model")
    import cn_hf

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("model", "saved", "trained"):
        model = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        found.append([model(images, context_ids=ids).logits.tolist() for ids in (["day", "night"], None)])
    assert AutoConfig.from_pretrained("tester/trained").num_labels == 5
    assert AutoImageProcessor.from_pretrained("tester/trained").size["height"] == 16
    pipe = pipeline("image-classification", model="tester/trained", device="cpu")
    assert len(pipe(Image.new("RGB", (20, 20)), context="night")) == 5
    print(json.dumps(found))
"""


def test_publishing_and_loading_in_another_process(hub: HubServer, tmp_path: Path) -> None:
    pushed = run_python(PUSH, hub, tmp_path / "pusher", json.dumps(VIT))
    for name in ("model", "saved", "trained"):
        assert {"config.json", "context_norm.json", "model.safetensors"} <= hub.files(f"tester/{name}").keys()
    assert run_python(LOAD, hub, tmp_path / "loader").result == [pushed.result] * 3


def test_hub_options(hub: HubServer, tmp_path: Path) -> None:
    model = trained()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    source = BrightnessContexts().fit(Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]}))
    cn_hf.set_inference(model, "predict", source=source)
    model.save_pretrained(tmp_path / "model")
    files = {
        f"inner/{path.relative_to(tmp_path / 'model')}": path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    commit = hub.push("tester/options", files, private=True)
    hub.push("tester/options", {"inner/config.json": b"{}", "inner/context_norm.json": b"{}"})
    code = f"""
        import cn_hf
        import json
        from transformers import AutoModelForImageClassification
        options = dict(revision={commit!r}, subfolder="inner", cache_dir="cache", token={OWNER!r})
        for local in (False, True):
            model = AutoModelForImageClassification.from_pretrained(
                "tester/options", local_files_only=local, **options
            )
            assert model.router.source.names == {tuple(source.names)!r}, model.router.source
        print(json.dumps(float(sum(p.detach().double().abs().sum() for p in model.parameters()))))
    """
    found = run_python(code, hub, tmp_path / "home", token=None)
    assert found.result == pytest.approx(
        float(sum(p.detach().double().abs().sum() for p in model.parameters())), rel=1e-12
    )


if __name__ == "__main__":  # one process of the test above
    run_on_two_processes(Path(sys.argv[1]))
    leave()


def test_a_part_is_not_saved_without_its_contexts(tmp_path: Path) -> None:
    model = cn_hf.patch_model(hf_vit())
    with pytest.raises(PatchError, match="the whole patched model"):
        model.base_model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    cn_hf.unpatch_model(model).base_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
