"""Batches held in memory: images stay on the device as uint8 and become normalised floats batch by batch.

The order of an epoch depends on the seed and the epoch alone. A batch of ``batch_size`` images is a *global* batch: of
P processes each takes a contiguous part of it, so that the parts in rank order are the batch of a single process. Parts
of a batch that P does not divide, such as the last of an epoch, differ by one image at most (by two where pairs are
mixed), and are empty for some processes where P is larger. Every image is in one part of one batch, so sums over all
processes count it once.

Shapes: N images in all, n of a batch on this process, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from cn_hf.data.augment import Augment
from cn_hf.data.mixing import Mixing
from cn_hf.data.order import balanced_order, epoch_order, process_slice, stream_seed
from cn_hf.errors import ConfigError, DatasetError, InputShapeError, InputTypeError
from cn_hf.reading.fingerprint import tensors_fingerprint

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Batch", "BatchOptions", "Batches", "DeviceBatches", "check_balanceable"]

Batch = dict[str, Tensor]

# Keeps the random numbers of mixing apart from those of the augmentation of the same batch.
MIXING_STREAM = 1


class BatchOptions(TypedDict, total=False):
    """The options of ``Batches``, where they are described, besides ``batch_size``."""

    shuffle: bool
    seed: int
    drop_last: bool
    augment: Augment | None
    mixing: Mixing | None
    balance_contexts: bool
    mean: Sequence[float] | None
    std: Sequence[float] | None
    device: torch.device | str
    num_processes: int
    process_index: int
    dtype: torch.dtype


class Batches(ABC):
    """Re-iterable batches of images; each pass is one epoch.

    A batch is a dict of tensors on ``device``: ``pixel_values`` (n, C, H, W) of ``dtype``, ``labels`` (n,) int64,
    ``index`` (n,) int64, the dataset rows, and, where the data has contexts, ``context_ids``: (n,) int64, or (n, T)
    float32 weights. With ``mixing``, ``labels`` are float32 weights (n, classes), and contexts are weights.

    Args:
        batch_size: Images of a global batch.
        shuffle: Whether each epoch has an order of its own; else the dataset's.
        seed: Of the order and the augmentation.
        drop_last: Leave out the last batch of an epoch where it is smaller.
        augment: Applied to float images in [0, 1]; None for nothing.
        mixing: Applied to pairs of augmented images; None for nothing.
        balance_contexts: Draw every context equally often in an epoch, which still has N images, some of them several
            times. Needs hard contexts and ``shuffle``.
        mean: Of each channel, white being 1, subtracted after augmentation; None for 0.
        std: Of each channel, divided by; None for 1.
        device: Where batches are.
        num_processes: P.
        process_index: Which of them this is.
        dtype: Of ``pixel_values``.

    Raises:
        ConfigError: A value is out of range, ``mean`` and ``std`` differ in length, mixing does not know the labels or
            contexts of the data, or there are no hard contexts to balance.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        augment: Augment | None = None,
        mixing: Mixing | None = None,
        balance_contexts: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        num_processes: int = 1,
        process_index: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
        if not 0 <= process_index < num_processes:
            raise ConfigError(f"process_index must be 0 to num_processes - 1; got {process_index} of {num_processes}")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype of pixel_values must be floating point; got {dtype}")
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more; got {seed}")
        if balance_contexts and not shuffle:
            raise ConfigError("balance_contexts draws images at random, so it needs shuffle=True")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.augment = augment
        self.mixing = mixing
        self.balance_contexts = balance_contexts
        self.mean, self.std = _per_channel(mean, std)
        self._tables: tuple[Tensor, Tensor] | None = None
        self.device = torch.device(device)
        self.num_processes = num_processes
        self.process_index = process_index
        self.dtype = dtype
        self.epoch = 0
        self.start = 0

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Images of the dataset, N."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch from number ``start`` on, this process's part of each."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the data, the same in every process, by which a resumed run tells whether it is still the same.

        Batch size, order, augmentation and normalisation are not in it.
        """

    def __len__(self) -> int:
        """Batches of a whole epoch, the same in every process."""
        return self.num_rows // self.batch_size if self.drop_last else -(-self.num_rows // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Images of a whole epoch over all processes: N, or fewer where the last batch is dropped."""
        return min(len(self) * self.batch_size, self.num_rows)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose order, augmentation and mixing of epoch ``epoch``, counted from 0; until called, it is epoch 0's.

        Args:
            epoch: See above.
            start: Number of the batch that iteration begins at, counted from 0; what comes is what a whole pass gives
                from there on. With the number of batches, nothing comes.

        Raises:
            ConfigError: ``epoch`` is negative, or ``start`` is no batch of an epoch nor their number.
        """
        if epoch < 0:
            raise ConfigError(f"epoch must be 0 or more; got {epoch}")
        # A stream must be read to tell its length.
        if start < 0 or (start > 0 and start > len(self)):
            raise ConfigError(
                f"start is the number of a batch, 0 to {len(self) - 1}, or {len(self)} for none; got {start}: do data "
                "and batch_size differ from those of the run to be resumed?"
            )
        self.epoch, self.start = epoch, start

    def _part_of(self) -> Callable[[int], slice]:
        """Gives this process's part of a global batch of so many images."""
        return partial(
            process_slice,
            num_processes=self.num_processes,
            process_index=self.process_index,
            group=1 if self.mixing is None else 2,
        )

    def _order(self, context_ids: Tensor | None) -> Tensor:
        """Rows (N,) of this epoch, on the CPU; ``context_ids`` are those to balance."""
        if self.balance_contexts:
            assert context_ids is not None  # ``check_balanceable`` has seen to it
            return balanced_order(context_ids.cpu(), self.seed, self.epoch)
        return epoch_order(self.num_rows, self.shuffle, self.seed, self.epoch)

    def _batch(
        self,
        pixels: Tensor,
        labels: Tensor,
        context_ids: Tensor | None,
        rows: Tensor,
        *,
        number: int,
        places: Tensor,
        total: int,
    ) -> Batch:
        """This process's part of a global batch: augmented, mixed and normalised.

        Args:
            pixels: (n, C, H, W), uint8, on the device.
            labels: (n,), on the device.
            context_ids: (n,) or (n, T), on the device, or None.
            rows: (n,), on the device.
            number: Of the global batch in this epoch.
            places: (n,), on the CPU: place of each image in the global batch.
            total: Size of the global batch.
        """
        check_channels(pixels.shape[1], self.mean)
        images = pixels.to(torch.float32).div_(255)
        if self.augment is not None:
            seed = stream_seed(self.seed, self.epoch, number)
            images = self.augment(images, seed=seed, places=places, total=total)
        if self.mixing is not None:
            seed = stream_seed(self.seed, self.epoch, number, MIXING_STREAM)
            images, labels, context_ids = self.mixing(
                images, labels, context_ids, seed=seed, places=places, total=total
            )
        mean, std = self._mean_and_std(images.device)
        batch = {"pixel_values": images.sub(mean).div_(std).to(self.dtype), "labels": labels}
        if context_ids is not None:
            batch["context_ids"] = context_ids
        batch["index"] = rows
        return batch

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) each, made once: to copy them for every batch would make a GPU wait."""
        if self._tables is None or self._tables[0].device != device:
            mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
            self._tables = mean, std
        return self._tables


class DeviceBatches(Batches):
    """Batches of images that are held on the device.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), integers.
        context_ids: (N,) integers, or (N, T) float weights; None where the data has no contexts.
        rows: (N,), the dataset rows of the images; None: 0 to N - 1.
        batch_size: Images of a global batch.
        options: The others of ``Batches``.

    Raises:
        InputTypeError: A tensor has the wrong dtype.
        InputShapeError: A tensor has the wrong shape or length.
        DatasetError: There are no images.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        context_ids: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        batch_size: int,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        rows = torch.arange(len(images)) if rows is None else rows
        _check_tensors(images, labels, context_ids, rows)
        check_channels(images.shape[1], self.mean)
        self.images = images.to(self.device)
        self.labels = labels.to(self.device, torch.int64)
        self.rows = rows.to(self.device, torch.int64)
        self.context_ids = None
        if context_ids is not None:
            kind = torch.float32 if context_ids.is_floating_point() else torch.int64
            self.context_ids = context_ids.to(self.device, kind)
        if self.balance_contexts:
            check_balanceable(context_ids)
        if self.mixing is not None:
            self.mixing.check(labels, context_ids)

    @property
    def num_rows(self) -> int:
        """Images of the dataset, N."""
        return len(self.images)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch from number ``start`` on, this process's part of each."""
        order = self._order(self.context_ids).to(self.device)
        part_of = self._part_of()
        for number in range(self.start, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            part = part_of(len(whole))
            places = torch.arange(part.start, part.stop)
            yield self._chosen(whole[part], number=number, places=places, total=len(whole))

    def _chosen(self, chosen: Tensor, *, number: int, places: Tensor, total: int) -> Batch:
        """``_batch`` of the images at the places ``chosen`` (n,)."""
        chosen = chosen.to(self.device)
        return self._batch(
            self.images.index_select(0, chosen),
            self.labels.index_select(0, chosen),
            None if self.context_ids is None else self.context_ids.index_select(0, chosen),
            self.rows.index_select(0, chosen),
            number=number,
            places=places,
            total=total,
        )

    def fingerprint(self) -> str:
        """Hex digest of all pixels, labels, contexts and rows."""
        return tensors_fingerprint(images=self.images, labels=self.labels, context_ids=self.context_ids, rows=self.rows)


def check_balanceable(context_ids: Tensor | None) -> None:
    """Raise ConfigError unless there are hard contexts (N,)."""
    if context_ids is None:
        raise ConfigError("balance_contexts needs contexts, and the data has none; say where they come from")
    if context_ids.is_floating_point():
        raise ConfigError(
            "balance_contexts needs one context per image, and the data has weights of several; take the heaviest "
            "(argmax) as context_ids, or leave balance_contexts out"
        )


def check_channels(channels: int, mean: Sequence[float]) -> None:
    """Raise ConfigError unless there is one mean per channel, or one for all."""
    if len(mean) not in (1, channels):
        raise ConfigError(
            f"mean and std have {len(mean)} values for images of {channels} channels; give one per channel"
        )


def _per_channel(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = (0.0,) if mean is None else tuple(map(float, mean))
    std = (1.0,) * len(mean) if std is None else tuple(map(float, std))
    if len(mean) != len(std) and len(mean) != 1:
        raise ConfigError(f"mean and std need one value per channel each; got {mean} and {std}")
    if not all(value > 0 for value in std):
        raise ConfigError(f"std must be positive; got {std}")
    return mean * (len(std) // len(mean)), std


def _check_tensors(images: Tensor, labels: Tensor, context_ids: Tensor | None, rows: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise InputTypeError(f"images must be uint8; got {images.dtype}")
    if images.ndim != 4:
        raise InputShapeError(f"images must be (N, C, H, W); got {tuple(images.shape)}")
    if len(images) == 0:
        raise DatasetError("there are no images to make batches of")
    for name, values in (("labels", labels), ("rows", rows)):
        if values.is_floating_point() or values.dtype == torch.bool:
            raise InputTypeError(f"{name} must be integers; got {values.dtype}")
        if values.shape != (len(images),):
            raise InputShapeError(f"{name} must be ({len(images)},), one per image; got {tuple(values.shape)}")
    if context_ids is not None:
        if context_ids.dtype == torch.bool:
            raise InputTypeError("context_ids must be integers, or float weights; got torch.bool")
        expected_ndim = 2 if context_ids.is_floating_point() else 1
        if context_ids.ndim != expected_ndim or len(context_ids) != len(images):
            raise InputShapeError(
                f"context_ids must be integers ({len(images)},) or float weights ({len(images)}, T), one row per "
                f"image; got {context_ids.dtype} {tuple(context_ids.shape)}"
            )
