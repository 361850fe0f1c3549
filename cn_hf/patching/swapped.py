"""Modules whose class is swapped in place for a subclass made at run time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from cn_hf.errors import PatchError

__all__ = ["Swapped", "copied", "has_other_forward", "own_class", "swap_class"]


class Swapped:
    """A module whose class was swapped in place for a subclass made at run time; pickles by how that class was made."""

    adds: ClassVar[str | None] = None  # the name of the module that was added to it
    original_class: ClassVar[type[nn.Module]]
    recipe: ClassVar[tuple[Callable[..., type[nn.Module]], tuple[Any, ...]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a plain module where the class is called, as ``nn.Sequential`` does for slices and PEFT for factors."""
        swap_class(cast(nn.Module, self), self.original_class)
        cast(Any, self).__init__(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks every module for what it is to compile."""
        raise PatchError(
            "torch.jit.script cannot compile a patched model: trace it with torch.jit.trace, or use torch.export. "
            "fold_context(model, context) gives a plain model for one context, which can be scripted."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the recipe of the class instead of the class, which no module contains."""
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (_rebuild, self.recipe, *reduced[2:])


def _rebuild(make: Callable[..., type[nn.Module]], arguments: tuple[Any, ...]) -> nn.Module:
    new_class = make(*arguments)
    return new_class.__new__(new_class)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, below the one that ``torch.nn.utils.parametrize`` makes for each module."""
    return type_before_parametrizations(module)


def has_other_forward(module: nn.Module) -> bool:
    """True if the instance has a ``forward`` that is not its class's, as accelerate's hooks give it."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def swap_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Give ``module`` another class in place: parameters, parametrizations, buffers, hooks, flags and names stay."""
    if not has_other_forward(module):
        vars(module).pop("forward", None)  # the old class's, which accelerate leaves when its hooks come off
    if is_parametrized(module):  # its tensors are properties of a class on top, which a copy of the module may share
        properties = {name: value for name, value in vars(type(module)).items() if name not in _OF_EACH_CLASS}
        new_class = type(f"Parametrized{new_class.__name__}", (new_class,), properties)
    module.__class__ = new_class


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of modules that pruning or a weight norm gave tensors of a graph, which torch does not copy."""
    made = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in made})


_OF_EACH_CLASS = ("__dict__", "__weakref__")  # descriptors that a new class makes for itself
