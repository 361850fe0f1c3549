"""CN+ and MN on a CPU: calls of the compiled kernels, each one pass over ``x`` for all of ``pieces``.

Inputs are arranged as there: ``(N, C, L)`` with ``in_rows``, else ``(N, L, C)``. Posteriors are float32, and likewise
``(N, K, L)`` or ``(N, L, K)``.

Shape legend: as in ``pieces``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cn_hf.norm import kernels, native
from cn_hf.norm.combination import Combination
from cn_hf.norm.em import Densities

__all__ = ["combine", "handles", "log_posteriors"]


def handles(x: Tensor, shift: Tensor, *rows: Tensor | None) -> bool:
    """Whether there are kernels for such an ``x``, and a shift and rows like these."""
    tensors = [x, shift, *(row for row in rows if row is not None)]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and x.is_contiguous() and shift.dtype == torch.float32 and kernels.fused("cpu", x.dtype)


def log_posteriors(x: Tensor, densities: Densities, in_rows: bool) -> tuple[Tensor, Tensor]:
    """Logarithm of every component's posterior at every vector, and the largest of each component, ``(K,)``."""
    components = len(densities.constant)
    shape = (x.shape[0], components, x.shape[2]) if in_rows else (*x.shape[:2], components)
    log_tau, peak = densities.constant.new_empty(shape), densities.constant.new_empty(components)
    _mixture((None, log_tau, peak), x, in_rows, components, _tables_of(densities), float(densities.reach))
    return log_tau, peak


def combine(
    x: Tensor,
    known: Densities | Tensor,
    combination: Combination,
    shift: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    in_rows: bool,
) -> Tensor:
    """All components of every vector, weighted by its posteriors times a factor, like ``x``.

    Args:
        x: as arranged.
        known: the densities, or the logarithms of the posteriors.
        combination: of the components' statistics about the shift.
        shift: that of the densities, ``(C,)``.
        factor: ``(K,)`` or ``()``.
        weight: affine scale ``(C,)``, or None.
        bias: affine offset ``(C,)``, or None.
        in_rows: how ``x`` is arranged.
    """
    out, components = torch.empty_like(x), len(combination.scales)
    tables = {"shift": shift, "factor": factor.expand(components), "weight": weight, "bias": bias}
    tables |= zip(("center", "shared", "scales", "offsets"), combination, strict=True)
    if isinstance(known, Densities):
        _mixture((out, None, None), x, in_rows, components, tables | _tables_of(known), float(known.reach))
    else:
        _mixture((out, known, None), x, in_rows, components, tables)
    return out


def _tables_of(densities: Densities) -> dict[str, Tensor | None]:
    return {name: table for name, table in densities._asdict().items() if name != "reach"}


def _mixture(
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    in_rows: bool,
    components: int,
    tables: dict[str, Tensor | None],
    reach: float = 0.0,
) -> None:
    held = {name: None if table is None else table.float().contiguous() for name, table in tables.items()}
    samples, features, positions = x.shape if in_rows else (x.shape[0], x.shape[2], x.shape[1])
    sizes = samples, features, components, positions, int(in_rows)
    native.call("mixture_forward", x.dtype, *results, x, native.Components.of(reach, **held), *sizes)
