"""Train a Siamese network with contexts on its input, then turn day into night with what they learned (paper IV-E).

The same as ``cn-hf train-siamese``. Run it with python, or under ``accelerate launch`` for several processes:

    python scripts/train_siamese.py --dataset data/daynight_cameras --identity-column identity \
        --contexts column:label --compare --output-dir runs/daynight

``--identity-column none`` makes pairs of two views of an image. Killed runs go on with ``--resume``; ``--dry-run``
shows what would be done.
"""

from __future__ import annotations

import typer

from cn_hf.cli import run_app
from cn_hf.recipes.commands import TRAINING

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=TRAINING["train-siamese"].help)(TRAINING["train-siamese"].command())
    run_app(app)
