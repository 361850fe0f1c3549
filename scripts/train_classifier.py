"""Train an image classifier with or without contexts, then evaluate it honestly.

Run it with python, or under ``accelerate launch`` for several processes:

    python scripts/train_classifier.py --model cn_cifar_convnet --dataset uoft-cs/cifar10 \
        --mode cn-channels --contexts clusters:gmm:3 --output-dir runs/cifar10

Killed runs go on with ``--resume``; ``--dry-run`` shows what would be done.
"""

from __future__ import annotations

from cn_hf.cli import run_app
from cn_hf.training.command import training_app
from cn_hf.training.config import TrainingConfig


def run(config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Import the heavy libraries only once the options are known to be right."""
    from accelerate import PartialState

    from cn_hf.recipes.classifier.run import train_classifier

    train_classifier(config, resume=resume, overwrite=overwrite, dry_run=dry_run)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run_app(training_app(run, help="Train an image classifier with or without contexts, then evaluate it honestly."))
