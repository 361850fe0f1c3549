"""Measure how fast context normalization is against what it replaces; the same program as ``cn-hf benchmark``.

    python scripts/benchmark.py --quick                  # about a minute on two cores
    python scripts/benchmark.py --device cuda            # all of it on a GPU
    python scripts/benchmark.py --section ops --section models --output-dir model_cards/results/benchmark

``benchmark.json`` in the folder keeps what was measured before of other sections and on other devices.
"""

from __future__ import annotations

import typer

from cn_hf.benchmark.command import benchmark
from cn_hf.cli import run_app

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(benchmark)
    run_app(app)
