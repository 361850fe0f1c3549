"""CN+ in evaluation on a CPU: a call of the compiled kernel, one pass over ``x`` for all of ``combine_in_pieces``.

Shape legend: ``N`` samples, ``L`` positions of a sample, ``C`` features, ``K`` contexts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cn_hf.norm import kernels, native
from cn_hf.norm.em import Densities
from cn_hf.norm.layout import stored

__all__ = ["combine"]


def combine(
    x: Tensor,
    densities: Densities,
    factor: Tensor,
    statistics: tuple[Tensor, Tensor],
    *,
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """``combination.combine_in_pieces``, same arguments; None where the kernel does not know such arguments.

    What torch would broadcast or refuse is left to torch, and so is all while a dispatch mode wants to see operators.
    """
    rows = [row for row in (weight, bias) if row is not None]
    samples, features, components = x.shape[0], x.shape[feature_dim], len(densities.constant)
    if (
        not kernels.fused("cpu", x.dtype)
        or any(tensor.device.type != "cpu" or tensor.is_neg() for tensor in (x, factor, *densities, *statistics, *rows))
        or any(row.shape != (features,) for row in (densities.shift, *rows))
        or any(table.shape != (components, features) for table in statistics)
        or is_in_torch_dispatch_mode()
    ):
        return None
    x, in_rows = stored(x, feature_dim)
    scale = (-2 * densities.squared).sqrt()
    offset = torch.where(scale > 0, densities.linear / scale, 0)  # none of an infinite variance
    mean, rstd = statistics[0], torch.rsqrt(statistics[1] + eps)
    # What the contexts share is kept out of the sums, so that equal ones give the exact result however many there are.
    center, shared = mean.mean(dim=0), rstd.mean(dim=0)
    tables = {
        "shift": densities.shift,
        "scale": scale,
        "offset": offset,
        "level": densities.constant + 0.5 * offset.square().sum(dim=0),
        # Farther away, the square would overflow: such a vector belongs where its bounded one does.
        "reach": (torch.finfo(torch.float32).max / (16 * features * scale.square().max().clamp_min(1))).sqrt(),
        "center": center,
        "shared": shared,
        "scales": rstd - shared,
        "offsets": (center - mean) * rstd,
        "factor": factor.expand(components),
        "weight": weight,
        "bias": bias,
    }
    held = {name: None if table is None else table.float().contiguous() for name, table in tables.items()}
    out, positions = torch.empty_like(x), x.numel() // (samples * features)
    sizes, work = (samples, features, components, positions), samples * positions * max(features, components)
    native.call("combine", x.dtype, out, x, native.Components.of(**held), *sizes, int(in_rows), work=work)
    return out
