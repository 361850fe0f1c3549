"""patching/convert.py: every norm class of the table against the class it replaces, and what a slot refuses."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from models_for_tests import difference, settle, tensors_of
from timm.layers import BatchNormAct2d, LayerNormAct, LayerNormAct2d, RmsNormAct2d
from torch import Tensor, nn
from transformers import BitConfig

import cn_hf
from cn_hf import CnHfError, PatchError
from cn_hf.patching.convert import NORMS, REFUSED
from cn_hf.patching.transformers_norms import ROOT_MEAN_SQUARE_NORMS

C = 8


def norm_class(name: str) -> Any:
    module, _, class_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), class_name, None)
    except ModuleNotFoundError:
        return None


def model_with(name: str) -> tuple[nn.Module, Tensor]:
    """An Identity, then a norm of that class with weights as after training; and an input for it."""
    cls = norm_class(name)
    if cls is None:
        pytest.skip(f"{name} is not in this version")
    if name.startswith("torch.") and cls is nn.GroupNorm:
        norm = cls(4, C)
    elif cls.__name__ in ("GroupNorm", "GroupNormAct"):
        norm = cls(C, num_groups=4)
    elif cls.__name__ == "BitGroupNormActivation":
        norm = cls(BitConfig(num_groups=4, hidden_act="silu"), C)
    else:
        norm = cls(C)
    if cls.__name__ == "SyncBatchNormAct":  # timm makes these from BatchNormAct2d and hands the activation over
        norm.drop, norm.act = nn.Identity(), nn.ReLU()
    generator = torch.Generator().manual_seed(1)
    maps = {"1d": (4, C, 5), "3d": (4, C, 3, 3, 3)}.get(name[-2:], (4, C, 5, 5))
    shape = maps if NORMS[name].feature_dim == 1 else (4, 5, C)
    return settle(nn.Sequential(nn.Identity(), norm)), torch.randn(shape, generator=generator) * 2 + 1


def random_statistics(norm: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(norm.num_contexts, norm.num_features, generator=generator)
    var = torch.rand(norm.num_contexts, norm.num_features, generator=generator) + 0.2
    norm.set_statistics(mean, var)
    return mean, var


FUSED = [name for name, entry in NORMS.items() if entry.fused]


def test_the_table_is_right_about_these_versions() -> None:
    found = [name for name in NORMS if norm_class(name) is not None]
    assert len(found) > 30
    for name in FUSED:
        assert "Act" in name
    for name in found:
        assert norm_class(name).__module__ == name.rpartition(".")[0], name


@pytest.mark.parametrize("name", NORMS)
def test_identity_at_first_and_bit_equal_on_the_way_back(name: str) -> None:
    model, x = model_with(name)
    old_class, parameters, plain = type(model[1]), dict(model.named_parameters()), tensors_of(model)
    before = model(x)
    cn_hf.patch_model(model, "cn", where=["1"])
    assert {n: p for n, p in model.named_parameters() if n in parameters} == parameters
    assert set(plain) < set(model.state_dict())
    for ids in (0, 2, torch.tensor([0, 1, 2, 1]), torch.full((4, 3), 1 / 3), None):
        after = model(x, context_ids=ids)
        assert after.dtype == before.dtype
        assert difference(after, before) <= 1e-5
    cn_hf.unpatch_model(model)
    assert type(model[1]) is old_class
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(plain)
    assert not any(hasattr(model[1], name) for name in ("normalizer", "router", "keep_statistics"))


@pytest.mark.parametrize("name", NORMS)
def test_learned_contexts_act_between_standardisation_and_affine_map(name: str) -> None:
    model, x = model_with(name)
    entry = NORMS[name]
    norm = model[1]
    weight, bias = (None if getattr(norm, n, None) is None else getattr(norm, n).clone() for n in ("weight", "bias"))
    fused = "activation" if hasattr(norm, "activation") else "act"
    act = getattr(norm, fused) if entry.fused else nn.Identity()
    bare = copy.deepcopy(model)
    for parameter_name, value in (("weight", 1.0), ("bias", 0.0)):
        parameter = getattr(bare[1], parameter_name, None)
        if parameter is not None:
            parameter.data.fill_(value)
    if entry.fused:
        setattr(bare[1], fused, nn.Identity())
    standardised = x if entry.standardize is None else bare(x)
    cn_hf.patch_model(model, "cn", where=["1"], parametrization="table")
    mean, var = random_statistics(model[1].normalizer)
    ids = torch.tensor([2, 0, 1, 2])
    y = standardised.movedim(entry.feature_dim, -1)
    eps = model[1].normalizer.eps
    rows = [(y[i] - mean[r]) / (var[r] + eps).sqrt() for i, r in enumerate(ids.tolist())]
    expected = torch.stack(rows)
    expected = expected if weight is None else expected * weight
    expected = expected if bias is None else expected + bias
    expected = act(expected.movedim(-1, entry.feature_dim))
    assert difference(model(x, context_ids=ids), expected) <= 1e-5


@pytest.mark.parametrize("name", [name for name in NORMS if "InstanceNorm" not in name])  # has no state: test_patch.py
def test_the_plain_state_loads_strictly_and_resets_the_contexts(name: str) -> None:
    model, x = model_with(name)
    plain, before = tensors_of(model), model(x)
    cn_hf.patch_model(model, "cn", where=["1"])
    random_statistics(model[1].normalizer)
    assert difference(model(x, context_ids=1), before) > 1e-2
    model.load_state_dict(plain)
    assert difference(model(x, context_ids=1), before) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_other_dtypes_are_kept_and_equal_at_their_rounding(name: str, dtype: torch.dtype) -> None:
    model, x = model_with(name)
    model, x = model.to(dtype), x.to(dtype)
    before = model(x)
    cn_hf.patch_model(model, "cn", where=["1"])
    for ids in (1, None):
        after = model(x, context_ids=ids)
        assert after.dtype == before.dtype
        assert torch.isfinite(after).all()
        # Fp32 classes and transformers' RMS norms round doubles; a model without tensors does not tell its dtype.
        rounds = "Fp32" in name or "InstanceNorm" in name or name in ROOT_MEAN_SQUARE_NORMS
        assert (
            difference(after, before)
            <= (1e-6 if rounds else 1e-10) + (dtype != torch.float64) * 4 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("activation", ["softplus", "exp"])
@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("norm", [nn.LayerNorm(C), nn.BatchNorm1d(C, eps=1e-3)], ids=lambda n: type(n).__name__)
def test_identity_holds_in_each_parametrization_and_for_small_and_large_variances(
    norm: nn.Module, parametrization: str, activation: str
) -> None:
    model = settle(nn.Sequential(nn.Linear(C, C), copy.deepcopy(norm)))
    if isinstance(norm, nn.BatchNorm1d):
        model[1].running_var.copy_(torch.tensor([1e-8, 1e-4, 1e-2, 1.0, 10.0, 1e3, 1e6, 0.0]))
        model[1].running_mean.copy_(torch.tensor([0.0, 1e-4, -1.0, 5.0, -50.0, 1e3, -1e4, 0.3]))
    x = torch.randn(6, C)
    before = model(x)
    options = {"parametrization": parametrization, "variance_activation": activation, "num_contexts": 4}
    cn_hf.patch_model(model, "cn", where=["1"], **options)
    for ids in (*range(4), None):
        assert ((model(x, context_ids=ids) - before).abs() <= 1e-5 * before.abs().amax(0).clamp_min(1)).all()


@pytest.mark.parametrize("cls", [BatchNormAct2d, LayerNormAct2d, RmsNormAct2d, LayerNormAct])
def test_activation_and_dropout_fused_in_the_norm_stay(cls: Any) -> None:
    norm = cls(C, act_layer=nn.ReLU, drop_layer=nn.Dropout) if "Batch" in cls.__name__ else cls(C, act_layer=nn.ReLU)
    norm.drop = nn.Dropout(0.5)
    model = settle(nn.Sequential(nn.Identity(), norm))
    x = torch.randn(4, 5, C) if cls is LayerNormAct else torch.randn(4, C, 3, 3)
    cn_hf.patch_model(model, "cn", where=["1"])
    assert (model(x) >= 0).all()
    assert isinstance(model[1].act, nn.ReLU)
    kept = (model(x, context_ids=0) > 0).float().mean()
    model.train()
    dropped = (model(x, context_ids=0) > 0).float().mean()
    assert 0.2 * kept < dropped < 0.8 * kept


def test_only_exact_types_are_swapped() -> None:
    class Special(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(C, C), Special(C), nn.LayerNorm(C)).eval()
    x = torch.randn(2, C)
    before = model(x)
    cn_hf.patch_model(model)
    assert type(model[1]) is Special
    assert difference(model(x, context_ids=1), before) <= 1e-5


@pytest.mark.parametrize("name", [n for n in REFUSED if "LocalResponse" in n or "GlobalResponse" in n or "B0" in n])
def test_refused_classes_say_why(name: str) -> None:
    cls = norm_class(name)
    if cls is None:
        pytest.skip(f"{name} is not in this version")
    model = nn.Sequential(nn.Conv2d(3, C, 1), cls(C))
    with pytest.raises(PatchError, match=r"1, a .* \(it "):
        cn_hf.patch_model(model, "cn", where=["1"])


def test_a_layer_norm_over_several_axes_is_refused() -> None:
    with pytest.raises(PatchError, match="several axes"):
        cn_hf.patch_model(nn.Sequential(nn.LayerNorm((4, C))), where=["0"])


def test_without_keep_statistics_the_standardisation_goes() -> None:
    model = settle(nn.Sequential(nn.Identity(), nn.LayerNorm(C)))
    x = torch.randn(3, 4, C) * 3 + 2
    cn_hf.patch_model(model, keep_statistics=False)
    expected = x * model[1].weight + model[1].bias
    assert difference(model(x, context_ids=0), expected) <= 1e-5


# ----------------------------------------------------------------------------------------------- eps of a swapped layer


@pytest.mark.parametrize("eps", [1e-8, 1e-4, 0.05])
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_another_eps_moves_the_variance(eps: float, activation: str) -> None:
    for norm in (nn.BatchNorm1d(C, eps=1e-3), nn.LayerNorm(C)):
        model = settle(nn.Sequential(nn.Linear(C, C), norm))
        x = torch.randn(5, C)
        before = model(x)
        cn_hf.patch_model(model, "cn", where=["1"], eps=eps, variance_activation=activation)
        assert model[1].normalizer.eps == eps
        assert difference(model(x, context_ids=2), before) <= 1e-5


def test_an_eps_that_cannot_keep_the_sum_is_an_error() -> None:
    model = settle(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)))
    model[1].running_var[3] = 1e-4
    x = torch.randn(5, C)
    before = model(x)
    with pytest.raises(PatchError, match=r"1: eps=0.01 .*smallest running variance|eps=0.01 is larger"):
        cn_hf.patch_model(model, "cn", where=["1"], eps=0.01)
    assert torch.equal(model(x), before)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(C, eps=1.0), nn.GroupNorm(2, C, eps=7.0), nn.BatchNorm1d(C, eps=2.0), nn.LayerNorm(C, eps=0.0)],
    ids=lambda norm: f"{type(norm).__name__}-{norm.eps:g}",
)
def test_an_eps_that_leaves_a_variance_of_one_no_room(norm: nn.Module) -> None:
    model = settle(nn.Sequential(nn.Linear(C, C), copy.deepcopy(norm)))
    x = torch.randn(5, C)
    before, state = model(x), tensors_of(model)
    cn_hf.patch_model(model, "cn")
    assert difference(model(x, context_ids=2), before) <= 1e-5
    assert difference(cn_hf.fold_context(model, 0)(x), before) <= 1e-5
    model.load_state_dict(state)
    assert difference(model(x, context_ids=1), before) <= 1e-5


# ----------------------------------------------------------------------------------- tools that would drop the contexts


def patched_batch_norm() -> nn.Module:
    model = settle(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)))
    return cn_hf.patch_model(model, "cn-channels", where=["1"])


def test_fusing_a_batch_norm_into_its_convolution_is_refused() -> None:
    model = patched_batch_norm()
    assert not isinstance(model[1], nn.modules.batchnorm._BatchNorm)
    with pytest.raises((CnHfError, AttributeError), match="fold_context"):
        torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    with pytest.raises((CnHfError, AttributeError), match="fold_context"):
        _ = model[1].eps


def test_code_that_folds_running_statistics_finds_no_eps() -> None:
    slot = patched_batch_norm()[1]
    assert not hasattr(slot, "eps")
    assert getattr(slot, "eps", None) is None
    with pytest.raises(AttributeError, match="eps"):
        slot.eps = 1e-3


def test_sync_batch_norm_conversion_leaves_slots_alone() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(patched_batch_norm())
    assert [row.name for row in cn_hf.patch_report(model)] == ["1"]


def test_slots_pickle_and_copy() -> None:
    model = patched_batch_norm()
    x = torch.randn(2, 3, 5, 5)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[1]) is type(model[1])
    assert torch.equal(again(x, context_ids=1), model(x, context_ids=1))


def test_a_slot_shows_its_options() -> None:
    text = repr(patched_batch_norm())
    assert "ContextNorm" in text
    assert "num_contexts=3" in text
