"""Slots whose weight is no parameter: pruned, parametrized, or made by a hook, before or after the model is patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import difference, settle, tell_apart
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import cn_hf

Way = Callable[[nn.Module], Any]


class Halved(nn.Module):
    """A parametrization that a training would go through."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)
    prune.l1_unstructured(module, "bias", 0.5)
    prune.random_unstructured(module, "weight", 0.2)


def halved(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Halved())
    parametrize.register_parametrization(module, "bias", Halved())


CASES: list[Any] = [
    *(
        pytest.param(1, make, {"where": ["1"]}, way, id=f"{name}-{way.__name__}")
        for name, make in {
            "batch": lambda: nn.BatchNorm2d(8),
            "group": lambda: nn.GroupNorm(2, 8),
            "layer": lambda: LayerNorm2d(8),
        }.items()
        for way in (pruned, halved)
    ),
    *(
        pytest.param(0, nn.ReLU, {"where": "input"}, way, id=f"input-{kind}-{way.__name__}")
        for kind, way in (
            ("new", pruned),
            ("new", halved),
            ("new", parametrizations.spectral_norm),
            ("new", parametrizations.weight_norm),
            ("new", parametrizations.orthogonal),
            ("old", nn.utils.spectral_norm),
        )
    ),
]


def network(second: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(3, 8, 3), second(), nn.ReLU(), nn.Conv2d(8, 4, 1)))


def changed(model: nn.Module, index: int, way: Way) -> nn.Module:
    torch.manual_seed(1)
    way(model[index])
    return model.eval()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("index", "second", "options", "way"), CASES)
def test_a_computed_weight(
    index: int, second: Callable[[], nn.Module], options: dict[str, Any], way: Way, after: bool
) -> None:
    x, ids = torch.randn(4, 3, 7, 7), torch.tensor([0, 2, 1, 1])
    expected = changed(network(second), index, way)(x)
    if after:
        model = changed(cn_hf.patch_model(network(second), "cn-channels", **options), index, way)
    else:
        model = cn_hf.patch_model(changed(network(second), index, way), "cn-channels", **options)
    assert difference(model(x, context_ids=ids), expected) <= 1e-5
    assert cn_hf.patch_report(model)[0][:2] == (str(index), type(network(second)[index]).__name__)

    tell_apart(model)
    trained = model(x, context_ids=2)
    assert difference(trained, expected) > 1e-2
    model.zero_grad()
    trained.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model[index].parameters() if p.requires_grad)

    folded = cn_hf.fold_context(model, 2)
    assert difference(folded(x), trained) <= 1e-5
    assert not any("cn_hf" in type(module).__module__ for module in folded.modules())
    assert torch.equal(model(x, context_ids=2), trained)  # the copy shares nothing with it
    assert difference(cn_hf.unpatch_model(model)(x), expected) <= 1e-5
    assert not hasattr(model[index], "normalizer")


def test_weights_that_move_are_followed() -> None:
    """The weight of the last forward stands in the module until the next one."""
    model = cn_hf.patch_model(changed(network(lambda: nn.BatchNorm2d(8)), 1, pruned), "cn-channels")
    x = torch.randn(4, 3, 7, 7)
    before = model(x, context_ids=0)
    with torch.no_grad():
        model[1].weight_orig.mul_(3)
    folded = cn_hf.fold_context(model, 0)
    assert difference(model(x, context_ids=0), before) > 1e-2
    assert difference(folded(x), model(x, context_ids=0)) <= 1e-5


def test_a_parametrized_norm_is_copied_and_made_plain() -> None:
    plain = changed(network(lambda: nn.BatchNorm2d(8)), 1, halved)
    other = copy.deepcopy(plain)  # torch gives both modules one class
    x = torch.randn(4, 3, 7, 7)
    expected = plain(x)
    cn_hf.patch_model(other, "cn-channels")
    assert not hasattr(plain[1], "normalizer")
    assert torch.equal(plain(x), expected)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(other[1], name)
    assert difference(other(x, context_ids=1), expected) <= 1e-5
    assert type(cn_hf.unpatch_model(other)[1]) is nn.BatchNorm2d
