"""Every block of the README runs as written; only the Hub's data set names are replaced by small local copies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def local_data(tmp_path_factory) -> dict[str, str]:
    """Folders with the schema of the data sets the README names."""
    rng = np.random.default_rng(0)
    labels = {
        "uoft-cs/cifar10": {"label": [f"class{i}" for i in range(10)]},
        "uoft-cs/cifar100": {
            "fine_label": [f"fine{i}" for i in range(100)],
            "coarse_label": [f"coarse{i}" for i in range(20)],
        },
    }
    folders = {}
    for name, columns in labels.items():
        folder = tmp_path_factory.mktemp(name.replace("/", "-"))
        for split, size in (("train", 300), ("test", 100)):
            features = Features({"img": Image(), **{key: ClassLabel(names=names) for key, names in columns.items()}})
            rows = {key: rng.integers(len(names), size=size).tolist() for key, names in columns.items()}
            rows["img"] = list(rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8))
            Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        folders[name] = str(folder)
    return folders


def with_local_data(text: str, local_data: dict[str, str]) -> str:
    for name in sorted(local_data, key=len, reverse=True):
        text = text.replace(name, local_data[name])
    return text


def test_python_blocks(local_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 6
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(with_local_data(block, local_data), "README.md", "exec"), namespace)
    assert namespace["known"].shape == namespace["unknown"].shape == (4, 1000)
    assert namespace["superclasses"].num_contexts == 20
    assert (tmp_path / "vit-day-night" / "model.safetensors").is_file()
    assert (tmp_path / "norms-only" / "context_norm.safetensors").stat().st_size < 2_000_000


def test_training_and_hub_blocks(local_data, tmp_path):
    demo, tests, training, hub, _, _ = blocks("bash")
    assert "cn-hf demo" in demo
    assert "pytest" in tests
    command = with_local_data(training, local_data)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cn-hf").write_text(f'#!/bin/sh\nexec {sys.executable} -m cn_hf "$@"\n')
    (tmp_path / "bin" / "cn-hf").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PATH": path}
    run = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    written = {file.name for file in (tmp_path / "runs" / "cifar10-cn").iterdir()}
    assert "results.json" in written
    assert "masked baseline" in run.stdout.lower()

    PIL.Image.fromarray(np.zeros((50, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    for name in ("photos/a.png", "more/deep/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("c.png\n")
    for words, line in zip(("README.md", "contexts: 3", "photo.jpg", ""), hub.splitlines(), strict=True):
        run = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        assert words in run.stdout
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + 3


def test_day_for_night_block(tmp_path):
    """Three places by day and by night, eight images of each."""
    rng = np.random.default_rng(0)
    rows = {"image": [], "label": [], "identity": []}
    for place, night in [(place, night) for place in range(3) for night in (0, 1)] * 8:
        image = rng.integers(0, 120, (40, 40, 3)) + 20 * place
        rows["image"].append((image // (4 if night else 1)).astype(np.uint8))
        rows["label"].append(night)
        rows["identity"].append(f"place {place}")
    names = {"label": ClassLabel(names=["day", "night"]), "identity": Value("string")}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), **names}))
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "places" / "data" / f"{split}-00000-of-00001.parquet")
    PIL.Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    training, restyling = blocks("bash")[5].splitlines()
    training = training.replace("FOLDER", str(tmp_path / "places"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    for command in (f"{training} --epochs 2 --image-size 32 --batch-size 12 --no-progress", restyling):
        words = command.replace("cn-hf ", "python -m cn_hf.cli ").split()[1:]
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    day, night = (np.asarray(PIL.Image.open(tmp_path / name)) for name in ("photo.jpg", "photo-by-night.jpg"))
    assert night.shape == day.shape
    assert night.mean() < day.mean()


def test_reproduce_block(tmp_path):
    program, *arguments = blocks("bash")[4].split("#")[0].split()
    assert program == "cn-hf"
    run = subprocess.run(
        [sys.executable, "-m", "cn_hf.cli", *arguments, "--list"],  # what it would run; test_experiments_runs runs some
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert sum("to do" in line for line in run.stdout.splitlines()) == 4 * 3
