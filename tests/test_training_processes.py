"""Several processes train as one does with the same global batches, and none waits for one that has failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port, run_together
from training_runs import CONFIG, Starter, finish, outcome

from cn_hf.norm.fused import agreement, native
from cn_hf.training.preparation import make_accelerator

# 46 images in batches of 6: the last batch has 4, and an epoch 8 steps.
# Adam would make steps of full size from gradients that are nothing but rounding (a bias before a batch norm).
SAME = CONFIG.replace(checkpoint_steps=None, accumulation_steps=1, optimizer="sgd")


@pytest.mark.parametrize(
    ("kind", "processes", "dtype", "tolerance"),
    [
        *((kind, processes, torch.float64, 1e-8) for kind in ("cn", "bn", "mn") for processes in (2, 3)),
        *((kind, 2, torch.float32, 1e-5) for kind in ("cn", "bn", "mn")),
        ("unused", 2, torch.float64, 1e-8),
    ],
)
def test_weights_of_one_process(
    start: Starter, tmp_path: Path, kind: str, processes: int, dtype: torch.dtype, tolerance: float
) -> None:
    for folder, number in (("one", 1), ("several", processes)):
        (tmp_path / folder).mkdir()
        finish(start(tmp_path / folder, number, config=SAME, kind=kind, dtype=dtype))
    one, several = outcome(tmp_path / "one"), outcome(tmp_path / "several")
    assert one["history"]["step"] == several["history"]["step"] == [8, 16, 24]
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            several["weights"][name], value, rtol=tolerance, atol=tolerance, msg=f"{kind} {name}"
        )
    assert several["history"]["train_loss"] == pytest.approx(one["history"]["train_loss"], abs=1e-5)
    assert several["history"]["validation_loss"] == pytest.approx(one["history"]["validation_loss"], abs=1e-5)
    assert several["history"]["validation_accuracy"] == one["history"]["validation_accuracy"]


@pytest.mark.parametrize("kind", ["cn", "bn", "mn"])
def test_sharded_weights_are_those_of_one_process(start: Starter, tmp_path: Path, kind: str) -> None:
    for folder, number in (("one", 1), ("several", 2)):
        (tmp_path / folder).mkdir()
        finish(start(tmp_path / folder, number, config=SAME, kind=kind, fsdp=number > 1))
    one, several = outcome(tmp_path / "one"), outcome(tmp_path / "several")
    assert one["history"]["step"] == several["history"]["step"] == [8, 16, 24]
    for name, value in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], value, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


def test_accumulation_in_several_processes(start: Starter, tmp_path: Path) -> None:
    for folder, number, parts in (("one", 1, 1), ("several", 2, 3)):
        (tmp_path / folder).mkdir()
        config = SAME.replace(accumulation_steps=parts, ema_decay=None, keep_best=False)
        finish(start(tmp_path / folder, number, config=config, kind="cn without bn"))
    one, several = outcome(tmp_path / "one"), outcome(tmp_path / "several")
    for name, value in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], value, rtol=1e-5, atol=1e-5, msg=name)


FAILING = """
import os, sys
import torch
from cn_hf.cli import run_app
from cn_hf.errors import DatasetError
import training_runs, typer

class Failing:
    def __init__(self, batches):
        self.batches = batches
    def __getattr__(self, name):
        return getattr(self.batches, name)
    def __len__(self):
        return len(self.batches)
    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == 3 and os.environ["RANK"] == os.environ["FAILING_RANK"]:
                if os.environ["FAILS_BY"] == "kill":
                    os.kill(os.getpid(), 9)
                raise DatasetError("row 7 is broken")
            yield batch

original = training_runs.batches
training_runs.batches = lambda *a, **k: Failing(original(*a, **k))
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def main():
    training_runs.train(sys.argv[0] + ".run", sys.argv[0] + ".result",
        rank=int(os.environ["RANK"]), processes=2, port=int(os.environ["MASTER_PORT"]))
run_app(app)
"""


def failing_script(folder: Path, rank: int, by: str) -> tuple[str, dict[str, str]]:
    script = folder / "failing.py"
    script.write_text(FAILING)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    own = {"ACCELERATE_USE_CPU": "true", "FAILING_RANK": str(rank), "FAILS_BY": by, "PYTHONPATH": path}
    return str(script), {**os.environ, **own}


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failing_process_ends_the_run_with_its_own_error(tmp_path: Path, failing_rank: int) -> None:
    script, environment = failing_script(tmp_path, failing_rank, "error")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    own = [line for line in ended.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert own[0].startswith("error"), own
    assert "row 7 is broken" in own[0], ended.stderr[-3000:]
    assert "gloo" not in ended.stderr


@pytest.mark.parametrize("killed", [1])
def test_what_is_left_of_a_run_says_that_a_process_was_killed(tmp_path: Path, killed: int) -> None:
    script, environment = failing_script(tmp_path, killed, "kill")
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, script], env={**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=180)[1] for process in running]
    assert running[killed].returncode == -signal.SIGKILL
    assert running[1 - killed].returncode == 1
    assert said[1 - killed].splitlines()[-1].startswith("error"), said
    assert "Another process of this run has ended" in said[1 - killed]
    assert "Traceback" not in said[1 - killed]


def computes(rank: int, port: int, folder: str, lacking: int | None) -> None:
    """Take down the kernels that a process of a run uses; one of them may lack some."""
    os.environ.update(
        ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    device = torch.device("cpu")
    if rank == lacking:
        agreement.distrust("rows", device, torch.float32, "it is broken here")
        original = agreement.difference
        agreement.difference = lambda *given: "broken" if given[1] == "rows" else original(*given)  # type: ignore[assignment]
        agreement.cpu_kernels.agreed = lambda device: agreement.cpu_kernels.native.Remembered(None)  # type: ignore[assignment]
    make_accelerator(CONFIG)
    used = [name for name in agreement.EXAMPLES if agreement.trusted(name, device, torch.float32)]
    Path(folder, str(rank)).write_text(" ".join(used))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lacking", [None, 1])
def test_all_processes_of_a_run_use_the_same_kernels(tmp_path: Path, lacking: int | None) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler with OpenMP here, so there are no CPU kernels to agree on")
    run_together(computes, free_port(), str(tmp_path), lacking)
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first == second == [name for name in agreement.EXAMPLES if lacking is None or name != "rows"]
