"""``cn-hf inspect``, ``predict`` and ``push``: a trained run, looked at, used and published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hub_server import HubServer
from transformers import AutoImageProcessor
from typer.testing import CliRunner

import cn_hf
from cn_hf.cli import app
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import CheckpointError, ConfigError, ContextIdError, DatasetFileError
from cn_hf.evaluation import ProtocolReport, context_table
from cn_hf.hub.card import run_card
from cn_hf.hub.image_files import read_image
from cn_hf.hub.inspection import inspect_checkpoint
from cn_hf.hub.prediction import predict, prediction_lines
from cn_hf.hub.preprocessing import input_size_of, label_names_of, to_pixels
from cn_hf.hub.publish import run_files
from cn_hf.hub.repository import HubOptions
from cn_hf.recipes.classifier.run import train_classifier
from cn_hf.training.config import TrainingConfig

CLASSES = ("dark", "light", "striped")


def pixels(label: int, night: int, generator: np.random.Generator) -> np.ndarray:
    image = generator.integers(60 * label, 60 * label + 60, size=(16, 16, 3))
    return (image // 2 if night else image + 70).astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two finished runs, of a timm and of a transformers model."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    names = {"label": ClassLabel(names=list(CLASSES)), "time": ClassLabel(names=["day", "night"])}
    for split, count in (("train", 48), ("test", 24)):
        labels, nights = [i % 3 for i in range(count)], [i // 3 % 2 for i in range(count)]
        images = [pixels(label, night, generator) for label, night in zip(labels, nights, strict=True)]
        rows = {"image": images, "label": labels, "time": nights}
        data = Dataset.from_dict(rows, features=Features({"image": Image(), **names}))
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    options = {
        "dataset": [str(folder)], "contexts": "column:time", "epochs": 1, "batch_size": 16, "progress": False,
    }  # fmt: skip
    native = folder / "vit"
    from transformers import ViTConfig

    ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    ).save_pretrained(native)
    models = {"timm": ("cn_cifar_convnet", "cn-channels", 32), "native": (str(native), "cn-patches", 16)}
    for name, (model, mode, size) in models.items():
        config = {**options, "model": model, "mode": mode, "image_size": size, "output_dir": str(folder / name)}
        train_classifier(TrainingConfig.from_dict(config))
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A photograph on its side, as a telephone writes it."""
    path = tmp_path_factory.mktemp("pictures") / "sideways.jpg"
    image = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (36, 40, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "native"])
def test_a_run_says_what_it_saw_and_how(kind, runs, picture):
    folder = runs[kind]
    results = json.loads((folder / "results.json").read_text())
    model = cn_hf.from_pretrained(folder / "checkpoint")
    assert input_size_of(model) == tuple(results["data"]["input_size"])
    assert label_names_of(model, 3) == list(CLASSES)
    image = read_image(picture)
    batch = to_pixels(model, [image])
    assert batch.shape == (1, *results["data"]["input_size"])
    upright = image.transpose(PIL.Image.Transpose.ROTATE_270).resize(batch.shape[:1:-1], PIL.Image.Resampling.BICUBIC)
    raw = torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 255
    shape = (3, 1, 1)
    mean, std = (torch.tensor(results["data"][name]).view(shape) for name in ("mean", "std"))
    torch.testing.assert_close(batch[0] * std + mean, raw, atol=1.001 / 255, rtol=0)


@pytest.mark.slow
def test_the_librarys_own_preprocessing_is_the_runs(runs, picture):
    model = cn_hf.from_pretrained(runs["timm"] / "checkpoint")
    config = timm.data.resolve_model_data_config(model)
    image = read_image(picture).convert("RGB")
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    own = timm.data.create_transform(**config, is_training=False)(upright)[None]
    torch.testing.assert_close(own, to_pixels(model, [image]), atol=0.03, rtol=0)

    model = cn_hf.from_pretrained(runs["native"] / "checkpoint")
    processor = AutoImageProcessor.from_pretrained(runs["native"] / "checkpoint")
    own = processor(upright, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(own, to_pixels(model, [image]), atol=0.05, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "native"])
def test_predict(kind, runs, picture):
    model = cn_hf.from_pretrained(runs[kind] / "checkpoint")
    images = [read_image(picture), read_image(picture)]
    found = predict(model, images, contexts=[None, "day", 1], names=["a", "b"], top=2)
    assert [(p.image, p.context) for p in found] == [(n, c) for n in "ab" for c in (None, "day", "night")]
    batch = to_pixels(model, images)
    with torch.no_grad():
        logits = model(batch, context_ids="night")
    best, order = (logits if torch.is_tensor(logits) else logits.logits)[0].softmax(-1).topk(2)
    assert found[2].labels == tuple(CLASSES[i] for i in order)
    assert found[2].probabilities == pytest.approx(best.tolist())
    lines = prediction_lines(found).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("a (context night): ")
    with pytest.raises((ConfigError, ContextIdError), match="'night'"):
        predict(model, images, contexts=["nihgt"])
    assert predict(model, []) == []


