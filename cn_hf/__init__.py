"""Context Normalization for timm and Hugging Face vision models.

Public names are imported when they are first used, so ``import cn_hf`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cn_hf.registration import register_when_imported

__version__ = "0.1.0"

_HOMES = {
    "cn_hf.adaptation": ("adapt",),
    "cn_hf.norm": ("ContextNorm", "MixtureNorm"),
    "cn_hf.patching": (
        "ContextNormConfig",
        "add_contexts",
        "calibrate",
        "context_parameters",
        "fold_context",
        "patch_model",
        "patch_report",
        "remove_contexts",
        "set_inference",
        "train_only_contexts",
        "unpatch_model",
        "use_contexts",
    ),
    "cn_hf.patching.restyle": ("restyle",),
    "cn_hf.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "cn_hf.errors": ("CnHfError", "ConfigError", "ContextIdError", "PatchError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBPACKAGES = (
    "adaptation",
    "contexts",
    "data",
    "errors",
    "evaluation",
    "hub",
    "models",
    "norm",
    "patching",
    "reading",
    "recipes",
    "training",
)

__all__ = [
    "CnHfError",
    "ConfigError",
    "ContextIdError",
    "ContextNorm",
    "ContextNormConfig",
    "MixtureNorm",
    "PatchError",
    "__version__",
    "adapt",
    "add_contexts",
    "calibrate",
    "context_parameters",
    "fold_context",
    "from_pretrained",
    "patch_model",
    "patch_report",
    "push_to_hub",
    "remove_contexts",
    "restyle",
    "save_pretrained",
    "set_inference",
    "train_only_contexts",
    "unpatch_model",
    "use_contexts",
]


if TYPE_CHECKING:
    # isort: off
    from cn_hf import (
        adaptation as adaptation,
        contexts as contexts,
        data as data,
        errors as errors,
        evaluation as evaluation,
        hub as hub,
        models as models,
        norm as norm,
        patching as patching,
        reading as reading,
        recipes as recipes,
        training as training,
    )

    # isort: on
    from cn_hf.adaptation import adapt
    from cn_hf.errors import CnHfError, ConfigError, ContextIdError, PatchError
    from cn_hf.hub import from_pretrained, push_to_hub, save_pretrained
    from cn_hf.norm import ContextNorm, MixtureNorm
    from cn_hf.patching import (
        ContextNormConfig,
        add_contexts,
        calibrate,
        context_parameters,
        fold_context,
        patch_model,
        patch_report,
        remove_contexts,
        set_inference,
        train_only_contexts,
        unpatch_model,
        use_contexts,
    )
    from cn_hf.patching.restyle import restyle


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            return getattr(importlib.import_module(_HOME_OF[name]), name)
        if name in _SUBPACKAGES:
            return importlib.import_module(f"cn_hf.{name}")
        raise AttributeError(f"module 'cn_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])


register_when_imported()
