"""Per-channel mean and standard deviation of images, for normalising a network's input.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cn_hf.errors import InputShapeError, InputTypeError

__all__ = ["ChannelSums", "channel_statistics"]

# Images whose integer sums are taken at once; bounds the int64 copy.
CHUNK = 1024


class ChannelSums:
    """Sums over images seen part by part, kept as integers, so that the parts do not change the result."""

    def __init__(self) -> None:
        self.count = 0
        self.total: list[int] = []
        self.squares: list[int] = []

    def update(self, images: Tensor) -> None:
        """Add uint8 images (N, C, H, W).

        Raises:
            InputTypeError: ``images`` is not uint8.
            InputShapeError: ``images`` is not (N, C, H, W), or has other channels than those before.
        """
        if images.dtype != torch.uint8:
            raise InputTypeError(f"images must be uint8; got {images.dtype}")
        if images.ndim != 4 or len(self.total) not in (0, images.shape[1]):
            raise InputShapeError(
                f"images must be (N, {len(self.total) or 'C'}, H, W); got shape {tuple(images.shape)}"
            )
        total = torch.zeros(images.shape[1], dtype=torch.int64, device=images.device)
        squares = torch.zeros_like(total)
        for start in range(0, len(images), CHUNK):
            values = images[start : start + CHUNK].to(torch.int32)
            total += values.sum((0, 2, 3), dtype=torch.int64)
            squares += (values * values).sum((0, 2, 3), dtype=torch.int64)
        self.count += images.shape[0] * images.shape[2] * images.shape[3]
        self.total = [a + b for a, b in zip(self.total or [0] * len(total), total.tolist(), strict=True)]
        self.squares = [a + b for a, b in zip(self.squares or [0] * len(total), squares.tolist(), strict=True)]

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation; see ``channel_statistics``.

        Raises:
            InputShapeError: No pixel has been seen.
        """
        if self.count == 0:
            raise InputShapeError("mean and standard deviation need at least one pixel; the images are empty")
        mean = tuple(total / self.count / 255 for total in self.total)
        # In Python's integers this difference is exact, so nearly constant channels keep their variance.
        variance = [self.count * q - s * s for q, s in zip(self.squares, self.total, strict=True)]
        return mean, tuple(math.sqrt(value) / self.count / 255 if value else 1.0 for value in variance)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel over all pixels, on the scale where white is 1.

    Args:
        images: (N, C, H, W), uint8, on any device; of the training split only.

    Returns:
        (mean, std), C floats each; std is the population's (divided by the count), and 1 for a constant channel.

    Raises:
        InputTypeError: ``images`` is not uint8.
        InputShapeError: ``images`` is not (N, C, H, W), or is empty.
    """
    sums = ChannelSums()
    sums.update(images)
    return sums.mean_and_std()
