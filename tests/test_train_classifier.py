"""``scripts/train_classifier.py`` from end to end, on one process and two, and what it says of bad input."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import cn_hf
import cn_hf.models
from cn_hf.errors import ConfigError
from cn_hf.recipes.classifier.run import train_classifier
from cn_hf.training.config import TrainingConfig
from cn_hf.training.networks import create_network

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_classifier.py"
LIGHT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CLASSES = ("left", "right", "top")
WHERE = {"left": np.s_[:, :8], "right": np.s_[:, 8:], "top": np.s_[:8, :]}


def picture(label: int, night: int, generator: np.random.Generator) -> Image.Image:
    """One side of the image is brighter: its class; by night all is darker and of another colour."""
    pixels = generator.integers(0, 60, size=(16, 16, 3))
    pixels[WHERE[CLASSES[label]]] += 60
    return Image.fromarray((pixels // 3 if night else pixels + 80).astype(np.uint8))


def make_split(count: int, seed: int) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    nights = generator.integers(0, 2, size=count)
    images = [picture(label, night, generator) for label, night in zip(labels, nights, strict=True)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES)),
            "time": datasets.ClassLabel(names=["day", "night"]),
        }
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels, "time": nights}, features=features)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the Hub: data/train-*.parquet and data/test-*.parquet; 93 images train, so batches are uneven."""
    folder = tmp_path_factory.mktemp("sides")
    (folder / "data").mkdir()
    for name, count, seed in (("train", 104, 0), ("test", 31, 1)):
        make_split(count, seed).to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of PNGs per class, gray and coloured ones mixed, of two sizes."""
    folder = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(3)
    for split, count in (("train", 24), ("test", 9)):
        for row in range(count):
            label = row % 3
            target = folder / split / CLASSES[label] / f"{row}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = picture(label, 0, generator).resize((16 + row % 2, 20))
            (image.convert("L") if row % 4 == 0 else image).save(target)
    return folder


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")
    for name, value in LIGHT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets-cache"))


def options(dataset: Path, folder: Path | None = None, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "model": "cn_digits_convnet", "dataset": dataset, "epochs": 2, "batch-size": 16, "optimizer": "adamw",
        "learning-rate": 0.01, "mode": "cn-channels", "where": "norms", "contexts": "column:time",
        "label-column": "label", **changes,
    }  # fmt: skip
    if folder is not None:
        values["output-dir"] = folder
    arguments = ["--no-progress"]
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments


def run_script(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str, str]:
    """The script in this process, where its libraries are loaded already: exit code, stdout, stderr."""
    capsys.readouterr()
    before, sys.argv = sys.argv, [str(SCRIPT), *arguments]
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    shown = capsys.readouterr()
    code = stopped.value.code
    return (code if isinstance(code, int) else int(code is not None)), shown.out, shown.err


def row_accuracies(folder: Path) -> dict[str, float | None]:
    results = json.loads((folder / "results.json").read_text())
    return {row["name"]: row["top_1"] for row in results["evaluation"]["rows"] if "top_1" in row}


@pytest.fixture(scope="module")
def one_process(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run as a user starts it: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "one"
    arguments = options(parquet, folder, epochs=6, baseline=True)
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **LIGHT},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_a_run_leaves_everything(one_process: tuple[Path, str]) -> None:
    folder, printed = one_process
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "baseline", "checkpoint", "checkpoints", "config.yaml", "curves.png", "history.json", "protocols.png",
        "results.json", "run.json", "table.md",
    ]  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["images"] == {"train": 94, "validation": 10, "test": 31}
    assert results["data"]["context_names"] == ["day", "night"]
    assert [len(history["epochs"]) for history in results["history"].values()] == [6, 6]
    assert results["history"]["CN-Channels"]["epochs"][-1]["step"] == 6 * 6
    assert "torch" in results["environment"]["versions"]
    rows = row_accuracies(folder)
    assert rows["true contexts"] > 0.8
    assert {"CN+ (batch, sqrt_t)", "CN+ (learned, none)", "average", "masked baseline"} <= set(rows)
    assert (folder / "table.md").read_text().strip() in printed
    written = TrainingConfig.from_yaml((folder / "config.yaml").read_text()).to_dict()
    # results are published, and name no folder of this machine
    assert results["config"] == {**written, "dataset": [Path(written["dataset"][0]).name], "output_dir": folder.name}


def test_the_checkpoint_gives_the_accuracy_reported(one_process: tuple[Path, str], parquet: Path) -> None:
    folder, _ = one_process
    results = json.loads((folder / "results.json").read_text())
    model = cn_hf.from_pretrained(folder / "checkpoint")
    test = datasets.Dataset.from_parquet(str(parquet / "data" / "test-00000-of-00001.parquet"))
    mean, std = (torch.tensor(results["data"][name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in test["image"]])
    with torch.no_grad():
        logits = model((pixels / 255 - mean) / std, context_ids=torch.tensor(test["time"]))
    accuracy = (logits.argmax(1) == torch.tensor(test["label"])).float().mean().item()
    assert accuracy == pytest.approx(row_accuracies(folder)["true contexts"])


def launch_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(SCRIPT), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, **LIGHT, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_two_processes_fail_with_one_message(parquet: Path) -> None:
    finished = launch_two(options(parquet, **{"label-column": "lable"}))
    assert finished.returncode != 0
    assert finished.stderr.count("error: ") == 1
    assert "did you mean 'label'" in finished.stderr
    assert "[rank" not in finished.stderr  # where torch puts tracebacks of the processes; the launcher adds its own


def test_two_processes_under_accelerate_launch(one_process: tuple[Path, str], parquet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    # An input layer, since BatchNorms of two processes have statistics of their own.
    changes = {"epochs": 2, "mode": "cn-channels", "where": "input", "model-args": "norm_layer=layernorm2d"}
    finished = launch_two(options(parquet, folder, **changes))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("true contexts:") == 1
    alone = train_classifier(
        TrainingConfig(
            model="cn_digits_convnet", model_args={"norm_layer": "layernorm2d"}, dataset=(str(parquet),), epochs=2,
            batch_size=16, optimizer="adamw", learning_rate=0.01, mode="cn-channels", where=("input",),
            contexts="column:time", label_column="label", progress=False,
        )
    )  # fmt: skip
    loaded = cn_hf.from_pretrained(folder / "checkpoint").state_dict()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-4, atol=1e-5, msg=name)
    results = json.loads((folder / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert alone.report is not None
    assert row_accuracies(folder)["true contexts"] == alone.report["true contexts"].accuracy()
    assert results["evaluation"]["rows"][0]["num_samples"] == 31


def test_transformers_network_from_a_folder_and_an_imagefolder(
    imagefolder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    small.save_pretrained(tmp_path / "vit")
    run = train_classifier(
        TrainingConfig(
            model=str(tmp_path / "vit"), dataset=(str(imagefolder),), epochs=1, batch_size=8, mode="cn-patches",
            contexts="brightness", image_size=12, progress=False, output_dir=str(tmp_path / "run"),
            augment=("flip", "crop"), augment_options={"crop_padding": 2}, validation_fraction=0.25,
        )
    )  # fmt: skip
    assert run.data.input_size == (3, 12, 12)
    assert "5 slots patched" in capsys.readouterr().out
    loaded = cn_hf.from_pretrained(tmp_path / "run" / "checkpoint")
    images = torch.randn(2, 3, 12, 12)
    ids = torch.tensor([0, 1])
    run.model.eval()
    assert torch.equal(loaded(images, context_ids=ids).logits, run.model(images, context_ids=ids).logits)
    cn_hf.set_inference(loaded, "predict")
    assert loaded(torch.rand(2, 3, 12, 12)).logits.shape == (2, 3)


@pytest.mark.parametrize("mode", ["none", "bn", "mn"])
def test_networks_without_contexts(parquet: Path, tmp_path: Path, mode: str) -> None:
    where = {"none": (), "bn": ("input",), "mn": ("bn3",)}[mode]
    run = train_classifier(
        TrainingConfig(
            model="cn_digits_convnet", dataset=(str(parquet),), epochs=1, batch_size=32, mode=mode, where=where,
            label_column="label", contexts="column:time", progress=False, output_dir=str(tmp_path), learning_rate=1e-3,
        )
    )  # fmt: skip
    rows = row_accuracies(tmp_path)
    assert {f"baseline ({'no contexts' if mode == 'none' else mode.upper()})", "context-only floor"} <= set(rows)
    loaded = (
        create_network(str(tmp_path / "checkpoint"), num_classes=3, input_size=(3, 16, 16), pretrained=True)
        if mode == "none"
        else cn_hf.from_pretrained(tmp_path / "checkpoint")
    )
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(loaded.eval()(images), run.model.eval()(images), rtol=0, atol=0)
    if mode == "none":  # another number of classes: all but the classifier is kept
        other = create_network(str(tmp_path / "checkpoint"), num_classes=7, input_size=(3, 16, 16), pretrained=True)
        assert torch.equal(other.conv1.weight, run.model.conv1.weight)
        assert other(images).shape == (4, 7)
        (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(ConfigError, match="cannot make"):
            create_network(str(tmp_path / "checkpoint"), num_classes=3, input_size=(3, 16, 16), pretrained=True)


def test_datasets_are_blended(parquet: Path, imagefolder: Path, tmp_path: Path) -> None:
    run = train_classifier(
        TrainingConfig(
            model="cn_digits_convnet", dataset=(str(parquet), str(imagefolder)), contexts="origin:sides,folder",
            mode="cn-channels", where=("norms",), epochs=1, batch_size=32, decode_size=16, label_column="label",
            progress=False, output_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    assert run.data.num_classes == 6
    assert run.data.context_names == ("sides", "folder")
    assert run.report is not None
    assert run.report.context_depends_on_label
    shared = TrainingConfig.from_dict({**run.config.to_dict(), "share_labels": True, "output_dir": None})
    assert train_classifier(shared).data.num_classes == 3


def test_corrupt_images_are_left_out_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_corrupt_image(tmp_path)
    code, _, error = run_script(capsys, options(folder))
    assert code == 1
    assert error.startswith("error: ")
    assert "image 7 " in error.lower()
    assert "Traceback" not in error
    run = train_classifier(
        TrainingConfig(
            model="cn_digits_convnet", dataset=(str(folder),), epochs=1, batch_size=16, skip_corrupt=True,
            label_column="label", validation_fraction=0.0, progress=False,
        )
    )  # fmt: skip
    assert run.data.skipped["train"] == (7,)
    assert "1 unreadable" in capsys.readouterr().out


def with_corrupt_image(tmp_path: Path) -> Path:
    folder = tmp_path / "corrupt"
    (folder / "data").mkdir(parents=True)
    train = make_split(30, 0).cast_column("image", datasets.Image(decode=False))

    def break_one(example: dict, row: int) -> dict:
        data = example["image"]["bytes"]
        return {"image": {"bytes": data[:40] if row == 7 else data, "path": None}}

    train = train.map(break_one, with_indices=True, features=train.features)
    train.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    make_split(9, 1).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label-column": "lable"}, "did you mean 'label'"),
        ({"contexts": "column:tmie"}, "did you mean 'time'"),
        ({"contexts": "colum:time"}, "did you mean 'column'"),
        ({"contexts": "clusters:gmn:2"}, "did you mean 'gmm'"),
        ({"contexts": "clusters:gmm:many"}, "must be a number"),
        ({"contexts": "origin"}, "more than once"),
        ({"contexts": "none"}, "needs contexts"),
        ({"num-contexts": 5}, "num_contexts is 5"),
        ({"model": "cn_digit_convnet"}, "'cn_digits_convnet'"),
        ({"model-args": "width=3"}, "width"),
        ({"mode": "cn-patch"}, "did you mean 'cn-patches'"),
        ({"mode": "cn-patches"}, "cn-patches"),
        ({"where": "bn7"}, "bn7"),
        ({"test-split": "tset"}, "did you mean 'test'"),
        ({"augment": "flop"}, "did you mean 'flip'"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"optimizer-args": "beta=1"}, "did you mean 'betas'"),
        ({"batch-size": 1000, "drop-last": True}, "no batch"),
        ({"image-size": 0}, "image_size must be at least 1"),
        ({"learning-rate": "1e9", "optimizer": "sgd"}, "at step"),
    ],
)
def test_bad_input_is_one_message(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    code, _, error = run_script(capsys, options(parquet, tmp_path / "run", **changes))
    assert code == 1
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()
    # The corrected command is not refused: the folder is the run's from its first step on.
    assert (tmp_path / "run" / "run.json").exists() == (message == "at step")


def test_a_typo_does_not_cost_the_run_that_is_to_be_overwritten(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(capsys, options(parquet, tmp_path / "run"))[0] == 0
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert run_script(capsys, [*options(parquet, tmp_path / "run", contexts="column:tmie"), "--overwrite"])[0] == 1
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_missing_dataset_and_folder(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run_script(capsys, options(tmp_path / "nowhere"))
    assert code == 1
    assert "nowhere" in error
    (tmp_path / "file").write_text("mine")
    code, _, error = run_script(capsys, options(parquet, tmp_path / "file"))
    assert code == 1
    assert "cannot be written" in error
    assert (tmp_path / "file").read_text() == "mine"
    code, _, error = run_script(capsys, ["--model", "cn_digits_convnet"])
    assert code == 1
    assert "--dataset" in error


def test_a_user_sees_no_traceback(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), *options(tmp_path / "nowhere")]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env={**os.environ, **LIGHT})
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert len(finished.stderr.splitlines()) == 1


def test_baseline_shares_weights_and_order(parquet: Path) -> None:
    config = TrainingConfig(
        model="cn_digits_convnet", dataset=(str(parquet),), epochs=1, batch_size=32, learning_rate=1e-12,
        optimizer="sgd", weight_decay=0.0, mode="cn-channels", where=("norms",), contexts="column:time", baseline=True,
        label_column="label", progress=False,
    )  # fmt: skip
    run = train_classifier(config)
    assert run.baseline is not None
    baseline = dict(run.baseline.named_parameters())
    for name, parameter in run.model.named_parameters():
        if name in baseline:
            torch.testing.assert_close(parameter.detach(), baseline[name].detach(), rtol=0, atol=1e-9, msg=name)
    assert isinstance(run.baseline, type(timm.create_model("cn_digits_convnet")))


def test_a_folder_is_resumed_or_overwritten_only_when_asked(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(parquet, tmp_path / "run", **{"checkpoint-steps": 4})
    assert run_script(capsys, arguments)[0] == 0
    results = (tmp_path / "run" / "results.json").read_bytes()
    code, _, error = run_script(capsys, arguments)
    assert code == 1
    assert "holds a finished run; go on with it (--resume), remove it (--overwrite)" in error
    code, printed, _ = run_script(capsys, [*arguments, "--resume"])
    assert code == 0
    assert "nothing to do" in printed
    assert (tmp_path / "run" / "results.json").read_bytes() == results
    code, _, error = run_script(capsys, [*arguments, "--resume", "--epochs", "5"])
    assert code == 1
    assert "epochs was 2, is 5" in error
    # as if killed after training, before the results were written
    before = json.loads(results)
    (tmp_path / "run" / "results.json").unlink()
    code, printed, _ = run_script(capsys, [*arguments, "--resume"])
    assert code == 0
    assert "going on after step 12" in printed
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["history"] == before["history"]
    assert again["evaluation"]["rows"] == before["evaluation"]["rows"]
    assert run_script(capsys, [*arguments, "--overwrite", "--epochs", "1"])[0] == 0
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["history"]["CN-Channels"]["epochs"]) == 1


def test_a_dry_run_trains_nothing(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run_script(capsys, [*options(parquet, tmp_path / "run"), "--dry-run"])
    assert code == 0
    assert "learning_rate: 0.01" in printed
    assert "bn1" in printed
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["first_batch.png"]
    assert run_script(capsys, options(parquet, tmp_path / "run", **{"validation-fraction": 0.0}))[0] == 0


def test_a_stream_with_everything_on(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(
        parquet, tmp_path / "run", streaming=True, mixup=0.2, cutmix=1.0, **{
            "validation-fraction": 0.0, "num-workers": 1, "ema-decay": 0.9, "accumulation-steps": 2,
            "clip-grad-norm": 1.0, "mean": 0.5, "std": 0.25, "label-smoothing": 0.1,
        }
    )  # fmt: skip
    code, _, error = run_script(capsys, arguments)
    assert code == 0, error
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["evaluation"]["rows"][0]["num_samples"] == 31


def test_balanced_contexts_and_little_memory(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(parquet, tmp_path / "run", memory=0, **{"balance-contexts": True, "num-workers": 2})
    code, _, error = run_script(capsys, arguments)
    assert code == 0, error
    assert row_accuracies(tmp_path / "run")["true contexts"] is not None
