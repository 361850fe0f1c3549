"""The device of an input and its layout in memory, which decide the kernel.

*Rows*: ``(N, C, ...)`` is contiguous, a feature's positions lie together. *Columns*: ``(N, ..., C)`` is, a position's
features do. An input with one position a sample is both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cn_hf.errors import InputDeviceError

__all__ = ["arranged", "check_devices", "in_rows", "lies_in_rows", "stored", "stored_like"]


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raise ``InputDeviceError`` unless the others, where given, are on the device of ``x``."""
    device = x.device
    for other in others:
        if other is not None and other.device != device:
            raise InputDeviceError(
                f"Expected all tensors to be on {device}, received one on {other.device}. Move the model and its "
                "input to one device."
            )


def lies_in_rows(x: Tensor, feature_dim: int) -> bool | None:
    """True for rows, False for columns, None for neither."""
    maps = x.movedim(feature_dim, 1)
    if maps.is_contiguous():
        return True
    return False if maps.movedim(1, -1).is_contiguous() else None


def in_rows(x: Tensor, feature_dim: int) -> bool:
    """True for rows of more than one position, False for columns; for what is one or the other."""
    rows = x.is_contiguous() if feature_dim == 1 else x.movedim(feature_dim, 1).is_contiguous()
    return rows and x.numel() > x.shape[0] * x.shape[feature_dim]


def stored(x: Tensor, feature_dim: int) -> tuple[Tensor, bool]:
    """``x``, copied if it is neither, and whether that is rows."""
    in_rows = lies_in_rows(x, feature_dim)
    return (x, in_rows) if in_rows is not None else stored(x.contiguous(), feature_dim)


def arranged(x: Tensor, feature_dim: int, in_rows: bool) -> Tensor:
    """``(N, C, ...)`` or ``(N, ..., C)``, contiguous: copied if it is not."""
    maps = x.movedim(feature_dim, 1)
    return maps.contiguous() if in_rows else maps.movedim(1, -1).contiguous()


def stored_like(out: Tensor, x: Tensor) -> Tensor:
    """``out`` with the strides of ``torch.empty_like(x)``: copied if it has others."""
    if out.stride() == x.stride() or out.stride() == torch.empty_like(x, device="meta").stride():
        return out
    return torch.empty_like(x, dtype=out.dtype).copy_(out)
