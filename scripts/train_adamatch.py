"""Train with AdaMatch: domain adaptation (uda, ssda) or semi-supervised learning (ssl), with or without contexts.

Run it with python, or under ``accelerate launch`` for several processes; the source comes first:

    python scripts/train_adamatch.py --model cn_wrn28_2 \
        --dataset ylecun/mnist --dataset ufldl-stanford/svhn:cropped_digits \
        --mode cn-channels --where input --contexts origin:MNIST,SVHN --output-dir runs/adamatch

Killed runs go on with ``--resume``; ``--dry-run`` shows what would be done.
"""

from __future__ import annotations

from typing import cast

from cn_hf.cli import run_app
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.training.command import training_app
from cn_hf.training.config import TrainingConfig


def run(config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Import the heavy libraries only once the options are known to be right."""
    from accelerate import PartialState

    from cn_hf.recipes.adamatch.run import train_adamatch

    train_adamatch(cast(AdaMatchConfig, config), resume=resume, overwrite=overwrite, dry_run=dry_run)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run_app(
        training_app(
            run,
            help="Train with AdaMatch on labelled source and unlabelled target images, then evaluate honestly.",
            config_class=AdaMatchConfig,
        )
    )
