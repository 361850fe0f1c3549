"""The text and picture of a dry run: config, images per context, the slots patched, sizes, steps, the first batch.

n images of the first batch on this process, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import cn_hf
from cn_hf.data import Batches, PreparedData, StreamedBatches, read_context_ids
from cn_hf.errors import CheckpointError, TrainingError
from cn_hf.evaluation.plots import new_figure, save_figure
from cn_hf.patching.routing import RoutedModel
from cn_hf.printing import for_terminal
from cn_hf.recipes.classifier.results import data_in_words, network_facts
from cn_hf.training.config import TrainingConfig

__all__ = ["draw_batch", "preview"]

PICTURE = "first_batch.png"
_MAX_IMAGES, _COLUMNS = 32, 8
_MAX_CONTEXTS = 100
_MAX_CHARACTERS = 24


def preview(config: TrainingConfig, model: nn.Module, data: PreparedData, *, folder: Path | None) -> str:
    """Draw the first training batch and describe the run; nothing is trained.

    Args:
        config: Of the run.
        model: The network, patched.
        data: With a training split.
        folder: Gets ``first_batch.png``; None: ``dry-run`` in the current folder.

    Returns:
        The text to print. What stands before the images is a config file that says what ``config`` says.

    Raises:
        TrainingError: The training data has no batch.
        CheckpointError: The folder cannot be written to.
        DatasetFileError: An image of the batch cannot be read.
    """
    batch = None if data.train is None else next(iter(data.train), None)
    if batch is None or data.train is None:
        raise TrainingError("an epoch has no batch to show; check the training split, batch_size and drop_last")
    parts = [
        _config_in_groups(config),
        _data_in_words(data),
        _network_in_words(config, model),
        _steps_in_words(config, data.train),
    ]
    if len(batch["pixel_values"]) > 0:
        path = (Path("dry-run") if folder is None else folder) / PICTURE
        parts.append(f"first training batch: {draw_batch(batch, data, path)}")
    return "\n\n".join(parts)


def draw_batch(batch: Mapping[str, Tensor], data: PreparedData, path: str | Path) -> Path:
    """Draw up to 32 images of a batch as the network gets them, but for the normalisation, which is taken back.

    Above each stands its class, below it its context; of mixed ones the two largest parts.

    Args:
        batch: ``pixel_values`` (n, C, H, W), normalised, n at least 1; ``labels`` (n,), or weights (n, classes),
            or those of the first images alone; where there are contexts ``context_ids`` (n,), or weights (n, T).
        data: What the batch is of: names and normalisation.
        path: The PNG.

    Returns:
        The path.

    Raises:
        CheckpointError: The picture cannot be written.
    """
    pixels = _shown_pixels(batch["pixel_values"][:_MAX_IMAGES], data)
    classes = [_named(label, data.class_names) for label in batch["labels"][:_MAX_IMAGES].cpu()]
    classes += [["unlabelled"]] * (len(pixels) - len(classes))
    contexts = [_named(ids, data.context_names) for ids in batch.get("context_ids", torch.empty(0))[:_MAX_IMAGES].cpu()]
    columns = min(_COLUMNS, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    lines = max(map(len, classes)) + max(map(len, contexts), default=0)
    height = 1.4 * pixels.shape[1] / pixels.shape[2] + 0.15 * lines
    figure = new_figure(width=max(3.6, 1.5 * columns), height=0.5 + rows * height)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.05)
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    smoothing = "nearest" if max(pixels.shape[1:3]) <= 128 else "antialiased"
    for place, cell in enumerate(cells):
        cell.set_xticks([])
        cell.set_yticks([])
        cell.spines[:].set_visible(False)
        if place >= len(pixels):
            continue
        cell.imshow(pixels[place].numpy(), cmap="gray", vmin=0, vmax=1, interpolation=smoothing)
        # A dollar sign in a name starts no formula.
        cell.set_title("\n".join(classes[place]), fontsize=7, pad=2, parse_math=False)
        if contexts:
            cell.set_xlabel("\n".join(contexts[place]), fontsize=7, color="#4477AA", labelpad=2, parse_math=False)
    title = f"first training batch, {len(pixels)} of {len(batch['pixel_values'])} shown"
    figure.suptitle(title + (" (class above, context below)" if contexts and columns > 2 else ""), fontsize=9)
    try:
        return save_figure(figure, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; give another folder") from error


def _config_in_groups(config: TrainingConfig) -> str:
    values = config.to_dict()
    groups: dict[str, dict[str, object]] = {}
    for field in dataclasses.fields(config):
        groups.setdefault(field.metadata["section"], {})[field.name] = values[field.name]
    texts = {section: yaml.safe_dump(group, sort_keys=False, allow_unicode=True) for section, group in groups.items()}
    return "\n".join(f"# {section}\n{text}" for section, text in texts.items()).rstrip()


def _data_in_words(data: PreparedData) -> str:
    """Images per split, classes, and a table of images per context and split."""
    words = data_in_words(dataclasses.replace(data, context_names=None))
    counts = {name: _context_counts(batches) for name, batches in data.splits().items()}
    known = [len(column) for column in counts.values() if column is not None]
    if data.context_names is None and not known:
        return words
    names = data.context_names or tuple(map(str, range(max(known))))
    table = [["images per context", *counts]]
    for index, name in enumerate(names[:_MAX_CONTEXTS]):
        table.append([for_terminal(name), *(_count(column, index) for column in counts.values())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    if len(names) > _MAX_CONTEXTS:
        lines.append(f"and {len(names) - _MAX_CONTEXTS} contexts more")
    return "\n".join([words, "", *lines])


def _context_counts(batches: Batches) -> list[float] | None:
    """Images of each context, or the sum of their weights; None where that is not known without reading them all."""
    contexts = getattr(batches, "context_ids", None)
    if isinstance(batches, StreamedBatches) and not batches.is_stream:
        contexts = read_context_ids(batches.dataset)
    if contexts is None:
        return None
    summed = contexts.double().sum(0) if contexts.is_floating_point() else torch.bincount(contexts)
    return summed.tolist()


def _count(counts: list[float] | None, index: int) -> str:
    """A cell of the table; a context beyond the last one met has no images."""
    if counts is None:
        return "?"
    count = counts[index] if index < len(counts) else 0
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def _network_in_words(config: TrainingConfig, model: nn.Module) -> str:
    facts = network_facts(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    line = f"parameters: {facts['parameters']:,}, {trainable:,} of them trainable"
    if not isinstance(model, RoutedModel):
        return f"{line}\nslots patched: none"
    report = cn_hf.patch_report(model)
    return f"{line}, {facts['context_parameters']:,} added by {config.mode}\nslots patched: {len(report)}\n\n{report}"


def _steps_in_words(config: TrainingConfig, train: Batches) -> str:
    steps, last = len(train), train.num_samples - (len(train) - 1) * train.batch_size
    words = f"steps: {steps:,} per epoch, {steps * config.epochs:,} in all, batches of {config.batch_size:,}"
    if last != config.batch_size:
        words += f" ({last:,} in the last of an epoch)"
    if train.num_processes > 1:
        words += f", over {train.num_processes} processes"
    if config.accumulation_steps > 1:
        words += f", in {config.accumulation_steps} parts"
    return words


def _shown_pixels(pixel_values: Tensor, data: PreparedData) -> Tensor:
    """Normalised (n, C, H, W) as (n, H, W, 3) or (n, H, W) in [0, 1]."""
    images = pixel_values.detach().float().cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    images = (images * std + mean).nan_to_num(0.0).clamp(0, 1)
    return images[:, 0] if images.shape[1] < 3 else images[:, :3].permute(0, 2, 3, 1)


def _named(value: Tensor, names: Sequence[str] | None) -> list[str]:
    """The name of an id, or of weights the names of the two largest with percentages."""
    if not value.is_floating_point():
        return [_name(int(value), names)]
    weights, ids = value.topk(min(2, len(value)))
    parts = [(100 * weight, index) for weight, index in zip(weights.tolist(), ids.tolist(), strict=True)]
    if parts[0][0] >= 99.5:
        return [_name(parts[0][1], names)]
    return [f"{_name(index, names, _MAX_CHARACTERS - 4)} {percent:.0f}%" for percent, index in parts if percent >= 0.5]


def _name(index: int, names: Sequence[str] | None, length: int = _MAX_CHARACTERS) -> str:
    name = str(index) if names is None else for_terminal(" ".join(names[index].split()))
    return name if len(name) <= length else f"{name[: length - 1]}…"
