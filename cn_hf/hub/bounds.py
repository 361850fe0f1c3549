"""Bounds of what a checkpoint's description may ask for: names, sizes, and the tensors made while a model is built.

A description is read from a file that somebody else wrote. Its values are checked before they meet a constructor, and
the constructor's tensors are compared with the header of the weights before they are allocated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cn_hf.errors import CheckpointError, CnHfError

__all__ = ["built", "check_arguments", "check_values", "weights_known", "weights_of"]

Made = TypeVar("Made")

FOREIGN = frozenset(
    ("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
)
"""Arguments of ``timm.create_model`` that name files or repositories, and are no arguments of a model."""
LARGEST = 1 << 24  # an integer that is neither a size nor a count of the weights: positions, pixels, bases of angles
DEEPEST = 20
SPARE = 1 << 24  # elements that a model may hold besides its weights: masks, tables of positions


def check_values(values: Any, where: str, largest: int = LARGEST) -> None:
    """Refuse values that would have a library read files or repositories of the writer's choice, or exhaust memory.

    Args:
        values: JSON values that are going to be arguments of ``timm.create_model``, or a config of transformers.
        where: their name, for messages.
        largest: integers above it are refused.

    Raises:
        CheckpointError: there is one; the message names it.
    """
    waiting = [(where, values, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise CheckpointError(f"{where} is nested too deeply.")
        if isinstance(value, Mapping):
            if not all(isinstance(key, (str, int)) for key in value):
                raise CheckpointError(f"Expected names of arguments in {name}, received {list(value)[:3]!r}.")
            _check_sources(name, value)
            waiting += [(f"{name}.{key}", inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(name, inner, depth + 1) for inner in value]
        elif isinstance(value, int) and abs(value) > largest:
            raise CheckpointError(f"Expected sizes of at most {largest:,}, received {name}={value}.")


def _check_sources(name: str, values: Mapping[Any, Any]) -> None:
    """Refuse the entries of one mapping by which timm or transformers look elsewhere for code, configs or weights."""
    timm_names = [("architecture", values.get("model_type") == "timm_wrapper" or "model_args" in values)]
    timm_names += [("backbone", values.get("backbone") is not None)]
    for key, meant in timm_names:
        value = values.get(key)
        if meant and value is not None and not _is_timm_architecture(value):
            raise CheckpointError(f"Expected an architecture of timm as {name}.{key}, received {value!r}.")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if any(sign in str(values.get(key, "")) for sign in ("/", ":")):
            raise CheckpointError(f"{name}.{key} names code elsewhere: {values[key]!r}.")
    for key in ("model_args", "backbone_kwargs"):
        if isinstance(values.get(key), Mapping):
            check_arguments(values[key], f"{name}.{key}")
    if values.get("use_pretrained_backbone"):
        raise CheckpointError(f"{name}.use_pretrained_backbone asks for weights of another repository.")


def _is_timm_architecture(name: object) -> bool:
    import timm

    return isinstance(name, str) and timm.is_model(name)


def check_arguments(arguments: Any, where: str) -> None:
    """Refuse what is no mapping of a timm model's arguments, or holds such as would have timm read other files.

    Raises:
        CheckpointError: it is, or does; the message names it.
    """
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"Expected a mapping of arguments as {where}, received {arguments!r}.")
    if foreign := sorted(FOREIGN & set(arguments)):
        raise CheckpointError(f"{where} of the checkpoint holds {foreign[0]!r}, which is no argument of a model.")


# ------------------------------------------------------------------------------------------------------------ building

_weights: ContextVar[Mapping[str, Tensor] | None] = ContextVar("weights", default=None)


@contextmanager
def weights_of(weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """In the block, models are built for these weights, of which shapes and number bound what is made.

    Args:
        weights: by name, on any device, e.g. those of a file's header on the meta device; None for unknown ones.
    """
    token = _weights.set(weights)
    try:
        yield
    finally:
        _weights.reset(token)


def weights_known() -> bool:
    """True in a block of ``weights_of`` that knows the weights."""
    return _weights.get() is not None


def built(what: str, values: Mapping[str, Any], build: Callable[[dict[str, Any]], Made]) -> Made:
    """Return what ``build`` makes of the values, within the bounds of the weights.

    Args:
        what: is built, for messages.
        values: arguments by name, from a checkpoint.
        build: called with them, and after an error with all but one, to find out which is at fault.

    Raises:
        CheckpointError: a constructor refuses its arguments, or makes more or larger tensors than the weights can fill.
    """
    bounds = _Bounded(what, _weights.get())
    try:
        with bounds:
            return build(dict(values))
    except CnHfError:
        raise
    except Exception as error:
        name = _cause(what, values, build)
        words = f"{name}={values[name]!r}"[:200] if name else "its arguments"
        reason = next(iter(str(error).strip().splitlines()), "")[:300]
        raise CheckpointError(f"{what} cannot be built with {words}: {type(error).__name__}: {reason}") from error


def _cause(what: str, values: Mapping[str, Any], build: Callable[[dict[str, Any]], object]) -> str:
    deadline = time.monotonic() + 2
    for name in values:
        if time.monotonic() > deadline:
            break
        try:
            with torch.device("meta"), _Bounded(what, _weights.get()):
                build({key: value for key, value in values.items() if key != name})
        except Exception:
            continue
        return name
    return ""


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the tensors that are made, and refuses one before it is allocated where they exceed the bounds."""

    def __init__(self, what: str, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.what = what
        # Counted over timm: 2 to 22 operators an entry of the state, of which 1 to 2 make an empty tensor.
        self.operators, self.tensors, self.elements = 50_000, 20_000, 1 << 36
        if weights is not None:
            stored = sum(tensor.numel() for tensor in weights.values())
            self.operators, self.tensors = 100 * len(weights) + 5_000, 8 * len(weights) + 500
            self.elements = 4 * stored + SPARE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators -= 1
        made = 0
        if not any(isinstance(value, Tensor) for value in args):  # most are factories, whose sizes are arguments
            self.tensors -= func._schema.name == "aten::empty"
            made = _size(func, args)
            self.elements -= made
        elif func._schema.name == "aten::unbind":  # a rate a layer, read one by one
            self.tensors -= args[0].shape[args[1] if len(args) > 1 else 0] // 4
        if min(self.operators, self.tensors, self.elements) < 0:
            size = f", the last one of {made:,} elements" if made > SPARE else ""
            raise CheckpointError(
                f"{self.what} would make more or larger tensors than the weights can fill{size}: sizes or numbers of "
                "layers in the description are not those of the weights."
            )
        return func(*args, **kwargs)


def _size(func: Any, args: Any) -> int:
    for value in args:
        if isinstance(value, (list, tuple)) and all(isinstance(size, int) for size in value):
            return math.prod(value)
    numbers = [abs(int(value)) for value in args if isinstance(value, (int, float)) and math.isfinite(value)]
    operator = func._schema.name.partition("::")[2]
    if operator in ("eye", "tril_indices", "triu_indices"):
        return math.prod(numbers[:2]) if len(numbers) > 1 else numbers[0] ** 2
    if operator in ("arange", "range", "randperm"):
        return max(numbers, default=1)
    return numbers[2] if operator in ("linspace", "logspace") and len(numbers) > 2 else 1
