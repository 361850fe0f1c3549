"""``cn-hf reproduce`` and ``cards``: their options. What they do is imported only once these are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["cards", "reproduce"]


def reproduce(
    experiment: Annotated[str, typer.Argument(help="table5 to table10, fig3, fig4, or shift: new domains.")],
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder for each dataset (cifar10, cifar100, mnist, svhn); else the Hub's."),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="paper: its protocol in full; small: at most 30 minutes on two cores; smoke: 20 seconds; these two "
            "check the machinery. table9 and table10 also have medium: an hour or two on two cores. shift has smoke, "
            "small (45 minutes) and medium."
        ),
    ] = "paper",
    seeds: Annotated[int | None, typer.Option(help="Runs of every cell; else as many as the budget says.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run these cells only, e.g. cn.cifar10-1.seed0 or 'cn.*' (repeatable)."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for all results; else runs/BUDGET.")] = None,
    corrupted: Annotated[
        Path | None, typer.Option(help="shift: a folder of the published CIFAR-10-C; else images are corrupted here.")
    ] = None,
    list_cells: Annotated[bool, typer.Option("--list", help="Only list the cells and which are finished.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Reproduce a table or figure of the paper: train its cells, evaluate them honestly, show the paper's numbers too.

    Finished cells are never run again and a stopped one goes on from its last checkpoint, so the same command can be
    given again at any time; given several times at once, the runs share the cells.
    """
    from cn_hf.errors import ConfigError

    if experiment == "shift":
        from cn_hf.experiments.shift.run import reproduce_shift

        reproduce_shift(
            budget=budget,
            data_root=data_root,
            corrupted=corrupted,
            seeds=seeds,
            only=only or (),
            output_dir=output_dir,
            list_cells=list_cells,
            progress=progress,
        )
        return
    if corrupted is not None:
        raise ConfigError(f"Expected --corrupted with shift alone, received it with {experiment!r}.")

    from cn_hf.experiments.spec import read_experiment

    read_experiment(experiment).budget(budget)  # a wrong word is refused before heavy libraries are loaded

    from cn_hf.experiments.runner import reproduce_experiment
    from cn_hf.training.memory import keep_freed_memory

    keep_freed_memory()
    reproduce_experiment(
        experiment,
        data_root=data_root,
        budget=budget,
        seeds=seeds,
        only=only or (),
        output_dir=output_dir,
        list_cells=list_cells,
        progress=progress,
    )


def cards(
    results: Annotated[list[Path], typer.Argument(help="results.json of one or more reports of `cn-hf reproduce`.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the cards.")] = Path("model_cards"),
) -> None:
    """Write a model card for each checkpoint that an experiment produced; every figure comes from its results file."""
    from cn_hf.experiments.cards import write_cards

    for file in results:
        for path in write_cards(file, output_dir):
            print(path)
