"""patching/fold.py: one context as a plain model, with the same output and nothing of cn_hf in it."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import timm
import torch
import transformers
from models_for_tests import (
    CASES,
    LARGE_CASES,
    Case,
    Shared,
    SmallTokenNet,
    anatomy,
    convnet,
    difference,
    hf_vit,
    images,
    logits,
    settle,
    small_convnet,
    tell_apart,
    tensors_of,
    vit,
    vit_with_every_slot,
)
from timm.layers import BatchNormAct2d, LayerNormAct2d
from torch import Tensor, nn

import cn_hf
import cn_hf.patching
from cn_hf import ContextIdError, PatchError
from cn_hf.patching.convert import NORMS

NAMES = ("day", "night", "dawn")


def check_plain(model: nn.Module) -> None:
    """No class, attribute or hook of cn_hf is reachable; the networks of cn_hf.models are plain themselves."""
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            assert not base.__module__.startswith(("cn_hf.norm", "cn_hf.patching")), (name, base)
        for key, value in module.__dict__.items():
            home = getattr(type(value), "__module__", "")
            assert not home.startswith(("cn_hf.norm", "cn_hf.patching")), (name, key)
            assert key not in ("router", "normalizer", "keep_statistics", "cn_hf_fast_path")
    for key in model.state_dict():
        assert "normalizer" not in key
    stored = pickle.dumps(model)
    assert b"cn_hf.norm" not in stored
    assert b"cn_hf.patching" not in stored


def check_fold(model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Folding each context, by id, name and weights, keeps output and class; the patched model is as it was."""
    before, parts = tensors_of(model), anatomy(model)
    plain = cn_hf.unpatch_model(copy.deepcopy(model))
    soft = torch.tensor([[0.2, 0.3, 0.5]])
    contexts: list[tuple[Any, Any]] = [(0, 0), (2, 2), ("night", 1), (torch.tensor(1), 1)]
    for context, ids in [*contexts, (soft, soft.expand(len(x), 3))]:
        expected = logits(model(x, context_ids=ids))
        folded = cn_hf.fold_context(model, context)
        assert type(folded) is type(plain)
        assert not folded.training
        assert difference(logits(folded(x)), expected) <= tolerance
        check_plain(folded)
    assert anatomy(model) == parts
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert "context_ids" not in inspect.signature(folded.forward).parameters


@pytest.mark.parametrize("case", [*CASES, LARGE_CASES[0], *LARGE_CASES[4:7]], ids=str)
def test_every_model(case: Case) -> None:
    model = cn_hf.patch_model(case.make(), **case.options, context_names=NAMES)
    tell_apart(model)
    x = case.sample()
    outputs = [logits(model(x, context_ids=r)) for r in range(3)]
    assert difference(outputs[0], outputs[1]) > 1e-3
    with torch.no_grad():
        check_fold(model, x)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("parametrization", ["embedder", "table"])
def test_without_keep_statistics_and_in_both_parametrizations(keep: bool, parametrization: str) -> None:
    options = {"keep_statistics": keep, "parametrization": parametrization, "context_names": NAMES}
    model = tell_apart(cn_hf.patch_model(vit_with_every_slot(), **options))
    check_fold(model, images())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_class(name: str, keep: bool) -> None:
    from test_convert import model_with

    model, x = model_with(name)
    cn_hf.patch_model(model, "cn", where=["1"], keep_statistics=keep, context_names=NAMES)
    check_fold(tell_apart(model), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.LayerNorm(6, bias=False),
        nn.RMSNorm(6),
        nn.RMSNorm(6, elementwise_affine=False),
    ],
    ids=["LayerNorm", "no affine", "no bias", "RMSNorm", "RMSNorm no affine"],
)
def test_other_dtypes(norm: nn.Module, dtype: torch.dtype) -> None:
    model = settle(SmallTokenNet(copy.deepcopy(norm))).to(dtype)
    tell_apart(cn_hf.patch_model(model, context_names=NAMES))
    x = torch.randn(4, 3, 5).to(dtype)
    folded = cn_hf.fold_context(model, 1)
    assert folded(x).dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    assert difference(folded(x), model(x, context_ids=1)) <= tolerance
    assert {p.dtype for p in folded.parameters()} == {dtype}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        BatchNormAct2d(6),
        nn.GroupNorm(2, 6),
        nn.GroupNorm(2, 6, affine=False),
        nn.InstanceNorm2d(6),
        nn.InstanceNorm2d(6, affine=True),
        LayerNormAct2d(6),
    ],
    ids=lambda n: type(n).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_with_and_without_affine_weights(norm: nn.Module, dtype: torch.dtype) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.Conv2d(6, 2, 3, padding=1))).to(dtype)
    tell_apart(cn_hf.patch_model(model, "cn-channels", where=["1"], context_names=NAMES))
    x = images().to(dtype)
    folded = cn_hf.fold_context(model, "night")
    assert folded(x).dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}.get(dtype, 8 * torch.finfo(dtype).eps)
    assert difference(folded(x), model(x, context_ids=1)) <= tolerance


