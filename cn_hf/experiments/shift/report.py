"""The report of the cells that are finished: tables with paired errors, curves, a sheet, and sentences from results.

Shape legend: ``n`` test images; outcomes are packed, one bit each.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cn_hf.evaluation.contact_sheet import write_contact_sheet
from cn_hf.evaluation.domains import (
    DomainRow,
    Domains,
    difference,
    domain_table,
    plot_domains,
    plot_over_images,
    summary_table,
)
from cn_hf.evaluation.tables import write_results
from cn_hf.experiments.shift.cell import CONTEXTS, SOURCE_ROW
from cn_hf.experiments.shift.corruptions import CORRUPTIONS, EXTRAS, corrupt
from cn_hf.experiments.shift.data import ShiftData
from cn_hf.files import write_whole

__all__ = ["findings", "mean_rows", "packed", "unpacked", "write_report", "write_sheet"]


def packed(correct: Tensor) -> str:
    """Return outcomes, bool ``(n,)``, as base64 text of one bit each."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpacked(text: str, count: int) -> Tensor:
    """Return the outcomes that ``packed`` was given."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool))


def mean_rows(cells: Sequence[Mapping[str, Any]]) -> list[DomainRow]:
    """Return rows whose outcomes are each image's mean over cells, which differ in their seed alone.

    Args:
        cells: contents of ``results.json``, of the same rows.
    """
    rows = []
    for number, row in enumerate(cells[0]["rows"]):
        of_cells = [
            {name: unpacked(text, cell["test_images"]) for name, text in cell["rows"][number]["correct"].items()}
            for cell in cells
        ]
        correct = {name: torch.stack([one[name].double() for one in of_cells]).mean(0) for name in row["correct"]}
        rows.append(DomainRow(row["name"], correct, row["needs"]))
    return rows


def findings(rows: Sequence[DomainRow], domains: Domains) -> list[str]:
    """Return what the results say: the gain over the source, and where contexts do not help."""
    source = next(row for row in rows if row.name == SOURCE_ROW)
    contexts = next(row for row in rows if row.name == CONTEXTS)
    gain, error = difference(contexts, source, domains.shifted)
    sentences = [
        f"Known contexts change the accuracy in shifted domains by {100 * gain:+.1f} ± {100 * error:.1f} points "
        "(paired by image)."
    ]
    lost = []
    for name in domains.test:
        if name == "clean":
            continue
        mean, error = difference(contexts, source, [name])
        if mean <= 2 * error:
            lost.append(f"{name} ({100 * mean:+.1f} ± {100 * error:.1f})")
    if lost:
        sentences.append(f"They do not help, beyond two standard errors, in: {', '.join(lost)}.")
    else:
        sentences.append("They help in every domain, beyond two standard errors.")
    better = []
    for row in rows:
        mean, error = difference(row, contexts, domains.shifted)
        if row is not contexts and mean > 2 * error:
            better.append(row.name)
    if better:
        sentences.append(f"Better than known contexts, beyond two standard errors: {', '.join(better)}.")
    return sentences


def write_report(
    folder: Path, cells: Sequence[Mapping[str, Any]], *, budget: str, summary: str, is_evidence: bool
) -> str:
    """Write ``results.json``, ``table.md`` and plots of finished cells; return the tables as text.

    Args:
        folder: of the experiment.
        cells: contents of their ``results.json``.
        budget: its name.
        summary: of the budget, in words.
        is_evidence: False where results check the machinery alone.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(f"{cell['plan']['network']}.{cell['plan']['dataset']}", []).append(cell)
    note = summary if is_evidence else f"{summary} These figures check the machinery; they are no evidence."
    text, groups_content = [f"# New domains without labels ({budget})", note], {}
    for name, group in groups.items():
        rows = mean_rows(group)
        first = rows[0].correct
        outside = tuple(domain for domain in first if domain in EXTRAS)
        # Tables need the domains' names alone.
        domains = Domains(dict.fromkeys(first, torch.empty(0)), torch.empty(0), {}, outside)
        said = findings(rows, domains)
        clean = ", ".join(f"{100 * cell['clean']:.1f}" for cell in group)
        text += [
            f"## {name}: {len(group)} source seeds, clean accuracy {clean} %",
            summary_table(rows, domains),
            *said,
            domain_table(rows, domains) + "\n\n\\* outside of the means",
        ]
        plot_domains(
            [row for row in rows if row.name in (SOURCE_ROW, CONTEXTS, "BN of mixed batches")],
            domains,
            folder / f"{name}.domains.png",
            title=f"{name}: accuracy in each domain",
        )
        _plot_curves(folder, name, group, rows, domains)
        groups_content[name] = {
            "seeds": [cell["plan"]["seed"] for cell in group],
            "clean": [cell["clean"] for cell in group],
            "findings": said,
            "accuracy": {row.name: {domain: row.accuracy([domain]) for domain in first} for row in rows},
            "against_source": {row.name: difference(row, rows[0], domains.shifted) for row in rows},
        }
    content = "\n\n".join(text) + "\n"
    write_whole(folder / "table.md", content.encode())
    results = {"experiment": "shift", "budget": budget, "is_evidence": is_evidence, "networks": groups_content}
    write_results(folder / "results.json", {**results, "cells": list(cells)})
    return content


def _plot_curves(
    folder: Path, name: str, group: Sequence[Mapping[str, Any]], rows: Sequence[DomainRow], domains: Domains
) -> None:
    counts = {
        f"CN, prior {prior}": {int(count): [cell["curve"][prior][count] for cell in group] for count in points}
        for prior, points in group[0]["curve"].items()
    }
    source = next(row for row in rows if row.name == SOURCE_ROW)
    level = {SOURCE_ROW: source.accuracy(domains.shifted)}
    plot_over_images(counts, level, folder / f"{name}.images.png", title=f"{name}: {len(group)} source seeds")
    severities = {
        row: {int(severity): [cell["severities"][row][severity] for cell in group] for severity in points}
        for row, points in group[0]["severities"].items()
    }
    plot_over_images(
        severities,
        {},
        folder / f"{name}.severity.png",
        title=f"{name}: {len(group)} source seeds",
        xlabel="severity",
        logarithmic=False,
    )


def write_sheet(data: ShiftData, path: Path, *, count: int = 8) -> Path:
    """Draw test images in every domain at severity 5."""
    rows = torch.arange(count)
    sheet = {}
    for name in ("clean", *CORRUPTIONS, *EXTRAS):
        images = (
            data.in_domain(name, rows, 5, 1) if data.published else corrupt(name, data.test_images[rows], 5, seed=1)
        )
        sheet[name] = [PIL.Image.fromarray((image * 255).byte().movedim(0, -1).numpy()) for image in images]
    write_contact_sheet([sheet], path, title="Domains at severity 5", height=56)
    return path
