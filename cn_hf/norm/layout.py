"""How an input lies in memory, which decides what walks through it.

*Rows*: ``(N, C, ...)`` is contiguous, a feature's positions lie together. *Columns*: ``(N, ..., C)`` is, a position's
features do. An input with one position a sample is both.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["arranged", "lies_in_rows", "stored"]


def lies_in_rows(x: Tensor, feature_dim: int) -> bool | None:
    """True for rows, False for columns, None for neither."""
    maps = x.movedim(feature_dim, 1)
    if maps.is_contiguous():
        return True
    return False if maps.movedim(1, -1).is_contiguous() else None


def stored(x: Tensor, feature_dim: int) -> tuple[Tensor, bool]:
    """``x``, copied if it is neither, and whether that is rows."""
    in_rows = lies_in_rows(x, feature_dim)
    return (x, in_rows) if in_rows is not None else stored(x.contiguous(), feature_dim)


def arranged(x: Tensor, feature_dim: int, in_rows: bool) -> Tensor:
    """``(N, C, ...)`` or ``(N, ..., C)``, contiguous: copied if it is not."""
    maps = x.movedim(feature_dim, 1)
    return maps.contiguous() if in_rows else maps.movedim(1, -1).contiguous()
