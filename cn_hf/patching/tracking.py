"""Contexts that follow a stream: their statistics move with the images that are given their id while a model predicts.

After a forward, each slot's row of a tracked context is where an exponential average over its images has come: an image
of the context keeps ``1 - rate`` of the average and adds ``rate`` of its own first and second moments, in the order of
the batch. So ``n`` images move it by ``1 - (1 - rate)^n``, in one batch or in many. The average starts at the moments
that the row stands for, and the row follows from it as in ``calibrate``: at slots with stored statistics it is their
mean and variance (adaptive batch norm); where moments of the reference's inputs are stored, those of ``"source"`` or
else the context's own, the context's output has the moments that the reference's has. The row is all the state there
is, so a saved model goes on where it was.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts, ``R`` tracked contexts in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.norm.choices import check_number
from cn_hf.patching.calls import Call
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.convert import Slot, StoredNormSlot
from cn_hf.patching.grow import give_own_dimensions, own_dimension
from cn_hf.patching.measure import calibrated_slots
from cn_hf.patching.moments import Moments, Rows, implied_moments, moved_moments, relative_rows
from cn_hf.patching.reference import context_index
from cn_hf.patching.router import SOURCE, ContextRouter
from cn_hf.patching.routing import router_of

__all__ = ["Tracking", "check_references"]


class Tracking:
    """Contexts that follow their images.

    Attributes:
        rate: part of the average that one image replaces, in (0, 1].
        contexts: ids of the contexts.
    """

    def __init__(self, rate: float, contexts: Iterable[str | int] | None, config: ContextNormConfig) -> None:
        if config.mode in BASELINES:
            raise ConfigError(f"track= belongs to modes with contexts; the model's is {config.mode!r}.")
        check_number("track", rate, 1, inclusive=True)
        names = config.context_names or ()
        if contexts is None:
            everyone = range(config.num_contexts)
            chosen = [context for context in everyone if SOURCE not in names or context != names.index(SOURCE)]
        else:
            chosen = [context_index(c, config) for c in ([contexts] if isinstance(contexts, (str, int)) else contexts)]
        if not chosen or len(set(chosen)) != len(chosen):
            raise ConfigError(
                f"Expected different contexts as track_contexts, at least one, received {contexts!r}. Name some of "
                f"{list(names or range(config.num_contexts))}."
            )
        self.rate, self.contexts = float(rate), tuple(chosen)
        self._dimensions: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], dict[int, int | None]]]
        self._dimensions = WeakKeyDictionary()

    @classmethod
    def from_dict(cls, values: Any, config: ContextNormConfig) -> Tracking:
        """Return the inverse of ``to_dict``.

        Raises:
            ConfigError: a value is missing, or out of range.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("contexts"), list) or "rate" not in values:
            raise ConfigError(f"Expected a rate and contexts as track, received {values!r}")
        return cls(values["rate"], values["contexts"], config)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        return {"rate": self.rate, "contexts": list(self.contexts)}

    def select(self, left: list[int], config: ContextNormConfig) -> Tracking | None:
        """Return it for a model whose contexts are ``left`` of those it had; None where none of them is tracked."""
        kept = [left.index(context) for context in self.contexts if context in left]
        return Tracking(self.rate, kept, config) if kept else None

    def __reduce__(self) -> Any:
        """Pickle and copy without what was found in the layers of one model."""
        return _rebuilt, (self.rate, self.contexts)

    # -------------------------------------------------------------------------------------------------------- running

    def run(self, call: Call, method: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return ``method(model, *args, **kwargs)``, run in ``call``; then move the contexts of its hard ids.

        Raises:
            PatchError: the model is in training mode, compiled, exported or traced.
        """
        router: ContextRouter = model.router
        named = call.ids if call.named is None else call.named
        if named is None or named.is_floating_point():
            return router.calls.run(call, method, model, *args, **kwargs)
        _refuse(model)
        with router.calls.tracking:
            present = self._counts(named, router)
            if not present or router.observer is not None:  # within a measurement or another forward
                return router.calls.run(call, method, model, *args, **kwargs)
            self._prepare(model)
            watch = _Watch(router, call, named, present, self.rate)
            router.observer = watch
            try:
                output = router.calls.run(call, method, model, *args, **kwargs)
            finally:
                router.observer = None
            with torch.no_grad():
                self._move(model, watch)
        return output

    def _counts(self, named: Tensor, router: ContextRouter) -> dict[int, int]:
        """Return how many images each tracked context has, of those that are there."""
        counts = torch.bincount(named[named >= 0], minlength=router.config.num_contexts).tolist()
        return {context: counts[context] for context in self.contexts if counts[context]}

    def _prepare(self, model: nn.Module) -> None:
        """Let each tracked context have an own dimension in every embedder: new contexts or training may take it."""
        embedders = [n for slot in calibrated_slots(model).values() if _is_embedder(n := slot.normalizer)]
        if any(self._dimension(cast(ContextNorm, n), c) is None for n in embedders for c in self.contexts):
            give_own_dimensions(model, self.contexts)

    def _dimension(self, norm: ContextNorm, context: int) -> int | None:
        key = (norm.embedding.data_ptr(), norm.embedding._version)
        known = self._dimensions.get(norm)
        if known is None or known[0] != key:
            known = self._dimensions[norm] = (key, {c: own_dimension(norm, c) for c in self.contexts})
        return known[1][context]

    def _move(self, model: nn.Module, watch: _Watch) -> None:
        router = watch.router
        for name, slot in calibrated_slots(model).items():
            moments = watch.seen.get(slot)
            if moments is None:
                continue
            rows, measured = _rows(slot), moments.rows()
            for place, (context, count) in enumerate(watch.present.items()):
                row = Rows(rows.mean[[context]], rows.variance[[context]])
                seen = Rows(measured.mean[[place]], measured.variance[[place]])
                reference = _reference(router, name, slot, rows, context)
                old = row if reference is None else implied_moments(row, *reference)
                new = moved_moments(old, seen, 1 - (1 - self.rate) ** count, is_vector=watch.vectors[slot] * count == 1)
                target = new if reference is None else relative_rows(new, *reference)
                target = Rows(target.mean, target.variance.clamp_min(slot.normalizer.eps))
                self._put(slot, context, row, target)
                stored = router.moments.get(name)
                if stored is not None and float(stored.images[context]) > 0:
                    stored.put(context, new, float(stored.images[context]))

    def _put(self, slot: Slot, context: int, row: Rows, target: Rows) -> None:
        """Set a context's row, but for features whose new statistics are not finite."""
        usable = target.mean.isfinite() & target.variance.isfinite()
        mean, variance = (torch.where(usable, new, old)[0] for new, old in zip(target, row, strict=True))
        norm = slot.normalizer
        var = (variance - norm.eps).clamp_min(0)
        if isinstance(norm, DomainBatchNorm):
            norm.running_mean[context] = mean.to(norm.running_mean)
            norm.running_var[context] = var.to(norm.running_var)
            return
        assert isinstance(norm, ContextNorm)
        raw = norm.inverse_activation(var)
        if norm.parametrization == "table":
            norm.mean_table[context] = mean.to(norm.mean_table)
            norm.var_table[context] = raw.to(norm.var_table)
            return
        own = cast(int, self._dimension(norm, context))
        alpha = (norm.embedding[context] + norm.embedding_bias).double()
        for value, weight, bias in ((mean, norm.mean_weight, norm.mean_bias), (raw, norm.var_weight, norm.var_bias)):
            lacking = value - (weight.double() @ alpha + bias.double())
            weight[:, own] += (lacking / alpha[own]).to(weight)


def _rebuilt(rate: float, contexts: tuple[int, ...]) -> Tracking:
    return Tracking(rate, contexts, ContextNormConfig(num_contexts=max(contexts) + 1))


class _Watch:
    """Measures each slot's inputs of the tracked contexts in one forward, in which slots go on as they do.

    Attributes:
        present: how many images of each tracked context there are, by its id.
        seen: moments of each slot's inputs on its first call, ``(R, C)``.
        vectors: feature vectors an image has at each slot.
    """

    def __init__(
        self, router: ContextRouter, call: Call, named: Tensor, present: Mapping[int, int], rate: float
    ) -> None:
        self.router, self.call, self.present = router, call, present
        of = named[:, None] == torch.tensor(list(present), device=named.device)
        later = of.flip(0).cumsum(0).flip(0) - of.long()
        self.weights = of * (1 - rate) ** later.double()  # of each image, by those that come after it
        self.seen: dict[Slot, Moments] = {}
        self.vectors: dict[Slot, int] = {}

    def normalize(
        self, slot: Slot, x: Tensor, ids: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Measure ``x``; None lets the slot normalise it."""
        if self.router.calls.innermost() is self.call and slot not in self.seen and x.numel():
            norm = slot.normalizer
            moments = self.seen[slot] = Moments(len(self.present), norm.num_features, x.device)
            moments.add(x.detach(), self.router.fitted(self.weights, self.call, x), norm.feature_dim)
            self.vectors[slot] = x.numel() // (norm.num_features * len(self.weights))
        return None


def check_references(model: nn.Module, tracking: Tracking) -> None:
    """Raise ``PatchError`` for a slot where a tracked context has nothing to be measured relative to."""
    router = router_of(model)
    for name, slot in calibrated_slots(model).items():
        rows = _rows(slot)
        for context in tracking.contexts:
            _reference(router, name, slot, rows, context)


def _refuse(model: nn.Module) -> None:
    how = "in training mode" if model.training else None
    if torch.compiler.is_compiling():
        how = "compiled or exported"
    elif torch._C._is_tracing():
        how = "traced"
    elif callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):  # which left this frame to Python
        how = "compiled"
    if how is not None:
        raise PatchError(
            f"Expected evaluation mode and no compiler where contexts follow their images, received a model that is "
            f"{how}. Call model.eval() and the plain model, or switch tracking off: set_inference(model, track=None)."
        )


def _is_embedder(norm: nn.Module) -> bool:
    return isinstance(norm, ContextNorm) and norm.parametrization == "embedder"


def _rows(slot: Slot) -> Rows:
    """Return a slot's own statistics of all contexts, ``(T, C)``, where they are."""
    norm = slot.normalizer
    if isinstance(norm, ContextNorm):
        mean, var = norm.statistics()
    else:
        mean, var = cast(DomainBatchNorm, norm).running_mean, cast(DomainBatchNorm, norm).running_var
    return Rows(mean.detach().double(), var.detach().double() + norm.eps)


def _reference(router: ContextRouter, name: str, slot: Slot, rows: Rows, context: int) -> tuple[Rows, Rows] | None:
    """Return row and moments, ``(1, C)``, that a context is measured relative to; None: its own mean and variance.

    Raises:
        PatchError: there are none, at a slot that stores no statistics.
    """
    names, stored = router.config.context_names or (), router.moments.get(name)
    candidates = [names.index(SOURCE), context] if SOURCE in names else [context]
    known = [c for c in candidates if stored is not None and float(stored.images[c]) > 0]
    if known and stored is not None:
        moments = Rows(stored.mean[known[:1]].to(rows.mean), stored.variance[known[:1]].to(rows.mean))
        return Rows(rows.mean[known[:1]], rows.variance[known[:1]]), moments
    if isinstance(slot, StoredNormSlot):
        return None
    raise PatchError(
        f"Expected stored moments of context {names[context] if names else context!r}, or of {SOURCE!r}, to track it: "
        f"{name}, a {slot.original_class.__name__}, stores no statistics. Measure them first, with adapt(..., "
        "reference=images) or record_moments(model, batches)."
    )
