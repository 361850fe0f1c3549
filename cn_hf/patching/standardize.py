"""The per-sample standardisations of norm layers, without their affine maps: what stays of a norm that is swapped.

Shape legend: ``N`` samples, ``C`` features; maps are ``(N, C, H, W)``, tokens ``(N, ..., C)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_hf.norm.functional import Standardization

__all__ = ["LAYER", "RMS", "PerVector", "Standardize", "group", "instance", "simple", "simple_of_maps"]


@dataclass(frozen=True, slots=True)
class PerVector:
    """Each feature vector by itself: a layer norm if ``centered``, an RMS norm if not. One pass does it with CN."""

    centered: bool

    def of(self, norm: Any, dtype: torch.dtype) -> Standardization:
        """As the module ``norm`` does it, which computes in ``dtype``."""
        eps = getattr(norm, "eps", None)
        if eps is None:
            eps = getattr(norm, "variance_epsilon", None)
        return Standardization(self.centered, torch.finfo(dtype).eps if eps is None else float(eps))


LAYER, RMS = PerVector(centered=True), PerVector(centered=False)

Standardize: TypeAlias = PerVector | Callable[[Any, Tensor], Tensor]
"""Of each vector, or a function of the module and its input."""


def group(norm: Any, x: Tensor) -> Tensor:
    """Groups of channels, each with all pixels of a sample."""
    return F.group_norm(x, norm.num_groups, None, None, norm.eps)


def instance(norm: Any, x: Tensor) -> Tensor:
    """Each channel with all pixels of a sample."""
    return F.instance_norm(x, None, None, None, None, True, 0.0, norm.eps)


def simple(norm: Any, x: Tensor) -> Tensor:
    """Each vector by its unbiased standard deviation, its mean left where it is."""
    return x * torch.rsqrt(x.var(dim=-1, keepdim=True) + norm.eps)


def simple_of_maps(norm: Any, x: Tensor) -> Tensor:
    """The same along the channels of a map."""
    return simple(norm, x.movedim(1, -1)).movedim(-1, 1)
