"""Dataclasses that check their fields: what each kind of field takes, and the words of its errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Annotated, Any

import pytest

from cn_hf.errors import ConfigError
from cn_hf.validation import (
    Count,
    Flag,
    Fraction,
    Number,
    Options,
    Positive,
    Share,
    Text,
    Texts,
    Wholes,
    one_of,
    validated,
)


@validated
class Part:
    side: Count
    name: Text = "part"


@validated
class Whole:
    count: Count = 1
    rate: Number = 0.5
    positive: Positive = 1.0
    share: Share = 0.0
    fraction: Fraction = 0.0
    flag: Flag = False
    kind: Annotated[Text, one_of(("red", "green"))] = "red"
    names: Texts = ()
    steps: Wholes = ()
    limit: Count | None = None
    options: Options = dataclasses.field(default_factory=dict)
    parts: dict[Text, Part] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"count": 3.0}, 3), ({"rate": "1e-3"}, 0.001), ({"rate": 2}, 2.0), ({"names": "one"}, ("one",)),
        ({"names": ["a", "b"]}, ("a", "b")), ({"steps": 4}, (4,)), ({"limit": None}, None), ({"fraction": 0}, 0.0),
        ({"share": 1}, 1.0), ({"options": {"a": [1]}}, {"a": [1]}),
        ({"parts": {"x": {"side": 2}}}, {"x": Part(side=2)}),
    ],
)  # fmt: skip
def test_values_are_read_without_a_loss(given: dict[str, Any], read: object) -> None:
    [name] = given
    value = getattr(Whole(**given), name)
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": True}, "option 'count' must be a whole number, got True"),
        ({"count": 1.5}, "option 'count' must be a whole number, got 1.5"),
        ({"count": "3"}, "option 'count' must be a whole number, got '3'"),
        ({"count": float("inf")}, "option 'count' must be a whole number, got inf"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"rate": False}, "option 'rate' must be a finite number, got False"),
        ({"rate": "nan"}, "option 'rate' must be a finite number, got 'nan'"),
        ({"positive": 0}, "positive must be positive, got 0"),
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"fraction": 1}, r"fraction must be in \[0, 1\), got 1"),
        ({"flag": 1}, "option 'flag' must be true or false, got 1"),
        ({"kind": "gren"}, "unknown kind 'gren'; did you mean 'green'"),
        ({"names": ["a", 1]}, "option 'names' must be text, got 1"),
        ({"steps": [1, True]}, "option 'steps' must be a whole number, got True"),
        ({"options": {1: 2}}, "option 'options' must be a mapping"),
        ({"cuont": 1}, "unknown option 'cuont'; did you mean 'count'"),
        ({"parts": {"x": {}}}, "option 'parts.x.side' is missing"),
        ({"parts": {"x": {"side": 0}}}, "parts.x.side must be at least 1, got 0"),
        ({"parts": {"x": {"side": True}}}, "parts.x: option 'side' must be a whole number, got True"),
        ({"parts": {"x": {"side": 1, "nam": "a"}}}, "unknown option 'parts.x.nam'; did you mean 'name'"),
    ],
)
def test_errors_name_the_option_and_what_it_takes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Whole(**given)


def test_it_is_a_frozen_dataclass_that_can_be_copied() -> None:
    config = Whole(names="a", options={"b": 1})
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, count=2).count == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.count = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="at least 1"):
        dataclasses.replace(config, count=0)
