"""Train a Siamese network with contexts on its input, then turn day into night with what they learned (paper IV-E).

Run it with python, or under ``accelerate launch`` for several processes:

    python scripts/train_siamese.py --dataset data/daynight_cameras --identity-column identity \
        --contexts column:label --compare --output-dir runs/daynight

``--identity-column none`` makes pairs of two views of an image. Killed runs go on with ``--resume``; ``--dry-run``
shows what would be done.
"""

from __future__ import annotations

from typing import cast

from cn_hf.cli import run_app
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.training.command import training_app
from cn_hf.training.config import TrainingConfig


def run(config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Import the heavy libraries only once the options are known to be right."""
    from accelerate import PartialState

    from cn_hf.recipes.siamese.run import train_siamese

    train_siamese(cast(SiameseConfig, config), resume=resume, overwrite=overwrite, dry_run=dry_run)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    help_text = "Train a Siamese network with contexts on its input, and turn day into night with what they learned."
    run_app(training_app(run, help=help_text, config_class=SiameseConfig))
