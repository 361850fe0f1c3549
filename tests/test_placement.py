"""patching/placement.py: which slots a mode and a ``where`` mean."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import timm
import torch
from models_for_tests import (
    VIT_SLOTS,
    SmallConvNet,
    SmallTokenNet,
    TextNet,
    anatomy,
    convnet,
    hf_vit,
    images,
    settle,
    vit,
    vit_with_every_slot,
)
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

import cn_hf
from cn_hf import ConfigError, PatchError

HF_NORMS = {"vit.layernorm", *(f"vit.layers.{i}.layernorm_{which}" for i in range(2) for which in ("before", "after"))}


def slots(model: nn.Module, mode: str = "cn-patches", **options: Any) -> set[str]:
    return {row.name for row in cn_hf.patch_report(cn_hf.patch_model(model, mode, **options))}


# ------------------------------------------------------------------------------------------------------------- keywords


def test_every_norm_slot_of_a_timm_vit() -> None:
    assert slots(vit_with_every_slot()) == VIT_SLOTS
    assert slots(vit_with_every_slot(global_pool="avg"), where="norms") == VIT_SLOTS - {"norm"} | {"fc_norm"}
    assert slots(vit_with_every_slot(), "cn") == VIT_SLOTS
    assert slots(vit_with_every_slot(), "cn", where="norms") == VIT_SLOTS


def test_every_norm_slot_of_a_transformers_vit() -> None:
    assert slots(hf_vit()) == HF_NORMS


def test_every_norm_slot_of_a_wide_resnet() -> None:
    model = timm.create_model("wide_resnet50_2")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 53
    assert slots(settle(model), "cn-channels") == norms
    wrn = timm.create_model("cn_wrn28_2")
    norms = {name for name, module in wrn.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 25
    assert slots(settle(wrn), "cn-channels") == norms
    assert slots(convnet(), "cn-channels") == {"bn1", "bn2", "bn3", "bn4"}


@pytest.mark.parametrize(
    ("make", "mode", "where", "expected"),
    [
        (vit, "cn-channels", "paper", {"patch_embed.proj"}),
        (vit, "cn-channels", None, {"patch_embed.proj"}),
        (vit, "cn-channels", "input", {"patch_embed.proj"}),
        (vit, "cn", "input", {"patch_embed.proj"}),
        (vit, "cn-patches", "paper", {"patch_embed"}),
        (vit, "cn-patches", "embed", {"patch_embed"}),
        (vit, "cn", "embed", {"patch_embed"}),
        (vit, "cn", "paper", {"patch_embed", "patch_embed.proj"}),
        (vit, "bn", "paper", {"patch_embed.proj"}),
        (vit, "bn", None, {"patch_embed.proj"}),
        (vit, "bn", "input", {"patch_embed.proj"}),
        (hf_vit, "cn-channels", None, {"vit.embeddings.patch_embeddings.projection"}),
        (hf_vit, "cn-patches", "paper", {"vit.embeddings.patch_embeddings"}),
        (hf_vit, "bn", None, {"vit.embeddings.patch_embeddings.projection"}),
        (convnet, "cn-channels", "paper", {"conv1"}),
        (convnet, "bn", None, {"conv1"}),
        (convnet, "mn", None, {"bn3"}),
        (convnet, "mn", "paper", {"bn3"}),
        (convnet, "mn", "norms", {"bn1", "bn2", "bn3", "bn4"}),
        (convnet, "mn", ["bn2"], {"bn2"}),
        (convnet, "bn", ["bn2", "bn4"], {"bn2", "bn4"}),
        (vit, "bn", ["norm"], {"norm"}),
        (vit, "mn", [r"blocks\.0\.norm1"], {"blocks.0.norm1"}),
        (lambda: timm.create_model("cn_wrn28_2"), "cn-channels", "paper", {"stem.conv"}),
        (lambda: timm.create_model("wide_resnet50_2"), "cn-channels", "input", {"conv1"}),
        (TextNet, "cn-patches", None, {"norm", "rms"}),
        (TextNet, "cn", None, {"norm", "rms"}),
        (SmallConvNet, "cn-channels", None, {"bn1", "bn2", "gn", "bn3"}),
        (SmallConvNet, "cn", None, {"bn1", "bn2", "gn", "bn3"}),
        (SmallConvNet, "bn", "norms", {"bn1", "bn2", "bn3"}),
        (SmallConvNet, "cn-channels", "input", {"conv1"}),
    ],
)
def test_what_a_mode_and_a_place_mean(make: Any, mode: str, where: Any, expected: set[str]) -> None:
    assert slots(settle(make()), mode, where=where) == expected


def test_the_input_layer_lies_on_the_path_of_forward_features() -> None:
    for model in (vit(), convnet()):
        x = images()
        cn_hf.patch_model(model, "cn-channels", where="input")
        norm = cn_hf.patch_report(model)[0].name
        with torch.no_grad():
            mean = torch.tensor([1.0, 2.0, 3.0])
            model.get_submodule(norm).normalizer.set_statistics(mean.expand(3, 3), torch.ones(3, 3))
        with cn_hf.use_contexts(model, 1):
            contextual = model.forward_features(x)
        cn_hf.unpatch_model(model)
        plain = model.forward_features((x - mean.view(3, 1, 1)) / (1 + 1e-5) ** 0.5)
        torch.testing.assert_close(contextual, plain, atol=1e-5, rtol=1e-5)


def test_a_norm_in_the_middle_of_two_kinds_goes_by_the_mode() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.ln = nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.ln(self.bn(x).flatten(2).mT)

    assert slots(settle(Both()), "cn-channels") == {"bn"}
    assert slots(settle(Both()), "cn-patches") == {"ln"}
    assert slots(settle(Both()), "cn") == {"bn", "ln"}


def test_batch_norm_of_one_and_three_dimensions_and_group_norm_count_as_channels() -> None:
    for norm, shape in (
        (nn.BatchNorm1d(4), (2, 4)),
        (nn.BatchNorm1d(4), (2, 4, 7)),
        (nn.BatchNorm3d(4), (2, 4, 2, 3, 2)),
        (nn.GroupNorm(2, 4), (2, 4, 3)),
        (nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    ):
        model = settle(nn.Sequential(nn.Identity(), norm))
        x = torch.randn(shape)
        before = model(x)
        with pytest.raises(PatchError, match="cn-patches"):
            cn_hf.patch_model(model, "cn-patches", where="norms")
        assert slots(model, "cn-channels") == {"1"}
        torch.testing.assert_close(model(x, context_ids=2), before, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["norm"], {"norm", "mlp", "attn"}),
        (["norm1"], {"blocks.0.norm1", "blocks.1.norm1"}),
        (["attn.q_norm", "fc_norm"], {"blocks.0.attn.q_norm", "blocks.1.attn.q_norm", "fc_norm"}),
        (["blocks.1.norm2"], {"blocks.1.norm2"}),
        ([r"blocks\.0\..*norm\d"], {"blocks.0.norm1", "blocks.0.norm2"}),
        ([r".*\.k_norm"], {"blocks.0.attn.k_norm", "blocks.1.attn.k_norm"}),
        ("norm1", {"blocks.0.norm1", "blocks.1.norm1"}),
        (("norm1", "norm1", "blocks.0.norm1"), {"blocks.0.norm1", "blocks.1.norm1"}),
    ],
)
def test_patterns_match_full_names_suffixes_and_expressions(where: Any, expected: set[str]) -> None:
    model = vit_with_every_slot(global_pool="avg")
    if (
        "mlp" in expected
    ):  # the suffix `norm` means patch_embed.norm, attn.norm, mlp.norm, but neither fc_norm nor norm1
        expected = {"patch_embed.norm", *(f"blocks.{i}.{part}.norm" for i in range(2) for part in ("attn", "mlp"))}
    assert slots(model, where=where) == expected


def test_a_suffix_is_whole_names_not_letters() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "prenorm": nn.LayerNorm(3)})
    assert slots(model, where=["norm"]) == {"norm"}


def test_a_norm_used_under_two_names_is_found_by_either() -> None:
    for name in ("a", "b"):
        model = nn.Module()
        model.a = model.b = nn.LayerNorm(4)
        assert len(slots(model, where=[name])) == 1
        assert hasattr(model.a, "normalizer")


UNPATCHED = [
    ({"where": ["blocks.9.norm1"]}, r"'blocks.9.norm1'.*did you mean 'blocks.\d.norm1'"),
    ({"where": ["norm1", "nrm2"]}, r"'nrm2' .*matches no module"),
    ({"where": "nroms"}, r"'nroms'.*no keyword \(norms, paper, input, embed\)"),
    ({"where": ["attn.proj"]}, r"attn.proj.* a Linear.*no norm layer"),
    ({"where": [r"blocks\.("]}, "matches no module"),
    ({"where": "input"}, "cn-channels"),
    ({"mode": "cn-channels", "where": "embed"}, "cn-patches"),
    ({"mode": "cn-channels", "where": "norms"}, r"no norm layer that mode='cn-channels'.*LayerNorm"),
    ({"mode": "cn-channels", "where": ["norm1"]}, r"norm1.*axis -1.*mode='cn-patches'"),
    ({"mode": "mn"}, "ConvNet"),
    ({"mode": "mn", "where": "paper"}, "ConvNet"),
    ({"mode": "bn", "where": "norms"}, "batch norms"),
]


@pytest.mark.parametrize(("options", "message"), UNPATCHED)
def test_a_place_that_is_not_there_is_an_error_and_nothing_changes(options: dict[str, Any], message: str) -> None:
    model = vit()
    x, parts = images(), anatomy(model)
    before = model(x)
    with pytest.raises(PatchError, match=re.compile(message, re.DOTALL)):
        cn_hf.patch_model(model, **options)
    assert anatomy(model) == parts
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("mode", ["cn-patches", "cn-channels", "cn", "bn", "mn"])
def test_a_model_without_any_slot(mode: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Embedding(3, 2))
    parts = anatomy(model)
    with pytest.raises(PatchError, match=r"Sequential|matches|ConvNet"):
        cn_hf.patch_model(model, mode)
    assert anatomy(model) == parts


def test_empty_places_are_refused() -> None:
    for where in ([], "", [""]):
        with pytest.raises((ConfigError, PatchError)):
            cn_hf.patch_model(vit(), where=where)


# ----------------------------------------------------------------------------------------- norms that cannot be swapped


def test_norms_left_as_they_are_are_named_in_a_warning() -> None:
    model = nn.Sequential(nn.LayerNorm(8), GlobalResponseNorm(8), nn.LayerNorm((4, 8)))
    with pytest.warns(UserWarning, match=r"1: GlobalResponseNorm.*2: LayerNorm, it normalises over several axes"):
        assert slots(model, "cn-patches", where="norms") == {"0"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cn_hf.patch_model(settle(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))))


def test_a_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(PatchError, match="track_running_stats"):
        cn_hf.patch_model(model, "cn-channels", where=["1"])
    with pytest.raises(PatchError, match="track_running_stats"):
        cn_hf.patch_model(model, "cn-channels", where="norms")


def test_the_root_itself_is_no_slot() -> None:
    for norm, mode in ((nn.LayerNorm(4), "cn-patches"), (nn.BatchNorm2d(4), "cn-channels")):
        parts = anatomy(norm)
        with pytest.raises(PatchError, match="ContextNorm"):
            cn_hf.patch_model(norm, mode)
        assert anatomy(norm) == parts


def test_a_layer_that_is_never_called_is_not_taken_for_the_input() -> None:
    # F.multi_head_attention_forward reads out_proj's weight without calling it: contexts there would be dropped.
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(3, 5, 8)
    try:
        cn_hf.patch_model(model, "cn-channels", where="input")
    except PatchError:
        return
    slot = model.get_submodule(cn_hf.patch_report(model)[0].name)
    before = model(x, context_ids=0)
    slot.normalizer.set_statistics(torch.ones(slot.normalizer.num_features), torch.ones(slot.normalizer.num_features))
    assert not torch.equal(model(x, context_ids=0), before)


@pytest.mark.slow
def test_transformers_swin_whose_embedding_returns_a_tuple() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    for where in ("norms", "embed"):
        model = settle(SwinForImageClassification(SwinConfig(**sizes, num_labels=5)))
        x = images()
        before = model(x).logits
        try:
            cn_hf.patch_model(model, where=where)
        except PatchError:
            assert where == "embed"
            continue
        torch.testing.assert_close(model(x, context_ids=1).logits, before, atol=1e-5, rtol=1e-5)


def test_a_place_on_a_small_token_model() -> None:
    assert slots(SmallTokenNet(nn.RMSNorm(6))) == {"norm"}
    assert slots(SmallTokenNet(nn.Identity()), "cn-channels") == {"inner"}


# ---------------------------------------------------------------------------------------------------------- lazy layers


@pytest.mark.parametrize(
    ("lazy", "where"), [*(("0", where) for where in (None, "norms", "input", ["1"])), ("1", None), ("2", None)]
)
def test_lazy_layers_are_run_before_they_are_patched(lazy: str, where: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if lazy == "0" else [nn.Identity()]))
    layers = {"0": nn.LazyConv2d(8, 3), "1": nn.LazyBatchNorm2d(), "2": nn.LazyInstanceNorm2d()}
    model[min(int(lazy), 1)] = layers[lazy]  # a lazy norm stands alone
    before = anatomy(model)
    with pytest.raises(PatchError, match=r"\(Lazy.*Run the model once"):
        cn_hf.patch_model(model, "cn-channels", where=where)
    assert anatomy(model) == before
    model(images())
    cn_hf.patch_model(model, "cn-channels", where=where)
