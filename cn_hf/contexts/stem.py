"""Statistics of an image that tell its domain: of its pixels, and of a network's first convolution (the stem).

The mean and the log standard deviation of each channel over an image. Noise, blur, fog and the like move them; what is
in the image hardly does. The stem is a copy: training the network later changes no context.

Shape legend: ``N`` images, ``C`` channels of images, ``O`` channels of the convolution, ``H`` ``W`` pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.contexts.base import check_number
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError
from cn_hf.patching.placement import first_layers
from cn_hf.patching.routing import RoutedModel

__all__ = ["Stem", "channel_statistics"]

_BATCH = 64
_LEAST_DEVIATION = 1e-3


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and log standard deviation of each channel, ``(N, 2 C)``, of maps ``(N, C, H, W)``."""
    var, mean = torch.var_mean(x.flatten(2), dim=2, correction=0)
    return torch.cat([mean, var.sqrt().clamp_min(_LEAST_DEVIATION).log()], dim=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """A network's first convolution and the standardisation of its input; or the latter alone.

    Attributes:
        mean: of pixels in [0, 1], one number or one a channel.
        std: likewise.
        weight: ``(O, C / groups, h, w)``; None for statistics of pixels alone.
        bias: ``(O,)`` or None.
        stride: of the convolution, as are ``padding``, ``dilation`` and ``groups``.
        pixels: True if the statistics are of the pixels, too.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pixels: bool = True

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if len(value) != 2:
                raise ConfigError(f"Expected {name} to be two integers, received {value!r}.")
            for number in value:
                check_number(name, number, least=least, integer=True)
        check_number("groups", self.groups, least=1, integer=True)
        for number in self.mean:
            check_number("mean", number)
        for number in self.std:
            check_number("std", number, above=0)
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3):
            raise ConfigError(f"Expected one number or one a channel, received {self.mean!r} and {self.std!r}.")

    @classmethod
    def of(
        cls, model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **options: Any
    ) -> Stem:
        """The stem of a model: of the module that first receives the image, its first convolution.

        Args:
            model: any network for images, patched or not.
            mean: of the standardisation; None takes what the model was told or its configuration says, else 0.
            std: likewise, else 1.
            options: see ``Stem``.

        Raises:
            ConfigError: the model does not begin with a two-dimensional convolution.
        """
        layer = next((module for _, module in first_layers(model)), None)
        if not isinstance(layer, nn.Conv2d):
            found = "none" if layer is None else type(layer).__name__
            raise ConfigError(
                f"Expected a model that begins with a Conv2d, received {type(model).__name__}, whose first layer is "
                f"{found}. Use features='pixels', or give a function that embeds images."
            )
        padding = layer.padding
        if isinstance(padding, str):
            padding = (0, 0) if padding == "valid" else tuple((size - 1) // 2 for size in layer.kernel_size)
        own_mean, own_std = _standardisation(model, layer.in_channels)
        return cls(
            mean=own_mean if mean is None else tuple(mean),
            std=own_std if std is None else tuple(std),
            weight=layer.weight.detach().float().cpu().clone(),
            bias=None if layer.bias is None else layer.bias.detach().float().cpu().clone(),
            stride=_pair(layer.stride),
            padding=_pair(padding),
            dilation=_pair(layer.dilation),
            groups=layer.groups,
            **options,
        )

    @property
    def num_statistics(self) -> int:
        """Number of statistics of an image, for three channels where the weights do not say."""
        channels = 3 if self.weight is None else self.weight.shape[1] * self.groups
        return 2 * (channels * self.pixels + (0 if self.weight is None else len(self.weight)))

    def standardised(self, pixels: Tensor) -> Tensor:
        """uint8 pixels ``(N, C, H, W)`` as the network takes them, float32."""
        mean, std = (torch.tensor(value, device=pixels.device).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def statistics(self, x: Tensor) -> Tensor:
        """Statistics of images.

        Args:
            x: ``(N, C, H, W)``, floating point, as the network takes them.

        Returns:
            float32 ``(N, num_statistics)``, on the device of ``x``.

        Raises:
            ContextSourceError: another number of channels, images smaller than the convolution, values not finite.
        """
        channels = x.shape[1] if self.weight is None else self.weight.shape[1] * self.groups
        if x.shape[1] != channels:
            raise ContextSourceError(f"Expected images of {channels} channels, received shape {tuple(x.shape)}.")
        parts = [x.new_empty(0, self.num_statistics, dtype=torch.float32)]
        weight = None if self.weight is None else self.weight.to(x.device)
        bias = None if self.bias is None else self.bias.to(x.device)
        for batch in torch.split(x.detach(), _BATCH):
            found = [channel_statistics(batch.float())] if self.pixels else []
            if weight is not None:
                try:
                    maps = F.conv2d(batch.float(), weight, bias, self.stride, self.padding, self.dilation, self.groups)
                except RuntimeError as error:
                    raise ContextSourceError(
                        f"Expected images that the model's first convolution (kernel {tuple(weight.shape[2:])}) can "
                        f"take, received shape {tuple(x.shape)}. Set decode_size."
                    ) from error
                found.append(channel_statistics(maps))
            parts.append(torch.cat(found, dim=1))
        out = torch.cat(parts)
        if not out.isfinite().all():
            bad = int((~out.isfinite().all(dim=1)).nonzero()[0])
            raise ContextSourceError(f"Expected finite pixels, received NaN or infinity in image {bad}.")
        return out

    def config(self) -> dict[str, Any]:
        """Return the part that is saved as JSON; ``tensors`` are saved beside it."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("weight", "bias")
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weight and bias by the names of their saved tensors."""
        named = {"stem_weight": self.weight, "stem_bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def read(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stem:
        """The stem that ``config`` and ``tensors`` describe.

        Raises:
            CheckpointError: they do not go together.
            ConfigError: a value is out of range.
        """
        weight, bias = tensors.get("stem_weight"), tensors.get("stem_bias")
        shapes = [None if part is None else tuple(part.shape) for part in (weight, bias)]
        if (weight is None and bias is not None) or (
            weight is not None and (weight.dim() != 4 or shapes[1] not in (None, (len(weight),)))
        ):
            raise CheckpointError(f"The saved stem has a weight and a bias of shapes {shapes[0]} and {shapes[1]}.")
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
        }
        return cls(**lists, weight=weight, bias=bias)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _standardisation(model: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that ``set_inference`` was given, or timm's configuration says, else 0 and 1."""
    config = getattr(model, "pretrained_cfg", None)
    mean, std = (config.get("mean"), config.get("std")) if isinstance(config, dict) else (None, None)
    if isinstance(model, RoutedModel) and model.router.pixel_mean and model.router.pixel_std:
        mean, std = model.router.pixel_mean, model.router.pixel_std
    if not mean or not std:
        return (0.0,), (1.0,)
    if channels not in (len(mean), len(std)):  # a network of gray images, described as one of colours
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return tuple(mean), tuple(std)
