"""AdaMatch from end to end: settings and their data, the script, processes, resuming, and Tables IX and X."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adamatch_runs
import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import Starter

import cn_hf
from cn_hf.data import DeviceBatches, PreparedData, load_splits
from cn_hf.errors import CnHfError, ConfigError, DatasetError, TrainingError
from cn_hf.experiments.cells import plan_cells
from cn_hf.experiments.runner import reproduce_experiment
from cn_hf.experiments.sources import DATASETS
from cn_hf.experiments.spec import read_experiment
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.data import UNLABELLED, TwoViewBatches, load_adamatch_data

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_adamatch.py"
LIGHT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NAMES = ("left", "right", "top")
WHERE = {"left": np.s_[:, :8], "right": np.s_[:, 8:], "top": np.s_[:8, :]}

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")
    for name, value in LIGHT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets-cache"))


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """A dataset folder: one side of each image is brighter, its class; a domain is a colour and a size."""

    def make(
        name: str,
        *,
        train: int = 60,
        test: int = 12,
        dark: bool = False,
        names: tuple[str, ...] = NAMES,
        size: int = 16,
    ) -> Path:
        folder = tmp_path_factory.mktemp("data") / name
        (folder / "data").mkdir(parents=True)
        generator = np.random.default_rng(len(name))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        for split, count in (("train", train), ("test", test)):
            images, labels = [], []
            for row in range(count):
                pixels = generator.integers(0, 60, size=(16, 16, 3))
                pixels[WHERE[NAMES[row % len(names)]]] += 90
                pixels = (pixels // 2 if dark else pixels + np.array([80, 0, 0])).astype(np.uint8)
                images.append(Image.fromarray(pixels).resize((size, size)))
                labels.append(row % len(names))
            rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
        return folder

    return make


@pytest.fixture(scope="module")
def day(make_folder: MakeFolder) -> Path:
    return make_folder("day", size=12)


@pytest.fixture(scope="module")
def night(make_folder: MakeFolder) -> Path:
    return make_folder("night", train=90, dark=True)


def config_of(*folders: Path, **options: object) -> AdaMatchConfig:
    return AdaMatchConfig.from_dict(
        {
            "model": "cn_digits_convnet", "dataset": [str(folder) for folder in folders], "batch_size": 6,
            "unlabelled_ratio": 2, "progress": False, **options,
        }
    )  # fmt: skip


def load(config: AdaMatchConfig) -> PreparedData:
    return load_adamatch_data(config, Accelerator(cpu=True))


def batches_of(data: PreparedData) -> TwoViewBatches:
    assert isinstance(data.train, TwoViewBatches)
    return data.train


# ----------------------------------------------------------------------------------------- which labels are given


def test_unsupervised_domain_adaptation_never_holds_a_label_of_the_target(day: Path, night: Path) -> None:
    data = load(config_of(day, night))
    train = batches_of(data)
    assert (len(train.labelled.images), len(train.unlabelled.images)) == (54, 90)  # a tenth of the source validates
    assert set(train.unlabelled.labels.tolist()) == {UNLABELLED}
    assert train.labelled.context_ids is not None
    assert train.unlabelled.context_ids is not None
    assert set(train.labelled.context_ids.tolist()) == {0}
    assert set(train.unlabelled.context_ids.tolist()) == {1}
    assert isinstance(data.validation, DeviceBatches)
    assert data.validation.context_ids is not None
    assert data.validation.context_ids.tolist() == [0] * 6
    assert data.context_names == ("day", "night")
    assert data.input_size == (3, 16, 16)
    for batch in train:
        assert batch["labels"].min() >= 0
    assert len(train) == 90 // 12


def test_a_target_without_labels_is_adapted_to_and_not_evaluated(day: Path, night: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled"
    for split in ("train", "test"):
        rows = datasets.load_dataset(str(night), split=split).remove_columns("label")
        rows.to_parquet(str(unlabelled / "data" / f"{split}-00000-of-00001.parquet"))
    config = config_of(day, unlabelled)
    with pytest.warns(UserWarning, match=r"unlabelled' has no column of class labels \(it has \['image'\]\)"):
        data = load(config)
    known = load(config_of(day, night))
    train, expected = batches_of(data), batches_of(known)
    assert set(train.unlabelled.labels.tolist()) == {UNLABELLED}
    assert torch.equal(
        train.unlabelled.images.sum((1, 2, 3)).sort()[0], expected.unlabelled.images.sum((1, 2, 3)).sort()[0]
    )
    assert torch.equal(train.labelled.images, expected.labelled.images)
    assert isinstance(data.test, DeviceBatches)
    assert data.test.context_ids is not None
    assert data.test.context_ids.tolist() == [0] * 12
    with pytest.raises(DatasetError, match="'unlabelled': no column of class labels"):
        load(config_of(day, unlabelled, setting="ssda", labels_per_class=2))


def test_semi_supervised_domain_adaptation_labels_a_few_of_the_target(day: Path, night: Path) -> None:
    train = batches_of(load(config_of(day, night, setting="ssda", labels_per_class=2)))
    assert train.labelled.context_ids is not None
    of_target = train.labelled.labels[train.labelled.context_ids == 1]
    assert sorted(of_target.tolist()) == [0, 0, 1, 1, 2, 2]
    assert (len(train.labelled.images), len(train.unlabelled.images)) == (60, 90)
    other = batches_of(load(config_of(day, night, setting="ssda", labels_per_class=2, seed=1)))
    assert not torch.equal(other.labelled.rows, train.labelled.rows)


def test_semi_supervised_learning_labels_a_few_of_one_dataset(night: Path) -> None:
    train = batches_of(load(config_of(night, setting="ssl", labels_per_class=3, contexts="none")))
    assert sorted(train.labelled.labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    assert len(train.unlabelled.images) == 81
    assert train.context_ids is None
    assert "context_ids" not in next(iter(train))


def test_how_views_are_made(day: Path, night: Path) -> None:
    plain = batches_of(load(config_of(day, night)))
    assert (repr(plain.strong), plain.neighbours) == ("RandAugment(2, 0.5)", None)
    train = batches_of(load(config_of(day, night, strong_convolution=0.4, labelled_neighbours=0.3)))
    assert repr(train.strong) == "InTurn(RandomConvolution(0.4), RandAugment(2, 0.5))"
    assert repr(train.neighbours) == "Neighbours(54 images, 0.3)", "none of the target's"


def test_images_are_standardised_alike_in_training_and_test(day: Path, night: Path) -> None:
    data = load(config_of(day, night, standardize="image"))
    for batches in (data.train, data.validation, data.test):
        assert batches is not None
        pixels = next(iter(batches))["pixel_values"]
        torch.testing.assert_close(pixels.mean((-2, -1)), torch.zeros(len(pixels), 3), atol=1e-4, rtol=0)
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_split": "train[:0]"}, DatasetError, "0 training images|no rows|holds no value"),
        ({"setting": "ssda", "labels_per_class": 31}, DatasetError, "class 0 has .* fewer than labels_per_class 31"),
        ({"memory": 1e-6}, TrainingError, "AdaMatch holds its images in memory, and they take more than memory=1e-06"),
        ({"validation_fraction": 0.0, "max_train_images": 1}, DatasetError, "all labelled images are of one class"),
        ({"contexts": "origin:one"}, ConfigError, "2 datasets need as many different names"),
    ],
)
def test_bad_data(day: Path, night: Path, options: dict[str, object], error: type[CnHfError], message: str) -> None:
    with pytest.raises(error, match=message):
        load(config_of(day, night, **options))


def test_classes_must_be_the_same_in_both_domains(day: Path, make_folder: MakeFolder) -> None:
    other = make_folder("other", names=("left", "right"))
    with pytest.raises(DatasetError, match=r"the classes of 'other' differ from those of 'day': only one of them has \['top'\]"):  # fmt: skip  # noqa: E501
        load(config_of(day, other))
    lonely = [make_folder(name, names=("left",)) for name in ("one", "two")]
    with pytest.raises(DatasetError, match="there is one class only"):
        load(config_of(*lonely))


def test_an_empty_domain_is_named(day: Path, night: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cn_hf.recipes.adamatch.data as module

    original = module.load_data

    def without_night(config: AdaMatchConfig, accelerator: Accelerator, **options: Any) -> PreparedData:
        data = original(config, accelerator, **options)
        assert isinstance(data.train, DeviceBatches)
        assert data.train.context_ids is not None
        data.train.context_ids.zero_()
        return data

    monkeypatch.setattr(module, "load_data", without_night)
    with pytest.raises(DatasetError, match="domain 'night' has no training image; check train_split"):
        load(config_of(day, night, validation_fraction=0.0))


@pytest.mark.parametrize(("only", "missing"), [(0, "target"), (1, "source")])
def test_a_domain_without_validation_images_is_named(
    day: Path, night: Path, monkeypatch: pytest.MonkeyPatch, only: int, missing: str
) -> None:
    import cn_hf.recipes.adamatch.data as module

    original = module.load_data

    def of_one(config: AdaMatchConfig, accelerator: Accelerator, **options: Any) -> PreparedData:
        data = original(config, accelerator, **options)
        assert isinstance(data.validation, DeviceBatches)
        assert data.validation.context_ids is not None
        data.validation.context_ids.fill_(only)
        return data

    monkeypatch.setattr(module, "load_data", of_one)
    with pytest.raises(DatasetError, match=f"no image of the {missing} is left for validation; raise"):
        load(config_of(day, night))


def test_a_configuration_can_stand_in_the_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'owner/name' is given two configurations, 'digits' and 'letters'"):
        load_splits("owner/name:digits", name="letters")
    assert DATASETS["svhn"].hub_id == "ufldl-stanford/svhn:cropped_digits"


# ---------------------------------------------------------------------------------------------------------- the script


def arguments(day: Path, night: Path, folder: Path, **changes: object) -> list[str]:
    values = {
        "model": "cn_digits_convnet", "epochs": 2, "batch-size": 6, "unlabelled-ratio": 2, "ema-decay": 0.5,
        "contexts": "origin", "output-dir": folder, **changes,
    }  # fmt: skip
    listed = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["--no-progress", "--dataset", str(day), "--dataset", str(night), *listed]


def run_script(capsys: pytest.CaptureFixture[str], given: list[str]) -> tuple[int, str, str]:
    """The script in this process, where its libraries are loaded already: exit code, stdout, stderr."""
    capsys.readouterr()
    before, sys.argv = sys.argv, [str(SCRIPT), *given]
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    shown = capsys.readouterr()
    code = stopped.value.code
    return (code if isinstance(code, int) else int(code is not None)), shown.out, shown.err


@pytest.mark.parametrize(
    ("mode", "where"), [("none", None), ("cn-channels", "input"), ("cn-channels", "norms"), ("dsbn", "norms")]
)
def test_script(
    capsys: pytest.CaptureFixture[str], day: Path, night: Path, tmp_path: Path, mode: str, where: str | None
) -> None:
    given = arguments(day, night, tmp_path / "run", mode=mode) + ([] if where is None else ["--where", where])
    code, _, err = run_script(capsys, given)
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["tau"] == 0.9
    assert results["data"]["images"] == {"train": 144, "validation": 6, "test": 24}
    rows = {row["name"]: row for row in results["evaluation"]["rows"]}
    epochs = next(iter(results["history"].values()))["epochs"]
    assert set(epochs[0]["further"]) == {"labelled_loss", "unlabelled_loss", "confident", "threshold"}
    assert 0 < epochs[0]["further"]["threshold"] <= 0.9
    if mode == "none":
        assert rows["baseline (no contexts)"]["context_samples"] == {"day": 12, "night": 12}
        return
    assert rows["all as day"]["context_correct"]["1"]["day"] == rows["true contexts"]["context_correct"]["1"]["day"]
    assert rows["all as night"]["context_correct"]["1"]["night"] == rows["true contexts"]["context_correct"]["1"]["night"]  # fmt: skip  # noqa: E501
    assert (rows["CN+ (learned, none)"]["unavailable"] is None) == (mode != "dsbn")
    model = cn_hf.from_pretrained(tmp_path / "run" / "checkpoint")
    assert model(torch.randn(2, 3, 16, 16), context_ids="night").shape == (2, 3)


def test_script_learns_the_target_it_has_no_label_of(
    capsys: pytest.CaptureFixture[str], day: Path, night: Path, tmp_path: Path
) -> None:
    given = arguments(day, night, tmp_path / "run", epochs=8, **{"ema-decay": 0.8, "learning-rate": 0.01})
    code, _, err = run_script(capsys, [*given, "--standardize", "image", "--augment-options", "crop_padding=1"])
    assert code == 0, err
    row = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]["rows"]
    found = next(r for r in row if r["name"].startswith("baseline"))
    assert found["context_correct"]["1"]["night"] >= 10  # of 12; guessing gives 4


def test_dry_run_draws_labelled_and_unlabelled_images(
    capsys: pytest.CaptureFixture[str], day: Path, night: Path, tmp_path: Path
) -> None:
    code, out, err = run_script(capsys, [*arguments(day, night, tmp_path / "run", mode="dsbn"), "--dry-run"])
    assert code == 0, err
    assert "steps: 7 per epoch, 14 in all, batches of 6" in out
    assert (tmp_path / "run" / "first_batch.png").stat().st_size > 10_000


def test_script_says_what_is_wrong(capsys: pytest.CaptureFixture[str], day: Path, night: Path, tmp_path: Path) -> None:
    code, _, err = run_script(capsys, arguments(day, night, tmp_path, setting="sssl"))
    assert code == 1
    assert err.startswith("error: unknown setting 'sssl'; did you mean 'ssl'?")
    assert "Traceback" not in err


def test_script_on_two_processes_gives_the_results_of_one(
    capsys: pytest.CaptureFixture[str], day: Path, night: Path, tmp_path: Path
) -> None:
    options = {"mode": "dsbn", "where": "norms", "optimizer": "sgd", "learning-rate": 0.05}
    code, _, err = run_script(capsys, arguments(day, night, tmp_path / "1", **options))
    assert code == 0, err
    launcher = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), str(SCRIPT)]
    command += arguments(day, night, tmp_path / "2", **options)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "2"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for name in ("train_loss", "validation_loss"):
        first, second = ([epoch[name] for epoch in run["history"]["DSBN"]["epochs"]] for run in (one, two))
        assert second == pytest.approx(first, abs=1e-4)
    correct = [[row["correct"] for row in run["evaluation"]["rows"]] for run in (one, two)]
    assert correct[0] == correct[1]


# -------------------------------------------------------------------------------------------- processes and resuming


@pytest.mark.parametrize("kind", ["none", "cn", "dsbn"])
def test_two_processes_give_the_weights_of_one(start: Starter, tmp_path: Path, kind: str) -> None:
    for processes in (1, 2):
        adamatch_runs.finish(adamatch_runs.start(tmp_path / str(processes), processes, kind=kind, dtype="float64"))
    one, two = (adamatch_runs.outcome(tmp_path / str(processes)) for processes in (1, 2))
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-8, atol=1e-8, msg=f"{kind} {name}")
    for name, values in one["history"].items():
        assert two["history"][name] == pytest.approx(values, abs=1e-5), name
    assert 0 < one["history"]["confident"][-1] < 1  # some pseudo-labels count, and not all


def test_a_killed_run_goes_on_to_the_same_end(start: Starter, tmp_path: Path) -> None:
    adamatch_runs.finish(adamatch_runs.start(tmp_path / "whole", kind="dsbn"))
    whole, folder = adamatch_runs.outcome(tmp_path / "whole"), tmp_path / "killed"

    def newest() -> str:
        return max((path.name for path in folder.glob("run/checkpoints/step-*")), default="")

    for _ in range(3):
        before = newest()
        [process] = adamatch_runs.start(folder, kind="dsbn")
        while newest() == before:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join(60)
        assert not (folder / "result.pt").exists()
    adamatch_runs.finish(adamatch_runs.start(folder, kind="dsbn"))
    ended = adamatch_runs.outcome(folder)
    assert ended["history"] == whole["history"]
    for name, value in whole["weights"].items():
        assert torch.equal(ended["weights"][name], value), name


# --------------------------------------------------------------------------------------------------- Tables IX and X


def test_tables_hold_the_papers_numbers_and_protocol() -> None:
    for name, numbers in (("table9", (99.21, 43.80)), ("table10", (94.45, 23.22))):
        experiment = read_experiment(name)
        assert experiment.rows["adamatch"].paper == {"paper": (79.39, 20.46)}
        assert experiment.rows["cn"].paper == {"paper": numbers}
        assert (experiment.trainer, experiment.trains) == ("adamatch", "table9")
        told = {"table9": "all as MNIST", "table10": "all as SVHN"}[name]
        assert {experiment.rows[row].protocol for row in ("cn", "cn-norms", "dsbn")} == {told}
        places = {dataset: DATASETS[dataset].hub_id for dataset in ("mnist", "svhn")}
        cells = plan_cells(experiment, "paper", seeds=None, places=places, output_dir=Path("out"), progress=False)
        assert len(cells) == 4 * 3 * 3
        for cell in cells:
            config = cell.config
            assert isinstance(config, AdaMatchConfig)
            assert (config.model, config.optimizer, config.schedule) == ("cn_wrn28_2", "adam", "cosine")
            assert (config.batch_size, config.unlabelled_ratio, config.tau) == (64, 3, 0.9)
            assert config.dataset == ("ylecun/mnist", "ufldl-stanford/svhn:cropped_digits")
            if cell.column == "paper":
                assert (config.learning_rate, config.alignment, config.standardize) == (0.03, "overall", "dataset")
            else:
                assert (config.alignment, config.standardize) == ("per class", "image")
            assert bool(config.strong_convolution) == (cell.column == "best")
        medium = plan_cells(experiment, "medium", seeds=None, places=places, output_dir=Path("out"), progress=False)
        assert [cell.column for cell in medium] == ["best"] * 4


def test_tables_share_their_training(shared_data: Path, tmp_path: Path) -> None:
    options = {"data_root": shared_data, "budget": "smoke", "only": ["dsbn.*"], "output_dir": tmp_path}
    [trained] = reproduce_experiment("table9", progress=False, **options)
    before = (trained.cell.folder / "results.json").stat().st_mtime_ns
    reproduce_experiment("table10", progress=False, **options)
    assert (trained.cell.folder / "results.json").stat().st_mtime_ns == before
    for name, told in (("table9", "MNIST"), ("table10", "SVHN")):
        content = json.loads((tmp_path / name / "results.json").read_text())
        measured = {(e["row"], e["measure"]): e["ours"] for e in content["table"]}
        row = trained.row(f"all as {told}")
        for domain in ("MNIST", "SVHN"):
            assert measured["dsbn", domain] == [100 * row.accuracy(1, context=domain)]
            own = trained.row("true contexts").accuracy(1, context=domain)
            assert measured["dsbn-own", domain] == [100 * own]
        text = (tmp_path / name / "table.md").read_text()
        assert "a check of the machinery, not evidence for or against the paper" in text.splitlines()[0]
        assert "4 test images of SVHN: the choice of these alone leaves a standard error of up to 25.00 points" in text
        assert (tmp_path / name / "accuracies-SVHN.png").is_file()
