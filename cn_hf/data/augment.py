"""Augmentation of whole batches on their device, each image drawn for itself, the same for a seed.

The geometry and the random numbers per image are kornia's. Numbers are drawn on the CPU for the *global* batch, from a
generator seeded for that batch alone, and each process then uses the rows of its own images: so what happens to an
image depends on neither the number of processes nor the device nor what was drawn before.

Shapes: N images of this process, C channels, H and W height and width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from pydantic import BeforeValidator
from torch import Tensor

from cn_hf.data.order import stream_seed
from cn_hf.errors import ConfigError, InputShapeError, InputTypeError, nearest
from cn_hf.validation import Count, Fraction, Natural, Number, Share, validated

__all__ = ["Augment", "Augmentation", "AugmentationConfig", "InTurn", "build_augmentation", "whole_batch"]

# Parameters that kornia returns once per batch instead of once per image.
PER_BATCH = ("forward_input_shape",)


class Augment(Protocol):
    """The type of ``augment`` in batches: ``Augmentation``, or any function of this signature."""

    def __call__(self, images: Tensor, *, seed: int, places: Tensor, total: int) -> Tensor:
        """Augmented images.

        Args:
            images: Float (N, C, H, W) in [0, 1], part of a global batch.
            seed: Seed of this global batch.
            places: (N,) int64, on the CPU: place of each image in the global batch.
            total: Size of the global batch.

        Returns:
            Float (N, C, H', W').
        """


def _height_and_width(value: Any) -> Any:
    pair = (value, value) if isinstance(value, int) else value
    if pair is not None and (not isinstance(pair, list | tuple) or len(pair) != 2):
        raise ConfigError(f"image_size must be a whole number or (height, width), got {value!r}")
    return pair


@validated
class AugmentationConfig:
    """Changes of training images, in this order; the default is nothing.

    Attributes:
        horizontal_flip: Probability that an image is mirrored.
        crop_padding: Pixels of black padding on each side before a crop of the old size at a random place.
        rotation: Largest turn in degrees, either way.
        zoom: Largest change of height and of width, each for itself, as a fraction; what lies beyond is mirrored in.
        invert: Probability that an image becomes its negative: dark on light instead of light on dark.
        image_size: (H, W) or one number to resize to at the end (bilinear), also in evaluation; None: as they are.

    Raises:
        ConfigError: A value is out of range.
    """

    horizontal_flip: Share = 0.0
    crop_padding: Natural = 0
    rotation: Annotated[Number, Ge(0), Le(180)] = 0.0
    zoom: Fraction = 0.0
    invert: Share = 0.0
    image_size: Annotated[tuple[Count, Count] | None, BeforeValidator(_height_and_width)] = None

    def evaluation(self) -> AugmentationConfig:
        """Return the part for validation and test images: the resize."""
        return AugmentationConfig(image_size=self.image_size)

    def to_json(self) -> str:
        """JSON that ``from_json`` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AugmentationConfig:
        """The config that ``to_json`` wrote.

        Raises:
            ConfigError: An option is unknown or out of range.
        """
        return cls(**json.loads(text))


