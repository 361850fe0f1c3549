"""Several processes that gloo joins, and how they end.

A process group that DistributedDataParallel or FSDP used outlives ``destroy_process_group``, and so do its threads
(torch 2.15). One of them that lets go of a tensor while the interpreter ends aborts the process:
"terminate called without an active exception" (github.com/pytorch/pytorch/issues/190489). So processes end here
without the interpreter's end.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch.multiprocessing as mp


def free_port() -> int:
    """A port of this machine that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_together(work: Callable[..., None], *args: Any, processes: int = 2) -> None:
    """Call ``work(rank, *args)`` in processes of their own; a fork server's children end by ``os._exit``."""
    mp.start_processes(work, args, nprocs=processes, start_method="forkserver")


def leave() -> NoReturn:
    """End a script that all went well in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
