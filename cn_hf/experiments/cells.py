"""The cells of an experiment: which runs it takes, where each lives, and what a finished one says.

A cell is one run: (experiment, row, column, seed). It has a name, ``cn.cifar10-1.seed0``, and a folder of that name
under ``OUTPUT/EXPERIMENT/cells``. Experiments that read another's cells share its folders.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError, ConfigError, nearest
from cn_hf.evaluation.report import ProtocolRow
from cn_hf.experiments.spec import Experiment, config_class
from cn_hf.training.config import TrainingConfig
from cn_hf.training.run_folder import RESULTS, RUN

__all__ = [
    "Cell",
    "CellResult",
    "check_cells",
    "plan_cells",
    "protocol_name",
    "read_epochs",
    "read_result",
    "select_cells",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of an experiment. ``config`` names its folder, and its datasets by the places they are read from."""

    row: str
    column: str
    seed: int
    config: TrainingConfig

    @property
    def name(self) -> str:
        """The name that ``--only`` takes."""
        return f"{self.row}.{self.column}.seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder that the run writes into."""
        assert self.config.output_dir is not None
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        """True if it has left its results, which a run writes last."""
        return (self.folder / RESULTS).is_file()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """The content of a finished cell.

    Attributes:
        cell: Which.
        rows: Of its evaluation.
        findings: Sentences of its evaluation, the leak check first.
        content: All of its ``results.json``.
    """

    cell: Cell
    rows: tuple[ProtocolRow, ...]
    findings: tuple[str, ...]
    content: Mapping[str, Any]

    def row(self, protocol: str | None = None) -> ProtocolRow:
        """The evaluation's row of this name; without one the true contexts, or the network that never saw any.

        Raises:
            ConfigError: There is none.
        """
        for row in self.rows:
            if protocol_name(row) == protocol or (protocol is None and row.kind in ("true contexts", "baseline")):
                return row
        names = [protocol_name(row) for row in self.rows]
        raise ConfigError(f"{self.cell.name} has no evaluation {protocol!r}; {nearest(str(protocol), names)}")


def protocol_name(row: ProtocolRow) -> str:
    """Return the name of an evaluation's row in every cell: without the network, which baselines have in brackets."""
    return row.name.split(" (")[0] if row.kind in ("leak check", "baseline") else row.name


def plan_cells(
    experiment: Experiment,
    budget: str,
    *,
    seeds: int | None,
    places: Mapping[str, str],
    output_dir: Path,
    progress: bool,
) -> list[Cell]:
    """The cells of an experiment, seed by seed, so that a run stopped early has whole columns.

    Args:
        experiment: Its rows decide which cells are needed.
        budget: By name.
        seeds: How many; None: as many as the budget says.
        places: Where each dataset is read from, by its name.
        output_dir: Holds a folder for each experiment.
        progress: Show progress bars.

    Raises:
        ConfigError: The budget is unknown, ``seeds`` is less than 1, or an option of a cell is not valid.
    """
    chosen = experiment.budget(budget)
    count = chosen.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds must be at least 1, got {count}")
    cells = []
    for seed in range(count):
        for name in chosen.columns:
            column = experiment.columns[name]
            for row in experiment.trained.values():
                config = config_class(experiment.trainer).from_dict(
                    {
                        **experiment.options,
                        **chosen.options,
                        **column.options,
                        **row.options,
                        "dataset": [places[dataset] for dataset in column.datasets],
                        "seed": seed,
                        "progress": progress,
                        "output_dir": str(output_dir / experiment.trains / "cells" / f"{row.name}.{name}.seed{seed}"),
                    }
                )
                cells.append(Cell(row=row.name, column=name, seed=seed, config=config))
    return cells


def select_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that ``only`` names, patterns such as ``cn.*.seed0`` understood; all where it is empty.

    Raises:
        ConfigError: A name or pattern fits no cell.
    """
    names = [cell.name for cell in cells]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"no cell {pattern!r}; {nearest(pattern, names)} Patterns such as 'cn.*' name several.")
    return [cell for cell in cells if not only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in only)]


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse folders that hold runs of another protocol, before anything is run.

    Raises:
        ConfigError: A cell's folder holds a run with other options.
        CheckpointError: What it holds cannot be read.
    """
    for cell in cells:
        for name in (RESULTS, RUN):
            described = _read_json(cell.folder / name)
            if described is None:
                continue
            if listed := cell.config.differences_in_words(_config_of(described, cell.folder / name)):
                raise ConfigError(
                    f"{cell.folder} holds a run of another protocol or budget ({listed}). Nothing was overwritten; "
                    "give another --output-dir, or remove that folder"
                )


def read_result(cell: Cell) -> CellResult | None:
    """Return the results of a cell; None unless it is finished.

    Raises:
        CheckpointError: Its results cannot be read.
    """
    file = cell.folder / RESULTS
    content = _read_json(file)
    if content is None:
        return None
    try:
        evaluation = content["evaluation"]
        names = content["data"]["context_names"] or ()
        return CellResult(
            cell=cell,
            rows=tuple(_protocol_row(row, names) for row in evaluation["rows"]),
            findings=tuple(evaluation["findings"]),
            content=content,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(file, f"it is not the results of a classifier ({error!r})") from error


def read_epochs(cell: Cell) -> tuple[Mapping[str, Any], ...]:
    """The epochs that a cell has behind it, finished or not; a run that diverged shows it here.

    Raises:
        CheckpointError: ``history.json`` cannot be read.
    """
    file = cell.folder / "history.json"
    content = _read_json(file)
    try:
        return () if content is None else tuple(content["epochs"])
    except (KeyError, TypeError) as error:
        raise _unreadable(file, f"it is no history ({error!r})") from error


def _protocol_row(values: Mapping[str, Any], context_names: Sequence[str]) -> ProtocolRow:
    """A row by the data's names of contexts, which a network without contexts numbers ``context_0``, ..."""
    row = ProtocolRow.from_dict(values)
    named = {f"context_{number}": name for number, name in enumerate(context_names)}

    def by_name(counts: Mapping[str, int]) -> dict[str, int]:
        return {named.get(context, context): count for context, count in counts.items()}

    return dataclasses.replace(
        row,
        context_samples=by_name(row.context_samples),
        context_correct={k: by_name(counts) for k, counts in row.context_correct.items()},
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(file, str(error)) from error


def _config_of(described: Any, file: Path) -> Mapping[str, Any]:
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict):
        raise _unreadable(file, "it holds no config")
    return config


def _unreadable(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read: {problem}. Remove its folder to run the cell again")
