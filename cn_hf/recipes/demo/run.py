"""``cn-hf demo``: the whole path on real images in about a minute, without network or GPU.

Handwritten digits in two domains (see ``demo_data``), the contexts being the domains. One small network is trained
three times with the same seed, data order and budget, and all three are evaluated on the same test digits:

- ``BN``: the network as it is, a BatchNorm after each convolution;
- ``no norm``: without CN or any other normalization, its convolutions having biases instead;
- ``CN``: each BatchNorm swapped for CN-Channels, started from training images.

The network with CN is then saved, loaded again and shown to give the same results. Its context source, a Gaussian
mixture over pixels fitted on the training images, travels along and names the domain of new images.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import cn_hf
from cn_hf.contexts import CONTEXT_COLUMN, ClusterContexts
from cn_hf.data import PreparedData, prepare_data
from cn_hf.devices import torch_threads
from cn_hf.errors import CheckpointError, ContextSourceError
from cn_hf.evaluation import (
    ProtocolReport,
    context_table,
    evaluate_protocols,
    plot_context_statistics,
    plot_protocols,
    plot_training_curves,
    protocol_table,
    write_results,
)
from cn_hf.files import write_whole
from cn_hf.hub import from_pretrained
from cn_hf.patching.patch import named_slots
from cn_hf.patching.routing import router_of
from cn_hf.recipes.classifier.data import class_counts
from cn_hf.recipes.classifier.network import build_classifier
from cn_hf.recipes.classifier.results import data_in_words, network_facts, save_network
from cn_hf.recipes.demo.data import DOMAINS, digits_in_two_domains, write_sample_sheet
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.networks import create_network
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.run_folder import CHECKPOINT, RESULTS, OpenFolder, held_folder
from cn_hf.training.supervised import fit

__all__ = ["demo_config", "fitted_domain_source", "run_demo"]

NETWORKS = """networks, same seed, data order and budget:
  BN       as it is, a BatchNorm after each convolution
  no norm  without CN or any other normalization
  CN       each BatchNorm swapped for CN-Channels"""
TITLE = "Handwritten digits in two domains (test split)"
EVALUATION_BATCH = 250


def demo_config(*, seed: int = 0, epochs: int = 15, progress: bool = True) -> TrainingConfig:
    """Options of all three trainings, chosen on the validation split."""
    return TrainingConfig(
        model="cn_digits_convnet",
        mode="cn-channels",
        where=("norms",),
        epochs=epochs,
        batch_size=64,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_epochs=1.0,
        keep_best=False,
        seed=seed,
        progress=progress,
    )


def run_demo(output_dir: str | Path, *, seed: int = 0, epochs: int = 15, progress: bool = True) -> ProtocolReport:
    """Make the data, train, evaluate, save, reload; print the results and write them into a folder.

    Args:
        output_dir: Gets ``results.json``, ``table.md``, four PNGs and ``checkpoint/``; other files there stay.
        seed: Of backgrounds, weights and data order.
        epochs: Of each training.
        progress: Show progress bars.

    Returns:
        The evaluation of the network with CN, the other two being its baselines.

    Raises:
        CheckpointError: The folder cannot be written to, another run has it or it was removed meanwhile, or the
            reloaded network differs from the saved one.
    """
    started = time.perf_counter()
    folder = Path(output_dir)
    # As fast for so small a network, the same result on any number of cores, and untroubled by what else runs there.
    with held_folder(folder) as held, torch_threads(1):
        return _run(held, demo_config(seed=seed, epochs=epochs, progress=progress), started)


def _run(held: OpenFolder, config: TrainingConfig, started: float) -> ProtocolReport:
    accelerator, folder = make_accelerator(config), held.path
    splits = digits_in_two_domains(config.seed)
    source = fitted_domain_source(splits["train"])
    agreement = source_agreement(source, splits)
    data = _prepare(splits, source, config, accelerator)
    print(data_in_words(data))
    print(
        "context source: Gaussian mixture over pixels, fitted without labels on train; it names the domain of "
        f"{100 * agreement['train']:.1f} % of train and {100 * agreement['test']:.1f} % of test images"
    )
    print(NETWORKS)
    networks, histories = _train(config, data, accelerator)
    report = _evaluate(config, networks, data, accelerator)
    print("\n" + protocol_table(report, title=TITLE) + "\n\n" + context_table(report))
    held.check()
    reloaded = _save_and_reload(networks["CN"], folder / CHECKPOINT, report, config, data, accelerator)
    print(f"\n{reloaded['summary']}")
    seconds = time.perf_counter() - started
    results = {
        "config": config.to_dict(),
        "networks": {name: network_facts(network) for name, network in networks.items()},
        "context_source_agreement": agreement,
        "history": {name: history.to_dict() for name, history in histories.items()},
        "evaluation": report,
        "reloaded": reloaded,
        "seconds": seconds,
    }
    _write(folder, splits, networks["CN"], histories, report, results)
    held.check()
    print(f"written to {folder}{'' if folder.is_absolute() else '/'} in {seconds:.0f} s")
    return report


def fitted_domain_source(train: datasets.Dataset) -> ClusterContexts:
    """Two clusters of the training images, each named after the domain most of its images are of.

    Raises:
        ContextSourceError: The clusters do not tell the domains apart.
    """
    options: dict[str, Any] = {"decode_size": 8, "reg_covar": 1e-4}
    clusters = ClusterContexts(len(DOMAINS), **options).fit(train)
    found = torch.tensor(clusters.apply(train)[CONTEXT_COLUMN])
    domains = torch.tensor(train["domain"])
    names = [DOMAINS[int(domains[found == cluster].mode().values)] for cluster in range(len(DOMAINS))]
    if len(set(names)) != len(DOMAINS):
        raise ContextSourceError(f"the clusters do not tell the domains apart: they are named {names}")
    # The fit is deterministic, so this one has the same clusters.
    return ClusterContexts(len(DOMAINS), names=names, **options).fit(train)


def source_agreement(source: ClusterContexts, splits: datasets.DatasetDict) -> dict[str, float]:
    """Per split, the part of images whose domain the source names."""
    agreement = {}
    for split, dataset in splits.items():
        named = [source.names[context] for context in source.apply(dataset)[CONTEXT_COLUMN]]
        true = [DOMAINS[domain] for domain in dataset["domain"]]
        agreement[split] = sum(one == other for one, other in zip(named, true, strict=True)) / len(true)
    return agreement


def _prepare(
    splits: datasets.DatasetDict, source: ClusterContexts, config: TrainingConfig, accelerator: Accelerator
) -> PreparedData:
    """Batches whose contexts are the true domains, numbered as the source numbers them."""
    feature = datasets.ClassLabel(names=list(source.names))
    with_contexts = datasets.DatasetDict(
        {
            split: dataset.add_column(
                CONTEXT_COLUMN, [source.names.index(DOMAINS[domain]) for domain in dataset["domain"]], feature=feature
            )
            for split, dataset in splits.items()
        }
    )
    prepared = prepare_data(
        with_contexts,
        label_column="label",
        batch_size=config.batch_size,
        eval_batch_size=EVALUATION_BATCH,
        seed=config.seed,
        device=accelerator.device,
    )
    return dataclasses.replace(prepared, context_source=source)


def _train(
    config: TrainingConfig, data: PreparedData, accelerator: Accelerator
) -> tuple[dict[str, nn.Module], dict[str, History]]:
    networks: dict[str, nn.Module] = {"BN": build_classifier(config.replace(mode="none", where=()), data)}
    set_seed(config.seed)
    networks["no norm"] = create_network(
        config.model,
        num_classes=data.num_classes,
        input_size=data.input_size,
        model_args={"norm_layer": nn.Identity},
    )
    networks["CN"] = build_classifier(config, data)
    assert data.train is not None  # the demo's data has all splits
    histories = {
        name: fit(
            network, data.train, data.validation, config=config, accelerator=accelerator, description=f"{name:>7}"
        )
        for name, network in networks.items()
    }
    return networks, histories


def _evaluate(
    config: TrainingConfig, networks: dict[str, nn.Module], data: PreparedData, accelerator: Accelerator
) -> ProtocolReport:
    assert data.train is not None
    assert data.test is not None
    return evaluate_protocols(
        networks["CN"],
        data.test,
        num_classes=data.num_classes,
        class_counts=class_counts(data.train, data.num_classes, len(DOMAINS), config),
        baseline={name: networks[name] for name in ("BN", "no norm")},
        top_k=(1,),
        seed=config.seed,
        accelerator=accelerator,
        progress=config.progress,
    )


def _save_and_reload(
    network: nn.Module,
    folder: Path,
    report: ProtocolReport,
    config: TrainingConfig,
    data: PreparedData,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Save the network with CN, load it again and evaluate what was loaded, with its own context source."""
    save_network(network, folder, config, data, data.num_classes)
    loaded = from_pretrained(folder, device=accelerator.device)
    assert data.test is not None
    again = evaluate_protocols(
        loaded, data.test, num_classes=data.num_classes, top_k=(1,), accelerator=accelerator, progress=False
    )
    accuracies: dict[str, Any] = {}
    for row in ("true contexts", "predict"):
        before, after = report[row].accuracy(), again[row].accuracy()
        if before is None or before != after:
            raise CheckpointError(f"row {row!r} of the reloaded network is {after}, but {before} of the saved one")
        accuracies[row] = after
    shown = ", ".join(f"{row} {100 * accuracy:.2f} %" for row, accuracy in accuracies.items())
    summary = f"reloaded from {folder.name}/ with cn_hf.from_pretrained, same accuracy: {shown}"
    return {**accuracies, "summary": summary}


def _write(
    folder: Path,
    splits: datasets.DatasetDict,
    network: nn.Module,
    histories: dict[str, History],
    report: ProtocolReport,
    results: dict[str, Any],
) -> None:
    try:
        write_sample_sheet(splits["train"], folder / "samples.png")
        curves = {name: history.to_dict()["epochs"] for name, history in histories.items()}
        plot_training_curves(curves, folder / "curves.png", title="Digits in two domains")
        plot_protocols(report, folder / "protocols.png", title=TITLE)
        first_name, first = named_slots(network)[0]
        plot_context_statistics(
            cast(cn_hf.ContextNorm, first.normalizer),
            folder / "contexts.png",
            context_names=router_of(network).config.context_names,
            title=f"What CN learned in {first_name}",
        )
        table = protocol_table(report, title=TITLE) + "\n\n" + context_table(report)
        write_whole(folder / "table.md", (table + "\n").encode())
        write_results(folder / RESULTS, results)
    except OSError as error:
        raise CheckpointError(f"the results cannot be written to {folder}: {error}") from error
