"""``cn-hf train``, ``train-adamatch``, ``train-siamese``: for each the config its options come from, and its loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.training.command import config_command
from cn_hf.training.config import TrainingConfig

__all__ = ["TRAINING", "TrainingCommand"]


@dataclass(frozen=True, slots=True)
class TrainingCommand:
    """One way to train.

    Attributes:
        help: one sentence.
        config_class: its options.
        function: of the package, as ``module:name``; called with the config and the command's flags.
    """

    help: str
    config_class: type[TrainingConfig]
    function: str

    def command(self) -> Callable[..., None]:
        """Return the function that typer makes a command of."""
        return config_command(self._run, self.config_class)

    def _run(self, config: TrainingConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
        """Import the heavy libraries only once the options are known to be right."""
        from accelerate import PartialState

        module, name = self.function.split(":")
        getattr(importlib.import_module(module), name)(config, resume=resume, overwrite=overwrite, dry_run=dry_run)
        PartialState().destroy_process_group()


TRAINING = {
    "train": TrainingCommand(
        "Train an image classifier with or without contexts, then evaluate it honestly.",
        TrainingConfig,
        "cn_hf.recipes.classifier.run:train_classifier",
    ),
    "train-adamatch": TrainingCommand(
        "Train with AdaMatch on labelled source and unlabelled target images, then evaluate honestly.",
        AdaMatchConfig,
        "cn_hf.recipes.adamatch.run:train_adamatch",
    ),
    "train-siamese": TrainingCommand(
        "Train a Siamese network with contexts on its input, and turn day into night with what they learned.",
        SiameseConfig,
        "cn_hf.recipes.siamese.run:train_siamese",
    ),
}
