"""The options of the layers that are one of a few words, and their check."""

from __future__ import annotations

from cn_hf.errors import ConfigError, nearest

__all__ = ["CHOICES", "check_choice"]

CHOICES: dict[str, tuple[str, ...]] = {
    "parametrization": ("embedder", "table"),
    "variance_activation": ("softplus", "exp"),
    "init": ("identity", "random"),
    "inference": ("cn", "cn+"),
    "plus_stats": ("learned", "batch"),
    "plus_scale": ("none", "sqrt_t"),
}
"""The valid values of a ``ContextNorm``'s named options, the default first where it is not stated otherwise."""


def check_choice(option: str, value: str, choices: tuple[str, ...] | None = None) -> None:
    """Raise ``ConfigError`` unless ``value`` is a valid value of ``option``."""
    choices = CHOICES[option] if choices is None else choices
    if value not in choices:
        raise ConfigError(f"{option}={value!r} is not valid: {nearest(str(value), choices)}")
