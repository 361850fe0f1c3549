"""Whose an output folder is: refused, resumed, overwritten, and never emptied of what is not a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.training.config import TrainingConfig
from cn_hf.training.run_folder import RESULTS, check_folder, claim_folder

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
