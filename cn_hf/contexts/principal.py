"""Principal components over chunks of vectors, and coordinates along them.

Shape legend: ``N`` vectors, ``F`` features, ``D`` principal components.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.contexts.chunks import Rows, map_chunks
from cn_hf.contexts.row_store import RowStore
from cn_hf.contexts.shared_rows import SharedRows

__all__ = ["principal_components", "project", "project_all"]

_PROJECTED_ROWS = 8192  # at a time


def principal_components(
    x: Rows | SharedRows, num_components: int, *, seed: int = 0, num_passes: int = 4
) -> tuple[Tensor, Tensor]:
    """Leading principal components by randomised subspace iteration (Halko, Martinsson and Tropp 2011) over chunks.

    Args:
        x: ``(N, F)``, floating point or uint8.
        num_components: ``D``, at most ``min(N, F)``.
        seed: of the random start.
        num_passes: passes over ``x`` that turn the subspace.

    Returns:
        mean ``(F,)`` and orthonormal components ``(D, F)``, strongest first; float32.
    """
    data = SharedRows.of(x)
    features, of_first = data.num_features, data.processes.of_first
    [total] = data.sum(lambda chunk: [chunk.sum(dim=0, dtype=torch.float64)], torch.float32, "mean image")
    mean = (total / data.count).float()
    width = min(features, num_components + 10)  # oversampling, as the paper advises
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, width, generator=generator).to(data.device)).Q
    for number in range(num_passes):
        [basis] = of_first([basis])
        basis = torch.linalg.qr(_covariance_times(data, mean, basis, f"principal components, pass {number + 1}")).Q
    [basis] = of_first([basis])
    small = basis.T @ _covariance_times(data, mean, basis, f"principal components, pass {num_passes + 1}")
    rotation = torch.linalg.eigh((small + small.T) / 2).eigenvectors.flip(1)[:, :num_components]
    [components] = of_first([(basis @ rotation).T.contiguous()])
    return mean, components


def _covariance_times(data: SharedRows, mean: Tensor, basis: Tensor, progress: str) -> Tensor:
    def product(chunk: Tensor) -> list[Tensor]:
        chunk = chunk - mean
        return [chunk.T @ (chunk @ basis)]

    [total] = data.sum(product, torch.float32, progress)
    return (total / data.count).float()


def project(x: Rows, mean: Tensor, components: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Coordinates of vectors along principal components.

    Args:
        x: ``(N, F)``, floating point or uint8.
        mean: ``(F,)``.
        components: ``(D, F)``.
        device: where to compute; None: where ``x`` is.

    Returns:
        float64 ``(N, D)``, on the device of ``x``.
    """
    mean, components = (part.to(device or x.device, torch.float64) for part in (mean, components))
    out = mean.new_empty(len(x), len(components))
    return map_chunks(x, torch.float64, lambda chunk: (chunk - mean) @ components.T, out).to(x.device)


def project_all(x: SharedRows, mean: Tensor, components: Tensor, store: RowStore) -> SharedRows:
    """As ``project``, of all vectors, to float32 ``(N, D)`` held by ``store``. Collective."""
    hidden = None if x.processes.first else True

    def walk() -> Rows:
        starts = range(0, max(1, len(x.rows)), _PROJECTED_ROWS)
        for start in tqdm(starts, desc="projecting", disable=hidden, leave=False):
            part = x.rows[start : start + _PROJECTED_ROWS]
            store.append(project(part, mean, components, device=x.device).float())
        return store.rows(len(components), torch.float32)

    return SharedRows(x.processes.attempt(walk), x.processes, x.device)
