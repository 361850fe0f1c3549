"""Decoded images of a dataset: the one place where image bytes become uint8 pixels, with every failure naming its row.

Decoding follows ``datasets.Image`` (bytes, local paths and Hub paths; EXIF orientation applied), then converts to one
mode and, if asked, one size. It runs in this thread, or in ``num_workers`` others: Pillow decodes JPEG and PNG, though
not WebP, outside of the interpreter's lock, and a thread cannot be killed alone and leave the rest waiting.

Shape legend: ``N`` images, ``C`` channels (3 for RGB, 1 for L), ``H`` ``W`` pixels. Arrays are HWC, tensors NCHW.
"""

from __future__ import annotations

import functools
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.errors import ConfigError, ContextSourceError, DatasetError, DatasetFileError, InputTypeError, nearest
from cn_hf.reading.access import Split, check_columns, features_of, raw_batches

__all__ = [
    "DECODE_ERRORS",
    "Array",
    "DecodedBatch",
    "accepts_image_size",
    "check_image_options",
    "decode_image",
    "decode_rows",
    "find_image_column",
    "images_to_arrays",
    "iter_decoded",
    "open_image",
    "size_mismatch",
    "stack_arrays",
    "to_array",
    "to_image",
    "unreadable",
]

Array = npt.NDArray[np.uint8]

CHANNELS = {"RGB": 3, "L": 1}

# What Pillow's plugins raise on broken data; each is turned into a DatasetFileError that names the row.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)


class DecodedBatch(NamedTuple):
    """Rows of a dataset, decoded: ``rows`` are their places in it, ``arrays`` uint8 ``(H, W, C)`` of any size each."""

    rows: list[int]
    arrays: list[Array]


P = ParamSpec("P")
R = TypeVar("R")


