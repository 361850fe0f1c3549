"""Reproduce a table or figure of the paper.

Run it with python, or under ``accelerate launch`` for several processes; ``cn-hf reproduce`` is the same for one:

    python scripts/reproduce.py table5 --budget small --data-root data
"""

from __future__ import annotations

import typer

from cn_hf.cli import run_app
from cn_hf.experiments.command import reproduce

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reproduce)
    run_app(app)
