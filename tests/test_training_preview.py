"""What a dry run prints and draws, on small made-up data and on real images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import cn_hf
from cn_hf.data import DeviceBatches, Mixing, MixingConfig, PreparedData, StreamedBatches
from cn_hf.errors import CheckpointError, TrainingError
from cn_hf.recipes.classifier.data import load_data
from cn_hf.recipes.classifier.network import build_classifier
from cn_hf.recipes.classifier.preview import _named, draw_batch, preview
from cn_hf.training.config import TrainingConfig

CLASSES = ("red", "green", "a $ome^^thing$ of a very,\n very long name")
COLORS = ((220, 30, 30), (30, 200, 60), (40, 60, 230))
CONTEXTS = ("dawn", "noon", "dusk", "night")


def prepared(num_images: int = 10, contexts: bool = True, channels: int = 3, **options: Any) -> PreparedData:
    """Images of one colour, that of their class; by turns of each context but the last."""
    labels = torch.arange(num_images) % 3
    pixels = torch.tensor(COLORS, dtype=torch.uint8)[labels, :channels, None, None].expand(-1, -1, 12, 16).contiguous()
    ids = torch.arange(num_images) % 3 if contexts else None
    mean, std = (0.4, 0.5, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels]
    train = DeviceBatches(pixels, labels, ids, **{"batch_size": 4, "mean": mean, "std": std, **options})
    test = DeviceBatches(pixels[:2], labels[:2], None if ids is None else ids[:2], batch_size=4, mean=mean, std=std)
    return PreparedData(
        train=train, validation=None, test=test, num_classes=3, class_names=CLASSES,
        context_names=CONTEXTS if contexts else None, context_source=None, input_size=(channels, 12, 16),
        mean=mean, std=std, skipped={},
    )  # fmt: skip


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig.from_dict({"model": "cn_digits_convnet", "dataset": ["d"], "batch_size": 4, **options})


def colors_of(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        found, counts = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {(int(r), int(g), int(b)) for r, g, b in found[counts > 2000]}


def near(color: tuple[int, int, int], colors: set[tuple[int, int, int]]) -> bool:
    return any(max(abs(a - b) for a, b in zip(color, other, strict=True)) <= 1 for other in colors)


# ------------------------------------------------------------------------------------------------------------- the text


@pytest.mark.filterwarnings("ignore:No sample of contexts 'night'")
def test_text_of_a_patched_network(tmp_path: Path) -> None:
    data, options = prepared(), config(mode="cn-channels", epochs=7, norm_options={"eps": 0.001})
    model = build_classifier(options, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = preview(options, model, data, folder=tmp_path)
    written, _, rest = text.partition("\n\nimages:")
    assert TrainingConfig.from_yaml(written) == options
    assert [line for line in written.split("\n") if line.startswith("#")] == [
        "# network", "# data", "# contexts", "# training", "# output"
    ]  # fmt: skip
    assert rest.startswith(" train 10, test 2\nclasses: 3; input: 3x12x16")
    table = [line.split() for line in rest.split("\n\n")[1].split("\n")]
    assert table == [
        ["images", "per", "context", "train", "test"],
        ["dawn", "4", "1"], ["noon", "3", "1"], ["dusk", "3", "0"], ["night", "0", "0"],
    ]  # fmt: skip
    assert str(cn_hf.patch_report(model)) in rest
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rest
    assert "steps: 3 per epoch, 21 in all, batches of 4 (2 in the last of an epoch)" in rest
    assert rest.endswith(f"first training batch: {tmp_path / 'first_batch.png'}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_text_of_a_plain_network_of_several_processes(tmp_path: Path) -> None:
    data = prepared(8, contexts=False, num_processes=2, process_index=0)
    options = config(accumulation_steps=2)
    model = build_classifier(options, data)
    next(model.parameters()).requires_grad_(False)
    text = preview(options, model, data, folder=tmp_path)
    assert "context:" not in text.split("\nimages:")[1]
    assert "slots patched: none" in text
    frozen = next(model.parameters()).numel()
    total = sum(p.numel() for p in model.parameters())
    assert f"parameters: {total:,}, {total - frozen:,} of them trainable" in text
    assert "steps: 2 per epoch, 200 in all, batches of 4, over 2 processes, in 2 parts" in text


def test_soft_contexts_are_counted_by_weight(tmp_path: Path) -> None:
    data = prepared()
    assert isinstance(data.train, DeviceBatches)
    data.train.context_ids = torch.tensor([[0.75, 0.25, 0.0, 0.0]]).repeat(10, 1)
    text = preview(config(), build_classifier(config(), data), data, folder=tmp_path)
    assert [line.split() for line in text.split("\n") if line.startswith(("dawn", "noon", "night"))] == [
        ["dawn", "7.5", "1"], ["noon", "2.5", "1"], ["night", "0.0", "0"]
    ]  # fmt: skip


def test_many_contexts_without_names(tmp_path: Path) -> None:
    data = dataclasses.replace(prepared(300), context_names=None)
    assert isinstance(data.train, DeviceBatches)
    data.train.context_ids = torch.arange(300)
    text = preview(config(), build_classifier(config(), data), data, folder=tmp_path)
    assert "\n99 " in text
    assert "\n100 " not in text
    assert "and 200 contexts more" in text


def test_streams_are_not_read_for_their_contexts(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "context_ids": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    images = [Image.new("RGB", (12, 12), color) for color in COLORS for _ in range(3)]
    columns = {"image": images, "label": [0, 1, 0] * 3, "context_ids": [0, 0, 1] * 3}
    held = datasets.Dataset.from_dict(columns, features=features)
    stream = StreamedBatches(held.to_iterable_dataset(), num_rows=9, batch_size=4)
    data = dataclasses.replace(
        prepared(), train=stream, test=StreamedBatches(held, batch_size=4), num_classes=2, class_names=("a", "b"),
        context_names=("x", "y"), input_size=(3, 12, 12), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    text = preview(config(), build_classifier(config(), data), data, folder=tmp_path)
    assert [line.split() for line in text.split("\n") if line.startswith(("x ", "y "))] == [
        ["x", "?", "6"], ["y", "?", "3"]
    ]  # fmt: skip


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = prepared(1, batch_size=1)
    text = preview(config(), build_classifier(config(), data), data, folder=None)
    assert text.endswith("first training batch: dry-run/first_batch.png")
    assert near(COLORS[0], colors_of(tmp_path / "dry-run" / "first_batch.png"))


def test_process_without_images_of_the_first_batch(tmp_path: Path) -> None:
    data = prepared(1, num_processes=2, process_index=0)
    assert data.train is not None
    assert len(next(iter(data.train))["labels"]) == 0
    assert "first training batch" not in preview(config(), build_classifier(config(), data), data, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_batch_and_no_folder(tmp_path: Path) -> None:
    data = prepared()
    model = build_classifier(config(), data)
    none = prepared(3, drop_last=True)
    for without in (none, dataclasses.replace(data, train=None)):
        with pytest.raises(TrainingError, match="no batch to show"):
            preview(config(), model, without, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="give another folder"):
        preview(config(), model, data, folder=tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize(("num_images", "contexts"), [(1, True), (3, False), (9, True), (50, False)])
def test_picture_shows_the_images_as_they_were(num_images: int, contexts: bool, tmp_path: Path) -> None:
    data = prepared(num_images, contexts=contexts, batch_size=64)
    assert data.train is not None
    batch = next(iter(data.train))
    colors = colors_of(draw_batch(batch, data, tmp_path / "new" / "picture.png"))
    for color in COLORS[:num_images]:
        assert near(color, colors)
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.size[0] == pytest.approx(150 * max(3.6, 1.5 * min(8, num_images)), abs=2)


def test_picture_of_gray_half_precision_images_with_odd_values(tmp_path: Path) -> None:
    data = prepared(6, channels=1, batch_size=6, dtype=torch.bfloat16)
    assert data.train is not None
    batch = dict(next(iter(data.train)))
    batch["pixel_values"][0] = torch.nan
    batch["pixel_values"][1] = 1e4
    colors = colors_of(draw_batch(batch, data, tmp_path / "gray.png"))
    assert (0, 0, 0) in colors
    assert (255, 255, 255) in colors
    assert any(near((value, value, value), colors) for value in range(219, 222))  # bfloat16 rounds


def test_picture_of_mixed_images(tmp_path: Path) -> None:
    mixing = Mixing(MixingConfig(mixup=1.0), num_classes=3, num_contexts=4)
    data = prepared(12, batch_size=12, mixing=mixing)
    assert data.train is not None
    batch = next(iter(data.train))
    assert batch["labels"].shape == (12, 3)
    mixed = colors_of(draw_batch(batch, data, tmp_path / "mixed.png"))
    first = batch["labels"][0] @ torch.tensor(COLORS, dtype=torch.float32)
    assert near((int(first[0]), int(first[1]), int(first[2])), mixed)


def test_names_of_parts() -> None:
    assert _named(torch.tensor(1), CLASSES) == ["green"]
    assert _named(torch.tensor(2), None) == ["2"]
    (long,) = _named(torch.tensor(2), CLASSES)
    assert long == "a $ome^^thing$ of a ver…"
    assert _named(torch.tensor([0.3, 0.7, 0.0]), CLASSES) == ["green 70%", "red 30%"]
    assert _named(torch.tensor([0.3, 0.3, 0.4]), CLASSES) == ["a $ome^^thing$ of a… 40%", "red 30%"]
    assert _named(torch.tensor([0.0, 1.0, 0.0]), CLASSES) == ["green"]
    assert _named(torch.tensor([1.0]), ("only",)) == ["only"]
    assert _named(torch.tensor([0.996, 0.004]), None) == ["0"]


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    options = config(
        dataset=[str(shared_data / "cifar100")], label_column="fine_label", contexts="column:coarse_label",
        mode="cn-channels", augment=["flip", "crop"], max_train_images=64, max_test_images=50, cutmix=1.0,
        validation_fraction=0.0, batch_size=32, image_size=40, progress=False,
    )  # fmt: skip
    data = load_data(options, Accelerator(cpu=True))
    text = preview(options, build_classifier(options, data), data, folder=tmp_path)
    assert "images: train 64, test 50" in text
    counts = [line.split() for line in text.split("images per context")[1].split("\n\n")[0].split("\n")[1:]]
    assert len(counts) == 20
    assert [sum(int(row[column]) for row in counts) for column in (1, 2)] == [64, 50]
    with Image.open(tmp_path / "first_batch.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 2000
