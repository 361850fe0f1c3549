"""Batches that statistics are measured on: read once, checked, and held context by context.

Shape legend: ``N`` samples, ``T`` contexts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cn_hf.errors import ContextIdError, DatasetError, InputTypeError
from cn_hf.norm.ids import ContextIds, as_tensor

__all__ = ["Batch", "HeldBatches", "is_batch", "merged", "read_batches", "read_images"]

IMAGES, IDS = "pixel_values", "context_ids"
_NOT_INPUTS = ("labels", "index", IDS)
_AS_PIXELS = 16.0  # normalised images have a mean and standard deviation of about 0 and 1, pixels of up to 255


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one forward: tensors of ``size`` samples, and what else goes with them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to each tensor that has a row a sample."""

        def change(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) and value.dim() and len(value) == self.size else value

        args = tuple(change(value) for value in self.args)
        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return Batch(args, kwargs, next((len(v) for v in _tensors(args, kwargs)), self.size))

    def take(self, index: Tensor) -> Batch:
        """Return the samples ``index``, int64 ``(n,)``."""
        return self.map(lambda value: value[index.to(value.device)])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        args = tuple(value.to(device) if isinstance(value, Tensor) else value for value in self.args)
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.kwargs.items()}
        return Batch(args, moved, self.size)

    def split(self, size: int) -> list[Batch]:
        """Return the batch in parts of at most ``size`` samples."""
        return [self.take(part) for part in torch.split(torch.arange(self.size), size)]

    def numel(self) -> int:
        """Return how many numbers the tensors hold."""
        return sum(value.numel() for value in _tensors(self.args, self.kwargs))


@dataclass(slots=True)
class HeldBatches:
    """Batches that were read: samples by their context, and those that are of several by weights.

    Attributes:
        hard: batches of each context, by its id.
        soft: batches with weights ``(N, T)``.
        images: samples of each context, by its id.
    """

    hard: dict[int, list[Batch]] = field(default_factory=dict)
    soft: list[tuple[Batch, Tensor]] = field(default_factory=list)

    def images(self, context: int) -> int:
        """Return how many samples of a context are held."""
        return sum(batch.size for batch in self.hard.get(context, ()))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]


def is_batch(values: Mapping[Any, Any]) -> bool:
    """True if a mapping is one batch rather than names with their images."""
    return IMAGES in values or IDS in values


# ------------------------------------------------------------------------------------------------- one context's images


def read_images(images: Any, what: str, max_images: int) -> list[Batch]:
    """Read the images of one context: at most ``max_images`` of them, once.

    Args:
        images: a tensor ``(N, ...)`` as the model takes it, or an iterable of batches: tensors, mappings with
            ``pixel_values`` (or other keywords of ``forward``), or pairs, whose second part is ignored.
        what: names the images in errors.
        max_images: reading stops there.

    Raises:
        InputTypeError: they are nothing of that kind.
        DatasetError: there is not one, or one holds NaN or infinite values.
    """
    if isinstance(images, Mapping):
        if is_batch(images):
            images = [images]
        else:
            raise InputTypeError(
                f"Expected images {what}, received a mapping with the keys {', '.join(map(repr, images))}. Put a batch "
                "in a list."
            )
    batches: list[Batch] = []
    missing = max_images
    for part in [images] if isinstance(images, Tensor) else _iterate(images, what):
        batch = _unlabelled(part, what)
        if batch.size > missing:
            batch = batch.take(torch.arange(missing))
        if batch.size:
            batches.append(batch)
        missing -= batch.size
        if missing <= 0:
            break
    if not batches:
        raise DatasetError(f"Expected images {what}, received none. Give at least one, better 16 or more.")
    _check_values(batches, what)
    return batches


def _iterate(images: Any, what: str) -> Iterator[Any]:
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise InputTypeError(
            f"Expected a tensor or an iterable of batches {what}, received {type(images).__name__}. Folders, files and "
            "PIL images are read by cn_hf.adapt."
        )
    return iter(images)


