"""Patching holds for every kind of model: a sample of the sweep that `scripts/coverage` runs over all of timm."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models_for_tests import difference, seeded, settle, tell_apart
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

import cn_hf
from cn_hf import CnHfError, ContextIdError, PatchError
from cn_hf.patching.convert import NORMS, REFUSED, SampleNormSlot, Slot, qualified_name
from cn_hf.patching.placement import NORM_BASES, is_norm_like
from scripts.coverage.properties import PatchingCheck, settle_parameters
from scripts.coverage.sweep import build_timm, check_model, structure_of_timm
from scripts.coverage.transformers_models import TRANSFORMERS

TINY = timm.list_models("test_*")


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_of_timm(name: str) -> None:
    assert structure_of_timm(name)["failures"] == []
    result = check_model(*build_timm(name))
    assert result["failures"] == []
    assert result["checks"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name: str) -> None:
    model, inputs = TRANSFORMERS[name]()
    result = check_model(model, inputs)
    assert result["failures"] == []
    assert result["checks"]


def test_a_text_encoder_through_patterns() -> None:
    model, inputs = TRANSFORMERS["bert"]()
    check = PatchingCheck(settle_parameters(model, inputs), inputs)
    result = check("cn-patches", "attention.output.LayerNorm")
    assert (result.failures, result.slots) == ((), 2)
    with pytest.raises(PatchError, match="embedding of ids"):
        check("cn-channels", "input")


# -------------------------------------------------------------------------------------------------------------- classes


def norm_classes(package: str) -> set[str]:
    """Qualified names of the norm layers defined in a package's modules, by what they inherit or are called."""
    found = set()
    name_like = re.compile(r"(Layer|Group|Batch|Rms|RMS|Simple|Response|Instance|Evo)Norm\w*$|Abn$")
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        for name, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if member.__module__ == module.name and issubclass(member, nn.Module) and not name.startswith("_"):
                composite = name.endswith(("Mlp", "Wrapper"))
                if issubclass(member, NORM_BASES) or (name_like.search(name) and not composite):
                    found.add(qualified_name(member))
    return found


@pytest.mark.parametrize("package", ["timm.layers", "timm.models", "torch.nn.modules"])
def test_every_norm_class_is_in_a_table(package: str) -> None:
    found = norm_classes(package)
    assert len(found) >= (3 if package == "timm.models" else 10)
    assert found - NORMS.keys() - REFUSED.keys() == set()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_classes_are_named_in_a_warning_and_refused_by_pattern(name: str) -> None:
    module, _, class_name = name.rpartition(".")
    norm_class = getattr(importlib.import_module(module), class_name)
    if class_name == "InplaceAbn":
        pytest.skip("InplaceAbn needs the package inplace_abn, which needs CUDA")
    arguments: dict[str, Any] = {"num_splits": 2} if class_name.startswith("Split") else {}
    norm = norm_class(**arguments) if "Lazy" in name else norm_class(4, **arguments)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.BatchNorm2d(4))
    assert is_norm_like(norm)
    with pytest.raises(PatchError, match=re.escape(REFUSED[name])):
        cn_hf.patch_model(model, "cn", where=["1"])
    with pytest.warns(UserWarning, match=re.escape(REFUSED[name])):
        cn_hf.patch_model(model, "cn", where="norms")
    assert [slot.name for slot in cn_hf.patch_report(model)] == ["2"]


def test_norms_where_a_model_mixes_samples_are_left_alone() -> None:
    if not timm.is_model("csatv2"):
        pytest.skip("this version of timm has no csatv2")
    with torch.device("meta"):
        model = timm.create_model("csatv2")
    with pytest.warns(UserWarning, match="attention runs across the samples of a batch"):
        cn_hf.patch_model(model, "cn-patches", where="norms")
    inside = "stages.0.0.attn.attn.norm1"
    names = {slot.name for slot in cn_hf.patch_report(model)}
    assert names
    assert inside not in names
    cn_hf.unpatch_model(model)
    with pytest.raises(PatchError, match="attention runs across the samples of a batch"):
        cn_hf.patch_model(model, "cn-patches", where=[inside])


class OwnLayerNorm(nn.LayerNorm):
    """A class cn_hf has never met, by inheritance and not by name."""


class Standardize(OwnLayerNorm):
    pass


def test_an_unknown_norm_class_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Standardize(4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match=r"1: .*Standardize is not a norm class cn_hf knows"):
        cn_hf.patch_model(model, "cn-patches")


@pytest.mark.parametrize(
    ("data_format", "axis", "mode", "other"),
    [("channels_first", 1, "cn-channels", "cn-patches"), ("channels_last", -1, "cn-patches", "cn-channels")],
)
def test_the_data_format_of_a_norm_decides_its_kind(data_format: str, axis: int, mode: str, other: str) -> None:
    model = settle(nn.Sequential(nn.Identity(), ConvNextLayerNorm(6, data_format=data_format)))
    norm, x, ids = model[1], torch.randn(3, 6, 6, 6), torch.tensor([2, 0, 1])
    before = model(x)
    with pytest.raises(PatchError, match="no norm layer"):
        cn_hf.patch_model(model, other, where="norms")
    cn_hf.patch_model(model, mode, where="norms")
    assert difference(model(x, context_ids=1), before) <= 1e-5
    tell_apart(model)
    standard = F.layer_norm(x.movedim(axis, -1), (6,), eps=norm.eps).movedim(-1, axis)
    normalized = norm.normalizer(standard, ids).movedim(axis, -1)
    expected = (normalized * norm.weight + norm.bias).movedim(-1, axis)
    assert difference(model(x, context_ids=ids), expected) <= 1e-5


