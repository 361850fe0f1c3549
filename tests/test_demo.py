"""``cn-hf demo``, run once as a user runs it, and its data."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cn_hf
from cn_hf.errors import CheckpointError
from cn_hf.recipes.demo.data import (
    DOMAINS,
    IMAGE_SIZE,
    SPLITS,
    digits_in_two_domains,
    tile_corners,
    write_sample_sheet,
)
from cn_hf.recipes.demo.run import fitted_domain_source, run_demo, source_agreement

SECONDS = 90


@pytest.fixture(scope="module")
def splits():
    return digits_in_two_domains()


def test_every_digit_is_in_both_domains_of_one_split(splits) -> None:
    assert {name: len(split) for name, split in splits.items()} == {"train": 2200, "validation": 400, "test": 994}
    for split in splits.values():
        assert split["domain"] == [0, 1] * (len(split) // 2)
        labels = np.array(split["label"])
        assert (labels[::2] == labels[1::2]).all()
        assert set(labels) == set(range(10))


def test_plain_is_gray_and_photo_is_its_stroke_over_a_photograph(splits) -> None:
    test = splits["test"][:40]["image"]
    plain = np.stack([np.asarray(image, dtype=float) for image in test[::2]])
    photo = np.stack([np.asarray(image, dtype=float) for image in test[1::2]])
    assert plain.shape == photo.shape == (20, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert (plain == plain[..., :1]).all()
    assert (photo.std(axis=(1, 2, 3)) > 5).all()
    # Where the stroke is full the photograph is inverted, where there is none it is as it was: undo it and look.
    stroke = plain / 255
    clear = np.abs(1 - 2 * stroke) > 0.5
    background = np.where(clear, (photo - 255 * stroke) / np.where(clear, 1 - 2 * stroke, 1), 0)
    assert background.min() > -4
    assert background.max() < 259


def test_splits_share_no_digit_and_no_part_of_a_photograph() -> None:
    rows = [row for split in SPLITS.values() for row in split]
    assert sorted(rows) == list(range(1797))
    shapes = [(427, 640, 3), (427, 640, 3)]
    seen = np.zeros((2, 427, 640), dtype=int)
    for split in SPLITS:
        tiles = tile_corners(split, shapes)
        assert {tile[0] for tile in tiles} == {0, 1}
        for photograph, top, left, height, width in tiles:
            seen[photograph, top : top + height, left : left + width] += 1
    assert seen.max() == 1
    assert seen.mean() > 0.98


def test_data_is_the_same_for_a_seed(splits) -> None:
    again, other = digits_in_two_domains(0)["validation"], digits_in_two_domains(1)["validation"]
    first = [np.asarray(image) for image in splits["validation"][:10]["image"]]
    assert all((a == np.asarray(b)).all() for a, b in zip(first, again[:10]["image"], strict=True))
    assert any((a != np.asarray(b)).any() for a, b in zip(first, other[:10]["image"], strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_source_names_the_domains(seed: int) -> None:
    data = digits_in_two_domains(seed)
    source = fitted_domain_source(data["train"])
    assert sorted(source.names) == sorted(DOMAINS)
    agreement = source_agreement(source, data)
    assert min(agreement.values()) > 0.9


def test_sample_sheet(splits, tmp_path: Path) -> None:
    write_sample_sheet(splits["train"], tmp_path / "sheet.png", columns=4, zoom=1)
    assert Image.open(tmp_path / "sheet.png").size == (4 * IMAGE_SIZE, 4 * IMAGE_SIZE)
    write_sample_sheet(splits["train"].select(range(6)), tmp_path / "sheet.png", columns=3, zoom=1)
    assert Image.open(tmp_path / "sheet.png").size == (3 * IMAGE_SIZE, 2 * IMAGE_SIZE)


def test_an_output_folder_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run_demo(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_from_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "cn-hf-demo"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    (folder / "results.json").write_text("of an earlier run")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "cn_hf.cli", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=800,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    # Its one thread's own time: what it takes on a machine with nothing else to do, to which waiting adds little.
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < SECONDS, f"{used:.0f} s of processor time"

    results = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row["top_1"] for row in results["evaluation"]["rows"]}
    for name, accuracy in rows.items():
        assert name in finished.stdout
        assert accuracy is not None, name
    needed = ["true contexts", "CN+ (batch, sqrt_t)", "CN+ (learned, none)", "predict", "average", "shuffled contexts"]
    assert list(rows)[: len(needed)] == needed
    assert sum("masked baseline" in name for name in rows) == 2
    assert rows["true contexts"] > 0.75
    assert rows["context-only floor"] < 0.2
    assert list(results["history"]) == ["BN", "no norm", "CN"]
    assert results["reloaded"]["true contexts"] == rows["true contexts"]
    assert "same accuracy" in finished.stdout
    assert (folder / "mine.txt").read_text() == "mine"
    pictures = ["contexts.png", "curves.png", "protocols.png", "samples.png"]
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [*pictures, "checkpoint", "mine.txt", "results.json", "table.md"]
    )
    for picture in pictures:
        assert min(Image.open(folder / picture).size) > 100

    model = cn_hf.from_pretrained(folder / "checkpoint")
    assert sorted(model.context_config.context_names) == sorted(DOMAINS)
    cn_hf.set_inference(model, "predict")
    assert model(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)).shape == (2, 10)
