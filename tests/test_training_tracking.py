"""Trackers: what is refused, and what a tensorboard file holds in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.training.config import TrainingConfig
from cn_hf.training.tracking import check_trackers, start_trackers


def config(*trackers: str) -> TrainingConfig:
    return TrainingConfig(
        model="m", dataset=("one", "two"), trackers=trackers, norm_options={"eps": 0.001}, mode="cn-channels"
    )


def test_unknown_and_missing_trackers() -> None:
    check_trackers(())
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(("tensorbord",))
    with pytest.raises(ConfigError, match="unknown tracker 'all'"):
        check_trackers(("all",))
    installed = set(map(str, get_available_trackers()))
    missing = sorted(str(kind) for kind in LoggerType if kind != LoggerType.ALL and str(kind) not in installed)
    if not missing:
        pytest.skip("every tracker that accelerate knows is installed")
    with pytest.raises(ConfigError, match=f"{missing[0]!r} is not installed; pip install {missing[0]}"):
        check_trackers((missing[0],))


def test_no_trackers(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, config(), tmp_path)
    accelerator.log({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_tensorboard_needs_a_folder() -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    with pytest.raises(ConfigError, match="'tensorboard' writes files; give an output_dir"):
        start_trackers(Accelerator(cpu=True), config("tensorboard"), None)
    with pytest.raises(ConfigError, match="more than once"):
        check_trackers(("tensorboard", "tensorboard"))


def test_tensorboard_file_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 6), (4, 8)):  # killed at step 6, resumed from the checkpoint of step 4
        accelerator = Accelerator(cpu=True)
        start_trackers(accelerator, config("tensorboard"), tmp_path, step=first)
        for step in range(first + 1, last + 1):
            accelerator.log({"train/loss": 1 / step}, step=step)
        for tracker in accelerator.trackers:
            tracker.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"cn_hf", "run_id"}
    events = EventAccumulator(str(tmp_path / "logs" / "cn_hf"))
    events.Reload()
    losses = [(event.step, round(event.value, 6)) for event in events.Scalars("train/loss")]
    assert losses == [(step, round(1 / step, 6)) for step in range(1, 9)]
    options = next((tmp_path / "logs" / "cn_hf").glob("*/hparams.yml")).read_text()
    for line in ("norm_options.eps: 0.001", "dataset: one, two", "trackers: tensorboard", "patience: null"):
        assert line in options


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    ids = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        start_trackers(accelerator, config("tensorboard"), tmp_path)
        accelerator.trackers[0].finish()
        ids.append((tmp_path / "logs" / "run_id").read_text())
    assert ids[0] == ids[1] != ""


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    (tmp_path / "logs").touch()
    with pytest.raises(CheckpointError, match="trackers' folder"):
        start_trackers(Accelerator(cpu=True), config("tensorboard"), tmp_path)
