"""Sums, lists and errors of all processes: in two that gloo joins, and in one alone."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_together

from cn_hf.errors import CheckpointError, ConfigError, TrainingError
from cn_hf.processes import explain_lost_process, gathered, num_processes, on_main, summed, together


def fail(error: Exception) -> NoReturn:
    raise error


def test_alone_nothing_is_sent() -> None:
    assert num_processes() == 1
    values = torch.ones(2)
    assert summed(values) is values
    assert gathered([1, 2]) == [1, 2]
    assert together(lambda: 3) == on_main(lambda: 3) == 3
    for share in (together, on_main):
        with pytest.raises(KeyError) as caught:
            share(lambda: fail(KeyError("own")))
        assert type(caught.value) is KeyError


def test_an_error_of_one_process_alone_is_not_explained_away() -> None:
    with pytest.raises(RuntimeError, match="Connection closed by peer"), explain_lost_process():
        raise RuntimeError("Connection closed by peer")


def work(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert num_processes() == 2
    values = torch.tensor([1.0, rank], dtype=torch.float64, requires_grad=True)
    assert summed(values).tolist() == [2, 1]
    assert values.tolist() == [1, rank]
    assert gathered([rank] * (rank + 1)) == [0, 1, 1]
    assert on_main(lambda: ("of", dist.get_rank())) == ("of", 0)
    assert together(lambda: rank) == rank

    with pytest.raises(CheckpointError, match=r"^full$") as main:
        on_main(lambda: fail(CheckpointError("full")))
    assert main.value.said_elsewhere == (rank == 1)
    with pytest.raises(KeyError if rank == 0 else TrainingError, match="lost") as other:
        on_main(lambda: fail(KeyError("lost")))
    assert rank == 0 or str(other.value) == "KeyError: 'lost'"
    with pytest.raises(ConfigError, match=r"^process 1: wrong$" if rank == 0 else r"^wrong$") as one:
        together(lambda: fail(ConfigError("wrong")) if rank == 1 else None)
    assert one.value.said_elsewhere == (rank == 0)
    assert gathered([rank]) == [0, 1]  # all still go together

    with pytest.raises(RuntimeError, match="own matter"), explain_lost_process():
        raise RuntimeError("own matter")
    with pytest.raises(TrainingError, match="Another process of this run has ended"), explain_lost_process():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:42")


def test_two_processes() -> None:
    run_together(work, free_port())
