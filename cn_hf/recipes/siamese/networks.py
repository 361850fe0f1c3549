"""The networks of a Siamese run, trained and judged."""

from __future__ import annotations

import dataclasses

from torch import nn

from cn_hf.errors import PatchError
from cn_hf.patching.restyle import input_norm
from cn_hf.patching.routing import RoutedModel
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.recipes.siamese.data import SiameseData
from cn_hf.recipes.siamese.restyling import Levels, Shift
from cn_hf.recipes.siamese.verification import Verification
from cn_hf.training.history import History

__all__ = ["SiameseNetwork", "SiameseRun", "has_input_contexts"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiameseNetwork:
    """One trained network and how it did.

    Attributes:
        config: Its options.
        model: The network, as trained.
        history: Its epochs.
        validation: Verification of validation pairs, on which the threshold was chosen.
        held_out: Verification of held-out pairs: ``"all"``, then by the contexts of the two images.
        levels_at_start: What each context's mean and standard deviation on the input began as; empty without contexts.
        levels: What they became.
        shifts_at_start: Restyling there and back before training; empty without contexts.
        shifts: The same after training.
    """

    config: SiameseConfig
    model: nn.Module
    history: History
    validation: Verification
    held_out: dict[str, Verification]
    levels_at_start: dict[str, Levels]
    levels: dict[str, Levels]
    shifts_at_start: tuple[Shift, ...]
    shifts: tuple[Shift, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiameseRun:
    """The results of a run: its options, its data, the networks by name, and how long it took.

    ``seconds`` are those of a clock, ``processor_seconds`` those that this process was at work, which is less where
    others were, too, and more on several cores.
    """

    config: SiameseConfig
    data: SiameseData
    networks: dict[str, SiameseNetwork]
    seconds: float
    processor_seconds: float


def has_input_contexts(model: nn.Module) -> bool:
    """True if contexts have their own statistics on the network's input."""
    if not isinstance(model, RoutedModel):
        return False
    try:
        input_norm(model)
    except PatchError:
        return False
    return True
