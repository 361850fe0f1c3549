"""Images as a given model sees them, and how to tell that model again later.

Shape legend: ``N`` images, ``C`` channels, ``H`` ``W`` pixels, ``D`` embedding features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import ContextSourceError

__all__ = ["describe", "embed", "probe"]

_BATCH = 64


def embed(model: Callable[..., Any], pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Embeddings of images by a model in evaluation mode, without gradients; its training flags are put back.

    Args:
        model: takes float images ``(N, C, H, W)``, standardised, and returns ``(N, D)`` (or ``(N, D, 1, 1)``), or an
            output of transformers with ``pooler_output``. A module gets them on its own device and in its dtype.
        pixels: uint8 ``(N, C, H, W)``.
        mean: of the standardisation, for pixels in [0, 1]: one number or one a channel.
        std: likewise.

    Returns:
        float32 ``(N, D)``, on the pixels' device.

    Raises:
        ContextSourceError: the model returns something else, or values that are not finite.
    """
    module = model if isinstance(model, nn.Module) else None
    parameter = None if module is None else next(module.parameters(), None)
    device, dtype = (pixels.device, torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    center, scale = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (mean, std))
    training = [] if module is None else [(part, part.training) for part in module.modules()]
    if module is not None:
        module.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(pixels), _BATCH):
                batch = pixels[start : start + _BATCH]
                x = (batch.to(device, torch.float32) / 255 - center) / scale
                parts.append(_vectors(model(x.to(dtype)), len(batch)).to(pixels.device, torch.float32))
    finally:
        for part, flag in training:
            part.training = flag
    vectors = torch.cat(parts)
    if not vectors.isfinite().all():
        bad = int((~vectors.isfinite().all(dim=1)).nonzero()[0])
        raise ContextSourceError(f"The embedding of image {bad} is not finite; give another model, or mean= and std=.")
    return vectors


def _vectors(output: object, count: int) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    output = output if pooled is None else pooled
    if not isinstance(output, Tensor) or len(output) != count or output[:1].numel() != output.shape[1]:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ContextSourceError(
            f"The embedding model returned {got} for {count} images; expected a tensor (N, D). Give one that pools, "
            "e.g. timm.create_model(..., num_classes=0), or a function that picks the vectors."
        )
    return output.flatten(1)


def describe(model: Callable[..., Any]) -> str:
    """A model in words: its class, and its size if it is a module."""
    if not isinstance(model, nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    return f"{type(model).__qualname__} with {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def probe(model: Callable[..., Any], shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The embedding of one fixed picture: a fingerprint of the model's weights and input scaling.

    Args:
        model: as for ``embed``.
        shape: of the picture, (C, H, W).
        mean: as for ``embed``.
        std: as for ``embed``.

    Returns:
        float32 ``(D,)``.
    """
    channels, height, width = shape
    ramp = torch.arange(height)[:, None] * 7 + torch.arange(width) * 3 + torch.arange(channels)[:, None, None] * 50
    return embed(model, (ramp % 256).to(torch.uint8)[None], mean, std)[0].cpu()