# -------------------------------------------------------------------------------------------- leading dimensions of ids


class Encoder(nn.Module):
    """torch's encoder inside a model whose input is batch-major."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


def encoders() -> tuple[nn.Module, nn.Module]:
    made = seeded(lambda batch_first: settle(Encoder(batch_first)))
    return made(True), made(False)


@pytest.mark.parametrize("length", [5, 12, 2])  # no multiple of the batch size, one, and a divisor
def test_sequence_first_attention_gives_what_batch_first_gives(length: int) -> None:
    batch_first, sequence_first = encoders()
    x = torch.randn(4, length, 8, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, 2, 1, 1])
    for model in (batch_first, sequence_first):
        cn_hf.patch_model(model, "cn-patches")
    sequence_first.load_state_dict(tell_apart(batch_first).state_dict())
    assert difference(sequence_first(x, context_ids=ids), batch_first(x, context_ids=ids)) <= 1e-6
    assert difference(sequence_first(x, context_ids=1), batch_first(x, context_ids=1)) <= 1e-6
    cn_hf.unpatch_model(sequence_first)
    assert not any(hasattr(module, "near_sequence_first") for module in sequence_first.modules())


def test_a_square_of_sequences_and_samples_is_refused() -> None:
    _, model = encoders()
    cn_hf.patch_model(model, "cn-patches")
    x = torch.randn(4, 4, 8)
    with pytest.raises(ContextIdError, match="batch_first=True"):
        model(x, context_ids=torch.tensor([0, 1, 2, 0]))
    assert model(x).shape == x.shape


class Windows(nn.Module):
    """Four windows of a map as batch entries: batch-major, or windows-major, which no shape tells apart."""

    def __init__(self, batch_major: bool) -> None:
        super().__init__()
        self.batch_major = batch_major
        self.embed = nn.Conv2d(3, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = self.embed(x).permute(0, 2, 3, 1).reshape(n, 4, -1, 6)
        x = x if self.batch_major else x.transpose(0, 1)
        x = self.mix(self.norm(x.reshape(n * 4, -1, 6)))
        return (x.reshape(n, 4, -1) if self.batch_major else x.reshape(4, n, -1).transpose(0, 1)).mean(1)


@pytest.mark.parametrize("batch_major", [True, False])
def test_isolation_finds_ids_repeated_in_the_wrong_order(batch_major: bool) -> None:
    torch.manual_seed(0)
    model, x = Windows(batch_major), torch.randn(3, 3, 4, 4)
    result = PatchingCheck(settle_parameters(model, x), x)("cn-patches", "norms")
    assert result.rows == 4
    assert (result.isolation <= 1e-6) is batch_major
    assert any("depends on another's" in words for words in result.failures) is not batch_major


# --------------------------------------------------------------------------------------------------- the check can fail


def broken(change: Callable[[Slot, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Failures found in a small ViT whose slots change what they receive."""
    forward = SampleNormSlot.forward
    monkeypatch.setattr(SampleNormSlot, "forward", lambda self, x: change(self, forward(self, x)))
    torch.manual_seed(0)
    model, x = (
        VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2),
        torch.randn(3, 3, 16, 16),
    )
    return PatchingCheck(settle_parameters(model, x), x)("cn-patches", "norms").failures


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda slot, x: x, None),
        (lambda slot, x: x.roll(1, dims=1), "output changed"),
        (lambda slot, x: x + slot.normalizer.mean_weight.abs().max() * x.roll(1, dims=0), "depends on another's"),
        (lambda slot, x: x.detach(), "depends on no slot"),
        (lambda slot, x: (slot.normalizer.requires_grad_(False), x)[1], "no gradient"),
    ],
)
def test_what_does_not_hold_is_found(
    change: Callable[[Slot, Tensor], Tensor], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = broken(change, monkeypatch)
    assert (failures == ()) if words is None else any(words in failure for failure in failures)


def test_a_check_needs_an_output_that_tells_something() -> None:
    x = torch.randn(3, 3, 4, 4)
    with pytest.raises(CnHfError, match="two samples"):
        PatchingCheck(Windows(True), x[:1])
    with pytest.raises(CnHfError, match="same output"):
        PatchingCheck(nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.Threshold(1e9, 0.5)), x)
    with pytest.raises(CnHfError, match="not finite"):
        PatchingCheck(nn.Flatten(), x * torch.inf)


def test_settling_leaves_no_branch_silent() -> None:
    model, x = build_timm("test_convnext")
    settle_parameters(model, x)
    assert not model.training
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cn_hf.patch_model(settle_parameters(build_timm("test_resnet")[0], x), "cn-channels")  # norms have seen data
