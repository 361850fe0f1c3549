"""A report as a picture: how much of its limit each measurement uses up, one bar a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cn_hf.evaluation.plots import new_figure, quiet_axes, save_figure
from scripts.benchmark.report import Report
from scripts.benchmark.rows import Row
from scripts.benchmark.sections import DEVICES, SECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PICTURE_NAME", "limited_rows", "plot_report"]

PICTURE_NAME = "benchmark.png"
HOLDS, BROKEN = "#228833", "#EE6677"
_WIDEST = 2.0  # bars end here; their numbers say more


def limited_rows(report: Report) -> list[tuple[str, str, Row]]:
    """Device, section and row of every measurement that has a limit."""
    return [
        (device, name, row)
        for device in DEVICES
        for name in SECTIONS
        if name in report.get(device, {})
        for row in report[device][name].rows
        if row.to_limit is not None
    ]


def plot_report(report: Report, path: Path) -> Path | None:
    """Draw a bar for each measurement with a limit: 1 or less where the limit holds.

    Args:
        report: From ``read_report``.
        path: The PNG.

    Returns:
        The path; None where nothing measured has a limit, and nothing is drawn.

    Raises:
        OSError: The file cannot be written.
    """
    rows = limited_rows(report)
    if not rows:
        return None
    figure = new_figure(width=13.0, height=1.3 + 0.24 * len(rows))
    axes = figure.subplots()
    for position, (_, _, row) in enumerate(rows):
        _draw(axes, position, row)
    axes.axvline(1, color="#333333", linewidth=1.2)
    axes.set_xlim(0, _WIDEST * 1.6)  # room for the numbers
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    axes.set_xlabel("part of the limit used: the limit holds up to 1")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [f"{DEVICES[device]} {name}: {row.what}, {row.dtype}" for device, name, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    quiet_axes(axes)
    axes.grid(visible=False, axis="y")
    held = sum(bool(row.holds) for _, _, row in rows)
    figure.suptitle(f"{held} of {len(rows)} limits hold", fontsize=11)
    return save_figure(figure, path)


def _draw(axes: Axes, position: int, row: Row) -> None:
    assert row.to_limit is not None
    length = min(max(row.to_limit, 0.0), _WIDEST)
    axes.barh(position, length, color=HOLDS if row.holds else BROKEN, height=0.72)
    against = f" against {row.rival}" if row.rival else ""
    words = f"{row.value_in_words}{against} ({row.limit_in_words})"
    axes.text(max(length, 1) + 0.02, position, words, va="center", fontsize=7)
