"""Checkpoints: save a patched model to a folder, publish it, load it from a folder or the Hub."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.hub.checkpoint import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(importlib.import_module("cn_hf.hub.checkpoint"), name)
        raise AttributeError(f"module 'cn_hf.hub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
