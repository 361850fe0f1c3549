"""The results of a Siamese run, in words and as files.

Under its output folder a run leaves ``results.json``, ``report.md``, ``curves.png``, ``contexts.png`` (what CN learned
on the input beside the images' own statistics), ``contact_sheet.png`` (images restyled and restyled back beside real
ones) and ``checkpoint/``, which ``cn_hf.from_pretrained`` and ``cn-hf restyle`` load.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from cn_hf.errors import CheckpointError
from cn_hf.evaluation import markdown_table, plot_training_curves, run_environment, write_results
from cn_hf.evaluation.contact_sheet import write_contact_sheet
from cn_hf.evaluation.plots import COLORS, new_figure, quiet_axes, save_figure
from cn_hf.files import write_whole
from cn_hf.hub.description import EMBEDDING
from cn_hf.patching.restyle import restyle
from cn_hf.patching.routing import RoutedModel, router_of
from cn_hf.printing import for_markdown
from cn_hf.recipes.classifier.results import network_facts, portable_config, save_network
from cn_hf.recipes.siamese.networks import SiameseNetwork, SiameseRun, has_input_contexts
from cn_hf.recipes.siamese.restyling import Levels, Shift
from cn_hf.recipes.siamese.verification import Verification
from cn_hf.training.run_folder import CHECKPOINT, RESULTS

__all__ = ["summary", "write_siamese_run"]

COLUMNS = 6
PANELS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "validation_error": "verification error, %",
}


def write_siamese_run(run: SiameseRun, folder: Path) -> None:
    """Write everything a run leaves behind, each file whole or not at all; other files in the folder stay.

    Raises:
        CheckpointError: The folder cannot be written to.
        ConfigError: The network could not be built again from its description.
    """
    main = list(run.networks.values())[-1]
    if isinstance(main.model, RoutedModel):
        router_of(main.model).task = EMBEDDING
    save_network(main.model, folder / CHECKPOINT, main.config, run.data.prepared, main.config.embedding_dim)
    try:
        curves = {name: network.history.to_dict()["epochs"] for name, network in run.networks.items()}
        plot_training_curves(curves, folder / "curves.png", panels=PANELS, title=_name(run))
        figures = {"curves.png": "Training: contrastive loss, and verification of validation pairs."}
        if restyled := _with_contexts(run):
            _plot_levels(run, restyled, folder / "contexts.png")
            _draw_sheet(run, restyled, folder / "contact_sheet.png")
            figures["contexts.png"] = (
                "Mean and standard deviation (bars) of each channel: of held-out images, and as CN learned them."
            )
            figures["contact_sheet.png"] = (
                "Held-out images evenly spaced through their split, none chosen by eye, restyled and restyled back."
            )
        pictures = "\n\n".join(f"![{name}]({name})\n{caption}" for name, caption in figures.items())
        write_whole(folder / "report.md", f"{summary(run)}\n\n{_provenance(run)}\n\n{pictures}\n".encode())
        write_results(folder / RESULTS, _results(run))
    except OSError as error:
        raise CheckpointError(f"the results cannot be written to {folder}: {error}") from error


def summary(run: SiameseRun) -> str:
    """The run as Markdown: what it was, verification, restyling, and what was found."""
    parts = [f"### {_title(run)}", _data_in_words(run), _verification_table(run)]
    if restyled := _with_contexts(run):
        parts += [_restyling_table(run, restyled), _findings(run, restyled)]
    return "\n\n".join(parts)


def _name(run: SiameseRun) -> str:
    datasets = " + ".join(Path(dataset).name for dataset in run.config.dataset)
    return f"Siamese {Path(run.config.model).name} on {datasets}"


def _title(run: SiameseRun) -> str:
    return f"{_name(run)}, {run.data.held_out} split"


def _with_contexts(run: SiameseRun) -> dict[str, SiameseNetwork]:
    return {name: network for name, network in run.networks.items() if has_input_contexts(network.model)}


# ------------------------------------------------------------------------------------------------------------ in words


def _data_in_words(run: SiameseRun) -> str:
    data, config = run.data, run.config
    counts = ", ".join(f"{split} {batches.num_rows}" for split, batches in data.prepared.splits().items())
    kind = "training pairs are two views of one image, or of two images"
    if not data.views:
        train, held_out = (set(data.images(split).labels.tolist()) for split in ("train", data.held_out))
        shared = len(held_out & train)
        closed = {0: "new objects", len(held_out): "a closed set"}.get(shared, "mostly a closed set")
        if 0 < shared <= len(held_out) / 2:
            closed = "mostly new objects"
        kind = (
            f"{len(train)} identities in train; {shared} of the {len(held_out)} identities of {data.held_out} are also "
            f"in train ({closed}; images differ)"
        )
    threshold = "chosen on validation pairs"
    if data.held_out == "validation":
        threshold += ", which are also those reported: there is no test split, so the accuracy is too high"
    return (
        f"Images: {counts}; {kind}. Contrastive loss, margin {config.margin:g}, {config.epochs} epochs of "
        f"{data.pairs.num_rows} pairs; threshold {threshold}. Seed {config.seed}, n = 1 run of each network."
    )


def _verification_table(run: SiameseRun) -> str:
    groups = list(next(iter(run.networks.values())).held_out)
    header = ["network", "accuracy, %", "ROC AUC, %", "EER, %"]
    header += [f"{for_markdown(group)} ({_pairs(run, group)}), %" for group in groups[1:]]
    rows = []
    for name, network in run.networks.items():
        result = network.held_out["all"]
        rows.append([name, _percent(result), _area(result), _optional(result.equal_error_rate)])
        rows[-1] += [_percent(network.held_out[group]) for group in groups[1:]]
    result = next(iter(run.networks.values())).held_out["all"]
    notes = (
        f"{result.pairs} held-out pairs, {result.same} of them of the same object. Accuracy with the binomial standard "
        "error as if pairs were independent; they share images, which the error of the ROC AUC allows for (bootstrap "
        "over images). Columns by the contexts of the two images are accuracies at the same threshold."
    )
    return markdown_table(header, rows) + "\n\n" + notes


def _pairs(run: SiameseRun, group: str) -> str:
    result = next(iter(run.networks.values())).held_out[group]
    return f"{result.pairs} pairs, {result.same} same"


def _percent(result: Verification) -> str:
    return f"{100 * result.accuracy:.1f} ± {100 * result.accuracy_error:.1f}"


def _area(result: Verification) -> str:
    error = "" if result.roc_auc_error is None else f" ± {100 * result.roc_auc_error:.1f}"
    return _optional(result.roc_auc) + error


def _optional(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f}"


def _restyling_table(run: SiameseRun, restyled: dict[str, SiameseNetwork]) -> str:
    header = ["restyled", "by", "mean, std before", "at start", "after training", "clipped, %", "cycle", "cycle, 8 bit"]
    rows = []
    for name, network in restyled.items():
        for start, shift in zip(network.shifts_at_start, network.shifts, strict=True):
            cycle_8bit = f"{shift.cycle_error_8bit:.2f} ({shift.cycle_error_clipped:.2f})"
            distances = [_distance(pair) for pair in (shift.before, start.after, shift.after)]
            measured = [f"{100 * shift.clipped:.1f}", f"{shift.cycle_error:.1e}", cycle_8bit]
            rows.append([for_markdown(f"{shift.source} to {shift.target}"), name, *distances, *measured])
    images = next(iter(restyled.values())).shifts
    counts = ", ".join(f"{shift.images} {for_markdown(shift.source)}" for shift in images)
    notes = (
        "Distance of held-out images from real held-out images of the target context, in levels of 255: mean over the "
        "channels of the absolute difference of their means, and of their standard deviations, over all pixels "
        f"({counts} images). Cycle: mean absolute error, in levels, of restyling there and back without clipping; "
        "with an 8-bit image in between, over the values that were not clipped there (over all values). For "
        f"scale, training images of the same context are at: {_scale(run)}."
    )
    return markdown_table(header, rows, align="llrrrrrr") + "\n\n" + notes


def _scale(run: SiameseRun) -> str:
    """Return the distance of training images from held-out images of the same context."""
    data = run.data
    names, train, held_out = data.prepared.context_names or (), data.images("train"), data.images(data.held_out)
    distances = []
    for name in (run.config.source_context, run.config.target_context):
        context = names.index(name)
        levels = [Levels.of(split.images[split.context_ids == context]) for split in (train, held_out)]
        distances.append(f"{name} {_distance(levels[0].distance(levels[1]))}")
    return "; ".join(distances)


def _distance(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1f}, {pair[1]:.1f}"


def _findings(run: SiameseRun, restyled: dict[str, SiameseNetwork]) -> str:
    lines = []
    for name, network in restyled.items():
        shift, start = network.shifts[0], network.shifts_at_start[0]
        covered, at_start = _covered(shift), _covered(start)[0]
        became = "became" if covered[0] > 0.5 else "did not become"
        lines.append(
            f"- {name}: the learned statistics {became} {for_markdown(shift.source)} and "
            f"{for_markdown(shift.target)}: restyling covers "
            f"{round(100 * covered[0])} % of the distance of the means and {round(100 * covered[1])} % of that of the "
            f"standard deviations ({round(100 * at_start)} % of the means' before training)."
        )
    lines.append(
        "- Why the start matters: the contrastive loss sees the statistics only through distances of embeddings. It "
        "rewards inputs that tell objects apart, and nothing for matching the images' own mean and standard deviation."
    )
    return "\n".join(lines)


def _covered(shift: Shift) -> list[float]:
    """Part of the distance of means, and of standard deviations, that restyling did away with."""
    return [1 - after / before if before else 0.0 for before, after in zip(shift.before, shift.after, strict=True)]


def _provenance(run: SiameseRun) -> str:
    facts = run_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"Command: `{facts['command']}`. {facts['device']} ({facts['cpu']}, {facts['cpu_cores']} cores, "
        f"{facts['threads']} of them used), {facts['processes']} process(es), {run.seconds:.0f} s in all, "
        f"{run.processor_seconds:.0f} s of them on a processor. {versions}."
    )


def _results(run: SiameseRun) -> dict[str, Any]:
    data, prepared = run.data, run.data.prepared
    return {
        "config": portable_config(run.config),
        "data": {
            "images": {split: batches.num_rows for split, batches in prepared.splits().items()},
            "identities": {split: len(set(data.images(split).labels.tolist())) for split in ("train", data.held_out)},
            "identities_in_both": len(
                set(data.images("train").labels.tolist()) & set(data.images(data.held_out).labels.tolist())
            ),
            "views": data.views,
            "context_names": prepared.context_names,
            "input_size": prepared.input_size,
            "mean": prepared.mean,
            "std": prepared.std,
        },
        "held_out_split": data.held_out,
        "seconds": run.seconds,
        "processor_seconds": run.processor_seconds,
        "networks": {name: _network_results(network) for name, network in run.networks.items()},
    }


def _network_results(network: SiameseNetwork) -> dict[str, Any]:
    return {
        "network": network_facts(network.model),
        "history": network.history.to_dict(),
        "validation": network.validation.to_dict(),
        "held_out": {group: result.to_dict() for group, result in network.held_out.items()},
        "levels_at_start": network.levels_at_start,
        "levels": network.levels,
        "restyling_at_start": [shift.to_dict() for shift in network.shifts_at_start],
        "restyling": [shift.to_dict() for shift in network.shifts],
    }


# ------------------------------------------------------------------------------------------------------------- figures


def _plot_levels(run: SiameseRun, restyled: dict[str, SiameseNetwork], path: Path) -> None:
    """Mean and standard deviation of each channel by context: of real images, then of each network."""
    config = run.config
    names = (config.source_context, config.target_context)
    shift: Shift = next(iter(restyled.values())).shifts[0]
    real = dict(zip(names, (shift.original, shift.real), strict=True))
    panels: dict[str, dict[str, Levels]] = {"held-out images": real}
    panels |= {f"CN after training,\n{name.split(', ', 1)[-1]}": network.levels for name, network in restyled.items()}
    figure = new_figure(width=1.0 + 2.6 * len(panels), height=3.4)
    channels = len(shift.real.mean)
    labels = ("R", "G", "B") if channels == 3 else tuple(map(str, range(channels)))
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, levels) in zip(all_axes, panels.items(), strict=True):
        for place, (name, color) in enumerate(zip(names, (COLORS[3], COLORS[8]), strict=True)):
            at = [channel + 0.2 * (2 * place - 1) for channel in range(channels)]
            axes.errorbar(
                at, levels[name].mean, yerr=levels[name].std, fmt="o", color=color, capsize=3, markersize=5, label=name
            )
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.axhline(255, color="#999999", linewidth=0.8)
        axes.set_xticks(range(channels), labels)
        axes.set_xlim(-0.6, channels - 0.4)
        axes.set_title(title, fontsize=10)
        quiet_axes(axes)
    all_axes[0].set_ylabel("level (0 black, 255 white)")
    all_axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_sheet(run: SiameseRun, restyled: dict[str, SiameseNetwork], path: Path) -> None:
    """Both directions: originals, restyled by each network, cycled by the last, real images of the target context."""
    config = run.config
    main_name, main = list(restyled.items())[-1]
    forth = config.source_context, config.target_context
    blocks = []
    for source, target in (forth, forth[::-1]):
        originals, real = _pictures(run, source, target)
        rows: dict[str, list[PIL.Image.Image]] = {f"real {source}": originals}
        for name, network in restyled.items():
            there = _restyled(network, originals, source, target)
            rows[f"{source} to {target}, {name.split(', ', 1)[-1]}"] = there
        rows[f"and back to {source}, {main_name.split(', ', 1)[-1]}"] = _restyled(main, there, target, source)
        rows[f"real {target}" + ("" if run.data.views else ", same places")] = real
        blocks.append(rows)
    write_contact_sheet(blocks, path, title=f"{_title(run)}: {config.source_context} and {config.target_context}")


def _restyled(
    network: SiameseNetwork, pictures: Sequence[PIL.Image.Image], source: str, target: str
) -> list[PIL.Image.Image]:
    return restyle(network.model, list(pictures), source, target)


def _pictures(run: SiameseRun, source: str, target: str) -> tuple[list[PIL.Image.Image], list[PIL.Image.Image]]:
    """Held-out pictures of one context, and of the other, of the same objects where there are any."""
    data = run.data
    images = data.images(data.held_out)
    names = data.prepared.context_names
    assert names is not None
    assert images.context_ids is not None
    contexts, identities = images.context_ids.cpu(), images.labels.cpu()
    of_source, of_target = ((contexts == names.index(name)).nonzero().flatten() for name in (source, target))
    if not data.views:  # those that have a partner first
        paired = torch.isin(identities[of_source], identities[of_target])
        of_source = of_source[paired] if int(paired.sum()) >= COLUMNS else of_source
    spaced = torch.linspace(0, len(of_source) - 1, min(COLUMNS, len(of_source), len(of_target))).round().long()
    chosen = of_source[spaced].tolist()
    free = of_target.tolist()
    partners = []
    for place in chosen:
        same = [other for other in free if identities[other] == identities[place]]
        partners.append((same or free)[0])
        free.remove(partners[-1])
    rows = images.rows.cpu()
    split = data.pictures[data.held_out]
    columns = [[split[int(rows[place])][data.image_column] for place in places] for places in (chosen, partners)]
    return columns[0], columns[1]
