"""Requests to stop: SIGTERM (a scheduler's preemption), SIGHUP (a closed terminal) and SIGINT (Ctrl-C) set a flag.

The loop looks at the flag at the end of a step.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

# A scheduler or terminal signals all processes, and a launcher among them passes the signal on: one request, not two.
SAME_REQUEST = 5.0  # seconds


class StopRequest:
    """Within its block these signals are noted instead of ending the process; one that comes later again ends it.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored.
    Outside of the main thread, where Python handles no signals, nothing is noted.

    Attributes:
        received: Name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: set by other than Python code, and so not for us to set again
                signal.signal(number, handler)
        self._before.clear()
