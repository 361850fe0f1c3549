"""The progress line of a run: images done, images per second, time left, and the latest numbers."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar:
    """One tqdm bar over all images of a run; silent where ``enabled`` is false (every process but the main one).

    Args:
        total: Images the run will see.
        description: What stands before the bar.
        enabled: Whether to draw anything.
    """

    def __init__(self, total: int, *, description: str = "", enabled: bool = True) -> None:
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(
            total=total, desc=description, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=interval,
            maxinterval=max(interval, 10.0), disable=not enabled,
        )  # fmt: skip
        self._numbers: dict[str, str] = {}

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, **numbers: str) -> None:
        """Set the numbers behind the bar; those not named stay as they were. Drawn at the next refresh."""
        self._numbers |= numbers
        self._bar.set_postfix(self._numbers, refresh=False)

    def advance(self, images: int) -> None:
        """Count images as done."""
        self._bar.update(images)