@pytest.mark.slow
def test_inspect(runs):
    told = inspect_checkpoint(runs["timm"])
    for words in ("cn_cifar_convnet", "contexts: 2 (day, night)", "context source: column", "true contexts"):
        assert words in told
    count = sum(p.numel() for p in cn_hf.context_parameters(cn_hf.from_pretrained(runs["timm"] / "checkpoint")))
    assert f"{count:,} added" in told
    size = (runs["timm"] / "checkpoint" / "model.safetensors").stat().st_size / 1e6
    assert f"{size:,.2f} MB" in told
    assert "LayerNorm" in inspect_checkpoint(runs["native"] / "checkpoint")


@pytest.mark.slow
def test_accuracy_within_each_context_stands_wherever_a_run_is_told(runs):
    folder = runs["timm"]
    results = json.loads((folder / "results.json").read_text())
    report = ProtocolReport.from_dict(results)
    day, night = (report["true contexts"].accuracy(context=name) for name in ("day", "night"))
    told = inspect_checkpoint(folder)
    assert f"by context: day {100 * day:.2f} %, night {100 * night:.2f} %" in told
    assert context_table(report) in (folder / "table.md").read_text()
    card = str(run_card(results, "me/run"))
    (line,) = [line for line in card.splitlines() if line.startswith("| night (n = 12) |")]
    assert line.split("|")[2].split()[0] == f"{100 * night:.2f}"
    assert results["evaluation"]["rows"][0]["context_top_1"] == {"day": day, "night": night}