class Augmentation:
    """Callable made from a config; see ``Augment`` for the call. Holds no state between calls.

    Args:
        config: What to do.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        self.flip = K.RandomHorizontalFlip(p=config.horizontal_flip) if config.horizontal_flip else None
        self.affine = None
        if config.rotation or config.zoom:
            scale = (1 - config.zoom, 1 + config.zoom) * 2
            self.affine = K.RandomAffine(degrees=config.rotation, scale=scale, padding_mode="reflection", p=1.0)
        self.invert = K.RandomInvert(p=config.invert) if config.invert else None

    def __repr__(self) -> str:
        return f"Augmentation({self.config})"

    @property
    def is_identity(self) -> bool:
        """True if images come out as they went in."""
        return self.config == AugmentationConfig()

    def evaluation(self) -> Augmentation:
        """The part for validation and test images: no randomness, only the resize."""
        return Augmentation(self.config.evaluation())

    def __call__(
        self, images: Tensor, *, seed: int = 0, places: Tensor | None = None, total: int | None = None
    ) -> Tensor:
        """Augment float images (N, C, H, W) in [0, 1], by default a whole batch; see ``Augment`` for the arguments.

        Raises:
            InputTypeError: ``images`` are not floating point.
            InputShapeError: See ``whole_batch``.
        """
        if not images.is_floating_point():
            raise InputTypeError(f"images must be floats in [0, 1]; got {images.dtype}; divide uint8 by 255 first")
        places, total = whole_batch(images, places, total)
        with _cpu_random_numbers(seed):
            for operation in self._random_operations(images):
                if operation is None:
                    continue
                # Drawn also for a process without images, so that all processes draw alike.
                drawn = operation.forward_parameters(torch.Size((total, *images.shape[1:])))
                if len(images):
                    images = operation(images, params=_rows(drawn, places))
        return self._resized(images)

    def _random_operations(self, images: Tensor) -> Iterator[Any]:
        height, width = images.shape[-2:]
        yield self.flip
        if self.config.crop_padding:
            # Slicing is exact and fastest on a CPU, but one kernel per image on a GPU, where one resampling is faster.
            how = "slice" if images.device.type == "cpu" else "resample"
            yield K.RandomCrop((height, width), padding=self.config.crop_padding, cropping_mode=how)
        yield self.affine
        yield self.invert

    def _resized(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if size is None or images.shape[-2:] == size:
            return images
        assert not isinstance(size, int)
        shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
        if len(images) == 0:
            return images.new_empty((0, images.shape[1], *size))
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


class InTurn:
    """Several augmentations one after the other, each with random numbers of its own; the call is that of ``Augment``.

    Args:
        augments: At least one.
    """

    def __init__(self, *augments: Augment) -> None:
        self.augments = augments

    def __repr__(self) -> str:
        return f"InTurn({', '.join(map(repr, self.augments))})"

    def __call__(self, images: Tensor, *, seed: int, places: Tensor, total: int) -> Tensor:
        """See ``Augment``."""
        for number, augment in enumerate(self.augments):
            images = augment(images, seed=stream_seed(seed, number), places=places, total=total)
        return images


def whole_batch(images: Tensor, places: Tensor | None, total: int | None) -> tuple[Tensor, int]:
    """``places`` and ``total`` of ``Augment``; where they are None, those of ``images`` as a whole batch.

    Raises:
        InputShapeError: ``images`` are not (N, C, H, W); ``places`` are not N, or lie outside the batch.
    """
    if images.ndim != 4:
        raise InputShapeError(f"images must be (N, C, H, W); got {tuple(images.shape)}")
    places = torch.arange(len(images)) if places is None else places
    total = len(images) if total is None else total
    if places.shape != (len(images),) or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < total):
        raise InputShapeError(f"places must be {len(images)} places in a batch of {total}; got {places.tolist()}")
    return places, total


def build_augmentation(
    names: Sequence[str] = (), *, image_size: int | tuple[int, int] | None = None, **options: Any
) -> Augmentation:
    """Augmentation by the names of its parts, with their usual strengths, or by the options of ``AugmentationConfig``.

    Args:
        names: Any of "flip" (horizontal, p = 1/2), "crop" (4 pixels of padding per 32 of the image are usual: 4),
            "rotation" (7.2 degrees) and "zoom" (0.2), the strengths in the authors' notebooks, and "invert" (p = 1/2).
        image_size: Resize at the end; the paper's ViT takes 72.
        options: Options of ``AugmentationConfig``, which win over the usual strengths.

    Raises:
        ConfigError: A name or option is unknown, or a value is out of range.
    """
    values: dict[str, Any] = {}
    for name in names:
        if name not in USUAL_STRENGTHS:
            raise ConfigError(f"unknown augmentation {name!r}: {nearest(name, USUAL_STRENGTHS)}")
        values.update(USUAL_STRENGTHS[name])
    return Augmentation(AugmentationConfig(**{**values, **options, "image_size": image_size}))


USUAL_STRENGTHS: dict[str, dict[str, float]] = {
    "flip": {"horizontal_flip": 0.5},
    "crop": {"crop_padding": 4},
    "rotation": {"rotation": 7.2},
    "zoom": {"zoom": 0.2},
    "invert": {"invert": 0.5},
}


def _rows(drawn: dict[str, Any], places: Tensor) -> dict[str, Any]:
    """Of parameters drawn for a global batch, those of the images at ``places``."""
    return {
        name: value[places] if isinstance(value, Tensor) and name not in PER_BATCH else value
        for name, value in drawn.items()
    }


@contextmanager
def _cpu_random_numbers(seed: int) -> Iterator[None]:
    """Kornia draws from torch's global CPU generator: seed it, and put it back afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    # torch.manual_seed would also reseed every GPU.
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)
