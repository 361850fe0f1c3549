"""Results as text: aligned Markdown tables, which are also what a terminal shows, and ``results.json``.

Rates are in percent in tables and in [0, 1] in JSON.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cn_hf.errors import ConfigError, InputTypeError
from cn_hf.evaluation.environment import run_environment
from cn_hf.evaluation.report import ProtocolReport, ProtocolRow, standard_error
from cn_hf.files import write_json
from cn_hf.printing import for_markdown, for_terminal

__all__ = [
    "SMALL_SAMPLE",
    "ResultRow",
    "comparison_table",
    "context_table",
    "format_accuracy",
    "format_runs",
    "markdown_table",
    "protocol_table",
    "protocol_tables",
    "write_results",
]

SMALL_SAMPLE = 10_000
"""Below so many test samples an accuracy is shown with its binomial standard error."""
_WIDEST = 10  # contexts that stand side by side


def _cell(text: str) -> str:
    """On one line, its bars escaped unless they are already."""
    return re.sub(r"(?<!\\)\|", r"\|", for_terminal(" ".join(text.split())))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str | None = None) -> str:
    """A Markdown table whose columns line up in a fixed-width font.

    Args:
        header: column titles.
        rows: cells; ``|`` and line breaks in them are escaped.
        align: one letter per column, ``l``, ``r`` or ``c``; default: the first left, the others right.

    Returns:
        The table, without a line break at its end.

    Raises:
        ConfigError: a row or ``align`` has another number of columns than the header.
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    for row in (align, *rows):
        if len(row) != len(header):
            raise ConfigError(f"a table of {len(header)} columns got {len(row)} in {row!r}")
    if unknown := set(align) - set("lrc"):
        raise ConfigError(f"column alignment {sorted(unknown)} is unknown; use 'l', 'r' or 'c'")
    cells = [[_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    pad = {"l": str.ljust, "r": str.rjust, "c": str.center}
    rule = [
        (":" if side == "c" else "-") + "-" * (width - 2) + ("-" if side == "l" else ":")
        for side, width in zip(align, widths, strict=True)
    ]
    lines = [[pad[side](cell, width) for side, cell, width in zip(align, row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def format_accuracy(correct: int, num_samples: int) -> str:
    """An accuracy in percent, with its binomial standard error below ``SMALL_SAMPLE`` samples: ``"87.50 ± 5.85"``."""
    if num_samples < 1 or not 0 <= correct <= num_samples:
        raise ConfigError(f"{correct} correct of {num_samples} samples is no accuracy")
    text = f"{100 * correct / num_samples:.2f}"
    return text if num_samples >= SMALL_SAMPLE else f"{text} ± {100 * standard_error(correct, num_samples):.2f}"


def format_runs(values: Sequence[float], *, digits: int = 2) -> str:
    """Mean ± sample standard deviation over runs, and their number: ``"87.32 ± 0.21 (n = 3)"``; ``"–"`` for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (n = 1)"
    return f"{mean} ± {statistics.stdev(values):.{digits}f} (n = {len(values)})"


def protocol_table(report: ProtocolReport, *, title: str | None = None) -> str:
    """A report as Markdown: the table, what each row means, and the findings.

    Args:
        report: from :func:`cn_hf.evaluation.evaluate_protocols`.
        title: a heading above.
    """
    header = ["protocol", *(f"top-{k}, %" for k in report.top_k), "n"]
    rows = [[row.name, *_accuracy_cells(row, report.top_k), str(row.num_samples)] for row in report]
    parts = [f"### {title}"] if title else []
    parts.append(markdown_table(header, rows))
    if any(row.num_samples < SMALL_SAMPLE for row in report):
        parts.append("± is the binomial standard error over the test samples.")
    parts.append("\n".join(f"- {row.name}: {_explanation(row)}" for row in report))
    parts.append("\n".join(report.findings))
    return "\n\n".join(part for part in parts if part)


def protocol_tables(report: ProtocolReport, *, title: str | None = None) -> str:
    """Return ``protocol_table`` and, where the test set has contexts, ``context_table`` for the smallest k."""
    tables = [protocol_table(report, title=title)]
    if any(row.context_samples for row in report):
        tables.append(context_table(report, k=min(report.top_k)))
    return "\n\n".join(tables)


def context_table(report: ProtocolReport, *, k: int = 1) -> str:
    """Top-k accuracy of every row within each context, as Markdown, with the contexts' sample counts.

    Contexts are columns; more than ten are rows, and the protocols columns.

    Raises:
        ConfigError: the test set had no contexts, or k was not evaluated.
    """
    counts = next((row.context_samples for row in report if row.context_samples), None)
    if counts is None:
        raise ConfigError("the test set of this report has no context ids, so there is nothing per context")
    if k not in report.top_k:
        raise ConfigError(f"top-{k} was not evaluated; choose among {', '.join(map(str, report.top_k))}")
    rows = []
    for row in report:
        right = row.context_correct.get(k, {})
        cells = [format_accuracy(right[name], n) if n and name in right else "–" for name, n in counts.items()]
        rows.append([row.name, *cells])
    table = [[f"top-{k}, %", *(f"{for_markdown(name)} (n = {n})" for name, n in counts.items())], *rows]
    if len(counts) > _WIDEST:
        table = [list(column) for column in zip(*table, strict=True)]
    return markdown_table(table[0], table[1:])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One row of a table of results: what the paper printed beside what our runs gave.

    Attributes:
        name: the method.
        paper: value per measure; a measure the paper lacks is left out.
        ours: the values of all our runs (seeds) per measure; a measure never run is left out.
        differences: how our protocol differs from the paper's, in words.
    """

    name: str
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ours: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    differences: str = "none"


def comparison_table(rows: Sequence[ResultRow], *, title: str | None = None, digits: int = 2) -> str:
    """A table *paper | ours (mean ± std, n) | differences*, two columns per measure, as Markdown.

    Args:
        rows: the methods, in the order of the paper's table. Measures keep the order of their first appearance.
        title: a heading above; say there what the numbers are evidence for.
        digits: after the decimal point.

    Raises:
        ConfigError: no row, or no measure in any.
    """
    measures = list(dict.fromkeys(measure for row in rows for measure in (*row.paper, *row.ours)))
    if not measures:
        raise ConfigError("a comparison table needs at least one row with a measured or printed value")
    header = ["method"]
    for measure in measures:
        header += [f"{measure}: paper", f"{measure}: ours (mean ± std, n)"]
    cells = []
    for row in rows:
        line = [row.name]
        for measure in measures:
            printed = f"{row.paper[measure]:.{digits}f}" if measure in row.paper else "–"
            line += [printed, format_runs(row.ours.get(measure, ()), digits=digits)]
        cells.append([*line, row.differences])
    table = markdown_table([*header, "differences"], cells, align="l" + "rr" * len(measures) + "l")
    return f"### {title}\n\n{table}" if title else table


def write_results(
    path: str | Path, results: Mapping[str, Any], *, environment: Mapping[str, Any] | None = None
) -> Path:
    """Write ``results.json``: the results, and under ``"environment"`` what produced them.

    The file appears whole or not at all: it is written under a temporary name, then renamed. Numbers that JSON cannot
    hold (NaN and infinities) become null; tensors and arrays become lists, paths text, dataclasses mappings.

    Args:
        path: the file; its folder is made if missing.
        results: mapping with text keys.
        environment: hardware, versions and command; those of this process if None.

    Returns:
        The path.

    Raises:
        InputTypeError: a value has no JSON form; nothing is written.
        OSError: the folder cannot be written to; a file that was there before is untouched.
    """
    content = {**results, "environment": run_environment() if environment is None else environment}
    return write_json(path, _jsonable(content, "results"))


def _accuracy_cells(row: ProtocolRow, top_k: Sequence[int]) -> list[str]:
    if not row.available:
        return ["–"] * len(top_k)
    return [format_accuracy(row.correct[k], row.num_samples) for k in top_k]


def _explanation(row: ProtocolRow) -> str:
    return row.explanation if row.available else f"not available: {row.unavailable}"


def _jsonable(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {_key(key, where): _jsonable(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_jsonable(entry, f"{where}[{index}]") for index, entry in enumerate(entries)]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _jsonable(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "to_dict"):
        return _jsonable(value.to_dict(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value), where)
    raise InputTypeError(
        f"{where} is a {type(value).__name__}, which has no JSON form; pass numbers, text, lists or mappings"
    )


def _key(key: Any, where: str) -> str:
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return str(key)
    raise InputTypeError(f"{where} has a key of type {type(key).__name__}; keys of results must be text")
