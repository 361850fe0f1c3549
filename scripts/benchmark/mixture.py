"""Mixture normalization in training: against batch norm, and against fitting scikit-learn's mixture to each batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cn_hf.norm import MixtureNorm
from scripts.benchmark.activations import Activations, Layout, dtype_name, layouts
from scripts.benchmark.races import Duel, race
from scripts.benchmark.rivals import fit_gaussian_mixture
from scripts.benchmark.rows import Row, Trial
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run

__all__ = ["trials"]

COMPONENTS = 3
MN, BN, FIT = "MN (K = 3)", "nn.BatchNorm2d", "GaussianMixture.fit alone"
VECTORS = 8192  # what the layer's EM sees of a batch, and the rival's


def trials(settings: Settings) -> list[Trial]:
    """Maps eagerly, small maps as a CUDA graph where there is a GPU, and the rival's fit."""
    maps, _, _, small = layouts(settings)
    dtypes = [torch.float32, torch.bfloat16] if settings.on_gpu else [torch.float32]
    chosen = settings.of(full=[maps, small], quick=[maps], smoke=[maps, small], gpu=[maps, small])
    found = [_step(layout, dtype, settings) for layout in chosen for dtype in dtypes]
    return [*found, _fit(maps, settings)]


def _step(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    graphs = settings.on_gpu and layout.name == "small maps"
    row = Row(
        what=f"{MN} on {layout.name}, step{', CUDA graph' if graphs else ''}",
        rival=BN,
        shape=layout.shape_in_words,
        dtype=dtype_name(dtype),
        headline=layout.name == "maps" and dtype == settings.headline_dtype,
    )

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, dtype, settings.device)
        norms = {
            MN: MixtureNorm(layout.num_features, COMPONENTS, affine=True, max_vectors=VECTORS),
            BN: nn.BatchNorm2d(layout.num_features),
        }
        return {name: partial(_run_step, norm.to(settings.device).train(), data) for name, norm in norms.items()}

    return race(f"MN on {layout.name}, {dtype_name(dtype)}", [Duel(MN, row)], contestants, settings, graphs=graphs)


def _fit(layout: Layout, settings: Settings) -> Trial:
    row = Row(
        what=f"{MN} on {layout.name}, step",
        rival=FIT,
        shape=layout.shape_in_words,
        headline=not settings.on_gpu,
        note=f"{VECTORS:,} vectors fitted",
    )

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, torch.float32, settings.device)
        norm = MixtureNorm(layout.num_features, COMPONENTS, affine=True, max_vectors=VECTORS)

        def fit() -> object:
            vectors = data.next()[0].detach().movedim(1, -1).reshape(-1, layout.num_features)
            return fit_gaussian_mixture(vectors[:: -(-len(vectors) // VECTORS)].cpu().numpy(), COMPONENTS)

        return {MN: partial(_run_step, norm.to(settings.device).train(), data), FIT: fit}

    return race("MN against fitting a mixture to each batch", [Duel(MN, row)], contestants, settings, calls=1)


def _run_step(norm: nn.Module, data: Activations) -> tuple[Tensor, ...]:
    x, grad = data.next()
    return torch.autograd.grad(norm(x), [x, *norm.parameters()], grad)
