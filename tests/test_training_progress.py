"""The progress line as it comes out: on a terminal of a given width, and in a log file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tqdm.std
from conftest import Clock

from cn_hf.training import progress
from cn_hf.training.progress import ProgressBar

LONG = {"epoch": "100/100", "loss": "12.345", "validation": "100.0%"}


@pytest.fixture(autouse=True)
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the bar and of tqdm."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[list[str]]:
    """stderr as a terminal; afterwards the frames drawn on it are in the list."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    frames: list[str] = []
    with os.fdopen(theirs, "w", encoding="utf-8") as stderr:
        with contextlib.redirect_stderr(stderr):
            yield frames
        stderr.flush()
        os.set_blocking(ours, False)
        drawn = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(ours, 65536):
                drawn += chunk
    os.close(ours)
    frames += drawn.decode().split("\r")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """stderr as a file, with a line every 0.1 seconds."""
    monkeypatch.setattr(progress._LogLines, "seconds_between", 0.1)
    return Log(tmp_path / "log")


class Log:
    """Within its block stderr is a file; afterwards ``text`` is what it got, ``lines`` its lines but the empty ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""

    def __enter__(self) -> Log:
        self.file = self.path.open("w", encoding="utf-8")
        self.redirection = contextlib.redirect_stderr(self.file)
        self.redirection.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.redirection.__exit__(None, None, None)
        self.file.close()
        self.text = self.path.read_bytes().decode()  # carriage returns included

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line]


def test_log_file_gets_whole_lines(log: Log, clock: Clock) -> None:
    with log, ProgressBar(5_000_000, description="no contexts") as bar:
        bar.show(**LONG)
        for _ in range(30):
            clock.sleep(0.02)
            bar.advance(256)
    assert "\r" not in log.text
    lines = log.lines
    assert 4 <= len(lines) <= 9  # now and then, not one each step
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("no contexts   0%, ? left")
    for number in ("epoch 100/100", "loss 12.345", "validation 100.0%"):
        assert number in lines[-1]
    assert re.search(r"\d img/s, [\d,.]+ ms/step, [\d.]+ [MG]B$", lines[-1])


@pytest.mark.parametrize("columns", [200, 120, 60])
def test_terminal_gets_one_line_of_its_width(columns: int, clock: Clock) -> None:
    with terminal(columns) as frames, ProgressBar(1000, description="no contexts") as bar:
        bar.show(**LONG)
        for _ in range(4):
            clock.sleep(0.21)
            bar.advance(250)
    assert len(frames) >= 4
    assert frames[-1] == "\n"
    assert all("\n" not in frame and len(frame) <= columns for frame in frames[:-1])
    last = frames[-2]
    assert last.startswith("no contexts 100%|")
    assert "epoch 100/100" in last
    if columns >= 120:
        assert "validation 100.0%" in last
        assert last.rstrip().endswith("B")  # nothing is cut off
        assert "█████" in last


def test_speed_is_that_of_training_steps(log: Log, clock: Clock) -> None:
    with log, ProgressBar(100_000) as bar:
        for _ in range(4):
            for _ in range(4):
                clock.sleep(0.02)
                bar.advance(640, steps=2)
            clock.sleep(0.8)  # a validation
            bar.show(validation="50.0%")
    last = log.lines[-1]
    assert ", 32,000 img/s, 10 ms/step, " in last


def test_images_done_before_do_not_count_as_speed(log: Log, clock: Clock) -> None:
    with log, ProgressBar(1_000_000, initial=500_000) as bar:
        for _ in range(20):
            clock.sleep(0.01)
            bar.advance(1000)
    assert log.lines[0].startswith("  50%")
    assert log.lines[-1].startswith("  52%")
    assert " 00:04 left" in log.lines[-1]  # 480 more steps of 10 ms; from 0 it would be 0.2 s


def test_numbers_stay_until_replaced(log: Log) -> None:
    with log, ProgressBar(10) as bar:
        bar.show(epoch="1/2", loss="2.000")
        bar.show(loss="1.000")
        bar.advance(5)
    assert "epoch 1/2, loss 1.000," in log.text
    assert "2.000" not in log.text


def test_slow_steps_read_well(log: Log, clock: Clock) -> None:
    with log, ProgressBar(10, device="cpu") as bar:
        clock.sleep(0.3)
        bar.advance(1)
    assert ", 3.3 img/s, 300 ms/step, " in log.lines[-1]
    assert progress._step_time(75.4) == "75 s/step"
    assert progress._step_time(0.0042) == "4.2 ms/step"


def test_nothing_is_drawn_where_disabled(log: Log) -> None:
    with log, ProgressBar(10, enabled=False) as bar:
        bar.show(loss="1")
        bar.advance(10, steps=3)
    assert log.text == ""


def test_error_within_leaves_the_line_whole(log: Log) -> None:
    def stop() -> None:
        with log, ProgressBar(10) as bar:
            bar.advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert log.text.endswith("B\n\n")
