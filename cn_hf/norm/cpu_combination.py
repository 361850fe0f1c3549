"""CN+ in evaluation on a CPU: a call of the compiled kernel, one pass over ``x`` for all of ``combine_in_pieces``.

Shape legend: ``N`` samples, ``L`` positions of a sample, ``C`` features, ``K`` contexts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cn_hf.norm.combination import combine_in_pieces
from cn_hf.norm.em import Densities
from cn_hf.norm.fused import native
from cn_hf.norm.fused.agreement import EXAMPLES, Pairs, trusted, waves
from cn_hf.norm.fused.layout import stored

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
    features, components = x.shape[feature_dim], len(densities.constant)
    if (
        x.device.type != "cpu"
        or not trusted("combine", x.device, x.dtype)
        or any(tensor.device.type != "cpu" or tensor.is_neg() for tensor in (x, factor, *densities, *statistics, *rows))
        or any(row.shape != (features,) for row in (densities.shift, *rows))
        or any(table.shape != (components, features) for table in statistics)
        or is_in_torch_dispatch_mode()
    ):
        return None
    return _combine(x, densities, factor, statistics, eps, feature_dim, weight, bias)


def _combine(
    x: Tensor,
    densities: Densities,
    factor: Tensor,
    statistics: tuple[Tensor, Tensor],
    eps: float,
    feature_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    samples, features, components = x.shape[0], x.shape[feature_dim], len(densities.constant)
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


def _examples(module: Any, kernel: str, device: torch.device, dtype: torch.dtype) -> Pairs:
    """Of maps and of tokens, with and without an affine map."""
    for shape, feature_dim in (((2, 7, 67), 1), ((3, 67, 19), -1)):
        x, features = waves(shape, 0.37, device).to(dtype), shape[feature_dim]
        mean, var = waves((3, features), 0.9, device), waves((3, features), 0.7, device)
        shift = mean.mean(dim=0).float().double()
        rows = [waves((features,), rate, device) if feature_dim == 1 else None for rate in (0.5, 0.3)]
        densities, factor = Densities.of(mean, var + 1e-5, shift=shift), mean.new_ones(())
        found = _combine(x, densities, factor, (mean - shift, var), 1e-5, feature_dim, *rows)
        options: dict[str, Any] = {"eps": 1e-5, "feature_dim": feature_dim, "weight": rows[0], "bias": rows[1]}
        yield found, combine_in_pieces(x.double(), densities, factor, (mean - shift, var), **options)


EXAMPLES["combine"] = _examples
