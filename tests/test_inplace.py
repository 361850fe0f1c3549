"""Every layer of normalization in front of operations that change its output in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cn_hf

KINDS: dict[str, tuple[str, Any, Callable[[int], nn.Module], int]] = {
    "cn-channels": ("cn-channels", None, nn.BatchNorm2d, 1),
    "cn-channels-after-group-norm": ("cn-channels", None, lambda features: nn.GroupNorm(2, features), 1),
    "cn-patches": ("cn-patches", None, nn.LayerNorm, -1),
    "cn": ("cn", None, nn.BatchNorm2d, 1),
    "bn": ("bn", ["norm"], nn.BatchNorm2d, 1),
    "bn-tokens": ("bn", ["norm"], nn.LayerNorm, -1),
    "mn": ("mn", ["norm"], nn.BatchNorm2d, 1),
    "mn-tokens": ("mn", ["norm"], nn.LayerNorm, -1),
    "dsbn": ("dsbn", None, nn.BatchNorm2d, 1),
}


class Block(nn.Module):
    """A norm, and what residual networks do with its output."""

    def __init__(self, norm: nn.Module, feature_dim: int, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 4), norm, nn.Linear(4, 2)
        self.feature_dim, self.inplace = feature_dim, inplace

    def forward(self, x: Tensor, added: bool) -> Tensor:
        x = self.first(x).movedim(-1, self.feature_dim)
        x = x if self.feature_dim == -1 else x.contiguous()
        out = self.norm(x)
        if added:
            out = out.add_(x) if self.inplace else out + x
        out = nn.functional.relu(out, inplace=self.inplace)
        return self.head(out.movedim(self.feature_dim, -1))


@pytest.mark.filterwarnings("ignore:.*never saw data")
@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("added", [False, True], ids=["activation", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_front_of_operations_in_place(kind: str, added: bool, recompute: bool | None) -> None:
    mode, where, norm, feature_dim = KINDS[kind]
    contexts = {} if mode in ("bn", "mn") else {"num_contexts": 3}
    given = {"context_ids": torch.tensor([0, 1, 2, 1, 0, 2])} if contexts else {}
    x, found = torch.randn(6, 5, 3, 4), []
    for inplace in (True, False):
        model = cn_hf.patch_model(Block(norm(4), feature_dim, inplace), mode=mode, where=where, **contexts).train()
        leaf = x.clone().requires_grad_()
        if recompute is None or not inplace:
            out = model(leaf, added, **given)
        else:
            out = checkpoint(lambda x, model=model: model(x, added, **given), leaf, use_reentrant=recompute)
        out.square().sum().backward()
        found.append((leaf.grad, *(parameter.grad for parameter in model.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


NETWORKS = [
    "resnet18",
    "resnet10t",
    "vgg11_bn",
    "densenet121",
    "efficientnet_b0",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "regnetx_002",
    "regnety_002",
    "mnasnet_small",
    "ghostnet_050",
    "repvgg_a0",
    "lcnet_035",
    "dla46_c",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_with_mixture_norm(name: str) -> None:
    """Their activations are in place."""
    small = {"mlp_ratio": 0.02} if name == "vgg11_bn" else {}  # of its head, else 100 million weights
    model = timm.create_model(name, num_classes=3, **small)
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    cn_hf.patch_model(model, mode="mn", where=[first]).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    assert all(gradient.isfinite().all() for gradient in gradients)
