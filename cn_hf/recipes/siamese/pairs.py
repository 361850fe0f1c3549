"""Batches of image pairs, each labelled as showing the same object or different ones (Hadsell et al. 2006).

Every image is the first of one pair an epoch. Pairs take turns: the second image shows the same object, the second
image shows another one; so half of every batch is of either kind. Where nothing tells objects apart, an image's partner
of the same kind is itself under another augmentation.

Which images make a pair depends on seed and epoch alone, and a batch of ``batch_size`` pairs is divided over processes
as images are (``Batches``).

Shapes: N images in all, n pairs of a batch on this process, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cn_hf.data.batches import Batch, DeviceBatches
from cn_hf.data.order import epoch_order, stream_seed
from cn_hf.errors import ConfigError, DatasetError

__all__ = ["PairBatches", "Pairs", "draw_pairs"]

# Keeps the random numbers of drawing partners apart from those of the order of the same epoch.
PARTNER_STREAM = 2


class Pairs(NamedTuple):
    """Pairs of images: places of the first and the second ones, and whether they show different objects, (N,) each."""

    first: Tensor
    second: Tensor
    different: Tensor


def draw_pairs(identities: Tensor, *, seed: int, epoch: int, views: bool = False) -> Pairs:
    """The N pairs of an epoch.

    Args:
        identities: (N,) int64, on the CPU.
        seed: Of the draw.
        epoch: Likewise.
        views: The partner of the same identity is the image itself.

    Returns:
        Pairs in the order of the epoch, every image being the first of one. An image that is the only one of its
        identity always gets a partner of another, unless ``views``.

    Raises:
        DatasetError: All images are of one identity.
    """
    count = len(identities)
    _, label, sizes = torch.unique(identities, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DatasetError(f"pairs of different objects need images of two at least; all {count} images are of one")
    # Sorted by identity, the images of one are neighbours: a partner is a step within them, or a step beyond them.
    by_identity = label.argsort(stable=True)
    place = torch.empty_like(by_identity)
    place[by_identity] = torch.arange(count)
    size = sizes[label]
    start = (sizes.cumsum(0) - sizes)[label]
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch, PARTNER_STREAM))
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    first = epoch_order(count, True, seed, epoch)
    place, size, start = place[first], size[first], start[first]
    within = torch.zeros_like(place) if views else 1 + (chance * (size - 1)).long()
    same = start + (place - start + within) % size
    other = (start + size + (chance * (count - size)).long()) % count
    different = torch.arange(count) % 2 == 1
    if not views:
        different |= size == 1
    return Pairs(first, by_identity[torch.where(different, other, same)], different)


class PairBatches(DeviceBatches):
    """Batches of pairs of the images that ``DeviceBatches`` holds, whose labels are identities.

    A batch is a dict of tensors on the device: ``pixel_values`` (n, C, H, W), ``context_ids`` (n,) or (n, T) and
    ``index`` (n,) of the first images, the same with the prefix ``other_`` of the second ones, and ``labels`` (n,)
    int64: 0 where both show the same object, 1 where they do not.

    Args:
        images: The images, their identities as labels, their augmentation and the rest; not changed.
        batch_size: Pairs of a global batch; None: as many as ``images`` has images.
        views: See ``draw_pairs``.

    Raises:
        ConfigError: ``views`` without augmentation: both views would be the same, and any network right.
        DatasetError: All images are of one identity.
    """

    def __init__(self, images: DeviceBatches, *, batch_size: int | None = None, views: bool = False) -> None:
        if views and images.augment is None:
            raise ConfigError("two views of an image need augmentation to differ; give some, e.g. flip, zoom, rotation")
        super().__init__(
            images.images,
            images.labels,
            images.context_ids,
            rows=images.rows,
            batch_size=images.batch_size if batch_size is None else batch_size,
            shuffle=True,
            seed=images.seed,
            drop_last=images.drop_last,
            augment=images.augment,
            mean=images.mean,
            std=images.std,
            device=images.device,
            num_processes=images.num_processes,
            process_index=images.process_index,
            dtype=images.dtype,
        )
        self.views = views
        self._identities = self.labels.cpu()
        draw_pairs(self._identities, seed=self.seed, epoch=0, views=views)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch from number ``start`` on, this process's part of each."""
        pairs = draw_pairs(self._identities, seed=self.seed, epoch=self.epoch, views=self.views)
        part_of = self._part_of()
        for number in range(self.start, len(self)):
            chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
            first, second, different = (values[chosen] for values in pairs)
            part = part_of(len(first))
            places = torch.arange(part.start, part.stop)
            # Of the 2 n images of a batch, pair i has numbers i and i + n.
            total = 2 * len(first)
            batch = self._chosen(first[part], number=number, places=places, total=total)
            other = self._chosen(second[part], number=number, places=places + len(first), total=total)
            batch["labels"] = different[part].long().to(self.device)
            yield batch | {f"other_{name}": value for name, value in other.items() if name != "labels"}
