"""Frozen dataclasses that check their fields: kinds of fields, and errors in the words of the package.

pydantic checks; what it finds wrong becomes a ``ConfigError`` that names the option, what was expected and received,
and for an unknown name the nearest known one. No value is converted with a loss: 3.0 is a whole number, True is not,
and ``1e-3``, which YAML reads as text, is a number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import pydantic.dataclasses
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, ValidationError, ValidationInfo
from typing_extensions import dataclass_transform

from cn_hf.errors import ConfigError, nearest

__all__ = [
    "Count",
    "Flag",
    "Fraction",
    "Natural",
    "NotNegative",
    "Number",
    "Numbers",
    "Options",
    "Positive",
    "Share",
    "Text",
    "Texts",
    "Whole",
    "Wholes",
    "one_of",
    "several",
    "validated",
]

Config = TypeVar("Config")


def _read(expected: str, convert: Callable[[Any], Any]) -> BeforeValidator:
    """Return a validator that converts a value, or says what was expected."""

    def check(value: Any, info: ValidationInfo) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"option {info.field_name!r} must be {expected}, got {value!r}") from None

    return BeforeValidator(check)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return convert


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return dict(value)


def one_of(known: Sequence[str]) -> AfterValidator:
    """Return a validator of one of these names."""

    def check(value: str, info: ValidationInfo) -> str:
        if value not in known:
            raise ConfigError(f"unknown {info.field_name} {value!r}; {nearest(value, known)}")
        return value

    return AfterValidator(check)


several = BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value,))
"""A validator that reads a single value as a list of one."""

Text = Annotated[str, _read("text", _exactly(str))]
Texts = Annotated[tuple[Text, ...], several]
Flag = Annotated[bool, _read("true or false", _exactly(bool))]
Options = Annotated[dict[str, Any], _read("a mapping", _mapping)]
Whole = Annotated[int, _read("a whole number", _whole)]
Count = Annotated[Whole, Ge(1)]
Natural = Annotated[Whole, Ge(0)]
Number = Annotated[float, _read("a finite number", _number)]
NotNegative = Annotated[Number, Ge(0)]
Positive = Annotated[Number, Gt(0)]
Numbers = Annotated[tuple[Number, ...], several]
Wholes = Annotated[tuple[Whole, ...], several]
Share = Annotated[Number, Ge(0), Le(1)]
Fraction = Annotated[Number, Ge(0), Lt(1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def validated(cls: type[Config]) -> type[Config]:
    """Make ``cls`` a frozen, slotted, keyword-only dataclass whose fields pydantic checks.

    Raises:
        ConfigError: When it is made with an unknown or missing name, or a value that is wrong.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config={"extra": "forbid"})(cls)
    check = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        try:
            check(self, *args, **options)
        except ValidationError as error:
            raise _explained(error, type(self)) from None

    made.__init__ = __init__
    return typing.cast("type[Config]", made)


def _explained(found: ValidationError, cls: type) -> ConfigError:
    """Return the first thing that is wrong, in words."""
    error = found.errors(include_url=False)[0]
    path = [part for part in error["loc"] if isinstance(part, str)]
    place, name, whole = ".".join(path[:-1]), path[-1] if path else "", ".".join(path)
    own = error.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):
        return type(own)(f"{place}: {own}") if place else own
    owner = _hint_at(cls, path[:-1])
    fields = {field.name: field for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    if error["type"] == "unexpected_keyword_argument":
        return ConfigError(f"unknown option {whole!r}; {nearest(name, fields)}")
    if error["type"] == "missing":
        about = fields[name].metadata.get("help") if name in fields else None
        return ConfigError(f"option {whole!r} is missing" + (f"; give {about}" if about else ""))
    words = _limits(_hint_at(cls, path))
    if words is not None and isinstance(error["input"], int | float):
        return ConfigError(f"{whole} must be {words}, got {error['input']}")
    return ConfigError(f"option {whole!r}: {error['msg']}, got {error['input']!r}")


def _hint_at(cls: type, path: Sequence[str]) -> Any:
    """Return the type of the value at a path through dataclasses and mappings."""
    hint: Any = cls
    for name in path:
        while typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint, include_extras=True).get(name)
        else:
            hint = typing.get_args(hint)[-1] if typing.get_args(hint) else None
    return hint


def _limits(hint: Any) -> str | None:
    """Return the range of a field in words."""
    found = {
        name: getattr(part, name)
        for part in _metadata(hint)
        for name in ("ge", "gt", "le", "lt")
        if hasattr(part, name)
    }
    if not found:
        return None
    if len(found) == 2:
        low, high = ("[" if "ge" in found else "("), ("]" if "le" in found else ")")
        return f"in {low}{found.get('ge', found.get('gt'))}, {found.get('le', found.get('lt'))}{high}"
    if "gt" in found:
        return "positive" if found["gt"] == 0 else f"more than {found['gt']}"
    return f"at least {found['ge']}" if "ge" in found else f"at most {found.get('le', found.get('lt'))}"


def _metadata(hint: Any) -> Iterator[Any]:
    """Give the metadata of a hint and of those within it."""
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        if part is not hint and typing.get_origin(hint) is not typing.Literal:
            yield from _metadata(part)
