"""The device of a name that a user gives."""

from __future__ import annotations

import torch

from cn_hf.errors import ConfigError

__all__ = ["available_device"]


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
