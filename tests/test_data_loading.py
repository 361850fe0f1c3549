"""Splits by name, validation cuts, image and label columns, and what is said when something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from cn_hf.data import find_image_column, find_label_column, label_names, load_splits, prepare_data, take_shuffled
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError
from cn_hf.reading.loading import read_labels


def picture(value: int, side: int = 4) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8))


def make(num_rows: int, num_classes: int = 3) -> Dataset:
    return Dataset.from_dict(
        {"image": [picture(i % 256) for i in range(num_rows)], "label": [i % num_classes for i in range(num_rows)]},
        features=Features({"image": Image(), "label": ClassLabel(num_classes=num_classes)}),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of parquet files with splits train (30) and test (6)."""
    place = tmp_path / "toy"
    place.mkdir()
    make(30).to_parquet(place / "train-0.parquet")
    make(6).to_parquet(place / "test-0.parquet")
    return place


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., DatasetDict]:
    return lambda path, **options: load_splits(path, cache_dir=tmp_path / "cache", **options)


# --------------------------------------------------------------------------------------------------------- splits


def test_splits_by_name(folder: Path, load: Callable[..., DatasetDict]) -> None:
    splits = load(folder)
    assert isinstance(splits, DatasetDict)
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "test": 6}
    assert list(load(folder, test_split=None)) == ["train"]
    assert list(load(folder, train_split=None)) == ["test"]
    swapped = load(str(folder), train_split="test", test_split="train")
    assert {name: len(split) for name, split in swapped.items()} == {"train": 6, "test": 30}


def test_slices(folder: Path, load: Callable[..., DatasetDict]) -> None:
    splits = load(folder, train_split="train[:10]", validation_split="train[50%:]", test_split="test[:2]+train[10:12]")
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "validation": 15, "test": 4}
    assert splits["validation"]["label"][:3] == [0, 1, 2]
    assert splits["test"]["label"][:] == [0, 1, 1, 2]
    for wrong in ("train[:x]", "train[1:2:3]"):
        with pytest.raises(ConfigError, match="train\\[:10%\\]"):
            load(folder, train_split=wrong)
    with pytest.raises(DatasetError, match="did you mean 'train'"):
        load(folder, train_split="trian[:10]")


def test_streaming(folder: Path, load: Callable[..., DatasetDict]) -> None:
    splits = load(folder, streaming=True)
    assert isinstance(splits, datasets.IterableDatasetDict)
    assert [row["label"] for row in splits["test"]] == [0, 1, 2, 0, 1, 2]
    assert find_label_column(splits) == "label"
    with pytest.raises(ConfigError, match="slice"):
        load(folder, streaming=True, train_split="train[:10]")
    with pytest.raises(ConfigError, match="validation_fraction"):
        load(folder, streaming=True, validation_fraction=0.1)


@pytest.mark.parametrize("streaming", [False, True])
def test_imagefolder(tmp_path: Path, load: Callable[..., DatasetDict], streaming: bool) -> None:
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture(10 * i + 100 * (name == "dog")).save(place / f"{i}.png")
    splits = load(tmp_path / "pets", streaming=streaming)
    assert find_image_column(splits) == "image"
    assert label_names(splits, find_label_column(splits)) == ("cat", "dog")
    data = prepare_data(splits, batch_size=4)
    assert (data.num_classes, data.class_names, data.input_size) == (2, ("cat", "dog"), (3, 4, 4))
    assert data.train is not None
    assert data.train.num_samples == 6
    values = {
        (int(label), round(float(image[0, 0, 0] * data.std[0] + data.mean[0]) * 255))
        for batch in data.train
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    }
    assert values == {(0, 0), (0, 10), (0, 20), (1, 100), (1, 110), (1, 120)}


def test_saved_to_disk(tmp_path: Path) -> None:
    DatasetDict(train=make(9), test=make(3)).save_to_disk(tmp_path / "saved")
    assert len(load_splits(tmp_path / "saved")["train"]) == 9
    make(5).save_to_disk(tmp_path / "single")
    assert len(load_splits(tmp_path / "single", test_split=None)["train"]) == 5
    stream = load_splits(tmp_path / "saved", streaming=True)["test"]
    assert [row["label"] for row in stream] == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------- validation


def rows_of(dataset: Dataset) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in dataset["image"]]


def test_validation_cut_is_stratified_disjoint_ordered_and_fixed(
    folder: Path, load: Callable[..., DatasetDict]
) -> None:
    splits = load(folder, validation_fraction=0.2, seed=3)
    assert list(splits) == ["train", "validation", "test"]
    train, validation = rows_of(splits["train"]), rows_of(splits["validation"])
    assert sorted(train + validation) == list(range(30))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert np.bincount(splits["validation"]["label"]).tolist() == [2, 2, 2]
    assert rows_of(load(folder, validation_fraction=0.2, seed=3)["validation"]) == validation
    assert rows_of(load(folder, validation_fraction=0.2, seed=4)["validation"]) != validation


