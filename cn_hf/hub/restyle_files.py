"""Image files restyled by a saved model: what ``cn-hf restyle`` does.

Every output appears whole or not at all, in the format of its own name, with the input's orientation (EXIF) and alpha.
All names are checked before the first file is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import PIL.Image
import PIL.ImageOps
import torch
from tqdm import tqdm

from cn_hf.errors import CheckpointError, CnHfError, ConfigError, DatasetFileError, InputTypeError, nearest
from cn_hf.files import written_whole
from cn_hf.hub.checkpoint import from_pretrained
from cn_hf.hub.image_files import MAX_PIXELS, check_still_image, read_image
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.pictures import Picture
from cn_hf.patching.restyle import input_norm, restyle
from cn_hf.patching.routing import router_of
from cn_hf.printing import for_terminal

__all__ = ["restyle_files"]

_BAND_PIXELS = 1 << 22  # of a large picture, worked on at a time
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "PNG": {},
    "TIFF": {},
    "AVIF": {"quality": 95},
}
"""Formats that keep the orientation, and how they are written."""
_LAYOUT_TAGS = {254, *range(256, 263), 273, *range(277, 280), 284, 317, 320, *range(322, 326), 338, 339, 530, 531, 532}
"""EXIF tags of a TIFF file that say how its pixels lie in it."""
_WITHOUT_ALPHA = ("JPEG", "BMP", "PPM")


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
    max_pixels: int = MAX_PIXELS,
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
        max_pixels: Images of more are refused.
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
    for path in paths:
        check_still_image(path, max_pixels)
    outputs = _output_paths(paths, Path(output), overwrite)
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
        for path, place in zip(paths, outputs, strict=True):
            try:
                restyled = _restyled(loaded, read_image(path, max_pixels), known, ids[target], slot)
            except InputTypeError as error:
                raise DatasetFileError(f"{for_terminal(path)}: {error}") from error
            _write(restyled, place)
            del restyled
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


def _restyled(
    model: torch.nn.Module,
    picture: PIL.Image.Image,
    source: ContextIds | None,
    target: ContextIds,
    slot: str | None,
) -> PIL.Image.Image:
    """A large picture band by band, as the whole of it would become, in a part of the memory."""
    if picture.width * picture.height <= _BAND_PIXELS or picture.mode.startswith(("I", "F")):
        return restyle(model, picture, source, target, slot=slot)
    if source is None:  # of the whole, by a smaller one: context sources look at small images
        side = math.isqrt(picture.width * picture.height // _BAND_PIXELS) + 1
        small = Picture.of(picture.reduce(side), input_norm(model, slot).num_features).pixels[None]
        source = router_of(model).predicted_ids(small.to(next(iter(model.parameters())).device))
    rows = max(1, _BAND_PIXELS // picture.width)
    result: PIL.Image.Image | None = None
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        band = restyle(model, picture.crop(box), source, target, slot=slot)
        if result is None:
            result = picture if band.mode == picture.mode else PIL.Image.new(band.mode, picture.size)
            result.info = band.info
        result.paste(band, box)
    return cast(PIL.Image.Image, result)


def _write(picture: PIL.Image.Image, path: Path) -> None:
    kind = PIL.Image.registered_extensions()[path.suffix.lower()]
    keeps_orientation = kind in _SAVE_OPTIONS
    if not keeps_orientation:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.endswith("A") and kind in _WITHOUT_ALPHA:
        raise ConfigError(f"{path.name!r} cannot hold the image's alpha; give a name that ends in .png, .webp or .tif")
    kept: dict[str, Any] = {name: picture.info[name] for name in ("icc_profile", "dpi") if name in picture.info}
    if keeps_orientation and "exif" in picture.info:
        exif = PIL.Image.Exif()
        exif.load(picture.info["exif"])
        for tag in _LAYOUT_TAGS & {*exif}:
            del exif[tag]
        kept["exif"] = exif
    try:
        with written_whole(path) as temporary:
            picture.save(temporary, format=kind, **kept, **_SAVE_OPTIONS.get(kind, {}))
    except CnHfError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
