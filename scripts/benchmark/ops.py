"""Eq. 8 alone and as a layer, against the norms it replaces, torch's own operators, a loop over contexts and a copy.

CN is timed as ``context_norm`` with tables of statistics given ("CN op"), as the layer with the paper's embedder ("CN
layer"), and, on tokens, as the slot that ``patch_model`` makes of a LayerNorm ("LN → CN slot"). All have an affine map,
as the norms have. A step is a forward and the gradients of the input and of all parameters.

N samples, C features, T contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cn_hf.norm import ContextNorm
from cn_hf.norm.functional import context_norm
from cn_hf.norm.fused.operators import use_kernels
from cn_hf.patching import patch_model
from scripts.benchmark.activations import NUM_CONTEXTS, Activations, Layout, dtype_name, layouts
from scripts.benchmark.races import Duel, race
from scripts.benchmark.rivals import LoopOverContexts
from scripts.benchmark.rows import BANDWIDTH, MEMORY, Row, Trial, single
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run, peak_bytes, saved_bytes

__all__ = ["trials"]

OP, LAYER, SLOT = "CN op", "CN layer", "LN → CN slot"
REFERENCE, LOOP, COPY = "torch reference", "loop over contexts", "copy"
COUNTS = (2, 10, 100, 1000)
"""Numbers of contexts whose cost must not differ."""

LIMITS: dict[tuple[str, bool], float] = {
    ("cuda", True): 0.75, ("cuda", False): 1.0, ("cpu", True): 1.0, ("cpu", False): 1.2,
}  # fmt: skip
"""Of a step's time, by device and whether on maps."""

Call = Callable[[Tensor, Tensor], Tensor]


def trials(settings: Settings) -> list[Trial]:
    """Forward, step and memory of each layout and dtype, then steps with more and more contexts."""
    dtypes = [torch.float32, torch.bfloat16]
    used = settings.of(full=dtypes, quick=dtypes[:1], smoke=dtypes, gpu=dtypes)
    found = []
    for layout in layouts(settings):
        for dtype in used:
            found += [make(layout, dtype, settings) for make in (_forward, _step, _memory)]
    maps, _, tokens, _ = layouts(settings)
    for layout, dtype in ((maps, torch.float32), (tokens, settings.headline_dtype)):
        found.append(_contexts(layout, dtype, settings))
    return found


# ---------------------------------------------------------------------------------------------------------- the trials


def _forward(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    new = partial(_row, layout, dtype)
    amount = 2 * layout.num_elements * dtype.itemsize / 1e9, "GB/s"
    limit = 0.85 if settings.on_gpu else None
    headline = settings.on_gpu and dtype == settings.headline_dtype
    duels = []
    for name in _own(layout):
        copied = new(f"{name} on {layout.name}, forward", COPY, unit=BANDWIDTH, at_least=True)
        if name == OP:
            copied = new(copied.what, COPY, unit=BANDWIDTH, at_least=True, limit=limit, headline=headline)
        duels += [
            Duel(name, copied, amount),
            *(Duel(name, new(copied.what, rival)) for rival in (_norm_name(layout), *_designs(name))),
        ]

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, dtype, settings.device)
        modules = _modules(layout, dtype, settings.device)
        runs: dict[str, Run] = {name: partial(_run_forward, call, data) for name, (call, _) in modules.items()}
        return runs | {COPY: lambda: data.next()[0].detach().clone()}

    title = f"forward on {layout.name}, {dtype_name(dtype)}"
    return race(title, duels, contestants, settings, graphs=True, eager=(LOOP,))


def _step(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    new = partial(_row, layout, dtype)
    rival = _norm_name(layout)
    limited = settings.on_gpu or dtype == torch.float32
    limit = LIMITS[settings.device.type, layout.on_maps] if limited else None
    duels = []
    for name in _own(layout):
        what = f"{name} on {layout.name}, step"
        headline = name != OP and dtype == settings.headline_dtype
        duels.append(Duel(name, new(what, rival, limit=limit, headline=headline)))
        duels += [Duel(name, new(what, other)) for other in _designs(name)]

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, dtype, settings.device)
        modules = _modules(layout, dtype, settings.device)
        return {name: partial(_run_step, call, owned, data) for name, (call, owned) in modules.items()}

    return race(f"step on {layout.name}, {dtype_name(dtype)}", duels, contestants, settings, graphs=True, eager=(LOOP,))