def accepts_image_size(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``image_size`` stand for ``decode_size``, whose name it was, with a DeprecationWarning.

    Raises:
        ConfigError: When both are given.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "image_size" in kwargs:
            if "decode_size" in kwargs:
                raise ConfigError("image_size is the former name of decode_size. Give decode_size alone.")
            warnings.warn(
                "image_size is called decode_size here, since it is the size that images are decoded to. Rename it.",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs["decode_size"] = kwargs.pop("image_size")
        return function(*args, **kwargs)

    return call


def check_image_options(mode: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Validate a mode and a size; the size as (height, width), or None to leave sizes alone.

    Raises:
        ConfigError: the mode is neither RGB nor L, or the size is not one or two positive integers.
    """
    if mode not in CHANNELS:
        raise ConfigError(f"Unknown image_mode {mode!r}; {nearest(str(mode), CHANNELS)}")
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        raise ConfigError(f"decode_size is {size!r}; expected a positive integer, (height, width), or None.")
    return int(pair[0]), int(pair[1])


def find_image_column(features: Mapping[str, Any], image_column: str | None = None) -> str:
    """The dataset's image column: the one named, or the only one of type ``datasets.Image``.

    Raises:
        DatasetError: no such column, it holds no images, or there are several and none was named.
    """
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is not None:
        check_columns(features, [image_column])
        if image_column not in images:
            raise DatasetError(
                f"Column {image_column!r} is {features[image_column]}, not datasets.Image(). Cast it: "
                f"dataset.cast_column({image_column!r}, datasets.Image())."
            )
        return image_column
    if len(images) != 1:
        found = f"several image columns: {images}" if images else f"no image column among {list(features)}"
        raise DatasetError(f"The dataset has {found}. Name the one meant: image_column=...")
    return images[0]


def to_array(image: PIL.Image.Image, mode: str = "RGB", size: tuple[int, int] | None = None) -> Array:
    """Pixels of a PIL image in one mode (gray to RGB by repetition) and size (bicubic, antialiased).

    Args:
        image: upright, any mode Pillow converts; 16-bit grayscale is scaled to 8 bits.
        mode: ``"RGB"`` or ``"L"``.
        size: (height, width), whatever the image's proportions, or None for its own.

    Returns:
        uint8 ``(H, W, C)``.

    Raises:
        ValueError: the image's mode has no 8-bit meaning (``"F"``, or ``"I"`` beyond 16 bits).
    """
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)  # Pillow itself would cut 16-bit values off at 255
        if wide.size and (wide.min() < 0 or wide.max() > 0xFFFF):
            raise ValueError(f"mode {image.mode!r} with values beyond 16 bits has no 8-bit meaning")
        image = PIL.Image.fromarray(
            (wide if image.mode == "I" and wide.max(initial=0) <= 255 else wide // 257).astype(np.uint8)
        )
    elif image.mode == "F":
        raise ValueError("mode 'F' (float pixels) has no 8-bit meaning")
    if image.mode != mode:
        image = image.convert(mode)
    array = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, CHANNELS[mode])
    return array if size is None or array.shape[:2] == size else _resized(array, size)


def _resized(array: Array, size: tuple[int, int]) -> Array:
    """Resize as Pillow's bicubic does, but for roundings; torch's takes a quarter of its time.

    What shrinks does so first, lest the overshoot of what grows be cut off and then averaged.
    """
    pixels = torch.from_numpy(array.copy())[None].permute(0, 3, 1, 2)  # torch warns of arrays it may not write to
    for sides in ((min(array.shape[0], size[0]), min(array.shape[1], size[1])), size):
        if pixels.shape[2:] != sides:
            pixels = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def to_image(array: Array) -> PIL.Image.Image:
    """uint8 ``(H, W, C)``, C being 1 or 3, as a PIL image."""
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


def decode_image(value: object, mode: str = "RGB", size: tuple[int, int] | None = None) -> Array:
    """One value of an image column (``{"bytes", "path"}`` or a PIL image) as uint8 ``(H, W, C)``.

    Raises:
        DatasetFileError: the value is missing or cannot be decoded; the message does not know the row.
    """
    if value is None:
        raise DatasetFileError("the value is None (no image)")
    try:
        return to_array(datasets.Image().decode_example(value), mode, size)
    except DECODE_ERRORS as error:
        raise DatasetFileError(f"{type(error).__name__}: {error}") from error


def open_image(value: object, row: int, column: str, mode: str | None) -> PIL.Image.Image:
    """One value of an image column as an upright PIL image in its own mode, or ``mode``.

    Raises:
        DatasetFileError: it cannot be decoded; names column and row.
    """
    try:
        image: PIL.Image.Image = datasets.Image(mode=mode).decode_example(value)
    except DECODE_ERRORS as error:
        raise unreadable(row, column, f"{type(error).__name__}: {error}") from error
    return image


def unreadable(row: int, column: str, reason: str) -> DatasetFileError:
    """The error for an image that cannot be decoded."""
    return DatasetFileError(
        f"Image {row} of column {column!r} cannot be read ({reason}). Repair it, or leave such rows out: "
        "cn_hf.contexts.drop_corrupt_images(dataset)."
    )


def _decode_batch(values: Sequence[object], mode: str, size: tuple[int, int] | None) -> list[Array | str]:
    """Arrays, or the reason why there is none."""
    decoded: list[Array | str] = []
    for value in values:
        try:
            decoded.append(decode_image(value, mode, size))
        except DatasetFileError as error:
            decoded.append(str(error))
    return decoded


def decode_rows(
    values: Sequence[object], rows: Sequence[int], column: str, *, mode: str, size: tuple[int, int] | None
) -> list[Array]:
    """Decode the values of ``column`` at ``rows``.

    Raises:
        DatasetFileError: one of them cannot be decoded; names column and row.
    """
    return _checked(_decode_batch(values, mode, size), rows, column, skip_corrupt=False).arrays


def _checked(decoded: list[Array | str], rows: Sequence[int], column: str, *, skip_corrupt: bool) -> DecodedBatch:
    good = DecodedBatch([], [])
    for row, item in zip(rows, decoded, strict=True):
        if not isinstance(item, str):
            good.rows.append(row)
            good.arrays.append(item)
        elif not skip_corrupt:
            raise unreadable(row, column, item)
    return good


def iter_decoded(
    split: Split,
    image_column: str | None = None,
    *,
    mode: str = "RGB",
    size: int | Sequence[int] | None = None,
    batch_size: int = 256,
    rows: Sequence[int] | None = None,
    keep: Callable[[int], bool] | None = None,
    num_workers: int = 0,
    skip_corrupt: bool = False,
    progress: str | None = None,
) -> Iterator[DecodedBatch]:
    """Decode one split in order, batch by batch, in bounded memory.

    Args:
        split: a ``Dataset`` or ``IterableDataset``.
        image_column: found by its feature when None.
        mode: ``"RGB"`` or ``"L"``.
        size: int or (height, width) to resize to; None keeps every image's own.
        batch_size: rows read at once.
        rows: of a ``Dataset``, only these, in this order; None for all.
        keep: true of each row to decode; asked once of each, in order, as it is read.
        num_workers: threads that decode; 0 decodes in this one.
        skip_corrupt: leave out rows that cannot be decoded instead of raising; a gap in ``rows`` tells.
        progress: text before a progress bar; None shows none.

    Yields:
        The rows of each batch and their arrays; batches where nothing could be decoded are empty.

    Raises:
        DatasetError: no image column.
        DatasetFileError: an image cannot be decoded; names its row.
    """
    size = check_image_options(mode, size)
    column = find_image_column(features_of(split), image_column)
    batches = raw_batches(split, [column], batch_size, rows)
    if keep is not None:
        batches = _kept(batches, column, keep)
    known = rows if rows is not None else split if isinstance(split, datasets.Dataset) else None
    total = None if known is None else len(known)
    with tqdm(total=total, desc=progress, unit="image", disable=None if progress else True, leave=False) as bar:
        for places, decoded in _decode_in_order(batches, column, mode, size, num_workers):
            yield _checked(decoded, places, column, skip_corrupt=skip_corrupt)
            bar.update(len(places))


def _kept(
    batches: Iterable[tuple[list[int], dict[str, list[Any]]]], column: str, keep: Callable[[int], bool]
) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
    for rows, batch in batches:
        places = [place for place, row in enumerate(rows) if keep(row)]
        yield [rows[place] for place in places], {column: [batch[column][place] for place in places]}


def _decode_in_order(
    batches: Iterable[tuple[list[int], dict[str, list[Any]]]],
    column: str,
    mode: str,
    size: tuple[int, int] | None,
    num_workers: int,
) -> Iterator[tuple[list[int], list[Array | str]]]:
    if num_workers == 0:
        for rows, batch in batches:
            yield rows, _decode_batch(batch[column], mode, size)
        return
    pool = ThreadPoolExecutor(num_workers)
    pending: deque[tuple[list[int], Future[list[Array | str]]]] = deque()
    try:
        for rows, batch in batches:
            pending.append((rows, pool.submit(_decode_batch, batch[column], mode, size)))
            if len(pending) > 2 * num_workers:  # bounded, so that a stream is not read ahead into memory
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def stack_arrays(arrays: Sequence[Array], rows: Sequence[int]) -> Tensor:
    """Arrays of one size as a tensor.

    Args:
        arrays: uint8 ``(H, W, C)`` each.
        rows: their places, for the message.

    Returns:
        uint8 ``(N, C, H, W)``, contiguous.

    Raises:
        DatasetError: two differ in size; names the first that differs.
    """
    for row, array in zip(rows, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise size_mismatch(row, array.shape, rows[0], arrays[0].shape)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def size_mismatch(row: int, shape: Sequence[int], first_row: int, first_shape: Sequence[int]) -> DatasetError:
    """The error for images of differing sizes (shapes HWC) where one size is needed."""
    return DatasetError(
        f"Image {row} is {shape[0]}x{shape[1]}, image {first_row} is {first_shape[0]}x{first_shape[1]} "
        "(height x width). One size is needed here: give decode_size=(height, width) to resize all "
        "(decode_size in a training config)."
    )


def images_to_arrays(images: object, mode: str, size: tuple[int, int] | None) -> list[Array]:
    """PIL images given by a caller, or one of them, as uint8 ``(H, W, C)`` arrays.

    Raises:
        InputTypeError: something else was given.
        ContextSourceError: an image cannot be converted; names its place.
    """
    if isinstance(images, PIL.Image.Image):
        images = [images]
    if not isinstance(images, Sequence):
        raise InputTypeError(
            f"Expected a uint8 tensor (N, C, H, W) or a list of PIL images, received {type(images).__name__}."
        )
    arrays = []
    for index, image in enumerate(images):
        if not isinstance(image, PIL.Image.Image):
            raise InputTypeError(f"Image {index} is {type(image).__name__}; expected PIL images, or one uint8 tensor.")
        try:
            arrays.append(to_array(PIL.ImageOps.exif_transpose(image), mode, size))
        except DECODE_ERRORS as error:
            raise ContextSourceError(f"Image {index} cannot be used ({type(error).__name__}: {error}).") from error
    return arrays
