"""The common part of launching Triton kernels. Needs no triton.

Shape legend: as in ``triton_kernels``.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from cn_hf.errors import InputShapeError

__all__ = ["MOST", "aligned", "on_device_of", "sizes_of", "stages"]

MOST = 2**30
"""Positions of a sample, or vectors of an input, that the kernels count to."""


def aligned(size: int) -> tuple[int, int]:
    """``size`` as a product whose second factor, a power of two up to 16, lets the compiler use wide loads."""
    align = math.gcd(size, 16)
    return size // align, align


def stages(values: int, bytes_each: int) -> int:
    """Steps from the load of a tile to its use: one, and as many more, up to two, as fit 64 KiB of shared memory."""
    return 1 + min(2, 65536 // (values * bytes_each))


def sizes_of(x: Tensor, feature_dim: int) -> tuple[int, int, int]:
    """Samples, features and positions of a tensor that is not empty.

    Raises:
        InputShapeError: a sample has more positions than the kernels count to.
    """
    samples, features = x.shape[0], x.shape[feature_dim]
    length = x.numel() // (samples * features)
    if length > MOST:
        raise InputShapeError(
            f"one sample has {length} positions (x is of shape {tuple(x.shape)}), and the CUDA kernels count to "
            f"{MOST}: pass it in parts, each as a sample"
        )
    return samples, features, length


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
