"""Sums, lists and errors that all processes of a run share.

Every function here that moves something is a collective: all processes call it, in the same order. A process alone
needs no process group, and pays nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cn_hf.errors import CnHfError, TrainingError

__all__ = ["explain_lost_process", "gathered", "num_processes", "on_main", "share_buffers", "summed", "together"]

Result = TypeVar("Result")

# How the libraries below report that the other end of a connection is gone.
_LOST = ("connection closed", "connection reset", "connection was likely closed", "broken pipe", "connection refused")


def num_processes() -> int:
    """Return the number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes, without gradients where there are several."""
    if num_processes() == 1:
        return values
    total = values.detach().to(_sending_device(values.device), copy=True)
    dist.all_reduce(total)
    return total


def gathered(values: list[Any]) -> list[Any]:
    """Return the processes' lists as one, in the order of their ranks."""
    if num_processes() == 1:
        return values
    lists: list[Any] = [None] * num_processes()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def together(function: Callable[[], Result]) -> Result:
    """Return ``function()`` of this process; where it fails in one of them, all raise.

    Raises:
        Exception: The process's own error, else the first of the others' if that is a ``CnHfError``.
        TrainingError: Another process failed with another error.
    """
    if num_processes() == 1:
        return function()
    own: Exception | None = None
    try:
        result = function()
    except Exception as error:  # of any kind: the others wait for this process
        own = error
    problems = gathered([None if own is None else _as_sent(own)])
    if own is not None:
        raise own
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise _said_elsewhere(type(problem)(f"process {rank}: {problem}"))
    return result


def on_main(function: Callable[[], Result]) -> Result:
    """Return the result of ``function()`` in process 0, which alone calls it; where that fails, all raise its error."""
    if num_processes() == 1:
        return function()
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # of any kind: the others wait for this process
            own, outcome[1] = error, _as_sent(error)
    dist.broadcast_object_list(outcome, src=0)
    if own is not None:
        raise own
    if outcome[1] is not None:
        raise _said_elsewhere(outcome[1])
    result: Result = outcome[0]
    return result


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's running statistics, so that all validate and keep the same network."""
    if num_processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Replace the error of a connection whose other end is gone by one that says so.

    Raises:
        TrainingError: Another process of the run has ended.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        lost = isinstance(error, dist.DistError) or any(sign in words for sign in _LOST)
        if num_processes() == 1 or not lost:
            raise
        raise TrainingError(
            "Another process of this run has ended, so this one cannot go on. Its own message says why; without one it "
            "was killed, for instance for lack of memory. Go on with --resume."
        ) from error


def _as_sent(error: Exception) -> CnHfError:
    """Return the error in a form that every process can read."""
    if isinstance(error, CnHfError):
        return type(error)(str(error))
    return TrainingError(f"{type(error).__name__}: {error}")


def _said_elsewhere(error: CnHfError) -> CnHfError:
    error.said_elsewhere = True
    return error


def _sending_device(device: torch.device) -> torch.device:
    """Return ``device`` if the group can send from it, else the accelerator."""
    accelerator = torch.accelerator.current_accelerator() if device.type == "cpu" else None
    if accelerator is None or "gloo" in str(dist.get_backend()):
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
