"""The context that others are measured relative to: its statistics at each slot, and the moments of its real inputs.

Shape legend: ``C`` features, ``T`` contexts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextIdError, PatchError
from cn_hf.norm.choices import check_integer
from cn_hf.norm.ids import as_tensor
from cn_hf.patching.batches import is_batch, read_images
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.convert import Slot, StoredNormSlot
from cn_hf.patching.measure import calibrated_slots, measure_under, rows_of
from cn_hf.patching.moments import Rows, StoredMoments
from cn_hf.patching.router import SOURCE
from cn_hf.patching.routing import router_of

__all__ = ["SOURCE", "Reference", "check_amounts", "context_index", "find_reference"]


@dataclass(frozen=True, slots=True)
class Reference:
    """The context that others are measured relative to.

    Attributes:
        weights: ``(1, T)``, float64: one context, or the mean of all.
        rows: its own statistics at each slot, ``(1, C)``.
        moments: of its real inputs at each slot, ``(1, C)``; None where they are unknown.
        images: how many images ``moments`` were measured on for this call; 0 where they were stored or are unknown.
    """

    weights: Tensor
    rows: dict[str, Rows]
    moments: dict[str, Rows | None]
    images: int

    @property
    def context(self) -> int | None:
        """Return the id of the one context it is, or None for a mean."""
        return int(self.weights.argmax()) if float(self.weights.max()) == 1 else None

    def keep_moments(self, stored: dict[str, StoredMoments]) -> None:
        """Keep the moments that were measured for this call beside the model."""
        if self.images and self.context is not None:
            for name, moments in self.moments.items():
                if moments is not None:
                    stored[name].put(self.context, moments, self.images)


def context_index(name: Any, config: ContextNormConfig) -> int:
    """Return the id of one context, given by name or id.

    Raises:
        ContextIdError: there is no such context.
    """
    if type(name) is int and 0 <= name < config.num_contexts:
        return name  # also where tensors have no values (torch.device("meta"))
    ids = as_tensor(name, config.context_names)
    if ids.dim() or ids.is_floating_point() or not 0 <= int(ids) < config.num_contexts:
        raise ContextIdError(f"Expected a context's name or an id in 0..{config.num_contexts - 1}, received {name!r}.")
    return int(ids)


def check_amounts(prior: float, max_images: int) -> None:
    """Raise ``ConfigError`` for a prior that is negative or not finite, or fewer than one image."""
    if isinstance(prior, bool) or not isinstance(prior, (int, float)) or not math.isfinite(prior) or prior < 0:
        raise ConfigError(f"Expected prior as a number of images, at least 0 and finite, received {prior!r}.")
    check_integer("max_images", max_images, 1)


def find_reference(model: nn.Module, reference: Any, max_images: int) -> Reference:
    """Find the reference of a patched model, and measure its moments where images are given.

    Args:
        model: a patched model of a mode with contexts.
        reference: the name or id of a context; images of the reference context; or ``{name: images}``. Its statistics
            are the row of that context, else of ``"source"``, else the mean of all rows.
        max_images: of the reference's images.

    Raises:
        ContextIdError: there is no such context.
        PatchError: the moments are needed and unknown.
        InputTypeError: the images are none.
        DatasetError: there is no image, or one is not finite.
    """
    router, slots = router_of(model), calibrated_slots(model)
    config, images = router.config, None
    if isinstance(reference, Mapping) and not is_batch(reference):
        if len(reference) != 1:
            raise ConfigError(f"Expected one reference, {{name: images}}, received {len(reference)}.")
        ((reference, images),) = reference.items()
        chosen: int | None = context_index(reference, config)
    elif isinstance(reference, (str, int)):
        chosen = context_index(reference, config)
    else:
        images = reference
        names = config.context_names or ()
        chosen = names.index(SOURCE) if SOURCE in names else None
    weights = torch.full((1, config.num_contexts), 1 / config.num_contexts, dtype=torch.float64)
    if chosen is not None or config.num_contexts == 1:
        weights = torch.zeros_like(weights).index_fill_(1, torch.tensor([chosen or 0]), 1.0)
    rows = {name: rows_of(slot).weighted(weights) for name, slot in slots.items()}
    moments: dict[str, Rows | None]
    if images is None:
        moments = {name: router.moments[name].weighted(weights) if name in router.moments else None for name in slots}
        _check_known(slots, moments, chosen, config)
        return Reference(weights, rows, moments, 0)
    batches = read_images(images, "of the reference", max_images)
    measured = measure_under(model, batches, rows, weights)
    moments = {name: measured[name].rows().cpu() if name in measured else None for name in slots}
    return Reference(weights, rows, moments, sum(batch.size for batch in batches))


def _check_known(
    slots: dict[str, Slot], moments: dict[str, Rows | None], chosen: int | None, config: ContextNormConfig
) -> None:
    unknown = [name for name, slot in slots.items() if moments[name] is None and not isinstance(slot, StoredNormSlot)]
    if not unknown:
        return
    names = config.context_names
    which = "all contexts" if chosen is None else f"context {chosen if names is None else repr(names[chosen])}"
    raise PatchError(
        f"Expected reference images: {len(unknown)} slots (first: {unknown[0]}, a "
        f"{slots[unknown[0]].original_class.__name__}) store no statistics of {which}, and the weights behind them "
        "expect what the reference gave them. Give images that the model was trained on, reference=images, or a "
        "context whose moments are stored."
    )
