"""New domains without labels: folders, data sets and pictures become contexts of a trained model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.adaptation.domains import adapt

__all__ = ["adapt"]


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(importlib.import_module("cn_hf.adaptation.domains"), name)
        raise AttributeError(f"module 'cn_hf.adaptation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
