"""Run an experiment: its cells one after the other, each at most once, then the report of all that are finished.

The same command can be given again at any time, and several times at once: a finished cell is left alone, a stopped
one goes on from its last checkpoint, and one that another process is at is passed over. Under ``accelerate launch`` the
main process decides for all.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from cn_hf.data import PreparedData
from cn_hf.devices import torch_threads
from cn_hf.errors import DivergedError, TrainingError
from cn_hf.experiments.cells import Cell, CellResult, check_cells, plan_cells, read_result, select_cells
from cn_hf.experiments.report import check_report, write_report
from cn_hf.experiments.sources import check_datasets, find_datasets
from cn_hf.experiments.spec import read_experiment
from cn_hf.processes import on_main
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.data import load_adamatch_data
from cn_hf.recipes.adamatch.run import train_adamatch
from cn_hf.recipes.classifier.data import data_options, load_data
from cn_hf.recipes.classifier.run import train_classifier
from cn_hf.training.config import TrainingConfig
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.run_folder import CHECKPOINTS, is_held

__all__ = ["reproduce_experiment", "run_cells"]


def reproduce_experiment(
    name: str,
    *,
    data_root: Path | None = None,
    budget: str = "paper",
    seeds: int | None = None,
    only: Sequence[str] = (),
    output_dir: Path | None = None,
    list_cells: bool = False,
    progress: bool = True,
) -> list[CellResult]:
    """Run what is not finished of an experiment and write its report.

    Args:
        name: "table5", ...; see ``EXPERIMENTS``.
        data_root: Folder of datasets by name; None: they are read from the Hub.
        budget: By name.
        seeds: Runs of every cell; None: as many as the budget says.
        only: Names of cells, or patterns; empty: all.
        output_dir: For all experiments of one budget; None: ``runs/BUDGET``.
        list_cells: Only print the cells and which are finished.
        progress: Show progress bars.

    Returns:
        The finished cells of the experiment, also those that were not run now.

    Raises:
        ConfigError: An unknown experiment, budget or cell, or the folder holds another protocol's runs.
        DatasetFileError: A dataset is missing.
        DatasetError: A dataset has not the columns or classes it needs.
        TrainingError: The loss of some cells stopped being finite; the others were run, and the report is written.
    """
    experiment = read_experiment(name)
    folder = Path("runs") / budget if output_dir is None else output_dir
    columns = [experiment.columns[column] for column in experiment.budget(budget).columns]
    places = find_datasets((dataset for column in columns for dataset in column.datasets), data_root)
    cells = plan_cells(experiment, budget, seeds=seeds, places=places, output_dir=folder, progress=progress)
    chosen = select_cells(cells, only)
    check_cells(cells)
    check_report(folder / name, experiment, budget)
    if list_cells:
        for cell in chosen:
            print(f"{cell.name:40} {'finished' if cell.finished else 'to do'}")
        return []
    if not all(cell.finished for cell in chosen):
        check_datasets(places)
    accelerator = make_accelerator(chosen[0].config)
    with torch_threads(experiment.budget(budget).threads):
        failures = run_cells(name, chosen, accelerator)
    results = [result for cell in cells if (result := read_result(cell)) is not None]
    text = on_main(lambda: write_report(folder / name, experiment, budget, cells, results, failures))
    accelerator.print(f"\n{text}\n\nwritten to {folder / name}")
    if failures:
        raise TrainingError(f"{len(failures)} of {len(chosen)} cells failed: {'; '.join(failures.values())}")
    return results


def run_cells(name: str, cells: Sequence[Cell], accelerator: Accelerator) -> dict[str, str]:
    """Run the cells that are neither finished nor run by another process, one after the other.

    Args:
        name: Of the experiment, for messages.
        cells: In this order.
        accelerator: Of the processes that run them together.

    Returns:
        What went wrong, by cell. A cell whose loss stopped being finite does not keep the others from being run.

    Raises:
        TrainingInterruptedError: A signal asked the run to stop; the cell it was at goes on from there next time.
    """
    failures: dict[str, str] = {}
    seconds: list[float] = []
    say, data = accelerator.print, _SharedData(accelerator)
    for number, cell in enumerate(cells, start=1):
        with _reserved(cell) as state:
            if state != "free":
                say(f"cell {number} of {len(cells)}: {name} {cell.name} is {state}")
                continue
            left = sum(not later.finished for later in cells[number - 1 :])
            estimate = f", about {_duration(left * sum(seconds) / len(seconds))} left for {left}" if seconds else ""
            say(f"\ncell {number} of {len(cells)}: {name} {cell.name}{estimate}")
            started = time.perf_counter()
            try:
                with _logged(cell, accelerator):
                    _train(cell.config, data.of(cell.config))
            except DivergedError as error:
                failures[cell.name] = f"{cell.name}: {error}"
                say(f"failed: {error}")
            else:
                if accelerator.is_main_process:
                    _drop_checkpoints(cell)
                say(_outcome(cell))
            seconds.append(time.perf_counter() - started)
            say(f"took {_duration(seconds[-1])}")
    return failures


def _train(config: TrainingConfig, data: PreparedData) -> None:
    if isinstance(config, AdaMatchConfig):
        train_adamatch(config, resume=True, data=data)
    else:
        train_classifier(config, resume=True, data=data)


class _SharedData:
    """Data loaded once for all cells in a row that need the same: it takes as long as many an epoch."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._options: dict[str, Any] | None = None
        self._data: PreparedData | None = None

    def of(self, config: TrainingConfig) -> PreparedData:
        """The data that a config names."""
        options = data_options(config)
        if self._data is None or options != self._options:
            self._data = None  # two would not always fit into memory
            load = load_adamatch_data if isinstance(config, AdaMatchConfig) else load_data
            self._data, self._options = load(config, self._accelerator), options
        return self._data


@contextlib.contextmanager
def _reserved(cell: Cell) -> Iterator[str]:
    """Keep other commands away from a cell; gives "free", "finished" or "run by another process", the same everywhere.

    The lock is the operating system's, so that it does not outlive a killed process.
    """
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.folder.parent / f".{cell.name}.lock")

    def state() -> str:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return "run by another process"
        if cell.finished:
            return "finished"
        return "run by another process" if is_held(cell.folder) else "free"

    try:
        yield on_main(state)
    finally:
        lock.release()


@contextlib.contextmanager
def _logged(cell: Cell, accelerator: Accelerator) -> Iterator[None]:
    """Send the output of a run into ``log.txt`` in its folder; progress bars are shown as ever."""
    if not accelerator.is_main_process:
        yield
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def _outcome(cell: Cell) -> str:
    result = read_result(cell)
    accuracy = None if result is None else result.row().accuracy()
    return "" if result is None or accuracy is None else f"top-1 {100 * accuracy:.2f} % ({result.row().name})"


def _drop_checkpoints(cell: Cell) -> None:
    """A finished cell is never resumed, and its checkpoints are several times the size of what it leaves."""
    shutil.rmtree(cell.folder / CHECKPOINTS, ignore_errors=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
