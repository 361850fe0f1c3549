"""Figures of an experiment: curves per configuration (the paper's Figs. 3 and 4), and what contexts are worth.

Several seeds of a row are one thick line, their mean, over thin ones.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cn_hf.evaluation.plots import (
    COLORS,
    KIND_COLORS,
    curve_points,
    new_figure,
    plot_context_statistics,
    quiet_axes,
    save_figure,
    spread_scale,
)
from cn_hf.evaluation.report import RowKind
from cn_hf.experiments.cells import Cell
from cn_hf.hub import from_pretrained
from cn_hf.norm import ContextNorm
from cn_hf.patching.patch import named_slots
from cn_hf.patching.routing import router_of
from cn_hf.training.run_folder import CHECKPOINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "Epochs", "plot_accuracies", "plot_cell_contexts", "plot_curves"]

Epochs = Sequence[Mapping[str, Any]]
"""The epochs of one run, as in ``History.to_dict()["epochs"]``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Accuracies in percent, one for each seed, of one way to use a network."""

    name: str
    kind: RowKind
    values: Sequence[float]


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[Epochs]]],
    path: Path,
    *,
    quantity: str,
    label: str,
    title: str,
    lines: Sequence[str],
) -> Path:
    """Draw a quantity against the epoch, a panel for each configuration and a line for each row.

    Args:
        panels: Title of the panel -> name of the line -> the epochs of its runs.
        path: The PNG.
        quantity: "validation_error" (percent) or "validation_loss".
        label: Of the vertical axis.
        title: Above the figure.
        lines: Names of all lines, so that one has the same colour in every figure.

    Returns:
        The path.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 4)
    height = math.ceil(len(panels) / columns)
    figure = new_figure(width=0.6 + max(4.0 * columns, 5.4), height=1.2 + 2.9 * height)
    drawn: dict[str, Any] = {}
    all_axes = figure.subplots(height, columns, squeeze=False).flatten()
    for axes, (name, runs) in zip(all_axes, panels.items(), strict=False):
        for line, histories in runs.items():
            drawn[line] = _draw_mean(axes, histories, quantity, COLORS[lines.index(line) % len(COLORS)])
        met = [
            value for histories in runs.values() for epochs in histories for _, value in curve_points(epochs, quantity)
        ]
        spread_scale(axes, met)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        quiet_axes(axes)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    names = [line for line in lines if line in drawn]
    _legend(figure, {line: drawn[line] for line in names})
    _title(figure, title)
    return save_figure(figure, path)


def plot_accuracies(panels: Mapping[str, Sequence[Bar]], path: Path, *, label: str, title: str) -> Path:
    """Draw accuracies as bars, coloured by what they are for, a panel for each configuration; whiskers are ± std.

    Args:
        panels: Title of the panel -> its bars, the same names in every panel.
        path: The PNG.
        label: Of the horizontal axis.
        title: Above the figure.

    Returns:
        The path.
    """
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(bar.name for bars in panels.values() for bar in bars))
    figure = new_figure(width=3.8 + 2.6 * len(panels), height=1.8 + 0.3 * len(names))
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (panel, bars) in zip(all_axes, panels.items(), strict=True):
        for bar in bars:
            position, mean = names.index(bar.name), statistics.fmean(bar.values)
            error = statistics.stdev(bar.values) if len(bar.values) > 1 else 0.0
            axes.barh(position, mean, color=KIND_COLORS[bar.kind], height=0.7)
            if error:
                axes.errorbar(mean, position, xerr=[[min(error, mean)], [error]], color="#333333", linewidth=1)
            axes.text(mean + error + 1.5, position, f"{mean:.1f}", va="center", fontsize=8)
        axes.set_title(panel, fontsize=10)
        axes.set_xlim(0, 116)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel(label)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        quiet_axes(axes)
        axes.grid(visible=False, axis="y")
    kinds = list(dict.fromkeys(bar.kind for bars in panels.values() for bar in bars))
    _legend(figure, {kind: Patch(color=KIND_COLORS[kind]) for kind in kinds})
    _title(figure, title)
    return save_figure(figure, path)


def plot_cell_contexts(cell: Cell, path: Path, *, title: str) -> Path:
    """Draw the mean and the standard deviation that a finished cell's first CN layer learned for each context.

    Raises:
        CheckpointError: The cell's checkpoint cannot be read.
    """
    network = from_pretrained(cell.folder / CHECKPOINT)
    name, slot = named_slots(network)[0]
    return plot_context_statistics(
        cast(ContextNorm, slot.normalizer),
        path,
        context_names=router_of(network).config.context_names,
        title=textwrap.fill(f"{title}: what CN learned at {name}", 56),
    )


def _title(figure: Figure, title: str) -> None:
    """A title in as many lines as the figure's width asks for."""
    lines = [textwrap.fill(line, int(figure.get_figwidth() * 11)) for line in title.replace(" [", "\n[").splitlines()]
    figure.suptitle("\n".join(lines), fontsize=10)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """A legend below, in as many columns as fit."""
    columns = int(figure.get_figwidth() / (0.7 + 0.085 * max(map(len, handles))))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=max(1, columns), frameon=False
    )


def _draw_mean(axes: Axes, histories: Sequence[Epochs], quantity: str, color: str) -> Any:
    """Several runs as thin lines, and their mean over the epochs that all of them have; runs may stop early."""
    runs = [dict(curve_points(epochs, quantity)) for epochs in histories]
    if len(runs) > 1:
        for run in runs:
            axes.plot(list(run), list(run.values()), color=color, linewidth=0.7, alpha=0.45)
    common = sorted(set.intersection(*(set(run) for run in runs)))
    means = [statistics.fmean(run[epoch] for run in runs) for epoch in common]
    (line,) = axes.plot(
        common, means, color=color, linewidth=1.6, marker="o" if len(common) <= 20 else None, markersize=3
    )
    return line
