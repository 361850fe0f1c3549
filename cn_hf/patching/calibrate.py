"""Set contexts' means and variances from data, slot by slot in execution order, no labels and no gradients.

A network that is to be trained starts from each context's own statistics. In a trained network the statistics of a new
context are measured relative to a reference context, since the weights expect what that gave them (see ``moments``).

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError, InputTypeError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.patching.batches import Batch, HeldBatches, is_batch, merged, read_batches, read_images
from cn_hf.patching.convert import Slot
from cn_hf.patching.measure import (
    ONE_PASS,
    Decide,
    Measured,
    calibrated_slots,
    measure,
    measure_under,
    rows_of,
    with_one_context,
)
from cn_hf.patching.moments import Moments, Rows, StoredMoments, relative_rows, shrunk_rows
from cn_hf.patching.reference import Reference, check_amounts, context_index, find_reference
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.routing import router_of

__all__ = [
    "calibrate",
    "check_names_to_images",
    "keep_moments",
    "measured_contexts",
    "record_moments",
    "stored_moments",
    "warn_of_few",
]

FEW_IMAGES = 16


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Any],
    *,
    reference: Any = None,
    prior: float = 0.0,
    max_images: int = 512,
    only: Iterable[str | int] | None = None,
    contexts: str | None = None,
    approximate: bool = False,
) -> nn.Module:
    """Set each layer's mean and variance + eps of contexts from their real inputs, measured on unlabelled images.

    ``batches`` that carry the context of each sample give each context the mean and variance of its own inputs: where
    a network starts to be trained. ``{name: images}`` measures contexts of a *trained* network, relative to a reference
    context: the context's output has the moments that the reference's has. At batch norms without reference images that
    is AdaBN (Li et al. 2016) with a context for each sample.

    Runs in evaluation mode, without gradients. Images are read once and held. Features that are constant in a context
    keep variance 1 (the reference's, where measured relative to it). Contexts absent from the data are left alone and,
    where batches carry ids, named in a warning. A layer that is called more than once in a forward is calibrated on its
    first call.

    Args:
        model: a patched model of a cn mode or ``"dsbn"``.
        batches: ``{name: images}``, images being a tensor ``(N, ...)`` as the model takes it or an iterable of batches
            (tensors, mappings with ``pixel_values``, pairs whose second part is ignored). Or an iterable of batches
            that carry contexts: mappings with ``context_ids`` and ``pixel_values`` (or the keywords of ``forward``;
            ``labels`` and ``index`` are left out), or pairs ``(input, contexts)`` of names, soft weights ``(N, T)``, an
            int, or integers ``(N,)``. The last could be labels: they warn once, and raise from a ``DataLoader``.
        reference: of ``{name: images}``: the name or id of a context, images of the reference context, or both,
            ``{name: images}``. Its statistics are those of the context named, else of ``"source"``, else the mean of
            all. Norms that keep per-sample statistics (LayerNorm, GroupNorm) need images, or a context whose moments
            are stored. Given for batches with ids, these are measured relative to it, too.
        prior: how many images the reference counts for: ``(prior * reference + n * measured) / (prior + n)``.
        max_images: of each context, the first ones.
        only: names or ids of contexts; samples of others are passed over.
        contexts: ``"pair"``: the integers of a pair are contexts, even from a ``DataLoader``.
        approximate: accept a least-squares fit where an embedder with ``d < T - 1`` cannot hold ``T`` different rows.

    Returns:
        The model.

    Raises:
        ConfigError: the embedder cannot hold the rows, without ``approximate``; or an option is out of range.
        ContextIdError: a batch has no ids, or invalid ones; a name is unknown.
        PatchError: the model is not patched, or with a baseline; the data holds no sample; or reference images are
            needed.
        DatasetError: there is no image of a name, or a pixel is NaN or infinite.
        InputTypeError: ``batches`` is nothing of that kind. Whatever the error, the model is unchanged.

    Example:
        >>> import cn_hf, timm, torch
        >>> model = timm.create_model("test_resnet").eval()
        >>> model = cn_hf.patch_model(model, "cn-channels", context_names=["day", "night"])
        >>> _ = cn_hf.calibrate(model, {"night": torch.randn(16, 3, 64, 64) * 0.1 - 1})
    """
    router, slots = router_of(model), calibrated_slots(model)
    config = router.config
    check_amounts(prior, max_images)
    if contexts not in (None, "pair"):
        raise ConfigError(f'Expected contexts=None or "pair", received {contexts!r}.')
    chosen = None if only is None else {context_index(context, config) for context in _listed(only)}
    named = isinstance(batches, Mapping)
    held = _read(batches, router, max_images, chosen, pairs_are_contexts=contexts == "pair")
    relative = named or reference is not None or prior > 0
    found = find_reference(model, reference, max_images) if relative else None
    seen = _measure_soft(model, held, found, prior) if held.soft else measured_contexts(model, held.hard, found, prior)
    if not seen:
        raise PatchError("calibrate reached no slot: forward of this model calls none of its patched layers.")
    present = {context for context in seen if chosen is None or context in chosen}
    if named:
        warn_of_few({_name(config.context_names, context): held.images(context) for context in present}, prior)
    _set_all(slots, {context: seen[context] for context in sorted(present)}, approximate)
    router.moments = stored_moments(router, slots)
    if found is not None:
        found.keep_moments(router.moments)
    for context in present:
        keep_moments(router.moments, context, seen[context])
    if not named and chosen is None:
        _name_absent(config.context_names, sorted(set(range(config.num_contexts)) - present))
    return model


def _listed(only: Any) -> list[Any]:
    if isinstance(only, (str, int)):
        return [only]
    if not isinstance(only, Iterable):
        raise InputTypeError(f"Expected only as names or ids of contexts, received {only!r}.")
    return list(only)


def _read(
    batches: Any, router: ContextRouter, max_images: int, chosen: set[int] | None, *, pairs_are_contexts: bool
) -> HeldBatches:
    if isinstance(batches, Mapping):
        return _read_named(batches, router, max_images, chosen)
    held = read_batches(
        batches,
        num_contexts=router.config.num_contexts,
        resolve=lambda ids, size: router.resolve(ids, size, torch.device("cpu")),
        names=router.config.context_names,
        max_images=max_images,
        pairs_are_contexts=pairs_are_contexts,
    )
    _keep_only(held, chosen)
    return held


def _read_named(
    named: Mapping[str, Any], router: ContextRouter, max_images: int, chosen: set[int] | None
) -> HeldBatches:
    check_names_to_images(named)
    held = HeldBatches()
    indices = {name: context_index(name, router.config) for name in named}
    for name, context in indices.items():
        if chosen is None or context in chosen:
            held.hard[context] = read_images(named[name], f"of context {name!r}", max_images)
    if not held.hard:
        raise PatchError("calibrate received no images of the contexts in only=.")
    return held


def check_names_to_images(named: Mapping[Any, Any]) -> None:
    """Raise for a mapping that is a batch, or that is empty."""
    if is_batch(named):
        raise InputTypeError(
            f"Expected names with their images, received a batch (a mapping with {', '.join(map(repr, named))}). "
            "Put it in a list."
        )
    if not named:
        raise PatchError("Expected names with their images, received an empty mapping.")


def _keep_only(held: HeldBatches, chosen: set[int] | None) -> None:
    if not held.hard and not held.soft:
        raise PatchError("calibrate received no batch with a sample in it.")
    if chosen is not None:
        held.hard = {context: parts for context, parts in held.hard.items() if context in chosen}
        if not held.hard and not held.soft:
            raise PatchError("calibrate received no sample of the contexts in only=.")
    held.soft = [(batch, weights) for batch, weights in held.soft if batch.size]
    if not held.hard and not held.soft:
        raise PatchError("calibrate received batches, but not one sample in them.")


def record_moments(model: nn.Module, batches: Iterable[Any] | Mapping[str, Any], *, max_images: int = 512) -> None:
    """Keep the moments of contexts' real inputs beside a trained model; its statistics stay as they are.

    New contexts are then measured relative to them without reference images (see ``calibrate``). Call it once training
    is over: moments of a network that is trained further are out of date.

    Args:
        model: a patched model of a cn mode or ``"dsbn"``.
        batches: as of ``calibrate``, with hard contexts.
        max_images: of each context, the first ones.

    Raises:
        ContextIdError: a batch has no ids, invalid ones, or weights.
        PatchError: the model is not patched, or with a baseline; or the data holds no sample.
        DatasetError: there is no image of a name, or a pixel is NaN or infinite.
        InputTypeError: ``batches`` is nothing of that kind. Whatever the error, the model is unchanged.
    """
    router, slots = router_of(model), calibrated_slots(model)
    check_amounts(0, max_images)
    held = _read(batches, router, max_images, None, pairs_are_contexts=False)
    if held.soft:
        raise ContextIdError("Expected one context a sample, received weights. Give ids or names.")
    own = {name: rows_of(slot) for name, slot in slots.items()}
    stored = stored_moments(router, slots)
    for context, images in held.hard.items():
        one = torch.zeros(1, router.config.num_contexts, dtype=torch.float64)
        one[0, context] = 1
        found = measure_under(model, images, {name: rows.weighted(one) for name, rows in own.items()}, one)
        for name, moments in found.items():
            stored[name].put(context, moments.rows(), held.images(context))
    router.moments = stored


# ----------------------------------------------------------------------------------------------------------- measuring


def _decide(slots: dict[str, Slot], reference: Reference | None, images: Tensor, prior: float) -> Decide:
    """Return how a slot's statistics follow from its inputs' moments.

    Args:
        slots: by name.
        reference: None for each context's own mean and variance.
        images: how many images each context is measured on, ``(R,)``.
        prior: images that the reference counts for.
    """

    def decide(name: str, moments: Moments) -> Rows:
        measured = moments.rows().cpu()
        eps = slots[name].normalizer.eps
        if reference is None:
            variance = torch.where(measured.variance > 0, measured.variance, 1.0)
            return Rows(measured.mean, variance.clamp_min(eps))
        row = reference.rows[name]
        rows = relative_rows(measured, row, reference.moments[name])
        absent = ~moments.present.cpu()[:, None]
        rows = Rows(*(torch.where(absent, old, new) for old, new in zip(row, rows, strict=True)))
        rows = shrunk_rows(rows, row, images, prior)
        return Rows(rows.mean, rows.variance.clamp_min(eps))

    return decide


def measured_contexts(
    model: nn.Module,
    images: Mapping[int, list[Batch]],
    reference: Reference | None,
    prior: float,
    like: Tensor | None = None,
) -> dict[int, dict[str, tuple[Measured, float]]]:
    """Measure contexts one after the other, each in the statistics that are decided for it on the way.

    Args:
        model: a patched model; it is left as it was.
        images: batches of each context, by its id.
        reference: see ``calibrate``.
        prior: see ``calibrate``.
        like: weights ``(1, T)`` of the contexts whose affine maps (``"dsbn"``) contexts take that the model lacks.

    Returns:
        What was seen at each slot, by context and slot name, with the number of images.
    """
    slots, num_contexts = calibrated_slots(model), router_of(model).config.num_contexts
    seen = {}
    for context, batches in images.items():
        if context < num_contexts:
            affine = torch.zeros(1, num_contexts, dtype=torch.float64).index_fill_(1, torch.tensor([context]), 1.0)
        else:
            affine = cast(Tensor, like)
        size = sum(batch.size for batch in batches)
        decide = _decide(slots, reference, torch.tensor([float(size)]), prior)
        found = measure(model, with_one_context(batches), decide, affine)
        if found:
            seen[context] = {name: (at_slot, float(size)) for name, at_slot in found.items()}
    return seen


def _measure_soft(
    model: nn.Module, held: HeldBatches, reference: Reference | None, prior: float
) -> dict[int, dict[str, tuple[Measured, float]]]:
    """Measure samples that are of several contexts by weights, all contexts together."""
    slots, num_contexts = calibrated_slots(model), router_of(model).config.num_contexts
    soft = list(held.soft)
    for context, batches in held.hard.items():
        one = torch.zeros(num_contexts).index_fill_(0, torch.tensor([context]), 1.0)
        soft += [(batch, one.expand(batch.size, -1)) for batch in batches]
    weights = torch.cat([part.double() for _, part in soft])
    joined = merged([batch for batch, _ in soft], ONE_PASS)
    pairs = [(joined[0], weights.float())] if len(joined) == 1 else soft
    images = weights.sum(dim=0)
    found = measure(
        model, pairs, _decide(slots, reference, images, prior), torch.eye(num_contexts, dtype=torch.float64)
    )
    seen: dict[int, dict[str, tuple[Measured, float]]] = {}
    for context in images.nonzero().flatten().tolist():
        for name, at_slot in found.items():
            one_row = Measured(_one(at_slot.moments, context), Rows(*(part[[context]] for part in at_slot.rows)))
            seen.setdefault(context, {})[name] = (one_row, float(images[context]))
    return seen


def _one(moments: Moments, context: int) -> Moments:
    part = Moments(1, moments.mean.shape[1], moments.mean.device)
    part.count, part.mean = moments.count[[context]], moments.mean[[context]]
    part.deviation = moments.deviation[[context]]
    return part


# ------------------------------------------------------------------------------------------------------------- setting


def _set_all(slots: dict[str, Slot], seen: dict[int, dict[str, tuple[Measured, float]]], approximate: bool) -> None:
    """Set the contexts' rows at each slot; on an error, every slot is as it was."""
    state = {
        tensor: tensor.detach().clone()
        for slot in slots.values()
        for tensor in slot.normalizer.state_dict(keep_vars=True).values()
    }
    try:
        with torch.no_grad():
            for name, slot in slots.items():
                rows = {context: found[name][0].rows for context, found in seen.items() if name in found}
                if rows:
                    _set(slot, rows, approximate)
    except BaseException:
        with torch.no_grad():
            for tensor, value in state.items():
                tensor.copy_(value)
        raise


def _set(slot: Slot, rows: dict[int, Rows], approximate: bool) -> None:
    norm, table = slot.normalizer, rows_of(slot)
    for context, row in rows.items():
        table.mean[context], table.variance[context] = row.mean[0], row.variance[0]
    var = (table.variance - norm.eps).clamp_min(0)
    if isinstance(norm, ContextNorm):
        norm.set_statistics(table.mean, var, approximate=approximate)
        return
    batch_norm = cast(DomainBatchNorm, norm)
    batch_norm.set_statistics(table.mean, var)
    batch_norm.num_batches_tracked[list(rows)] += 1


def stored_moments(router: ContextRouter, slots: dict[str, Slot]) -> dict[str, StoredMoments]:
    """Return the moments that are kept beside the model, with a place for each slot."""
    return {
        name: router.moments.get(name)
        or StoredMoments.unknown(router.config.num_contexts, slot.normalizer.num_features)
        for name, slot in slots.items()
    }


def keep_moments(stored: dict[str, StoredMoments], context: int, seen: dict[str, tuple[Measured, float]]) -> None:
    """Keep what was seen of a context."""
    for name, (at_slot, images) in seen.items():
        stored[name].put(context, at_slot.moments.rows(), images)


def warn_of_few(images: dict[str, int], prior: float) -> None:
    """Warn of contexts that are measured on few images, by name."""
    few = {name: count for name, count in images.items() if count < FEW_IMAGES}
    if few:
        words = ", ".join(f"{name!r} ({count})" for name, count in list(few.items())[:20])
        more = "" if len(few) <= 20 else f" and {len(few) - 20} more"
        advice = "more images help" if prior > 0 else "give more images, or prior=4 to draw them towards the reference"
        warnings.warn(
            f"Contexts measured on fewer than {FEW_IMAGES} images: {words}{more}. Their statistics are noisy "
            f"(prior={prior:g}): {advice}.",
            UserWarning,
            stacklevel=3,
        )


def _name(names: tuple[str, ...] | None, context: int) -> str:
    return str(context) if names is None else names[context]


def _name_absent(names: tuple[str, ...] | None, absent: list[int]) -> None:
    if absent:
        words = ", ".join(str(index) if names is None else repr(names[index]) for index in absent[:20])
        more = "" if len(absent) <= 20 else f" and {len(absent) - 20} more"
        warnings.warn(
            f"No sample of contexts {words}{more} was in the calibration data; they are left as they were.",
            UserWarning,
            stacklevel=3,
        )
