"""What tests of kernels share: inputs of all shapes and storage orders."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Case(NamedTuple):
    shape: tuple[int, ...]
    feature_dim: int
    layout: str = "contiguous"


MAPS = {
    "map": Case((3, 5, 16, 16), 1),
    "map-8x8": Case((8, 40, 8, 8), 1),
    "map-7x7": Case((4, 33, 7, 7), 1),
    "map-14x14": Case((2, 6, 14, 14), 1),
    "map-row-longer-than-a-tile": Case((2, 3, 50, 52), 1),
    "map-one-channel": Case((3, 1, 9, 9), 1),
    "map-one-pixel": Case((3, 70, 1, 1), 1),
    "sequence": Case((3, 5, 37), 1),
    "volume": Case((2, 3, 4, 5, 6), 1),
    "vectors": Case((37, 45), -1),
    "vectors-many": Case((300, 10), 1),
    "channels_last": Case((2, 64, 12, 12), 1, "channels_last"),
    "channels_last-3": Case((2, 3, 17, 19), 1, "channels_last"),
    "channels_last-197": Case((2, 197, 3, 3), 1, "channels_last"),
    "channels_last-many-programs": Case((70, 16, 3, 3), 1, "channels_last"),
    "volume-channels_last": Case((2, 6, 3, 4, 5), 1, "channels_last_3d"),
    "map-transposed": Case((2, 6, 5, 9), 1, "transposed"),
    "map-strided": Case((2, 6, 5, 9), 1, "strided"),
    "tokens": Case((3, 50, 96), -1),
    "tokens-segments": Case((2, 140, 97), -1),
    "tokens-768": Case((2, 17, 768), -1),
    "tokens-2d": Case((2, 5, 7, 24), -1),
    "tokens-channels-first": Case((2, 9, 9, 20), -1, "channels_first"),
    "tokens-strided": Case((2, 9, 20), -1, "strided"),
    "tokens-one": Case((5, 1, 12), -1),
    "tokens-one-feature": Case((3, 11, 1), -1),
}


def arranged(values: Tensor, layout: str) -> Tensor:
    """The same values, in another order in memory."""
    if layout.startswith("channels_last"):
        return values.to(memory_format=getattr(torch, layout))
    if layout == "channels_first":
        return values.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack((values, values), dim=-1)[..., 0]
    return values.contiguous()


def draw(case: Case, dtype: torch.dtype, device: str, mean: float = 0.5) -> tuple[Tensor, Tensor]:
    x, grad = (torch.randn(case.shape, device=device, dtype=torch.float64) for _ in range(2))
    return arranged((x * 2 + mean).to(dtype), case.layout), arranged(grad.to(dtype), case.layout)