# ------------------------------------------------------------------------------------------------ inputs and embeddings

CONVOLUTIONS = {
    "not padded": nn.Conv2d(3, 4, 3),
    "zero-padded": nn.Conv2d(3, 4, 3, padding=1),
    "same": nn.Conv2d(3, 4, 3, padding="same"),
    "valid": nn.Conv2d(3, 4, 3, padding="valid"),
    "padded on one axis": nn.Conv2d(3, 4, 3, padding=(0, 1)),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "no bias": nn.Conv2d(3, 4, 3, bias=False),
    "no bias, padded": nn.Conv2d(3, 4, 3, padding=1, bias=False),
    "groups": nn.Conv2d(3, 6, 3, groups=3),
    "stride and dilation": nn.Conv2d(3, 4, 3, stride=2, dilation=2),
    "subclass": timm.layers.Conv2dSame(3, 4, 3, stride=2),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_an_input_before_a_convolution(layer: nn.Module, affine: bool) -> None:
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten()).eval()
    cn_hf.patch_model(model, "cn-channels", where="input", context_names=NAMES, affine=affine)
    check_fold(tell_apart(model), images())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding=1), (4, 3, 9)),
        (nn.Conv1d(3, 4, 3), (4, 3, 9)),
        (nn.Conv3d(3, 4, 3, padding=1), (4, 3, 5, 5, 5)),
        (nn.Conv3d(3, 4, 3), (4, 3, 5, 5, 5)),
        (nn.Linear(3, 4), (4, 3)),
        (nn.Linear(3, 4, bias=False), (4, 7, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_before_other_layers(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten()).eval().to(dtype)
    cn_hf.patch_model(model, "cn-channels", where="input", context_names=NAMES)
    check_fold(tell_apart(model), torch.randn(shape).to(dtype))


def test_padding_stays_zero_after_the_normalization() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()).eval()
    cn_hf.patch_model(model, "cn-channels", where="input")
    mean = torch.tensor([10.0, -10.0, 5.0])
    model[0].normalizer.set_statistics(mean.expand(3, 3), torch.ones(3, 3))
    x = images() + mean.view(3, 1, 1)
    folded = cn_hf.fold_context(model, 0)
    expected = nn.functional.conv2d(
        (x - mean.view(3, 1, 1)) / (1 + 1e-5) ** 0.5, model[0].weight, model[0].bias, padding=1
    )
    assert difference(folded(x), expected.flatten(1)) <= 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("where", ["embed", ["norm1"], "input"])
def test_patch_embeddings_with_a_norm_and_dynamic_sizes(where: Any, norm: Any, dynamic: bool) -> None:
    model = vit(embed_norm_layer=norm, dynamic_img_size=dynamic)
    mode = "cn-channels" if where == "input" else "cn-patches"
    tell_apart(cn_hf.patch_model(model, mode, where=where, context_names=NAMES))
    check_fold(model, images())
    if dynamic:
        check_fold(model, images(3, 24))
    folded = cn_hf.fold_context(model, 1)
    with cn_hf.use_contexts(model, 1):
        assert difference(folded.forward_features(images()), model.forward_features(images())) <= 1e-5


# ----------------------------------------------------------------------------------------------------- particular cases


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("keep", [True, False])
def test_a_norm_in_two_places(norm: nn.Module, keep: bool) -> None:
    model = settle(Shared(copy.deepcopy(norm)))
    cn_hf.patch_model(model, context_names=NAMES, keep_statistics=keep)
    check_fold(tell_apart(model), torch.randn(4, 6))
    folded = cn_hf.fold_context(model, 0)
    assert folded.first is folded.second


def test_a_padded_convolution_in_two_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Twice().eval()
    tell_apart(cn_hf.patch_model(model, "cn-channels", where="input"))
    assert difference(cn_hf.fold_context(model, 1)(images()), model(images(), context_ids=1)) <= 1e-5


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_another_eps_and_small_variances(eps: float) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    cn_hf.patch_model(model, "cn-channels", where=["1"], eps=eps, context_names=NAMES)
    model[1].normalizer.set_statistics(torch.randn(3, 4), torch.tensor([1e-7, 1e-4, 1.0, 100.0]).expand(3, 4))
    check_fold(model, images())


def test_after_calibration_and_training() -> None:
    model = cn_hf.patch_model(small_convnet(), "cn", context_names=NAMES)
    x, ids = images(9), torch.arange(9) % 3
    cn_hf.calibrate(model, [(x, ids)])
    check_fold(model, x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, context_ids=ids), ids).backward()
        optimizer.step()
    folded = cn_hf.fold_context(model, 1)
    assert model.training
    check_fold(model.eval(), x)
    assert not folded.training


