"""Accuracy under a shift of domain: the same test images in several domains, every row's outcomes paired.

Shape legend: ``D`` domains, ``n`` test images (the same ones in each domain), ``C`` channels, ``H`` and ``W``
height and width, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError
from cn_hf.evaluation.batch_statistics import batch_statistics
from cn_hf.evaluation.plots import COLORS, new_figure, quiet_axes, save_figure
from cn_hf.evaluation.tables import markdown_table

__all__ = [
    "DomainRow",
    "Domains",
    "difference",
    "domain_table",
    "outcomes",
    "plot_domains",
    "plot_over_images",
    "summary_table",
]

Predict = Callable[[Tensor], Tensor]
"""Logits ``(n, K)`` of images ``(n, C, H, W)``."""


@dataclass(frozen=True, slots=True)
class Domains:
    """Test images in several domains, and those without labels that a domain is known by.

    Attributes:
        test: ``(n, C, H, W)`` of each domain, by name, as the network takes them; the clean ones are ``clean``.
        labels: int64 ``(n,)``.
        unlabelled: ``(m, C, H, W)`` of each domain, of other images than the test's.
        outside: domains that are shown, and stand outside of the mean.
    """

    test: dict[str, Tensor]
    labels: Tensor
    unlabelled: dict[str, Tensor]
    outside: tuple[str, ...] = ()

    @property
    def shifted(self) -> list[str]:
        """Names of the domains that the mean is over: all but ``"clean"`` and those outside."""
        return [name for name in self.test if name != "clean" and name not in self.outside]


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One way to run a network in all domains.

    Attributes:
        name: of the row.
        correct: bool ``(n,)`` of each domain.
        needs: what the row is given besides the image.
    """

    name: str
    correct: dict[str, Tensor]
    needs: str = ""

    def accuracy(self, domains: Sequence[str]) -> float:
        """Return the mean accuracy in some domains, in 0..1."""
        return float(torch.stack([self.correct[name].float().mean() for name in domains]).mean())


def difference(row: DomainRow, other: DomainRow, domains: Sequence[str]) -> tuple[float, float]:
    """Return the mean difference of two rows' accuracies and its standard error, paired by image.

    Each test image is one draw: its outcomes are averaged over the domains first, since they are not independent.
    """
    pairs = [row.correct[name].double() - other.correct[name].double() for name in domains]
    of_images = torch.stack(pairs).mean(dim=0)
    return float(of_images.mean()), float(of_images.std(correction=1)) / math.sqrt(len(of_images))


@torch.no_grad()
def outcomes(predict: Predict, images: Tensor, labels: Tensor, *, batch_size: int = 250) -> Tensor:
    """Return which images are classified right, bool ``(n,)``."""
    parts = [predict(part).float().argmax(dim=-1).cpu() for part in torch.split(images, batch_size)]
    return torch.cat(parts) == labels.cpu()


# ------------------------------------------------------------------------------------------------------------ protocols


def in_each_domain(predict: Callable[[str], Predict], domains: Domains, name: str, needs: str = "") -> DomainRow:
    """Return a row whose way to run is chosen by the domain."""
    found = {domain: outcomes(predict(domain), images, domains.labels) for domain, images in domains.test.items()}
    return DomainRow(name, found, needs)


@torch.no_grad()
def of_batches(
    network: nn.Module,
    domains: Domains,
    name: str,
    *,
    mixed: bool,
    batch_size: int = 200,
    seed: int = 0,
    needs: str = "",
) -> DomainRow:
    """Return the row of batch norms that take the statistics of the batch at hand.

    Args:
        network: with batch norms, in evaluation mode.
        domains: test images; the clean ones are a domain of the mixed stream like others.
        name: of the row.
        mixed: batches of images of all domains, in random order; else each batch is of one domain.
        batch_size: images of a batch.
        seed: of the order.
        needs: see ``DomainRow``.
    """
    count, names = len(domains.labels), list(domains.test)
    place = torch.stack(torch.meshgrid(torch.arange(len(names)), torch.arange(count), indexing="ij"), -1).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    if mixed:
        batches = list(torch.split(place[torch.randperm(len(place), generator=generator)], batch_size))
    else:
        of_domains = [part[torch.randperm(count, generator=generator)] for part in torch.split(place, count)]
        batches = [batch for part in of_domains for batch in torch.split(part, batch_size)]
    correct = torch.zeros(len(names), count, dtype=torch.bool)
    with batch_statistics(network):
        for batch in batches:
            images = torch.stack([domains.test[names[domain]][image] for domain, image in batch.tolist()])
            right = network(images).argmax(dim=-1).cpu() == domains.labels[batch[:, 1]]
            correct[batch[:, 0], batch[:, 1]] = right
    return DomainRow(name, dict(zip(names, correct, strict=True)), needs)


