"""The activations that layers are timed on: four layouts, and sets of tensors that are used in turn.

N samples, C features, H and W height and width of maps, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scripts.benchmark.settings import Settings

__all__ = ["Activations", "Layout", "dtype_name", "layouts"]

NUM_CONTEXTS = 20
_CPU_CACHE = 32 * 2**20  # bytes, of the last level that a process has its share of
_MOST_SETS = 32


class Layout(NamedTuple):
    """A kind of activations: (N, C, H, W) maps or (N, L, C) tokens."""

    name: str
    shape: tuple[int, ...]
    channels_last: bool = False

    @property
    def on_maps(self) -> bool:
        """True if features lie along axis 1."""
        return len(self.shape) == 4

    @property
    def feature_dim(self) -> int:
        """1 or -1."""
        return 1 if self.on_maps else -1

    @property
    def num_features(self) -> int:
        """C."""
        return self.shape[self.feature_dim]

    @property
    def num_elements(self) -> int:
        """Of one tensor."""
        return torch.Size(self.shape).numel()

    @property
    def shape_in_words(self) -> str:
        """For tables."""
        return str(self.shape)


def layouts(settings: Settings) -> list[Layout]:
    """Maps in both memory formats, tokens of a ViT-S/16's size, and small maps."""
    batch = settings.of(full=256, quick=16, smoke=2, gpu=256)
    small = settings.of(full=256, quick=256, smoke=2, gpu=256)
    return [
        Layout("maps", (batch, 64, 56, 56)),
        Layout("channels-last maps", (batch, 64, 56, 56), channels_last=True),
        Layout("tokens", (batch, 197, 768)),
        Layout("small maps", (small, 128, 8, 8)),
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's name before it."""
    return str(dtype).removeprefix("torch.")


class Activations:
    """Inputs and gradients of outputs, in as many sets as do not fit into the cache together, used in turn.

    The samples take ``NUM_CONTEXTS`` contexts one after the other.

    Args:
        layout: Of each.
        dtype: Of each.
        device: Where they are.
        requires_grad: Whether a gradient of the inputs is asked for.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        requires_grad: bool = True,
    ) -> None:
        self.layout = layout
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
        number = min(1 + 2 * cache // (layout.num_elements * dtype.itemsize), _MOST_SETS)
        self.x = [self._drawn(dtype, device).requires_grad_(requires_grad) for _ in range(number)]
        self.grad = [self._drawn(dtype, device) for _ in range(number if requires_grad else 0)]
        self.context_ids = torch.arange(layout.shape[0], device=device) % NUM_CONTEXTS
        self._count = 0

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next set: an input, and the gradient of what is made of it, where gradients are asked for."""
        place = self._count % len(self.x)
        self._count += 1
        return self.x[place], self.grad[place] if self.grad else None

    def _drawn(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.randn(self.layout.shape, device=device).to(dtype)
        if self.layout.channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        return values
