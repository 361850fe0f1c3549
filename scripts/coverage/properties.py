"""Properties of any patched model, measured on real tensors.

For a model and a batch, ``PatchingCheck`` patches, measures, and gives the model back: evaluation output unchanged for
each context and without ids, contexts isolated between samples, gradients for every context's parameters, plain
checkpoints still loading, unpatching bit-equal.

Shape legend: ``N`` samples, ``T`` contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cn_hf.errors import InputShapeError, InputTypeError
from cn_hf.patching import context_parameters, patch_model, unpatch_model
from cn_hf.patching.config import CN_MODES
from cn_hf.patching.convert import Slot
from cn_hf.patching.patch import named_slots

__all__ = ["PatchingCheck", "PatchingResult", "settle_parameters"]

UNCHANGED = 1e-5
"""Largest difference from the original's output, of its scale, that counts as none."""

ISOLATED = 1e-6
"""Largest difference of a sample's output, of its scale, that another sample may make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchingResult:
    """The outcome of one way of patching a model.

    Attributes:
        mode: of ``patch_model``.
        where: of ``patch_model``.
        slots: how many there are.
        unused: names of slots that ``forward`` never reaches, or whose result it throws away.
        unchanged: largest difference that patching made to the output, of its scale.
        precision: in which all this was measured.
        isolation: largest difference that another sample's id and pixels made to a sample's output, of its scale.
        effect: the same for the sample's own id.
        rows: most rows an activation has for one sample (windows, inner patches, tiles) where a slot meets it.
        failures: what did not hold, in words.
    """

    mode: str
    where: str
    slots: int = 0
    unused: tuple[str, ...] = ()
    unchanged: float = float("nan")
    precision: str = "float32"
    isolation: float = float("nan")
    effect: float = float("nan")
    rows: int = 1
    failures: tuple[str, ...] = field(default=())


@torch.no_grad()
def settle_parameters(model: nn.Module, inputs: Mapping[str, Any] | Tensor, seed: int = 0) -> nn.Module:
    """Bring a fresh model, in place, to a state as after training, in which no branch is silent.

    Parameters that are constant (weights of norms, zero gammas, LayerScale, heads and tokens of zeros) get random
    values; batch norms get the statistics of their inputs; then evaluation mode.

    Args:
        model: any module.
        inputs: what its ``forward`` takes: a tensor or keywords.
        seed: of the random values.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and parameter.numel() > 0
            and bool((parameter == parameter.flatten()[0]).all())
        ):
            parameter.copy_(_drawn(name, parameter, generator))
    model.eval()
    norms: list[Any] = [module for module in model.modules() if isinstance(module._buffers.get("running_var"), Tensor)]
    learning: list[Any] = [norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in learning]
    for norm in norms:
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
        norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
    for norm in learning:
        norm.train()
        norm.momentum = 1.0
    if learning:
        _call(model, inputs)
    for norm, momentum in zip(learning, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.lerp_(norm.running_var.mean(), 0.5)  # a few samples leave channels almost constant
    return model.eval()


def _drawn(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if parameter.squeeze().dim() > 1:
        return torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
    low, high = (0.0, 0.5) if name.rsplit(".", 1)[-1] in ("bias", "beta") else (0.5, 1.5)
    return torch.empty(parameter.shape).uniform_(low, high, generator=generator)


def _call(model: nn.Module, inputs: Mapping[str, Any] | Tensor, **more: Any) -> Any:
    return model(inputs, **more) if isinstance(inputs, Tensor) else model(**inputs, **more)


class PatchingCheck:
    """Checks one model, patched in several ways, each time given back as it was.

    Args:
        model: settled (see ``settle_parameters``), in evaluation mode.
        inputs: a batch of at least two samples: what ``forward`` takes, a tensor or keywords of which the first holds
            the images. Where the model amplifies the last bit of it so that float32 cannot tell, both become float64.
        num_contexts: ``T``.

    Raises:
        InputShapeError: fewer than two samples.
        InputTypeError: ``forward`` gives no finite tensor with one row a sample, or all its rows are alike.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any] | Tensor, num_contexts: int = 3) -> None:
        self.model = model
        self.inputs = inputs
        first = inputs if isinstance(inputs, Tensor) else next(v for v in inputs.values() if isinstance(v, Tensor))
        self.batch_size = first.shape[0]
        if self.batch_size < 2:
            raise InputShapeError("Isolation needs at least two samples; received a batch of one.")
        self.num_contexts = num_contexts
        self.ids = torch.arange(self.batch_size) % num_contexts
        self.precision = "float32"
        if self._rounding() > UNCHANGED / 2:
            self.precision = "float64"
            self.model.double()
            self.inputs = _with_first(inputs, Tensor.double)
        self.plain = {name: value.clone() for name, value in model.state_dict().items()}
        self.original = self._run()
        if not all(bool(row.isfinite().all()) for row in self.original):
            raise InputTypeError(f"The output of {type(model).__name__} is not finite before patching.")
        if max(_difference(row[:1], row[1:2]) for row in self.original) < 1e-4:
            raise InputTypeError(f"{type(model).__name__} gives the same output for different samples.")

    def _rows(self, output: Any) -> list[Tensor]:
        """Tensors of an output that have one row a sample."""
        rows = [
            leaf
            for leaf in pytree.tree_leaves(output if isinstance(output, (Tensor, tuple, list)) else dict(output))
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() and len(leaf) == self.batch_size
        ]
        if not rows:
            raise InputTypeError(f"{type(self.model).__name__} gives no floating-point tensor with a row a sample.")
        return rows

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, Any] | Tensor | None = None, **more: Any) -> list[Tensor]:
        return self._rows(_call(self.model, self.inputs if inputs is None else inputs, **more))

    def _rounding(self) -> float:
        """Return the change of the output, relative to its scale, by the last bit of the input."""
        pairs = zip(self._run(_with_first(self.inputs, _next_number)), self._run(), strict=True)
        return max(_difference(a, b) for a, b in pairs)

    def __call__(self, mode: str, where: str) -> PatchingResult:
        """Patch with ``mode`` at ``where``, measure, and unpatch.

        Raises:
            PatchError: ``patch_model`` refuses; the model is as it was.
        """
        failures: list[str] = []
        numbers: dict[str, Any] = {}
        classes = [type(module) for module in self.model.modules()]
        patch_model(self.model, mode, where=where, num_contexts=self.num_contexts, context_names=None)
        try:
            slots = named_slots(self.model)
            if not self.plain.keys() <= self.model.state_dict().keys():
                failures.append("keys of the plain state_dict are gone")
            with _leading_dimensions(slots) as leading:
                known = self._unchanged(self.ids)
                numbers["unchanged"] = unchanged = max(known, self._unchanged(None)) if mode in CN_MODES else known
            numbers["rows"] = max(leading, default=self.batch_size) // self.batch_size
            numbers["precision"] = self.precision
            if not unchanged <= UNCHANGED:
                failures.append(f"the output changed by {unchanged:.1e} of its scale")
            failures += self._learned(numbers, slots)
            failures += self._reloaded()
        finally:
            unpatch_model(self.model)
        failures += self._given_back(classes)
        return PatchingResult(mode=mode, where=where, slots=len(slots), failures=tuple(failures), **numbers)

    def _unchanged(self, ids: Tensor | None) -> float:
        return max(_difference(a, b) for a, b in zip(self._run(context_ids=ids), self.original, strict=True))

    def _learned(self, numbers: dict[str, Any], slots: list[tuple[str, Slot]]) -> list[str]:
        """With contexts that differ: isolation, the effect of ids, and gradients."""
        failures = []
        rows = _tell_apart(self.model, lambda: self._rows(_call(self.model, self.inputs, context_ids=self.ids)))
        sum(_projection(row) for row in rows).backward()  # type: ignore[union-attr]  # there is a row
        used = [(name, slot) for name, slot in slots if _is_used(slot)]
        numbers["unused"] = tuple(name for name, slot in slots if not _is_used(slot))
        if not used:
            failures.append("the output depends on no slot")
        silent = [
            f"{name}.{key}"
            for name, slot in used
            for key, parameter in slot.normalizer.named_parameters()
            if not _reaches(parameter, self.num_contexts)
        ]
        if silent:
            failures.append(
                f"no gradient for {', '.join(silent[:3])}" + f" and {len(silent) - 3} more" * (len(silent) > 3)
            )
        self.model.zero_grad(set_to_none=True)
        base = self._run(context_ids=self.ids)  # with gradients attention may round otherwise
        ids = self.ids.clone()
        ids[0] = (ids[0] + 1) % self.num_contexts
        other_id = self._run(context_ids=ids)
        other_sample = self._run(_with_first(self.inputs, _other_sample), context_ids=ids)
        numbers["effect"] = max(_difference(a[:1], b[:1]) for a, b in zip(other_id, base, strict=True))
        numbers["isolation"] = max(
            _difference(a[1:], b[1:]) for other in (other_id, other_sample) for a, b in zip(other, base, strict=True)
        )
        if not numbers["effect"] > 1e-5:
            failures.append("context ids have no effect")
        if not numbers["isolation"] <= ISOLATED:
            failures.append(f"a sample's output depends on another's by {numbers['isolation']:.1e} of its scale")
        return failures

    def _reloaded(self) -> list[str]:
        self.model.load_state_dict(self.plain)
        difference = self._unchanged(self.ids)
        words = f"a plain checkpoint loads with a difference of {difference:.1e}"
        return [] if difference <= UNCHANGED else [words]

    def _given_back(self, classes: list[type]) -> list[str]:
        failures = []
        after = self._run()
        if not all(torch.equal(a, b) for a, b in zip(after, self.original, strict=True)):
            failures.append("unpatching is not bit-equal")
        if [type(module) for module in self.model.modules()] != classes:
            failures.append("unpatching left other classes")
        if self.model.state_dict().keys() != self.plain.keys():
            failures.append("unpatching left other keys")
        return failures


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, of the scale of ``expected``; infinite where something is not a number."""
    scale = expected.double().abs().max().clamp_min(1e-30)
    difference = float((actual.double() - expected.double()).abs().max() / scale)
    return difference if difference == difference else float("inf")


@contextmanager
def _leading_dimensions(slots: list[tuple[str, Slot]]) -> Iterator[set[int]]:
    """Sizes of the first dimension of what slots meet inside the block."""
    router = slots[0][1].router
    router.observer = seen = _LeadingDimensions()
    try:
        yield seen.found
    finally:
        router.observer = None


class _LeadingDimensions:
    """Sees the first dimension of each slot's input, and leaves the slot to normalise it."""

    def __init__(self) -> None:
        self.found: set[int] = set()

    def normalize(self, slot: Slot, x: Tensor, *_: Any) -> None:
        """Keep the first dimension of ``x``."""
        self.found.add(x.shape[0])


def _tell_apart(model: nn.Module, run: Any) -> list[Tensor]:
    """Move what contexts learn, as training would, and run; by less where a deep model would overflow."""
    generator = torch.Generator().manual_seed(11)
    start = [parameter.detach().clone() for parameter in context_parameters(model)]
    noise = [torch.randn(parameter.shape, generator=generator) for parameter in start]
    for scale in (0.2, 0.05, 0.01):
        with torch.no_grad():
            for parameter, before, by in zip(context_parameters(model), start, noise, strict=True):
                parameter.copy_(before + scale * by.to(before))
        output = cast("list[Tensor]", run())
        if all(bool(row.isfinite().all()) for row in output):
            break
    return output


def _projection(row: Tensor) -> Tensor:
    """A fixed random weighting of an output, whose scale is taken out."""
    if not row.requires_grad:
        return row.new_zeros(())
    weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(5))
    return (row * weights).sum() / row.detach().abs().max()


def _is_used(slot: Slot) -> bool:
    """True if a gradient came to the module that was there before patching: its own parameters, or its input."""
    own = [p for name, p in cast(nn.Module, slot).named_parameters() if not name.startswith("normalizer.")]
    return any(bool((p.grad != 0).any()) for p in (own or slot.normalizer.parameters()) if p.grad is not None)


def _reaches(parameter: nn.Parameter, num_contexts: int) -> bool:
    """True if a gradient came, and to every row of a parameter that has a row a context."""
    gradient = parameter.grad
    if gradient is None or not bool(gradient.isfinite().all()):
        return False
    if gradient.dim() == 2 and gradient.shape[0] == num_contexts:
        return bool((gradient.abs().amax(dim=1) > 0).all())
    return bool((gradient != 0).any())


def _with_first(inputs: Mapping[str, Any] | Tensor, change: Callable[[Tensor], Tensor]) -> Mapping[str, Any] | Tensor:
    """The batch with its first tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    first = next(name for name, value in inputs.items() if isinstance(value, Tensor))
    return {**inputs, first: change(inputs[first])}


def _next_number(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, torch.inf)) if value.is_floating_point() else value


def _other_sample(value: Tensor) -> Tensor:
    """Another first sample: mirrored, and floats rescaled."""
    value = value.clone()
    value[0] = value[0].flip(-1) * (1.5 if value.is_floating_point() else 1)
    return value
