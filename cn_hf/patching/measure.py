"""Run a patched model and measure the real inputs of its slots, with the slots before them already set.

A slot's input depends on the slots before it. Where all samples fit into one forward, that forward measures each slot
as it comes and goes on with the slot's new statistics. Else each slot takes a pass over the batches.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts of the model, ``R`` contexts that are measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cn_hf.errors import PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.norm.em import statistics_dtype
from cn_hf.norm.functional import context_rows, normalize_rows
from cn_hf.patching.batches import Batch, merged
from cn_hf.patching.convert import Slot
from cn_hf.patching.moments import Moments, Rows
from cn_hf.patching.patch import own_slots
from cn_hf.patching.routing import router_of

__all__ = [
    "ONE_PASS",
    "Decide",
    "Measured",
    "calibrated_slots",
    "measure",
    "measure_under",
    "rows_of",
    "with_one_context",
]

Decide = Callable[[str, Moments], Rows]
"""The statistics ``(R, C)`` of a slot, from its name and its inputs' moments."""

ONE_PASS = 2**27  # numbers of input that one forward takes: 512 images of 224 x 224 are 77 million
_SMALL_BATCH = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """The moments seen at one slot, and the statistics decided for it."""

    moments: Moments
    rows: Rows


class _Stop(Exception):  # noqa: N818  # not an error: ends a forward once the slot at hand has seen its input
    pass


def calibrated_slots(model: nn.Module) -> dict[str, Slot]:
    """Return the slots with statistics a context, by name.

    Raises:
        PatchError: the model is not patched, or with a baseline.
    """
    slots = dict(own_slots(model))
    if not all(isinstance(slot.normalizer, (ContextNorm, DomainBatchNorm)) for slot in slots.values()):
        raise PatchError(
            f"Expected a model with contexts, received one that was patched with mode="
            f"{router_of(model).config.mode!r}. Patch with a cn mode or 'dsbn'."
        )
    return slots


def rows_of(slot: Slot) -> Rows:
    """Return a slot's own statistics of all contexts, ``(T, C)``, on the CPU."""
    norm = slot.normalizer
    if isinstance(norm, ContextNorm):
        mean, var = norm.statistics()
    else:
        mean, var = cast(DomainBatchNorm, norm).running_mean, cast(DomainBatchNorm, norm).running_var
    return Rows(mean.detach().double().cpu(), var.detach().double().cpu() + norm.eps)


def measure(
    model: nn.Module,
    batches: Sequence[tuple[Batch, Tensor]],
    decide: Decide,
    affine: Tensor,
) -> dict[str, Measured]:
    """Measure each slot's inputs in execution order, each with the statistics decided for the slots before it.

    Args:
        model: a patched model of a mode with contexts; it is left as it was.
        batches: batches and their ids: int64 ``(N,)`` in ``0..R-1``, or weights ``(N, R)``; ``R <= T``.
        decide: gives the statistics of a slot once its inputs are known.
        affine: weights ``(R, T)`` of the contexts whose affine map goes with each (``mode="dsbn"``).

    Returns:
        What was seen at each slot that ids reached, by name. A slot that is called more than once in a forward is
        measured on its first call.
    """
    if len(batches) == 1:
        try:
            return _pass(model, batches, _OnePass(model, decide, affine))
        except torch.OutOfMemoryError:
            batch, ids = batches[0]
            batches = list(zip(batch.split(_SMALL_BATCH), torch.split(ids, _SMALL_BATCH), strict=True))
    observer = _SlotBySlot(model, decide, affine)
    with tqdm(total=len(observer.names), desc="measure", unit="slot", leave=False, disable=None) as progress:
        while True:
            _pass(model, batches, observer)
            if not observer.finish():
                return observer.measured
            progress.update()


def measure_under(
    model: nn.Module, batches: Sequence[Batch], rows: dict[str, Rows], affine: Tensor
) -> dict[str, Moments]:
    """Measure each slot's inputs under statistics that are known, those of one context: one pass over the batches.

    Args:
        model: as in ``measure``.
        batches: images of that context.
        rows: its statistics ``(1, C)`` at each slot.
        affine: as in ``measure``, ``(1, T)``.
    """
    observer = _Fixed(model, rows, affine)
    _pass(model, [(batch, torch.zeros(batch.size, dtype=torch.int64)) for batch in batches], observer)
    return observer.moments


def with_one_context(batches: Sequence[Batch]) -> list[tuple[Batch, Tensor]]:
    """Return the batches, as few as can be, with the id of the one context that is measured."""
    return [(batch, torch.zeros(batch.size, dtype=torch.int64)) for batch in merged(batches, ONE_PASS)]


# ----------------------------------------------------------------------------------------------------------- observers


