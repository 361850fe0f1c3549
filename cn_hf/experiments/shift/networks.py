"""Networks of the experiment: small ones for 32 x 32 images, and timm's WideResNet of this package.

Shape legend: images ``(N, 3, 32, 32)`` to logits ``(N, num_classes)``.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import cn_hf.models  # noqa: F401  # registers cn_wrn28_2 with timm
from cn_hf.errors import DivergedError

__all__ = ["NETWORKS", "ResNet9", "new_network", "train"]

WIDTHS = (16, 32, 64, 96)
BATCH, PAD = 128, 4


class Block(nn.Sequential):
    """A convolution, norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module], *, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), norm(outputs), nn.ReLU())


class ResNet9(nn.Module):
    """A residual network of eight convolutions and a linear layer; 264,986 weights with 10 classes.

    Args:
        num_classes: logits.
        norm: makes a norm of its number of channels.
    """

    def __init__(self, num_classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        first, second, third, fourth = WIDTHS
        self.stem = Block(3, first, norm)
        self.layer1 = Block(first, second, norm, stride=2)
        self.residual1 = nn.Sequential(Block(second, second, norm), Block(second, second, norm))
        self.layer2 = Block(second, third, norm, stride=2)
        self.layer3 = Block(third, fourth, norm, stride=2)
        self.residual3 = nn.Sequential(Block(fourth, fourth, norm), Block(fourth, fourth, norm))
        self.head = nn.Linear(fourth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.layer1(self.stem(x))
        x = x + self.residual1(x)
        x = self.layer3(self.layer2(x))
        x = x + self.residual3(x)
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


def _group_norm(num_features: int) -> nn.Module:
    return nn.GroupNorm(8, num_features)


def _vit(num_classes: int) -> nn.Module:
    from timm.models import VisionTransformer

    network: nn.Module = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2, num_classes=num_classes
    )
    return network


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet": ResNet9,
    "groupnorm": lambda num_classes: ResNet9(num_classes, _group_norm),
    "vit": _vit,
    "wrn28_2": lambda num_classes: timm.create_model("cn_wrn28_2", num_classes=num_classes),
}
"""The maker of each network, from the number of classes."""


def new_network(name: str, num_classes: int, seed: int) -> nn.Module:
    """Return a network with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[name](num_classes)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, learning_rate: float, seed: int, progress: bool
) -> None:
    """Train with AdamW, one cycle, random crops of images padded by 4, and flips; in evaluation mode afterwards.

    Args:
        network: changed in place.
        images: ``(N, 3, 32, 32)``, normalised.
        labels: int64 ``(N,)``.
        epochs: passes over the images.
        learning_rate: the largest.
        seed: of order, crops and flips.
        progress: show a progress bar.

    Raises:
        DivergedError: the loss stopped being finite.
    """
    steps = epochs * max(1, len(images) // BATCH)
    decayed = [weight for weight in network.parameters() if weight.ndim > 1]
    plain = [weight for weight in network.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    network.to(memory_format=torch.channels_last).train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), desc="train", unit="step", leave=False, disable=None if progress else True):
        if len(order) < min(BATCH, len(images)):
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        x = _augmented(images[rows], generator).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), labels[rows])
        if not bool(loss.isfinite()):
            raise DivergedError(f"The loss of the source network is {float(loss.detach())}; lower the learning rate.")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.to(memory_format=torch.contiguous_format).eval()


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD), mode="reflect").movedim(1, -1)
    down, right = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=generator)
    columns = right + torch.arange(width)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    rows = down + torch.arange(height)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
