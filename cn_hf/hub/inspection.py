"""``cn-hf inspect``: what a checkpoint is, told without loading its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cn_hf.contexts.storage import CONFIG_FILE as SOURCE_FILE
from cn_hf.errors import CheckpointError
from cn_hf.files import read_json
from cn_hf.hub.base_model import build_patched
from cn_hf.hub.bounds import weights_of
from cn_hf.hub.card import MANY, context_counts
from cn_hf.hub.description import CONFIG_FILE, SOURCE_FOLDER, Description, described, read_description
from cn_hf.hub.fitting import check_plan
from cn_hf.hub.publish import RESULTS, SIAMESE, kind_of_run, read_results
from cn_hf.hub.repository import HubOptions, checkpoint_folder
from cn_hf.hub.weights import read_header
from cn_hf.patching import ContextNormConfig, context_parameters, patch_report
from cn_hf.patching.config import BASELINES, CN_MODES
from cn_hf.patching.inference import needs_ids
from cn_hf.printing import for_terminal

__all__ = ["inspect_checkpoint"]


def inspect_checkpoint(id_or_folder: str | os.PathLike[str], options: HubOptions | None = None) -> str:
    """Contexts, slots, parameters added, sizes and results of a checkpoint, as text.

    Args:
        id_or_folder: a folder written by ``save_pretrained``, the folder of a run, or ``"user/name"`` on the Hub, of
            which no weights are downloaded.
        options: how the Hub is asked.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of a newer format.
    """
    options = HubOptions() if options is None else options
    folder = checkpoint_folder(
        id_or_folder,
        options,
        description_file=CONFIG_FILE,
        files_of=lambda path: [CONFIG_FILE, f"{SOURCE_FOLDER}/*.json", RESULTS],
    )
    description = read_description(folder / CONFIG_FILE)
    parts = [_summary(description, folder), _slots(description, folder), _results(folder)]
    lines = "\n\n".join(part for part in parts if part).split("\n")
    return "\n".join(map(for_terminal, lines))  # names of modules and findings are others', too


def _summary(description: Description, folder: Path) -> str:
    config = description.config
    count = config.num_contexts
    names = config.context_names or [str(number) for number in range(min(count, 20))]
    shown = ", ".join(map(for_terminal, names[:20])) + (f" and {count - 20} more" if count > 20 else "")
    kind = "components" if config.mode == "mn" else "contexts"
    lines = [f"base: {for_terminal(described(description.base))}", f"mode: {_mode(config, description.context_source)}"]
    if config.mode != "bn":
        lines.append(f"{kind}: {count} ({shown})")
    if config.mode not in BASELINES:
        lines.append(f"context source: {_source_type(folder) if description.context_source else 'none'}")
    lines.append(f"pixels: less {_numbers(description.pixel_mean)}, by {_numbers(description.pixel_std)}")
    if description.task is not None:
        lines.append(f"task: {description.task}")
    for name in description.weights:
        file = folder / name
        size = f"{file.stat().st_size / 1e6:,.2f} MB" if file.is_file() else "not downloaded"
        lines.append(f"weights: {name}, {size}" + (" (context parameters alone)" if description.norms_only else ""))
    return "\n".join(lines)


def _mode(config: ContextNormConfig, has_source: bool) -> str:
    """The mode, and what it does without context ids."""
    if config.mode in BASELINES:
        return f"{config.mode}, a baseline without contexts"
    mode = f"{config.mode}, {config.parametrization}" if config.mode in CN_MODES else config.mode
    if needs_ids(config, has_source=has_source):
        return f"{mode}; needs context ids"
    plus = f" ({config.plus_stats}, {config.plus_scale})" if config.inference == "cn+" else ""
    return f"{mode}; without ids: {config.inference}{plus}"


def _source_type(folder: Path) -> str:
    try:
        content = read_json(folder / SOURCE_FOLDER / SOURCE_FILE)
        return str(content.get("type"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / SOURCE_FOLDER} cannot be read: {error}. Save the checkpoint again."
        ) from error


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _slots(description: Description, folder: Path) -> str:
    if description.base.get("library") == "other":
        return "slots: known once the model is there (its library is neither timm nor transformers)"
    there = not description.norms_only and all((folder / name).exists() for name in description.weights)
    header = read_header(folder, description.weights) if there else None
    with weights_of(header):
        if header is not None and description.base.get("library") == "timm":
            model = check_plan(description, header, folder)
        else:
            model = build_patched(description.base, description.config)
    added = sum(parameter.numel() for parameter in context_parameters(model))
    own = sum(parameter.numel() for parameter in model.parameters()) - added
    report = patch_report(model)
    return f"parameters: {own:,} and {added:,} added, in {len(report)} slots\n{report}"


def results_file_of(folder: Path) -> Path | None:
    """Return the results file of a checkpoint's run: beside the checkpoint, or in the folder above; None without."""
    return next((file for file in (folder / RESULTS, folder.parent / RESULTS) if file.is_file()), None)


def _results(folder: Path) -> str:
    file = results_file_of(folder)
    if file is None:
        return ""
    results = read_results(file)
    kind = kind_of_run(results)
    if kind is None:
        raise CheckpointError(f"{file} is no results file of a run that cn_hf knows. Move it elsewhere.")
    try:
        if kind == SIAMESE:
            lines = _verification(results)
        else:
            lines = _domains(results) if "accuracy_over_images" in results else _protocols(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no results file of cn_hf: {error!r}.") from error
    return "\n".join([f"run: {kind}", *lines])


def _verification(results: Mapping[str, Any]) -> list[str]:
    name, network = list(results["networks"].items())[-1]
    lines = [f"pairs of the {results['held_out_split']} split, of the network {name!r}:"]
    for group, found in network["held_out"].items():
        area = "" if found["roc_auc"] is None else f", ROC AUC {100 * found['roc_auc']:.2f} %"
        lines.append(
            f"  {group}: accuracy {100 * found['correct'] / found['pairs']:.2f} %{area}, {found['pairs']} pairs"
        )
    return lines


def _domains(results: Mapping[str, Any]) -> list[str]:
    lines = ["accuracy in each domain:"]
    width = max(map(len, results["accuracy"]))
    for row, rates in results["accuracy"].items():
        lines.append(f"  {row.ljust(width)}  {', '.join(f'{name} {100 * rate:.2f} %' for name, rate in rates.items())}")
    return lines


def _protocols(results: Mapping[str, Any]) -> list[str]:
    evaluation = results["evaluation"]
    if not evaluation:
        return []
    lines = [f"results on the {results.get('evaluated_split', 'test')} split:"]
    width = max(len(row["name"]) for row in evaluation["rows"])
    for row in evaluation["rows"]:
        rates = (
            [f"top-{k} {100 * row['correct'][str(k)] / row['num_samples']:.2f} %" for k in evaluation["top_k"]]
            if not row.get("unavailable")
            else ["not available"]
        )
        within = context_counts(row, min(evaluation["top_k"]))
        parts = [f"{name} {100 * right / n:.2f} %" for name, (right, n) in within.items()]
        more = [f"and {len(parts) - MANY} more"] if len(parts) > MANY else []
        if parts:
            rates.append(f"by context: {', '.join([*parts[:MANY], *more])}")
        lines.append(f"  {row['name'].ljust(width)}  {', '.join(rates)}")
    return [*lines, *(f"  {text}" for text in evaluation["findings"])]
