"""Giving an existing model contexts: patch it, route ids through it, calibrate it, fold it."""

from cn_hf.patching.calibrate import calibrate
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.fold import fold_context
from cn_hf.patching.grow import add_contexts, remove_contexts, train_only_contexts
from cn_hf.patching.inference import set_inference
from cn_hf.patching.patch import context_parameters, patch_model, patch_report, unpatch_model
from cn_hf.patching.routing import use_contexts

__all__ = [
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
]
