"""transformers' Trainer gives no weight decay to the parameters that patching adds."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from cn_hf.patching.routing import added_names

__all__ = ["register"]


def register() -> None:
    """Let every Trainer pass them over. Calling it again changes nothing."""
    from transformers.trainer import Trainer

    names_of = Trainer.get_decay_parameter_names
    if getattr(names_of, "leaves_contexts_out", False):
        return

    @functools.wraps(names_of)
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        added = added_names(model)
        return [name for name in names_of(self, model) if name not in added]

    get_decay_parameter_names.leaves_contexts_out = True  # type: ignore[attr-defined]  # functions take attributes
    Trainer.get_decay_parameter_names = get_decay_parameter_names
