"""The results of a run, in words and as files.

Under its output folder a run leaves ``results.json`` (config, data, history, evaluation, environment), ``table.md``,
``curves.png``, ``protocols.png``, ``config.yaml`` and ``checkpoint/``, which ``cn_hf.from_pretrained`` loads (without
contexts: the network's own library), beside the ``checkpoints/`` that it can be resumed from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import cn_hf
from cn_hf.data import PreparedData
from cn_hf.errors import CheckpointError
from cn_hf.evaluation import ProtocolReport, plot_protocols, plot_training_curves, protocol_tables, write_results
from cn_hf.evaluation.environment import portable_path
from cn_hf.files import write_whole
from cn_hf.hub import save_pretrained
from cn_hf.hub.preprocessing import record_preprocessing, save_image_processor
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import RoutedModel
from cn_hf.printing import for_terminal
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.networks import save_plain, timm_arguments
from cn_hf.training.run_folder import CHECKPOINT, RESULTS

__all__ = [
    "ClassifierRun",
    "data_in_words",
    "network_facts",
    "network_in_words",
    "portable_config",
    "run_name",
    "run_title",
    "save_network",
    "write_run",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRun:
    """The results of a run.

    Attributes:
        config: Its options.
        model: The trained network.
        baseline: The network without contexts, where one was asked for.
        data: What it was trained on.
        histories: The epochs of each network trained, by name.
        report: The honest evaluation; None where there was neither a test nor a validation split.
    """

    config: TrainingConfig
    model: nn.Module
    baseline: nn.Module | None
    data: PreparedData
    histories: dict[str, History]
    report: ProtocolReport | None


def run_name(config: TrainingConfig) -> str:
    """Return the name of the trained network in curves and tables."""
    names = {"none": "no contexts", "cn-channels": "CN-Channels", "cn-patches": "CN-Patches"}
    return names.get(config.mode, config.mode.upper())


def write_run(run: ClassifierRun, folder: Path) -> None:
    """Write everything a run leaves behind, each file whole or not at all; other files in the folder stay.

    Raises:
        CheckpointError: The folder cannot be written to.
        ConfigError: The network could not be built again from its description.
    """
    config, data = run.config, run.data
    pixels: dict[str, Any] = {"input_size": data.input_size, "mean": data.mean, "std": data.std}
    record_preprocessing(run.model, **pixels, label_names=data.class_names)
    save_network(run.model, folder / CHECKPOINT, config, data, data.num_classes)
    try:
        if isinstance(run.model, transformers.PreTrainedModel):
            save_image_processor(folder / CHECKPOINT, **pixels)
        if run.report is not None:
            table = protocol_tables(run.report, title=run_title(config, data))
            write_whole(folder / "table.md", (table + "\n").encode())
            plot_protocols(run.report, folder / "protocols.png", title=run_title(config, data))
        curves = {name: history.to_dict()["epochs"] for name, history in run.histories.items()}
        plot_training_curves(curves, folder / "curves.png", title=run_title(config, data))
        write_results(folder / RESULTS, _results(run))
    except OSError as error:
        raise CheckpointError(f"the results cannot be written to {folder}: {error}") from error


def save_network(model: nn.Module, folder: Path, config: TrainingConfig, data: PreparedData, num_classes: int) -> None:
    """Write a trained network, patched or plain, so that it can be loaded by ``from_pretrained`` or its own library.

    Raises:
        CheckpointError: The folder cannot be written to.
        ConfigError: The network could not be built again from its description.
    """
    arguments = timm_arguments(
        config.model, num_classes=num_classes, input_size=data.input_size, model_args=config.model_args
    )
    if isinstance(model, RoutedModel):
        source = None if config.mode in BASELINES else data.context_source
        save_pretrained(model, folder, context_source=source, model_args=arguments)
    else:
        save_plain(model, folder, arguments)


def _results(run: ClassifierRun) -> dict[str, Any]:
    data = run.data
    return {
        "config": portable_config(run.config),
        "data": {
            "images": {split: batches.num_rows for split, batches in data.splits().items()},
            "skipped": {split: list(rows) for split, rows in data.skipped.items()},
            "input_size": data.input_size,
            "mean": data.mean,
            "std": data.std,
            "num_classes": data.num_classes,
            "class_names": data.class_names,
            "context_names": data.context_names,
        },
        "network": network_facts(run.model),
        "history": {name: history.to_dict() for name, history in run.histories.items()},
        "evaluated_split": "validation" if data.test is None else "test",
        "evaluation": run.report,
    }


def portable_config(config: TrainingConfig) -> dict[str, Any]:
    """The config as another machine would have it: results are published, and name no folder of this one."""
    folder = None if config.output_dir is None else portable_path(config.output_dir)
    return {**config.to_dict(), "dataset": [portable_path(name) for name in config.dataset], "output_dir": folder}


def network_facts(model: nn.Module) -> dict[str, Any]:
    """Sizes of a network and, where it is patched, its slots, as JSON types."""
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if isinstance(model, RoutedModel):
        facts["context_parameters"] = sum(parameter.numel() for parameter in cn_hf.context_parameters(model))
        facts["slots"] = [slot._asdict() for slot in cn_hf.patch_report(model)]
    return facts


def run_title(config: TrainingConfig, data: PreparedData) -> str:
    """Return the title of the run's table and figures."""
    split = "validation" if data.test is None else "test"
    datasets = " + ".join(Path(dataset).name for dataset in config.dataset)
    return f"{Path(config.model).name}, {run_name(config)}, {datasets} ({split} split)"


def data_in_words(data: PreparedData) -> str:
    """Images per split, classes, and images per context, a line each."""
    parts = [f"{split} {batches.num_rows:,}" for split, batches in data.splits().items()]
    skipped = sum(map(len, data.skipped.values()))
    lines = [f"images: {', '.join(parts)}" + (f" ({skipped} unreadable ones left out)" if skipped else "")]
    lines.append(f"classes: {data.num_classes}; input: {'x'.join(map(str, data.input_size))}")
    if data.context_names is not None:
        counts = _context_counts(data)
        names = {name: for_terminal(name) for name in counts}
        shown = [names[name] + (f" {count:,}" if count is not None else "") for name, count in counts.items()]
        more = "" if len(shown) <= 20 else f" and {len(shown) - 20} more"
        lines.append(f"contexts in train: {', '.join(shown[:20])}{more}")
    return "\n".join(lines)


def _context_counts(data: PreparedData) -> dict[str, int | None]:
    names = data.context_names or ()
    contexts = getattr(data.train, "context_ids", None)
    if not isinstance(contexts, torch.Tensor) or contexts.is_floating_point():
        return dict.fromkeys(names)
    return dict(zip(names, torch.bincount(contexts, minlength=len(names)).tolist(), strict=True))


def network_in_words(config: TrainingConfig, model: nn.Module) -> str:
    """The network, its size and what was patched, in one line."""
    facts = network_facts(model)
    line = f"network: {config.model}, {facts['parameters']:,} parameters"
    if "slots" in facts:
        slots = facts["slots"]
        many = len(slots) > 1
        line += f", {len(slots)} slot{'s' if many else ''} patched ({slots[0]['name']}{', ...' if many else ''})"
    return line
