"""Train an image classifier with or without contexts, then evaluate it honestly.

The same as ``cn-hf train``. Run it with python, or under ``accelerate launch`` for several processes:

    python scripts/train_classifier.py --model cn_cifar_convnet --dataset uoft-cs/cifar10 \
        --mode cn-channels --contexts clusters:gmm:3 --output-dir runs/cifar10

Killed runs go on with ``--resume``; ``--dry-run`` shows what would be done.
"""

from __future__ import annotations

import typer

from cn_hf.cli import run_app
from cn_hf.recipes.commands import TRAINING

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=TRAINING["train"].help)(TRAINING["train"].command())
    run_app(app)
