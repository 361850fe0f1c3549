"""Several processes train as one does with the same global batches, and none waits for one that has failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import CONFIG, Starter, finish, outcome

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


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failing_process_ends_the_run_with_its_own_error(tmp_path: Path, failing_rank: int) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "FAILING_RANK": str(failing_rank),
        "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "row 7 is broken" in ended.stderr, ended.stderr[-3000:]
    own = [line for line in ended.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert own[0].startswith("error"), own
    assert time.perf_counter() - started < 120