def test_validation_cut_without_the_means_to_stratify(tmp_path: Path) -> None:
    # One class has a single image; another data set has no labels at all.
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rare = Dataset.from_dict({"image": [picture(i) for i in range(10)], "label": [1] + [0] * 9}, features=features)
    bare = Dataset.from_dict({"image": [picture(i) for i in range(10)]}, features=Features({"image": Image()}))
    for name, dataset in (("rare", rare), ("bare", bare)):
        dataset.save_to_disk(tmp_path / name)
        splits = load_splits(tmp_path / name, validation_fraction=0.3, test_split=None)
        assert sorted(rows_of(splits["train"]) + rows_of(splits["validation"])) == list(range(10))
        assert len(splits["validation"]) == 3


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_validation_fraction_out_of_range(folder: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        load_splits(folder, validation_fraction=fraction)


def test_validation_that_would_be_empty(folder: Path, load: Callable[..., DatasetDict]) -> None:
    with pytest.raises(DatasetError, match="is 0 images"):
        load(folder, validation_fraction=0.01)
    with pytest.raises(DatasetError, match="is 30 images"):
        load(folder, validation_fraction=0.99)


def test_contradicting_options(folder: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_splits(folder, validation_split="test", validation_fraction=0.1)
    with pytest.raises(ConfigError, match="train and test are both split 'train'"):
        load_splits(folder, test_split="train")
    with pytest.raises(ConfigError, match="no split asked for"):
        load_splits(folder, train_split=None, test_split=None)
    with pytest.raises(ConfigError, match="train_split is None"):
        load_splits(folder, train_split=None, validation_fraction=0.1)
    with pytest.raises(ConfigError, match="max_test_images"):
        load_splits(folder, max_test_images=0)


def test_fewer_images(folder: Path, load: Callable[..., DatasetDict]) -> None:
    splits = load(folder, validation_fraction=0.2, max_train_images=7, max_test_images=100)
    assert {name: len(split) for name, split in splits.items()} == {"train": 7, "validation": 6, "test": 6}
    assert not set(rows_of(splits["train"])) & set(rows_of(splits["validation"]))
    first, again, other = (rows_of(take_shuffled(make(50), 5, seed)) for seed in (0, 0, 1))
    assert first == again == sorted(first)
    assert first != other
    stream = load(folder, streaming=True, max_train_images=7)["train"]
    assert len(list(stream)) == 7


# -------------------------------------------------------------------------------------------------- what is missing


def test_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(DatasetFileError, match="did you mean 'toy'"):
        load_splits(folder.parent / "toi")
    with pytest.raises(DatasetFileError, match="did you mean 'toy'"):
        load_splits(str(folder.parent / "toyy"))
    with pytest.raises(DatasetFileError, match="nor is there a folder"):
        load_splits("./no/such/place")
    with pytest.raises(OSError, match="is a file"):
        load_splits(folder / "train-0.parquet")


def test_missing_split_and_configuration_name_what_there_is(folder: Path, load: Callable[..., DatasetDict]) -> None:
    with pytest.raises(DatasetError, match=r"no split 'tests': did you mean 'test'\? Valid: 'test', 'train'"):
        load(folder, test_split="tests")
    with pytest.raises(DatasetError, match=r"no split 'validation'.*give none"):
        load(folder, validation_split="validation")
    with pytest.raises(DatasetError, match="default"):
        load(folder, name="no_such_configuration")


def test_folder_without_data_and_broken_file(tmp_path: Path, load: Callable[..., DatasetDict]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetFileError, match="empty"):
        load(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises((DatasetFileError, DatasetError), match="broken"):
        load(tmp_path / "broken")


# --------------------------------------------------------------------------------------------------------- columns


def columns(**features: object) -> Dataset:
    return Dataset.from_dict({name: [] for name in features}, features=Features(features))


def test_image_column() -> None:
    assert find_image_column(columns(img=Image(), x=Value("int64"))) == "img"
    two = columns(a=Image(), b=Image(), label=ClassLabel(num_classes=2))
    assert find_image_column(two, "b") == "b"
    with pytest.raises(DatasetError, match=r"\['a', 'b'\]"):
        find_image_column(two)
    with pytest.raises(DatasetError, match="did you mean 'img'"):
        find_image_column(columns(img=Image()), "imgs")
    with pytest.raises(DatasetError, match="label"):
        find_image_column(two, "label")
    with pytest.raises(DatasetError, match="image"):
        find_image_column(columns(x=Value("string")))


def test_label_column() -> None:
    label = ClassLabel(num_classes=2)
    assert find_label_column(columns(img=Image(), target=label)) == "target"
    assert find_label_column(columns(label=label, identity=label)) == "label"
    assert find_label_column(columns(label=label, context_ids=label)) == "label"
    assert find_label_column(columns(fine=label, context_ids=label)) == "fine"
    assert find_label_column(columns(labels=Value("int32"), size=Value("int64"))) == "labels"
    assert find_label_column(columns(size=Value("int64"), x=Image()), "size") == "size"
    assert find_label_column(columns(domain=label, label=Value("int64"))) == "label"
    assert find_label_column(columns(label=Value("string"), kind=label)) == "kind"
    assert find_label_column(columns(img=Image(), coarse_label=label, fine_label=label)) == "fine_label"
    assert find_label_column(columns(fine_label=label, labels=label)) == "labels"
    assert find_label_column(columns(labels=label, label=label)) == "label"
    with pytest.raises(DatasetError, match=r"'fine' .2 classes., 'coarse_label' .2 classes.; name the"):
        find_label_column(columns(img=Image(), fine=label, coarse_label=label))
    with pytest.raises(DatasetError, match="no column of class labels"):
        find_label_column(columns(img=Image(), size=Value("int64")))
    with pytest.raises(DatasetError, match="class_encode_column"):
        find_label_column(columns(name=Value("string")), "name")
    with pytest.raises(DatasetError, match="did you mean 'label'"):
        find_label_column(columns(label=label), "lable")


def test_label_names() -> None:
    dataset = columns(a=ClassLabel(names=["x", "y"]), b=Value("int64"))
    assert label_names(dataset, "a") == ("x", "y")
    assert label_names(dataset, "b") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 5, 7], "row 2 has 'label' 5; labels must be 0 to 2 .2 such rows"),
        ([0, -1, 2, 1], "row 1 has 'label' -1; .*split without labels"),
        ([0, 1, 2, None], "row 3 has no 'label'"),
    ],
)
def test_label_out_of_range_names_its_row(values: list[int | None], message: str) -> None:
    dataset = Dataset.from_dict({"label": values}, features=Features({"label": Value("int64")}))
    with pytest.raises(DatasetError, match=message):
        read_labels(dataset, "label", num_classes=3)


