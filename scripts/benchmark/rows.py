"""One line of the benchmark: what was measured, against what, and the limit that it must keep."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scripts.benchmark.settings import ENOUGH_ROUNDS

__all__ = ["Row", "Trial", "compared", "differing", "single"]

TIME, SPEED, BANDWIDTH, MEMORY = "× time", "× images/s", "× GB/s", "× bytes"
MICROSECONDS, MINUTES, WAITS = " µs", " min", " waits"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A measurement, or, with ``value`` None, the plan of one.

    Attributes:
        what: Was measured.
        rival: What it is measured against; empty where the value stands for itself.
        shape: Of what was really measured.
        dtype: "float32" or "bfloat16".
        unit: Of the value, as written behind it; ratios to the rival begin with ×.
        limit: Of the value; None where none is set.
        at_least: The value is better the larger it is, and the limit is the least; else the most.
        headline: Shown in the README's table.
        value: Median over the rounds.
        low: First quartile of the rounds.
        high: Third quartile of the rounds.
        rounds: How many; 0 where nothing is repeated.
        milliseconds: Median time of one call.
        rival_milliseconds: The rival's.
        note: What else is to be known.
    """

    what: str
    rival: str = ""
    shape: str = ""
    dtype: str = "float32"
    unit: str = TIME
    limit: float | None = None
    at_least: bool = False
    headline: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    milliseconds: float | None = None
    rival_milliseconds: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The subject of a row, whatever its size, dtype and device."""
        return self.what, self.rival

    @property
    def to_limit(self) -> float | None:
        """The used part of the limit: 1 or less where it holds. Where the limit is 0, the value more than 1."""
        if self.value is None or self.limit is None:
            return None
        if self.limit == 0:
            return 1 + self.value
        if self.at_least:
            return self.limit / self.value if self.value > 0 else math.inf
        return self.value / self.limit

    @property
    def holds(self) -> bool | None:
        """True if the value keeps the limit, to the two digits shown; None where there is no value or no limit."""
        if self.value is None or self.limit is None:
            return None
        shown = round(self.value, 2)
        return shown >= self.limit if self.at_least else shown <= self.limit

    @property
    def value_in_words(self) -> str:
        """The value with its unit."""
        return "not measured" if self.value is None else f"{self.value:,.{0 if self.unit == WAITS else 2}f}{self.unit}"

    @property
    def limit_in_words(self) -> str:
        """The limit with its direction; empty for none."""
        if self.limit is None:
            return ""
        number = f"{self.limit:,.{0 if self.unit == WAITS else 2}f}"
        return f"{'≥' if self.at_least else '≤'} {number}"


class Trial(NamedTuple):
    """Rows that are measured together.

    Attributes:
        name: For progress bars and errors.
        rows: As planned, without values.
        measure: Gives the rows, in the same order, with values where they could be had.
    """

    name: str
    rows: tuple[Row, ...]
    measure: Callable[[], Sequence[Row]]


def compared(row: Row, own: Sequence[float], rival: Sequence[float], *, amount: tuple[float, str] | None = None) -> Row:
    """The row with the median of the ratios within each round.

    Args:
        row: As planned. With ``at_least`` speeds are compared, else times.
        own: Seconds of a call in each round.
        rival: The rival's.
        amount: What one call works through, and the name of so much a second; noted.
    """
    pairs = [(other, mine) if row.at_least else (mine, other) for mine, other in zip(own, rival, strict=True)]
    note = row.note
    if amount is not None:
        speeds = [amount[0] / statistics.median(seconds) for seconds in (own, rival)]
        note = "; ".join(filter(None, [note, f"{_speed(speeds[0])} against {_speed(speeds[1])} {amount[1]}"]))
    return _filled(
        row,
        [above / below for above, below in pairs],
        milliseconds=1000 * statistics.median(own),
        rival_milliseconds=1000 * statistics.median(rival),
        note=note,
    )


def differing(row: Row, own: Sequence[float], rival: Sequence[float]) -> Row:
    """The row with the median of the differences within each round, in microseconds."""
    return _filled(
        row,
        [1e6 * (mine - other) for mine, other in zip(own, rival, strict=True)],
        milliseconds=1000 * statistics.median(own),
        rival_milliseconds=1000 * statistics.median(rival),
        note=row.note,
    )


def single(row: Row, value: float, *, milliseconds: float | None = None, note: str = "") -> Row:
    """The row with a value that was not repeated."""
    return dataclasses.replace(row, value=value, milliseconds=milliseconds, note=note or row.note)


def _filled(row: Row, values: Sequence[float], *, milliseconds: float, rival_milliseconds: float, note: str) -> Row:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    if len(values) < ENOUGH_ROUNDS:
        note = "; ".join(filter(None, [note, f"{len(values)} rounds only"]))
    return dataclasses.replace(
        row,
        value=statistics.median(values),
        low=low,
        high=high,
        rounds=len(values),
        milliseconds=milliseconds,
        rival_milliseconds=rival_milliseconds,
        note=note,
    )


def _speed(value: float) -> str:
    return f"{value:,.{1 if value < 100 else 0}f}"
