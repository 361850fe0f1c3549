"""Where context ids come from: sources that add a column ``context_ids`` to a dataset. Start reading in ``base``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.contexts.access import CONTEXT_COLUMN
    from cn_hf.contexts.base import ContextSource
    from cn_hf.contexts.clusters import ClusterContexts
    from cn_hf.contexts.column import ColumnContexts
    from cn_hf.contexts.corrupt import drop_corrupt_images
    from cn_hf.contexts.origin import OriginContexts
    from cn_hf.contexts.rules import BrightnessContexts, RuleContexts

__all__ = [
    "CONTEXT_COLUMN",
    "BrightnessContexts",
    "ClusterContexts",
    "ColumnContexts",
    "ContextSource",
    "OriginContexts",
    "RuleContexts",
    "drop_corrupt_images",
]

_MODULES = {
    "CONTEXT_COLUMN": "access",
    "BrightnessContexts": "rules",
    "ClusterContexts": "clusters",
    "ColumnContexts": "column",
    "ContextSource": "base",
    "OriginContexts": "origin",
    "RuleContexts": "rules",
    "drop_corrupt_images": "corrupt",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
