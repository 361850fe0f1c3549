"""The progress line of a run: time left, the latest numbers, images per second, step time and peak memory.

A terminal gets one line with a bar that moves, a log file a line now and then.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from cn_hf.training.memory import memory_in_words, peak_memory

__all__ = ["ProgressBar"]

# Steps that the speed is the median of: validation, checkpoints and compilation in between do not count.
_WINDOW = 25
_SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """One line over all images of a run; silent where ``enabled`` is false (every process but the main one).

    Time left is that of the images left at the mean speed since this process began with them, validation and
    checkpoints included. Images per second and step time are those of the last training steps alone.

    Args:
        total: Images the run will see.
        description: What stands before the bar.
        enabled: Whether to draw anything.
        initial: Images already done, by the process that this one goes on from.
        device: Whose peak memory is shown; see ``peak_memory``.
    """

    def __init__(
        self,
        total: int,
        *,
        description: str = "",
        enabled: bool = True,
        initial: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        kind = _Line if sys.stderr.isatty() else _LogLines
        self._bar = kind(total=total, initial=initial, desc=description, disable=not enabled)
        self._bar.device = device

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, **numbers: str) -> None:
        """Set numbers of the line; those not named stay as they were. Drawn at the next refresh."""
        self._bar.numbers |= numbers

    def advance(self, images: int, steps: int = 1) -> None:
        """Count images as done, in so many optimizer steps since the last call."""
        self._bar.measure(images, steps)
        self._bar.update(images)


class _Line(tqdm):  # type: ignore[type-arg]  # tqdm takes no type arguments when it runs
    """A tqdm bar that knows the numbers above; on a terminal the bar gives way first, then the end of the line."""

    monitor_interval = 0  # no thread of its own: every update looks at the clock
    layout = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{numbers}"
    seconds_between = 0.2

    def __init__(self, **options: Any) -> None:
        self.numbers: dict[str, str] = {}
        self.device: torch.device | str = "cpu"
        self.speeds: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self.clock = time.perf_counter()
        super().__init__(
            **options, bar_format=self.layout, dynamic_ncols=True, mininterval=self.seconds_between, miniters=1,
            smoothing=0,
        )  # fmt: skip

    def measure(self, images: int, steps: int) -> None:
        """Take the time since the last call as that of so many images and steps."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if images > 0 and steps > 0 and seconds > 0:
            self.speeds.append((images / seconds, seconds / steps))

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values that ``layout`` may name."""
        parts = [f"{name} {number}" for name, number in self.numbers.items()]
        if self.speeds:
            rates, times = zip(*self.speeds, strict=True)
            parts += [_rate(statistics.median(rates)), _step_time(statistics.median(times))]
        parts.append(memory_in_words(peak_memory(self.device)))
        return {**super().format_dict, "numbers": "".join(f", {part}" for part in parts)}


class _LogLines(_Line):
    """The same as whole lines, for a file or a pipe."""

    layout = "{desc} {percentage:3.0f}%, {remaining} left{numbers}"
    seconds_between = _SECONDS_BETWEEN_LINES

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Return the function that tqdm writes its lines with."""

        def print_line(text: str) -> None:
            file.write(f"{text}\n")
            file.flush()

        return print_line


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.{0 if images_per_second >= 9.95 else 1}f} img/s"


def _step_time(seconds: float) -> str:
    if seconds >= 9.95:
        return f"{seconds:,.0f} s/step"
    return f"{1000 * seconds:,.{0 if seconds >= 0.00995 else 1}f} ms/step"
