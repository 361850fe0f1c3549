"""Images of one domain, however they come, as batches that a model takes.

Shape legend: ``N`` images, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from torch import Tensor

from cn_hf.errors import DatasetError, DatasetFileError, InputTypeError
from cn_hf.hub.image_files import read_image
from cn_hf.reading.images import find_image_column, to_image

__all__ = ["Preprocess", "image_files", "model_inputs"]

Preprocess = Callable[[Sequence[PIL.Image.Image]], Tensor]
"""PIL images to a float batch ``(N, C, H, W)``, normalised."""

_BATCH = 64
_PIXELS = "pixel_values"


def model_inputs(images: Any, preprocess: Preprocess, max_images: int, what: str) -> Any:
    """Return what ``calibrate`` takes: tensors as the model takes them, or an iterable of such batches.

    Args:
        images: a float tensor as the model takes it; a uint8 tensor ``(N, C, H, W)``; a folder, a file, or a list of
            PIL images or files; a ``datasets`` data set or column; any iterable of batches.
        preprocess: for what is not normalised yet.
        max_images: so many are read. Of a folder or a data set of known size they lie evenly over it, since files and
            rows are often in the order of their classes.
        what: names the images in errors.

    Raises:
        DatasetError: there is no image.
        DatasetFileError: a folder or file is missing, or an image cannot be read.
        InputTypeError: images of another kind.
    """
    if isinstance(images, Tensor):
        return _normalised(images, preprocess)
    if isinstance(images, (str, Path)):
        files = image_files(Path(images))
        return _prepared(_opened(_evenly(files, max_images)), preprocess)
    if isinstance(images, PIL.Image.Image):
        return _prepared(iter([images]), preprocess)
    if isinstance(images, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise InputTypeError(
            f"Expected one split {what}, received a {type(images).__name__}. Take one of "
            f"{', '.join(map(repr, images))}."
        )
    if isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        return _prepared(_of_dataset(images, max_images), preprocess)
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        return images  # a batch alone or no images: calibrate says which
    if isinstance(images, Sequence) and len(images) and _is_image(images[0]):
        return _prepared(_opened(_evenly(images, max_images)), preprocess)
    return _batches(images, preprocess)


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, in order; or the one file.

    Raises:
        DatasetFileError: there is no such folder or file.
        DatasetError: the folder holds no image.
    """
    if os.path.isfile(folder):  # False for what no file system can hold, too
        return [folder]
    if not os.path.isdir(folder):
        raise DatasetFileError(f"Expected a folder of images or an image file, received {str(folder)!r}: not found.")
    endings = PIL.Image.registered_extensions()
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise DatasetError(f"Expected images below {folder}, received a folder without any.")
    return files


def _evenly(rows: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the rows, evenly spaced."""
    count = min(len(rows), most)
    return [rows[index * len(rows) // count] for index in range(count)]


def _is_image(value: Any) -> bool:
    return isinstance(value, (PIL.Image.Image, str, Path))


def _opened(images: Iterable[Any]) -> Iterator[PIL.Image.Image]:
    for image in images:
        yield image if isinstance(image, PIL.Image.Image) else read_image(Path(image))


def _of_dataset(dataset: Any, max_images: int) -> Iterator[PIL.Image.Image]:
    column = find_image_column(dataset.features or {}, None)
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.select(_evenly(range(len(dataset)), max_images) if len(dataset) else [])
    for row in dataset.select_columns([column]):
        yield row[column]


def _prepared(images: Iterator[PIL.Image.Image], preprocess: Preprocess) -> Iterator[Tensor]:
    while part := list(itertools.islice(images, _BATCH)):
        yield preprocess(part)


def _normalised(images: Tensor, preprocess: Preprocess) -> Tensor:
    if images.dtype != torch.uint8:
        return images
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise InputTypeError(
            f"Expected uint8 images of shape (N, 1 or 3, H, W), received {tuple(images.shape)}. Move the channels to "
            "axis 1, or pass normalised float images."
        )
    parts = [
        preprocess([to_image(image.permute(1, 2, 0).cpu().numpy()) for image in part])
        for part in torch.split(images, _BATCH)
    ]
    return torch.cat(parts) if parts else images.float()


def _batches(images: Iterable[Any], preprocess: Preprocess) -> Iterator[Any]:
    """Batches, or single images of an iterator or of a data set's column."""
    iterator = iter(images)
    first = next(iterator, None)
    if first is None:
        return
    together = itertools.chain([first], iterator)
    if _is_image(first):
        yield from _prepared(_opened(together), preprocess)
        return
    for batch in together:
        if isinstance(batch, Tensor):
            yield _normalised(batch, preprocess)
        elif isinstance(batch, Mapping) and isinstance(batch.get(_PIXELS), Tensor):
            yield {**batch, _PIXELS: _normalised(batch[_PIXELS], preprocess)}
        elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            yield _normalised(batch[0], preprocess)
        else:
            yield batch
