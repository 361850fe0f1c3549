"""All images of a dataset decoded once, to one uint8 tensor that stays in memory.

The decoder is ``cn_hf.reading.images``: every image comes out upright (EXIF orientation applied), in one mode
(grayscale, palette, alpha and 16-bit images are converted) and, where asked, resized.

Shapes: N rows of the dataset, M of them readable, C channels, H and W height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import torch
import torch.utils.data
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.errors import CnHfError, ConfigError, DatasetError, DatasetFileError, nearest
from cn_hf.reading.images import accepts_image_size, check_image_options, iter_decoded, size_mismatch, stack_arrays
from cn_hf.reading.loading import find_image_column
from cn_hf.reading.workers import iterate

__all__ = ["DecodedImages", "OnError", "check_on_error", "decode_images", "image_shape"]

OnError = Literal["raise", "skip"]
"""What to do at an image that cannot be read."""

_ON_ERROR = ("raise", "skip")
# Rows decoded at once.
_CHUNK = 256
# Rows tried in search of an image that can be read.
_SAMPLE = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodedImages:
    """Pixels of a dataset and where they came from.

    Attributes:
        images: (M, C, H, W), uint8, contiguous.
        rows: (M,), int64: the dataset row of each image, ascending.
        num_rows: N.
    """

    images: Tensor
    rows: Tensor
    num_rows: int

    @property
    def skipped(self) -> tuple[int, ...]:
        """Rows that could not be read, ascending."""
        return tuple(sorted(set(range(self.num_rows)).difference(self.rows.tolist())))


@accepts_image_size
def decode_images(
    dataset: Any,
    column: str | None = None,
    *,
    decode_size: int | Sequence[int] | None = None,
    image_mode: str = "RGB",
    on_error: OnError = "raise",
    num_workers: int = 0,
    progress: str | None = None,
) -> DecodedImages:
    """Decode all images of a Dataset.

    Args:
        dataset: A ``datasets.Dataset`` (a stream may have no end: see ``StreamedBatches``).
        column: Its image column; None: the one there is.
        decode_size: One number or (height, width) to resize to; None: as stored, and then all must be of one size.
        image_mode: "RGB" (C = 3) or "L" (C = 1).
        on_error: "raise" at an image that cannot be read, or "skip" it.
        num_workers: Processes that decode; 0: this one.
        progress: Text before a progress bar; None for none.

    Raises:
        DatasetFileError: An image cannot be read (its row is named), or, with "skip", none can; a worker process died.
        DatasetError: There is no image column or no row, or images differ in size and none was given.
        ConfigError: An option is unknown or out of range.
    """
    check_on_error(on_error)
    if num_workers < 0:
        raise ConfigError(f"num_workers must be 0 or more; got {num_workers}")
    num_rows = len(dataset)
    if num_rows == 0:
        raise DatasetError("the dataset has no rows, so there are no images to decode")
    chunks = _Chunks(dataset, column, image_mode, check_image_options(image_mode, decode_size), on_error == "skip")
    images: Tensor | None = None
    kept: list[int] = []
    with tqdm(total=num_rows, desc=progress, unit="image", disable=None if progress else True, leave=False) as bar:
        for chunk in iterate(chunks, num_workers=min(num_workers, len(chunks))):
            if isinstance(chunk, CnHfError):
                raise chunk
            rows, pixels = chunk
            bar.update(min(_CHUNK, num_rows - bar.n))
            if pixels is None:
                continue
            if images is None:
                images = torch.empty((num_rows, *pixels.shape[1:]), dtype=torch.uint8)
            elif pixels.shape[1:] != images.shape[1:]:
                raise size_mismatch(rows[0], _hwc(pixels), kept[0], _hwc(images))
            images[len(kept) : len(kept) + len(rows)] = pixels
            kept += rows
    if images is None:
        raise DatasetFileError(f"none of the {num_rows} images can be read")
    return DecodedImages(images=images[: len(kept)], rows=torch.tensor(kept), num_rows=num_rows)


class _Chunks(torch.utils.data.Dataset["tuple[list[int], Tensor | None] | CnHfError"]):
    """A Dataset's images in chunks: the readable rows and their pixels, None where there is none.

    An error comes back as a value, since one raised in a worker arrives wrapped in its traceback.
    """

    def __init__(
        self, dataset: Any, column: str | None, mode: str, size: tuple[int, int] | None, skip_corrupt: bool
    ) -> None:
        self.dataset = dataset
        self.column = find_image_column(dataset, column)
        self.mode = mode
        self.size = size
        self.skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return -(-len(self.dataset) // _CHUNK)

    def __getitem__(self, number: int) -> tuple[list[int], Tensor | None] | CnHfError:
        try:
            [(rows, arrays)] = iter_decoded(
                self.dataset,
                self.column,
                mode=self.mode,
                size=self.size,
                batch_size=_CHUNK,
                rows=range(number * _CHUNK, min((number + 1) * _CHUNK, len(self.dataset))),
                skip_corrupt=self.skip_corrupt,
            )
            return rows, stack_arrays(arrays, rows) if rows else None
        except CnHfError as error:
            return error


@accepts_image_size
def image_shape(
    dataset: Any,
    column: str | None = None,
    *,
    decode_size: int | Sequence[int] | None = None,
    image_mode: str = "RGB",
) -> tuple[int, int, int]:
    """(C, H, W) of the first image of a Dataset or stream that can be read.

    Raises:
        DatasetFileError: None of the first 256 images can be read.
        DatasetError: There is no image column.
    """
    in_memory = isinstance(dataset, datasets.Dataset)
    sample = dataset.select(range(min(_SAMPLE, len(dataset)))) if in_memory else dataset.take(_SAMPLE)
    decoded = iter_decoded(sample, column, mode=image_mode, size=decode_size, batch_size=1, skip_corrupt=True)
    for _, arrays in decoded:
        if arrays:
            height, width, channels = arrays[0].shape
            return channels, height, width
    raise DatasetFileError(f"none of the first {_SAMPLE} images can be read")


def check_on_error(on_error: str) -> None:
    """Raise ConfigError unless ``on_error`` is "raise" or "skip"."""
    if on_error not in _ON_ERROR:
        raise ConfigError(f"unknown on_error {on_error!r}: {nearest(str(on_error), _ON_ERROR)}")


def _hwc(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return height, width, channels