def _memory(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    rival = _norm_name(layout)
    what = "peak memory of a step" if settings.on_gpu else "memory kept for backward"
    names = [name for name in _own(layout) if name != OP]
    rows = [_row(layout, dtype, f"{name} on {layout.name}, {what}", rival, unit=MEMORY) for name in names]

    def measure() -> list[Row]:
        data = Activations(layout, dtype, settings.device)
        modules = _modules(layout, dtype, settings.device)

        def size(name: str) -> int:
            call, owned = modules[name]
            if settings.on_gpu:
                return peak_bytes(partial(_run_step, call, owned, data), settings.device)
            return saved_bytes(partial(_run_forward, call, data), without=owned)

        base = size(rival)
        sizes = [size(name) for name in names]
        return [
            single(row, own / base, note=f"{own / 1e6:,.1f} against {base / 1e6:,.1f} MB")
            for row, own in zip(rows, sizes, strict=True)
        ]

    return Trial(f"memory on {layout.name}, {dtype_name(dtype)}", tuple(rows), measure)


def _contexts(layout: Layout, dtype: torch.dtype, settings: Settings) -> Trial:
    """A layer with more contexts than the batch has samples looks up only the samples' rows."""
    few, *more = (f"T = {count:,}" for count in COUNTS)
    limit = 1.1 if settings.on_gpu else None
    duels = [
        Duel(
            name,
            _row(layout, dtype, f"{LAYER} on {layout.name}, {name}, step", few, limit=limit, headline=name == more[-1]),
        )
        for name in more
    ]

    def contestants() -> Mapping[str, Run]:
        data = Activations(layout, dtype, settings.device)
        runs: dict[str, Run] = {}
        for count in COUNTS:
            layer = _layer(layout, count, settings.device)
            ids = torch.arange(layout.shape[0], device=settings.device) % count
            runs[f"T = {count:,}"] = partial(_run_step, layer, [*layer.parameters()], data, ids)
        return runs

    return race(f"numbers of contexts on {layout.name}", duels, contestants, settings, graphs=True)


# ------------------------------------------------------------------------------------------------------- what is timed


def _own(layout: Layout) -> tuple[str, ...]:
    return (OP, LAYER) if layout.on_maps else (OP, LAYER, SLOT)


def _norm_name(layout: Layout) -> str:
    return "nn.BatchNorm2d" if layout.on_maps else "nn.LayerNorm"


def _designs(name: str) -> tuple[str, ...]:
    """Other ways to compute the same, or what the authors do."""
    return {OP: (REFERENCE,), LAYER: (LOOP,), SLOT: (f"{SLOT}, {REFERENCE}",)}[name]


def _row(layout: Layout, dtype: torch.dtype, what: str, rival: str, **options: object) -> Row:
    return Row(what=what, rival=rival, shape=layout.shape_in_words, dtype=dtype_name(dtype), **options)  # type: ignore[arg-type]


def _modules(layout: Layout, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Call, list[Tensor]]]:
    """Functions of (x, context_ids), in training, and the tensors whose gradients a step computes, by name."""
    features, dim = layout.num_features, layout.feature_dim
    mean, var = torch.zeros(NUM_CONTEXTS, features, device=device), torch.ones(NUM_CONTEXTS, features, device=device)
    tables = [tensor.requires_grad_() for tensor in (mean, var, torch.ones_like(mean[0]), torch.zeros_like(mean[0]))]

    def op(x: Tensor, context_ids: Tensor) -> Tensor:
        mean, var, weight, bias = tables
        return context_norm(x, mean, var, context_ids, feature_dim=dim, weight=weight, bias=bias)

    layer, loop = _layer(layout, NUM_CONTEXTS, device), LoopOverContexts(features, NUM_CONTEXTS, feature_dim=dim)
    norm = nn.BatchNorm2d(features, device=device) if dim == 1 else nn.LayerNorm(features, device=device, dtype=dtype)
    found: dict[str, tuple[Call, list[Tensor]]] = {
        OP: (op, tables),
        REFERENCE: (_by_reference(op), tables),
        LAYER: (layer, [*layer.parameters()]),
        LOOP: (loop.to(device), [*loop.parameters()]),
        _norm_name(layout): (lambda x, context_ids: norm(x), [*norm.parameters()]),
    }
    if dim == -1:
        slot = _patched_layer_norm(features, dtype, device)
        parameters: list[Tensor] = [*slot.parameters()]

        def slot_call(x: Tensor, context_ids: Tensor) -> Tensor:
            out: Tensor = slot(x, context_ids=context_ids)
            return out

        found[SLOT] = slot_call, parameters
        found[f"{SLOT}, {REFERENCE}"] = _by_reference(slot_call), parameters
    return found


def _layer(layout: Layout, num_contexts: int, device: torch.device) -> ContextNorm:
    return ContextNorm(
        layout.num_features, num_contexts, feature_dim=layout.feature_dim, affine=True, device=device
    ).train()


def _patched_layer_norm(features: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network of one LayerNorm that ``patch_model`` made LN → CN → affine."""
    model = nn.Sequential(nn.LayerNorm(features, device=device, dtype=dtype)).train()
    return patch_model(model, mode="cn-patches", where="norms", num_contexts=NUM_CONTEXTS)


def _by_reference(call: Call) -> Call:
    def by_reference(x: Tensor, context_ids: Tensor) -> Tensor:
        with use_kernels("reference"):
            return call(x, context_ids)

    return by_reference


def _run_forward(call: Call, data: Activations) -> Tensor:
    return call(data.next()[0], data.context_ids)


def _run_step(
    call: Call, owned: list[Tensor], data: Activations, context_ids: Tensor | None = None
) -> tuple[Tensor, ...]:
    x, grad = data.next()
    out = call(x, data.context_ids if context_ids is None else context_ids)
    # A loop over contexts leaves those that no sample has without a gradient.
    return torch.autograd.grad(out, [x, *owned], grad, allow_unused=True)