def _unlabelled(part: Any, what: str) -> Batch:
    if isinstance(part, Mapping):
        return _from_mapping(part)
    if isinstance(part, (tuple, list)) and part and isinstance(part[0], Tensor):
        part = part[0]
    if not isinstance(part, Tensor):
        raise InputTypeError(
            f"Expected batches {what} that are tensors, mappings with 'pixel_values' or pairs (tensor, ...), received "
            f"{type(part).__name__}. PIL images and files are read by cn_hf.adapt."
        )
    if part.dim() < 2:
        raise InputTypeError(
            f"Expected a batch of samples {what}, (N, ...), received a tensor of shape {tuple(part.shape)}. Stack "
            "samples first."
        )
    return Batch((part,), {}, len(part))


def _from_mapping(values: Mapping[Any, Any]) -> Batch:
    kwargs = {key: value for key, value in values.items() if key not in _NOT_INPUTS}
    args = (kwargs.pop(IMAGES),) if IMAGES in kwargs else ()
    size = next((len(tensor) for tensor in _tensors(args, kwargs)), None)
    if size is None:
        raise InputTypeError(
            f"Expected a batch with 'pixel_values' or other tensors of forward, received the keys {list(values)}."
        )
    return Batch(args, kwargs, size)


def _check_values(batches: Sequence[Batch], what: str) -> None:
    """Check the images among the tensors: their dtype, finite, not pixels of 0..255, not all the same."""
    tensors = [value for batch in batches for value in _tensors(batch.args, batch.kwargs) if value.dim() == 4]
    if any(value.dtype == torch.uint8 for value in tensors):
        raise InputTypeError(
            f"Expected images {what} as the model takes them (floating point, normalised), received uint8. cn_hf.adapt "
            "normalises them; or do so before."
        )
    floats = [value.float() for value in tensors if value.is_floating_point() and value.numel()]
    if not floats:
        return
    if not all(bool(value.isfinite().all()) for value in floats):
        raise DatasetError(f"Expected finite pixels {what}, received NaN or infinite ones. Leave such images out.")
    if max(float(value.abs().mean()) for value in floats) > _AS_PIXELS:
        warnings.warn(
            f"The images {what} have a mean magnitude of {max(float(v.abs().mean()) for v in floats):.0f}: they look "
            "like pixels of 0..255, and models take normalised ones. Pass them as uint8 to cn_hf.adapt, or normalise.",
            UserWarning,
            stacklevel=5,
        )
    if all(bool((value == value.flatten()[0]).all()) for value in floats):
        warnings.warn(
            f"All pixels of the images {what} are the same: there is nothing to measure but a constant.",
            UserWarning,
            stacklevel=5,
        )


# ---------------------------------------------------------------------------------------------------- batches with ids


