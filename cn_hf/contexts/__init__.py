"""Sources of context ids: they add a column ``context_ids`` to a dataset. Start reading in ``base``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.contexts.base import ContextSource
    from cn_hf.contexts.clusters import ClusterContexts
    from cn_hf.contexts.column import ColumnContexts
    from cn_hf.contexts.origin import OriginContexts
    from cn_hf.contexts.rules import BrightnessContexts, RuleContexts
    from cn_hf.contexts.statistics import StatisticsContexts
    from cn_hf.reading.access import CONTEXT_COLUMN
    from cn_hf.reading.corrupt import drop_corrupt_images

__all__ = [
    "CONTEXT_COLUMN",
    "BrightnessContexts",
    "ClusterContexts",
    "ColumnContexts",
    "ContextSource",
    "OriginContexts",
    "RuleContexts",
    "StatisticsContexts",
    "drop_corrupt_images",
]

_HOMES = {
    "CONTEXT_COLUMN": "cn_hf.reading.access",
    "BrightnessContexts": "cn_hf.contexts.rules",
    "ClusterContexts": "cn_hf.contexts.clusters",
    "ColumnContexts": "cn_hf.contexts.column",
    "ContextSource": "cn_hf.contexts.base",
    "OriginContexts": "cn_hf.contexts.origin",
    "RuleContexts": "cn_hf.contexts.rules",
    "StatisticsContexts": "cn_hf.contexts.statistics",
    "drop_corrupt_images": "cn_hf.reading.corrupt",
}


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
