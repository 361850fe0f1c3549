"""Runs that are killed for real, at any moment, and resumed: the end is bit for bit that of a run never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from training_runs import CONFIG, Starter, finish, outcome, release, train

from cn_hf.errors import CheckpointError, ConfigError, TrainingError

KILLS = 24


def assert_same_end(folder: Path, other: Path) -> None:
    ended, expected = outcome(folder), outcome(other)
    assert ended["history"] == expected["history"]
    assert ended["weights"].keys() == expected["weights"].keys()
    for name, value in ended["weights"].items():
        assert torch.equal(value, expected["weights"][name]), name


SECONDS: dict[int, float] = {}


@pytest.fixture(scope="module")
def never_killed(start: Starter, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of runs left alone, by number of processes; how long they take goes into ``SECONDS``."""
    folders = {}
    finish(start(tmp_path_factory.mktemp("first"), 1))  # which starts the server
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"alone{processes}")
        begun = time.perf_counter()
        finish(start(folders[processes], processes))
        SECONDS[processes] = time.perf_counter() - begun
    return folders


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(
    start: Starter, never_killed: dict[int, Path], tmp_path: Path, processes: int
) -> None:
    moments = random.Random(processes)
    kills = finished = 0
    while kills < KILLS // processes or not finished:
        folder = tmp_path / str(finished)
        folder.mkdir(exist_ok=True)
        running = start(folder, processes)
        victim = running[moments.randrange(processes)]
        if kills < KILLS // processes:
            victim.join(moments.uniform(0.1, 0.6) * SECONDS[processes])
            victim.kill()
        victim.join(60)
        for process in running:
            process.join(2)
            process.kill()  # as a launcher does: a process that has not met the others yet would wait for them
            process.join(60)
        kills += victim.exitcode == -signal.SIGKILL
        if (folder / "result.pt").exists():
            assert_same_end(folder, never_killed[processes])
            finished += 1


def test_killed_within_saves(start: Starter, never_killed: dict[int, Path], tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5, 6, 3, 2, 1, 4):
        running = start(tmp_path, 1, die_at_sync=number)
        running[0].join(60)
        assert running[0].exitcode == -signal.SIGKILL
    finish(start(tmp_path, 1))
    assert_same_end(tmp_path, never_killed[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop(start: Starter, never_killed: dict[int, Path], tmp_path: Path, processes: int) -> None:
    running = start(tmp_path, processes, hold_at_sync=6)  # a checkpoint has four; its second one
    while not steps_of(tmp_path):
        time.sleep(0.005)
        assert running[0].is_alive()
    os.kill(running[-1].pid, signal.SIGTERM)
    release(tmp_path)
    for process in running:
        process.join(60)
        assert process.exitcode == 1  # all end, with an error, though only one was asked
    assert not (tmp_path / "result.pt").exists()
    assert steps_of(tmp_path)
    finish(start(tmp_path, processes))
    assert_same_end(tmp_path, never_killed[processes])


def test_sharded_run_killed_and_resumed(start: Starter, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    finish(start(alone, 2, fsdp=True))
    running = start(killed, 2, fsdp=True, hold_at_sync=14)
    while len(steps_of(killed)) < 2:
        time.sleep(0.005)
        assert running[0].is_alive()
    for process in running:
        process.kill()
        process.join(60)
    assert not (killed / "result.pt").exists()
    finish(start(killed, 2, fsdp=True))
    assert_same_end(killed, alone)
    newest = sorted((killed / "run" / "checkpoints").glob("step-*"))[-1]
    assert {"state-00000.pt", "state-00001.pt"} <= {path.name for path in newest.iterdir()}  # each its own part


def test_only_the_last_checkpoints_are_kept(never_killed: dict[int, Path]) -> None:
    steps = steps_of(never_killed[1])
    assert steps == [21, 24]
    assert not list((never_killed[1] / "run" / "checkpoints").glob(".*"))


def killed_run(start: Starter, folder: Path) -> Path:
    """A run stopped after some checkpoints; its folder of checkpoints."""
    running = start(folder, 1, hold_at_sync=10)  # after the second
    while len(steps_of(folder)) < 2:
        time.sleep(0.005)
        assert running[0].is_alive()
    os.kill(running[0].pid, signal.SIGTERM)
    release(folder)
    running[0].join(60)
    return folder / "run" / "checkpoints"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_damaged_last_checkpoint(start: Starter, never_killed: dict[int, Path], tmp_path: Path, damage: str) -> None:
    checkpoints = killed_run(start, tmp_path)
    newest = sorted(checkpoints.glob("step-*"))[-1]
    state = newest / "state-00000.pt"
    content = state.read_bytes()
    if damage == "truncated":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        state.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "missing":
        state.unlink()
    else:
        (newest / "manifest.json").unlink()
    finish(start(tmp_path, 1))
    assert_same_end(tmp_path, never_killed[1])


def test_all_checkpoints_damaged(start: Starter, tmp_path: Path) -> None:
    checkpoints = killed_run(start, tmp_path)
    for state in checkpoints.glob("step-*/state-00000.pt"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: step-\d+ \(state-00000.pt has 0 of"):
        train(str(tmp_path / "run"), str(tmp_path / "result.pt"))


def test_other_config_is_refused(start: Starter, tmp_path: Path) -> None:
    killed_run(start, tmp_path)
    other = CONFIG.replace(learning_rate=0.5, optimizer="sgd", progress=True)
    with pytest.raises(ConfigError, match=r"optimizer was 'adamw', is 'sgd'; learning_rate was 0.01, is 0.5\)"):
        train(str(tmp_path / "run"), str(tmp_path / "result.pt"), config=other)


def test_other_data_is_refused(start: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training_runs

    killed_run(start, tmp_path)
    images, labels, contexts = training_runs.tensors()
    images[40, 0, 0, 0] += 1
    monkeypatch.setattr(training_runs, "tensors", lambda: (images, labels, contexts))
    with pytest.raises(TrainingError, match=r"the training data is not what .* was trained on"):
        train(str(tmp_path / "run"), str(tmp_path / "result.pt"))


def test_history_is_whole_json_at_any_time(never_killed: dict[int, Path]) -> None:
    history = json.loads((never_killed[1] / "run" / "history.json").read_text())
    assert [record["epoch"] for record in history["epochs"]] == [1, 2, 3]
