"""Honest evaluation: metrics, protocols with the leak check, tables and figures. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.evaluation.environment import run_environment
    from cn_hf.evaluation.metrics import Accuracy, MacroPrecisionRecallF1, TopKAccuracy, trainer_compute_metrics
    from cn_hf.evaluation.plots import plot_context_statistics, plot_protocols, plot_training_curves
    from cn_hf.evaluation.protocols import evaluate_protocols
    from cn_hf.evaluation.report import ProtocolReport, ProtocolRow
    from cn_hf.evaluation.tables import (
        ResultRow,
        comparison_table,
        context_table,
        format_accuracy,
        format_runs,
        markdown_table,
        protocol_table,
        protocol_tables,
        write_results,
    )

_HOMES = {
    "environment": ("run_environment",),
    "metrics": ("Accuracy", "MacroPrecisionRecallF1", "TopKAccuracy", "trainer_compute_metrics"),
    "plots": ("plot_context_statistics", "plot_protocols", "plot_training_curves"),
    "protocols": ("evaluate_protocols",),
    "report": ("ProtocolReport", "ProtocolRow"),
    "tables": (
        "ResultRow",
        "comparison_table",
        "context_table",
        "format_accuracy",
        "format_runs",
        "markdown_table",
        "protocol_table",
        "protocol_tables",
        "write_results",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Accuracy",
    "MacroPrecisionRecallF1",
    "ProtocolReport",
    "ProtocolRow",
    "ResultRow",
    "TopKAccuracy",
    "comparison_table",
    "context_table",
    "evaluate_protocols",
    "format_accuracy",
    "format_runs",
    "markdown_table",
    "plot_context_statistics",
    "plot_protocols",
    "plot_training_curves",
    "protocol_table",
    "protocol_tables",
    "run_environment",
    "trainer_compute_metrics",
    "write_results",
]


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            return getattr(importlib.import_module(f"cn_hf.evaluation.{_HOME_OF[name]}"), name)
        raise AttributeError(f"module 'cn_hf.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
