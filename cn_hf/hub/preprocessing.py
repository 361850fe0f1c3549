"""The preprocessing and class names of a model, kept where its own library keeps them.

timm has ``pretrained_cfg`` (``input_size``, ``mean``, ``std``, ``label_names``), transformers the config's
``image_size`` and ``id2label``; the mean and standard deviation of its pixels a patched model's router has.

Shape legend: ``N`` images, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import PIL.Image
import torch
from torch import Tensor, nn

from cn_hf.errors import CheckpointError, ConfigError, InputTypeError
from cn_hf.files import read_json
from cn_hf.patching.inference import per_channel
from cn_hf.patching.routing import RoutedModel, router_of
from cn_hf.reading.images import to_array, to_image

__all__ = [
    "input_size_of",
    "known_labels",
    "label_names_of",
    "preprocessing_of",
    "record_pixel_statistics",
    "record_preprocessing",
    "restore_preprocessing",
    "save_image_processor",
    "to_pixels",
]

_BAND_PIXELS = 1 << 22  # of a large image, worked on at a time
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def input_size_of(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that a timm or transformers model was made for; 3 x 224 x 224 where it does not say."""
    described, config = getattr(model, "pretrained_cfg", None), getattr(model, "config", None)
    if isinstance(described, dict) and described.get("input_size"):
        channels, height, width = described["input_size"]
        return int(getattr(model, "in_chans", channels)), int(height), int(width)
    side = getattr(config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else tuple(side)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def label_names_of(model: Any, count: int) -> list[str]:
    """Names of the classes, ``count`` of them; ``class 0`` and so on where the model does not know any."""
    described = getattr(model, "pretrained_cfg", None)
    names: Any = described.get("label_names") if isinstance(described, dict) else None
    by_id = getattr(getattr(model, "config", None), "id2label", None)
    if not names and isinstance(by_id, dict):
        names = [str(by_id.get(number, f"class {number}")) for number in range(count)]
    if not names or len(names) != count:
        return [f"class {number}" for number in range(count)]
    return [str(name) for name in names]


def record_preprocessing(
    model: Any,
    *,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    label_names: Sequence[str] | None = None,
) -> None:
    """Write down in the model, as its library does, which images it was trained on, so that checkpoints tell.

    Args:
        model: a timm or transformers model, patched or not; any other is left alone.
        input_size: (C, H, W).
        mean: one a channel, of pixels in 0..1.
        std: one a channel.
        label_names: one a class.
    """
    names = None if label_names is None else [str(name) for name in label_names]
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        fields: dict[str, Any] = {"input_size": tuple(input_size), "mean": tuple(mean), "std": tuple(std)}
        fields |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}  # images are resized whole
        if names is not None:
            fields["label_names"] = names
        model.pretrained_cfg = {**model.pretrained_cfg, **fields}
    elif hasattr(model, "config") and hasattr(model.config, "to_diff_dict") and names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}


def known_labels(model: Any) -> dict[str, Any]:
    """``label_names`` of a timm model, as its ``config.json`` has them; nothing where it knows none."""
    names: Any = getattr(model, "pretrained_cfg", {}).get("label_names")
    fitting = names and len(names) == getattr(model, "num_classes", None)  # a head may have been replaced since
    return {"label_names": list(names)} if fitting else {}


def restore_preprocessing(model: Any, config_file: Path) -> None:
    """Give a timm model that was just built what its checkpoint's ``config.json`` says of images and classes.

    Raises:
        CheckpointError: the file is there and no description of a timm model.
    """
    if not (isinstance(getattr(model, "pretrained_cfg", None), dict) and config_file.exists()):
        return
    try:
        content = read_json(config_file)
        stored = {name: value for name, value in content["pretrained_cfg"].items() if name in _PREPROCESSING}
        names = content.get("label_names")
        _check_preprocessing(stored, names)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config_file} does not describe a timm model: {error!r}. Save it again.") from error
    model.pretrained_cfg = {**model.pretrained_cfg, **stored, **({"label_names": names} if names else {})}


def _check_preprocessing(stored: dict[str, Any], names: object) -> None:
    for name in ("mean", "std"):
        if stored.get(name) is not None:
            per_channel(name, stored[name])
    size = stored.get("input_size")
    if size is not None and not (len(size) == 3 and all(type(side) is int and 0 < side < 1 << 16 for side in size)):
        raise ConfigError(f"Expected channels, height and width as input_size, received {size!r}.")
    for name in ("interpolation", "crop_mode"):
        if not isinstance(stored.get(name), (str, type(None))):
            raise ConfigError(f"Expected a name as {name}, received {stored[name]!r}.")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"Expected a list of strings as label_names, received {names!r}.")


