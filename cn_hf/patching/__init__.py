"""Giving an existing model contexts: patch it, route ids through it, calibrate it, fold it."""

from cn_hf.patching.calibrate import calibrate
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.fold import fold_context
from cn_hf.patching.inference import set_inference
from cn_hf.patching.patch import context_parameters, patch_model, patch_report, unpatch_model
from cn_hf.patching.routing import use_contexts

__all__ = [
    "ContextNormConfig",
    "calibrate",
    "context_parameters",
    "fold_context",
    "patch_model",
    "patch_report",
    "set_inference",
    "unpatch_model",
    "use_contexts",
]
