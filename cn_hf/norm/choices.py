"""Checks of the layers' options."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from cn_hf.errors import ConfigError, ConfigTypeError, nearest

__all__ = ["CHOICES", "check_choice", "check_integer", "check_number"]

CHOICES: dict[str, tuple[str, ...]] = {
    "parametrization": ("embedder", "table"),
    "variance_activation": ("softplus", "exp"),
    "init": ("identity", "random"),
    "inference": ("cn", "cn+"),
    "plus_stats": ("learned", "batch"),
    "plus_scale": ("none", "sqrt_t"),
    "plus_posterior": ("vector", "sample"),
}
"""The valid values of a ``ContextNorm``'s named options."""


def check_choice(option: str, value: str, choices: tuple[str, ...] | None = None) -> None:
    """Raise ``ConfigError`` unless ``value`` is a valid value of ``option``."""
    choices = CHOICES[option] if choices is None else choices
    if not isinstance(value, str):
        raise ConfigTypeError(f"{option} must be a string, received {value!r}; {nearest(str(value), choices)}")
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is unknown; {nearest(value, choices)}")


def check_integer(option: str, value: Any, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer of at least ``least``; ``ConfigTypeError`` for its type."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigTypeError(f"{option} must be an integer of at least {least}, received {value!r}.")
    if value < least:
        raise ConfigError(f"{option} must be at least {least}, received {value}.")


def check_number(option: str, value: Any, most: float, *, inclusive: bool) -> None:
    """Raise ``ConfigError`` unless ``value`` lies between 0 and ``most``; ``ConfigTypeError`` for its type."""
    wanted = f"{option} must be a number in (0, {most:g}{']' if inclusive else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigTypeError(f"{wanted}, received {value!r}.")
    if not (0 < float(value) < most or (inclusive and value == most)):
        raise ConfigError(f"{wanted}, received {value}.")
