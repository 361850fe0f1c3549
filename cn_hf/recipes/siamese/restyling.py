"""Day for night, measured (paper IV-E shows it by examples): do restyled images have the other context's statistics?

Images of one context are restyled to another and compared, per channel over all pixels, with real images of that other
one; then they are restyled back. Levels are those of 8-bit images, 0 (black) to 255 (white).

N images, C channels, H and W height and width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import DatasetError
from cn_hf.evaluation.networks import network_device
from cn_hf.patching.restyle import input_norm, restyle
from cn_hf.patching.routing import router_of
from cn_hf.reading.statistics import channel_statistics

__all__ = ["Levels", "Shift", "learned_levels", "measure_shift"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Mean and standard deviation of each channel, in levels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Levels:
        """Those of uint8 images (N, C, H, W) over all their pixels."""
        mean, std = channel_statistics(images)
        constant = (images.amax((0, 2, 3)) == images.amin((0, 2, 3))).tolist()  # for which that gives 1
        levels = tuple(0.0 if alike else 255 * value for value, alike in zip(std, constant, strict=True))
        return cls(mean=tuple(255 * value for value in mean), std=levels)

    def distance(self, other: Levels) -> tuple[float, float]:
        """Mean over the channels of the absolute differences of the means, and of the standard deviations."""
        pairs = ((self.mean, other.mean), (self.std, other.std))
        mean, std = (sum(abs(a - b) for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs)
        return mean, std


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Distances of real images before and after they were restyled.

    Attributes:
        source: Context they are of.
        target: Context they were restyled to.
        images: Their number.
        real_images: Number of real images of the target context.
        original: Levels as they were.
        restyled: Levels as they became.
        real: Levels of the real images of the target context.
        clipped: Part of all values that would have been below black or above white.
        cycle_error: Mean absolute error in levels of restyling there and back, where nothing is clipped or rounded.
        cycle_error_8bit: The same with an 8-bit image in between, over the values that were not clipped there.
        cycle_error_clipped: The same over all values, clipped ones included.
    """

    source: str
    target: str
    images: int
    real_images: int
    original: Levels
    restyled: Levels
    real: Levels
    clipped: float
    cycle_error: float
    cycle_error_8bit: float
    cycle_error_clipped: float

    @property
    def before(self) -> tuple[float, float]:
        """Distance of means and of standard deviations from the target context's, as the images were."""
        return self.original.distance(self.real)

    @property
    def after(self) -> tuple[float, float]:
        """The same as the images became."""
        return self.restyled.distance(self.real)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, distances included."""
        return dataclasses.asdict(self) | {"distance_before": self.before, "distance_after": self.after}


def learned_levels(model: nn.Module) -> dict[str, Levels]:
    """The mean and standard deviation that each context has on a model's input, as levels.

    Raises:
        PatchError: The model has no CN-Channels on its input.
    """
    norm, router = input_norm(model), router_of(model)
    mean, var = (values.detach().double().cpu() for values in norm.statistics())
    pixel_mean, pixel_std = (torch.tensor(v, dtype=torch.float64) for v in (router.pixel_mean, router.pixel_std))
    mean = 255 * (mean * pixel_std + pixel_mean)
    deviation = 255 * (var + norm.eps).sqrt() * pixel_std
    names = router.config.context_names or tuple(map(str, range(len(mean))))
    return {
        name: Levels(mean=tuple(mean[place].tolist()), std=tuple(deviation[place].tolist()))
        for place, name in enumerate(names)
    }


def measure_shift(model: nn.Module, images: Tensor, contexts: Tensor, source: str, target: str) -> Shift:
    """Restyle the held-out images of one context to another and back.

    Args:
        model: With CN-Channels on its input.
        images: uint8 (N, C, H, W), of all contexts.
        contexts: (N,) int64.
        source: Name of the context whose images are restyled.
        target: Name of the one they are restyled to.

    Raises:
        DatasetError: There is no image of one of the two.
        ContextIdError: A name is unknown.
        PatchError: The model has no CN-Channels on its input.
    """
    router = router_of(model)
    chosen = {}
    for name in (source, target):
        context = int(router.resolve(name, 1, torch.device("cpu")))
        chosen[name] = images[(contexts == context).to(images.device)].to(network_device(model))
        if not len(chosen[name]):
            raise DatasetError(f"there is no held-out image of context {name!r} to measure with")
    original, real = chosen[source], chosen[target]
    mean, std = router.pixel_statistics(original)
    x = (original.float() / 255 - mean) / std
    there = restyle(model, x, source, target, clip=False)
    cycled = restyle(model, there, target, source, clip=False)
    levels = 255 * (there * std + mean)
    outside = (levels < -0.5) | (levels > 255.5)
    restyled = restyle(model, original, source, target)
    cycled_8bit = restyle(model, restyled, target, source)
    error_8bit = (cycled_8bit.int() - original.int()).abs().double()
    return Shift(
        source=source,
        target=target,
        images=len(original),
        real_images=len(real),
        original=Levels.of(original),
        restyled=Levels.of(restyled),
        real=Levels.of(real),
        clipped=float(outside.double().mean()),
        cycle_error=float((255 * (cycled - x) * std).abs().double().mean()),
        cycle_error_8bit=float(error_8bit[~outside].mean()) if bool((~outside).any()) else 0.0,
        cycle_error_clipped=float(error_8bit.mean()),
    )
