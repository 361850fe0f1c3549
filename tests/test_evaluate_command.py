"""``cn-hf evaluate``: checkpoints judged on folders and data sets, with contexts matched by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import nn
from typer.testing import CliRunner, Result

import cn_hf
from cn_hf.cli import app
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, DatasetError, DatasetFileError
from cn_hf.evaluation import ProtocolReport, context_table
from cn_hf.hub.preprocessing import preprocessing_of, record_preprocessing
from cn_hf.patching.routing import router_of
from cn_hf.recipes.classifier.run import train_classifier
from cn_hf.training.config import TrainingConfig

CLASSES = ("dark", "light", "striped")
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
Rows = list[tuple[str, str, np.ndarray]]


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--no-progress"])


def done(output: Path, *arguments: object) -> dict:
    result = evaluate(*arguments, "-o", output)
    assert result.exit_code == 0, result.exception
    results = json.loads((output / "results.json").read_text())
    assert (output / "table.md").read_text().strip() in result.output
    return results


def images(contexts: tuple[str, ...] = ("day", "night"), each: int = 4) -> Rows:
    generator, rows = np.random.default_rng(0), []
    for context in contexts:
        for number, label in enumerate(CLASSES):
            for _ in range(each):
                array = generator.integers(60 * number, 60 * number + 60, size=(20, 18, 3))
                rows.append((context, label, (array // 2 if context == "night" else array + 70).astype(np.uint8)))
    return rows


def as_folders(folder: Path, rows: Rows) -> Path:
    for number, (context, label, array) in enumerate(rows):
        path = folder / context / label / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return cn_hf.save_pretrained(network(), tmp_path / "checkpoint")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(7)
    cn_hf.patch_model(model, "cn-channels", context_names=["night", "day"])
    router_of(model).pixel_mean, router_of(model).pixel_std = PIXELS["mean"], PIXELS["std"]
    record_preprocessing(model, input_size=(3, 16, 16), label_names=CLASSES, **PIXELS)
    rows = images(each=8)
    x = preprocessing_of(model)([PIL.Image.fromarray(array) for _, _, array in rows])
    cn_hf.calibrate(model, [{"pixel_values": x, "context_ids": [context for context, _, _ in rows]}])
    return model


def right(model: nn.Module, rows: Rows, context: str) -> int:
    x = preprocessing_of(model)([PIL.Image.fromarray(array) for own, _, array in rows if own == context])
    labels = torch.tensor([CLASSES.index(label) for own, label, _ in rows if own == context])
    with torch.no_grad():
        return int((model(x, context_ids=context).argmax(1) == labels).sum())


def test_folders_columns_and_their_numbers_mean_the_same(checkpoint: Path, tmp_path: Path) -> None:
    rows, model = images(), cn_hf.from_pretrained(checkpoint)
    expected = {context: right(model, rows, context) for context in ("night", "day")}
    contexts, labels, arrays = ([row[part] for row in rows] for part in range(3))
    order = ClassLabel(names=["striped", "light", "dark"])  # not as the checkpoint numbers them
    numbers = {"image": arrays, "label": [order.str2int(label) for label in labels]}
    Dataset.from_dict(
        numbers | {"time": [("day", "night").index(context) for context in contexts]},
        features=Features({"image": Image(), "label": order, "time": ClassLabel(names=["day", "night"])}),
    ).to_parquet(tmp_path / "numbers" / "test.parquet")
    Dataset.from_dict(
        {"image": arrays, "label": labels, "time": contexts},
        features=Features({"image": Image(), "label": Value("string"), "time": Value("string")}),
    ).to_parquet(tmp_path / "words" / "test.parquet")
    folders = as_folders(tmp_path / "folders", rows)
    ways = {"numbers": "column:time", "words": "column:time", "folders": "folder"}
    found = {way: done(tmp_path / "out" / way, checkpoint, tmp_path / way, "--contexts", ways[way]) for way in ways}
    for way, results in found.items():
        report = ProtocolReport.from_dict(results)
        assert report["true contexts"].context_correct[1] == expected, way
        assert report["true contexts"].context_samples == {"night": 12, "day": 12}
        assert {row.name for row in report if row.available} >= {
            "true contexts", "CN+ (batch, sqrt_t)", "CN+ (learned, none)", "average", "shuffled contexts",
        }  # fmt: skip
        assert context_table(report) in (tmp_path / "out" / way / "table.md").read_text()
        assert results["data"] | {"dataset": ""} == {
            "dataset": "", "split": "test" if way != "folders" else "train", "images": 24, "contexts": ways[way],
            "num_classes": 3, "class_names": list(CLASSES), "context_names": ["night", "day"],
        }  # fmt: skip
    again = done(tmp_path / "out" / "words", checkpoint, folders, "--contexts", "none")  # over an older evaluation
    report = ProtocolReport.from_dict(again)
    assert report["true contexts"].unavailable is not None
    assert report["average"].correct == ProtocolReport.from_dict(found["words"])["average"].correct


def test_plain_ids_are_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    rows = images()
    ids = [("night", "day").index(context) for context, _, _ in rows]
    features = Features({"image": Image(), "label": Value("string"), "context_ids": Value("int64")})
    for name, values in (("right", ids), ("wrong", [*ids[:-1], 2])):
        Dataset.from_dict(
            {"image": [row[2] for row in rows], "label": [row[1] for row in rows], "context_ids": values},
            features=features,
        ).to_parquet(tmp_path / name / "test.parquet")
    report = ProtocolReport.from_dict(done(tmp_path / "out", checkpoint, tmp_path / "right"))
    model = cn_hf.from_pretrained(checkpoint)
    assert report["true contexts"].context_correct[1] == {name: right(model, rows, name) for name in ("night", "day")}
    refused = evaluate(checkpoint, tmp_path / "wrong", "-o", tmp_path / "out")
    assert isinstance(refused.exception, DatasetError)
    assert "row 23 has 2" in str(refused.exception)


def test_some_of_the_classes_are_known_by_name(tmp_path: Path) -> None:
    model, rows = network(), [row for row in images() if row[1] != "dark"]
    record_preprocessing(model, input_size=(3, 16, 16), label_names=["0", "1", "2"], **PIXELS)
    checkpoint = cn_hf.save_pretrained(model, tmp_path / "checkpoint")
    data = as_folders(tmp_path / "data", [(context, str(CLASSES.index(name)), array) for context, name, array in rows])
    report = ProtocolReport.from_dict(done(tmp_path / "out", checkpoint, data, "--contexts", "folder"))
    assert report["true contexts"].context_correct[1] == {name: right(model, rows, name) for name in ("night", "day")}


def test_the_leak_check_counts_the_training_split(checkpoint: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        as_folders(tmp_path / "data" / split, images())
    told = done(tmp_path / "out", checkpoint, tmp_path / "data", "--contexts", "folder", "--train-split", "train")
    report = ProtocolReport.from_dict(told)
    assert report.context_depends_on_label is False
    assert report["context-only floor"].correct[1] == 8


def test_contexts_that_the_checkpoint_does_not_know(checkpoint: Path, tmp_path: Path) -> None:
    data = as_folders(tmp_path / "data", images(("day", "fog", "night", "rain")))
    result = evaluate(checkpoint, data, "--contexts", "folder", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert (
        "warning: 24 of 48 images are of 2 contexts that the checkpoint does not know ('fog', 'rain')" in result.stderr
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert ProtocolReport.from_dict(results)["true contexts"].context_samples == {"night": 12, "day": 12}
    for name in ("fog", "rain"):
        report = ProtocolReport.from_dict(results["unknown_contexts"][name])
        assert report["true contexts"].unavailable is not None
        assert report["average"].num_samples == 12
    assert "fog (n = 12) | rain (n = 12)" in (tmp_path / "out" / "table.md").read_text()
    only = as_folders(tmp_path / "only", images(("fog",)))
    alone = done(tmp_path / "alone", checkpoint, only, "--contexts", "folder")
    assert list(alone["unknown_contexts"]) == ["fog"]
    assert ProtocolReport.from_dict(alone)["average"].num_samples == 12


def test_a_baseline_is_evaluated_within_the_contexts_of_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("cn_cifar_convnet", num_classes=3).eval()
    cn_hf.patch_model(model, "mn")
    saved = cn_hf.save_pretrained(model, tmp_path / "checkpoint")
    data = as_folders(tmp_path / "data", images())
    result = evaluate(saved, data, "--contexts", "folder", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    report = ProtocolReport.from_dict(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert report["baseline"].context_samples == {"day": 12, "night": 12}
    assert "warning: The checkpoint knows no names of its 3 classes" in result.stderr


@pytest.mark.slow
def test_a_run_is_evaluated_as_it_evaluated_itself(tmp_path: Path) -> None:
    for split in ("train", "test"):
        as_folders(tmp_path / "data" / split, images(each=8))
        rows = images(each=8)
        feature = ClassLabel(names=list(CLASSES))
        Dataset.from_dict(
            {
                "image": [array for _, _, array in rows], "label": [CLASSES.index(label) for _, label, _ in rows],
                "time": [context for context, _, _ in rows],
            },
            features=Features({"image": Image(), "label": feature, "time": Value("string")}),
        ).to_parquet(tmp_path / "table" / f"{split}-00000-of-00001.parquet")  # fmt: skip
    options = {
        "dataset": [str(tmp_path / "table")], "contexts": "column:time", "epochs": 2, "batch_size": 16,
        "model": "test_vit", "model_args": {"patch_size": 4}, "mode": "cn-patches", "image_size": 16,
        "progress": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = train_classifier(TrainingConfig.from_dict(options))
    assert run is not None
    assert run.report is not None
    ways = {"column:time": tmp_path / "table", "folder": tmp_path / "data", "source": tmp_path / "table"}
    for contexts, data in ways.items():
        found = done(tmp_path / "out", tmp_path / "run", data, "--contexts", contexts, "--train-split", "train")
        report = ProtocolReport.from_dict(found)
        for name in ("true contexts", "CN+ (learned, none)", "average", "shuffled contexts", "context-only floor"):
            assert report[name].correct == run.report[name].correct, (contexts, name)
            assert report[name].context_correct == run.report[name].context_correct, (contexts, name)
    taken = evaluate(tmp_path / "run", tmp_path / "table", "-o", tmp_path / "run")
    assert isinstance(taken.exception, CheckpointError)
    # A run keeps its contexts' moments, so that it meets a new domain without reference images.
    fog = as_folders(tmp_path / "new", images(("fog",), each=8))
    adapted = CliRunner().invoke(
        app, ["adapt", str(tmp_path / "run"), str(fog), "--name", "fog", "-o", str(tmp_path / "adapted")]
    )
    assert adapted.exit_code == 0, adapted.exception
    known = done(tmp_path / "out", tmp_path / "adapted", fog, "--contexts", "folder")
    assert known["evaluation"]["rows"][0]["context_samples"]["fog"] == 24
    assert known["unknown_contexts"] == {}


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    data = as_folders(tmp_path / "data", images())
    for split in ("train", "validation"):
        as_folders(tmp_path / "splits" / split, images())
    strange = as_folders(tmp_path / "strange", [("day", "zebra", row[2]) for row in images(each=2)] + images(each=1))
    broken = as_folders(tmp_path / "broken", images())
    next(broken.rglob("*.png")).write_text("no image")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "table.md").write_text("mine")
    wrong: list[tuple[list[object], type[CnHfError], str]] = [
        ([checkpoint, data, "--contexts", "colour"], ConfigError, "column:NAME"),
        ([checkpoint, data, "--contexts", "column:"], ConfigError, "column:NAME"),
        ([checkpoint, data, "--contexts", "column:tiem"], DatasetError, "tiem"),
        ([checkpoint, data, "--contexts", "source"], ConfigError, "context source"),
        ([checkpoint, data, "--split", "tset"], DatasetError, "tset"),
        ([checkpoint, tmp_path / "splits"], DatasetError, "test"),
        ([checkpoint, tmp_path / "absent"], DatasetFileError, "absent"),
        ([checkpoint, strange], DatasetError, "zebra"),
        ([checkpoint, broken], DatasetFileError, "cannot be read"),
        ([tmp_path / "nowhere", data], CheckpointError, "nowhere"),
    ]
    for arguments, error, words in wrong:
        result = evaluate(*arguments, "-o", tmp_path / "out")
        assert isinstance(result.exception, error), (arguments, result.exception)
        assert words in str(result.exception)
        assert result.exit_code == 1
    assert not (tmp_path / "out").exists()
    refused = evaluate(checkpoint, data, "-o", notes)
    assert isinstance(refused.exception, CheckpointError)
    assert (notes / "table.md").read_text() == "mine"