def shuffled_names(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Return a domain for each of ``count`` images, drawn at random."""
    drawn = torch.randint(len(names), (count,), generator=torch.Generator().manual_seed(seed))
    return [names[index] for index in drawn.tolist()]


# ----------------------------------------------------------------------------------------------------- tables and plots


def summary_table(rows: Sequence[DomainRow], domains: Domains) -> str:
    """Return a Markdown table: clean and shifted accuracy, and the paired difference from the first row."""
    if not rows:
        raise ConfigError("Expected at least one row, received none.")
    lines = []
    for row in rows:
        mean, error = difference(row, rows[0], domains.shifted)
        against = "" if row is rows[0] else f"{100 * mean:+.1f} ± {100 * error:.1f}"
        cells = [f"{100 * row.accuracy(['clean']):.1f}", f"{100 * row.accuracy(domains.shifted):.1f}", against]
        lines.append([row.name, *cells, row.needs])
    return markdown_table(
        ["", "clean, %", "shifted, %", "against the first row (paired)", "is given"], lines, align="lrrrl"
    )


def domain_table(rows: Sequence[DomainRow], domains: Domains) -> str:
    """Return a Markdown table of the accuracy in each domain."""
    names = list(domains.test)
    lines = [[row.name, *(f"{100 * row.accuracy([name]):.1f}" for name in names)] for row in rows]
    heads = [f"{name}*" if name in domains.outside else name for name in names]
    return markdown_table(["accuracy, %", *heads], lines, align="l" + "r" * len(names))


def plot_domains(rows: Sequence[DomainRow], domains: Domains, path: str | Path, *, title: str) -> Path:
    """Draw the accuracy of some rows in each domain, side by side."""
    figure = new_figure(width=max(8.0, 1.1 * len(domains.test)), height=4.2)
    axes = figure.add_subplot()
    names, width = list(domains.test), 0.8 / len(rows)
    for number, row in enumerate(rows):
        places = [index + (number - (len(rows) - 1) / 2) * width for index in range(len(names))]
        heights = [100 * row.accuracy([name]) for name in names]
        axes.bar(places, heights, width, label=row.name, color=COLORS[number % len(COLORS)])
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title(title)
    quiet_axes(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=min(len(rows), 3), frameon=False)
    return save_figure(figure, path)


def plot_over_images(
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    levels: Mapping[str, float],
    path: str | Path,
    *,
    title: str,
    xlabel: str = "unlabelled images of each domain",
    logarithmic: bool = True,
) -> Path:
    """Draw accuracy over the number of unlabelled images (or another quantity), with the spread over draws.

    Args:
        curves: by name, accuracies in 0..1 of several draws at each number.
        levels: rows that need none, drawn as lines across.
        path: the PNG.
        title: above the figure.
        xlabel: below the axis.
        logarithmic: the axis is one of powers of two.
    """
    figure = new_figure(width=7.5, height=4.5)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        counts = sorted(points)
        values = [torch.tensor(points[count], dtype=torch.float64) * 100 for count in counts]
        means = [float(value.mean()) for value in values]
        spread = [float(value.std(correction=1)) if len(value) > 1 else 0.0 for value in values]
        color: Any = COLORS[number % len(COLORS)]
        axes.errorbar(counts, means, yerr=spread, marker="o", capsize=3, label=name, color=color)
    for number, (name, level) in enumerate(levels.items(), start=len(curves)):
        axes.axhline(100 * level, linestyle="--", color=COLORS[number % len(COLORS)], label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
    every = sorted({count for points in curves.values() for count in points})
    axes.set_xticks(every, [f"{count:g}" for count in every])
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy in shifted domains, %")
    axes.set_title(title)
    quiet_axes(axes)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)
