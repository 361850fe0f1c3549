"""Image files that a command was given: which ones they are, and one at a time opened, within bounds of size."""

from __future__ import annotations

import glob
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import PIL.Image

from cn_hf.errors import ConfigError, DatasetFileError, nearest
from cn_hf.printing import for_terminal
from cn_hf.reading.images import DECODE_ERRORS

__all__ = ["MAX_PIXELS", "check_still_image", "find_images", "read_image"]

MAX_PIXELS = 100_000_000


def find_images(given: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths name, in their order.

    Args:
        given: files; folders, whose images are found at any depth, hidden ones apart; patterns such as
            ``"photos/**/*.jpg"``; ``"@FILE"``, a list of files or folders, one a line, or separated by NUL where names
            may hold newlines; ``"@-"`` for one on standard input.

    Raises:
        ConfigError: nothing was given, or a folder, pattern or list holds no image.
        DatasetFileError: a list cannot be read.
    """
    found: list[Path] = []
    for value in [os.fspath(path) for path in given]:
        if value.startswith("@") and not os.path.lexists(value):
            entries = [entry for name in _listed(value[1:]) for entry in _expanded(name)]
        elif glob.has_magic(value) and not os.path.lexists(value):
            matches = {os.path.realpath(name): name for name in sorted(glob.glob(value, recursive=True), reverse=True)}
            entries = [entry for name in sorted(matches.values()) for entry in _expanded(name)]  # links may lead up
        else:
            entries = _expanded(value)
        if not entries:
            raise ConfigError(f"Expected image files, {value!r} holds none. Name files, folders, patterns or @LIST.")
        found += entries
    if not found:
        raise ConfigError("Expected image files, received none. Name files, folders, patterns or @LIST.")
    return found


def _listed(name: str) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError) as error:
        raise DatasetFileError(f"The list {name!r} cannot be read: {error}") from error
    parts = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(part) for part in parts if part.strip()]


def _expanded(name: str) -> list[Path]:
    """The file itself, also one that is not there; or the images of a folder, each folder entered once."""
    if "\0" in name or not os.path.isdir(name):
        return [Path(name)]
    endings, entered, found = PIL.Image.registered_extensions(), set[str](), []
    for folder, subfolders, files in os.walk(name, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads up
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(entry for entry in subfolders if not entry.startswith("."))
        visible = (file for file in sorted(files) if not file.startswith("."))
        found += [Path(folder, file) for file in visible if os.path.splitext(file)[1].lower() in endings]
    return found


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Return the image in a file, decoded, with its EXIF data.

    Raises:
        DatasetFileError: it is missing, no image, damaged, or has more than ``max_pixels`` pixels.
    """
    with _opened(path, max_pixels) as image:
        image.load()
        image.getexif()  # of some formats it needs the open file
        return image


@contextmanager
def _opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[PIL.Image.Image]:
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        if not path.is_file():  # a pipe would be waited for
            raise _no_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # it is an error below
            opened = PIL.Image.open(path)
        with opened as image:
            if image.width * image.height > max_pixels:
                raise _too_large(path, f"{image.width} x {image.height} pixels", max_pixels)
            yield image
    except PIL.Image.DecompressionBombError as error:
        raise _too_large(path, "far more pixels than that", max_pixels) from error
    except DatasetFileError:
        raise
    except DECODE_ERRORS as error:
        raise DatasetFileError(f"{for_terminal(path)} cannot be read as an image: {error}") from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def check_still_image(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Check by its header that a file is an image of one frame, and not too large.

    Raises:
        DatasetFileError: as ``read_image``, or it has several frames.
    """
    with _opened(path, max_pixels) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # of which phones write one photograph and previews of it
            shown = for_terminal(path)
            raise DatasetFileError(f"{shown} holds {frames} frames; take them apart first, or give a still image")


def _too_large(path: Path, found: str, max_pixels: int) -> DatasetFileError:
    return DatasetFileError(
        f"Expected at most {max_pixels / 1e6:,.0f} megapixels, {for_terminal(path)} has {found}. Make it smaller, or "
        "raise --max-pixels."
    )


def _no_file(path: Path) -> DatasetFileError:
    shown, beside = for_terminal(path), list[str]()
    try:
        if path.is_dir():
            return DatasetFileError(f"{shown} is a folder; name its images, e.g. {shown}/*.jpg")
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError):  # a name with NUL, or a folder that may not be read
        pass
    return DatasetFileError(f"no file {shown}" + (f"; {nearest(path.name, beside)}" if 0 < len(beside) <= 50 else ""))
