"""Checks of the layers' options."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch

from cn_hf.errors import ConfigError, ConfigTypeError, nearest

__all__ = ["CHOICES", "check_choice", "check_flag", "check_integer", "check_number", "check_place"]

_MOST = 2**31 - 1  # of any size: beyond it torch fails in its own words, or tries to allocate petabytes

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


def check_flag(option: str, value: Any) -> None:
    """Raise ``ConfigTypeError`` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigTypeError(f"{option} must be true or false, received {value!r}.")


def check_place(device: Any, dtype: Any) -> None:
    """Raise ``ConfigError`` unless parameters can be on ``device`` and of ``dtype``; None is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        kind = ConfigError if isinstance(dtype, torch.dtype) else ConfigTypeError
        raise kind(f"dtype must be a floating point torch.dtype of 16 bits or more, received {dtype!r}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"device must be one that torch has here, such as 'cpu', received {device!r}.") from error


def check_integer(option: str, value: Any, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer from ``least`` to 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigTypeError(f"{option} must be an integer of at least {least}, received {value!r}.")
    if value < least or int(value) > _MOST:
        limit = f"at least {least}" if value < least else f"at most {_MOST}"
        raise ConfigError(f"{option} must be {limit}, received {value}.")


def check_number(option: str, value: Any, most: float, *, inclusive: bool) -> None:
    """Raise ``ConfigError`` unless ``value`` lies between 0 and ``most``; ``ConfigTypeError`` for its type."""
    wanted = f"{option} must be a number in (0, {most:g}{']' if inclusive else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigTypeError(f"{wanted}, received {value!r}.")
    if not (0 < float(value) < most or (inclusive and value == most)):
        raise ConfigError(f"{wanted}, received {value}.")
