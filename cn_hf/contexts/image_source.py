"""The base of sources that look at pixels: column, mode and size, and one path for all of them.

Images of a dataset, of a stream, and those given to ``predict`` go through the same conversions and the same function
of uint8 pixels, so that ``predict`` agrees with ``apply``.

Shape legend: ``N`` images, ``C`` channels (3 for RGB, 1 for L), ``H`` ``W`` pixels; ids are int64 ``(N,)``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from cn_hf.contexts.base import RowContextSource, check_column_name, check_number
from cn_hf.errors import ContextSourceError, InputTypeError
from cn_hf.reading.access import Split, warn_of_test_split
from cn_hf.reading.images import (
    Array,
    accepts_image_size,
    check_image_options,
    decode_rows,
    find_image_column,
    images_to_arrays,
    iter_decoded,
    stack_arrays,
    to_array,
    to_image,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ImageContextSource", "PixelChunk", "in_mode", "to_pil"]

_GROUP_BYTES = 2**25


class PixelChunk(NamedTuple):
    """Images of one size: their ``rows``, for messages, and uint8 ``pixels`` ``(N, C, H, W)``."""

    rows: list[int]
    pixels: Tensor


class ImageContextSource(RowContextSource):
    """A source whose contexts are a function of an image's pixels; subclasses define ``_pixel_ids``.

    Args:
        image_column: found by its ``datasets.Image`` feature when None.
        image_mode: ``"RGB"`` or ``"L"``; images are converted to it.
        decode_size: int or (height, width) that images are resized to; None takes them as they are.
        num_workers: threads that decode a ``Dataset``'s images; 0 decodes in this one. Streams decode where they are
            read.
    """

    batch_size: ClassVar[int] = 32  # photographs may take 40 MB each
    one_size: ClassVar[bool] = True
    """True if all images must have one size."""

    @accepts_image_size
    def __init__(
        self,
        *,
        image_column: str | None,
        image_mode: str,
        decode_size: int | Sequence[int] | None,
        num_workers: int,
    ) -> None:
        check_number("num_workers", num_workers, least=0, integer=True)
        check_column_name("image_column", image_column)
        self.image_column = image_column
        self.decode_size = check_image_options(image_mode, decode_size)
        self.image_mode = image_mode
        self.num_workers = num_workers

    def fit_images(self, images: Any) -> Self:
        """As ``fit``, on training images that are decoded already.

        Args:
            images: uint8 tensor ``(N, C, H, W)``, or a list of PIL images.

        Returns:
            The source itself.
        """
        self._fit_chunks(self._given_chunks(images))
        return self

    def predict(self, images: Any) -> Tensor:
        """Contexts of images; the same ids as ``apply`` gives the same images in a dataset.

        Args:
            images: uint8 tensor ``(N, C, H, W)``, or a list of PIL images. Channels and size are converted as in
                ``apply``.

        Returns:
            int64 ids ``(N,)``, on the images' device.

        Raises:
            ContextSourceError: the source is not fitted, or an image has a size it was not fitted for.
            InputTypeError: neither a uint8 tensor nor PIL images.
        """
        self._check_fitted()
        if isinstance(images, Tensor):
            pixels = self._as_pixels(images)
            if len(pixels):
                self._check_size(0, *pixels.shape[2:])
            return self._pixel_ids(pixels)
        arrays = images_to_arrays(images, self.image_mode, self.decode_size)
        return torch.from_numpy(self._array_ids(arrays, range(len(arrays))))

    @abstractmethod
    def _pixel_ids(self, pixels: Tensor) -> Tensor:
        """Ids ``(N,)`` of uint8 ``(N, C, H, W)`` in the source's mode, on the pixels' device."""

    @abstractmethod
    def _fit_chunks(self, chunks: Iterable[PixelChunk]) -> None:
        """Learn from the training images; assigns nothing before all has succeeded."""

    def _fit_split(self, split: Split) -> None:
        warn_of_test_split(split)
        self._fit_chunks(self._split_chunks(split))

    def _split_chunks(
        self, split: Split, rows: list[int] | None = None, keep: Callable[[int], bool] | None = None
    ) -> Iterator[PixelChunk]:
        """Decoded images of a split: all, or of a ``Dataset`` those of ``rows``, that ``keep`` is true of."""
        for places, arrays in self._decoded(split, rows, keep):
            yield from self._by_size(arrays, places)

    def _decoded(
        self, split: Split, rows: list[int] | None = None, keep: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[list[int], list[Array]]]:
        """Rows and arrays of a split, as many at a time as ``_GROUP_BYTES`` hold: few large steps beat many small."""
        group: tuple[list[int], list[Array]] = ([], [])
        held = 0
        batches = iter_decoded(
            split,
            self.image_column,
            mode=self.image_mode,
            size=self.decode_size,
            batch_size=self.batch_size,
            rows=rows,
            keep=keep,
            num_workers=self.num_workers,
            progress=f"{self.__class__.__name__}: decoding",
        )
        for places, arrays in batches:
            group[0].extend(places)
            group[1].extend(arrays)
            held += sum(array.nbytes for array in arrays)
            if held >= _GROUP_BYTES:
                yield group
                group, held = ([], []), 0
        yield group

    def _given_chunks(self, images: Any) -> Iterable[PixelChunk]:
        if isinstance(images, Tensor):
            return [PixelChunk(list(range(len(images))), self._as_pixels(images))]
        arrays = images_to_arrays(images, self.image_mode, self.decode_size)
        return self._by_size(arrays, range(len(arrays)))

    def _by_size(self, arrays: Sequence[Array], rows: Sequence[int]) -> list[PixelChunk]:
        """Arrays stacked: one chunk where all must have one size, else one for each size."""
        if self.one_size:
            return [PixelChunk(list(rows), stack_arrays(arrays, rows))] if arrays else []
        groups: dict[tuple[int, ...], tuple[list[int], list[Array]]] = {}
        for row, array in zip(rows, arrays, strict=True):
            places, members = groups.setdefault(array.shape, ([], []))
            places.append(row)
            members.append(array)
        return [PixelChunk(places, stack_arrays(members, places)) for places, members in groups.values()]

    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        return [find_image_column(features, self.image_column)]

    def _batch_ids(
        self, batch: Mapping[str, list[Any]], rows: list[int], features: Mapping[str, Any]
    ) -> npt.NDArray[np.int64]:
        column = self._columns(features)[0]
        arrays = decode_rows(batch[column], rows, column, mode=self.image_mode, size=self.decode_size)
        return self._array_ids(arrays, rows)

    def _split_ids(
        self, split: datasets.Dataset, features: Mapping[str, Any], columns: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        parts = [self._array_ids(arrays, rows) for rows, arrays in self._decoded(split)]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _array_ids(self, arrays: Sequence[Array], rows: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.empty(len(arrays), dtype=np.int64)
        place = {row: index for index, row in enumerate(rows)}
        for row, array in zip(rows, arrays, strict=True):
            self._check_size(row, *array.shape[:2])
        for chunk in self._by_size(arrays, rows):
            ids[[place[row] for row in chunk.rows]] = self._pixel_ids(chunk.pixels).numpy()
        return ids

    def _check_size(self, row: int, height: int, width: int) -> None:
        """Refuse an image of a size the source cannot take; the default takes any."""

    def _as_pixels(self, images: Tensor) -> Tensor:
        """A caller's tensor in the source's mode and size."""
        pixels = in_mode(images, self.image_mode)
        if self.decode_size is None or tuple(pixels.shape[2:]) == self.decode_size or not len(pixels):
            return pixels
        arrays = [to_array(image, self.image_mode, self.decode_size) for image in to_pil(pixels)]
        return stack_arrays(arrays, range(len(arrays))).to(images.device)


def to_pil(pixels: Tensor) -> Iterator[PIL.Image.Image]:
    """uint8 ``(N, C, H, W)``, C being 1 or 3, as PIL images."""
    for array in pixels.permute(0, 2, 3, 1).cpu().numpy():
        yield to_image(array)


def in_mode(images: Tensor, mode: str) -> Tensor:
    """A caller's tensor converted as Pillow does it: gray repeated, alpha dropped, luma in the same integer weights.

    Args:
        images: uint8 ``(N, C, H, W)``.
        mode: ``"RGB"`` or ``"L"``.

    Returns:
        uint8 ``(N, 3, H, W)`` or ``(N, 1, H, W)``.

    Raises:
        InputTypeError: not uint8.
        ContextSourceError: not four axes, or not 1, 3 or 4 channels.
    """
    if images.dtype != torch.uint8:
        raise InputTypeError(
            f"Expected uint8 pixels (0 to 255), received {images.dtype}. Undo the normalisation first: "
            "((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)."
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        raise ContextSourceError(
            f"Expected images (N, C, H, W) with 1, 3 or 4 channels, received shape {tuple(images.shape)}."
        )
    channels = images.shape[1]
    if mode == "RGB":
        return images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]
    if channels == 1:
        return images
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)[:, None, None]
    luma = (images[:, :3].to(torch.int32) * weights).sum(dim=1, keepdim=True, dtype=torch.int32)
    return ((luma + 0x8000) >> 16).to(torch.uint8)
