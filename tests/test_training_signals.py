"""Signals become a flag; impatience still ends the process; handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cn_hf.training import signals
from cn_hf.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_noted_also_twice(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whatever the shell of these tests lets its jobs ignore
    try:
        with StopRequest() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher passes on what the process got itself
            assert stop.received == number.name
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_second_one_later_is_obeyed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with StopRequest() as stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the second kill must raise
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_note_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def within() -> None:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGTERM) is before
            assert stop.received is None

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
