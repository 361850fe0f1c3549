"""Patch every model of timm and the vision models of transformers, check them, and write the coverage table.

    python scripts/coverage                  # all; about an hour on one core; goes on where it was interrupted
    python scripts/coverage resnet18 swin    # these alone, printed and not written

Results are appended to ``--rows``, a file of JSON lines; a row is made again where it failed or the libraries changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def coverage(
    models: Annotated[
        list[str] | None, typer.Argument(help="timm or transformers models; all if none is given.")
    ] = None,
    rows: Annotated[Path, typer.Option(help="JSON lines, one a model.")] = Path("runs/coverage.jsonl"),
    output: Annotated[Path, typer.Option(help="Folder of coverage.md and coverage.json.")] = Path(
        "model_cards/results"
    ),
) -> None:
    """Sweep the models, then write the table; exits with 1 if one fails."""
    from scripts.coverage.sweep import Rows, sweep
    from scripts.coverage.table import headline, write_coverage

    found = Rows(rows)
    made = [found.rows[key] for key in sweep(found, models or ())]
    for row in made if models else found.rows.values():
        for words in row["failures"]:
            typer.echo(f"{row['name']}: {words}")
    if not models:
        typer.echo(f"{headline(found.rows.values())} Written: {write_coverage(found, output)}")
    if any(row["failures"] for row in (made if models else found.rows.values())):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's modules are scripts.coverage.*

    from cn_hf.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(coverage)
    run_app(app)
