"""Run other libraries' own tests on patched models, and write which tests pass unpatched and fail patched.

    python scripts/coverage/suites.py timm timm-1.0.31               # timm's tests/test_models.py
    python scripts/coverage/suites.py transformers transformers-5.24.0 --filter ResNet
    python scripts/coverage/suites.py peft peft-0.21.2

The second argument is a checkout: a source distribution (``pip download --no-binary :all: --no-deps timm==…``), or a
repository at the tag of the installed version. None of its files are part of this repository. transformers' tests need
``pip install parameterized``. Each test runs unpatched first; those that pass run again with every created model
patched. Rows are appended as tests end, so that an interrupted run goes on. timm's tests are run on the models of
``coverage.json``, the quickest first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this folder's modules are scripts.coverage.*

from scripts.coverage.suite_plugin import RUNNING, Order  # noqa: E402  # once they are

__all__ = ["SUITES", "Results", "run_suite", "write_results"]

RESULTS = ROOT / "model_cards" / "results"
SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "timm": ("tests/test_models.py", ("-m", "base or forward or backward or cfg or features")),
    "transformers": (str(ROOT / "scripts/coverage/transformers_suite.py"), ()),
    "peft": (str(ROOT / "scripts/coverage/peft_suite.py"), ()),
}
"""Library -> file of tests, in the checkout or here, and pytest's options."""

CHUNK = 12
"""Models a process: their memory is given back between."""
CRASHED, PASSED, FAILED = "crashed", "passed", "failed"

IMPOSSIBLE: dict[str, str] = {
    "test_base_model_prefix_loads_base_weights": "it builds the plain base class from the config of a patched model, "
    "and so saves files that promise contexts which they lack",
    "test_model_weights_reload_no_missing_tied_weights": "it puts other weights in the place of a checkpoint's, which "
    "the checksums of patched checkpoints refuse",
}
"""Functions of tests that ask for what no patched model can give -> why."""
OPEN: dict[str, str] = {
    "test_correct_missing_keys": "the base model inside a patched one, saved alone, has the config of a plain model: "
    "save the whole, which loads as the base model too",
}
"""Functions of tests that fail only patched, though they need not -> why."""


