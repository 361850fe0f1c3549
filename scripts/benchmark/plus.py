"""CN+ (Eq. 9), for inputs of unknown context: against CN, and against the matrix products that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cn_hf.norm.functional import context_norm, context_norm_plus
from scripts.benchmark.activations import NUM_CONTEXTS, Activations, Layout, dtype_name, layouts
from scripts.benchmark.races import Duel, race
from scripts.benchmark.rivals import MatrixProducts
from scripts.benchmark.rows import MEMORY, Row, Trial, single
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run, peak_bytes

__all__ = ["trials"]

CN = "CN forward"
LEARNED, BATCH = "CN+ (learned, none)", "CN+ (batch, sqrt_t)"
OPTIONS: dict[str, dict[str, Any]] = {
    LEARNED: {"plus_stats": "learned", "plus_scale": "none"},
    BATCH: {"plus_stats": "batch", "plus_scale": "sqrt_t"},
}
PRODUCTS = {LEARNED: "its four products and softmax", BATCH: "its six products and softmax"}


def trials(settings: Settings) -> list[Trial]:
    """Maps, tokens and small maps; on a GPU in both dtypes, and the memory taken."""
    maps, _, tokens, small = layouts(settings)
    used = [torch.float32, torch.bfloat16] if settings.on_gpu else [torch.float32]
    chosen = settings.of(full=[maps, tokens, small], quick=[maps, tokens], smoke=[maps, tokens, small])
    found = [_time(layout, dtype, settings) for layout in chosen for dtype in used]
    if settings.on_gpu:
        found += [_memory(layout, settings) for layout in chosen]
    return found


def _time(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    new = partial(Row, shape=layout.shape_in_words, dtype=dtype_name(dtype))
    duels = []
    for name, products in PRODUCTS.items():
        limit = 1.5 if name == LEARNED and not settings.on_gpu else None  # the kernel's; all else is torch's operators
        what, headline = f"{name} on {layout.name}", name == LEARNED and layout.name != "small maps"
        headline = headline and dtype == settings.headline_dtype
        duels.append(Duel(name, new(what=what, rival=CN, headline=headline and settings.on_gpu)))
        # Products in float32 whatever the dtype of x: so are those of CN+.
        duels.append(Duel(name, new(what=what, rival=products, limit=limit, headline=headline and not settings.on_gpu)))

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, dtype, settings.device, requires_grad=False)
        mean, var = _statistics(layout, settings.device)
        vectors = data.x[0].movedim(layout.feature_dim, -1).reshape(-1, layout.num_features).float()
        runs: dict[str, Run] = {
            CN: lambda: context_norm(data.next()[0], mean, var, data.context_ids, feature_dim=layout.feature_dim)
        }
        for name, products in PRODUCTS.items():
            runs[name] = partial(_plus, name, data, mean, var)
            runs[products] = MatrixProducts(vectors, NUM_CONTEXTS, with_statistics=name == BATCH)
        return runs

    return race(f"CN+ on {layout.name}, {dtype_name(dtype)}", duels, contestants, settings, graphs=True)


def _memory(layout: Layout, settings: Settings) -> Trial:
    """Return the bytes that the forward takes, over x and one posterior a vector and context."""
    rows = [
        Row(what=f"{name} on {layout.name}, peak memory", rival="x and all posteriors", shape=layout.shape_in_words,
            unit=MEMORY)
        for name in PRODUCTS
    ]  # fmt: skip

    def measure() -> list[Row]:
        data = Activations(layout, torch.float32, settings.device, requires_grad=False)
        mean, var = _statistics(layout, settings.device)
        base = 4 * layout.num_elements * (1 + NUM_CONTEXTS / layout.num_features)
        sizes = [peak_bytes(partial(_plus, name, data, mean, var), settings.device) for name in PRODUCTS]
        return [
            single(row, size / base, note=f"{size / 1e6:,.0f} against {base / 1e6:,.0f} MB")
            for row, size in zip(rows, sizes, strict=True)
        ]

    return Trial(f"memory of CN+ on {layout.name}", tuple(rows), measure)


def _statistics(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = NUM_CONTEXTS, layout.num_features
    return torch.randn(shape, device=device) / 4, torch.rand(shape, device=device) + 0.5


def _plus(name: str, data: Activations, mean: Tensor, var: Tensor) -> Tensor:
    return context_norm_plus(data.next()[0], mean, var, feature_dim=data.layout.feature_dim, **OPTIONS[name])
