"""Memory: the peak of a run, and what would fit where its first batch does not.

A GPU says when it is full. A CPU does so only under a limit (``ulimit -v``, a strict overcommit policy); without one,
Linux kills the process, and no program can catch that.
"""

from __future__ import annotations

import ctypes
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import release_memory

from cn_hf.errors import ConfigError
from cn_hf.training.config import TrainingConfig

__all__ = [
    "keep_freed_memory",
    "largest_fitting_batch",
    "memory_in_words",
    "out_of_memory",
    "out_of_memory_message",
    "peak_memory",
]

# What errors say where no type of its own tells them apart.
_ONEDNN = "could not create a primitive"  # gives no reason
_SIGNS = (
    _ONEDNN,
    "out of memory",  # CUDA, HIP, XPU, MPS
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
# The answer of largest_fitting_batch is this part of itself below the truth at most.
_PRECISION = 1 / 16


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most memory ever in use, in bytes.

    On CUDA what tensors took on ``device``, without the allocator's cache and CUDA's own; elsewhere the resident set of
    this process, with its libraries.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        # A program started by a larger one inherits that one's ru_maxrss, but not its VmHWM.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix only

    kibibytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes


def keep_freed_memory() -> bool:
    """Let a program that trains on a CPU keep what it frees for its next step, and say whether that was arranged.

    glibc gives large blocks back to the system, and a step that takes them anew spends several percent of its time on
    page faults. The peak is the same; between steps the process stays as large as it was. Where there is an
    accelerator, or another C library, nothing is changed.
    """
    if torch.accelerator.is_available():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; not even a C library of the process, on Windows
        return False
    never_map, never_trim = mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(never_map and never_trim)


def memory_in_words(num_bytes: int) -> str:
    """Bytes as "640 MB", "1.3 GB" or "12 GB", in powers of 1000, to two digits or more."""
    value, unit = num_bytes / 1e6, "MB"
    for larger in ("GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 1 if unit != "MB" and value < 9.95 else 0
    return f"{value:.{digits}f} {unit}"


def out_of_memory(error: BaseException) -> bool:
    """True if ``error`` says that memory was not enough, on a device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def largest_fitting_batch(try_batch: Callable[[int], None], failed: int) -> int | None:
    """The largest number of images that ``try_batch`` runs with, found by bisection to 1/16 of it.

    Called while an out-of-memory error is being handled, it first frees what that error's frames hold, so catch the
    error outside of the function that ran forward and backward: a running frame keeps its tensors.

    Args:
        try_batch: Runs forward and backward with so many images, and leaves no gradient or output behind. What a step
            needs besides, such as an optimizer's state, counts only if it is there.
        failed: A number of images that does not fit.

    Returns:
        A number of images that was tried; 0 if not even one fits; None if it cannot be found out, since the CPU's
        kernels do not recover. Memory is then as free as before.

    Raises:
        ConfigError: ``failed`` is below 1.
        Exception: Whatever ``try_batch`` raises, other than for lack of memory.
    """
    if failed < 1:
        raise ConfigError(f"failed is a number of images that does not fit, 1 or more; got {failed}")
    _clear_frames(sys.exc_info()[1])
    release_memory()
    fitting = 0
    while failed - fitting > max(1.0, fitting * _PRECISION):
        middle = (fitting + failed) // 2
        fits = _fits(try_batch, middle)
        if fits is None:
            return fitting or None
        fitting, failed = (middle, failed) if fits else (fitting, middle)
    return fitting


def out_of_memory_message(
    config: TrainingConfig, *, images: int, fitting: int | None, num_processes: int = 1, divisible: bool = True
) -> str:
    """Return the message for a first batch that does not fit.

    Args:
        config: Of the run.
        images: That went through the network at once in this process, and did not fit.
        fitting: From ``largest_fitting_batch``; None where it is not known.
        num_processes: That share each step's images.
        divisible: Whether a step's images may go through the network in parts.
    """
    asked = f"batch_size is {config.batch_size}"
    if num_processes > 1:
        asked += f" over {num_processes} processes"
    if config.accumulation_steps > 1:
        asked += f" in {config.accumulation_steps} parts (accumulation_steps)"
    asked = f"the first batch does not fit into memory: {asked}, so {_images(images)} at once in a process"
    lighter = [] if config.mixed_precision in ("fp16", "bf16") else ["mixed_precision bf16"]
    lighter += ["a smaller image_size or network"]
    if fitting is None:
        parts = ["more accumulation_steps"] if divisible else []
        return f"{asked}; try {', '.join(['a smaller batch_size', *parts, ' or '.join(lighter)])}"
    if fitting == 0:
        return f"{asked}, and not even one fits; try {' or '.join(lighter)}"
    # Parts as large as fit leave nothing for the optimizer's state, which the first step still has to make.
    part = max(1, math.floor(fitting * 0.9))
    steps = math.ceil(config.batch_size / (part * num_processes))
    return (
        f"{asked}; about {fitting} would fit. Give accumulation_steps {steps} (the same images in {steps} parts) or "
        f"a batch_size of at most {part * num_processes}, or save memory by {' or '.join(lighter)}"
    )


def _fits(try_batch: Callable[[int], None], images: int) -> bool | None:
    """True if ``try_batch`` runs; None where its failure leaves that open."""
    try:
        try_batch(images)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        # After this, oneDNN makes no new kernel in this process, however much memory there is.
        return None if _ONEDNN in str(error) else False
    finally:
        release_memory()
    return True


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables, such as activations, of the finished calls that an error and its causes came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
