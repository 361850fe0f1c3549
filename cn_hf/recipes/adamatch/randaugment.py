"""RandAugment (Cubuk et al. 2020) of whole batches on their device, each image by operations of its own.

Which operations an image gets, and which way, is drawn on the CPU for the *global* batch from a generator seeded for
it alone, as in ``augment.py``; images that drew the same operation then undergo it together.

Shapes: n images of one operation, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kornia.enhance import equalize, posterize, sharpness
from kornia.geometry.transform import rotate, shear, translate
from torch import Tensor

from cn_hf.data.augment import whole_batch
from cn_hf.errors import ConfigError

__all__ = ["OPERATIONS", "RandAugment"]

LUMA = (0.299, 0.587, 0.114)


class RandAugment:
    """``num_operations`` of ``OPERATIONS``, drawn for each image with equal chances, one after the other.

    The call is that of ``cn_hf.data.augment.Augment``. What comes into the picture from outside is black, as with
    FixMatch and AdaMatch.

    Args:
        num_operations: N of RandAugment.
        magnitude: M of RandAugment as a part of the largest, in [0, 1]; the way (left or right, darker or brighter) is
            drawn.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, num_operations: int = 2, magnitude: float = 0.5) -> None:
        if num_operations < 0:
            raise ConfigError(f"num_operations must be 0 or more; got {num_operations}")
        if not 0 <= magnitude <= 1:
            raise ConfigError(f"magnitude is a part of the largest one, in [0, 1]; got {magnitude}")
        self.num_operations = num_operations
        self.magnitude = magnitude

    def __repr__(self) -> str:
        return f"RandAugment({self.num_operations}, {self.magnitude})"

    def __call__(self, images: Tensor, *, seed: int, places: Tensor | None = None, total: int | None = None) -> Tensor:
        """Augment float images (N, C, H, W) in [0, 1], by default a whole batch; see ``Augment`` for the arguments.

        Raises:
            InputShapeError: See ``whole_batch``.
        """
        places, total = whole_batch(images, places, total)
        generator = torch.Generator().manual_seed(seed % 2**63)
        shape = (total, self.num_operations)
        drawn = torch.randint(len(OPERATIONS), shape, generator=generator)[places]
        ways = torch.randint(2, shape, generator=generator)[places] * 2 - 1
        images = images.clone()
        operations = list(OPERATIONS.values())
        for turn in range(self.num_operations):
            for number in torch.unique(drawn[:, turn]).tolist():
                mine = (drawn[:, turn] == number).nonzero().flatten()
                strength = (self.magnitude * ways[mine, turn]).to(images.device, images.dtype)
                mine = mine.to(images.device)
                done = operations[number](images.index_select(0, mine), strength)
                images.index_copy_(0, mine, done.clamp(0, 1))
        return images


# Each takes images (n, C, H, W) in [0, 1] and strengths (n,) in [-1, 1].


def _identity(images: Tensor, strength: Tensor) -> Tensor:
    return images


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    done: Tensor = equalize(images)
    return done


def _rotate(images: Tensor, strength: Tensor) -> Tensor:
    done: Tensor = rotate(images, 30.0 * strength)
    return done


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    threshold = (1 - strength.abs()).view(-1, 1, 1, 1) * 256 / 255  # above white, so that strength 0 changes nothing
    return torch.where(images < threshold, images, 1 - images)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    done: Tensor = posterize(images, (8 - (4 * strength.abs()).round()).to(torch.int32))
    return done


def _blended(images: Tensor, degenerate: Tensor, strength: Tensor) -> Tensor:
    """Away from a degenerate image (strength below 0: towards it) by at most 0.9 of the difference."""
    return degenerate + (1 + 0.9 * strength).view(-1, 1, 1, 1) * (images - degenerate)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != len(LUMA):
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(LUMA).view(1, -1, 1, 1)).sum(1, keepdim=True)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return _blended(images, _gray(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _blended(images, _gray(images).mean((-2, -1), keepdim=True), strength)


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blended(images, torch.zeros_like(images), strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    blurred: Tensor = sharpness(images, torch.zeros_like(strength))
    return _blended(images, blurred, strength)


def _shear_x(images: Tensor, strength: Tensor) -> Tensor:
    done: Tensor = shear(images, torch.stack([0.3 * strength, torch.zeros_like(strength)], dim=1))
    return done


def _shear_y(images: Tensor, strength: Tensor) -> Tensor:
    done: Tensor = shear(images, torch.stack([torch.zeros_like(strength), 0.3 * strength], dim=1))
    return done


def _translate_x(images: Tensor, strength: Tensor) -> Tensor:
    pixels = 0.3 * images.shape[-1] * strength
    done: Tensor = translate(images, torch.stack([pixels, torch.zeros_like(pixels)], dim=1))
    return done


def _translate_y(images: Tensor, strength: Tensor) -> Tensor:
    pixels = 0.3 * images.shape[-2] * strength
    done: Tensor = translate(images, torch.stack([torch.zeros_like(pixels), pixels], dim=1))
    return done


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _color,
    "posterize": _posterize,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
}
"""The published list of operations."""
