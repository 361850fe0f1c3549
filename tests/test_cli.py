"""The ``cn-hf`` command in fresh processes: what it prints, where, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from cn_hf.cli import run_app
from cn_hf.errors import ConfigError

FAILING = """
import sys
import typer
from cn_hf.cli import run_app
from cn_hf.errors import ConfigError

app = typer.Typer()

@app.command()
def fail():
    raise ConfigError("the option is wrong")

run_app(app)
"""


def run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, timeout=120, check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )  # fmt: skip


def test_version_and_help() -> None:
    version = run("-m", "cn_hf.cli", "--version")
    assert version.returncode == 0
    assert version.stdout.startswith("cn_hf 0.")
    shown = run("-m", "cn_hf.cli", "--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout


def test_help_does_not_wait_for_heavy_libraries() -> None:
    code = "import sys, cn_hf.cli; print([name for name in ('torch', 'timm', 'datasets') if name in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(("arguments", "hint"), [(("dmeo",), "demo"), (("demo", "--sed", "1"), "--seed")])
def test_unknown_words_name_the_nearest(arguments: tuple[str, ...], hint: str) -> None:
    finished = run("-m", "cn_hf.cli", *arguments)
    assert finished.returncode != 0
    assert hint in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_error_is_one_message_and_exit_code_1() -> None:
    finished = run("-c", FAILING)
    assert finished.returncode == 1
    assert finished.stderr == "error: the option is wrong\n"
    assert finished.stdout == ""


def test_an_error_that_another_process_prints_is_not_printed_twice() -> None:
    raising = 'raise ConfigError("the option is wrong")'
    marked = "error = ConfigError('x'); error.said_elsewhere = True; raise error"
    assert raising in FAILING
    finished = run("-c", FAILING.replace(raising, marked), RANK="1")
    assert finished.returncode == 1
    assert finished.stderr == ""


def test_another_process_speaks_late_and_says_which_it_is() -> None:
    started = time.monotonic()
    finished = run("-c", FAILING, RANK="1")
    assert time.monotonic() - started > 2
    assert finished.returncode == 1
    assert finished.stderr == "error [process 1]: the option is wrong\n"


def test_other_errors_keep_their_traceback() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_with_arguments(app)


def run_with_arguments(app: typer.Typer) -> None:
    before, sys.argv = sys.argv, ["program"]
    try:
        run_app(app)
    finally:
        sys.argv = before


def test_errors_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise ConfigError("no")

    with pytest.raises(SystemExit) as stopped:
        run_with_arguments(app)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: no\n"
