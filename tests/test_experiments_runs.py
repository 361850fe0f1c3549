"""Experiments run for real: every cell once, a stopped one from where it was, and a report that holds their numbers."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from conftest import SHARED_DATA
from filelock import FileLock
from PIL import Image

import cn_hf.experiments.runner as runner
from cn_hf.data import PreparedData
from cn_hf.errors import ConfigError, DatasetFileError, TrainingInterruptedError
from cn_hf.experiments.cells import Cell, plan_cells, read_epochs, read_result
from cn_hf.experiments.report import write_report
from cn_hf.experiments.runner import reproduce_experiment
from cn_hf.experiments.spec import BUDGETS, Experiment, read_experiment
from cn_hf.training.config import TrainingConfig
from cn_hf.training.run_folder import held_folder

TINY = {
    "title": "Tiny: dots in three colours",
    "options": {
        "model": "cn_digits_convnet", "contexts": "column:time", "batch_size": 16, "optimizer": "adamw", "epochs": 3,
    },
    "measures": {"top-1": {"k": 1}, "night": {"k": 1, "context": "night"}},
    "columns": {
        "dots": {"title": "Dots", "datasets": ["dots"], "options": {"learning_rate": 0.01, "label_column": "label"}},
    },
    "baseline": "bn",
    "rows": {
        "bn": {"title": "BN", "options": {"mode": "none"}, "paper": {"dots": [90.0, None]}},
        "masked": {"title": "BN, masked", "of": "bn", "protocol": "masked baseline"},
        "mn": {"title": "MN", "options": {"mode": "mn", "where": "norms", "num_contexts": 2}},
        "cn": {"title": "CN", "options": {"mode": "cn-channels", "where": "input"}, "paper": {"dots": [95.5, 91.25]}},
        "cn-plus": {"title": "CN+", "of": "cn", "protocol": "CN+ (batch, sqrt_t)"},
    },
    "figures": ["validation_error", "validation_loss", "accuracies", "contexts"],
    "differences": ["dots instead of photographs"],
    "budgets": {name: {"seeds": 2, "summary": f"Budget {name}."} for name in BUDGETS},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder: 60 train and 24 test images, the class being the brightest colour, the time the brightness."""
    folder = tmp_path_factory.mktemp("data") / "dots"
    generator = np.random.default_rng(0)
    labels = datasets.ClassLabel(names=["red", "green", "blue"])
    times = datasets.ClassLabel(names=["day", "night"])
    features = datasets.Features({"image": datasets.Image(), "label": labels, "time": times})
    for split, count in (("train", 60), ("test", 24)):
        rows: dict[str, list[object]] = {"image": [], "label": [], "time": []}
        for number in range(count):
            pixels = generator.integers(0, 90, size=(16, 16, 3))
            pixels[..., number % 3] += 5
            rows["image"].append(Image.fromarray((pixels // (1 + number % 2)).astype(np.uint8)))
            rows["label"].append(number % 3)
            rows["time"].append(number % 2)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        file = str(folder / "data" / f"{split}-00000-of-00001.parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("yaml")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    return read_experiment("tiny", folder)


def tiny_cells(experiment: Experiment, dots: Path, folder: Path) -> list[Cell]:
    places = {"dots": str(dots)}
    return plan_cells(experiment, "small", seeds=None, places=places, output_dir=folder, progress=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that were trained into, in order; the training itself is the real one."""
    folders: list[str] = []
    train = runner.train_classifier

    def counting(config: TrainingConfig, *, resume: bool, data: PreparedData) -> object:
        assert resume
        folders.append(Path(str(config.output_dir)).name)
        return train(config, resume=True, data=data)

    monkeypatch.setattr(runner, "train_classifier", counting)
    return folders


def test_cells_of_the_same_data_share_it(
    tiny: Experiment, dots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    load = runner.load_data

    def counting(config: TrainingConfig, accelerator: Accelerator) -> PreparedData:
        seeds.append(config.seed)
        return load(config, accelerator)

    monkeypatch.setattr(runner, "load_data", counting)
    cells = tiny_cells(tiny, dots, tmp_path / "shared")
    assert run(cells) == {}
    assert len(cells) == 6
    assert seeds == [0, 1]
    alone = tiny_cells(tiny, dots, tmp_path / "alone")[-1]  # after which the others have trained on the same data
    assert run([alone]) == {}
    losses = [[(epoch["train_loss"], epoch["validation_loss"]) for epoch in read_epochs(c)] for c in (alone, cells[-1])]
    assert losses[0] == losses[1]


def with_options(cell: Cell, **changes: object) -> Cell:
    return Cell(row=cell.row, column=cell.column, seed=cell.seed, config=cell.config.replace(**changes))


def run(cells: list[Cell]) -> dict[str, str]:
    return runner.run_cells("tiny", cells, Accelerator())


def top_1(cell: Cell, name: str, context: str | None = None) -> float:
    """Percent, from the cell's own results.json as it lies there."""
    content = json.loads((cell.folder / "results.json").read_text())
    (row,) = [row for row in content["evaluation"]["rows"] if row["name"] == name]
    if context is None:
        return 100 * row["correct"]["1"] / row["num_samples"]
    number = content["data"]["context_names"].index(context)
    right, samples = row["context_correct"]["1"], row["context_samples"]
    key = context if context in samples else f"context_{number}"
    return 100 * right[key] / samples[key]


# ----------------------------------------------------------------------------------------------- running each cell once


def test_a_report_holds_the_numbers_of_its_cells(
    tiny: Experiment, dots: Path, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cells = tiny_cells(tiny, dots, tmp_path)
    names = [f"{row}.dots.seed{seed}" for seed in (0, 1) for row in ("bn", "mn", "cn")]
    assert [cell.name for cell in cells] == names
    assert run(cells) == {}
    assert trained == names
    assert "cell 2 of 6: tiny mn.dots.seed0, about" in capsys.readouterr().out
    assert not list(tmp_path.rglob("checkpoints"))
    assert "images: train 54, validation 6, test 24" in (cells[0].folder / "log.txt").read_text()

    results = [result for cell in cells if (result := read_result(cell)) is not None]
    text = write_report(tmp_path / "tiny", tiny, "small", cells, results, {})
    bn, cn = [cells[0], cells[3]], [cells[2], cells[5]]
    values = {
        ("bn", "top-1"): [top_1(cell, "baseline (no contexts)") for cell in bn],
        ("bn", "night"): [top_1(cell, "baseline (no contexts)", "night") for cell in bn],
        ("masked", "top-1"): [top_1(cell, "masked baseline (no contexts)") for cell in bn],
        ("mn", "top-1"): [top_1(cell, "baseline (MN)") for cell in (cells[1], cells[4])],
        ("cn", "top-1"): [top_1(cell, "true contexts") for cell in cn],
        ("cn", "night"): [top_1(cell, "true contexts", "night") for cell in cn],
        ("cn-plus", "top-1"): [top_1(cell, "CN+ (batch, sqrt_t)") for cell in cn],
    }
    written = json.loads((tmp_path / "tiny" / "results.json").read_text())
    table = {(entry["row"], entry["measure"]): entry for entry in written["table"]}
    assert len({value for expected in values.values() for value in expected}) > 4  # or nothing could be mixed up
    for key, expected in values.items():
        assert table[key]["ours"] == pytest.approx(expected), key
        assert (table[key]["mean"], table[key]["n"]) == (pytest.approx(statistics.fmean(expected)), 2)
        assert table[key]["std"] == pytest.approx(statistics.stdev(expected))
    assert (table["cn", "night"]["paper"], table["bn", "night"]["paper"]) == (91.25, None)
    printed = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for row, title in (("bn", "BN"), ("masked", "BN, masked"), ("cn", "CN"), ("cn-plus", "CN+")):
        ours = values[row, "top-1"]
        assert f"{statistics.fmean(ours):.2f} ± {statistics.stdev(ours):.2f} (n = 2)" in printed[title]
    assert "| 95.50 |" in printed["CN"].replace("  ", "")
    for way in ("true contexts", "CN+ (batch, sqrt_t)", "CN+ (learned, none)", "average", "shuffled contexts"):
        assert f"CN: {way}" in printed, way
    assert {"BN: masked baseline", "MN: masked baseline", "no network: context-only floor"} <= set(printed)
    assert "check of the machinery, not evidence" in text.splitlines()[0]
    assert "dots instead of photographs" in text
    assert (tmp_path / "tiny" / "table.md").read_text() == f"{text}\n"
    assert sorted(file.name for file in (tmp_path / "tiny").glob("*.png")) == [
        "accuracies-top1.png", "contexts-cn-dots.png", "validation_error.png", "validation_loss.png",
    ]  # fmt: skip
    assert all(f"({file.name})" in text for file in (tmp_path / "tiny").glob("*.png"))
    assert {cell["state"] for cell in written["cells"].values()} == {"finished"}
    assert written["cells"]["cn.dots.seed1"]["environment"]["versions"]["torch"]

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.suffix in (".json", ".txt")}
    trained.clear()
    assert run(cells) == {}
    assert trained == []
    (cells[2].folder / "results.json").unlink()
    partial = [result for cell in cells if (result := read_result(cell)) is not None]
    text = write_report(tmp_path / "other", tiny, "small", cells, partial, {})
    assert "Not finished: cn.dots.seed0." in text
    assert "5 of 6 cells finished" in text
    run(cells)
    assert trained == ["cn.dots.seed0"]
    touched = {file for file, then in before.items() if file.exists() and file.stat().st_mtime_ns != then}
    assert touched
    assert all(file.is_relative_to(cells[2].folder) for file in touched)


def test_a_stopped_cell_goes_on_from_its_last_checkpoint(
    tiny: Experiment, dots: Path, tmp_path: Path, trained: list[str]
) -> None:
    plain = with_options(tiny_cells(tiny, dots, tmp_path / "plain")[0], epochs=30)
    cell, later = (with_options(cell, epochs=30) for cell in tiny_cells(tiny, dots, tmp_path)[:2])
    run([plain])

    def stop() -> None:
        wait_until(lambda: (cell.folder / "history.json").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(TrainingInterruptedError, match="SIGTERM"):
        run([cell, later])
    stopper.join()
    done = len(json.loads((cell.folder / "history.json").read_text())["epochs"])
    assert 1 <= done < 30
    assert not cell.finished
    assert not later.folder.exists()

    run([cell, with_options(later, epochs=1)])
    assert trained == [plain.name, cell.name, cell.name, later.name]
    steps = [json.loads((c.folder / "history.json").read_text())["epochs"] for c in (plain, cell)]
    kept = [[(e["step"], e["train_loss"], e["validation_accuracy"]) for e in epochs] for epochs in steps]
    assert kept[0] == kept[1]
    assert top_1(plain, "baseline (no contexts)") == top_1(cell, "baseline (no contexts)")


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)


def test_a_cell_that_diverges_does_not_stop_the_others(tiny: Experiment, dots: Path, tmp_path: Path) -> None:
    cells = tiny_cells(tiny, dots, tmp_path)[:3]
    cells[0] = with_options(cells[0], optimizer="sgd", learning_rate=1e6, epochs=40)
    failures = run(cells)
    assert list(failures) == ["bn.dots.seed0"]
    assert "the training loss is" in failures["bn.dots.seed0"]
    results = [result for cell in cells if (result := read_result(cell)) is not None]
    text = write_report(tmp_path / "tiny", tiny, "small", cells, results, failures)
    assert "Failed: bn.dots.seed0: the training loss is" in text
    assert "Whether CN beats the masked BN is not known" in text
    written = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert [cell["state"] for cell in written["cells"].values()] == ["failed", "finished", "finished"]


def test_a_cell_that_another_process_is_at_is_passed_over(
    tiny: Experiment, dots: Path, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (with_options(cell, epochs=1) for cell in tiny_cells(tiny, dots, tmp_path)[:2])
    first.folder.parent.mkdir(parents=True)
    with FileLock(first.folder.parent / f".{first.name}.lock"):
        run([first, second])
    assert trained == [second.name]
    assert f"{first.name} is run by another process" in capsys.readouterr().out
    with held_folder(first.folder):  # by a command that trains this one run
        run([first, second])
    assert trained == [second.name]
    assert f"{first.name} is run by another process" in capsys.readouterr().out
    run([first, second])
    assert trained == [second.name, first.name]


# ---------------------------------------------------------------------------------------------- the paper's experiments


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Table V was reproduced with the smoke budget on real images."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets are absent: no folder {SHARED_DATA}")
    folder = tmp_path_factory.mktemp("smoke")
    reproduce_experiment("table5", data_root=SHARED_DATA, budget="smoke", output_dir=folder, progress=False)
    return folder


@pytest.mark.slow
def test_table_5_at_smoke(smoke: Path) -> None:
    written = json.loads((smoke / "table5" / "results.json").read_text())
    assert list(written["cells"]) == [f"{row}.cifar10-1.seed0" for row in ("bn", "mn", "cn", "cn-conv3")]
    assert {cell["state"] for cell in written["cells"].values()} == {"finished"}
    assert {cell["data"]["images"]["test"] for cell in written["cells"].values()} == {12}
    slots = {
        name: [slot["name"] for slot in cell["network"].get("slots", ())] for name, cell in written["cells"].items()
    }
    assert list(slots.values()) == [[], ["bn3"], ["conv1"], ["bn3"]]
    assert not written["is_evidence"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "title"), [("table6", "Table VI"), ("fig3", "Fig. 3")])
def test_what_is_read_from_table_5_trains_nothing(smoke: Path, trained: list[str], name: str, title: str) -> None:
    reproduce_experiment(name, data_root=SHARED_DATA, budget="smoke", output_dir=smoke, progress=False)
    assert trained == []
    figure = {"table6": "accuracies-top1.png", "fig3": "validation_error.png"}[name]
    assert {file.name for file in (smoke / name).iterdir()} == {figure, "results.json", "table.md"}
    text = (smoke / name / "table.md").read_text()
    assert text.startswith(f"# {title}")
    assert "check of the machinery" in text.splitlines()[0]


@pytest.mark.slow
def test_table_6_is_table_5s_cn(smoke: Path) -> None:
    reproduce_experiment("table6", data_root=SHARED_DATA, budget="smoke", output_dir=smoke, progress=False)
    written = json.loads((smoke / "table6" / "results.json").read_text())
    cell = json.loads((smoke / "table5" / "cells" / "cn.cifar10-1.seed0" / "results.json").read_text())
    rows = {row["name"]: row["top_1"] for row in cell["evaluation"]["rows"] if "top_1" in row}
    ours = {entry["row"]: entry["ours"] for entry in written["table"]}
    assert ours == {
        "cn-plus": [pytest.approx(100 * rows["CN+ (batch, sqrt_t)"])],
        "cn-plus-learned": [pytest.approx(100 * rows["CN+ (learned, none)"])],
        "cn": [pytest.approx(100 * rows["true contexts"])],
    }


@pytest.mark.slow
def test_another_budget_overwrites_nothing(smoke: Path, trained: list[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in smoke.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="another protocol or budget"):
        reproduce_experiment("table5", data_root=SHARED_DATA, budget="small", output_dir=smoke, progress=False)
    assert trained == []
    assert {file: file.stat().st_mtime_ns for file in smoke.rglob("*") if file.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table7", "table8"])
def test_the_vit_at_smoke(shared_data: Path, tmp_path: Path, name: str) -> None:
    only = ["vit.*", "cn-patches.*"]
    reproduce_experiment(name, data_root=shared_data, budget="smoke", output_dir=tmp_path, only=only, progress=False)
    written = json.loads((tmp_path / name / "results.json").read_text())
    states = {cell: entry["state"] for cell, entry in written["cells"].items()}
    assert list(states.values()) == ["finished", "not run", "finished", "not run"]
    rows = {entry["row"]: entry["n"] for entry in written["table"]}
    assert rows == {"vit": 1, "vit-masked": 1, "vit-bn": 0, "cn-patches": 1, "cn-channels": 0}
    assert any("ViT+CN-Patches with true contexts" in sentence for sentence in written["findings"])


def test_missing_data_stops_everything_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(DatasetFileError, match="no dataset cifar100 and no dataset mnist under --data-root"):
        reproduce_experiment("table8", data_root=tmp_path / "data", budget="smoke", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_are_listed_without_running_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce_experiment("fig4", budget="small", output_dir=tmp_path / "out", list_cells=True)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [f"{row}.cifar100.seed0", "to", "do"] for row in ("vit", "vit-bn", "cn-patches", "cn-channels")
    ]
    assert not (tmp_path / "out").exists()
