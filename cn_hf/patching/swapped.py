"""Modules whose class is swapped in place for a subclass made at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

__all__ = ["Swapped", "swap_class"]


class Swapped:
    """A module whose class was swapped in place for a subclass made at run time; pickles by how that class was made."""

    adds: ClassVar[str | None] = None  # the name of the module that was added to it
    original_class: ClassVar[type[nn.Module]]
    recipe: ClassVar[tuple[Callable[..., type[nn.Module]], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the recipe of the class instead of the class, which no module contains."""
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (_rebuild, self.recipe, *reduced[2:])


def _rebuild(make: Callable[..., type[nn.Module]], arguments: tuple[Any, ...]) -> nn.Module:
    new_class = make(*arguments)
    return new_class.__new__(new_class)


def swap_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Give ``module`` another class in place: parameters, buffers, hooks, flags and names stay."""
    module.__class__ = new_class