def test_weights_tied_elsewhere_are_not_folded_into_their_other_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6, bias=False)
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x = Tied().eval(), torch.randn(4, 6)
    tell_apart(cn_hf.patch_model(model, "cn-channels", where="input"))
    assert difference(cn_hf.fold_context(model, 1)(x), model(x, context_ids=1)) <= 1e-5


def test_the_fast_path_of_torchs_encoder_is_back() -> None:
    model = settle(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2))
    flag = model.layers[0].activation_relu_or_gelu
    tell_apart(cn_hf.patch_model(model))
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        folded = cn_hf.fold_context(model, 2)
        assert folded.layers[0].activation_relu_or_gelu == flag
        assert difference(folded(x), model(x, context_ids=2)) <= 1e-5


def test_a_folded_model_can_be_stored_trained_and_patched_again() -> None:
    model = tell_apart(cn_hf.patch_model(hf_vit()))
    x = images()
    folded = cn_hf.fold_context(model, 1)
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x).logits, folded(x).logits)
    folded.train()
    folded(x, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    cn_hf.patch_model(again.eval())
    assert difference(again(x, context_ids=2).logits, model(x, context_ids=1).logits) <= 1e-5


def test_frozen_and_trainable_parameters_stay_so() -> None:
    model = vit()
    model.norm.weight.requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    folded = cn_hf.fold_context(tell_apart(cn_hf.patch_model(model)), 0)
    assert {name: p.requires_grad for name, p in folded.named_parameters()} == flags


def test_folding_again_gives_the_same_and_shares_nothing() -> None:
    model = tell_apart(cn_hf.patch_model(convnet(), "cn-channels"))
    first, second = cn_hf.fold_context(model, 1), cn_hf.fold_context(model, 1)
    owned = {p.data_ptr() for p in model.parameters()}
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
        assert a.data_ptr() not in owned


def test_what_cannot_be_folded() -> None:
    model = cn_hf.patch_model(vit(), context_names=NAMES)
    parts = anatomy(model)
    for context in (3, -1, "noon", True, 0.5, torch.tensor([0, 1]), [0, 1], torch.full((1, 3), 0.5), None, object()):
        with pytest.raises(ContextIdError):
            cn_hf.fold_context(model, context)
    assert anatomy(model) == parts
    with pytest.raises(PatchError, match="not a patched model"):
        cn_hf.fold_context(vit(), 0)
    for mode in ("bn", "mn"):
        with pytest.raises(PatchError, match=mode):
            cn_hf.fold_context(cn_hf.patch_model(convnet(), mode, where=["bn1"]), 0)


# ----------------------------------------------------------------------------------------- models of timm, transformers


def check_one_context(make: Any, x: Tensor, mode: str, where: str) -> None:
    """Fold one context of a model; quicker than ``check_fold``."""
    model = make()
    try:
        cn_hf.patch_model(model, mode, where=where)
    except PatchError as error:
        pytest.skip(str(error))
    tell_apart(model, 0.2)
    folded = cn_hf.fold_context(model, 1)
    check_plain(folded)  # first: what transformers installs in a forward does not pickle
    with torch.no_grad():
        expected, other = logits(model(x, context_ids=1)), logits(model(x, context_ids=0))
        assert difference(other, expected) > 1e-4
        assert difference(logits(folded(x)), expected) <= 1e-5


@pytest.mark.parametrize(("mode", "where"), [("cn", "norms"), ("cn-channels", "input"), ("cn-patches", "embed")])
@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_timms_small_models(name: str, mode: str, where: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return settle(timm.create_model(name, num_classes=5))

    size = make().pretrained_cfg["input_size"]
    check_one_context(make, images(2, size[-1]), mode, where)


def _segformer() -> nn.Module:
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 24], "num_attention_heads": [1, 2, 2, 2]}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes, decoder_hidden_size=16))


