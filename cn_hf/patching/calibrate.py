"""Start every context's mean and variance from data, slot by slot in execution order.

A slot's input depends on the slots before it, so each is calibrated with the earlier ones already in place: one pass
over the data a slot, or one pass in all where there is a single batch.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts, ``L`` positions (pixels or tokens) of a sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cn_hf.errors import ContextIdError, InputTypeError, PatchError
from cn_hf.norm import ContextNorm
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.convert import Slot
from cn_hf.patching.patch import own_slots
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.routing import router_of

__all__ = ["calibrate"]


class _Stop(Exception):  # noqa: N818  # not an error: ends a forward once the slot at hand has seen its input
    pass


class _Moments:
    """Running mean and sum of squared deviations per context, in float64, merged as Chan et al. (1983) do."""

    def __init__(self, num_contexts: int, num_features: int, device: torch.device) -> None:
        self.count = torch.zeros(num_contexts, 1, dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_contexts, num_features, dtype=torch.float64, device=device)
        self.deviation = torch.zeros_like(self.mean)

    def add(self, x: Tensor, ids: Tensor, feature_dim: int) -> None:
        """Take in ``x`` ``(N, ..., C)`` or ``(N, C, ...)`` with hard or soft ids."""
        if x.numel() == 0:
            return
        samples = x.movedim(feature_dim, -1)
        samples = samples.reshape(samples.shape[0], -1, samples.shape[-1]).double()
        ids = ids.expand(len(samples), *ids.shape[1:]).to(x.device)

        def total(values: Tensor) -> Tensor:
            if ids.is_floating_point():
                return ids.T.double() @ values
            return values.new_zeros(len(self.count), values.shape[1]).index_add_(0, ids, values)

        positions = samples.shape[1]
        mean = samples.mean(dim=1)
        deviation = (samples - mean[:, None]).square().sum(dim=1)
        shift = mean.mean(dim=0)
        centered = mean - shift
        weight = total(mean.new_ones(len(mean), 1))
        context_mean = total(centered) / weight.clamp_min(1e-300)
        between = (total(centered.square()) - weight * context_mean.square()).clamp_min(0)
        self._merge(weight * positions, context_mean + shift, total(deviation) + positions * between)

    def _merge(self, count: Tensor, mean: Tensor, deviation: Tensor) -> None:
        total = self.count + count
        safe = total.clamp_min(1e-300)
        delta = mean - self.mean
        self.mean += torch.where(count > 0, delta * count / safe, 0.0)
        self.deviation += deviation + torch.where(count > 0, delta.square() * self.count * count / safe, 0.0)
        self.count = total

    def present(self) -> Tensor:
        """Which contexts were seen, ``(T,)``."""
        return self.count[:, 0] > 0

    def variance(self) -> Tensor:
        """Biased variance, ``(T, C)``."""
        return self.deviation / self.count.clamp_min(1e-300)


def calibrate(model: nn.Module, batches: Iterable[Any], *, approximate: bool = False) -> nn.Module:
    """Set each layer's mean and variance + eps of each context to those of its real inputs.

    Runs in evaluation mode, without gradients; the training flags come back. Features that are constant in a context
    keep variance 1. Contexts absent from the data are left alone and named in a warning. A layer that is called more
    than once in a forward is calibrated on its first call.

    Args:
        model: a patched model of a cn mode.
        batches: re-iterable batches, each a pair ``(input, context_ids)`` or a mapping with ``context_ids`` and
            ``pixel_values`` (or the keywords of ``forward``; ``labels`` and ``index`` are left out). An iterator is
            read into memory.
        approximate: accept a least-squares fit where an embedder with ``d < T - 1`` cannot hold ``T`` different rows.

    Returns:
        The model.

    Raises:
        ConfigError: the embedder cannot hold the rows, without ``approximate``; the model is unchanged.
        ContextIdError: a batch has no ids, or invalid ones.
        PatchError: the model is not patched, or with a baseline; or the data holds no sample.
        InputTypeError: ``batches`` is no iterable.
    """
    router = router_of(model)
    slots = [slot for _, slot in own_slots(model)]
    if not all(isinstance(slot.normalizer, ContextNorm) for slot in slots):
        raise PatchError(
            f"calibrate needs context normalization; the model was patched with mode={router.config.mode!r}."
        )
    if not isinstance(batches, Iterable):
        raise InputTypeError(f"batches must be an iterable of (input, context_ids), received {type(batches).__name__}.")
    data = list(batches) if isinstance(batches, Iterator) else batches
    if isinstance(data, Sized) and len(data) == 0:
        raise PatchError("calibrate received no batch.")
    before = {name: value.clone() for name, value in _context_state(model).items()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            seen = _observe(model, data, approximate)
        if not seen:
            raise PatchError("calibrate reached no slot: forward of this model calls none of its patched layers.")
        if not any(bool(present.any()) for present in seen):
            raise PatchError("calibrate received batches, but not one sample in them.")
    except BaseException:
        for name, value in _context_state(model).items():
            value.copy_(before[name])
        raise
    finally:
        router.observer = None
        for module, flag in training.items():
            module.training = flag
    _name_absent(router.config.context_names, torch.stack([present.cpu() for present in seen]).all(dim=0))
    return model


def _context_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": parameter.detach()
        for name, slot in own_slots(model)
        for key, parameter in slot.normalizer.named_parameters()
    }


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], ContextIds]:
    if isinstance(batch, Mapping):
        values = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        ids = values.pop("context_ids", None)
        args = (values.pop("pixel_values"),) if "pixel_values" in values else ()
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        args, values, ids = (batch[0],), {}, batch[-1]
    else:
        raise InputTypeError(
            "calibrate expects batches (input, context_ids) or mappings with context_ids, received "
            f"{type(batch).__name__}."
        )
    if ids is None:
        raise ContextIdError("calibrate needs context_ids in every batch; a batch had none.")
    return args, values, ids


def _run(model: nn.Module, batch: Any) -> None:
    args, values, ids = _inputs(batch)
    device = next(iter(model.parameters())).device
    move = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
    model(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args), context_ids=ids, **move)


class _Observer:
    """Measures the input of slots during forwards: of every slot at once, or of the next one and then stops."""

    def __init__(self, router: ContextRouter, approximate: bool) -> None:
        self.router = router
        self.approximate = approximate
        self.done: set[int] = set()
        self.seen: list[Tensor] = []
        self.current: Slot | None = None
        self.moments: _Moments | None = None

    def each(self, slot: Slot, x: Tensor, ids: Tensor | None) -> None:
        """Measure and set ``slot``, then let the forward go on with its new statistics."""
        if id(slot) not in self.done and ids is not None:
            self.current, self.moments = slot, None
            self._measure(x, ids)
            self.finish()

    def next(self, slot: Slot, x: Tensor, ids: Tensor | None) -> None:
        """Measure ``slot`` if it is the first not done yet, and stop the forward."""
        if id(slot) in self.done or ids is None:
            return
        if self.current is None:
            self.current = slot
        if slot is self.current:
            self._measure(x, ids)
            raise _Stop

    def _measure(self, x: Tensor, ids: Tensor) -> None:
        norm = cast(Slot, self.current).normalizer
        if self.moments is None:
            self.moments = _Moments(self.router.config.num_contexts, norm.num_features, x.device)
        self.moments.add(x, ids, norm.feature_dim)

    def finish(self) -> bool:
        """Set the slot that was measured; False where none was left."""
        if self.current is None or self.moments is None:
            return False
        self.done.add(id(self.current))
        self.seen.append(_set(self.current, self.moments, self.approximate))
        self.current, self.moments = None, None
        return True


def _observe(model: nn.Module, data: Iterable[Any], approximate: bool) -> list[Tensor]:
    router = router_of(model)
    observer = _Observer(router, approximate)
    if isinstance(data, Sized) and len(data) == 1:
        router.observer = observer.each
        for batch in data:
            _run(model, batch)
        return observer.seen
    router.observer = observer.next
    progress = tqdm(total=len(own_slots(model)), desc="calibrate", unit="slot", leave=False, disable=None)
    with progress:
        while True:
            for batch in data:
                with suppress(_Stop):
                    _run(model, batch)
            if not observer.finish():
                return observer.seen
            progress.update()


def _set(slot: Slot, moments: _Moments, approximate: bool) -> Tensor:
    norm = cast(ContextNorm, slot.normalizer)
    present = moments.present()
    mean, var = (statistic.double() for statistic in norm.statistics())
    measured = moments.variance()
    # Rounding leaves a constant feature a variance of about (|mean| * 2^-24)^2, not 0.
    constant = measured <= (moments.mean.abs() * 1e-6).square() + 1e-30
    measured = torch.where(constant, 1.0, measured)
    mean = torch.where(present[:, None], moments.mean, mean)
    var = torch.where(present[:, None], (measured - norm.eps).clamp_min(0), var)
    norm.set_statistics(mean, var, approximate=approximate)
    return present


def _name_absent(names: tuple[str, ...] | None, seen: Tensor) -> None:
    absent = (~seen).nonzero().flatten().tolist()
    if absent:
        words = ", ".join(str(index) if names is None else repr(names[index]) for index in absent[:20])
        more = "" if len(absent) <= 20 else f" and {len(absent) - 20} more"
        warnings.warn(
            f"No sample of contexts {words}{more} was in the calibration data; they are left as they were.",
            UserWarning,
            stacklevel=3,
        )
