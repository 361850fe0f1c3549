"""A whole AdaMatch run: that of a classifier, with labelled and unlabelled data and an objective of its own."""

from __future__ import annotations

from accelerate import Accelerator

from cn_hf.data import PreparedData
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.data import load_adamatch_data
from cn_hf.recipes.adamatch.objective import AdaMatch
from cn_hf.recipes.classifier.results import ClassifierRun
from cn_hf.recipes.classifier.run import Recipe, train_classifier
from cn_hf.training.config import TrainingConfig

__all__ = ["train_adamatch"]


def _objective(config: TrainingConfig, accelerator: Accelerator) -> AdaMatch:
    assert isinstance(config, AdaMatchConfig)
    return AdaMatch(accelerator, tau=config.tau, alignment=config.alignment)


RECIPE = Recipe(load_data=load_adamatch_data, objective=_objective, fixed_contexts=True)


def train_adamatch(
    config: AdaMatchConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    data: PreparedData | None = None,
) -> ClassifierRun | None:
    """Train and evaluate as ``config`` says, with AdaMatch; arguments, results and errors are ``train_classifier``'s.

    The evaluation also tells every test image the same context, each in turn: the paper's Tables IX and X.
    """
    return train_classifier(config, resume=resume, overwrite=overwrite, dry_run=dry_run, data=data, recipe=RECIPE)
