"""LoRA on a patched model, with the contexts in ``modules_to_save``: trained, saved, resumed, reloaded, merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models_for_tests import tell_apart, vit
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import cn_hf

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([0, 1, 1, 0])


def base() -> Any:
    """The same patched model at every call."""
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=5,
    )  # fmt: skip
    return cn_hf.patch_model(ViTForImageClassification(config), context_names=("day", "night"))


def with_lora(model: Any) -> Any:
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["normalizer", "classifier"])
    return peft.get_peft_model(model, options)


def outputs(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        given = [model(pixel_values=IMAGES, context_ids=ids).logits for ids in (IDS, "night")]
        return torch.stack([*given, model(pixel_values=IMAGES).logits])


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(5)
    columns: dict[str, Any] = {
        "pixel_values": torch.randn(24, 3, 16, 16, generator=generator).tolist(),
        "labels": torch.randint(5, (24,), generator=generator).tolist(),
        "context_ids": torch.randint(2, (24,), generator=generator).tolist(),
        "file_name": ["x"] * 24,
    }
    return Dataset.from_dict(columns).with_format("torch")


def trainer(model: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model trained by Trainer, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    model = with_lora(base())
    torch.testing.assert_close(outputs(model), outputs(base()))
    trainer(model, folder).train()
    return model, folder


def test_contexts_are_trained_and_the_base_is_not(run: tuple[Any, Path]) -> None:
    model, _ = run
    start = base().state_dict()
    for name, slot in [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "normalizer")]:
        wrapper = slot.normalizer
        for key, value in wrapper.original_module.state_dict().items():
            assert torch.equal(value, start[f"{name}.normalizer.{key}"])
        assert not torch.equal(wrapper.modules_to_save["default"].mean_weight, wrapper.original_module.mean_weight)
    assert not torch.allclose(outputs(model), outputs(base()))
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), outputs(base()))


def test_reload_onto_a_fresh_base(run: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = run
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(base(), tmp_path)), outputs(model))
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(base(), folder / "checkpoint-4")), outputs(model))


def test_trainer_resumes(run: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = run
    resumed = with_lora(base())
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert torch.equal(outputs(resumed), outputs(model))


def test_merged_model_is_saved_and_loaded_as_any_patched_one(run: tuple[Any, Path], tmp_path: Path) -> None:
    merged = copy.deepcopy(run[0]).merge_and_unload()
    assert isinstance(merged.vit.layernorm.normalizer, cn_hf.ContextNorm)
    torch.testing.assert_close(outputs(merged), outputs(run[0]))
    merged.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForImageClassification.from_pretrained(tmp_path)), outputs(merged))


def test_published_base_with_an_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = with_lora(loaded)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    again = AutoModelForImageClassification.from_pretrained(described["base_model_name_or_path"])
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), outputs(model))


def test_what_cn_hf_does_to_the_model_under_the_adapter(run: tuple[Any, Path]) -> None:
    model = copy.deepcopy(run[0]).eval()
    inner = model.get_base_model()
    expected = outputs(model)
    with cn_hf.use_contexts(inner, IDS), torch.no_grad():
        assert torch.equal(model(pixel_values=IMAGES).logits, expected[0])
    cn_hf.set_inference(inner, "average")
    with torch.no_grad():
        each = [model(pixel_values=IMAGES, context_ids=context).logits.softmax(-1) for context in range(2)]
        torch.testing.assert_close(model(pixel_values=IMAGES).logits.exp(), torch.stack(each).mean(0))
    assert torch.equal(outputs(run[0]), expected)  # the copy has contexts of its own
    with pytest.raises(cn_hf.ContextIdError, match=r"0\.\.1"):
        model(pixel_values=IMAGES, context_ids=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(cn_hf.PatchError, match="get_base_model"):
        cn_hf.patch_report(model)
    batches = [{"pixel_values": IMAGES, "context_ids": IDS}]
    for change in (
        lambda: cn_hf.add_contexts(inner, 1),
        lambda: cn_hf.calibrate(inner, batches),
        lambda: cn_hf.fold_context(inner, 0),
    ):
        with pytest.raises(cn_hf.PatchError, match=r"wrapped in a ModulesToSaveWrapper.*merge_and_unload"):
            change()


# -------------------------------------------------------------------------------------- adapters around a layer with CN


def network() -> torch.nn.Module:
    """A convolution whose input is normalised, and a linear layer behind."""
    torch.manual_seed(1)
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 256, 5)
    return tell_apart(cn_hf.patch_model(torch.nn.Sequential(*layers), "cn-channels", where="input").eval())


METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "HRAConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 8, "r": 0},
    "IA3Config": {"feedforward_modules": []},
}


def adapted(model: torch.nn.Module, method: str, target: str, **options: Any) -> Any:
    options = {**METHODS[method], **options}
    if "feedforward_modules" in options:
        options["feedforward_modules"] = [target]
    adapter = peft.get_peft_model(model, getattr(peft, method)(target_modules=[target], **options)).eval()
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapter


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_adapter_around_a_layer_whose_input_is_normalised_is_refused(method: str) -> None:
    model = adapted(network(), method, "0", **({"oft_block_size": 3} if method == "OFTConfig" else {}))
    for call in (
        lambda: model(IMAGES, context_ids=0),
        lambda: model(IMAGES),
        lambda: cn_hf.use_contexts(model.get_base_model(), 0).__enter__(),
    ):
        with pytest.raises(cn_hf.PatchError, match=r"input of 0 .*target_modules.*modules_to_save"):
            call()
    plain = model.unload()
    assert torch.equal(plain(IMAGES, context_ids=1), network()(IMAGES, context_ids=1))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_adapter_behind_it_merges(method: str) -> None:
    model = adapted(network(), method, "3", modules_to_save=["0"] if method == "LoraConfig" else None)
    expected = model(IMAGES, context_ids=IDS)
    assert not torch.allclose(expected, network()(IMAGES, context_ids=IDS), atol=1e-3)
    torch.testing.assert_close(model.merge_and_unload()(IMAGES, context_ids=IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_a_projection_whose_output_is_normalised_takes_adapters(use_dora: bool) -> None:
    model = adapted(tell_apart(cn_hf.patch_model(vit(), where="embed")), "LoraConfig", "proj", use_dora=use_dora)
    expected = model(IMAGES, context_ids=IDS.new_tensor([0, 2, 1, 1]))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IMAGES, context_ids=[0, 2, 1, 1]), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layer_norm_tuning_of_slots() -> None:
    options = peft.LNTuningConfig(target_modules=["norm1", "norm2"])
    model = peft.get_peft_model(tell_apart(cn_hf.patch_model(vit())), options).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    expected = model(IMAGES, context_ids=[0, 2, 1, 1])
    with model.disable_adapter():
        assert not torch.allclose(model(IMAGES, context_ids=[0, 2, 1, 1]), expected, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IMAGES, context_ids=[0, 2, 1, 1]), expected)


def test_a_slots_class_called_makes_a_plain_layer() -> None:
    model = network()
    made = type(model[0])(2, 4, 1)
    assert type(made) is torch.nn.Conv2d
    assert made(torch.ones(1, 2, 3, 3)).shape == (1, 4, 3, 3)
