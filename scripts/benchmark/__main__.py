"""Measure how fast context normalization is against what it replaces.

    python scripts/benchmark --quick                  # about a minute on two cores
    python scripts/benchmark --device cuda            # all of it on a GPU
    python scripts/benchmark --section ops --section models --output-dir model_cards/results/benchmark

``benchmark.json`` in the folder keeps what was measured before of other sections and on other devices.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else cuda where there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute on two cores; what is left out is named.")] = (
        False
    ),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes and two rounds, to see that all of it runs; no figure counts.")
    ] = False,
    section: Annotated[
        list[str] | None,
        typer.Option(help="ops, plus, mixture, models, scale, pipeline or networks (repeatable); else all."),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder of benchmark.json, .md and .png; what they hold of other sections stays.")
    ] = Path("runs/benchmark"),
    threads: Annotated[int | None, typer.Option(help="CPU threads; else torch's choice.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often each contestant has its turn; else 20.")] = None,
    images: Annotated[int | None, typer.Option(help="scale: images to fit contexts on; else 1,000,000.")] = None,
    network: Annotated[
        str | None, typer.Option(help="networks: convnet (Table IV's) or vit (section IV-C's); else both.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="networks: images of a step.")] = None,
    steps: Annotated[int | None, typer.Option(help="networks: steps in one turn.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="networks: no or bf16.")] = "no",
    channels_last: Annotated[bool, typer.Option(help="networks: layout of images and convolutions.")] = False,
    compile: Annotated[bool, typer.Option(help="networks: torch.compile them.")] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: put the table of the report in --output-dir into this file (README.md)."),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Measure how fast context normalization is against what it replaces, side by side, in turn, in one run."""
    from scripts.benchmark.program import run_benchmark, update_table
    from scripts.benchmark.settings import ENOUGH_ROUNDS, NetworkOptions, Settings, usable_device

    if table is not None:
        print(update_table(table, output_dir))
        return
    settings = Settings(
        device=usable_device(device),
        size="smoke" if smoke else "quick" if quick else "full",
        rounds=(2 if smoke else ENOUGH_ROUNDS) if rounds is None else rounds,
        images=images,
        networks=NetworkOptions(
            network=network,
            batch_size=batch_size,
            steps=steps,
            mixed_precision=mixed_precision,
            channels_last=channels_last,
            compile=compile,
        ),
        progress=progress,
    )
    if not run_benchmark(settings, sections=section, output_dir=output_dir, threads=threads):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's modules are scripts.benchmark.*

    from cn_hf.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(benchmark)
    run_app(app)
