"""A trained model's contexts change: add some, remove some, train nothing else.

A context is a row of the embedder's ``W_r`` or of the tables (and of the batch statistics of ``"dsbn"``), so adding or
removing one is adding or removing rows; what the other contexts compute stays as it was, bit for bit.

Shape legend: ``C`` features, ``T`` contexts, ``d`` embedding width, ``n`` new contexts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError, InputTypeError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.norm.functional import context_rows
from cn_hf.norm.ids import as_tensor
from cn_hf.patching.calibrate import calibrate
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.convert import Slot
from cn_hf.patching.patch import context_parameters, own_slots
from cn_hf.patching.routing import router_of

__all__ = ["add_contexts", "remove_contexts", "train_only_contexts"]

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
    names: str | Sequence[str] | int,
    *,
    start: str | int | Tensor | Iterable[Any] | None = None,
) -> nn.Module:
    """Give a patched model more contexts, in place, after those it has: ids ``T``, ``T + 1``, ...

    In evaluation the output for the contexts it had stays bit-equal (float32 models on the CPU and on CUDA). As with
    transformers' ``resize_token_embeddings``, parameters stay the same objects and grow in place, so parameter groups
    still hold them; their gradients are dropped. What an optimizer has averaged for them no longer fits and its next
    step would fail: forget it by ``for p in cn_hf.context_parameters(model): optimizer.state.pop(p, None)``, or make a
    new optimizer. Grow before wrapping in DDP or FSDP.

    Args:
        model: a patched model of a mode that is told contexts.
        names: names of the new contexts; or how many, where the model's contexts have no names.
        start: where the new contexts start from. None: the mean of all contexts' rows. The name or id of a context, or
            weights ``(T,)`` or ``(1, T)``: that context's row, or the weighted mean. Batches as of ``calibrate``, with
            new names or ids (samples of other contexts are passed over): the mean and variance of the slots' real
            inputs. Then an embedder becomes ``n`` wider, so that it can hold the measured rows exactly.

    Returns:
        The same object. A context source that was attached is not any more, with a warning: it names too few contexts.

    Raises:
        ConfigError: a name is taken; or names were given to a model without, or none to one with names.
        ContextIdError: there is no such context to start from, or a batch's ids are invalid.
        InputTypeError: ``names`` or ``start`` is of another type.
        PatchError: the model is not patched, or with a baseline. Whatever the error, the model is unchanged.
    """
    config, norms = _contexts_of(model)
    known = config.context_names
    count, new_names = _new_names(names, known)
    given = start is None or isinstance(start, (str, int, Tensor))
    weights = _start(None if not given else cast(Any, start), config)
    plan: Plan = [
        (norm, {name: _with_rows(tensor, weights, count) for name, tensor in _rows_of(norm).items()}) for norm in norms
    ]
    grown = _resized(config, norms, config.num_contexts + count, None if known is None else (*known, *new_names))
    if not given:
        plan, grown = _calibrated(model, plan, grown, count, cast("Iterable[Any]", start))
    _commit(model, plan, grown)
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
    gone = {_index(name, config) for name in chosen}
    if len(gone) != len(chosen) or not gone:
        raise ConfigError(f"remove_contexts expects different contexts, at least one; received {chosen}.")
    left = [index for index in range(config.num_contexts) if index not in gone]
    if not left:
        raise ConfigError(f"remove_contexts would leave none of {config.num_contexts} contexts; keep at least one.")
    plan: Plan = [
        (norm, {name: tensor.detach()[torch.tensor(left)] for name, tensor in _rows_of(norm).items()}) for norm in norms
    ]
    kept = None if config.context_names is None else tuple(config.context_names[index] for index in left)
    _commit(model, plan, _resized(config, norms, len(left), kept))
    return model


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


def _index(name: Any, config: ContextNormConfig) -> int:
    """The id of one context, given by name or id."""
    ids = as_tensor(name, config.context_names)
    if ids.dim() or ids.is_floating_point() or not 0 <= int(ids) < config.num_contexts:
        raise ContextIdError(f"Expected a context's name or an id in 0..{config.num_contexts - 1}, received {name!r}.")
    return int(ids)


def _start(start: str | int | Tensor | None, config: ContextNormConfig) -> int | Tensor:
    """An id, or float64 weights ``(1, T)``."""
    if start is None:
        return torch.full((1, config.num_contexts), 1 / config.num_contexts, dtype=torch.float64)
    if not isinstance(start, Tensor) or not start.is_floating_point():
        return _index(start.squeeze() if isinstance(start, Tensor) else start, config)
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


def _calibrated(
    model: nn.Module, plan: Plan, grown: ContextNormConfig, count: int, batches: Iterable[Any]
) -> tuple[Plan, ContextNormConfig]:
    """The plan with the new contexts' rows measured, on a copy of the model whose normalizers are tables."""
    if not isinstance(batches, Iterable):
        raise InputTypeError(
            "start must be a context's name, id or weights, or batches to calibrate on, received "
            f"{type(batches).__name__}."
        )
    if grown.mode == "dsbn":
        raise PatchError('mode="dsbn" measures its statistics in training: start from a context, not from batches.')
    trial = copy.deepcopy(model)
    for slot in _slots(trial):
        slot.normalizer = _table_like(cast(ContextNorm, slot.normalizer), grown.num_contexts)
    router_of(trial).config = grown
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about contexts without samples: those the model has need none
        calibrate(trial, batches)
    tables = [cast(ContextNorm, slot.normalizer) for slot in _slots(trial)]
    absent = torch.stack([(table.mean_table[-count:, 0] == _UNSEEN).cpu() for table in tables]).all(dim=0)
    if bool(absent.any()):
        which = [grown.num_contexts - count + index for index in absent.nonzero().flatten().tolist()]
        words = ", ".join(str(index) if grown.context_names is None else grown.context_names[index] for index in which)
        raise PatchError(f"The batches to start from hold no sample of the new contexts {words}.")
    measured = [
        (norm, _measured(norm, tensors, table, count)) for (norm, tensors), table in zip(plan, tables, strict=True)
    ]
    if grown.parametrization == "embedder":
        grown = grown.replace(embedding_dim=cast(int, grown.embedding_dim) + count)
    return measured, grown


