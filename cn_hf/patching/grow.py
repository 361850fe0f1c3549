"""A trained model's contexts change: add some, remove some, train nothing else.

A context is a row of the embedder's ``W_r`` or of the tables (and of the batch statistics of ``"dsbn"``), so adding or
removing one is adding or removing rows; what the other contexts compute stays as it was, bit for bit.

Shape legend: ``C`` features, ``T`` contexts, ``d`` embedding width, ``n`` new contexts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError, InputTypeError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.norm.functional import context_rows
from cn_hf.norm.ids import resolve_context_ids
from cn_hf.patching.batches import Batch, read_batches, read_images
from cn_hf.patching.calibrate import (
    check_names_to_images,
    keep_moments,
    measured_contexts,
    stored_moments,
    warn_of_few,
)
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.convert import Slot
from cn_hf.patching.measure import calibrated_slots, rows_of
from cn_hf.patching.moments import Rows, StoredMoments
from cn_hf.patching.patch import context_parameters, own_slots
from cn_hf.patching.reference import Reference, check_amounts, context_index, find_reference
from cn_hf.patching.routing import router_of

__all__ = [
    "add_contexts",
    "add_known_context",
    "give_own_dimensions",
    "own_dimension",
    "remove_contexts",
    "train_only_contexts",
]

Grown: TypeAlias = ContextNorm | DomainBatchNorm
Plan: TypeAlias = list[tuple[Grown, dict[str, Tensor]]]
"""New values of the tensors that change, normalizer by normalizer."""

_ROWS = {
    "embedder": ("embedding",),
    "table": ("mean_table", "var_table"),
    "dsbn": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}


def add_contexts(
    model: nn.Module,
    names: str | Sequence[str] | int | None = None,
    *,
    start: str | int | Tensor | Mapping[str, Any] | Iterable[Any] | None = None,
    reference: Any = None,
    prior: float = 4.0,
    max_images: int = 512,
) -> nn.Module:
    """Give a patched model more contexts, in place, after those it has: ids ``T``, ``T + 1``, ...

    In evaluation the output for the contexts it had stays bit-equal (float32 models on the CPU and on CUDA). As with
    transformers' ``resize_token_embeddings``, parameters stay the same objects and grow in place, so parameter groups
    still hold them; their gradients are dropped. What an optimizer has averaged for them no longer fits and its next
    step would fail: forget it by ``for p in cn_hf.context_parameters(model): optimizer.state.pop(p, None)``, or make a
    new optimizer. Grow before wrapping in DDP or FSDP.

    Args:
        model: a patched model of a mode with contexts.
        names: names of the new contexts; or how many, where the model's contexts have no names. None for the names in
            ``start``.
        start: where the new contexts start from. None: the mean of all contexts' rows. The name or id of a context, or
            weights ``(T,)`` or ``(1, T)``: that context's row, or the weighted mean. ``{name: images}``: measured on
            unlabelled images, relative to the reference, as in ``calibrate``. Batches that carry contexts, as in
            ``calibrate``, with new names or ids (samples of other contexts are passed over): the mean and variance of
            the slots' real inputs. An embedder becomes one wider for each measured context, to hold the rows exactly.
        reference: of measured contexts, as in ``calibrate``.
        prior: of ``{name: images}``: how many images the reference counts for, as in ``calibrate``.
        max_images: of each context, the first ones.

    Returns:
        The same object. An attached context source is detached, with a warning, because it does not know the new
        contexts.

    Raises:
        ConfigError: a name is taken; or names were given to a model without, or none to one with names.
        ContextIdError: there is no such context to start from, or a batch's ids are invalid.
        DatasetError: there is no image of a name, or a pixel is NaN or infinite.
        InputTypeError: ``names`` or ``start`` is of another type.
        PatchError: the model is not patched, or with a baseline; or reference images are needed. Whatever the error,
            the model is unchanged.

    Example:
        >>> import cn_hf, timm, torch
        >>> model = timm.create_model("test_resnet").eval()
        >>> model = cn_hf.patch_model(model, "cn-channels", context_names=["source"])
        >>> model = cn_hf.add_contexts(model, start={"fog": torch.randn(16, 3, 64, 64) * 0.1 + 1})
    """
    config, norms = _contexts_of(model)
    check_amounts(prior, max_images)
    if isinstance(start, Mapping):
        check_names_to_images(start)
        names = _names_of(start, names)
    elif names is None:
        raise InputTypeError("Expected names of the new contexts, or start={name: images}; received neither.")
    count, new_names = _new_names(names, config.context_names)
    grown = _resized(
        config,
        norms,
        config.num_contexts + count,
        None if config.context_names is None else (*config.context_names, *new_names),
    )
    if start is None or isinstance(start, (str, int, Tensor)):
        plan = _started(norms, _start(start, config), count)
        moments = {name: stored.grown(count) for name, stored in router_of(model).moments.items()}
        _commit(model, plan, grown, moments)
        return model
    measured = _measured_start(model, grown, count, start, reference, prior, max_images)
    plan = _started(norms, measured.weights, count)
    plan = [
        (norm, _with_measured(norm, tensors, rows, measured.contexts))
        for (norm, tensors), rows in zip(plan, measured.rows, strict=True)
    ]
    _commit(model, plan, _wider(grown, norms, count), measured.moments)
    return model


def add_known_context(
    model: nn.Module,
    name: str,
    rows: Mapping[str, Rows],
    *,
    affine: Mapping[str, Mapping[str, Tensor]] | None = None,
    moments: Mapping[str, Rows] | None = None,
    images: float = 0,
) -> nn.Module:
    """Give a patched model one more context whose statistics are known, in place; see ``add_contexts``.

    Args:
        model: a patched model of a mode with contexts.
        name: of the new context.
        rows: its statistics at each slot, by slot name, ``(1, C)``.
        affine: ``weight`` and ``bias`` of the slots (``"dsbn"``), ``(1, C)``; None for the mean of all contexts'.
        moments: of its real inputs at each slot, ``(1, C)``; they are kept beside the model.
        images: how many images ``moments`` were measured on.

    Raises:
        ConfigError: the name is taken, or the model's contexts have no names.
        PatchError: the model is not patched, or with a baseline, or has other slots. Whatever the error, the model is
            unchanged.
    """
    config, norms = _contexts_of(model)
    slots, new = calibrated_slots(model), config.num_contexts
    known = {slot: tuple(row.mean.shape) for slot, row in rows.items()}
    if known != {slot: (1, part.normalizer.num_features) for slot, part in slots.items()}:
        raise PatchError(
            f"Expected statistics of the model's {len(slots)} slots, received those of {len(known)} slots of another "
            "model, or of other widths. Add a context to the model that it was measured in."
        )
    _, names = _new_names(name, config.context_names)
    grown = _resized(config, norms, new + 1, (*cast("tuple[str, ...]", config.context_names), *names))
    plan: Plan = []
    for (norm, tensors), slot in zip(_started(norms, _start(None, config), 1), slots, strict=True):
        own = {part: _ending_in(tensors[part], value) for part, value in (affine or {}).get(slot, {}).items()}
        plan.append((norm, _with_measured(norm, tensors | own, rows[slot], [new])))
    kept = {slot: stored.grown(1) for slot, stored in stored_moments(router_of(model), slots).items()}
    for slot, row in (moments or {}).items():
        kept[slot].put(new, row, images)
    _commit(model, plan, _wider(grown, norms, 1), kept)
    return model


def remove_contexts(model: nn.Module, names: str | int | Sequence[str | int]) -> nn.Module:
    """Take contexts from a patched model, in place; ids of the contexts behind them move down.

    What holds for the output of the other contexts, for parameters and optimizers, is as in ``add_contexts``.

    Args:
        model: a patched model of a mode that is told contexts.
        names: names or ids of the contexts.

    Returns:
        The same object. A context source that was attached is not any more, with a warning.

    Raises:
        ConfigError: no context would be left, or one is named twice.
        ContextIdError: there is no such context.
        PatchError: the model is not patched, or with a baseline. Whatever the error, the model is unchanged.
    """
    config, norms = _contexts_of(model)
    if not isinstance(names, (str, int, Sequence)):
        raise InputTypeError(f"names must be names or ids of contexts, received {names!r}.")
    chosen = [names] if isinstance(names, (str, int)) else list(names)
    gone = {context_index(name, config) for name in chosen}
    if len(gone) != len(chosen) or not gone:
        raise ConfigError(f"remove_contexts expects different contexts, at least one; received {chosen}.")
    left = [index for index in range(config.num_contexts) if index not in gone]
    if not left:
        raise ConfigError(f"remove_contexts would leave none of {config.num_contexts} contexts; keep at least one.")
    plan: Plan = [
        (norm, {name: tensor.detach()[torch.tensor(left)] for name, tensor in _rows_of(norm).items()}) for norm in norms
    ]
    kept = None if config.context_names is None else tuple(config.context_names[index] for index in left)
    moments = {name: stored.select(left) for name, stored in router_of(model).moments.items()}
    _commit(model, plan, _resized(config, norms, len(left), kept), moments)
    router_of(model).select(left)
    return model


def own_dimension(norm: ContextNorm, context: int) -> int | None:
    """Return a dimension of an embedder that no other context uses, so that it moves this one alone; None if none."""
    embedding = norm.embedding.detach()
    alone = ((embedding != 0).sum(dim=0) == 1) & (norm.embedding_bias.detach() == 0)
    size = embedding[context].abs() * alone
    return int(size.argmax()) if float(size.max()) > 0.1 else None


def give_own_dimensions(model: nn.Module, contexts: Sequence[int]) -> None:
    """Widen a model's embedders by a dimension for each context that has none that is its own; no output changes.

    Parameters stay the same objects, and lose their gradients, as in ``add_contexts``.
    """
    config, norms = _contexts_of(model)
    embedders = [n for n in norms if isinstance(n, ContextNorm) and n.parametrization == "embedder"]
    lacking = [c for c in contexts if any(own_dimension(norm, c) is None for norm in embedders)]
    if not lacking:
        return
    for norm in embedders:
        embedding, count = norm.embedding.detach(), len(lacking)
        unit = embedding.new_zeros(len(embedding), count)
        unit[lacking, list(range(count))] = 1
        new = {"embedding": torch.cat([embedding, unit], dim=1)}
        bias = norm.embedding_bias.detach()
        new["embedding_bias"] = torch.cat([bias, bias.new_zeros(count)])
        for kind in ("mean_weight", "var_weight"):
            weight = getattr(norm, kind).detach()
            new[kind] = torch.cat([weight, weight.new_zeros(len(weight), count)], dim=1)
        _assign(norm, new, config.num_contexts)
    router_of(model).config = config.replace(embedding_dim=embedders[0].embedding_dim)


def train_only_contexts(model: nn.Module) -> nn.Module:
    """Freeze all of a patched model but the parameters its contexts have (``context_parameters``).

    A classifier can be trained beside them: ``model.get_classifier().requires_grad_(True)``. Batch norms that were not
    swapped move their running statistics in training mode all the same. ``model.requires_grad_(True)`` undoes it.

    Args:
        model: a patched model.

    Returns:
        The same object.

    Raises:
        PatchError: the model is not patched, or its normalizers have no parameters.
    """
    chosen = context_parameters(model)
    if not chosen:
        raise PatchError(
            f"Nothing would be left to train: mode={router_of(model).config.mode!r} gave this model no parameters."
        )
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model


# -------------------------------------------------------------------------------------------------------------- checks


def _contexts_of(model: nn.Module) -> tuple[ContextNormConfig, list[Grown]]:
    config = router_of(model).config
    if config.mode in BASELINES:
        raise PatchError(f"The model was patched with mode={config.mode!r}, which is not told contexts.")
    return config, [cast(Grown, slot.normalizer) for slot in _slots(model)]


def _slots(model: nn.Module) -> list[Slot]:
    return [slot for _, slot in own_slots(model)]


def _new_names(names: str | Sequence[str] | int, known: tuple[str, ...] | None) -> tuple[int, tuple[str, ...]]:
    if isinstance(names, int) and not isinstance(names, bool):
        if known is not None:
            raise ConfigError(f"The model's contexts have names; give names for {names} more, not their number.")
        if names < 1:
            raise ConfigError(f"The number of contexts to add must be at least 1, received {names}.")
        return names, ()
    chosen = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Sequence) else None
    if chosen is None or not all(isinstance(name, str) for name in chosen):
        raise InputTypeError(f"names must be names of contexts, or how many to add, received {names!r}.")
    if not chosen:
        raise ConfigError("add_contexts received no name.")
    if known is None:
        raise ConfigError(
            f"The model's contexts have no names, only ids: pass how many to add, {len(chosen)}, instead of {chosen}."
        )
    taken = [name for name in chosen if name in known]
    if taken:
        raise ConfigError(f"The model has contexts of these names already: {', '.join(map(repr, taken))}.")
    return len(chosen), chosen


def _names_of(start: Mapping[str, Any], names: Any) -> tuple[str, ...]:
    given = tuple(start)
    if names is not None and {names} if isinstance(names, str) else set(names or given) != set(given):
        raise ConfigError(f"Expected the names of start, {list(given)}, received names={names!r}. Leave names out.")
    return given


def _start(start: str | int | Tensor | None, config: ContextNormConfig) -> int | Tensor:
    """An id, or float64 weights ``(1, T)``."""
    if start is None:
        return torch.full((1, config.num_contexts), 1 / config.num_contexts, dtype=torch.float64)
    if not isinstance(start, Tensor) or not start.is_floating_point():
        return context_index(start.squeeze() if isinstance(start, Tensor) else start, config)
    weights = start.detach().double().cpu().reshape(-1)
    if len(weights) != config.num_contexts or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-3:
        raise ContextIdError(
            f"Weights to start from must be {config.num_contexts} numbers that are not negative and sum to one, "
            f"received {start.tolist()}."
        )
    return weights[None]


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows_of(norm: Grown) -> dict[str, Tensor]:
    """The tensors with a row a context, by name."""
    names = _ROWS[norm.parametrization if isinstance(norm, ContextNorm) else "dsbn"]
    return {name: getattr(norm, name) for name in names if getattr(norm, name) is not None}


def _with_rows(tensor: Tensor, start: int | Tensor, count: int) -> Tensor:
    """``tensor`` with ``count`` more rows, each a copy of one row or a weighted mean of all, in its own dtype."""
    table = tensor.detach()
    if isinstance(start, int):
        row = context_rows(table, start)
    else:
        wide = table.double().unsqueeze(-1) if table.dim() == 1 else table.double()
        row = context_rows(wide, start.to(table.device)).reshape(1, *table.shape[1:])
        row = (row if table.is_floating_point() else row.round()).to(table.dtype)
    return torch.cat([table, row.expand(count, *table.shape[1:])])


def _resized(
    config: ContextNormConfig, norms: list[Grown], num_contexts: int, names: tuple[str, ...] | None
) -> ContextNormConfig:
    """The config of as many contexts; an embedder keeps its width, whatever the default is for their number."""
    widths = {norm.embedding_dim for norm in norms if isinstance(norm, ContextNorm)}
    width = widths.pop() if len(widths) == 1 else config.embedding_dim
    return config.replace(num_contexts=num_contexts, context_names=names, embedding_dim=width)


@dataclass(frozen=True, slots=True)
class _MeasuredStart:
    """New contexts as measured.

    Attributes:
        weights: of the contexts whose affine maps (``"dsbn"``) the new ones take, ``(1, T)``.
        rows: statistics ``(n, C)`` of each slot, in order.
        contexts: ids of the new contexts.
        moments: what is kept of the slots' inputs, for all contexts.
    """

    weights: int | Tensor
    rows: list[Rows]
    contexts: list[int]
    moments: dict[str, StoredMoments]


def _started(norms: list[Grown], start: int | Tensor, count: int) -> Plan:
    return [
        (norm, {name: _with_rows(tensor, start, count) for name, tensor in _rows_of(norm).items()}) for norm in norms
    ]


def _measured_start(
    model: nn.Module,
    grown: ContextNormConfig,
    count: int,
    start: Any,
    reference: Any,
    prior: float,
    max_images: int,
) -> _MeasuredStart:
    router, slots = router_of(model), calibrated_slots(model)
    new = list(range(grown.num_contexts - count, grown.num_contexts))
    named = isinstance(start, Mapping)
    if named:
        images = {
            context: read_images(value, f"of context {name!r}", max_images)
            for context, (name, value) in zip(new, start.items(), strict=True)
        }
        warn_of_few({name: sum(b.size for b in images[c]) for c, name in zip(new, start, strict=True)}, prior)
    else:
        images = _new_images(start, grown, new, max_images)
    relative = named or reference is not None
    found = find_reference(model, reference, max_images) if relative else _mean_of_all(slots)
    seen = measured_contexts(model, images, found if relative else None, prior if named else 0.0, like=found.weights)
    if not seen:
        raise PatchError("The images reached no slot: forward of this model calls none of its patched layers.")
    rows = []
    for name in slots:
        parts = [seen[context][name][0].rows if name in seen[context] else found.rows[name] for context in new]
        rows.append(Rows(*(torch.cat(values) for values in zip(*parts, strict=True))))
    if not all(bool(part.isfinite().all()) for pair in rows for part in pair):
        raise PatchError("Activations of the images are not finite: their context cannot be measured.")
    moments = {name: kept.grown(count) for name, kept in stored_moments(router, slots).items()}
    if relative:
        found.keep_moments(moments)
    for context in new:
        keep_moments(moments, context, seen[context])
    return _MeasuredStart(found.weights, rows, new, moments)


def _mean_of_all(slots: dict[str, Slot]) -> Reference:
    rows = {name: rows_of(slot) for name, slot in slots.items()}
    num_contexts = len(next(iter(rows.values())).mean)
    weights = torch.full((1, num_contexts), 1 / num_contexts, dtype=torch.float64)
    return Reference(weights, {name: row.weighted(weights) for name, row in rows.items()}, {}, 0)


def _new_images(start: Any, grown: ContextNormConfig, new: list[int], max_images: int) -> dict[int, list[Batch]]:
    """Read the samples of new contexts from batches that carry contexts."""
    held = read_batches(
        start,
        num_contexts=grown.num_contexts,
        resolve=lambda ids, size: resolve_context_ids(
            ids,
            num_contexts=grown.num_contexts,
            batch_size=size,
            device=torch.device("cpu"),
            names=grown.context_names,
        ),
        names=grown.context_names,
        max_images=max_images,
        pairs_are_contexts=False,
        wanted=new,
    )
    if held.soft:
        raise ContextIdError("New contexts are measured on samples of one context each: give names or ids, no weights.")
    absent = [context for context in new if not held.images(context)]
    if absent:
        words = ", ".join(str(c) if grown.context_names is None else grown.context_names[c] for c in absent)
        raise PatchError(f"The batches to start from hold no sample of the new contexts {words}.")
    return {context: held.hard[context] for context in new}


def _with_measured(norm: Grown, tensors: dict[str, Tensor], rows: Rows, new: list[int]) -> dict[str, Tensor]:
    """Return the tensors with the measured statistics in the new rows."""
    var = (rows.variance - norm.eps).clamp_min(0)
    if isinstance(norm, DomainBatchNorm):
        return tensors | {
            "running_mean": _ending_in(tensors["running_mean"], rows.mean),
            "running_var": _ending_in(tensors["running_var"], var),
            "num_batches_tracked": _ending_in(tensors["num_batches_tracked"], torch.ones(len(new), dtype=torch.int64)),
        }
    raw = norm.inverse_activation(var)
    if norm.parametrization == "embedder":
        return _widened(norm, tensors["embedding"], {"mean": rows.mean, "var": raw})
    return {
        "mean_table": _ending_in(tensors["mean_table"], rows.mean),
        "var_table": _ending_in(tensors["var_table"], raw),
    }


def _width(norms: list[Grown], config: ContextNormConfig) -> int | None:
    return next((norm.embedding_dim for norm in norms if isinstance(norm, ContextNorm)), config.embedding_dim)


def _wider(config: ContextNormConfig, norms: list[Grown], count: int) -> ContextNormConfig:
    """Return the config once an embedder has a dimension more for each measured context."""
    if config.parametrization != "embedder" or config.mode == "dsbn":
        return config
    return config.replace(embedding_dim=cast(int, _width(norms, config)) + count)


def _ending_in(table: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([table[: -len(rows)], rows.to(table)])


def _widened(norm: ContextNorm, embedding: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedder with a dimension more for each new context, which alone makes up what its row lacks."""
    count = len(rows["mean"])
    unit = torch.cat([embedding.new_zeros(len(embedding) - count, count), torch.eye(count).to(embedding)])
    new = {
        "embedding": torch.cat([embedding, unit], dim=1),
        "embedding_bias": torch.cat([norm.embedding_bias.detach(), norm.embedding_bias.new_zeros(count)]),
    }
    alpha = (embedding[-count:] + norm.embedding_bias.detach()).double()
    for kind, row in rows.items():
        weight, bias = (getattr(norm, f"{kind}_{name}").detach() for name in ("weight", "bias"))
        lacking = row.to(alpha) - (alpha @ weight.double().T + bias.double())
        new[f"{kind}_weight"] = torch.cat([weight, lacking.T.to(weight)], dim=1)
    return new


# -------------------------------------------------------------------------------------------------------------- commit


def _assign(norm: Grown, tensors: dict[str, Tensor], num_contexts: int) -> None:
    for name, value in tensors.items():
        tensor = getattr(norm, name)
        tensor.data, tensor.grad = value, None
    norm.num_contexts = num_contexts
    if "embedding" in tensors:
        cast(ContextNorm, norm).embedding_dim = tensors["embedding"].shape[1]


def _commit(model: nn.Module, plan: Plan, config: ContextNormConfig, moments: dict[str, StoredMoments]) -> None:
    """Nothing here can fail: all tensors exist, all is checked."""
    for norm, tensors in plan:
        _assign(norm, tensors, config.num_contexts)
    router = router_of(model)
    router.config, router.moments = config, moments
    if router.source is not None:
        warnings.warn(
            f"The attached context source names {router.source.num_contexts} contexts and the model now has "
            f"{config.num_contexts}: it is detached. Attach one that fits by "
            'set_inference(model, "predict", source=...).',
            UserWarning,
            stacklevel=3,
        )
        router.source = None
