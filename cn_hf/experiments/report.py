"""The report of an experiment: ``table.md``, ``results.json`` with every cell, and figures.

It is made anew from the finished cells' own results, so it never holds a number that no cell has. What it says is in
``summary.py``; here it is put together and written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.evaluation.tables import write_results
from cn_hf.experiments.cells import Cell, CellResult, read_epochs
from cn_hf.experiments.figures import plot_accuracies, plot_cell_contexts, plot_curves
from cn_hf.experiments.spec import BUDGETS, Budget, Experiment
from cn_hf.experiments.summary import (
    Results,
    accuracy_bars,
    epochs_table,
    honest_tables,
    paper_tables,
    sentences,
    table_entries,
)
from cn_hf.files import write_whole
from cn_hf.patching.config import CN_MODES
from cn_hf.training.run_folder import RESULTS

__all__ = ["check_report", "report_title", "write_report"]

CURVES = {"validation_error": "validation error, %", "validation_loss": "validation loss"}


def report_title(experiment: Experiment, budget: Budget) -> str:
    """Return the text above tables and figures, with the limits of a small budget."""
    if budget.is_evidence:
        return experiment.title
    what = "a check of the machinery, " if budget.name in BUDGETS else ""
    return f"{experiment.title} [budget {budget.name}: {what}not evidence for or against the paper]"


def check_report(folder: Path, experiment: Experiment, budget: str) -> None:
    """Refuse a folder that holds another report.

    Raises:
        ConfigError: It is another experiment's, or of another budget.
        CheckpointError: ``results.json`` cannot be read.
    """
    file = folder / RESULTS
    if not file.exists():
        return
    try:
        content = json.loads(file.read_bytes())
        found = content["experiment"], content["budget"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not the report of an experiment ({error!r}); give another --output-dir"
        ) from error
    if found != (experiment.name, budget):
        raise ConfigError(
            f"{file} is the report of {found[0]} with budget {found[1]}, this is {experiment.name} with budget "
            f"{budget}. Nothing was overwritten; give another --output-dir"
        )


def write_report(
    folder: Path,
    experiment: Experiment,
    budget: str,
    cells: Sequence[Cell],
    finished: Sequence[CellResult],
    failures: Mapping[str, str],
) -> str:
    """Write the report of what is finished.

    Args:
        folder: Its own; made if need be.
        experiment: Which.
        budget: By name.
        cells: All that the experiment has at this budget.
        finished: Results of those that are finished.
        failures: What went wrong, by cell.

    Returns:
        The text of ``table.md``.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    results = Results(
        experiment=experiment,
        budget=experiment.budget(budget),
        cells=tuple(cells),
        finished=tuple(finished),
        epochs={cell.name: epochs for cell in cells if (epochs := read_epochs(cell))},
    )
    title = report_title(experiment, results.budget)
    try:
        figures = _draw(folder, results, title)
        text = _text(results, title, failures, figures)
        write_whole(folder / "table.md", f"{text}\n".encode())
        write_results(folder / RESULTS, _content(results, title, failures))
    except OSError as error:
        raise CheckpointError(f"the report cannot be written to {folder}: {error}") from error
    return text


def _text(results: Results, title: str, failures: Mapping[str, str], figures: Sequence[Path]) -> str:
    experiment, budget = results.experiment, results.budget
    parts = [f"# {title}", budget.summary, _provenance(results)]
    parts += [f"Not finished: {', '.join(missing)}." for missing in [_missing(results)] if missing]
    parts += [f"Failed: {problem}" for problem in failures.values()]
    if not results.finished:
        return "\n\n".join(parts)
    if experiment.measures:
        parts += ["## The paper's numbers and ours", *paper_tables(results)]
    differences = [f"- {difference}" for difference in experiment.differences]
    parts += ["Differences from the paper's protocol, in all rows:\n\n" + "\n".join(differences)]
    parts += ["## What the contexts are worth", "\n".join(f"- {sentence}" for sentence in sentences(results))]
    parts += honest_tables(results)
    if table := epochs_table(results):
        parts += [f"## Epochs to reach the best of {experiment.trained[experiment.baseline].title}", table]
    parts += [f"![{path.stem}]({path.name})" for path in figures]
    return "\n\n".join(parts)


def _provenance(results: Results) -> str:
    """Return the origin of the numbers, in one paragraph."""
    experiment, budget = results.experiment, results.budget
    environments = [result.content.get("environment", {}) for result in results.finished]
    machines = sorted(
        {
            f"{found['device']} ({found['cpu']}, {found['cpu_cores']} cores), torch {found['versions']['torch']}, "
            f"cn_hf {found['versions']['cn_hf']}"
            for found in environments
            if found
        }
    )
    finished = f"{len(results.finished)} of {len(results.cells)} cells finished"
    return (
        f"Made by `cn-hf reproduce {experiment.name} --budget {budget.name}`: {finished}, "
        f"run on {'; '.join(machines) or 'no machine yet'}. Ours are mean ± standard deviation over n seeds, "
        "in percent of the test images."
    )


def _missing(results: Results) -> list[str]:
    finished = {result.cell.name for result in results.finished}
    return [cell.name for cell in results.cells if cell.name not in finished]


def _draw(folder: Path, results: Results, title: str) -> list[Path]:
    """The figures that the experiment asks for and that there are results for."""
    experiment = results.experiment
    drawn: list[Path] = []
    lines = [row.title for row in experiment.trained.values()]
    for quantity, label in CURVES.items():
        if quantity in experiment.figures and results.epochs:
            columns = [experiment.columns[name] for name in results.budget.columns]
            panels = {c.title: {line: [*runs.values()] for line, runs in results.curves(c).items()} for c in columns}
            panels = {name: runs for name, runs in panels.items() if runs}
            path = folder / f"{quantity}.png"
            drawn.append(plot_curves(panels, path, quantity=quantity, label=label, title=title, lines=lines))
    if "accuracies" in experiment.figures and results.finished:
        printed = {measure.k for measure in experiment.measures}
        for measure in (measure for measure in results.shown() if measure.k in printed):
            panels_of_bars = {column.title: accuracy_bars(results, column, measure) for column in results.columns()}
            path = folder / f"accuracies-{measure.title.replace('-', '').replace(' ', '-')}.png"
            drawn.append(plot_accuracies(panels_of_bars, path, label=f"{measure.title} accuracy, %", title=title))
    if "contexts" in experiment.figures:
        learned = [result for result in results.first_with_contexts() if result.cell.config.mode in CN_MODES]
        for result in learned:
            path = folder / f"contexts-{result.cell.row}-{result.cell.column}.png"
            named = f"{experiment.trained[result.cell.row].title}, {experiment.columns[result.cell.column].title}"
            drawn.append(plot_cell_contexts(result.cell, path, title=named))
    return drawn


def _content(results: Results, title: str, failures: Mapping[str, str]) -> dict[str, Any]:
    experiment, budget = results.experiment, results.budget
    finished = {result.cell.name: result for result in results.finished}
    entries = {}
    for cell in results.cells:
        result = finished.get(cell.name)
        state = "finished" if result is not None else "failed" if cell.name in failures else "not run"
        entries[cell.name] = {
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "state": state,
            **({} if result is None else result.content),
        }
    return {
        "experiment": experiment.name,
        "budget": budget.name,
        "title": title,
        "is_evidence": budget.is_evidence,
        "protocol": {"summary": budget.summary, "differences": experiment.differences, **dataclasses.asdict(budget)},
        "table": table_entries(results),
        "findings": sentences(results),
        "failures": failures,
        "cells": entries,
    }
