"""Small models, inputs and comparisons that several test files share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import cn_hf
import cn_hf.models

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
VIT_SLOTS = {
    "patch_embed.norm",
    "norm_pre",
    "norm",
    *(
        f"blocks.{i}.{slot}"
        for i in range(2)
        for slot in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")
    ),
}


def settle(model: nn.Module) -> nn.Module:
    """Give every norm running statistics and affine weights as after training, then switch to evaluation."""
    generator = torch.Generator().manual_seed(7)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if not any(word in type(module).__name__.lower() for word in ("norm", "bn")) or list(
                module.parameters()
            ) != (list(module.parameters(recurse=False))):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                uniform(parameter, *((0.5, 1.5) if name == "weight" else (-0.5, 0.5)))
            for name, buffer in module.named_buffers(recurse=False):
                if name == "num_batches_tracked":
                    buffer.fill_(7)
                elif name == "running_mean":
                    uniform(buffer, -0.5, 0.5)
                elif buffer.is_floating_point():
                    uniform(buffer, 0.5, 2.0)
    return model.eval()


def seeded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same weights at every call."""

    @functools.wraps(make)
    def remade(*args: Any, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args, **options)

    return remade


@seeded
def vit(**options: Any) -> nn.Module:
    return settle(VisionTransformer(**{**VIT, **options}))


def vit_with_every_slot(**options: Any) -> nn.Module:
    """Token pooling: ``norm`` is the last norm; with ``global_pool="avg"`` it is ``fc_norm``."""
    slots = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True}
    return vit(**slots, embed_norm_layer=nn.LayerNorm, **options)


@seeded
def hf_vit(**options: Any) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 32}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
    return settle(ViTForImageClassification(ViTConfig(**{**sizes, **depth, **options})))


@seeded
def convnet() -> nn.Module:
    return settle(timm.create_model("cn_cifar_convnet", num_classes=5))


class SmallConvNet(nn.Module):
    """One of each norm that counts as channels, and a batch norm with dropout and activation fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        self.bn2.drop.p = 0.25
        self.gn = nn.GroupNorm(4, 8)
        self.bn3 = nn.BatchNorm1d(8, affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.gn(self.bn2(self.conv2(x)))
        return self.head(self.bn3(x.mean((2, 3))))


class SmallTokenNet(nn.Module):
    """Linear layers around one norm of tokens: ``(N, L, 5)`` to ``(N, L, 3)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.norm = norm
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x)))


class Shared(nn.Module):
    """One norm in two places."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = self.second = norm
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix(self.first(x)))


class TextNet(nn.Module):
    """Token ids to class scores: an embedding, a LayerNorm, an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.norm = nn.LayerNorm(12)
        self.mix = nn.Linear(12, 12)
        self.rms = nn.RMSNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.mix(self.norm(self.embedding(tokens))).tanh()
        if mask is not None:
            x = x * mask[..., None]
        return self.head(self.rms(x).mean(1))


@seeded
def small_convnet() -> nn.Module:
    return settle(SmallConvNet())


@seeded
def text_net() -> nn.Module:
    return settle(TextNet())


@seeded
def encoder() -> nn.Module:
    """torch's encoder, whose evaluation fast path reads the norms' weights without calling them."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    return settle(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12)))


def images(num: int = 4, size: int = 16) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A model, how to patch it, and an input for it."""

    name: str
    make: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    sample: Callable[[], Tensor] = images

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("vit", vit),
    Case("vit-every-slot", vit_with_every_slot),
    Case("vit-fc-norm", lambda: vit(global_pool="avg")),
    Case("vit-embed", vit, {"where": "embed"}),
    Case("vit-input", vit, {"mode": "cn-channels"}),
    Case("vit-input-and-embed", vit, {"mode": "cn", "where": "paper"}),
    Case("hf-vit", hf_vit),
    Case("hf-vit-embed", hf_vit, {"where": "paper"}),
    Case("hf-vit-input", hf_vit, {"mode": "cn-channels"}),
    Case("small-convnet", small_convnet, {"mode": "cn-channels"}),
    Case("small-convnet-patterns", small_convnet, {"mode": "cn", "where": ["bn2", "gn"]}),
    Case("small-convnet-input", small_convnet, {"mode": "cn-channels", "where": "input"}),
    Case("text", text_net, {}, lambda: torch.arange(24).view(4, 6)),
    Case("text-patterns", text_net, {"where": ["rms"]}, lambda: torch.arange(24).view(4, 6)),
    Case("encoder", encoder, {}, lambda: torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(3))),
]
LARGE_CASES = [
    *(
        Case(f"timm-{name}", lambda name=name: settle(timm.create_model(name, img_size=32)), {}, lambda: images(2, 32))
        for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4")
    ),
    Case("convnet", convnet, {"mode": "cn-channels"}, lambda: images(3, 16)),
    Case("convnet-input", convnet, {"mode": "cn-channels", "where": "paper"}, lambda: images(3, 16)),
    Case("wrn28-2", lambda: settle(timm.create_model("cn_wrn28_2")), {"mode": "cn-channels"}, lambda: images(2, 16)),
    Case(
        "wide-resnet50-2",
        lambda: settle(timm.create_model("wide_resnet50_2")),
        {"mode": "cn-channels"},
        lambda: images(2, 32),
    ),
]


def logits(output: Any) -> Tensor:
    """The tensor of a forward's result."""
    return output if isinstance(output, Tensor) else output.logits


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the scale of ``expected``."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def tell_apart(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move what the contexts learned, as training would, so that they differ."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def anatomy(model: nn.Module) -> dict[str, tuple[type, tuple[str, ...]]]:
    """Class and attributes of every module: what a patch that failed must not have touched."""
    return {
        name: (type(module), tuple(sorted([*module.__dict__, *module._modules, *module._parameters, *module._buffers])))
        for name, module in model.named_modules()
    }


def refusal(call: Callable[[], Any]) -> Exception | None:
    """The error with which a call was refused, or None where it went through."""
    try:
        call()
    except (cn_hf.CnHfError, RuntimeError) as error:
        return error
    return None
