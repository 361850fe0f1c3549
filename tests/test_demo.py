"""``cn-hf demo``, run once as a user runs it, and its data."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cn_hf
from cn_hf.errors import CheckpointError
from cn_hf.recipes.demo.data import DOMAINS, IMAGE_SIZE, demo_domains, in_domain, strokes
from cn_hf.recipes.demo.run import run_demo

SECONDS = 60  # of processor time, on one thread, with all imports


def test_images_are_standardised_one_by_one() -> None:
    x, labels = strokes()
    assert x.shape == (1797, 1, IMAGE_SIZE, IMAGE_SIZE)
    assert sorted(set(labels.tolist())) == list(range(10))
    for name in ["clean", *DOMAINS]:
        images = in_domain(name, x[:50], 0)
        torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(50), atol=1e-5, rtol=0)
        torch.testing.assert_close(images.std((1, 2, 3)), torch.ones(50), atol=1e-4, rtol=0)
        assert torch.equal(images, in_domain(name, x[:50], 0))
        if name not in ("clean", "blur", "thick", "thin"):  # those draw nothing
            assert not torch.equal(images, in_domain(name, x[:50], 1))


def test_training_and_test_digits_are_apart_and_tests_are_paired() -> None:
    images, labels, domains = demo_domains(0)
    assert (len(images), len(labels), len(domains.labels)) == (1200, 1200, 497)
    assert domains.shifted == list(DOMAINS)
    assert {len(test) for test in domains.test.values()} == {497}
    assert torch.equal(domains.unlabelled["clean"], images)
    seen = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in seen for image in domains.test["clean"])


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
    accuracy = results["accuracy"]
    for name in accuracy:
        assert name in finished.stdout
    mean = {name: sum(row[domain] for domain in DOMAINS) / len(DOMAINS) for name, row in accuracy.items()}
    trained, known = "as trained (each image standardised)", "CN, 64 images a domain"
    assert accuracy[trained]["clean"] > 0.95
    assert accuracy[known]["clean"] == accuracy[trained]["clean"]
    assert mean[known] > mean[trained] + 0.2
    assert mean[known] > mean["batch norm of mixed batches of 200"] + 0.2
    assert mean["CN, contexts predicted"] > mean[trained] + 0.15
    assert mean["CN, shuffled contexts (control)"] < mean[known] - 0.2
    assert mean["one context for all domains"] < mean[known] - 0.2
    assert list(results["accuracy_over_images"]) == ["2", "8", "32", "128"]
    assert "same accuracy" in finished.stdout
    assert "cn-hf inspect" in finished.stdout
    assert (folder / "mine.txt").read_text() == "mine"
    pictures = ["accuracy.png", "domains.png", "images.png"]
    assert sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) == sorted(
        [*pictures, "checkpoint", "mine.txt", "results.json", "table.md"]
    )
    for picture in pictures:
        assert min(Image.open(folder / picture).size) > 100

    model = cn_hf.from_pretrained(folder / "checkpoint")
    assert model.context_config.context_names == ("source", *DOMAINS)
    assert model(torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE)).shape == (2, 10)