def read_batches(
    batches: Any,
    *,
    num_contexts: int,
    resolve: Callable[[ContextIds, int], Tensor],
    names: Sequence[str] | None,
    max_images: int,
    pairs_are_contexts: bool,
    wanted: Iterable[int] | None = None,
) -> HeldBatches:
    """Read batches that carry the context of each sample: at most ``max_images`` of each context, once.

    Args:
        batches: an iterable of pairs ``(input, context_ids)`` or mappings with ``context_ids``.
        num_contexts: ``T``; reading stops once all have enough.
        resolve: turns a batch's ids into int64 ``(N,)`` or weights ``(N, T)``, checked.
        names: of the contexts, or None.
        max_images: of each context.
        pairs_are_contexts: the second part of a pair is contexts, even from a ``DataLoader``.
        wanted: the contexts whose samples are held; None for all.

    Raises:
        InputTypeError: ``batches`` is no iterable of such batches, or a ``DataLoader``'s pairs could be labels.
        ContextIdError: a batch has no ids, or invalid ones.
        DatasetError: NaN or infinite pixels.
    """
    if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
        raise InputTypeError(
            f"Expected an iterable of batches (input, context_ids), received {type(batches).__name__}. To name the "
            "context of all images: {name: images}."
        )
    held = HeldBatches()
    missing = dict.fromkeys(range(num_contexts) if wanted is None else wanted, max_images)
    missing_soft = max_images * num_contexts
    labels_possible = not pairs_are_contexts
    for part in batches:
        batch, given = _with_ids(part)
        if labels_possible and not isinstance(part, Mapping) and _could_be_labels(given):
            _warn_of_labels(from_loader=isinstance(batches, DataLoader))
            labels_possible = False
        ids = resolve(as_tensor(given, names), batch.size).cpu()
        if ids.is_floating_point():
            kept = batch.take(torch.arange(min(batch.size, missing_soft)))
            missing_soft -= kept.size
            held.soft.append((kept, ids[: kept.size]))
        else:
            for context in torch.unique(ids).tolist():
                index = (ids == context).nonzero().flatten()[: missing.get(context, 0)]
                if len(index):
                    missing[context] -= len(index)
                    held.hard.setdefault(context, []).append(batch.take(index))
        if missing_soft <= 0 or not any(missing.values()):
            break
    _check_values([b for parts in held.hard.values() for b in parts] + [b for b, _ in held.soft], "to calibrate on")
    return held


def _with_ids(part: Any) -> tuple[Batch, Any]:
    if isinstance(part, Mapping):
        given = part.get(IDS)
        batch = _from_mapping(part)
    elif isinstance(part, (tuple, list)) and len(part) >= 2:
        given = part[-1]
        size = len(part[0]) if isinstance(part[0], Tensor) and part[0].dim() else 0
        batch = Batch((part[0],), {}, size)
    else:
        raise InputTypeError(
            f"Expected batches (input, context_ids) or mappings with 'context_ids', received {type(part).__name__}. To "
            "name the context of all images: {name: images}."
        )
    if given is None:
        raise ContextIdError("Expected context_ids in every batch, received a batch without.")
    return batch, given


def _could_be_labels(given: Any) -> bool:
    """True for what is a batch of class labels as well: integers, one a sample."""
    if isinstance(given, (str, int)):
        return False
    if isinstance(given, Sequence):
        return bool(given) and not isinstance(given[0], str)
    return not as_tensor(given, None).is_floating_point()


def _warn_of_labels(*, from_loader: bool) -> None:
    readings = (
        "The second part of a batch (input, integers) can be each sample's context or its class label. For contexts "
        "pass contexts=\"pair\" or mappings with 'context_ids'; for images of one context pass {name: batches}."
    )
    if from_loader:
        raise InputTypeError(
            f"Expected batches that say which context each sample is of, received pairs of a DataLoader. {readings}"
        )
    warnings.warn(f"{readings} Taken as contexts.", UserWarning, stacklevel=4)


def merged(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Return the batches as one, where their tensors have one shape and at most ``most`` numbers; else as they are."""
    first = batches[0]
    if len(batches) == 1 or sum(batch.numel() for batch in batches) > most:
        return list(batches)
    shapes = [[(value.shape[1:], value.dtype) for value in _tensors(b.args, b.kwargs)] for b in batches]
    alike = all(b.kwargs.keys() == first.kwargs.keys() and len(b.args) == len(first.args) for b in batches)
    if not alike or any(shape != shapes[0] for shape in shapes):
        return list(batches)

    def join(values: list[Any]) -> Any:
        rows = all(isinstance(v, Tensor) and v.dim() and len(v) == b.size for v, b in zip(values, batches, strict=True))
        return torch.cat(cast("list[Tensor]", values)) if rows else values[0]

    args = tuple(join(list(values)) for values in zip(*(b.args for b in batches), strict=True))
    kwargs = {key: join([b.kwargs[key] for b in batches]) for key in first.kwargs}
    return [Batch(args, kwargs, sum(batch.size for batch in batches))]
