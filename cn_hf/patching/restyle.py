r"""Day for night: images with the statistics of another context (paper IV-E, Figs. 5 and 6).

What context normalization learned on a model's input maps the pixels of one context onto those of another, per channel:

.. math:: x' = (x - \mu_s) / \sigma_s \cdot \sigma_t + \mu_t, \qquad \sigma = \sqrt{\sigma^2 + \epsilon}

in the space the model sees. The way back swaps s and t, and is exact where nothing was clipped.

Shape legend: ``N`` images, ``C`` channels, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError, InputShapeError, InputTypeError, PatchError, nearest
from cn_hf.norm import ContextNorm
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.convert import InputSlot
from cn_hf.patching.patch import named_slots
from cn_hf.patching.pictures import Picture, groups_of_one_size
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.routing import router_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["input_norm", "restyle"]

# How far float values may lie beyond black and white, as resampling leaves them, in parts of that range.
_OVERSHOOT = 0.25


@overload
def restyle(
    model: nn.Module,
    images: Tensor,
    source: ContextIds | None = ...,
    target: ContextIds = ...,
    *,
    slot: str | None = ...,
    clip: bool = ...,
) -> Tensor: ...
@overload
def restyle(
    model: nn.Module,
    images: Image,
    source: ContextIds | None = ...,
    target: ContextIds = ...,
    *,
    slot: str | None = ...,
    clip: bool = ...,
) -> Image: ...
@overload
def restyle(
    model: nn.Module,
    images: Sequence[Image],
    source: ContextIds | None = ...,
    target: ContextIds = ...,
    *,
    slot: str | None = ...,
    clip: bool = ...,
) -> list[Image]: ...
@torch.no_grad()
def restyle(
    model: nn.Module,
    images: Tensor | Image | Sequence[Image],
    source: ContextIds | None = "day",
    target: ContextIds = "night",
    *,
    slot: str | None = None,
    clip: bool = True,
) -> Any:
    """Give images the statistics of another context, as the CN-Channels on a model's input learned them.

    Sizes are free: the network itself does not run. PIL images may differ in size; orientation (EXIF) and alpha stay,
    gray, palette and CMYK ones come back in the model's colours, and 16-bit gray is taken as 8-bit.

    Args:
        model: patched with CN-Channels on its input (``mode="cn-channels", where="input"``).
        images: uint8 ``(N, C, H, W)``; or floats of that shape as the model gets them, that is pixels in 0..1 minus the
            mean and divided by the std that ``set_inference`` was told (0 and 1 if it was not), so a tensor of pixels
            in 0..1 is to be normalised first; or either without ``N``; or one PIL image or a list of them.
        source: the contexts the images are of: a name or id for all, or one for each image; None to let the model's
            context source tell.
        target: likewise, those they are to look like.
        slot: name of the slot whose statistics are used; by default the one on the input, the first of several.
        clip: end with values between black and white. Integers and PIL images always do.

    Returns:
        The same kind as ``images``, of the same sizes; tensors keep dtype and device.

    Raises:
        PatchError: the model is not patched, or has no CN-Channels on its input.
        ContextIdError: a context is unknown, or ``source`` is None and the model has no context source.
        InputTypeError: ``images`` is something else.
        InputShapeError: a wrong shape, or a number of channels that the model's input does not have.
        ConfigError: float images lie far outside of the range that the model's pixel mean and std say.
    """
    norm, router = input_norm(model, slot), router_of(model)
    if isinstance(images, Tensor):
        _check_tensor(images, norm)
        batch = images if images.ndim == 4 else images[None]
        restyled = _restyle_batch(norm, router, batch, *_both_ids(router, batch, source, target), clip)
        return restyled if images.ndim == 4 else restyled[0]
    single = not isinstance(images, Sequence)
    listed = cast("Sequence[Image]", [images] if single else images)
    pictures = [Picture.of(image, norm.num_features) for image in listed]
    device = next(iter(norm.parameters())).device
    sources = None if source is None else _listed(router, source, len(pictures))
    targets = _listed(router, target, len(pictures))
    finished: dict[int, Any] = {}
    for places, pixels in groups_of_one_size(pictures):
        batch = pixels.to(device)
        chosen = None if sources is None else sources[places]
        ids = _both_ids(router, batch, chosen, targets[places])
        restyled = _restyle_batch(norm, router, batch, *ids, clip).cpu()
        finished |= {place: pictures[place].with_pixels(new) for place, new in zip(places, restyled, strict=True)}
    return finished[0] if single else [finished[place] for place in range(len(pictures))]


def input_norm(model: nn.Module, slot: str | None = None) -> ContextNorm:
    """The CN-Channels on a model's input, the first of several; or that of the slot named.

    Raises:
        PatchError: the model is not patched, or has none there.
    """
    slots = {
        name: module
        for name, module in named_slots(model)
        if isinstance(module.normalizer, ContextNorm) and module.normalizer.feature_dim == 1
    }
    if slot is not None:
        if slot not in slots:
            raise PatchError(f"No CN-Channels at {slot!r}; {nearest(slot, slots)}")
        return cast(ContextNorm, slots[slot].normalizer)
    for module in slots.values():
        if isinstance(module, InputSlot):
            return cast(ContextNorm, module.normalizer)
    config = router_of(model).config
    raise PatchError(
        f"{type(model).__name__} has no CN-Channels on its input (it was patched with mode={config.mode!r}, "
        f"where={config.where!r}), so it has not learned what its contexts look like: patch it with "
        "mode='cn-channels', where='input'" + (f", or name a slot: {', '.join(list(slots)[:5])}." if slots else ".")
    )


def _check_tensor(images: Tensor, norm: ContextNorm) -> None:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputTypeError(f"Tensors of images must be uint8 or floating point, received {images.dtype}.")
    if images.ndim not in (3, 4) or images.shape[-3] != norm.num_features:
        raise InputShapeError(
            f"Expected images (N, {norm.num_features}, H, W) or ({norm.num_features}, H, W), as the model's input "
            f"takes them, received shape {tuple(images.shape)}."
        )


def _listed(router: ContextRouter, ids: ContextIds, count: int) -> Tensor:
    """Hard ids of ``count`` images, on the CPU."""
    resolved = router.resolve(ids, count, torch.device("cpu"))
    if resolved.is_floating_point():
        raise ContextIdError("Restyling is between single contexts: give names or ids, not weights.")
    return resolved


def _both_ids(
    router: ContextRouter, batch: Tensor, source: ContextIds | None, target: ContextIds
) -> tuple[Tensor, Tensor]:
    """Ids of the contexts that the images of a batch are of and go to, on its device."""
    sources = router.predicted_ids(batch) if source is None else _listed(router, source, len(batch))
    return sources.to(batch.device), _listed(router, target, len(batch)).to(batch.device)


def _restyle_batch(
    norm: ContextNorm, router: ContextRouter, batch: Tensor, source: Tensor, target: Tensor, clip: bool
) -> Tensor:
    """The formula above, for uint8 in pixel space and for floats as they are."""
    if len(batch) == 0:
        return batch.clone()
    kind = torch.promote_types(batch.dtype, torch.float32)
    mean, var = (values.double() for values in norm.statistics())
    deviation = (var + norm.eps).sqrt()

    def rows(table: Tensor, ids: Tensor) -> Tensor:
        return table.to(batch.device)[ids].to(kind)[:, :, None, None]

    pixel_mean, pixel_std = router.pixel_statistics(batch)
    x = batch.to(kind)
    black, white = -pixel_mean / pixel_std, (1 - pixel_mean) / pixel_std
    if batch.dtype == torch.uint8:
        x = (x / 255 - pixel_mean) / pixel_std
    elif clip:
        _check_range(x, black, white)
    x = (x - rows(mean, source)) * rows(deviation, target).div(rows(deviation, source)) + rows(mean, target)
    if batch.dtype == torch.uint8:
        return ((x * pixel_std + pixel_mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
    return (x.clamp(black, white) if clip else x).to(batch.dtype)


def _check_range(x: Tensor, black: Tensor, white: Tensor) -> None:
    margin = _OVERSHOOT * (white - black)
    if x.numel() and not bool(((x >= black - margin) & (x <= white + margin)).all()):
        raise ConfigError(
            f"Float images must be as the model gets them, which by its pixel mean and std lie between "
            f"{float(black.min()):.3g} (black) and {float(white.max()):.3g} (white); received {float(x.min()):.3g} to "
            f"{float(x.max()):.3g}. Tell the model how its pixels are normalised, set_inference(model, ..., mean=, "
            "std=), or pass clip=False."
        )