def test_bad_input(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"context_norm\.json is missing"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DatasetFileError, match=r"text\.png"):
        read_image(tmp_path / "text.png")
    with pytest.raises(DatasetFileError, match=r"none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(CheckpointError, match="not the folder of a finished run"):
        run_files(tmp_path, "me/model")
    with pytest.raises(CheckpointError, match="my model cannot be pushed to the Hub: the id is not of the form"):
        run_files(tmp_path, "my model")
    with pytest.raises(CheckpointError, match="runs/absent is no folder here, and cannot be had from the Hub"):
        inspect_checkpoint("runs/absent", HubOptions(local_files_only=True))


def saved(folder: Path, mode: str, inference: str = "cn+", source: BrightnessContexts | None = None) -> Path:
    model = timm.create_model("cn_cifar_convnet", num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batch norms that never saw data
        cn_hf.patch_model(model, mode=mode, context_names=["day", "night"])
    if mode not in ("bn", "mn"):
        cn_hf.set_inference(model, inference, source=source)
    return cn_hf.save_pretrained(model, folder)


@pytest.mark.parametrize(
    ("mode", "inference", "without"),
    [
        ("cn-channels", "cn+", True), ("cn-channels", "cn", False), ("cn-channels", "predict", True),
        ("dsbn", "cn+", False), ("dsbn", "average", True), ("bn", "cn+", True),
    ],
)  # fmt: skip
def test_all_contexts_leaves_out_none_where_ids_are_needed(mode, inference, without, picture, tmp_path):
    source = BrightnessContexts(100.0) if inference == "predict" else None
    checkpoint = saved(tmp_path, mode, inference, source)
    done = CliRunner().invoke(app, ["predict", str(checkpoint), str(picture), "--all-contexts"])
    assert done.exit_code == 0, done.exception
    told = [line.split("(")[1].split(")")[0] for line in done.output.splitlines()]
    contexts = [] if mode == "bn" else ["context day", "context night"]
    assert told == ["no context given"] * without + contexts


@pytest.mark.parametrize(
    ("mode", "inference", "words"),
    [
        ("cn-channels", "cn+", "mode: cn-channels, embedder; without ids: cn+ (learned, none)"),
        ("cn-channels", "cn", "mode: cn-channels, embedder; needs context ids"),
        ("dsbn", "cn+", "mode: dsbn; needs context ids"),
        ("dsbn", "average", "mode: dsbn; without ids: average"),
        ("bn", "cn+", "mode: bn, a baseline without contexts"),
        ("mn", "cn+", "mode: mn, a baseline without contexts"),
    ],
)
def test_inspect_says_what_is_true_of_the_mode(mode, inference, words, tmp_path):
    lines = inspect_checkpoint(saved(tmp_path, mode, inference)).splitlines()
    assert words in lines
    assert ("context source: none" in lines) == (mode not in ("bn", "mn"))


def test_runs_of_other_kinds_say_what_they_are(tmp_path):
    saved(tmp_path / "checkpoint", "cn-channels")
    row = {"name": "true contexts", "correct": {"1": 3}, "num_samples": 4}
    evaluation = {"rows": [row], "top_k": [1], "findings": []}
    held_out = {"all": {"correct": 3, "pairs": 4, "accuracy_error": 0.1, "roc_auc": 0.9}}
    kinds = {
        "a Siamese run": {
            "held_out_split": "test",
            "networks": {"CN": {"held_out": held_out}},
        },
        "the demonstration": {"accuracy": {"as trained": {"clean": 0.75}}, "accuracy_over_images": {}},
        "a classifier's run": {"evaluation": evaluation, "evaluated_split": "test"},
    }
    for kind, results in kinds.items():
        (tmp_path / "results.json").write_text(json.dumps(results))
        told = inspect_checkpoint(tmp_path)
        assert f"run: {kind}" in told
        assert "75.00 %" in told
    (tmp_path / "results.json").write_text(json.dumps(kinds["the demonstration"]))
    with pytest.raises(CheckpointError, match="is of the demonstration `cn-hf demo`"):
        run_files(tmp_path, "me/model")
    for content, words in (("[]", "no results file"), ("{}", "no results file"), ("{", "cannot be read")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            inspect_checkpoint(tmp_path)


def test_a_device_that_is_not_there_is_refused(picture, tmp_path):
    checkpoint = saved(tmp_path, "cn-channels")
    absent = ["gpu", "hpu"] if torch.cuda.is_available() else ["gpu", "hpu", "cuda"]
    for device in absent:
        done = CliRunner().invoke(app, ["predict", str(checkpoint), str(picture), "--device", device])
        assert isinstance(done.exception, ConfigError)
        assert f"device '{device}' cannot be had" in str(done.exception)
        assert "Here there is cpu" in str(done.exception)


@pytest.mark.slow
def test_a_damaged_run_and_leftovers_are_not_published(runs, tmp_path):
    copy = Path(shutil.copytree(runs["timm"], tmp_path / "run"))
    weights = copy / "checkpoint" / "model.safetensors"
    listed = set(run_files(copy, "me/model").files)
    for name in (f".model.safetensors.{'0f' * 16}.tmp", ".writable.1", f".cn_hf-saving-{'0f' * 16}/model.safetensors"):
        (weights.parent / name).parent.mkdir(exist_ok=True)
        (weights.parent / name).write_bytes(b"of a killed save")
    assert set(run_files(copy, "me/model").files) == listed
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated, changed"):
        run_files(copy, "me/model")


@pytest.mark.slow
def test_push_publishes_what_the_dry_run_lists(runs, picture, tmp_path):
    with HubServer() as hub:
        code = "import sys; from cn_hf.cli import main; sys.argv = ['cn-hf', *sys.argv[1:]]; main()"

        def command(*arguments: object) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                check=False, cwd=tmp_path, env=hub.environment(tmp_path / "home"),
            )  # fmt: skip

        push = ("push", runs["timm"], "--repo-id", "tester/run")
        listed = command(*push, "--dry-run")
        assert listed.returncode == 0, listed.stderr
        assert not [request for request in hub.requests if request[0] != "GET"]
        pushed = command(*push, "--private")
        assert pushed.returncode == 0, pushed.stderr
        files = hub.files("tester/run")
        table = listed.stdout.split("\n--- README.md ---\n")[0].splitlines()[1:-1]
        names = {line.split()[0] for line in table}
        assert names == set(files) - {".gitattributes"}
        assert {"README.md", "results.json", "curves.png", "context_source/context_source.json"} <= names
        assert files["README.md"].decode().strip() == listed.stdout.split("--- README.md ---\n")[1].strip()

        seen = command("inspect", "tester/run")
        assert "contexts: 2 (day, night)" in seen.stdout, seen.stderr
        assert "model.safetensors, not downloaded" in seen.stdout
        told = command("predict", "tester/run", picture, "--all-contexts", "--top", "1")
        assert len(told.stdout.splitlines()) == 3, told.stderr
        wrong = command("predict", "tester/run", picture, "--context", "dusk")
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("error: unknown context 'dusk'")


def test_predict_refuses_a_siamese_checkpoint_older_than_its_task(picture, tmp_path):
    cn_hf.save_pretrained(cn_hf.patch_model(timm.create_model("test_vit", num_classes=4)), tmp_path / "checkpoint")
    (tmp_path / "results.json").write_text(json.dumps({"networks": {"cn": {}}, "held_out_split": "test"}))
    for place in (tmp_path, "checkpoint"), (tmp_path / "checkpoint", ""):
        result = CliRunner().invoke(app, ["predict", str(place[0]), str(picture), "--subfolder", place[1]])
        assert isinstance(result.exception, ConfigError)
        assert "Siamese" in str(result.exception)
