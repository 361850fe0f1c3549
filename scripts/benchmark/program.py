"""The benchmark as a program: sections one after the other, each written as soon as it is measured."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from cn_hf.devices import torch_threads
from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.evaluation.environment import run_environment
from cn_hf.files import write_whole
from cn_hf.norm.fused import operators
from cn_hf.training.memory import keep_freed_memory
from scripts.benchmark.picture import PICTURE_NAME, limited_rows, plot_report
from scripts.benchmark.report import (
    Record,
    Report,
    put_table,
    read_report,
    readme_table,
    section_table,
    write_report,
)
from scripts.benchmark.rows import Row, Trial
from scripts.benchmark.sections import SECTIONS, chosen_sections, left_out
from scripts.benchmark.settings import Settings

__all__ = ["run_benchmark", "update_table"]


def run_benchmark(
    settings: Settings, *, sections: list[str] | None = None, output_dir: Path, threads: int | None = None
) -> bool:
    """Measure, print the tables as they come, and write ``benchmark.json``, ``.md`` and ``.png``.

    What the folder's report holds of other sections and devices stays.

    Args:
        settings: Device, size and rounds.
        sections: Names; None: all that the size has.
        output_dir: The folder.
        threads: CPU threads of torch; None: as many as it chose.

    Returns:
        Whether every trial ran; one that failed is named on stderr and in its rows.

    Raises:
        ConfigError: An unknown section, or ``threads`` is below 1.
        CheckpointError: The folder cannot be written to, or holds a report that cannot be read.
    """
    names = chosen_sections(sections, settings)
    write_report(read_report(output_dir), output_dir)  # an error now rather than after the first section
    keep_freed_memory()  # as the training programs do
    with torch_threads(threads):
        print(_title(settings))
        fine = True
        for name in names:
            record, ran = _run_section(name, settings)
            fine = fine and ran
            report = read_report(output_dir)  # a run on another device may have written meanwhile
            report.setdefault(settings.device.type, {})[name] = record
            write_report(report, output_dir)
            _draw(report, output_dir / PICTURE_NAME)
            print(f"\n### {name}: {SECTIONS[name].title}\n\n{section_table(record.rows)}", flush=True)
            if record.left_out:
                print(f"\nleft out: {'; '.join(record.left_out)}")
        for name in SECTIONS:
            if name not in names and sections is None:
                print(f"\nleft out: section {name}")
    print(f"\n{_verdict(read_report(output_dir))}\nwritten to {output_dir}")
    return fine


def update_table(path: Path, output_dir: Path) -> str:
    """Put the table of the report in ``output_dir`` between its markers in a Markdown file.

    Returns:
        The table.

    Raises:
        CheckpointError: A file cannot be read or written.
        ConfigError: The file has no markers, or there is no report.
    """
    report = read_report(output_dir)
    if not report:
        raise ConfigError(f"{output_dir} holds no report to make a table of: measure first, or give its --output-dir")
    table = readme_table(report)
    try:
        text = path.read_text(encoding="utf-8")
        write_whole(path, put_table(text, table).encode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read or written: {error}") from error
    return table


def _run_section(name: str, settings: Settings) -> tuple[Record, bool]:
    started, fine, rows = time.perf_counter(), True, []
    for trial in SECTIONS[name].trials(settings):
        measured, ran = _run_trial(name, trial)
        fine = fine and ran
        rows += measured
        gc.collect()
        if settings.on_gpu:
            torch.cuda.empty_cache()
    record = Record(
        date=datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00"),
        seconds=round(time.perf_counter() - started, 1),
        size=settings.size,
        kernels=operators.describe(settings.device.type),
        threads=torch.get_num_threads(),
        environment=run_environment(),
        left_out=left_out(name, settings),
        rows=rows,
    )
    return record, fine


def _run_trial(section: str, trial: Trial) -> tuple[list[Row], bool]:
    """The trial's rows, and whether it ran; one that does not fit the device leaves the others to be measured."""
    try:
        return [*trial.measure()], True
    except RuntimeError as error:  # memory, a capture that is refused, a kernel that cannot be launched
        reason = f"failed: {str(error).strip().splitlines()[0]}"
        print(f"{section}, {trial.name}: {reason}", file=sys.stderr, flush=True)
        return [dataclasses.replace(row, note=reason) for row in trial.rows], False


def _draw(report: Report, path: Path) -> None:
    try:
        plot_report(report, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _title(settings: Settings) -> str:
    machine = run_environment()
    where = f"{machine['cpu']}, {torch.get_num_threads()} threads"
    if settings.on_gpu:
        where = f"{machine['device']} ({where})"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    now = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes")
    return (
        f"# Benchmark, {settings.size}\n\n{where}\npython {machine['python']}, {versions}\n"
        f"kernels: {operators.describe(settings.device.type)}; {settings.rounds} rounds; {now}"
    )


def _verdict(report: Report) -> str:
    rows = limited_rows(report)
    broken = [f"{name}, {row.what} ({row.dtype}, {device})" for device, name, row in rows if not row.holds]
    return "\n- ".join(
        [f"{len(rows) - len(broken)} of {len(rows)} limits hold{'; not these:' if broken else ''}", *broken]
    )