def test_labels_follow_a_selection() -> None:
    labels = read_labels(make(9).select([8, 1, 3]), "label")
    assert labels.tolist() == [2, 1, 0]
    assert labels.dtype == np.int64


# -------------------------------------------------------------------------------------------------------- real data


REAL = {
    "cifar10": ("img", "label", 10, (50_000, 10_000), (3, 32, 32)),
    "cifar100": ("img", "fine_label", 100, (50_000, 10_000), (3, 32, 32)),
    "mnist": ("image", "label", 10, (60_000, 10_000), (3, 28, 28)),
    "svhn": ("image", "label", 10, None, (3, 32, 32)),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_columns_of_real_folders_are_found(shared_data: Path, tmp_path: Path, name: str, streaming: bool) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip(f"no folder {name} among the real data sets")
    image_column, label_column, num_classes, lengths, size = REAL[name]
    splits = load_splits(shared_data / name, streaming=streaming, cache_dir=tmp_path)
    assert find_image_column(splits) == image_column
    assert find_label_column(splits) == label_column
    if lengths is not None and not streaming:
        assert (len(splits["train"]), len(splits["test"])) == lengths
    few = {key: split.take(200) for key, split in splits.items()}
    container = datasets.IterableDatasetDict if streaming else DatasetDict
    data = prepare_data(container(few), batch_size=100, label_column=label_column)
    assert (data.num_classes, data.input_size) == (num_classes, size)
    assert data.test is not None
    assert data.test.num_samples == 200
    batch = next(iter(data.test))
    assert batch["labels"].tolist() == [row[label_column] for row in few["test"].take(100)]


def test_real_folders(shared_data: Path, tmp_path: Path) -> None:
    splits = load_splits(shared_data / "svhn", validation_fraction=0.1, cache_dir=tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 975, "validation": 108, "test": 486}
    assert find_image_column(splits) == "image"
    assert find_label_column(splits) == "label"
    with pytest.raises(DatasetError, match="cropped_digits"):
        load_splits(shared_data / "svhn", name="full_numbers", cache_dir=tmp_path)
    with pytest.raises(DatasetFileError, match="did you mean 'cifar10'"):
        load_splits(shared_data / "cifra10")
