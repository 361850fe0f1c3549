"""The coverage table, from the rows of a sweep: Markdown to read, JSON to check."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cn_hf.evaluation.environment import run_environment
from cn_hf.evaluation.tables import markdown_table
from cn_hf.files import write_whole
from scripts.coverage.sweep import BATCH_SIZE, Rows, chosen_timm_models
from scripts.coverage.transformers_models import TRANSFORMERS

__all__ = ["headline", "write_coverage"]

Row = Mapping[str, Any]

MEANING = """\
*Structure*: each model name of timm was built on the meta device and patched in each mode; it passes if every norm
layer became a slot, or is of a class that is refused for the reason given below. *Real tensors*: each model below, with
weights as after training, {batch} images and 3 contexts, was patched in each mode that applies, at `where="norms"` and
at `where="input"`, and passes if

- the evaluation output is the original's, with ids and without, within 1e-5 of its scale in float32 (*changed*: the
  largest difference in any mode); deep random networks that amplify the last bit of their input to more than half of
  that are checked in float64;
- another sample's id and pixels leave a sample's output as it was, within 1e-6 of its scale (*isolation*: the largest
  difference), while its own id changes it;
- after the contexts' parameters have been moved, gradients reach each parameter of each slot, for each context;
- the plain checkpoint still loads and brings the output back; the plain state_dict's keys are all there;
- unpatching gives back the same classes, keys and, bit for bit, the same output.

