"""Images between two others, as a digit stands in a number: what a crop around one of several objects shows.

Neighbours and places are drawn on the CPU for the *global* batch from a generator seeded for it alone, as in
``augment.py``.

Shapes: N images, C channels, H and W height and width; M images to draw neighbours from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_hf.data.augment import whole_batch
from cn_hf.errors import ConfigError, InputShapeError

__all__ = ["Neighbours"]

NARROWEST = 2.0  # an image keeps at least half of its width
LARGEST_SHIFT = 0.1  # of the width


class Neighbours:
    """Puts images between two others of a pool and shows the middle of the row, each image narrower than before.

    The call is that of ``cn_hf.data.augment.Augment``. How narrow is drawn uniformly, from unchanged to half the width,
    and so is a shift by a tenth of the width to either side.

    Args:
        pool: (M, C, H, W), uint8, or float in [0, 1], on the device of the images to come.
        probability: Of an image to get neighbours.

    Raises:
        ConfigError: ``probability`` is not in [0, 1].
        InputShapeError: ``pool`` is not (M, C, H, W), or empty.
    """

    def __init__(self, pool: Tensor, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability of neighbours must be in [0, 1]; got {probability}")
        if pool.ndim != 4 or len(pool) == 0:
            raise InputShapeError(f"the pool must be (M, C, H, W) with M of 1 or more; got {tuple(pool.shape)}")
        self.pool, self.probability = pool, probability

    def __repr__(self) -> str:
        return f"Neighbours({len(self.pool)} images, {self.probability})"

    def __call__(self, images: Tensor, *, seed: int, places: Tensor | None = None, total: int | None = None) -> Tensor:
        """Augment float images (N, C, H, W) in [0, 1], by default a whole batch; see ``Augment`` for the arguments.

        Raises:
            InputShapeError: ``images`` are not of the pool's shape; or see ``whole_batch``.
        """
        if images.shape[1:] != self.pool.shape[1:]:
            raise InputShapeError(f"images must be (N, {tuple(self.pool.shape[1:])}); got {tuple(images.shape)}")
        places, total = whole_batch(images, places, total)
        generator = torch.Generator().manual_seed(seed % 2**63)
        chosen = torch.rand(total, generator=generator)[places] < self.probability
        drawn = torch.randint(len(self.pool), (total, 2), generator=generator)[places]
        extent = 1 + (NARROWEST - 1) * torch.rand(total, generator=generator)[places]
        shift = LARGEST_SHIFT * (2 * torch.rand(total, generator=generator)[places] - 1)
        mine = chosen.nonzero().flatten()
        images, at = images.clone(), mine.to(images.device)
        beside = self.pool[drawn[mine].to(images.device)].to(images.dtype)
        left, right = (beside if self.pool.is_floating_point() else beside / 255).unbind(dim=1)
        row = torch.cat([left, images[at], right], dim=3)
        images[at] = _middle(row, extent[mine].to(images), shift[mine].to(images))
        return images


def _middle(row: Tensor, extent: Tensor, shift: Tensor) -> Tensor:
    """Of rows of three images (n, C, H, 3W), what is around the second: (n, C, H, W).

    Args:
        row: The three side by side.
        extent: (n,), of what is shown, in W.
        shift: (n,), of its centre, in W.
    """
    height, width = row.shape[2], row.shape[3] // 3
    # Pixel centres in [-1, 1], where the whole row is 3 W wide.
    x = (torch.arange(width, device=row.device, dtype=row.dtype) + 0.5) / width - 0.5
    x = 2 * (extent[:, None] * x + shift[:, None]) / 3
    y = (2 * torch.arange(height, device=row.device, dtype=row.dtype) + 1) / height - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[None, :, None].expand(len(row), -1, width)], dim=-1)
    return F.grid_sample(row, grid, mode="bilinear", padding_mode="border", align_corners=False)
