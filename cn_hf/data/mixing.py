"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of whole batches on their device, the same for a seed.

Neighbours in the shuffled global batch, at places 2i and 2i + 1, are mixed with each other: with share s of the
partner,

    mixup:  x' = (1 - s) x + s x_partner,                    1 - s ~ Beta(alpha, alpha)
    CutMix: x' = x_partner inside a box, x outside of it;    s = the box's part of the image

and labels and contexts become weights in the same proportion. Numbers are drawn on the CPU for the global batch, so
what happens to an image depends on neither the number of processes nor the device. An image without a partner, such
as the last of an odd number, stays as it is.

Shapes: n images of this process, K pairs of the global batch, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cn_hf.errors import ConfigError
from cn_hf.validation import NotNegative, Share, validated

__all__ = ["MixDraws", "Mixing", "MixingConfig", "draw_mixes"]


@validated
class MixingConfig:
    """The way pairs of training images are mixed; the default is not at all.

    Attributes:
        mixup: Alpha of mixup's Beta distribution; 0 for no mixup. 0.2 to 0.8 are usual.
        cutmix: Alpha of CutMix's; 0 for no CutMix. 1 is usual.
        probability: That a pair is mixed.
        switch_probability: That a mixed pair is mixed by CutMix, where both are on.

    Raises:
        ConfigError: A value is out of range.
    """

    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    probability: Share = 1.0
    switch_probability: Share = 0.5

    @property
    def is_identity(self) -> bool:
        """True if no image is ever mixed."""
        return self.probability == 0 or self.mixup == self.cutmix == 0


class MixDraws(NamedTuple):
    """The random draws for each of K pairs: the partner's pixels get weight ``level`` inside the box, 0 outside.

    ``level`` (K,) float64; ``box`` (K, 4) int64: top, bottom (excluded), left, right (excluded). Mixup's box is the
    whole image, CutMix's level 1.
    """

    level: np.ndarray[tuple[int], np.dtype[np.float64]]
    box: np.ndarray[tuple[int, int], np.dtype[np.int64]]


def draw_mixes(config: MixingConfig, num_pairs: int, height: int, width: int, seed: int) -> MixDraws:
    """Draw for the K pairs of a global batch.

    CutMix's box has the proportions of the image, its centre anywhere in it; what lies beyond the border is cut off.
    """
    random = np.random.default_rng(seed)
    cutmix_rate = config.switch_probability if config.mixup and config.cutmix else float(config.cutmix > 0)
    mixed = random.random(num_pairs) < config.probability
    cut = random.random(num_pairs) < cutmix_rate
    nothing = np.zeros(num_pairs)
    blend = 1 - random.beta(config.mixup, config.mixup, num_pairs) if config.mixup else nothing
    area = 1 - random.beta(config.cutmix, config.cutmix, num_pairs) if config.cutmix else nothing
    level = np.where(cut, 1.0, blend) * mixed
    box = np.empty((num_pairs, 4), dtype=np.int64)
    for column, side in ((0, height), (2, width)):
        length = (side * np.sqrt(area)).astype(np.int64)
        centre = random.integers(0, side, num_pairs)
        box[:, column] = np.where(cut, np.maximum(centre - length // 2, 0), 0)
        box[:, column + 1] = np.where(cut, np.minimum(centre + (length + 1) // 2, side), side)
    return MixDraws(level, box)


class Mixing:
    """Callable made from a config. Holds no state between calls.

    Args:
        config: What to do.
        num_classes: Classes of the labels.
        num_contexts: T; None where the data has no contexts, or brings them as weights.
    """

    def __init__(self, config: MixingConfig, *, num_classes: int, num_contexts: int | None = None) -> None:
        if num_classes < 1 or (num_contexts is not None and num_contexts < 1):
            raise ConfigError(f"mixing needs at least one class and one context; got {num_classes}, {num_contexts}")
        self.config = config
        self.num_classes = num_classes
        self.num_contexts = num_contexts

    def __repr__(self) -> str:
        return f"Mixing({self.config}, num_classes={self.num_classes}, num_contexts={self.num_contexts})"

    def check(self, labels: Tensor, context_ids: Tensor | None) -> None:
        """Check that labels (n,) and hard contexts (n,) are among those that mixing was made for.

        Raises:
            ConfigError: They are not, or there are contexts and ``num_contexts`` was not given.
        """
        _check_range("num_classes", labels, self.num_classes)
        if context_ids is not None and not context_ids.is_floating_point():
            if self.num_contexts is None:
                raise ConfigError("the data has contexts, which mixing turns into weights: give Mixing num_contexts")
            _check_range("num_contexts", context_ids, self.num_contexts)

    def __call__(
        self, images: Tensor, labels: Tensor, context_ids: Tensor | None, *, seed: int, places: Tensor, total: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix this process's part of a global batch.

        Args:
            images: (n, C, H, W), floating point.
            labels: (n,) int64.
            context_ids: (n,) int64, or (n, T) float32 weights, or None.
            seed: Of this global batch.
            places: (n,) int64, on the CPU: place of each image in the global batch, both of a pair or neither.
            total: Images of the global batch.

        Returns:
            Images likewise, labels (n, classes) float32, contexts (n, T) float32 or None.
        """
        height, width = images.shape[-2:]
        # An odd last image has a pair's draw of its own, which goes unused.
        draws = draw_mixes(self.config, (total + 1) // 2, height, width, seed)
        partner = _partners(places, total)
        pair = (places // 2).numpy()
        level = torch.from_numpy(draws.level[pair])
        box = torch.from_numpy(draws.box[pair])
        area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)
        device = images.device
        share = (level * area).to(device, torch.float32, non_blocking=True).unsqueeze(1)
        partner = partner.to(device, non_blocking=True)
        level, box = level.to(device, images.dtype, non_blocking=True), box.to(device, non_blocking=True)
        weight = _weight_map(level, box, height, width)
        mixed_contexts = None
        if context_ids is not None:
            mixed_contexts = _swapped(_as_weights(context_ids, self.num_contexts), partner, share)
        return (
            _swapped(images, partner, weight),
            _swapped(_as_weights(labels, self.num_classes), partner, share),
            mixed_contexts,
        )


def _partners(places: Tensor, total: int) -> Tensor:
    """(n,) int64: which of these images each is mixed with; itself, so no change, where its partner is missing."""
    here = torch.full((total + 1,), -1)
    here[places] = torch.arange(len(places))
    partner = here[places ^ 1]
    return torch.where(partner < 0, torch.arange(len(places)), partner)


def _weight_map(level: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """(n, 1, H, W): the partner's weight at each pixel."""
    rows, columns = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    top, bottom, left, right = box.unsqueeze(2).unbind(1)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return (level.view(-1, 1, 1) * (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1))).unsqueeze(1)


def _swapped(values: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Each value moved towards its partner's; exactly itself at weight 0, exactly the partner's at 1."""
    return torch.lerp(values, values.index_select(0, partner), weight)


def _as_weights(ids: Tensor, count: int | None) -> Tensor:
    """Ids (n,) as one-hot float32 weights (n, count); weights as they are."""
    if ids.is_floating_point():
        return ids
    assert count is not None  # ``check`` has seen to it
    return (ids.unsqueeze(1) == torch.arange(count, device=ids.device)).to(torch.float32)


def _check_range(option: str, ids: Tensor, count: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ConfigError(
            f"mixing was made with {option}={count}, but the data holds {int(ids.min())} to {int(ids.max())}; give "
            f"{option}={int(ids.max()) + 1} or more"
        )
