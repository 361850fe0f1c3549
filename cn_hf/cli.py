"""The ``cn-hf`` command. Each subcommand is a few lines that call into the package.

Heavy libraries are imported by the subcommand that needs them, so that ``cn-hf --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import cn_hf
from cn_hf.adaptation.command import adapt
from cn_hf.errors import CnHfError
from cn_hf.evaluation.command import evaluate
from cn_hf.experiments.command import cards, reproduce
from cn_hf.hub.command import inspect, predict, push
from cn_hf.hub.restyle_command import restyle
from cn_hf.printing import for_terminal
from cn_hf.recipes.commands import TRAINING

__all__ = ["app", "main", "run_app"]

app = typer.Typer(
    name="cn-hf",
    help="Context Normalization for timm and Hugging Face vision models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_OTHER_PROCESS_PATIENCE = 3.0  # seconds


def main() -> None:
    """Entry point of ``cn-hf``."""
    run_app(app)


def run_app(application: typer.Typer) -> None:
    """Run a command line; the exit code is 0 if all that was asked was done, else 1, with one message on stderr.

    A ``CnHfError`` becomes such a message, without a traceback; so do options that are not understood.

    Where several processes run the same command and the main one fails, it alone speaks: the others, which fail alike
    or for want of it, give the launcher a moment to end them, and speak only if it does not.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        application()
    except SystemExit as exit:
        sys.exit(min(int(exit.code or 0), 1) if isinstance(exit.code, (int, type(None))) else 1)
    except Exception as error:
        if rank != 0:
            time.sleep(_OTHER_PROCESS_PATIENCE)
        if not isinstance(error, CnHfError):
            raise
        if not error.said_elsewhere:
            where = f" [process {rank}]" if rank else ""
            message = "\n".join(map(for_terminal, str(error).split("\n")))
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cn_hf {cn_hf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Context Normalization for timm and Hugging Face vision models."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json, figures and the checkpoint.")] = Path(
        "cn-hf-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, data order and domains.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Train a small network on handwritten digits and adapt it to eight new domains, known by unlabelled images.

    Needs neither network nor GPU, and less than 45 seconds on two cores.
    """
    from cn_hf.recipes.demo.run import run_demo

    run_demo(output_dir, seed=seed, progress=progress)


for name, training in TRAINING.items():
    app.command(name, help=training.help)(training.command())
for command in (evaluate, adapt, predict, inspect, push, restyle, reproduce, cards):
    app.command()(command)


if __name__ == "__main__":
    main()
