"""The choice of kernels: our own where they agree with the formulas on this device; else torch's operators.

A compiled kernel depends on a compiler, a driver and a processor that nobody has tested together. So each is compared
with ``formulas`` on small inputs, at its first use for a device and dtype, and one that differs or fails is not used:
one warning says so. Those that agreed are remembered on disk, by versions and device.

| kernel | it computes |
|---|---|
| ``rows``, ``rows_backward`` | ``shift_scale`` of maps whose positions lie together |
| ``vectors``, ``vectors_backward`` | ``shift_scale`` of tokens and channels-last maps |
| ``norm``, ``norm_backward`` | ``norm_shift_scale`` |

Other kernels join by a function in ``EXAMPLES`` that yields pairs of what they and torch compute.

Shape legend: as in ``operators``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cn_hf.errors import ConfigError, nearest
from cn_hf.norm.fused import cpu_kernels, formulas, native

__all__ = [
    "EXAMPLES",
    "Pairs",
    "allow_kernels",
    "difference",
    "distrust",
    "reference",
    "trusted",
    "usable_kernels",
    "use_kernels",
    "waves",
]

CHOICES = ("auto", "reference")

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the largest number; Triton hands float64 kernels an eps of float32."""

_trusted: dict[tuple[str, torch.device, torch.dtype], bool] = {}
_allowed: frozenset[str] | None = None


def _chosen(name: str) -> str:
    if name not in CHOICES:
        raise ConfigError(f"Unknown kernels {name!r}; {nearest(name, CHOICES)}")
    return name


_choice = [_chosen(os.environ.get("CN_HF_KERNELS") or "auto")]


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in all threads of the process.

    The environment's ``CN_HF_KERNELS`` chooses for as long as the process lives.

    Args:
        name: ``"auto"``, the fastest there is; ``"reference"``, torch's own operators.

    Raises:
        ConfigError: it is neither.
    """
    _choice.append(_chosen(name))
    try:
        yield
    finally:
        _choice.pop()


def reference() -> bool:
    """True if torch's own operators have been chosen."""
    return _choice[-1] == "reference"


def usable_kernels(device: torch.device, dtypes: Iterable[torch.dtype]) -> frozenset[str]:
    """Return the names of all kernels that this process can use on ``device``, tried now if they have not been yet."""
    device = _indexed(device)
    names = [name for name in EXAMPLES if name != "combine" or device.type == "cpu"]
    return frozenset(_label(name, dtype) for name in names for dtype in dtypes if trusted(name, device, dtype))


def allow_kernels(names: Iterable[str] | None) -> None:
    """From now on use no kernels but these, so that all processes of a run compute alike; None: whatever works here.

    Args:
        names: some of what ``usable_kernels`` returned.
    """
    global _allowed
    _allowed = None if names is None else frozenset(names)
    _trusted.clear()