class _Observer:
    """Sees the input of each slot during a forward, and normalises it in the slot's place."""

    def __init__(self, model: nn.Module, affine: Tensor) -> None:
        self.names = {id(slot): name for name, slot in calibrated_slots(model).items()}
        self.affine = affine
        self.measured: dict[str, Measured] = {}

    def normalize(
        self, slot: Slot, x: Tensor, ids: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Normalise ``x`` as the slot is to do; ``weight`` and ``bias`` are the slot's affine map."""
        norm = cast(Any, slot.normalizer)
        if ids is None:
            return None
        rows = self.rows(self.names[id(slot)], slot, x, ids)
        dtype = statistics_dtype(x)
        own_weight, own_bias = self._own_affine(norm, ids, dtype)
        weight, bias = _composed(own_weight, own_bias, weight, bias)
        mean, variance = (context_rows(part.to(x.device, dtype), ids) for part in rows)
        return normalize_rows(x, mean, variance, eps=0.0, feature_dim=norm.feature_dim, weight=weight, bias=bias)

    def _own_affine(self, norm: Any, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return the affine map of the normalizer itself: ``(C,)`` of CN, a row a sample ``(N, C)`` of dsbn."""
        if norm.weight is None or isinstance(norm, ContextNorm):
            return norm.weight, norm.bias
        of_contexts = (self.affine.to(norm.weight) @ table for table in (norm.weight, norm.bias))
        weight, bias = (context_rows(table.to(dtype), ids) for table in of_contexts)
        return weight, bias

    def rows(self, name: str, slot: Slot, x: Tensor, ids: Tensor) -> Rows:
        """Return the statistics ``(R, C)`` to normalise ``x`` with."""
        raise NotImplementedError

    def _new_moments(self, slot: Slot, x: Tensor) -> Moments:
        return Moments(len(self.affine), slot.normalizer.num_features, x.device)


def _composed(
    own_weight: Tensor | None, own_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the map that does the first and then the second."""
    joined = own_weight if weight is None else weight if own_weight is None else own_weight * weight
    if own_bias is not None:
        moved = own_bias if weight is None else own_bias * weight
        bias = moved if bias is None else moved + bias
    return joined, bias


class _OnePass(_Observer):
    """Measures every slot in the one forward there is."""

    def __init__(self, model: nn.Module, decide: Decide, affine: Tensor) -> None:
        super().__init__(model, affine)
        self.decide = decide

    def rows(self, name: str, slot: Slot, x: Tensor, ids: Tensor) -> Rows:
        """Measure ``x`` and decide at once."""
        if name not in self.measured:
            moments = self._new_moments(slot, x)
            moments.add(x, ids, slot.normalizer.feature_dim)
            self.measured[name] = Measured(moments, self.decide(name, moments))
        return self.measured[name].rows


class _SlotBySlot(_Observer):
    """Measures the first slot that is not decided yet, in one pass over all batches, and stops each forward there."""

    def __init__(self, model: nn.Module, decide: Decide, affine: Tensor) -> None:
        super().__init__(model, affine)
        self.decide = decide
        self.current: str | None = None
        self.moments: Moments | None = None

    def rows(self, name: str, slot: Slot, x: Tensor, ids: Tensor) -> Rows:
        """Return what was decided; measure the slot at hand and stop; pass over slots that follow in another order."""
        if name in self.measured:
            return self.measured[name].rows
        if self.current is None:
            self.current, self.moments = name, self._new_moments(slot, x)
        if name != self.current:
            raise _Stop
        cast(Moments, self.moments).add(x, ids, slot.normalizer.feature_dim)
        raise _Stop

    def finish(self) -> bool:
        """Decide the slot that was measured; False where none was left."""
        if self.current is None or self.moments is None:
            return False
        self.measured[self.current] = Measured(self.moments, self.decide(self.current, self.moments))
        self.current, self.moments = None, None
        return True


class _Fixed(_Observer):
    """Measures every slot under statistics that are known."""

    def __init__(self, model: nn.Module, rows: dict[str, Rows], affine: Tensor) -> None:
        super().__init__(model, affine)
        self.known = rows
        self.moments: dict[str, Moments] = {}
        self.seen: set[str] = set()

    def rows(self, name: str, slot: Slot, x: Tensor, ids: Tensor) -> Rows:
        """Measure ``x`` on the slot's first call of a forward."""
        if name not in self.seen:
            self.seen.add(name)
            self.moments.setdefault(name, self._new_moments(slot, x)).add(x, ids, slot.normalizer.feature_dim)
        return self.known[name]


# ------------------------------------------------------------------------------------------------------------- running


def _pass(model: nn.Module, batches: Sequence[tuple[Batch, Tensor]], observer: _Observer) -> dict[str, Measured]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _observed(model, observer):
        for batch, ids in batches:
            if isinstance(observer, _Fixed):
                observer.seen.clear()
            moved = batch.to(device)
            with suppress(_Stop):
                model(*moved.args, context_ids=ids.to(device), **moved.kwargs)
    return observer.measured


@contextmanager
def _observed(model: nn.Module, observer: _Observer) -> Iterator[None]:
    """Run the model in evaluation mode, without gradients, with ``observer`` in its slots; all flags come back."""
    router = router_of(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    router.observer = observer
    try:
        with torch.no_grad():
            yield
    finally:
        router.observer = None
        for module, flag in training.items():
            module.training = flag
