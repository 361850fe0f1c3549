"""From splits to batches in one call: contexts, statistics, memory budget, skipping, and what splits must agree on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict, Value

import cn_hf.data
from cn_hf.contexts.column import ColumnContexts
from cn_hf.data import (
    DeviceBatches,
    MixingConfig,
    StreamedBatches,
    build_augmentation,
    channel_statistics,
    load_splits,
    prepare_data,
)
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError

SIZES = {"train": 30, "validation": 7, "test": 11}


def png(array: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_split(n: int, seed: int, *, side: int = 6, broken: tuple[int, ...] = (), classes: int = 3) -> Dataset:
    arrays = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    images = [png(array) for array in arrays]
    for row in broken:
        images[row] = {"bytes": b"no image", "path": None}
    features = Features(
        {"image": Image(), "label": ClassLabel(num_classes=classes), "domain": ClassLabel(names=["day", "night"])}
    )
    columns = {"image": images, "label": [i % classes for i in range(n)], "domain": [i % 2 for i in range(n)]}
    return Dataset.from_dict(columns, features=features)


def make_splits(**options: Any) -> DatasetDict:
    return DatasetDict({name: make_split(n, seed, **options) for seed, (name, n) in enumerate(SIZES.items())})


def as_stream(splits: DatasetDict) -> IterableDatasetDict:
    return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})


def together(batches: Any) -> dict[str, torch.Tensor]:
    parts = list(batches)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_everything_from_one_call() -> None:
    augment = build_augmentation(["flip", "crop"], image_size=9)
    data = prepare_data(make_splits(), context_source=ColumnContexts("domain"), batch_size=8, augment=augment)
    for name, count in SIZES.items():
        batches = getattr(data, name)
        assert isinstance(batches, DeviceBatches)
        assert batches.num_samples == count
        whole = together(batches)
        assert whole["pixel_values"].shape == (count, 3, 9, 9)
        assert torch.equal(whole["labels"], whole["index"] % 3)
        assert torch.equal(whole["context_ids"], whole["index"] % 2)
        assert (whole["index"].tolist() == list(range(count))) is (name != "train")
        assert sorted(whole["index"].tolist()) == list(range(count))
    assert (data.num_classes, data.class_names) == (3, ("0", "1", "2"))
    assert data.context_names == ("day", "night")
    assert data.context_source is not None
    assert data.context_source.fitted
    assert data.input_size == (3, 9, 9)
    assert data.skipped == {"train": (), "validation": (), "test": ()}


def test_statistics_are_those_of_the_training_split() -> None:
    data = prepare_data(make_splits(), batch_size=8)
    assert data.train is not None
    assert isinstance(data.train, DeviceBatches)
    assert (data.mean, data.std) == channel_statistics(data.train.images)
    whole = together(data.train)["pixel_values"]
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    given = prepare_data(make_splits(), batch_size=8, mean=(0.5, 0.5, 0.5))
    assert given.mean == (0.5, 0.5, 0.5)
    assert given.std == data.std


def test_evaluation_is_not_augmented_and_has_its_own_batch_size() -> None:
    splits = make_splits()
    augmented = prepare_data(splits, batch_size=8, eval_batch_size=4, augment=build_augmentation(["flip", "crop"]))
    plain = prepare_data(splits, batch_size=8)
    assert torch.equal(together(augmented.test)["pixel_values"], together(plain.test)["pixel_values"])
    assert not torch.equal(together(augmented.train)["pixel_values"], together(plain.train)["pixel_values"])
    assert augmented.test is not None
    assert len(augmented.test) == 3
    dropped = prepare_data(splits, batch_size=8, drop_last=True)
    assert dropped.train is not None
    assert dropped.test is not None
    assert (dropped.train.num_samples, dropped.test.num_samples) == (24, 11)


def test_splits_beyond_the_budget_are_streamed_with_the_same_result() -> None:
    splits = make_splits()
    options: dict[str, Any] = {"batch_size": 8, "context_source": ColumnContexts("domain"), "seed": 3}
    held = prepare_data(splits, **options)
    some = prepare_data(splits, **options, memory_budget_bytes=108 * 37)
    assert [type(getattr(some, name)) for name in SIZES] == [DeviceBatches, DeviceBatches, StreamedBatches]
    none = prepare_data(splits, **options, memory_budget_bytes=0)
    assert [type(getattr(none, name)) for name in SIZES] == [StreamedBatches] * 3
    assert (none.mean, none.std, none.input_size) == (held.mean, held.std, held.input_size)
    for name in SIZES:
        expected = together(getattr(held, name))
        for other in (some, none):
            found = together(getattr(other, name))
            assert list(found) == list(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_split_beyond_the_budget_is_read_from_disk_by_workers(tmp_path: Path) -> None:
    make_splits().save_to_disk(tmp_path / "toy")
    splits = load_splits(tmp_path / "toy", validation_split="validation")
    options: dict[str, Any] = {
        "batch_size": 8,
        "augment": build_augmentation(["flip", "crop"]),
        "mixing": MixingConfig(mixup=0.2, cutmix=1.0),
        "balance_contexts": True,
        "context_source": ColumnContexts("domain"),
    }
    held = prepare_data(splits, **options)
    for num_workers in (0, 1, 3):
        read = prepare_data(splits, **options, memory_budget_bytes=1, num_workers=num_workers)
        assert read.train is not None
        assert held.train is not None
        assert isinstance(read.train, StreamedBatches)
        for data in (held, read):
            assert data.train is not None
            data.train.set_epoch(1, 2)
        for expected, found in zip(held.train, read.train, strict=True):
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert torch.equal(together(read.test)["pixel_values"], together(held.test)["pixel_values"])


@pytest.mark.parametrize("budget", [0, 2**30])
def test_training_alone_is_mixed_and_balanced(budget: int) -> None:
    splits = make_splits()
    splits["train"] = make_split(30, 0).select([*range(0, 30, 2), 1, 3])  # 15 by day, 2 by night
    options: dict[str, Any] = {"context_source": ColumnContexts("domain"), "memory_budget_bytes": budget}
    mixing = MixingConfig(mixup=0.4, cutmix=1.0)
    data = prepare_data(splits, batch_size=17, mixing=mixing, balance_contexts=True, **options)
    plain = prepare_data(splits, batch_size=17, **options)
    whole = together(data.train)
    assert whole["labels"].shape == (17, 3)
    assert whole["context_ids"].shape == (17, 2)
    assert whole["labels"].dtype == whole["context_ids"].dtype == torch.float32
    torch.testing.assert_close(whole["labels"].sum(1), torch.ones(17))
    assert sorted((whole["index"] < 15).int().bincount().tolist()) == [8, 9]
    assert (whole["context_ids"].amax(1) < 1).any()
    for name in ("validation", "test"):
        expected, found = together(getattr(plain, name)), together(getattr(data, name))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    idle = together(prepare_data(splits, batch_size=8, mixing=MixingConfig(), **options).train)
    assert idle["labels"].dtype == torch.int64


def test_mixing_without_names_of_contexts_and_without_contexts() -> None:
    splits = make_splits()
    mixing = MixingConfig(mixup=1.0)
    assert "context_ids" not in together(prepare_data(splits, batch_size=8, mixing=mixing).train)
    named = ColumnContexts("domain").fit(splits).apply(splits)
    assert together(prepare_data(named, batch_size=8, mixing=mixing).train)["context_ids"].shape == (30, 2)
    plain = named.cast_column("context_ids", Value("int64"))
    assert together(prepare_data(plain, batch_size=8, mixing=mixing).train)["context_ids"].shape == (30, 2)
    with pytest.raises(ConfigError, match=r"cast it to datasets\.ClassLabel"):
        prepare_data(as_stream(plain), batch_size=8, mixing=mixing)
    streamed = prepare_data(as_stream(named), batch_size=8, mixing=mixing)
    assert together(streamed.train)["context_ids"].shape == (30, 2)
    weights = [[0.25, 0.75, 0.0]] * 30
    soft = DatasetDict(train=splits["train"].add_column("context_ids", weights))
    for budget in (0, 2**30):
        data = prepare_data(soft, batch_size=8, mixing=mixing, memory_budget_bytes=budget)
        torch.testing.assert_close(together(data.train)["context_ids"], torch.tensor(weights))
    for splits_without, message in ((splits, "the data has none"), (soft, "weights of several")):
        with pytest.raises(ConfigError, match=message):
            prepare_data(splits_without, batch_size=8, balance_contexts=True)
    with pytest.raises(ConfigError, match="streaming=False"):
        prepare_data(as_stream(named), batch_size=8, balance_contexts=True)


def test_streams() -> None:
    splits = make_splits()
    held = prepare_data(splits, batch_size=8, context_source=ColumnContexts("domain"))
    data = prepare_data(as_stream(splits), batch_size=8, context_source=ColumnContexts("domain"))
    assert (data.mean, data.std, data.num_classes, data.context_names) == (held.mean, held.std, 3, ("day", "night"))
    expected, found = together(held.test), together(data.test)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert data.train is not None
    assert data.train.num_samples == 30


@pytest.mark.parametrize("budget", [0, 2**30])
def test_skipping_unreadable_images(budget: int) -> None:
    splits = make_splits()
    splits["train"] = make_split(30, 0, broken=(3, 11))
    with pytest.raises(DatasetFileError, match=r"[Ii]mage 3 "):
        together(prepare_data(splits, batch_size=8, memory_budget_bytes=budget, mean=[0.5], std=[0.5]).train)
    data = prepare_data(splits, batch_size=8, on_error="skip", memory_budget_bytes=budget)
    whole = together(data.train)
    assert sorted(whole["index"].tolist()) == [row for row in range(30) if row not in (3, 11)]
    assert torch.equal(whole["labels"], whole["index"] % 3)
    assert data.train is not None
    skipped = data.skipped["train"] if budget else data.train.skipped  # type: ignore[attr-defined]
    assert sorted(skipped) == [3, 11]


def test_skipping_with_contexts() -> None:
    splits = make_splits()
    splits["train"] = make_split(30, 0, broken=(3, 11))
    data = prepare_data(splits, batch_size=8, on_error="skip", context_source=ColumnContexts("domain"))
    whole = together(data.train)
    assert torch.equal(whole["context_ids"], whole["index"] % 2)
    assert len(whole["index"]) == 28
    with pytest.warns(UserWarning, match="3, 11"):
        data = prepare_data(
            splits, batch_size=8, on_error="skip", context_source=ColumnContexts("domain"), memory_budget_bytes=0
        )
    assert len(together(data.train)["index"]) == 28


def test_contexts_the_data_brings_and_contexts_without_names() -> None:
    splits = ColumnContexts("domain").fit(make_splits()).apply(make_splits())
    assert prepare_data(splits, batch_size=8).context_names == ("day", "night")
    plain = splits.cast_column("context_ids", Value("int64"))
    data = prepare_data(plain, batch_size=8)
    assert data.context_names is None
    assert torch.equal(together(data.test)["context_ids"], torch.arange(11) % 2)
    assert "context_ids" not in together(prepare_data(make_splits(), batch_size=8).test)


def test_a_fitted_source_is_not_fitted_again() -> None:
    source = ColumnContexts("domain").fit(make_splits())
    only_test = DatasetDict(test=make_splits()["test"])
    data = prepare_data(only_test, context_source=source, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data.train is None
    assert data.validation is None
    assert together(data.test)["context_ids"].tolist() == [i % 2 for i in range(11)]


def test_parts_of_two_processes_are_one() -> None:
    options: dict[str, Any] = {"batch_size": 8, "augment": build_augmentation(["flip", "crop"])}
    whole = prepare_data(make_splits(), **options)
    parts = [prepare_data(make_splits(), **options, num_processes=2, process_index=p) for p in range(2)]
    assert parts[0].mean == parts[1].mean == whole.mean
    for name in SIZES:
        both = zip(getattr(parts[0], name), getattr(parts[1], name), strict=True)
        for one, (first, second) in zip(getattr(whole, name), both, strict=True):
            for key in one:
                torch.testing.assert_close(torch.cat([first[key], second[key]]), one[key])


def test_plain_integer_labels() -> None:
    splits = make_splits().cast_column("label", Value("int64"))
    data = prepare_data(splits, batch_size=8)
    assert (data.num_classes, data.class_names) == (3, None)
    with pytest.raises(DatasetError, match="ClassLabel"):
        prepare_data(as_stream(splits), batch_size=8)
    labels = [0] * 10 + [3]
    splits["test"] = splits["test"].remove_columns("label").add_column("label", labels)
    with pytest.raises(DatasetError, match="row 10 has 'label' 3; labels must be 0 to 2"):
        prepare_data(splits, batch_size=8)


@pytest.mark.parametrize("budget", [2**30, 0], ids=["held", "streamed"])
@pytest.mark.parametrize(("value", "message"), [(None, "row 3 has no 'context_ids'"), (-1, "'context_ids' -1")])
def test_contexts_that_are_none(budget: int, value: int | None, message: str) -> None:
    train = make_splits()["train"]
    ids: list[int | None] = [0] * len(train)
    ids[3] = value
    train = train.add_column("context_ids", ids)

    def read() -> None:
        options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "memory_budget_bytes": budget}
        together(prepare_data(DatasetDict(train=train), batch_size=8, **options).train)

    with pytest.raises(DatasetError, match=message):
        read()


@pytest.mark.parametrize("budget", [2**30, 0], ids=["held", "streamed"])
def test_contexts_that_are_no_integers(budget: int) -> None:
    train = make_splits()["train"]
    fractions = train.add_column("context_ids", [0.7] * len(train))
    with pytest.raises(DatasetError, match=r"'context_ids' holds (float64|double), not integers"):
        prepare_data(DatasetDict(train=fractions), batch_size=8, memory_budget_bytes=budget)
    flags = train.add_column("context_ids", [i % 2 == 1 for i in range(len(train))])
    data = prepare_data(DatasetDict(train=flags), batch_size=8, memory_budget_bytes=budget)
    assert set(together(data.train)["context_ids"].tolist()) == {0, 1}


def test_splits_that_number_their_contexts_differently() -> None:
    def contexts(*names: str) -> Dataset:
        split = make_split(4, 0)
        return split.add_column("context_ids", [0, 1, 0, 1]).cast_column("context_ids", ClassLabel(names=list(names)))

    splits = DatasetDict(train=contexts("day", "night"), test=contexts("night", "day"))
    with pytest.raises(DatasetError, match=r"'train' and 'test' number their contexts differently.*'night', 'day'"):
        prepare_data(splits, batch_size=4)
    splits["test"] = contexts("day", "night")
    assert prepare_data(splits, batch_size=4).context_names == ("day", "night")


def test_splits_that_disagree() -> None:
    splits = make_splits()
    splits["test"] = make_split(11, 2, classes=4)
    with pytest.raises(DatasetError, match="'train' and 'test' have different classes"):
        prepare_data(splits, batch_size=8)
    splits["test"] = make_split(11, 2, side=5)
    with pytest.raises(DatasetError, match="splits differ in the size"):
        prepare_data(splits, batch_size=8)
    assert prepare_data(splits, batch_size=8, decode_size=5).input_size == (3, 5, 5)


def test_wrong_input() -> None:
    splits = make_splits()
    with pytest.raises(DatasetError, match="did you mean 'test'"):
        prepare_data(DatasetDict(tests=splits["test"]), batch_size=8)
    with pytest.raises(DatasetError, match="DatasetDict"):
        prepare_data(splits["train"], batch_size=8)
    with pytest.raises(ConfigError, match="mean and std are measured on the training split"):
        prepare_data(DatasetDict(test=splits["test"]), batch_size=8)
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        prepare_data(splits, batch_size=8, on_error="skp")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="did you mean 'image'"):
        prepare_data(splits, batch_size=8, image_column="imag")
    with pytest.raises(DatasetError, match="no rows"):
        prepare_data(DatasetDict(train=splits["train"].select([])), batch_size=8)
    with pytest.raises(ConfigError, match="batch_size"):
        prepare_data(splits, batch_size=0)


def test_public_names_are_there() -> None:
    for name in cn_hf.data.__all__:
        assert getattr(cn_hf.data, name).__name__ == name
    assert set(cn_hf.data.__all__) <= set(dir(cn_hf.data))
    with pytest.raises(AttributeError, match="no_such_name"):
        cn_hf.data.no_such_name  # noqa: B018


def test_real_superclasses_and_grey_digits(shared_data: Path, tmp_path: Path) -> None:
    stream = load_splits(shared_data / "cifar100", streaming=True)
    features = stream["train"].features
    splits = DatasetDict(
        {name: Dataset.from_list(list(split.take(200)), features=features) for name, split in stream.items()}
    )
    data = prepare_data(splits, context_source=ColumnContexts("coarse_label"), label_column="fine_label", batch_size=64)
    assert (data.num_classes, data.input_size) == (100, (3, 32, 32))
    assert data.context_names is not None
    assert len(data.context_names) == 20
    whole = together(data.test)
    assert whole["context_ids"].tolist() == splits["test"]["coarse_label"][:]
    assert whole["labels"].tolist() == splits["test"]["fine_label"][:]
    np.testing.assert_allclose(data.mean, (0.5071, 0.4865, 0.4409), atol=0.03)
    mnist = load_splits(shared_data / "mnist", train_split="train[:300]", test_split="test[:100]", cache_dir=tmp_path)
    digits = prepare_data(mnist, batch_size=50, decode_size=32)
    assert digits.input_size == (3, 32, 32)
    assert digits.mean[0] == digits.mean[2]
