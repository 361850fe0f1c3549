"""CN+ and MN on a CPU: calls of the compiled kernels, each one pass over ``x`` for all of ``pieces``.

Inputs are arranged as there: ``(N, C, L)`` with ``in_rows``, else ``(N, L, C)``. Posteriors are float32, and likewise
``(N, K, L)`` or ``(N, L, K)``.

Shape legend: as in ``pieces``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cn_hf.norm import kernels, native
from cn_hf.norm.combination import Combination, moments
from cn_hf.norm.em import Densities

__all__ = ["combine", "component_statistics", "handles", "log_posteriors"]

_SPAN = 1024  # kSpan of the source: less would leave segments without vectors, which is slower and no more
_MOST_SEGMENTS, _MOST_SUMS = 64, 2**24


def handles(
    x: Tensor,
    in_rows: bool,
    densities: Densities,
    statistics: tuple[Tensor, Tensor] | None,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Whether there are kernels for arguments like these, which are read as their shapes must be.

    What torch would broadcast or refuse is left to torch, and so is all while a dispatch mode wants to see operators.
    """
    features, components = x.shape[1 if in_rows else 2], len(densities.constant)
    shapes = (features,), (features, components), (features, components), (components,), (), (components,)
    expected: list[tuple[Tensor, tuple[int, ...]]] = list(zip(densities, shapes, strict=True))
    expected += [(table, (components, features)) for table in statistics or ()]
    expected += [(row, (features,)) for row in (weight, bias) if row is not None]
    expected.append((factor, (components,) if factor.dim() else ()))
    return (
        kernels.fused("cpu", x.dtype)
        and x.is_contiguous()
        and densities.shift.dtype == torch.float32
        and all(tensor.shape == shape for tensor, shape in expected)
        and all(tensor.device.type == "cpu" and not tensor.is_neg() for tensor, _ in [*expected, (x, x.shape)])
        and not is_in_torch_dispatch_mode()
    )


def log_posteriors(x: Tensor, densities: Densities, in_rows: bool) -> tuple[Tensor, Tensor]:
    """Logarithm of every component's posterior at every vector, and the largest of each component, ``(K,)``."""
    components = len(densities.constant)
    shape = (x.shape[0], components, x.shape[2]) if in_rows else (*x.shape[:2], components)
    log_tau, peak = densities.constant.new_empty(shape), densities.constant.new_empty(components)
    _mixture((None, log_tau, peak), x, in_rows, components, _tables_of(densities))
    return log_tau, peak


def component_statistics(
    x: Tensor, log_tau: Tensor, peak: Tensor, point: Tensor, in_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``combination.component_statistics_of_pieces`` of all of ``x`` and its posteriors, about a point ``(C,)``."""
    samples, features, positions = _sizes_of(x, in_rows)
    components = len(peak)
    spans = -(-samples * positions // _SPAN)
    # By shape alone, so that results depend on nothing else.
    segments = max(1, min(spans, _MOST_SEGMENTS, _MOST_SUMS // (components * features)))
    total = peak.new_empty(segments, components, 1)
    first, second = peak.new_empty(2, segments, components, features)
    sizes = samples, features, components, positions, segments, int(in_rows)
    point = point.contiguous()
    native.call("mixture_sums", x.dtype, total, first, second, log_tau, peak, x, point, *sizes)
    mean, var = moments(tuple(part.sum(dim=0) for part in (total, first, second)))
    return mean, var, peak + total.sum(dim=0)[:, 0].log()


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
        _mixture((out, None, None), x, in_rows, components, tables | _tables_of(known))
    else:
        _mixture((out, known, None), x, in_rows, components, tables)
    return out


def _sizes_of(x: Tensor, in_rows: bool) -> tuple[int, int, int]:
    """Samples, features, positions of a sample."""
    return (x.shape[0], x.shape[1], x.shape[2]) if in_rows else (x.shape[0], x.shape[2], x.shape[1])


def _tables_of(densities: Densities) -> dict[str, Tensor | None]:
    return {name: table for name, table in densities._asdict().items() if name != "constant"}


def _mixture(
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    in_rows: bool,
    components: int,
    tables: dict[str, Tensor | None],
) -> None:
    held = {name: None if table is None else table.float().contiguous() for name, table in tables.items()}
    samples, features, positions = _sizes_of(x, in_rows)
    sizes = samples, features, components, positions, int(in_rows)
    rows, work = native.Components.of(**held), samples * positions * max(features, components)
    native.call("mixture_forward", x.dtype, *results, x, rows, *sizes, work=work)
