"""A pytest plugin: write each test's outcome as a JSON line, and patch every model that the tests create.

``suites.py`` starts pytest with it. What to do stands in the environment, as JSON: see ``Order``. A patched model is in
context 0 while it trains, since other libraries' tests give no ids; in evaluation it has none, so that CN+ runs.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
import types
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import timm
from torch import nn

from cn_hf.errors import PatchError
from cn_hf.hub import transformers_models
from cn_hf.patching import patch_model, use_contexts
from cn_hf.patching.routing import RoutedModel

__all__ = ["ORDER", "Order", "checkout_module", "patched"]

VARIABLE = "CN_HF_SUITE"
RUNNING = "running"
WAYS = (None, "cn-channels")
"""Modes to try: the one that fits the norms; for a model without any, a slot at its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The task of one run of pytest.

    Attributes:
        checkout: folder of the library's source distribution or repository.
        rows: file of JSON lines that outcomes are appended to.
        patch: True to patch every created model.
        models: run the tests of these models alone; those of no model in particular go as ``""``; None for all.
        tests: run these tests alone; None for all.
        done: tests to leave out.
        deadline: ``time.time()`` after which no further test starts.
    """

    checkout: str
    rows: str
    patch: bool
    models: list[str] | None = None
    tests: list[str] | None = None
    done: list[str] | None = None
    deadline: float = float("inf")

    def environment(self) -> dict[str, str]:
        """The environment that hands this to the plugin."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}


ORDER = Order(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None


# ----------------------------------------------------------------------------------------------------------- patching


def patched(model: nn.Module) -> nn.Module:
    """Patch a model in the mode that fits it, if the order says so, and let it train in context 0."""
    if ORDER is None or not ORDER.patch or any(isinstance(module, RoutedModel) for module in model.modules()):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in WAYS:
            try:
                patch_model(model, mode)
            except PatchError:
                if mode == WAYS[-1]:
                    raise
            else:
                break
    created.append(type(model).__name__)
    _stay_in_context(model)
    return model


created: list[str] = []
"""Classes of the models that the running test created and that were patched."""
_blocks: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


def _stay_in_context(model: nn.Module) -> None:
    """Let a patched model be in context 0 if it trains, and in none if it does not."""
    if model.training and model not in _blocks:
        _blocks[model] = ExitStack()
        _blocks[model].enter_context(use_contexts(model, 0))
    elif not model.training and model in _blocks:
        _blocks.pop(model).close()


def _watch_training() -> None:
    train = nn.Module.train

    @functools.wraps(train)
    def watched(self: nn.Module, mode: bool = True) -> nn.Module:
        train(self, mode)
        if isinstance(self, RoutedModel):
            _stay_in_context(self)
        return self

    nn.Module.train = watched  # type: ignore[method-assign]


def _patch_timm() -> None:
    create_model = timm.create_model

    @functools.wraps(create_model)
    def create_patched(*args: Any, **kwargs: Any) -> nn.Module:
        return patched(create_model(*args, **kwargs))

    timm.create_model = timm.models.create_model = create_patched


def _watch_configs() -> None:
    """See the models that transformers builds from the config of a patched one."""
    build = transformers_models.patch_model

    @functools.wraps(build)
    def watched(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        build(model, *args, **kwargs)
        created.append(type(model).__name__)
        _stay_in_context(model)
        return model

    transformers_models.patch_model = watched  # type: ignore[assignment]


def checkout_module(name: str) -> types.ModuleType:
    """Import a module of the checkout's ``tests`` folder, which need be no package.

    Args:
        name: without the folder, as ``"test_modeling_common"``.
    """
    assert ORDER is not None
    package = types.ModuleType("checkout_tests")
    package.__path__ = [str(Path(ORDER.checkout) / "tests")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


# -------------------------------------------------------------------------------------------------------------- pytest


def pytest_configure() -> None:
    """Patch what creates models, before test modules import it."""
    if ORDER is not None and ORDER.patch:
        _watch_training()
        _watch_configs()
        _patch_timm()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the ordered tests."""
    if ORDER is None:
        return
    done = set(ORDER.done or ())
    kept = [
        item
        for item in items
        if _key(item.nodeid) not in done
        and (ORDER.tests is None or _key(item.nodeid) in ORDER.tests)
        and (ORDER.models is None or _model_of(item) in ORDER.models)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write that a test runs: if it kills the process, ``suites.py`` knows which it was."""
    if ORDER is not None:
        if time.time() > ORDER.deadline:
            pytest.exit("The time is up.", returncode=0)
        created.clear()
        _write(nodeid, RUNNING, 0.0, "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write an outcome: a test counts when it ran, or when its set-up failed or skipped it."""
    if ORDER is not None and (report.when == "call" or report.outcome != "passed"):
        lines = report.longreprtext.strip().splitlines()
        errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
        message = " ".join((errors or lines[-1:])[:4])
        _write(report.nodeid, report.outcome, report.duration, message if report.outcome == "failed" else "")


def pytest_runtest_teardown() -> None:
    """Let models of the last test go."""
    _blocks.clear()


def _write(nodeid: str, outcome: str, seconds: float, message: str) -> None:
    assert ORDER is not None
    row = {"test": _key(nodeid), "patched": ORDER.patch, "outcome": outcome, "seconds": round(seconds, 2)}
    row |= {"models": len(created)} if ORDER.patch else {}
    with Path(ORDER.rows).open("a") as file:
        file.write(json.dumps({**row, "message": message[:600]}) + "\n")


def _key(nodeid: str) -> str:
    return nodeid.partition("::")[2]


def _model_of(item: pytest.Item) -> str:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(parameters.get("model_name", "")).partition(".")[0]
