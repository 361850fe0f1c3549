"""The demo's images: scikit-learn's handwritten digits as scanned and in eight other domains, without any download.

Every image is standardised by itself at the end (mean 0, standard deviation 1), so that no domain can be told, or
undone, by brightness and contrast alone. Training and test digits are other stretches of the collection, whose order
seems to follow the writers.

Shape legend: ``n`` digits; images are float32 ``(n, 1, 24, 24)``, strokes lie in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from cn_hf.evaluation.domains import Domains

__all__ = ["DOMAINS", "IMAGE_SIZE", "demo_domains", "in_domain", "standardized", "strokes"]

IMAGE_SIZE = 24
TRAIN, TEST = slice(0, 1200), slice(1300, 1797)


def strokes() -> tuple[Tensor, Tensor]:
    """Return all digits, enlarged from 8 x 8 pixels, and their labels, int64 ``(n,)``."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    enlarged = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return enlarged.clamp(0, 1), torch.tensor(digits.target, dtype=torch.int64)


def standardized(images: Tensor) -> Tensor:
    """Return each image with mean 0 and standard deviation 1."""
    flat = images.flatten(1)
    deviation, mean = torch.std_mean(flat, dim=1, keepdim=True)
    return ((flat - mean) / deviation.clamp_min(1e-6)).view_as(images)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.2 * torch.randn(x.shape, generator=generator)


def _salt(x: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(x.shape, generator=generator)
    return torch.where(drawn < 0.04, 1.0, torch.where(drawn > 0.97, 0.0, x))


def _low_light(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.poisson(0.1 + 6 * x, generator=generator)


def _blur(x: Tensor, generator: torch.Generator) -> Tensor:
    reach = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-reach.square() / (2 * 2.2**2))
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (6, 6, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, 6, 6), mode="replicate"), kernel.view(1, 1, -1, 1))


def _stripes(x: Tensor, generator: torch.Generator) -> Tensor:
    phase = 6.28 * torch.rand(len(x), 1, 1, 1, generator=generator)
    columns = torch.arange(IMAGE_SIZE, dtype=torch.float32).view(1, 1, 1, -1)
    return x + 0.35 * torch.sin(6.28 * columns / 5 + phase)


def _paper(x: Tensor, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(len(x), 1, 6, 6, generator=generator)
    texture = F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return x + 0.2 * texture + 0.08 * torch.randn(x.shape, generator=generator)


def _thick(x: Tensor, generator: torch.Generator) -> Tensor:
    return F.max_pool2d(x, 5, stride=1, padding=2)


def _thin(x: Tensor, generator: torch.Generator) -> Tensor:
    return -F.max_pool2d(-x, 3, stride=1, padding=1)


DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise,
    "salt": _salt,
    "low light": _low_light,
    "blur": _blur,
    "stripes": _stripes,
    "paper": _paper,
    "thick": _thick,
    "thin": _thin,
}
"""The function that makes images of each domain of strokes in 0..1, by name."""


def in_domain(name: str, x: Tensor, seed: int) -> Tensor:
    """Return strokes as images of a domain, or of ``"clean"``, standardised."""
    number = list(DOMAINS).index(name) if name in DOMAINS else len(DOMAINS)
    generator = torch.Generator().manual_seed(1000 * seed + number)
    return standardized(DOMAINS[name](x, generator) if name in DOMAINS else x)


def demo_domains(seed: int) -> tuple[Tensor, Tensor, Domains]:
    """Return training images and labels, and the domains: all test digits in each, training digits as unlabelled."""
    x, labels = strokes()
    names = ["clean", *DOMAINS]
    test = {name: in_domain(name, x[TEST], 2 * seed + 1) for name in names}
    unlabelled = {name: in_domain(name, x[TRAIN], 2 * seed) for name in names}
    return unlabelled["clean"], labels[TRAIN], Domains(test=test, labels=labels[TEST], unlabelled=unlabelled)
