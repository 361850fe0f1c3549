"""A whole run: data, contexts, network, training and honest evaluation. What it leaves behind is in ``results.py``.

What differs between methods that train a classifier is a ``Recipe``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from cn_hf.data import PreparedData
from cn_hf.errors import TrainingError
from cn_hf.evaluation import ProtocolReport, evaluate_protocols, protocol_tables
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import RoutedModel
from cn_hf.recipes.classifier.data import class_counts, load_data
from cn_hf.recipes.classifier.network import build_classifier, keep_moments
from cn_hf.recipes.classifier.preview import preview
from cn_hf.recipes.classifier.results import (
    ClassifierRun,
    data_in_words,
    network_in_words,
    run_name,
    run_title,
    write_run,
)
from cn_hf.training.checkpoints import newest_step
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.objective import Objective
from cn_hf.training.optimization import build_optimizer
from cn_hf.training.run_folder import CHECKPOINTS, StartedRun, started_run
from cn_hf.training.supervised import fit
from cn_hf.training.tracking import tracked

__all__ = ["Recipe", "train_classifier"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts in which a method differs from others.

    Attributes:
        load_data: Gives the data that a config names.
        objective: Makes what is minimised; None: the cross entropy.
        fixed_contexts: Whether the evaluation also tells all images the same context, each in turn.
    """

    load_data: Callable[[TrainingConfig, Accelerator], PreparedData]
    objective: Callable[[TrainingConfig, Accelerator], Objective] | None = None
    fixed_contexts: bool = False


SUPERVISED = Recipe(load_data=load_data)


def train_classifier(
    config: TrainingConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    data: PreparedData | None = None,
    recipe: Recipe = SUPERVISED,
) -> ClassifierRun | None:
    """Train and evaluate an image classifier as ``config`` says; write the results where it names a folder.

    Call it from every process of an ``accelerate launch``; the main one prints and writes.

    Args:
        config: Everything that decides the run.
        resume: Go on with the run in the output folder from its last checkpoint, or start it if there is none.
        overwrite: Remove the run that the output folder holds first.
        dry_run: Only print the config, what the data holds and what is patched, and draw the first batch.
        data: From the recipe's ``load_data`` for a config with the same ``data_options``; None: loaded now.
        recipe: Of the method.

    Returns:
        What the run made; None after a dry run, and where ``resume`` met a finished run (see its ``results.json``).

    Raises:
        CnHfError: Something of the config, data, network or folder is not as it must be; see the class raised.
    """
    with started_run(config, resume=resume, overwrite=overwrite, dry_run=dry_run) as started:
        if started.finished:
            return None
        data = recipe.load_data(config, started.accelerator) if data is None else data
        if data.train is None or len(data.train) == 0:
            raise TrainingError(
                f"an epoch has no batch: batch_size is {config.batch_size} and drop_last leaves out smaller ones"
            )
        model = build_classifier(config, data)
        if dry_run:
            if started.accelerator.is_main_process:
                print(preview(config, model, data, folder=started.folder))
            return None
        build_optimizer(model, config)  # an error now, rather than when the folder is the run's
        started.claim()
        started.accelerator.print(data_in_words(data) + "\n" + network_in_words(config, model))
        # After the network's steps the baseline's follow, so that trackers' steps go on rising.
        steps = len(data.train) * config.epochs
        with tracked(started.accelerator, config, started.folder, step=_steps_done(started.folder, steps)):
            return _run(started, recipe, model, data, steps)


def _run(started: StartedRun, recipe: Recipe, model: nn.Module, data: PreparedData, steps: int) -> ClassifierRun:
    """Train the network and the baseline, evaluate, print and write."""
    config, accelerator, folder = started.config, started.accelerator, started.folder
    name = run_name(config)
    histories = {name: _fit(started, recipe, model, data, name, folder)}
    keep_moments(model, data)
    baseline: nn.Module | None = None
    if config.baseline:
        plain = config.replace(mode="none", where=(), norm_options={})
        baseline = build_classifier(plain, data)
        baseline_folder = None if folder is None else folder / "baseline"
        histories["baseline"] = _fit(started, recipe, baseline, data, "baseline", baseline_folder, steps)
    report = _evaluate(config, recipe, model, baseline, data, accelerator)
    run = ClassifierRun(config=config, model=model, baseline=baseline, data=data, histories=histories, report=report)
    if report is not None:
        accelerator.print("\n" + protocol_tables(report, title=run_title(config, data)))
    with started.writing() as writes:
        if writes and folder is not None:
            write_run(run, folder)
            print(f"\nwritten to {folder}")
    return run


def _steps_done(folder: Path | None, steps: int) -> int:
    """Return the steps that trackers know at the checkpoint that a run goes on from; ``steps``: the main network's."""
    if folder is None:
        return 0
    of_baseline = newest_step(folder / "baseline" / CHECKPOINTS)
    return steps + of_baseline if of_baseline else newest_step(folder / CHECKPOINTS)


def _fit(
    started: StartedRun,
    recipe: Recipe,
    model: nn.Module,
    data: PreparedData,
    name: str,
    folder: Path | None,
    log_offset: int = 0,
) -> History:
    assert data.train is not None
    return fit(
        model,
        data.train,
        data.validation,
        config=started.config,
        accelerator=started.accelerator,
        objective=None if recipe.objective is None else recipe.objective(started.config, started.accelerator),
        output_dir=folder,
        resume=started.resume,
        description=name,
        log_offset=log_offset,
    )


def _evaluate(
    config: TrainingConfig,
    recipe: Recipe,
    model: nn.Module,
    baseline: nn.Module | None,
    data: PreparedData,
    accelerator: Accelerator,
) -> ProtocolReport | None:
    split = data.validation if data.test is None else data.test
    if split is None or data.train is None:
        return None
    counts = None
    if data.context_names is not None:
        counts = class_counts(data.train, data.num_classes, len(data.context_names), config)
    has_contexts = isinstance(model, RoutedModel) and config.mode not in BASELINES
    # A network without contexts is itself the baseline that the leak check masks.
    baselines = {} if has_contexts else {run_name(config): model}
    if baseline is not None:
        baselines["" if has_contexts else "baseline"] = baseline
    return evaluate_protocols(
        model if has_contexts else None,
        split,
        num_classes=data.num_classes,
        class_counts=counts,
        baseline=baselines or None,
        fixed_contexts=recipe.fixed_contexts,
        context_names=data.context_names,
        top_k=(1, 5) if data.num_classes > 5 else (1,),
        seed=config.seed,
        accelerator=accelerator,
        progress=config.progress,
    )
