"""Timing side by side: every contestant has its turn in every round, so that what else the machine does meets all.

On a CPU by the clock. On a GPU by events on its stream; what is captured as a CUDA graph is timed by replays, so that
small kernels are not measured by how fast Python launches them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from scripts.benchmark.settings import Settings

__all__ = ["in_turn", "peak_bytes", "saved_bytes", "seconds_in_turn", "wait"]

Run = Callable[[], object]

_MOST_CALLS = 200  # in one turn


def seconds_in_turn(
    runs: Mapping[str, Run],
    settings: Settings,
    *,
    title: str,
    graphs: bool = False,
    eager: Collection[str] = (),
    host_clock: bool = False,
    calls: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of each contestant, one number a round, after a warm-up.

    Args:
        runs: The contestants: functions that do the work once.
        settings: Device and rounds.
        title: Before the progress bar.
        graphs: Capture the calls of a turn as a CUDA graph where the device is a GPU.
        eager: Contestants that cannot be captured, since they wait for the device.
        host_clock: Time by the host's clock on a GPU, too: for what costs the host time.
        calls: In one turn; None: as many as fill a turn.
    """
    turns = {}
    for name, run in runs.items():
        capture = graphs and settings.on_gpu and name not in eager
        turns[name] = _turn(run, settings, capture=capture, host_clock=host_clock, calls=calls)
    return in_turn(turns, settings, title=title)


def in_turn(turns: Mapping[str, Callable[[], float]], settings: Settings, *, title: str) -> dict[str, list[float]]:
    """Yield the result of each contestant's turn, round after round; each round begins with another contestant."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = [*turns]
    with tqdm(total=settings.rounds, desc=title, leave=False, disable=not settings.progress) as bar:
        for number in range(settings.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(turns[name]())
            bar.update()
    return found


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(call: Callable[[], object], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward keeps for backward, each storage counted once.

    Args:
        call: The forward; its result holds the graph.
        without: Tensors whose storages do not count, such as parameters.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, Tensor] = {}  # alive until all are counted, so that no storage comes twice at one address

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    count = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)
    del output
    return count


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory of a CUDA device that a call takes beyond what was there, after a call that does not count."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ------------------------------------------------------------------------------------------------------------ one turn


def _turn(run: Run, settings: Settings, *, capture: bool, host_clock: bool, calls: int | None) -> Callable[[], float]:
    """A function that runs a contestant's turn and gives the seconds of one call; warmed up."""
    clock = _events if settings.on_gpu and not host_clock else partial(_host, settings.device)
    for _ in range(2):
        run()
    if calls is None:
        turn = settings.of(full=0.02, quick=0.004, smoke=0.0, gpu=0.004)
        calls = min(max(1, round(turn / clock(run))), _MOST_CALLS)
    all_calls = _captured(run, calls) if capture else partial(_repeat, run, calls)
    all_calls()
    return partial(_seconds_of_call, clock, all_calls, calls)


def _repeat(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()


def _captured(run: Run, calls: int) -> Run:
    """The calls as a CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _repeat(run, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _repeat(run, calls)
    return graph.replay


def _seconds_of_call(clock: Callable[[Run], float], all_calls: Run, calls: int) -> float:
    return clock(all_calls) / calls


def _host(device: torch.device, run: Run) -> float:
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def _events(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # likewise
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
