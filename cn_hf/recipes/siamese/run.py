"""A Siamese run (paper IV-E): pairs, training, verification of held-out pairs, and day for night, measured.

With ``compare`` three networks are trained with the same seed, pairs and budget: without contexts, and with CN on the
input started as identity and from the images' own statistics. ``results.py`` writes what a run leaves behind.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from cn_hf.evaluation.networks import bare_network
from cn_hf.recipes.classifier.network import build_classifier
from cn_hf.recipes.classifier.preview import preview
from cn_hf.recipes.classifier.results import data_in_words, network_in_words
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.recipes.siamese.data import SiameseData, load_siamese_data
from cn_hf.recipes.siamese.networks import SiameseNetwork, SiameseRun, has_input_contexts
from cn_hf.recipes.siamese.objective import Contrastive, HeldOut, held_out_distances
from cn_hf.recipes.siamese.restyling import Levels, Shift, learned_levels, measure_shift
from cn_hf.recipes.siamese.results import summary, write_siamese_run
from cn_hf.recipes.siamese.verification import Verification, best_threshold, context_groups, verify
from cn_hf.training.checkpoints import newest_step
from cn_hf.training.optimization import build_optimizer
from cn_hf.training.run_folder import CHECKPOINTS, started_run
from cn_hf.training.supervised import fit
from cn_hf.training.tracking import tracked

__all__ = ["train_siamese"]


def train_siamese(
    config: SiameseConfig, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False
) -> SiameseRun | None:
    """Train and judge Siamese networks as ``config`` says; write the results where it names a folder.

    Call it from every process of an ``accelerate launch``; the main one prints and writes.

    Args:
        config: Everything that decides the run.
        resume: Go on with the run in the output folder from its last checkpoint, or start it if there is none.
        overwrite: Remove the run that the output folder holds first.
        dry_run: Only print the config, what the data holds and what is patched, and draw images of the first batch.

    Returns:
        What the run made; None after a dry run, and where ``resume`` met a finished run.

    Raises:
        CnHfError: Something of the config, data, network or folder is not as it must be; see the class raised.
    """
    started, processor_started = time.perf_counter(), time.process_time()
    with started_run(config, resume=resume, overwrite=overwrite, dry_run=dry_run) as start:
        if start.finished:
            return None
        accelerator, folder = start.accelerator, start.folder
        data = load_siamese_data(config, accelerator)
        if dry_run:
            if accelerator.is_main_process:
                print(preview(config, _build(config, data), data.prepared, folder=folder))
            return None
        for own in config.networks().values():  # an error now, rather than when the folder is the run's
            build_optimizer(_build(own, data), own)
        start.claim()
        accelerator.print(data_in_words(data.prepared))
        networks: dict[str, SiameseNetwork] = {}
        with tracked(accelerator, config, folder, step=_steps_done(config, folder)):
            for name in config.networks():
                offset = len(networks) * len(data.pairs) * config.epochs
                networks[name] = _train(config, name, data, accelerator, resume, offset=offset)
        run = SiameseRun(
            config=config,
            data=data,
            networks=networks,
            seconds=time.perf_counter() - started,
            processor_seconds=time.process_time() - processor_started,
        )
        accelerator.print("\n" + summary(run))
        with start.writing() as writes:
            if writes and folder is not None:
                write_siamese_run(run, folder)
                print(f"\nwritten to {folder}")
        return run


def _train(
    config: SiameseConfig, name: str, data: SiameseData, accelerator: Accelerator, resume: bool, *, offset: int
) -> SiameseNetwork:
    """Build, train and judge the network of this name."""
    own = config.networks()[name]
    model = _build(own, data)
    accelerator.print(f"{name}: {network_in_words(own, model)}")
    model.to(accelerator.device)
    levels_at_start, shifts_at_start = _restyling(own, model, data)
    history = fit(
        model,
        data.pairs,
        data.judged("validation"),
        config=own,
        accelerator=accelerator,
        objective=Contrastive(own.margin, seed=own.seed, views=data.views),
        output_dir=None if config.output_dir is None else config.folder_of(name, Path(config.output_dir)),
        resume=resume,
        description=name,
        log_offset=offset,
    )
    validation, held_out = _verification(own, model, data, accelerator)
    levels, shifts = _restyling(own, model, data)
    return SiameseNetwork(
        config=own,
        model=bare_network(model),
        history=history,
        validation=validation,
        held_out=held_out,
        levels_at_start=levels_at_start,
        levels=levels,
        shifts_at_start=shifts_at_start,
        shifts=shifts,
    )


def _build(config: SiameseConfig, data: SiameseData) -> nn.Module:
    """The network, whose outputs are embeddings; its norms start from images that are not augmented."""
    return build_classifier(config, dataclasses.replace(data.calibration(), num_classes=config.embedding_dim))


def _verification(
    config: SiameseConfig, model: nn.Module, data: SiameseData, accelerator: Accelerator
) -> tuple[Verification, dict[str, Verification]]:
    """Of validation pairs, whose best threshold then serves for the held-out ones."""

    def distances(split: str) -> HeldOut:
        return held_out_distances(model, data.judged(split), accelerator, seed=config.seed, views=data.views)

    chosen_on, found = distances("validation"), distances(data.held_out)
    threshold = best_threshold(chosen_on.distances, chosen_on.different)
    validation = verify(chosen_on.distances, chosen_on.different, threshold)
    groups = {"all": torch.ones_like(found.different)}
    contexts, names = found.images.contexts, data.prepared.context_names
    if contexts is not None and names is not None:
        groups |= context_groups(contexts[found.pairs[:, 0]], contexts[found.pairs[:, 1]], names)
    held_out = {
        group: verify(
            found.distances[rows], found.different[rows], threshold, pairs=found.pairs if group == "all" else None
        )
        for group, rows in groups.items()
    }
    return validation, held_out


def _restyling(
    config: SiameseConfig, model: nn.Module, data: SiameseData
) -> tuple[dict[str, Levels], tuple[Shift, ...]]:
    """Return the contexts as the network sees them now, and held-out images restyled there and back."""
    if not has_input_contexts(model):
        return {}, ()
    held_out = data.images(data.held_out)
    assert held_out.context_ids is not None  # the data was checked for contexts
    names = (config.source_context, config.target_context)
    shifts = [measure_shift(model, held_out.images, held_out.context_ids, *pair) for pair in (names, names[::-1])]
    return learned_levels(model), tuple(shifts)


def _steps_done(config: SiameseConfig, folder: Path | None) -> int:
    """Return the steps that trackers know at the checkpoints that a run goes on from."""
    if folder is None:
        return 0
    return sum(newest_step(config.folder_of(name, folder) / CHECKPOINTS) for name in config.networks())
