"""Load by worker processes, in order; when one dies, one clear error and never a wait without end."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch.utils.data

from cn_hf.errors import DatasetFileError

__all__ = ["iterate"]

Item = TypeVar("Item")

# What reading from a process that is gone can raise; torch's own check raises RuntimeError.
_TRANSPORT_ERRORS = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
# Seconds that a process whose connection broke has to be gone.
_GRACE = 1.0


def iterate(
    source: torch.utils.data.Dataset[Item],
    *,
    num_workers: int,
    sampler: Iterable[int] | None = None,
    pin_memory: bool = False,
) -> Iterator[Item]:
    """The items of a dataset, loaded ahead by worker processes.

    Args:
        source: A map-style dataset, or an iterable one, which a single process reads.
        num_workers: 0 loads in this process.
        sampler: The items and their order, of a map-style dataset; None: all, from the first to the last.
        pin_memory: As of torch's DataLoader.

    Raises:
        DatasetFileError: A worker process died; seconds after the last item that it had sent.
    """
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=pin_memory,
    )
    before = multiprocessing.active_children()
    with _child_death_handler_kept():
        iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    # An error's traceback can keep the iterator for as long as the program lives, whose end would then wait for workers
    # that take no signal to stop.
    stop: Callable[[], None] = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(stop)
    try:
        yield from iterator
    except _TRANSPORT_ERRORS as error:
        dead = _dead(workers)
        if not dead:
            raise
        raise DatasetFileError(
            f"a worker process that reads and decodes images died: {', '.join(map(_cause, dead))}. Use fewer workers "
            "or none (num_workers=0), smaller batches or smaller images; a run that keeps checkpoints can be resumed"
        ) from error
    finally:
        atexit.unregister(stop)
        stop()


def _as_it_is(item: Item) -> Item:
    return item


def _ignore_stop_signals(worker: int) -> None:
    """A signal to the whole group stops the run, which then ends its workers itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _child_death_handler_kept() -> Iterator[None]:
    """Undo torch's handler of dying children, which raises amid whatever the main thread is doing, such as a step.

    Without it torch notices a death when it next waits for a batch.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler: Any = signal.getsignal(number)
    try:
        yield
    finally:
        if handler is not None:  # None: set by other than Python code, and so not for us to set again
            signal.signal(number, handler)


def _dead(workers: Sequence[BaseProcess]) -> list[BaseProcess]:
    if not workers:
        return []
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=_GRACE)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(_GRACE)  # its connections close a moment before its exit code is known
    return [worker for worker in workers if worker.exitcode not in (None, 0)]


def _cause(worker: BaseProcess) -> str:
    code = worker.exitcode
    assert code is not None
    if code >= 0:
        return f"process {worker.pid} exited with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hints = {"SIGKILL": " (most likely memory ran out)", "SIGBUS": " (most likely shared memory, /dev/shm, ran out)"}
    return f"process {worker.pid} was ended by {name}{hints.get(name, '')}"
