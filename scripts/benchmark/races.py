"""Trials in which contestants are timed in turn and their times compared within each round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from scripts.benchmark.rows import Row, Trial, compared
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run, seconds_in_turn

__all__ = ["Duel", "race"]


class Duel(NamedTuple):
    """A contestant and its rival.

    Attributes:
        own: Name of the contestant.
        row: What becomes of it; its ``rival`` is the other's name.
        amount: What a call works through, and the name of so much a second.
    """

    own: str
    row: Row
    amount: tuple[float, str] | None = None


def race(
    name: str,
    duels: Sequence[Duel],
    contestants: Callable[[], Mapping[str, Run]],
    settings: Settings,
    *,
    graphs: bool = False,
    eager: Collection[str] = (),
    calls: int | None = None,
) -> Trial:
    """A trial of contestants that are built when it begins; the other arguments are ``seconds_in_turn``'s."""
    measure = partial(_measure, name, duels, contestants, settings, graphs, eager, calls)
    return Trial(name, tuple(duel.row for duel in duels), measure)


def _measure(
    name: str,
    duels: Sequence[Duel],
    contestants: Callable[[], Mapping[str, Run]],
    settings: Settings,
    graphs: bool,
    eager: Collection[str],
    calls: int | None,
) -> list[Row]:
    seconds = seconds_in_turn(contestants(), settings, title=name, graphs=graphs, eager=eager, calls=calls)
    return [compared(duel.row, seconds[duel.own], seconds[duel.row.rival], amount=duel.amount) for duel in duels]
