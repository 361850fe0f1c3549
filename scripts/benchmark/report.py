"""The measurements, as JSON to keep and merge, and as Markdown to read.

One report holds both kinds of device: of each it has the last run of each section. A section that was never run on a
device is shown as planned, "not measured".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.evaluation.tables import markdown_table
from cn_hf.files import read_description, write_whole
from scripts.benchmark.rows import Row
from scripts.benchmark.sections import DEVICES, SECTIONS, planned_rows

__all__ = [
    "JSON_NAME",
    "MARKDOWN_NAME",
    "Record",
    "Report",
    "put_table",
    "read_report",
    "readme_table",
    "report_markdown",
    "section_table",
    "write_report",
]

JSON_NAME, MARKDOWN_NAME = "benchmark.json", "benchmark.md"
FORMAT = 1
BEGIN, END = "<!-- benchmark: made by `python scripts/benchmark --table` -->", "<!-- benchmark: end -->"

MEANING = (
    "Values with × are ratios to the rival, each the median over the rounds of the ratio within a round, in which all "
    "contestants have their turn; in brackets the quartiles of the rounds. Of time and bytes less is better, of "
    "images/s and GB/s more. *ms* are medians of one call. A limit holds if the value keeps it to the digits shown."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a section on a device.

    Attributes:
        date: When it ended, UTC.
        seconds: How long it took.
        size: One of ``SIZES``.
        kernels: What computed CN.
        threads: CPU threads of torch.
        environment: From ``run_environment``.
        left_out: What a full run would have measured besides.
        rows: What was measured.
    """

    date: str
    seconds: float
    size: str
    kernels: str
    threads: int
    environment: Mapping[str, Any]
    left_out: Sequence[str]
    rows: Sequence[Row]

    def hardware(self, device: str) -> str:
        """Return the hardware and versions in words."""
        if device == "cpu":
            return f"{self.environment['cpu']}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return str(self.environment["device"])

    @property
    def software(self) -> str:
        """Versions and kernels, in words."""
        versions = self.environment["versions"]
        named = [f"{name} {versions[name]}" for name in ("torch", "cuda", "cudnn", "timm") if name in versions]
        return ", ".join([*named, f"{self.kernels} kernels", f"cn_hf {versions['cn_hf']}"])


Report = dict[str, dict[str, Record]]
"""Device type -> section -> its last run there."""


def read_report(folder: Path) -> Report:
    """The report in a folder; empty where there is none.

    Raises:
        CheckpointError: The file is truncated, of another kind or of a newer version.
    """
    path = folder / JSON_NAME
    if not path.exists():
        return {}
    try:
        stored = read_description(path, newest=FORMAT, what="benchmark report")
        return {
            device: {name: _record(record) for name, record in sections.items() if name in SECTIONS}
            for device, sections in stored["devices"].items()
            if device in DEVICES
        }
    except CheckpointError as error:
        raise CheckpointError(f"{error} Remove the file to begin anew, or choose another folder.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not what this version writes ({type(error).__name__}: {error}). Remove the file to begin "
            "anew, or choose another folder."
        ) from error


def _record(stored: Mapping[str, Any]) -> Record:
    return Record(**{**stored, "rows": [Row(**row) for row in stored["rows"]]})


def write_report(report: Report, folder: Path) -> None:
    """Write JSON and Markdown, each whole or not at all.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    devices = {
        device: {name: dataclasses.asdict(record) for name, record in sections.items()}
        for device, sections in report.items()
    }
    content = json.dumps({"format": FORMAT, "devices": devices}, indent=1, ensure_ascii=False) + "\n"
    try:
        write_whole(folder / JSON_NAME, content.encode())
        write_whole(folder / MARKDOWN_NAME, report_markdown(report).encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to: {error}") from error


# ------------------------------------------------------------------------------------------------------------- Markdown


def report_markdown(report: Report) -> str:
    """All of a report, device by device."""
    parts = ["# Benchmark", "Made by `python scripts/benchmark`. " + MEANING, "![Ratios to the limits](benchmark.png)"]
    for device, title in DEVICES.items():
        parts.append(f"## {title}" if report.get(device) else f"## {title}: not measured")
        for name, section in SECTIONS.items():
            record = report.get(device, {}).get(name)
            planned = [row for row in planned_rows(name, device) if row.limit is not None]
            if record is None and not planned:
                continue
            parts.append(f"### {name}: {section.title}")
            if record is None:
                parts += ["Not measured.", section_table(planned)]
            else:
                parts += [_circumstances(record, device), section_table(record.rows)]
                if record.left_out:
                    parts.append(f"Left out of a {record.size} run: {'; '.join(record.left_out)}.")
    return "\n\n".join(parts) + "\n"


def section_table(rows: Iterable[Row]) -> str:
    """The rows of a section."""
    header = ["", "against", "shape", "dtype", "ms", "rival's ms", "value", "rounds", "limit", "holds", ""]
    cells = [
        [
            row.what,
            row.rival,
            row.shape,
            row.dtype,
            _milliseconds(row.milliseconds),
            _milliseconds(row.rival_milliseconds),
            row.value_in_words + _quartiles(row),
            str(row.rounds or ""),
            row.limit_in_words,
            {True: "yes", False: "**no**", None: ""}[row.holds],
            row.note,
        ]
        for row in rows
    ]
    return markdown_table(header, cells, align="llllrrrrrll")


def _circumstances(record: Record, device: str) -> str:
    return (
        f"{record.date}, {record.hardware(device)}; {record.software}; {record.size} run of "
        f"{record.seconds:,.0f} s: `{record.environment['command']}`"
    )


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.{3 if value < 10 else 1}f}"


def _quartiles(row: Row) -> str:
    return "" if row.low is None or row.high is None else f" ({row.low:,.2f} to {row.high:,.2f})"


# --------------------------------------------------------------------------------------------------------- the README's


def readme_table(report: Report) -> str:
    """The rows that say most, a column for each device, and what they were measured on."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for device in DEVICES:
        for name in SECTIONS:
            record = report.get(device, {}).get(name)
            measured = {row.key: row for row in ([] if record is None else record.rows) if row.headline}
            for row in planned_rows(name, device):
                if row.headline:
                    found.setdefault(row.key, {})[device] = measured.get(row.key, row)
    rows = [
        [what, rival or "–", *(_cell(of_device.get(device)) for device in DEVICES)]
        for (what, rival), of_device in found.items()
    ]
    table = markdown_table(["", "against", "CPU, float32", "GPU, bfloat16"], rows, align="llrr")
    return f"{table}\n\n{' '.join(_origin(report, device) for device in DEVICES)}"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    limit = row.limit_in_words
    missed = ", missed" if row.holds is False else ""
    return f"{row.value_in_words} ({limit}{missed})" if limit else row.value_in_words


def _origin(report: Report, device: str) -> str:
    runs = {
        f"{record.hardware(device)}, {record.software}{'' if record.size == 'full' else f', {record.size} run'}"
        for record in report.get(device, {}).values()
    }
    return f"{DEVICES[device]}: {'; '.join(sorted(runs)) or 'not measured'}."


def put_table(text: str, table: str) -> str:
    """The text with the table between its two markers.

    Raises:
        ConfigError: The markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"the place of the table must be marked once, by lines {BEGIN!r} and then {END!r}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
