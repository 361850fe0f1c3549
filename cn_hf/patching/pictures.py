"""PIL images as pixels of a model's channels, and back with everything else they carry.

Orientation is kept by leaving pixels where they are and handing the EXIF data on. Alpha is set aside and put back.

Shape legend: ``N`` images, ``C`` channels, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cn_hf.errors import InputShapeError, InputTypeError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Picture", "groups_of_one_size"]

# Pixels that are worked on at once; bounds the memory of their floats.
_BATCH_PIXELS = 1 << 24
# Colours whose ICC profile is still true of the pixels after conversion.
_SAME_COLOURS = {"RGB": ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA"), "L": ("L", "LA", "La", "1")}


@dataclass(frozen=True, slots=True)
class Picture:
    """A PIL image taken apart.

    Attributes:
        pixels: uint8 ``(C, H, W)``.
        alpha: the image's alpha band, or None.
        info: what else is to go with the result.
    """

    pixels: Tensor
    alpha: Image | None
    info: dict[Any, Any]

    @classmethod
    def of(cls, image: Any, num_channels: int) -> Picture:
        """Take an image apart.

        Raises:
            InputTypeError: it is no PIL image, cannot be decoded, or its pixels have no 8-bit meaning.
            InputShapeError: there is no PIL mode of so many channels.
        """
        import PIL.Image

        if not isinstance(image, PIL.Image.Image):
            raise InputTypeError(
                f"Expected a tensor, a PIL image or a list of PIL images, received {type(image).__name__}."
            )
        modes = {1: "L", 3: "RGB"}
        if num_channels not in modes:
            raise InputShapeError(
                f"The model's input has {num_channels} channels; PIL images have 1 or 3. Give tensors."
            )
        mode = modes[num_channels]
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise InputTypeError(f"A PIL image cannot be decoded: {error}") from error
        info = {name: value for name, value in image.info.items() if name != "transparency"}
        if image.mode not in _SAME_COLOURS[mode]:
            info.pop("icc_profile", None)
        if exif := image.getexif():
            info["exif"] = exif.tobytes()
        try:
            colours, alpha = _without_alpha(_in_8_bits(image))
            converted = colours if colours.mode == mode else colours.convert(mode)
        except ValueError as error:
            raise InputTypeError(f"A PIL image of mode {image.mode!r} cannot be made {mode!r}: {error}") from error
        flat = (
            torch.frombuffer(bytearray(converted.tobytes()), dtype=torch.uint8) if min(image.size) else torch.empty(0)
        )
        pixels = flat.to(torch.uint8).view(image.height, image.width, num_channels).permute(2, 0, 1)
        return cls(pixels, alpha, info)

    def with_pixels(self, pixels: Tensor) -> Image:
        """The image with other pixels ``(C, H, W)``, uint8, on the CPU."""
        import PIL.Image

        channels, height, width = pixels.shape
        data = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
        image = PIL.Image.frombytes("L" if channels == 1 else "RGB", (width, height), data)
        if self.alpha is not None:
            image.putalpha(self.alpha)
        image.info.update(self.info)
        return image


def groups_of_one_size(pictures: Sequence[Picture]) -> Iterator[tuple[list[int], Tensor]]:
    """Places of pictures of the same size, and their pixels uint8 ``(N, C, H, W)``, few enough for memory."""
    by_size: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        by_size.setdefault(picture.pixels.shape, []).append(place)
    for shape, places in by_size.items():
        count = max(1, _BATCH_PIXELS // max(1, shape[1] * shape[2]))
        for start in range(0, len(places), count):
            chosen = places[start : start + count]
            yield chosen, torch.stack([pictures[place].pixels for place in chosen])


def _in_8_bits(image: Image) -> Image:
    """16-bit gray scaled to 8 bits, which Pillow itself would cut off at 255.

    Raises:
        ValueError: the values are floats or have more than 16 bits, so that black and white are not known.
    """
    import PIL.Image

    if image.mode == "F":
        raise ValueError("floats have no known black and white; convert it to 'L' or 'RGB' first")
    if not image.mode.startswith("I") or not min(image.size):
        return image
    wide = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    if bool(((wide < 0) | (wide > 0xFFFF)).any()):
        raise ValueError("its values have more than 16 bits; convert it to 'L' or 'RGB' first")
    if image.mode != "I" or int(wide.max()) > 0xFF:  # older Pillow reads 16-bit PNGs as mode I, too
        wide = wide // 257
    return PIL.Image.frombytes("L", image.size, wide.to(torch.uint8).numpy().tobytes())


def _without_alpha(image: Image) -> tuple[Image, Image | None]:
    """Colours, and alpha where there is any: a band, a transparent colour, or transparent palette entries."""
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        image = image.convert("RGBA")
    if image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        return image.convert(image.mode.removesuffix("A")), image.getchannel("A")
    return image, None
