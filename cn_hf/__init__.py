"""Context Normalization for timm and Hugging Face vision models.

Public names are imported when they are first used, so ``import cn_hf`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "cn_hf.norm": ("ContextNorm", "MixtureNorm"),
    "cn_hf.patching": (
        "ContextNormConfig",
        "calibrate",
        "context_parameters",
        "fold_context",
        "patch_model",
        "patch_report",
        "set_inference",
        "unpatch_model",
        "use_contexts",
    ),
    "cn_hf.hub": ("from_pretrained", "save_pretrained"),
    "cn_hf.errors": ("CnHfError", "ConfigError", "ContextIdError", "PatchError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBPACKAGES = ("contexts", "data", "errors", "evaluation", "hub", "models", "norm", "patching", "training")

__all__ = [
    "CnHfError",
    "ConfigError",
    "ContextIdError",
    "ContextNorm",
    "ContextNormConfig",
    "MixtureNorm",
    "PatchError",
    "__version__",
    "calibrate",
    "context_parameters",
    "fold_context",
    "from_pretrained",
    "patch_model",
    "patch_report",
    "save_pretrained",
    "set_inference",
    "unpatch_model",
    "use_contexts",
]


if TYPE_CHECKING:
    from cn_hf.errors import CnHfError, ConfigError, ContextIdError, PatchError
    from cn_hf.hub import from_pretrained, save_pretrained
    from cn_hf.norm import ContextNorm, MixtureNorm
    from cn_hf.patching import (
        ContextNormConfig,
        calibrate,
        context_parameters,
        fold_context,
        patch_model,
        patch_report,
        set_inference,
        unpatch_model,
        use_contexts,
    )


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"cn_hf.{name}")
    raise AttributeError(f"module 'cn_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
