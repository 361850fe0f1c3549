"""Train with AdaMatch: domain adaptation (uda, ssda) or semi-supervised learning (ssl), with or without contexts.

The same as ``cn-hf train-adamatch``. Run it with python, or under ``accelerate launch`` for several processes; the
source comes first:

    python scripts/train_adamatch.py --model cn_wrn28_2 \
        --dataset ylecun/mnist --dataset ufldl-stanford/svhn:cropped_digits \
        --mode cn-channels --where input --contexts origin:MNIST,SVHN --output-dir runs/adamatch

Killed runs go on with ``--resume``; ``--dry-run`` shows what would be done.
"""

from __future__ import annotations

import typer

from cn_hf.cli import run_app
from cn_hf.recipes.commands import TRAINING

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=TRAINING["train-adamatch"].help)(TRAINING["train-adamatch"].command())
    run_app(app)
