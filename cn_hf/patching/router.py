"""The state that the layers of one patched model share: its configuration, and the context ids of its calls.

Shape legend: ``N`` samples, ``T`` contexts.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError
from cn_hf.norm.ids import ContextIds, as_tensor, resolve_context_ids
from cn_hf.patching.calls import Call, Calls
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.moments import StoredMoments

__all__ = ["SOURCE", "UNKNOWN", "ContextRouter", "ContextSourceLike"]

SOURCE = "source"
"""The context of a model's own training data, where it was patched to be adapted."""

UNKNOWN = -1
"""The id that a context source gives a sample of no known context."""

_NO_CONTEXT = (
    "The context source knows no context of some images, and {}: name the context that these are to run as, "
    'set_inference(model, "predict", unknown=...).'
)


class ContextSourceLike(Protocol):
    """The part of a context source that ``"predict"`` needs."""

    num_contexts: int

    def predict(self, images: Tensor) -> Tensor:
        """Return context ids ``(N,)`` of uint8 images ``(N, C, H, W)``, -1 for an image of no known context."""


class SlotObserver(Protocol):
    """Sees the inputs of slots, and may normalise them."""

    def normalize(
        self, slot: Any, x: Tensor, ids: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Return ``x`` as the slot is to give it on; None lets the slot normalise it."""


class Follows(Protocol):
    """Runs a call and moves contexts with its images: ``Tracking``."""

    rate: float
    contexts: tuple[int, ...]

    def run(self, call: Call, method: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return ``method(model, *args, **kwargs)``, run in ``call``."""

    def select(self, left: list[int], config: ContextNormConfig) -> Follows | None:
        """Return it for a model whose contexts are ``left`` of those it had."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""


class ContextRouter:
    """The state that the layers of one patched model share: the config, and the ids of its calls.

    Attributes:
        config: the model's configuration.
        calls: the calls that run, and those that graphs were made in.
        source: a context source for ``"predict"``, or None.
        unknown: how samples run that the source names no context of: the id of a context, or ``"cn+"``; None for the
            context ``"source"`` where there is one, else CN+.
        tracking: lets contexts follow the images that are given their ids, or None.
        pixel_mean: mean that was subtracted from the pixels the model receives, one a channel.
        pixel_std: standard deviation they were divided by.
        task: what the model was trained for, as its checkpoint says; None if nobody said.
        observer: sees the slots' inputs while they are measured, and may normalise in their place; or None.
        moments: of the real inputs of each context, by the slot's name, where they were measured.
        inputs: names of the modules whose input is normalised.
    """

    task: str | None = None  # here: routers that were pickled before have none
    unknown: int | str | None = None
    tracking: Follows | None = None

    def __init__(self, config: ContextNormConfig) -> None:
        self.config = config
        self.calls = Calls()
        self.source: ContextSourceLike | None = None
        self.pixel_mean: tuple[float, ...] = (0.0,)
        self.pixel_std: tuple[float, ...] = (1.0,)
        self.observer: SlotObserver | None = None
        self.moments: dict[str, StoredMoments] = {}
        self.inputs: tuple[str, ...] = ()
        self.root: weakref.ref[nn.Module] | None = None

    def is_sequence_first(self, x: Tensor) -> bool:
        """True if ``x`` is ``(L, N, C)`` rather than batch-major, as far as the running call's ids tell.

        Raises:
            ContextIdError: its first two dimensions are both ``N``.
        """
        call = self.calls.innermost()
        ids = None if call is None else call.named if call.ids is None else call.ids
        if ids is None or ids.shape[0] == 1 or x.dim() < 3 or x.shape[1] != ids.shape[0]:
            return False
        if x.shape[0] == ids.shape[0]:
            raise ContextIdError(
                f"{ids.shape[0]} context_ids met an activation of shape {tuple(x.shape)} near attention that takes "
                "sequences first, and either dimension can be the batch: build the model with batch_first=True, or "
                "change the batch size."
            )
        return True

    def ids_for(self, x: Tensor) -> Tensor | None:
        """Return the ids around for a tensor whose leading dimension is the number of ids or a multiple of it.

        Raises:
            ContextIdError: the leading dimension is no multiple of it.
        """
        call = self.calls.innermost()
        if call is None or call.ids is None:
            return None
        ids = call.ids
        if ids.device != x.device:  # a device map spreads the model
            ids = ids.to(x.device)
        if call.is_block and x.grad_fn is not None and not torch.compiler.is_compiling():
            cast(Any, x.grad_fn).metadata["cn_hf"] = call  # stays with the graph
        if call.batch_size is None and self.config.view_order == "batch":
            matches = ids.shape[0] == x.shape[0]
        else:
            ids, matches = self._views(ids, call, x)
        return ids if matches or ids.shape[0] == 1 else _repeated(ids, call, x)

    def named_for(self, x: Tensor) -> Tensor | None:
        """Return a source's ids for ``x``, -1 for CN+, in a call where some samples have a context and some none."""
        call = self.calls.innermost()
        if call is None or call.named is None or call.ids is not None:
            return None
        return self.fitted(call.named, call, x).expand(x.shape[0])

    def fitted(self, ids: Tensor, call: Call, x: Tensor) -> Tensor:
        """Return rows of a call's samples (ids or weights) for a tensor as in ``ids_for``."""
        ids, matches = self._views(ids.to(x.device), call, x)
        return ids if matches or ids.shape[0] == 1 else _repeated(ids, call, x)

    def _views(self, ids: Tensor, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """Ids for the views that the first slot has met, where the model's forward puts them one after another."""
        count = ids.shape[0]
        if call.leading is None:
            call.leading = x.shape[0]
            if call.batch_size is not None and call.leading % count != 0:
                raise ContextIdError(
                    f"Received {count} context_ids for a batch of {call.batch_size} samples, and the first layer with "
                    f"contexts met {call.leading}, which is no multiple of {count}. Give one id a sample, or one for "
                    "each view of each sample where forward concatenates views."
                )
        whole = call.leading % count == 0 and x.shape[0] % call.leading == 0
        if self.config.view_order == "view" and count > 1 and whole:
            ids = torch.cat([ids] * (call.leading // count))
        return ids, ids.shape[0] == x.shape[0]

    def resolve(self, context_ids: ContextIds, batch_size: int, device: torch.device) -> Tensor:
        """``resolve_context_ids`` with this model's contexts."""
        return resolve_context_ids(
            context_ids,
            num_contexts=self.config.num_contexts,
            batch_size=batch_size,
            device=device,
            names=self.config.context_names,
        )

    def pixel_statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of pixels in 0..1, ``(1, C or 1, 1, 1)`` each.

        On the device of ``images`` and in their dtype, float32 at least.

        Raises:
            ConfigError: they are as many as neither one nor the images' channels.
        """
        for name, values in (("mean", self.pixel_mean), ("std", self.pixel_std)):
            if len(values) not in (1, images.shape[1]):
                raise ConfigError(
                    f"The model's pixel {name} has {len(values)} values for images of {images.shape[1]} channels; set "
                    "it with set_inference(model, ..., mean=, std=)."
                )
        dtype = torch.promote_types(images.dtype, torch.float32)
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=images.device).to(dtype).view(1, -1, 1, 1)
            for values in (self.pixel_mean, self.pixel_std)
        )
        return mean, std

    def select(self, left: list[int]) -> None:
        """Keep to the contexts that are left of those there were, by their former ids."""
        if isinstance(self.unknown, int):
            self.unknown = left.index(self.unknown) if self.unknown in left else None
        if self.tracking is not None:
            self.tracking = self.tracking.select(left, self.config)

    @property
    def unknown_context(self) -> int | None:
        """Return the context of samples that the source knows none of; None for CN+."""
        if self.unknown is None:
            names = self.config.context_names or ()
            return names.index(SOURCE) if SOURCE in names else None
        return self.unknown if isinstance(self.unknown, int) else None

    def predicted(self, images: Tensor) -> Call:
        """Return a call with the context that the source names of each image.

        Args:
            images: ``(N, C, H, W)``, as the model gets them, or uint8.

        Raises:
            ContextIdError: the model has no source, or it names a context that there is not.
            ConfigError: as ``pixel_statistics``.
        """
        ids, named = self._predicted(images)
        if named is not None and ids is None and self.config.mode == "dsbn":
            raise ContextIdError(_NO_CONTEXT.format("dsbn has no CN+ to run them by"))
        call = Call(ids)
        call.named = named
        return call

    def predicted_ids(self, images: Tensor) -> Tensor:
        """Return the ids of ``predicted``, ``(N,)`` or ``(N, T)``.

        Raises:
            ContextIdError: as ``predicted``; or an image is of no known context, and no context stands for these.
            ConfigError: as ``pixel_statistics``.
        """
        ids, _ = self._predicted(images)
        if ids is None:
            raise ContextIdError(_NO_CONTEXT.format("a context is needed here"))
        return ids

    def _predicted(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return ids, or None if some samples run by CN+, and the ids with -1 for unknown samples if there are any."""
        if self.source is None:
            raise ContextIdError(
                "The model has no context source that could tell which context the images are of: name it, one of "
                f"{list(self.config.context_names or range(self.config.num_contexts))}, or call "
                'set_inference(model, "predict", source=fitted_source).'
            )
        if images.dtype != torch.uint8:
            mean, std = self.pixel_statistics(images)
            images = ((images.detach().to(mean.dtype) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        ids = as_tensor(self.source.predict(images), self.config.context_names)
        unknown, context = ids == UNKNOWN, self.unknown_context
        never = not getattr(self.source, "names_unknown", True)  # nor need anything wait for the values
        if never or ids.is_floating_point() or ids.dim() != 1 or (context is None and not bool(unknown.any())):
            return self.resolve(ids, len(images), images.device), None
        unknown = unknown.to(images.device)
        ids = self.resolve(torch.where(ids == UNKNOWN, 0, ids), len(images), images.device)
        known = None if context is None else ids.masked_fill(unknown, context)
        return known, ids.masked_fill(unknown, UNKNOWN)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextRouter:
        """A copied model gets a router of its own; a part copied alone stays wired to the model it came from."""
        root = None if self.root is None else self.root()
        if root is not None and id(root) not in memo:
            return self
        copied = ContextRouter(self.config)
        copied.moments, copied.inputs = copy.deepcopy(self.moments), self.inputs
        copied.source, copied.pixel_mean, copied.pixel_std = self.source, self.pixel_mean, self.pixel_std
        copied.task, copied.unknown, copied.tracking = self.task, self.unknown, copy.deepcopy(self.tracking)
        if root is not None:
            copied.root = weakref.ref(memo[id(root)])
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles: no calls, and the root only through its own ``__setstate__``."""
        kept = {name: value for name, value in self.__dict__.items() if name != "calls"}
        return kept | {"observer": None, "root": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, without calls."""
        self.__dict__ |= {"moments": {}} | state | {"calls": Calls()}


def _repeated(ids: Tensor, call: Call, x: Tensor) -> Tensor:
    count = ids.shape[0]
    if x.shape[0] == call.num_texts:
        raise ContextIdError(
            f"{count} context_ids, one an image, met {call.num_texts} texts: patch the layers that images pass through "
            "alone (where=[...]), or give one id for all."
        )
    if count == 0 or x.shape[0] % count != 0:
        raise ContextIdError(
            f"{count} context_ids met an activation of shape {tuple(x.shape)}, whose leading dimension is no multiple "
            "of the batch size; this layer cannot be given contexts."
        )
    return ids.repeat_interleave(x.shape[0] // count, dim=0)
