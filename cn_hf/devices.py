"""The devices of this machine by the names users give, its CPU cores and torch's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cn_hf.errors import ConfigError

__all__ = ["available_device", "torch_threads", "usable_cores"]


def available_device(name: torch.device | str) -> torch.device:
    """The device of that name, which tensors can be put on here.

    Raises:
        ConfigError: There is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # by what torch was built with
        kind = torch.accelerator.current_accelerator()
        here = ["cpu", *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"device {str(name)!r} cannot be had: {reason}. Here there is {', '.join(here)}.") from error
    return device


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many of torch's CPU threads within the block; None: as many as before.

    Raises:
        ConfigError: ``count`` is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