def _swin() -> nn.Module:
    sizes = {"patch_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(image_size=64, **sizes))


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5)
    return transformers.ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def _focalnet() -> nn.Module:
    return transformers.FocalNetForImageClassification(transformers.FocalNetConfig(image_size=64, embed_dim=12))


def _pvt() -> nn.Module:
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 24], "num_attention_heads": [1, 2, 2, 2]}
    return transformers.PvtForImageClassification(transformers.PvtConfig(image_size=64, **sizes))


@pytest.mark.parametrize(("mode", "where"), [("cn", "norms"), ("cn-channels", "input"), ("cn-patches", "embed")])
@pytest.mark.parametrize("make", [_segformer, _swin, _convnext, _resnet, _focalnet], ids=lambda f: f.__name__)
def test_models_of_transformers(make: Any, mode: str, where: str) -> None:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return settle(make())

    check_one_context(seeded, images(2, 64), mode, where)


def test_patch_embeddings_on_maps() -> None:
    """A convolution and a batch norm, or none; the output keeps its two axes of places."""
    for norm in (timm.layers.BatchNormAct2d, nn.BatchNorm2d, timm.layers.LayerNorm2d, timm.layers.RmsNorm2d, None):
        torch.manual_seed(0)
        embed = timm.layers.PatchEmbed(16, 4, embed_dim=6, norm_layer=norm, flatten=False, output_fmt="NCHW")
        model = settle(nn.Sequential(collections.OrderedDict(patch_embed=embed, head=nn.Conv2d(6, 2, 3, padding=1))))
        cn_hf.patch_model(model, "cn", where="embed", context_names=NAMES)
        assert model.patch_embed.normalizer.feature_dim == 1
        check_fold(tell_apart(model), images())


def test_position_embeddings_inside_a_patch_embedding_are_refused() -> None:
    model = cn_hf.patch_model(settle(_pvt()), where="embed")
    parts = anatomy(model)
    with pytest.raises(PatchError, match="position embeddings"):
        cn_hf.fold_context(model, 0)
    assert anatomy(model) == parts


def test_a_batch_norm_whose_eps_is_in_its_code() -> None:
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), DetrFrozenBatchNorm2d(4)))
    cn_hf.patch_model(model, "cn-channels", where=["1"], context_names=NAMES, eps=1e-7)
    model[1].normalizer.set_statistics(torch.randn(3, 4), torch.tensor([1e-6, 1e-4, 1.0, 9.0]).expand(3, 4))
    check_fold(model, images())