_UNSEEN = 2.0**100  # a mean no data has


def _table_like(norm: ContextNorm, num_contexts: int) -> ContextNorm:
    """A table in the place of ``norm``; what it holds does not matter before it is measured."""
    like = next(norm.parameters())
    table = ContextNorm(
        norm.num_features,
        num_contexts,
        feature_dim=norm.feature_dim,
        parametrization="table",
        variance_activation=norm.variance_activation,
        eps=norm.eps,
        affine=norm.affine,
        device=like.device,
        dtype=like.dtype,
    )
    table.weight, table.bias = norm.weight, norm.bias
    nn.init.constant_(table.mean_table, _UNSEEN)
    return table.eval()


def _measured(norm: Grown, tensors: dict[str, Tensor], table: ContextNorm, count: int) -> dict[str, Tensor]:
    rows = {"mean": table.mean_table.detach()[-count:], "var": table.var_table.detach()[-count:]}
    if isinstance(norm, ContextNorm) and norm.parametrization == "embedder":
        return _widened(norm, tensors["embedding"], rows)
    return {name: _ending_in(value, rows[name.removesuffix("_table")]) for name, value in tensors.items()}


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


def _commit(model: nn.Module, plan: Plan, config: ContextNormConfig) -> None:
    """Nothing here can fail: all tensors exist, all is checked."""
    for norm, tensors in plan:
        _assign(norm, tensors, config.num_contexts)
    router = router_of(model)
    router.config = config
    if router.source is not None:
        warnings.warn(
            f"The attached context source names {router.source.num_contexts} contexts and the model now has "
            f"{config.num_contexts}: it is detached. Attach one that fits by "
            'set_inference(model, "predict", source=...).',
            UserWarning,
            stacklevel=3,
        )
        router.source = None
