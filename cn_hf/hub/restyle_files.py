"""Image files restyled by a saved model: what ``cn-hf restyle`` does.

Every output appears whole or not at all, in the format of its own name, with the input's orientation (EXIF) and alpha.
All names are checked before the first file is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from tqdm import tqdm

from cn_hf.errors import CheckpointError, CnHfError, ConfigError, DatasetFileError, InputTypeError, nearest
from cn_hf.files import written_whole
from cn_hf.hub.checkpoint import from_pretrained
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.restyle import input_norm, restyle
from cn_hf.patching.routing import router_of

__all__ = ["restyle_files"]

# Files that are held in memory at once.
_CHUNK = 16
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "PNG": {},
    "TIFF": {},
    "AVIF": {"quality": 95},
}
"""Formats that keep the orientation, and how they are written."""
_WITHOUT_ALPHA = ("JPEG", "BMP", "PPM")
_READ_ERRORS = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


def restyle_files(
    images: Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    source: str | None = None,
    target: str = "night",
    slot: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Restyle image files and write the results.

    Args:
        images: Files of any size that Pillow reads.
        model: Folder or Hub id of a model with CN-Channels on its input.
        output: A folder, made if need be, which gets the files under their own names; or, for one image, a file name
            with the ending of an image format.
        source: Context the images are of. None: the model's context source tells, or, where it has none and there are
            only two contexts, the other one than ``target``.
        target: Context they are to look like.
        slot: See ``cn_hf.restyle``.
        device: Where pixels are worked on; None: a GPU if there is one.
        overwrite: Replace files that are there.
        progress: Show a progress bar on a terminal.

    Returns:
        The files written, in the order of ``images``.

    Raises:
        ConfigError: There is no image, two would get one name, or a name has no ending Pillow can write.
        DatasetFileError: An image is missing or cannot be read; names it.
        CheckpointError: The model cannot be read, or a file cannot be written or is there already.
        ContextIdError: A context is unknown, or nothing tells which one the images are of.
        PatchError: The model has no CN-Channels on its input.
    """
    paths = [Path(image) for image in images]
    outputs = _output_paths(paths, Path(output), overwrite)
    for path in paths:
        _check_readable(path)
    loaded = from_pretrained(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    input_norm(loaded, slot)
    router = router_of(loaded)
    names = router.config.context_names or tuple(map(str, range(router.config.num_contexts)))
    ids = {name: _context(name, router.config.context_names) for name in (source, target) if name is not None}
    for context in ids.values():  # an unknown name is refused before anything is read
        router.resolve(context, 1, torch.device("cpu"))
    known = None if source is None else ids[source]
    if known is None and not getattr(router.source, "can_predict", False) and len(names) == 2:
        known = 1 - int(router.resolve(ids[target], 1, torch.device("cpu")))
    with tqdm(total=len(paths), unit="image", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(paths), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(paths)))
            pictures = [_read(paths[place]) for place in chunk]
            for place, picture in zip(
                chunk, _restyled(loaded, pictures, paths, chunk, known, ids[target], slot), strict=True
            ):
                _write(picture, outputs[place])
                bar.update()
    return outputs


def _context(name: str, names: tuple[str, ...] | None) -> ContextIds:
    """A context as given on a command line: contexts without names go by number."""
    return int(name) if names is None and name.isdecimal() else name


def _output_paths(paths: Sequence[Path], output: Path, overwrite: bool) -> list[Path]:
    if not paths:
        raise ConfigError("no image was given; name one file or several")
    endings = PIL.Image.registered_extensions()
    single = len(paths) == 1 and output.suffix.lower() in endings and not output.is_dir()
    if len(paths) > 1 and output.suffix.lower() in endings and not output.is_dir():
        raise ConfigError(f"{len(paths)} images cannot go into the one file {output}; give a folder")
    outputs = [output] if single else [output / path.name for path in paths]
    taken: dict[Path, Path] = {}
    for path, place in zip(paths, outputs, strict=True):
        if endings.get(place.suffix.lower()) not in PIL.Image.SAVE:
            writable = [ending for ending, kind in endings.items() if kind in _SAVE_OPTIONS]
            raise ConfigError(f"{place.name!r} has no ending of an image format; {nearest(place.suffix, writable)}")
        if place in taken:
            raise ConfigError(f"{taken[place]} and {path} would both become {place}; restyle them into two folders")
        taken[place] = path
        if place.exists() and path.exists() and place.samefile(path):
            raise ConfigError(f"{path} would be replaced by its own result; give another folder")
        if place.exists() and not overwrite:
            raise CheckpointError(f"{place} is there already; give another folder, or --overwrite")
    return outputs


def _check_readable(path: Path) -> None:
    """That a file is an image of one frame, by its header.

    Raises:
        DatasetFileError: It is not.
    """
    if path.is_dir():
        raise DatasetFileError(f"{path} is a folder; name its images, e.g. {path}/*.jpg")
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DatasetFileError(f"no file {path}" + (f"; {nearest(path.name, beside)}" if 0 < len(beside) <= 50 else ""))
    try:
        with PIL.Image.open(path) as picture:
            frames, kind = getattr(picture, "n_frames", 1), picture.format
    except _READ_ERRORS as error:
        raise DatasetFileError(f"{path} cannot be read as an image: {error}") from error
    if frames > 1 and kind != "MPO":  # of which phones write one photograph and previews of it
        raise DatasetFileError(f"{path} holds {frames} frames; take them apart first, or give a still image")


def _read(path: Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as picture:
            picture.load()
            picture.getexif()  # of some formats it needs the open file
            loaded: PIL.Image.Image = picture
            return loaded
    except _READ_ERRORS as error:
        raise DatasetFileError(f"{path} cannot be read as an image: {error}") from error


def _restyled(
    model: torch.nn.Module,
    pictures: list[PIL.Image.Image],
    paths: Sequence[Path],
    chunk: range,
    source: ContextIds | None,
    target: ContextIds,
    slot: str | None,
) -> list[PIL.Image.Image]:
    try:
        return restyle(model, pictures, source, target, slot=slot)
    except InputTypeError:
        for place, picture in zip(chunk, pictures, strict=True):  # to name the file it is about
            try:
                restyle(model, picture, source, target, slot=slot)
            except InputTypeError as error:
                raise DatasetFileError(f"{paths[place]}: {error}") from error
        raise


def _write(picture: PIL.Image.Image, path: Path) -> None:
    kind = PIL.Image.registered_extensions()[path.suffix.lower()]
    keeps_orientation = kind in _SAVE_OPTIONS
    if not keeps_orientation:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.endswith("A") and kind in _WITHOUT_ALPHA:
        raise ConfigError(f"{path.name!r} cannot hold the image's alpha; give a name that ends in .png, .webp or .tif")
    kept: dict[str, Any] = {name: picture.info[name] for name in ("icc_profile", "dpi") if name in picture.info}
    if keeps_orientation and "exif" in picture.info:
        kept["exif"] = picture.info["exif"]
    try:
        with written_whole(path) as temporary:
            picture.save(temporary, format=kind, **kept, **_SAVE_OPTIONS.get(kind, {}))
    except CnHfError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