`cn` is run where a model has norms of both kinds; with one kind it means the same slots. *rows* is the most rows that
an activation has for one sample where a slot meets it: windows, inner patches, tiles, whose ids are repeated."""


def headline(rows: Iterable[Row]) -> str:
    """The counts in one sentence."""
    rows = list(rows)
    structures = [row for row in rows if row["kind"] == "structure"]
    timm = [row for row in rows if row["kind"] == "real" and row["library"] == "timm"]
    transformers = [row for row in rows if row["kind"] == "real" and row["library"] == "transformers"]
    failed = sum(bool(row["failures"]) for row in rows)
    return (
        f"All {len(structures)} model names of timm {_version(rows, 'timm')} are patched, {_total(structures):,} norm "
        f"layers in {len({row['module'] for row in structures})} modules; {len(timm)} of them, from every module, and "
        f"{len(transformers)} architectures of transformers {_version(rows, 'transformers')} are checked on real "
        f"tensors: {'none fails' if not failed else f'{failed} fail'}."
    )


def _version(rows: Sequence[Row], library: str) -> str:
    return str(rows[0]["versions"][library])


def _total(structures: Iterable[Row]) -> int:
    return sum(row["slots"]["cn"] for row in structures)


def write_coverage(rows: Rows, folder: Path) -> Path:
    """Write ``coverage.md`` and ``coverage.json``.

    Args:
        rows: of a sweep; it may be unfinished, and the table says so.
        folder: made if it is not there.

    Returns:
        The path of the Markdown file.
    """
    all_rows = list(rows.rows.values())
    write_whole(folder / "coverage.json", (json.dumps(_summary(all_rows), indent=1) + "\n").encode())
    return write_whole(folder / "coverage.md", _markdown(all_rows).encode())


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    structures = {row["name"]: row for row in rows if row["kind"] == "structure"}
    return {
        "versions": rows[0]["versions"],
        "headline": headline(rows),
        "environment": run_environment(),
        "modules": sorted({row["module"] for row in structures.values()}),
        "structure": {name: row["slots"]["cn"] for name, row in sorted(structures.items())},
        "real": [
            {name: value for name, value in row.items() if name not in ("versions", "kind", "key", "norms")}
            for row in sorted(rows, key=lambda row: str(row["key"]))
            if row["kind"] == "real"
        ],
    }


def _markdown(rows: Sequence[Row]) -> str:
    structures = _by_module(row for row in rows if row["kind"] == "structure")
    real = sorted((row for row in rows if row["kind"] == "real"), key=lambda row: (row["module"], row["name"]))
    timm = _by_module(row for row in real if row["library"] == "timm")
    environment = run_environment()
    parts = [
        "# Coverage",
        headline(rows),
        f"Made by `python scripts/coverage` with torch {environment['versions']['torch']} on "
        f"{environment['cpu'] or environment['platform']}.",
        MEANING.format(batch=BATCH_SIZE),
    ]
    if missing := _not_run(rows):
        parts.append(f"**Unfinished**: not run yet: {', '.join(missing)}.")
    if failures := [f"- {row['name']}: {words}" for row in rows for words in row["failures"]]:
        parts += ["## Failures", "\n".join(failures)]
    parts += [
        "## Modules of timm",
        markdown_table(
            ["module", "names", "norm layers", "on real tensors", "result"],
            [_module_line(module, structures[module], timm.get(module, [])) for module in sorted(structures)],
        ),
        "## Models of timm on real tensors",
        markdown_table(
            ["model", "module", "image size", *COLUMNS],
            [_real_line(row, row["module"]) for row in real if row["library"] == "timm"],
            align="ll" + "r" * (1 + len(COLUMNS)),
        ),
        "## Models of transformers on real tensors",
        "Small models made from configurations.",
        markdown_table(
            ["model", "class", "input size", *COLUMNS],
            [_real_line(row, str(row.get("architecture", "-"))) for row in real if row["library"] == "transformers"],
            align="ll" + "r" * (1 + len(COLUMNS)),
        ),
        "## Left as they are",
        "Norm-like layers that `patch_model` does not swap and names in a warning.",
        markdown_table(["class", "reason", "layers in timm", "names"], _refused(rows), align="llrr"),
        "## Slots without effect",
        "Layers that a model holds but whose result its output does not depend on; they are patched all the same.",
        markdown_table(["model", "slots"], _unused(real), align="ll"),
    ]
    return "\n\n".join(parts) + "\n"


COLUMNS = ["modes", "slots", "rows", "precision", "changed", "isolation", "result"]


def _by_module(rows: Iterable[Row]) -> dict[str, list[Row]]:
    modules: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        modules[row["module"]].append(row)
    return modules


def _not_run(rows: Sequence[Row]) -> list[str]:
    structures = [row for row in rows if row["kind"] == "structure"]
    done = {row["name"] for row in rows if row["kind"] == "real"}
    return [name for name in (*chosen_timm_models(structures), *TRANSFORMERS) if name not in done]


def _module_line(module: str, structures: Sequence[Row], real: Sequence[Row]) -> list[str]:
    failed = any(row["failures"] for row in (*structures, *real))
    return [module, str(len(structures)), str(_total(structures)), str(len(real)), "fail" if failed else "pass"]


def _real_line(row: Row, second: str) -> list[str]:
    checks = row["checks"]
    changed = "".join(f", {key}={value}" for key, value in row.get("changed", {}).items())
    first = [f"{row['name']}{changed}", second, str(row.get("size", "-"))]
    result = "fail" if row["failures"] else "pass"
    if not checks:
        return [*first, *["-"] * (len(COLUMNS) - 1), result]
    modes = [f"{check['mode']}" if check["where"] == "norms" else check["where"] for check in checks]
    slots = [str(check["slots"]) for check in checks]
    worst = [max(check[name] for check in checks) for name in ("rows", "unchanged", "isolation")]
    numbers = [str(worst[0]), checks[0]["precision"], *(f"{value:.0e}" if value else "0" for value in worst[1:])]
    return [*first, ", ".join(modes), ", ".join(slots), *numbers, result]


def _refused(rows: Iterable[Row]) -> list[list[str]]:
    layers: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        for words, count in row["refused"].items() if row["kind"] == "structure" else ():
            layers[words] += count
            models[words] += 1
    return [[*_class_and_reason(words), str(layers[words]), str(models[words])] for words in sorted(layers)]


def _class_and_reason(words: str) -> tuple[str, str]:
    name, _, reason = words.partition(": ")
    return name, reason


def _unused(rows: Iterable[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        names = dict.fromkeys(name for check in row.get("checks", ()) for name in check["unused"])
        if names:
            lines.append([str(row["name"]), ", ".join(names)])
    return sorted(lines)