def save_image_processor(
    folder: str | os.PathLike[str], *, input_size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write the ``preprocessor_config.json`` by which ``AutoImageProcessor`` prepares images as in training.

    Args:
        folder: of a checkpoint of a transformers model.
        input_size: (C, H, W).
        mean: one a channel, of pixels in 0..1.
        std: one a channel.
    """
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(
        size={"height": int(input_size[1]), "width": int(input_size[2])},
        resample=PIL.Image.Resampling.BICUBIC,
        image_mean=[float(value) for value in mean],
        image_std=[float(value) for value in std],
    )
    processor.save_pretrained(folder)


def to_pixels(model: nn.Module, images: Sequence[PIL.Image.Image]) -> Tensor:
    """Images of any size and mode as a batch for a patched model: upright, resized, normalised.

    Args:
        model: a patched model that knows the mean and standard deviation of its pixels.
        images: PIL images; EXIF orientation is applied.

    Returns:
        float32 ``(N, C, H, W)``.

    Raises:
        ConfigError: the model takes neither one channel nor three.
    """
    router = router_of(model)
    channels, height, width = input_size_of(model)
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ConfigError(f"image files have one channel or three, the model takes {channels}.")
    arrays = [to_array(_upright(_shrunk(image, mode, (height, width))), mode, (height, width)) for image in images]
    pixels = torch.stack([torch.from_numpy(array.copy()) for array in arrays]).permute(0, 3, 1, 2).float() / 255
    mean, std = router.pixel_statistics(pixels)
    return (pixels - mean) / std


def preprocessing_of(model: nn.Module, image_processor: Any = None) -> Callable[[Sequence[PIL.Image.Image]], Tensor]:
    """Return what makes a batch for a model of PIL images, as its own library does.

    Args:
        model: a patched model that knows the mean and standard deviation of its pixels, a timm model, or a transformers
            model that was loaded with a processor beside it.
        image_processor: of transformers; goes before what the model knows.

    Returns:
        A function from PIL images to float32 ``(N, C, H, W)``. It raises InputTypeError for a model that knows no
        preprocessing.
    """
    if image_processor is not None:
        return lambda images: _processed(image_processor, images)
    described = getattr(model, "pretrained_cfg", None)
    of_timm = isinstance(described, dict) and bool(described.get("input_size"))
    whole = not of_timm or cast("dict[str, Any]", described).get("crop_mode") == "squash"  # as our training resizes
    if whole and isinstance(model, RoutedModel) and _knows_pixels(model):
        return lambda images: to_pixels(model, images)
    if of_timm:
        return lambda images: _by_timm(model, images)
    return lambda images: _processed(_own_processor(model), images)


def record_pixel_statistics(model: nn.Module, image_processor: Any = None) -> None:
    """Let a patched model know the mean and standard deviation of its pixels, where its library says them."""
    router = router_of(model)
    described = getattr(model, "pretrained_cfg", None)
    values = described if isinstance(described, dict) else getattr(image_processor, "__dict__", {})
    mean, std = (values.get(name, values.get(f"image_{name}")) for name in ("mean", "std"))
    if mean and std and not _knows_pixels(model):
        channels = input_size_of(model)[0]
        router.pixel_mean, router.pixel_std = (_one_a_channel(part, channels) for part in (mean, std))


def _one_a_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the values, or their mean where they are of images with another number of channels, as timm does."""
    numbers = tuple(map(float, values))
    return numbers if len(numbers) in (1, channels) else (sum(numbers) / len(numbers),)


def _knows_pixels(model: nn.Module) -> bool:
    router = router_of(model)
    return (router.pixel_mean, router.pixel_std) != ((0.0,), (1.0,))


def _processed(processor: Any, images: Sequence[PIL.Image.Image]) -> Tensor:
    upright = [_upright(image).convert("RGB") for image in images]
    pixels: Tensor = processor(upright, return_tensors="pt")["pixel_values"]
    return pixels


def _own_processor(model: nn.Module) -> Any:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    advice = "Pass float tensors as the model takes them, or image_processor=AutoImageProcessor.from_pretrained(...)."
    if not name:
        raise InputTypeError(
            f"{type(model).__name__} knows no preprocessing for images that are not normalised. {advice}"
        )
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputTypeError(f"No image processor is found at {name!r} ({error}). {advice}") from error


def _by_timm(model: nn.Module, images: Sequence[PIL.Image.Image]) -> Tensor:
    from timm.data import create_transform, resolve_data_config

    channels = input_size_of(model)[0]
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ConfigError(f"Image files have one channel or three, the model takes {channels}.")
    transform = create_transform(**resolve_data_config({"in_chans": channels}, model=model), is_training=False)
    return torch.stack([transform(_upright(image).convert(mode)) for image in images])


def _shrunk(image: PIL.Image.Image, mode: str, size: tuple[int, int]) -> PIL.Image.Image:
    """A large image in the mode and size, band by band: as resizing it whole would make it, in a part of the memory."""
    turned = image.getexif().get(0x0112, 1) >= 5  # it lies on its side
    height, width = reversed(size) if turned else size
    if image.width * image.height <= _BAND_PIXELS or image.mode in ("I", "F") or image.width < width:
        return image
    wide, rows = PIL.Image.new(mode, (width, image.height)), max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        narrow = to_image(to_array(band, mode)).resize((width, band.height), PIL.Image.Resampling.BICUBIC)
        wide.paste(narrow, (0, top))
    small = wide.resize((width, height), PIL.Image.Resampling.BICUBIC)
    small.getexif()[0x0112] = image.getexif().get(0x0112, 1)
    return small


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) or image
