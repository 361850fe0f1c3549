"""The CPU's fused kernels: ``native_*.cpp``, compiled when first needed, cached, called by ctypes.

Torch's own operators would read and write ``x`` several times over. Where there is no compiler with OpenMP, nothing is
lost but speed: ``library`` is None and ``kernels`` goes on with torch's operators.

Shape legend: ``N`` samples, ``C`` features, ``L`` positions of a sample.
"""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_hf.files import written_whole
from cn_hf.norm.fused.cache import Remembered, intact, private_folder, sweep, write_checksum

__all__ = ["DTYPES", "Coefficients", "Components", "agreed", "call", "compiler", "library", "versions"]

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
        return cls(
            center.data_ptr(),
            scale.data_ptr(),
            None if offset is None else offset.data_ptr(),
            0 if center.shape[0] == 1 else center.stride(0),
            0 if scale.shape[0] == 1 else scale.stride(0),
            0 if offset is None or offset.shape[0] == 1 else offset.stride(0),
        )


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
    addresses, size = [], work
    for argument in arguments:
        if isinstance(argument, Tensor):
            addresses.append(argument.data_ptr())
            size = max(size, argument.numel())
        else:
            addresses.append(argument)
    threads = torch.get_num_threads() if size >= _FEWEST_FOR_THREADS else 1
    if getattr(library(), f"{name}_{DTYPES[dtype]}")(*addresses, threads) == 0:
        raise MemoryError(f"{name} of {size:,} numbers found no memory for its tables.")


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, from the cache or compiled now (some seconds, once a machine); None without them.

    One process compiles while others wait for it. A library that is damaged, or lacks a function, is compiled again.
    """
    command = compiler()
    if command is None:
        return None
    try:
        path = private_folder() / f"{_mark(tuple(command))}.so"
        loaded = _opened(path)
        if loaded is None:
            from filelock import FileLock  # a requirement of torch

            with FileLock(path.with_name("lock"), timeout=2 * _SECONDS):
                loaded = _opened(path) or _compiled(command, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        output = getattr(error, "stderr", None) or str(error).encode()
        warnings.warn(
            "The CPU kernels of context normalization are not used, torch's operators are: "
            f"{output.decode(errors='replace').strip()[-500:]} "
            f"(compiler {' '.join(command)}; CN_HF_KERNELS=reference never compiles).",
            stacklevel=2,
        )
        return None
    return loaded


def agreed(device: torch.device) -> Remembered:
    """Return the names of this library's kernels that agreed with the formulas, in any process of this user."""
    return Remembered(private_folder() / f"{_mark(tuple(compiler() or ()))}.agreed")


def versions() -> str:
    """Return what the kernels were compiled by, in one line."""
    command = compiler()
    compiled_by = "no compiler" if command is None else _version(tuple(command)).partition("\n")[0]
    return f"torch {torch.__version__}, {compiled_by}"


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library in a file; None if it is missing, damaged, or lacks a function."""
    if not intact(path):
        return None
    loaded = ctypes.CDLL(str(path))
    try:
        for function, types in _ARGUMENTS.items():
            for dtype in DTYPES.values():
                getattr(loaded, f"{function}_{dtype}").argtypes = types
                getattr(loaded, f"{function}_{dtype}").restype = ctypes.c_int if function in _MAY_FAIL else None
    except AttributeError:
        _ctypes.dlclose(loaded._handle)  # else the next one of this name would be the same
        return None
    return loaded


def _compiled(command: list[str], path: Path) -> ctypes.CDLL:
    """Compile the sources to ``path``, which holds all of a library or the file of before.

    Raises:
        OSError: the folder cannot be written to, or what was compiled is no such library.
        subprocess.SubprocessError: the compiler failed.
    """
    sweep(path.parent)
    with written_whole(path) as made:
        options = [*_FLAGS, *_openmp_of_torch(), "-o", str(made)]
        subprocess.run([*command, *map(str, SOURCES), *options], check=True, capture_output=True, timeout=_SECONDS)
    write_checksum(path)
    loaded = _opened(path)
    if loaded is None:
        raise OSError(f"Expected {path} to hold the kernels just compiled, and it does not.")
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


@cache
def _mark(command: tuple[str, ...]) -> str:
    """A hash of everything that a library depends on."""
    sources = [path.read_text(encoding="utf-8") for path in [*SOURCES, HEADER]]
    options = [*_FLAGS, *_openmp_of_torch(), torch.__version__]
    mark = "\0".join([*sources, *command, _version(command), *options, _processor()])
    return hashlib.sha256(mark.encode(errors="replace")).hexdigest()[:20]


def _openmp_of_torch() -> list[str]:
    """The OpenMP runtime torch came with, linked first: two in one process would each have threads of their own."""
    folder = Path(torch.__file__).parent
    names = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*")
    places = (folder / "lib", folder.parent / "torch.libs")
    found = next((path for place in places for name in names for path in sorted(place.glob(name))), None)
    return [] if found is None else ["-Wl,--as-needed", str(found)]


@cache
def _version(command: tuple[str, ...]) -> str:
    output = subprocess.run([*command, "--version"], capture_output=True, timeout=_SECONDS).stdout
    return output.decode(errors="replace")


def _processor() -> str:
    """Return the features of the processor that ``-march=native`` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
