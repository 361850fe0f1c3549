"""``cn-hf evaluate``: its options. What it does is imported only once they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cn_hf.printing import for_terminal, plain_warnings

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's or run's folder, or user/name on the Hub.")],
    data: Annotated[str, typer.Argument(help="A folder, or a data set on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json and table.md.")] = Path(
        "cn-hf-evaluation"
    ),
    contexts: Annotated[
        str,
        typer.Option(
            help="column:NAME; folder: the one above the class's; source: the checkpoint's own; none: the column "
            "context_ids, if there is one."
        ),
    ] = "none",
    split: Annotated[str | None, typer.Option(help="Split to evaluate on; else test, or the only one.")] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split that the leak check counts classes in; else no leak check.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images; else the only one.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of classes; else the only one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled contexts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint on the Hub.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository or folder.")] = "",
    token: Annotated[
        str | None, typer.Option(help="Hub token; else the stored one.", envvar="HF_TOKEN", show_envvar=False)
    ] = None,
) -> None:
    """Evaluate a checkpoint honestly: told contexts, without, predicted, averaged, shuffled; and within each context.

    Images are prepared as the checkpoint says. Classes and contexts of the data are matched by name.
    """
    from cn_hf.evaluation.checkpoint import check_results_folder, evaluate_checkpoint
    from cn_hf.hub.repository import HubOptions

    check_results_folder(output)
    with plain_warnings():
        found = evaluate_checkpoint(
            checkpoint,
            data,
            contexts=contexts,
            split=split,
            train_split=train_split,
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            seed=seed,
            device=device,
            options=HubOptions(revision=revision, subfolder=subfolder, token=token),
            progress=progress,
        )
    print(found.text())
    found.write(output)
    print(f"\nwritten to {for_terminal(output)}")
