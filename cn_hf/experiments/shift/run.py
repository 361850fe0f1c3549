"""``cn-hf reproduce shift``: cells one after the other, each at most once, then the report of all that are finished."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cn_hf.devices import torch_threads
from cn_hf.errors import CheckpointError, ConfigError, nearest
from cn_hf.evaluation.tables import write_results
from cn_hf.experiments.shift.cell import Plan, run_cell
from cn_hf.experiments.shift.data import ShiftData, load_shift_data
from cn_hf.experiments.shift.report import packed, write_report, write_sheet
from cn_hf.experiments.sources import check_datasets, find_datasets
from cn_hf.files import read_json
from cn_hf.training.run_folder import RESULTS, held_folder, is_held

__all__ = ["BUDGETS", "Budget", "reproduce_shift"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The choice of cells that are run.

    Attributes:
        plans: of seed 0.
        seeds: of every plan.
        threads: of torch.
        is_evidence: False where results check the machinery alone.
        summary: in words.
    """

    plans: tuple[Plan, ...]
    seeds: int
    threads: int
    is_evidence: bool
    summary: str


_NETWORK_OPTIONS: dict[str, dict[str, Any]] = {
    "resnet": {"epochs": 10},
    "groupnorm": {"epochs": 12},
    "vit": {"epochs": 20, "learning_rate": 1e-3},
    "wrn28_2": {"epochs": 6},
}

BUDGETS = {
    "smoke": Budget(
        plans=(
            Plan(
                network="resnet",
                dataset="digits",
                seed=0,
                epochs=2,
                test_images=20,
                unlabelled=16,
                counts=(4, 16),
                priors=(4.0,),
                severities=(3,),
            ),
        ),
        seeds=1,
        threads=2,
        is_evidence=False,
        summary="Handwritten digits of scikit-learn, 20 test images a domain, one source network of 2 epochs.",
    ),
    "small": Budget(
        plans=(Plan(network="resnet", dataset="cifar10", seed=0, **_NETWORK_OPTIONS["resnet"]),),
        seeds=3,
        threads=2,
        is_evidence=True,
        summary="CIFAR-10, ResNet-9 with batch norms, 1,000 test images a domain, severity 5, 64 unlabelled images a "
        "domain, prior 4; errors are paired by image.",
    ),
    "medium": Budget(
        plans=tuple(
            Plan(network=network, dataset=dataset, seed=0, severities=(), **options)
            for dataset in ("cifar100", "cifar10")
            for network, options in _NETWORK_OPTIONS.items()
        ),
        seeds=1,
        threads=2,
        is_evidence=True,
        summary="CIFAR-100 and CIFAR-10, four networks, 1,000 test images a domain, severity 5, 64 unlabelled images a "
        "domain, prior 4; errors are paired by image.",
    ),
}


