"""Figures as PNG: training curves (as the paper's Figs. 3 and 4), protocols side by side, what a ContextNorm learned.

Matplotlib is imported when the first figure is drawn, without pyplot, so that no window system or global state is
touched. Files appear whole or not at all.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cn_hf.errors import ConfigError, InputTypeError
from cn_hf.evaluation.report import ProtocolReport, RowKind
from cn_hf.files import write_whole
from cn_hf.norm import ContextNorm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "CURVE_PANELS",
    "KIND_COLORS",
    "curve_points",
    "new_figure",
    "plot_context_statistics",
    "plot_protocols",
    "plot_training_curves",
    "quiet_axes",
    "save_figure",
    "spread_scale",
]

CURVE_PANELS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "validation_error": "validation error, %",
}
"""Columns of a history drawn by default, and what their axes are called."""

# Paul Tol's "bright" and "muted" schemes, told apart by colour-blind readers too.
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#882255", "#999933", "#332288", "#777777")
_LINE_STYLES = ("-", "--", ":", "-.")
KIND_COLORS: dict[RowKind, str] = {
    "true contexts": "#228833",
    "deployable": "#4477AA",
    "control": "#BBBBBB",
    "leak check": "#EE6677",
    "baseline": "#CCBB44",
}
_MAX_LABELLED_CONTEXTS = 40
_MAX_PRINTED_FEATURES = 8


def plot_training_curves(
    runs: Mapping[str, Sequence[Mapping[str, float | None]]],
    path: str | Path,
    *,
    panels: Mapping[str, str] = CURVE_PANELS,
    title: str | None = None,
) -> Path:
    """Draw histories of several runs against the epoch, one panel per quantity.

    Args:
        runs: per run name its epochs in order, each a mapping with ``"epoch"`` and the quantities of ``panels``
            (``History.to_dict()["epochs"]``). A quantity may be absent or None; ``validation_error`` (percent) is taken
            from ``validation_accuracy`` (in [0, 1]) where it is not there itself.
        path: the PNG.
        panels: quantity -> axis label. Those that no run has are left out.
        title: above the figure.

    Returns:
        The path.

    Raises:
        ConfigError: there is nothing to draw.
    """
    curves = {
        quantity: {name: points for name, history in runs.items() if (points := curve_points(history, quantity))}
        for quantity in panels
    }
    curves = {quantity: lines for quantity, lines in curves.items() if lines}
    if not curves:
        raise ConfigError(
            f"no run has any of {', '.join(panels)}; pass, per run, epochs with 'epoch' and these quantities"
        )
    styles = {
        name: (COLORS[index % len(COLORS)], _LINE_STYLES[(index // len(COLORS)) % len(_LINE_STYLES)])
        for index, name in enumerate(runs)
    }
    width = 0.6 + 4.2 * len(curves)
    columns = max(1, min(len(runs), int(width / (0.7 + 0.085 * max(map(len, runs))))))  # inches of a legend entry
    figure = new_figure(width=width, height=3.4 + 0.22 * math.ceil(len(runs) / columns))
    handles: dict[str, Any] = {}
    for axes, (quantity, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        handles |= _draw_lines(axes, lines, styles)
        axes.set_ylabel(panels[quantity])
    if len(runs) > 1:
        drawn = [name for name in runs if name in handles]
        figure.legend(
            [handles[name] for name in drawn], drawn, loc="outside lower center", ncols=columns, frameon=False
        )
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def plot_protocols(report: ProtocolReport, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the accuracies of a report as bars, coloured by what the row is for, with binomial standard errors.

    Args:
        report: from :func:`cn_hf.evaluation.evaluate_protocols`. Rows not available are named, without a bar.
        path: the PNG.
        title: above the figure.

    Returns:
        The path.
    """
    from matplotlib.patches import Patch

    rows = report.rows
    figure = new_figure(width=3.0 + 4.4 * len(report.top_k), height=1.4 + 0.36 * len(rows))
    all_axes = figure.subplots(1, len(report.top_k), squeeze=False, sharey=True)[0]
    for axes, k in zip(all_axes, report.top_k, strict=True):
        for position, row in enumerate(rows):
            accuracy, error = row.accuracy(k), row.standard_error(k)
            if accuracy is None or error is None:
                axes.text(1, position, "not available", va="center", fontsize=8, color="#666666")
                continue
            low, high = min(error, accuracy), min(error, 1 - accuracy)
            axes.barh(position, 100 * accuracy, color=KIND_COLORS[row.kind], height=0.7)
            axes.errorbar(100 * accuracy, position, xerr=[[100 * low], [100 * high]], color="#333333", linewidth=1)
            axes.text(100 * (accuracy + high) + 1, position, f"{100 * accuracy:.1f}", va="center", fontsize=8)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"top-{k} accuracy, %")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", length=0)
        quiet_axes(axes)
        axes.grid(visible=False, axis="y")
    kinds = list(dict.fromkeys(row.kind for row in rows))
    figure.legend(
        [Patch(color=KIND_COLORS[kind]) for kind in kinds], kinds, loc="outside lower center", ncols=5, frameon=False
    )
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def plot_context_statistics(
    layer: ContextNorm,
    path: str | Path,
    *,
    context_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the mean and the standard deviation that a layer learned, contexts by features, as two heat maps.

    The standard deviation shown is what inputs are divided by, sqrt(variance + eps).

    Args:
        layer: a ContextNorm with T contexts and C features.
        path: the PNG.
        context_names: T names; numbers if None.
        title: above the figure.

    Returns:
        The path.

    Raises:
        InputTypeError: the layer is no ContextNorm.
        ConfigError: the number of names is not T.
    """
    if not isinstance(layer, ContextNorm):
        raise InputTypeError(
            f"only a ContextNorm has learned statistics per context, received {type(layer).__name__}; "
            "patch_report(model) lists where a model has them"
        )
    if context_names is not None and len(context_names) != layer.num_contexts:
        raise ConfigError(f"{len(context_names)} context names for a layer of {layer.num_contexts} contexts")
    mean, var = (values.detach().double().cpu() for values in layer.statistics())
    deviation = (var + layer.eps).sqrt()
    names = [str(name) for name in (range(layer.num_contexts) if context_names is None else context_names)]
    num_contexts, num_features = mean.shape
    figure = new_figure(
        width=2.0 + 2 * min(5.0, max(2.2, 0.55 * num_features)),
        height=1.5 + min(8.0, max(1.2, 0.3 * num_contexts)),
    )
    all_axes = figure.subplots(1, 2, sharey=True)
    _heat_map(figure, all_axes[0], mean, "mean $\\mu_r$", center=0.0)
    _heat_map(figure, all_axes[1], deviation, "standard deviation $\\sigma_r$", center=None)
    if num_contexts <= _MAX_LABELLED_CONTEXTS:
        all_axes[0].set_yticks(range(num_contexts), [_shortened(name) for name in names])
    all_axes[0].set_ylabel("context")
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def _heat_map(figure: Figure, axes: Axes, values: torch.Tensor, label: str, *, center: float | None) -> None:
    """One heat map; with ``center`` a diverging scale around it, so that its colour means just that value."""
    from matplotlib.ticker import MaxNLocator

    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    colors = "viridis"
    if center is not None:
        reach = max(abs(high - center), abs(low - center))
        low, high, colors = center - reach, center + reach, "RdBu_r"
    if high - low < 1e-12:  # all alike: give the colour bar a width
        low, high = low - 0.5, high + 0.5
    image = axes.imshow(values.numpy(), aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    num_contexts, num_features = values.shape
    axes.set_xlabel("feature")
    axes.set_title(label, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if num_features <= _MAX_PRINTED_FEATURES and num_contexts <= _MAX_LABELLED_CONTEXTS:
        axes.set_xticks(range(num_features))
        colors_drawn = image.to_rgba(values.numpy())
        for row in range(num_contexts):
            for column in range(num_features):
                red, green, blue, _ = colors_drawn[row, column]
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(
                    column,
                    row,
                    f"{float(values[row, column]):.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    figure.colorbar(image, ax=axes, fraction=0.05)


def _draw_lines(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """Lines of one panel against the epoch; gives the line of each run."""
    from matplotlib.ticker import MaxNLocator

    handles: dict[str, Any] = {}
    for name, points in lines.items():
        epochs, values = zip(*points, strict=True)
        color, style = styles[name]
        marker = "o" if len(points) <= 20 else None
        (handles[name],) = axes.plot(
            epochs, values, marker=marker, markersize=3, linewidth=1.5, color=color, linestyle=style
        )
    met = [epoch for points in lines.values() for epoch, _ in points]
    margin = 0.2 + 0.03 * (max(met) - min(met))
    axes.set_xlim(min(met) - margin, max(met) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    spread_scale(axes, [value for points in lines.values() for _, value in points])
    quiet_axes(axes)
    return handles


def curve_points(history: Sequence[Mapping[str, float | None]], quantity: str) -> list[tuple[float, float]]:
    """(epoch, value) pairs of a history; NaN for values that are not finite, which leaves a gap in the line."""
    points = []
    for number, record in enumerate(history, start=1):
        value = record.get(quantity)
        if value is None and quantity == "validation_error":
            accuracy = record.get("validation_accuracy")
            value = None if accuracy is None else 100 * (1 - accuracy)
        if value is not None:
            epoch = record.get("epoch")
            points.append((float(number if epoch is None else epoch), value if math.isfinite(value) else math.nan))
    return points


def spread_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale where values span more than two decades, as losses of a run that diverged do."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 100:
        axes.set_yscale("log")


def _shortened(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure, in inches, drawn without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def quiet_axes(axes: Axes) -> None:
    """Thin grid lines behind what is drawn, and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return write_whole(path, content.getvalue())
