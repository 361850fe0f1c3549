"""The CPU's fused kernels: ``native_*.cpp``, compiled when first needed, cached, called by ctypes.

Torch's own operators would read and write ``x`` several times over. Where there is no compiler with OpenMP, nothing is
lost but speed: ``library`` is None and ``kernels`` goes on with torch's operators.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions of a sample.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "Coefficients", "Components", "call", "compiler", "library"]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes of ``x`` there are kernels for; coefficients are float32."""

SOURCES = [Path(__file__).with_name(name) for name in ("native_kernels.cpp", "native_combination.cpp")]
HEADER = Path(__file__).with_name("native_types.h")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
_FLAGS += ["-fvisibility=hidden", "-shared", "-fPIC"]
_FEWEST_FOR_THREADS = 2**15  # numbers, for which waking another thread is worth it
_SECONDS = 120  # before a compiler is given up


class Coefficients(ctypes.Structure):
    """``Coefficients`` of the source: addresses, and how far a sample's row is from the last one's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("center", "scale", "offset")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("center", "scale", "offset")),
    ]

    @classmethod
    def of(cls, center: Tensor, scale: Tensor, offset: Tensor | None = None) -> Coefficients:
        """Of tensors ``(N, C)`` or ``(1, C)``, float32, which must outlive the call."""
        rows = (center, scale, offset)
        addresses = [None if row is None else row.data_ptr() for row in rows]
        return cls(*addresses, *(0 if row is None or row.shape[0] == 1 else row.stride(0) for row in rows))


class Components(ctypes.Structure):
    """``Components`` of the source: addresses."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("shift", "scale", "offset", "level", "reach")),
        *((name, ctypes.c_void_p) for name in ("center", "shared", "scales", "offsets", "factor")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    ]

    @classmethod
    def of(cls, **tensors: Tensor | None) -> Components:
        """Of contiguous tensors, float32, which must outlive the call."""
        return cls(**{name: row.data_ptr() for name, row in tensors.items() if row is not None})


_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "rows_forward": [*[_POINTER] * 2, Coefficients, *[_SIZE] * 3, _INT],
    "rows_backward": [*[_POINTER] * 5, Coefficients, *[_SIZE] * 3, _INT],
    "vectors_forward": [*[_POINTER] * 4, Coefficients, *[_SIZE] * 3, _FLOAT, *[_INT] * 2],
    "vectors_backward": [*[_POINTER] * 7, Coefficients, *[_SIZE] * 4, *[_INT] * 2],
    "combine": [*[_POINTER] * 2, Components, *[_SIZE] * 4, *[_INT] * 2],
}

_MAY_FAIL = ("combine",)  # for want of memory: then they return 0


def call(name: str, dtype: torch.dtype, *arguments: Any, work: int = 0) -> None:
    """Run a kernel of the source: tensors are given as they are, the number of threads is torch's.

    Args:
        name: without the dtype.
        dtype: of ``x``, one of ``DTYPES``.
        *arguments: as in the source, but for the threads.
        work: numbers to be computed with, where they are more than the largest tensor has.

    Raises:
        MemoryError: there was not enough.
    """
    addresses = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    size = max(work, *(argument.numel() for argument in arguments if isinstance(argument, Tensor)))
    threads = torch.get_num_threads() if size >= _FEWEST_FOR_THREADS else 1
    if getattr(library(), f"{name}_{DTYPES[dtype]}")(*addresses, threads) == 0:
        raise MemoryError(f"{name} of {size:,} numbers found no memory for its tables.")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, from the cache or compiled now (some seconds, once a machine); None where they can't be."""
    command = compiler()
    if command is None:
        return None
    options = [*_FLAGS, *_openmp_of_torch()]
    try:
        mark = "\0".join(
            [*(path.read_text() for path in [*SOURCES, HEADER]), *command, _version(command), *options, _processor()]
        )
        path = cache_folder() / f"{hashlib.sha256(mark.encode()).hexdigest()[:20]}.so"
        if not path.exists():
            _compile([*command, *map(str, SOURCES), *options], path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"The CPU kernels of context normalization are not used, torch's operators are: {output.strip()[-500:]} "
            f"(compiler {' '.join(command)}; CN_HF_KERNELS=reference never compiles).",
            stacklevel=2,
        )
        return None
    for function, types in _ARGUMENTS.items():
        for dtype in DTYPES.values():
            getattr(loaded, f"{function}_{dtype}").argtypes = types
            getattr(loaded, f"{function}_{dtype}").restype = ctypes.c_int if function in _MAY_FAIL else None
    return loaded


def compiler() -> list[str] | None:
    """The C++ compiler: what ``CXX`` names, else on Linux the first of c++, g++, clang++ on the path; None for none."""
    given = os.environ.get("CXX", "").split()
    if sys.platform == "win32" or (given and shutil.which(given[0]) is None):
        return None
    if given or sys.platform != "linux":  # compilers of other systems come without OpenMP
        return given or None
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    return None if found is None else [found]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cn_hf" / "kernels"


def _compile(command: list[str], path: Path) -> None:
    """Compile to ``path``, which is there whole or not at all, however many processes do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=_SECONDS)
        made.replace(path)


def _openmp_of_torch() -> list[str]:
    """The OpenMP runtime torch came with, linked first: two in one process would each have threads of their own."""
    folder = Path(torch.__file__).parent
    names = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*")
    places = (folder / "lib", folder.parent / "torch.libs")
    found = next((path for place in places for name in names for path in sorted(place.glob(name))), None)
    return [] if found is None else ["-Wl,--as-needed", str(found)]


def _version(command: list[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout


def _processor() -> str:
    """What tells processors apart that ``-march=native`` compiles differently for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