def trusted(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """True if a kernel is there, allowed, and agrees with the formulas on this device.

    Args:
        kernel: one of ``EXAMPLES``.
        device: of ``x``, with an index where there may be several.
        dtype: of ``x``.
    """
    if _choice[-1] == "reference":
        return False
    known = _trusted.get((kernel, device, dtype))
    return _first_use(kernel, device, dtype) if known is None else known


def distrust(kernel: str, device: torch.device, dtype: torch.dtype, problem: str) -> None:
    """Use a kernel no more in this process, with a warning."""
    _trusted[kernel, device, dtype] = False
    warnings.warn(
        f"The {_label(kernel, dtype)} kernel of context normalization is not used on {device}, torch's operators are: "
        f"{problem} ({module_for(device.type).versions()}; CN_HF_KERNELS=reference never compiles).",
        stacklevel=2,
    )


def module_for(device_type: str) -> Any:
    """Return the module with the kernels for a type of device, None for none."""
    if device_type == "cpu":
        return cpu_kernels if native.library() is not None else None
    return import_module("cn_hf.norm.fused.triton_kernels") if device_type == "cuda" and find_spec("triton") else None


def _first_use(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # nothing can be compared while a graph is captured; asked again next time
    name, module = _label(kernel, dtype), module_for(device.type)
    if module is None or dtype not in module.DTYPES or (_allowed is not None and name not in _allowed):
        _trusted[kernel, device, dtype] = False
        return False
    agreed = module.agreed(device)
    if name not in agreed:
        problem = difference(module, kernel, device, dtype)
        if problem is not None:
            distrust(kernel, device, dtype, problem)
            return False
        agreed.add(name)
    _trusted[kernel, device, dtype] = True
    return True


Pairs: TypeAlias = Iterator[tuple[Tensor | None, Tensor | None]]
"""A kernel's results, each with the right one; None for those not asked for."""


def difference(module: Any, kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with a kernel of ``module``, in words; None for one that agrees with the formulas."""
    try:
        with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            problems = (_problem(*pair) for pair in EXAMPLES[kernel](module, kernel, device, dtype))
            return next((problem for problem in problems if problem is not None), None)
    except Exception as error:  # of a compiler, of a driver, or for want of memory
        return f"{type(error).__name__}: {str(error)[-300:]}"


def _examples(module: Any, kernel: str, device: torch.device, dtype: torch.dtype) -> Pairs:
    """Return the results of a kernel and of the formulas in float64, for two inputs.

    One has sizes that vectors and tiles fit, an offset, a row a sample and a gradient by ``x``; the other has none.
    """
    maps, reference = kernel.startswith("rows"), cast(Any, formulas)
    for samples, positions, features in ((2, 64, 64), (3, 2051, 5) if maps else (3, 131, 71)):
        complete = samples == 2
        shape = (samples, features, positions) if maps else (samples, positions, features)
        x, grad = (waves(shape, rate, device).to(dtype) for rate in (0.37, 0.61))
        rows = [waves((samples if complete else 1, features), rate, device).float() for rate in (0.9, 0.7, 0.5)]
        exact: list[Any] = [row.double() for row in rows]
        held: list[Any] = [row.to(torch.promote_types(dtype, torch.float32)) for row in rows]
        if not complete:
            exact[2] = held[2] = None
        operator = "norm_shift_scale" if kernel.startswith("norm") else "shift_scale"
        endings: Any = ((1e-5, True), (1e-5, False)) if kernel.startswith("norm") else ((1 if maps else -1,),)
        for ending in endings:
            if not kernel.endswith("_backward"):
                found = getattr(module, operator)(x, *held, *ending)
                expected = getattr(reference, operator)(x.double(), *exact, *ending)
            elif operator == "shift_scale":
                found = module.shift_scale_backward(grad, x, *held[:2], *ending, complete)
                expected = reference.shift_scale_backward(grad.double(), x.double(), *exact[:2], *ending, complete)
            else:
                centered = ending[1]
                kept = formulas.vector_statistics(x.double(), 1e-5, centered)
                near = (part.to(held[0].dtype) for part in kept)
                found = module.norm_shift_scale_backward(grad, x, *near, *held[:2], complete, centered)
                expected = reference.norm_shift_scale_backward(
                    grad.double(), x.double(), *kept, *exact[:2], complete, centered
                )
            yield from zip(*((part,) if isinstance(part, Tensor) else part for part in (found, expected)), strict=True)


EXAMPLES: dict[str, Callable[[Any, str, torch.device, torch.dtype], Pairs]] = dict.fromkeys(
    ("rows", "rows_backward", "vectors", "vectors_backward", "norm", "norm_backward"), _examples
)


def _problem(found: Tensor | None, expected: Tensor | None) -> str | None:
    if found is None or expected is None:
        return None if found is expected else "a result is missing"
    if found.shape != expected.shape:
        return f"its result is of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return None
    size = expected.abs().amax().clamp_min(1)
    error = float(((found.double() - expected).abs().amax() / size).nan_to_num(torch.inf))
    return None if error <= _TOLERANCE[found.dtype] else f"its result is off by {error:.1e} of the largest number"


def waves(shape: tuple[int, ...], rate: float, device: torch.device) -> Tensor:
    """Return numbers from 0.2 to 1.8 in float64, drawn without the random generator."""
    count = torch.Size(shape).numel()
    return (1 + 0.8 * torch.sin(rate * torch.arange(count, dtype=torch.float64, device=device))).reshape(shape)


def _label(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')}"


@cache
def _indexed(device: torch.device) -> torch.device:
    """The device as tensors on it name it."""
    return torch.empty(0, device=device).device
