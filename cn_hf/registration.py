"""Makes transformers and timm know patched checkpoints, at once if they are imported, else when they are.

``import cn_hf`` must not import either library. A finder at the head of ``sys.meta_path`` therefore watches for the
modules of theirs in which models are looked up, and lets ``cn_hf.hub`` register once such a module has been executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["register_when_imported"]

REGISTERED_BY = {
    "timm.models": "cn_hf.hub.timm_models",
    "transformers.modeling_utils": "cn_hf.hub.transformers_models",
    "transformers.pipelines": "cn_hf.hub.pipeline",
    "transformers.trainer": "cn_hf.hub.trainer",
    "transformers.models.auto.configuration_auto": "cn_hf.hub.transformers_models",
}
"""Watched module -> the module whose ``register()`` is called after it."""


def register_when_imported() -> None:
    """Register with the libraries that are imported already, and watch for the others. Calling it again is harmless."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    for name in REGISTERED_BY:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(name)


def _register(name: str) -> None:
    importlib.import_module(REGISTERED_BY[name]).register()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the loader the other finders give for a watched module registers when it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in REGISTERED_BY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _register_after(spec.loader, fullname)
                return spec
        return None


def _register_after(loader: importlib.abc.Loader, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register(name)

    loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one instance