class Results:
    """The rows of one library's tests, in a file of JSON lines; a later row replaces an earlier one.

    Args:
        path: of the file; made with its folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def outcomes(self, *, patched: bool) -> dict[str, dict[str, Any]]:
        """Return test -> row. A test that a killed process was running is crashed."""
        rows: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # killed within a line
                continue
            if row["patched"] == patched:
                rows[row["test"]] = row
        return {test: row | {"outcome": CRASHED} if row["outcome"] == RUNNING else row for test, row in rows.items()}

    def lost(self) -> list[str]:
        """Tests that pass unpatched and do not patched, by name."""
        patched = self.outcomes(patched=True)
        return sorted(test for test, row in patched.items() if row["outcome"] in (FAILED, CRASHED))


def run_suite(
    library: str,
    checkout: Path,
    results: Results,
    *,
    words: str = "",
    deadline: float = float("inf"),
    again: bool = False,
    chunks: Sequence[list[str] | None] | None = None,
) -> None:
    """Run what ``results`` lacks.

    Args:
        library: a key of ``SUITES``.
        checkout: folder with its ``tests``.
        results: where outcomes go.
        words: run tests whose names hold this alone, as pytest's ``-k``.
        deadline: ``time.time()`` after which no further test starts.
        again: True to run tests again that failed.
        chunks: models whose tests share a process, with ``""`` for tests of none in particular; by default those of
            the coverage table for timm, and all tests at once for others.
    """
    if chunks is None:
        chunks = _chunks() if library == "timm" else [None]
    for models in chunks:
        for patch in (False, True):
            run = {"models": models, "patch": patch, "words": words, "deadline": deadline, "again": again}
            _run_chunk(library, checkout, results, **run)


def _run_chunk(
    library: str,
    checkout: Path,
    results: Results,
    *,
    models: list[str] | None,
    patch: bool,
    words: str,
    deadline: float,
    again: bool,
) -> None:
    file, options = SUITES[library]
    while time.time() < deadline:
        done = results.outcomes(patched=patch)
        if again:
            done = {test: row for test, row in done.items() if row["outcome"] != FAILED}
        passed = [test for test, row in results.outcomes(patched=False).items() if row["outcome"] == PASSED]
        if patch and not set(passed) - done.keys():
            return
        order = Order(
            checkout=str(checkout.resolve()),
            rows=str(results.path.resolve()),
            patch=patch,
            models=models,
            tests=passed if patch else None,
            done=list(done),
            deadline=deadline,
        )
        command = [sys.executable, "-m", "pytest", file, *options, "-q", "-c", "/dev/null", "--rootdir", str(checkout)]
        command += ["-p", "scripts.coverage.suite_plugin", "-p", "no:cacheprovider", "--timeout=360", "--tb=short"]
        environment = order.environment()
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": ":".join(paths), "HF_HUB_OFFLINE": "1"}
        filtered = ["-k", words] if words else []
        code = subprocess.run(
            [*command, *filtered], cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False
        ).returncode
        if code in (2, 3, 4):
            raise SystemExit(f"pytest could not run the tests of {checkout} (exit code {code}): {' '.join(command)}")
        if code >= 0 or results.outcomes(patched=patch).keys() == done.keys():
            return
        again = False  # a signal ended the process at one test: go on after it


def _chunks() -> list[list[str]]:
    rows = [row for row in json.loads((RESULTS / "coverage.json").read_text())["real"] if row["library"] == "timm"]
    names = [row["name"] for row in sorted(rows, key=lambda row: float(row["seconds"]))]
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    chunks[0].append("")  # tests of no model in particular
    return chunks


# ------------------------------------------------------------------------------------------------------------ the table


def write_results(results: Mapping[str, Results], folder: Path) -> Path:
    """Write ``suites.md`` and ``suites.json``; libraries not given keep what they had.

    Returns:
        The path of the Markdown file.
    """
    from cn_hf.evaluation.environment import run_environment
    from cn_hf.files import write_whole

    path = folder / "suites.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for library, found in results.items():
        plain, patched = found.outcomes(patched=False), found.outcomes(patched=True)
        table[library] = {
            "version": metadata.version(library),
            "environment": run_environment(),
            "unpatched": Counter(row["outcome"] for row in plain.values()),
            "patched": Counter(row["outcome"] for row in patched.values()),
            "not_run_patched": sum(row["outcome"] == PASSED for row in plain.values()) - len(patched),
            "seconds": round(sum(row["seconds"] for rows in (plain, patched) for row in rows.values())),
            "tests": {
                function: _counts(function, plain, patched) for function in sorted({_function(t) for t in plain})
            },
            "lost": {test: patched[test]["message"] for test in found.lost()},
        }
    write_whole(path, (json.dumps(table, indent=1) + "\n").encode())
    return write_whole(folder / "suites.md", _markdown(table).encode())


def _function(test: str) -> str:
    return test.rpartition("::")[2].partition("[")[0]


def _counts(function: str, plain: Mapping[str, Any], patched: Mapping[str, Any]) -> dict[str, int]:
    before, after = ([row for test, row in rows.items() if _function(test) == function] for rows in (plain, patched))
    passed = [row for row in after if row["outcome"] == PASSED]
    return {
        "run": len(before),
        "passed": sum(row["outcome"] == PASSED for row in before),
        "patched": len(passed),
        "plain": sum(not row["models"] for row in passed),
    }


def _markdown(table: Mapping[str, Any]) -> str:
    from cn_hf.evaluation.tables import markdown_table

    lines = [
        "# Other libraries' own tests, on patched models",
        "",
        "Each test that passes was run again with every model that it creates patched, in the mode that fits the "
        "model: in context 0 while it trains, without ids in evaluation. *passed* are those that pass unpatched, "
        "*patched* those of them that pass patched, too; *plain*, of these, make their models past `create_model`, so "
        "that none was patched. Made by `scripts/coverage/suites.py`.",
    ]
    for library, found in table.items():
        environment = found["environment"]
        lines += [
            "",
            f"## {library} {found['version']}",
            "",
            f"{sum(found['unpatched'].values()):,} tests ran unpatched ({_listed(found['unpatched'])}); of those that "
            f"passed, {sum(found['patched'].values()):,} ran patched ({_listed(found['patched'])}) and "
            f"{found['not_run_patched']:,} have not been run patched yet. {found['seconds'] / 60:.0f} minutes on "
            f"{environment['device']}, {environment['cpu']}, torch {environment['versions']['torch']}.",
            "",
            markdown_table(
                ["test", "run", "passed", "patched", "plain"],
                [
                    [f"`{name}`", *map(str, counts.values())]
                    for name, counts in found["tests"].items()
                    if counts["passed"]
                ],
            ),
        ]
        for title, wanted in (("Impossible in principle", True), ("Fails only patched", False)):
            tests = {test: words for test, words in found["lost"].items() if (_function(test) in IMPOSSIBLE) is wanted}
            reasons = {test: (IMPOSSIBLE | OPEN).get(_function(test), words) for test, words in tests.items()}
            if tests:
                lines += ["", f"### {title}", "", *(f"- `{test}`: {words}" for test, words in reasons.items())]
    return "\n".join(lines) + "\n"


def _listed(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())


def main(
    library: Annotated[str, typer.Argument(help="timm, transformers or peft.")],
    checkout: Annotated[Path, typer.Argument(help="Folder of the library's source, with its tests.")],
    words: Annotated[str, typer.Option("--filter", help="Run tests of these names alone, as pytest's -k.")] = "",
    rows: Annotated[Path, typer.Option(help="Folder of JSON lines, a file a library.")] = Path("runs/suites"),
    again: Annotated[bool, typer.Option("--again", help="Run tests again that failed.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 120,
    output: Annotated[Path, typer.Option(help="Folder of suites.md and suites.json.")] = RESULTS,
) -> None:
    """Run one library's tests unpatched and patched; exits with 1 if patching makes a test fail."""
    if library not in SUITES:
        raise typer.BadParameter(f"Expected one of {', '.join(SUITES)}, received {library!r}.")
    if not (checkout / "tests").is_dir():
        raise typer.BadParameter(f"Expected a folder with tests, received {checkout}.")
    results = Results(rows / f"{library}.jsonl")
    run_suite(library, checkout, results, words=words, deadline=time.time() + 60 * minutes, again=again)
    lost = [test for test in results.lost() if _function(test) not in IMPOSSIBLE]
    for test in lost:
        typer.echo(f"{test}: {results.outcomes(patched=True)[test]['message']}")
    typer.echo(f"{len(lost)} tests fail only patched. Written: {write_results({library: results}, output)}")
    if lost:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