def reproduce_shift(
    *,
    budget: str,
    data_root: Path | None = None,
    corrupted: Path | None = None,
    seeds: int | None = None,
    only: Sequence[str] = (),
    output_dir: Path | None = None,
    list_cells: bool = False,
    progress: bool = True,
) -> None:
    """Run what is not finished of the experiment and write its report.

    Args:
        budget: of ``BUDGETS``.
        data_root: folder of datasets by name; None: they are read from the Hub.
        corrupted: a folder of the published CIFAR-10-C; None: images are corrupted here.
        seeds: source networks of each kind; None: as many as the budget says.
        only: names of cells, or patterns; empty: all.
        output_dir: for all experiments of one budget; None: ``runs/BUDGET``.
        list_cells: only print the cells and which are finished.
        progress: show progress bars.

    Raises:
        ConfigError: an unknown budget or cell, or the folder holds another protocol's cell.
        DatasetError: a data set has not the columns or classes it needs.
        DatasetFileError: a data set is missing.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"Unknown budget {budget!r} of shift; {nearest(budget, BUDGETS)}")
    chosen = BUDGETS[budget]
    count = chosen.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"Expected at least 1 seed, received {count}.")
    folder = (Path("runs") / budget if output_dir is None else output_dir) / "shift"
    plans = [dataclasses.replace(plan, seed=seed) for seed in range(count) for plan in chosen.plans]
    wanted = _selected(plans, only)
    for plan in plans:
        _finished(plan, folder, corrupted)  # refuses other protocols before anything is run
    if corrupted is not None and any(plan.dataset != "cifar10" for plan in plans):
        raise ConfigError(f"Expected no folder of CIFAR-10-C with budget {budget!r}, whose images are not CIFAR-10's.")
    if list_cells:
        for plan in wanted:
            print(f"{plan.name:40} {'finished' if _finished(plan, folder, corrupted) else 'to do'}")
        return
    names = {plan.dataset for plan in wanted if not _finished(plan, folder, corrupted)} - {"digits"}
    places = find_datasets(sorted(names), data_root)
    check_datasets(places)
    loaded: tuple[str, ShiftData] | None = None
    with torch_threads(chosen.threads):
        for number, plan in enumerate(wanted, start=1):
            home = _home(plan, folder)
            said = f"cell {number} of {len(wanted)}: shift {plan.name}"
            if _finished(plan, folder, corrupted):
                print(f"{said} is finished")
                continue
            if is_held(home):
                print(f"{said} is run by another process")
                continue
            print(said)
            if loaded is None or loaded[0] != plan.dataset:
                loaded = plan.dataset, load_shift_data(plan.dataset, places.get(plan.dataset), corrupted)
            _run(plan, loaded[1], home, corrupted, progress)
            write_sheet(loaded[1], folder / f"{plan.dataset}.sheet.png")
    cells = [cell for plan in plans if (cell := _finished(plan, folder, corrupted)) is not None]
    text = (
        write_report(folder, cells, budget=budget, summary=chosen.summary, is_evidence=chosen.is_evidence)
        if cells
        else "No cell is finished."
    )
    print(f"\n{text}\nwritten to {folder}")


def _home(plan: Plan, folder: Path) -> Path:
    return folder / "cells" / plan.name


def _selected(plans: Sequence[Plan], only: Sequence[str]) -> list[Plan]:
    names = [plan.name for plan in plans]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"no cell {pattern!r}; {nearest(pattern, names)} Patterns such as 'resnet.*' name several."
            )
    return [plan for plan in plans if not only or any(fnmatch.fnmatch(plan.name, pattern) for pattern in only)]


def _run(plan: Plan, data: ShiftData, home: Path, corrupted: Path | None, progress: bool) -> None:
    with held_folder(home) as held:
        results = run_cell(plan, data, home, progress=progress)
        held.check()
        rows = [
            {"name": row.name, "needs": row.needs, "correct": {name: packed(x) for name, x in row.correct.items()}}
            for row in results["rows"]
        ]
        content = {**results, "rows": rows, "test_images": plan.test_images, "published": corrupted is not None}
        write_results(home / RESULTS, content)
    print(f"took {results['seconds']['all']:.0f} s, clean accuracy {100 * results['clean']:.1f} %")


def _finished(plan: Plan, folder: Path, corrupted: Path | None) -> dict[str, Any] | None:
    """Return a cell's results, None unless it is finished.

    Raises:
        CheckpointError: they cannot be read.
        ConfigError: they are those of another protocol.
    """
    file = _home(plan, folder) / RESULTS
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        other = {**content["plan"], "published": content["published"]}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no result of this experiment ({error!r}).") from error
    own = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(plan).items()}
    own["published"] = corrupted is not None
    if differs := [name for name in own if other.get(name) != own[name]]:
        raise ConfigError(
            f"{file.parent} holds a cell of another protocol ({', '.join(differs)}). Nothing was overwritten; give "
            "another --output-dir, or remove that folder."
        )
    result: dict[str, Any] = content
    return result
