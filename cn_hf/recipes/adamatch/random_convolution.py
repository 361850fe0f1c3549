"""Random convolutions as augmentation: new colours and textures, light on dark or dark on light, while shapes stay.

Xu et al. 2021, "Robust and Generalizable Visual Representation Learning via Random Convolutions".
Which images, and their filters, are drawn on the CPU for the *global* batch from a generator seeded for it alone, as in
``augment.py``.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_hf.data.augment import whole_batch
from cn_hf.errors import ConfigError

__all__ = ["RandomConvolution"]

SIDES = (1, 3, 5, 7)  # of filters, as published
SMALLEST_DEVIATION = 1 / 255


class RandomConvolution:
    """Convolves images with a filter of random size and weights each, and blends the result with the image.

    The call is that of ``cn_hf.data.augment.Augment``. The result has the contrast of the image, as far as it stays in
    [0, 1], and is about mid-gray, so that light may become dark; its share in the blend is uniform in [0, 1].

    Args:
        probability: Of an image to be convolved.

    Raises:
        ConfigError: ``probability`` is not in [0, 1].
    """

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability of a random convolution must be in [0, 1]; got {probability}")
        self.probability = probability

    def __repr__(self) -> str:
        return f"RandomConvolution({self.probability})"

    def __call__(self, images: Tensor, *, seed: int, places: Tensor | None = None, total: int | None = None) -> Tensor:
        """Augment float images (N, C, H, W) in [0, 1], by default a whole batch; see ``Augment`` for the arguments.

        Raises:
            InputShapeError: See ``whole_batch``.
        """
        places, total = whole_batch(images, places, total)
        channels, largest = images.shape[1], SIDES[-1]
        generator = torch.Generator().manual_seed(seed % 2**63)
        chosen = torch.rand(total, generator=generator)[places] < self.probability
        which = torch.randint(len(SIDES), (total,), generator=generator)[places]
        share = torch.rand(total, 1, 1, 1, generator=generator)[places].to(images)
        filters = torch.randn(total, channels, channels, largest, largest, generator=generator)[places].to(images)
        images = images.clone()
        for number, side in enumerate(SIDES):
            mine = (chosen & (which == number)).nonzero().flatten().to(images.device)
            if len(mine):
                of_side = filters[mine, :, :, :side, :side]
                images[mine] = _blended(images[mine], of_side, share[mine])
        return images


def _blended(images: Tensor, filters: Tensor, share: Tensor) -> Tensor:
    """Images (n, C, H, W) with their convolutions by filters (n, C, C, k, k) of odd k; share (n, 1, 1, 1)."""
    count, channels, side = len(images), images.shape[1], filters.shape[-1]
    deviations = images - images.mean((1, 2, 3), keepdim=True)
    padded = F.pad(deviations, (side // 2,) * 4, mode="replicate")
    parts = padded.reshape(1, count * channels, *padded.shape[-2:])
    convolved = F.conv2d(parts, filters.flatten(0, 1), groups=count).view_as(images)
    contrast = deviations.square().mean((1, 2, 3), keepdim=True).sqrt()
    drawn = convolved.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(SMALLEST_DEVIATION)
    return (0.5 + share * convolved * (contrast / drawn) + (1 - share) * deviations).clamp(0, 1)
