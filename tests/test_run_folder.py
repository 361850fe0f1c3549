"""Output folders: refused, resumed, overwritten, locked, missed, and never emptied of what is not a run's."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import CONFIG as RUN_CONFIG
from training_runs import batches, network

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.run import train_adamatch
from cn_hf.recipes.classifier.run import train_classifier
from cn_hf.recipes.demo.run import run_demo
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.recipes.siamese.run import train_siamese
from cn_hf.training.config import TrainingConfig
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.run_folder import RESULTS, OpenFolder, check_folder, claim_folder, held_folder, is_held, started_run
from cn_hf.training.supervised import fit

CONFIG = TrainingConfig(model="x", learning_rate=0.1)


def test_a_new_folder_is_made_and_described(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert claim_folder(folder, CONFIG) is False
    assert TrainingConfig.from_yaml((folder / "config.yaml").read_text()) == CONFIG


def test_files_that_are_no_run_s_do_not_matter_and_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    claim_folder(tmp_path, CONFIG)
    claim_folder(tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_run_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"holds a run that was stopped; .*--resume.*--overwrite"):
        claim_folder(tmp_path, CONFIG)
    (tmp_path / RESULTS).write_text("{}")
    with pytest.raises(CheckpointError, match="holds a finished run"):
        claim_folder(tmp_path, CONFIG)


def test_resume(tmp_path: Path) -> None:
    assert claim_folder(tmp_path, CONFIG, resume=True) is False  # nothing there yet: it begins
    assert claim_folder(tmp_path, CONFIG, resume=True) is False
    (tmp_path / RESULTS).write_text("{}")
    assert claim_folder(tmp_path, CONFIG, resume=True) is True
    assert claim_folder(tmp_path, CONFIG.replace(keep_checkpoints=7, progress=False), resume=True) is True


def test_resume_of_another_config_lists_the_differences(tmp_path: Path) -> None:
    claim_folder(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"epochs was 100, is 7; learning_rate was 0.1, is 0.5"):
        claim_folder(tmp_path, CONFIG.replace(epochs=7, learning_rate=0.5), resume=True)


def test_overwrite_removes_a_run_s_files_only(tmp_path: Path) -> None:
    claim_folder(tmp_path, CONFIG)
    (tmp_path / RESULTS).write_text("{}")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    claim_folder(tmp_path, CONFIG.replace(epochs=7), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "mine", "run.json"]
    assert claim_folder(tmp_path, CONFIG.replace(epochs=7), resume=True) is False


def test_a_folder_like_a_run_s_that_is_none_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: true")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=r"holds config.yaml, but not of a run"):
            claim_folder(tmp_path, CONFIG, **flags)
    assert (tmp_path / "config.yaml").read_text() == "mine: true"


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        claim_folder(tmp_path, CONFIG, resume=True, overwrite=True)


def test_a_damaged_description_is_an_error(tmp_path: Path) -> None:
    claim_folder(tmp_path, CONFIG)
    (tmp_path / "run.json").write_text('{"format": 1, "con')
    with pytest.raises(CheckpointError, match="truncated"):
        claim_folder(tmp_path, CONFIG, resume=True)


def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(CheckpointError, match="cannot be written to"):
        claim_folder(Path("/proc/run"), CONFIG)  # not even by root


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        claim_folder(tmp_path / "run", CONFIG)


def test_a_check_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    assert check_folder(tmp_path, CONFIG) is False
    assert not list(tmp_path.iterdir())
    claim_folder(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    assert check_folder(tmp_path, CONFIG.replace(epochs=7), overwrite=True) is False
    assert (tmp_path / "checkpoints").is_dir()


def test_killed_between_run_json_and_config_yaml(tmp_path: Path) -> None:
    claim_folder(tmp_path, CONFIG)
    (tmp_path / "config.yaml").unlink()
    assert claim_folder(tmp_path, CONFIG, resume=True) is False
    assert TrainingConfig.from_yaml((tmp_path / "config.yaml").read_text()) == CONFIG


# ---------------------------------------------------------------------------------------------------- two at one folder


def test_a_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not is_held(folder)
    with held_folder(folder):
        assert is_held(folder)
        with (
            pytest.raises(CheckpointError, match="belongs to a run that is going on in another process"),
            held_folder(folder),
        ):
            pass
    assert not is_held(folder)
    assert not list(folder.iterdir())
    with held_folder(folder):
        pass


def test_the_lock_of_a_run_whose_folder_was_replaced_is_not_the_other_s(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(held_folder(folder))
        shutil.rmtree(folder)
        second.enter_context(held_folder(folder))
        first.close()
        assert is_held(folder)
        with pytest.raises(CheckpointError, match="going on"), held_folder(folder):
            pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\nfrom cn_hf.training.run_folder import held_folder\n"
        "with held_folder(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path)


RUNS: dict[str, Callable[[Path, dict[str, bool]], object]] = {
    "classifier": lambda folder, flags: train_classifier(
        TrainingConfig(model="test_vit", dataset="none", output_dir=str(folder)), **flags
    ),
    "siamese": lambda folder, flags: train_siamese(SiameseConfig(dataset="none", output_dir=str(folder)), **flags),
    "adamatch": lambda folder, flags: train_adamatch(
        AdaMatchConfig(model="test_vit", dataset=("a", "b"), output_dir=str(folder)), **flags
    ),
    "demo": lambda folder, flags: run_demo(folder, progress=False),
}


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
@pytest.mark.parametrize("kind", RUNS)
def test_a_live_run_s_folder_is_refused_and_left_alone(tmp_path: Path, kind: str, flag: str) -> None:
    with held_folder(tmp_path):
        claim_folder(tmp_path, CONFIG)
        (tmp_path / "checkpoints").mkdir()
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(CheckpointError, match="going on in another process"):
            RUNS[kind](tmp_path, {flag: True})
        assert sorted(path.name for path in tmp_path.iterdir()) == before


# -------------------------------------------------------------------------------------------------- removed meanwhile


@pytest.mark.parametrize("replaced", [False, True])
def test_an_open_folder_is_missed(tmp_path: Path, replaced: bool) -> None:
    with OpenFolder(tmp_path / "run") as folder:
        folder.check()
        (folder.path / "file").touch()
        folder.check()
        shutil.rmtree(folder.path)
        if replaced:
            folder.path.mkdir()
        with pytest.raises(CheckpointError, match="was removed or replaced"):
            folder.check()


class Removing:
    """Training batches; in the second epoch their run's folder is removed."""

    def __init__(self, given: Any, folder: Path) -> None:
        self.given, self.folder, self.epoch = given, folder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def __len__(self) -> int:
        return len(self.given)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch = epoch
        self.given.set_epoch(epoch, start)

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.given):
            if (self.epoch, number) == (1, 2):
                shutil.rmtree(self.folder)
            yield batch


@pytest.mark.parametrize("checkpoint_steps", [1, None])
def test_training_ends_with_an_error_where_its_folder_is_removed(tmp_path: Path, checkpoint_steps: int | None) -> None:
    config = RUN_CONFIG.replace(checkpoint_steps=checkpoint_steps)
    folder = tmp_path / "run"
    train = Removing(batches(config, 0, 1, training=True), folder)
    validation = batches(config, 0, 1, training=False)
    with pytest.raises(CheckpointError, match="was removed or replaced"):
        fit(network(), train, validation, config=config, accelerator=make_accelerator(config), output_dir=folder)
    assert not folder.exists()


def test_results_are_not_written_into_a_folder_that_was_replaced(tmp_path: Path) -> None:
    config = CONFIG.replace(model="test_vit", output_dir=str(tmp_path / "run"))
    with started_run(config, resume=False, overwrite=False, dry_run=False) as run:
        run.claim()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(CheckpointError, match="was removed"), run.writing():
            raise AssertionError("this is not reached")
        (tmp_path / "run").mkdir()
        with pytest.raises(CheckpointError, match="was removed"), run.writing():
            raise AssertionError("this is not reached")
