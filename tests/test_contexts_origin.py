"""Origin contexts: datasets blended into one, their images, labels and context ids."""

from __future__ import annotations

import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from cn_hf.contexts import ContextSource, OriginContexts
from cn_hf.data import find_label_column
from cn_hf.errors import (
    CheckpointError,
    ConfigError,
    ContextSourceError,
    DatasetError,
    DatasetFileError,
    InputTypeError,
)

ANIMALS, DIGITS = ["ant", "bee", "cat"], ["0", "1"]


def picture(height, width, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def animals(labels, size=(6, 6), names=ANIMALS):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=list(names)),
            "coarse_label": datasets.ClassLabel(names=["insect", "mammal"]),
        }
    )
    images = [picture(*size, seed=row) for row in range(len(labels))]
    return datasets.Dataset.from_dict(
        {"img": images, "fine_label": list(labels), "coarse_label": [0] * len(labels)}, features=features
    )


def digits(labels, size=(4, 5), feature=None, column="label"):
    feature = feature or datasets.ClassLabel(names=DIGITS)
    images = [picture(*size, channels=1, seed=100 + row) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"image": images, column: list(labels)}, features=features)


def both(a=(2, 0), b=(1, 0, 1), **options):
    return {"animals": animals(a, **options), "digits": digits(b)}


def rows_of(split):
    return [(row["label"], row["context_ids"]) for row in split]


def pixels_of(split):
    return [np.asarray(row["image"]) for row in split]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_offset_and_images_and_columns_unified(streaming):
    data = both()
    if streaming:
        data = {name: split.to_iterable_dataset() for name, split in data.items()}
    source = OriginContexts(data, labels="offset")
    assert source.names == ("animals", "digits")
    assert source.num_contexts == 2
    assert source.fitted
    assert source.class_names == ("ant", "bee", "cat", "0", "1")
    blended = source.blend()
    assert set(blended.features) == {"image", "label", "context_ids"}
    assert blended.features["image"].mode == "RGB"
    assert blended.features["label"].names == ["ant", "bee", "cat", "0", "1"]
    assert blended.features["context_ids"].names == ["animals", "digits"]
    assert rows_of(blended) == [(2, 0), (0, 0), (4, 1), (3, 1), (4, 1)]
    pixels = pixels_of(blended)
    assert {image.shape for image in pixels} == {(6, 6, 3)}
    assert np.array_equal(pixels[1], np.asarray(picture(6, 6, seed=1)))
    resized = picture(4, 5, 1, seed=102).convert("RGB").resize((6, 6), PIL.Image.Resampling.BICUBIC)
    assert np.abs(pixels[4].astype(int) - np.asarray(resized)).max() <= 1
    assert set(data["animals"].features) == {"img", "fine_label", "coarse_label"}


def test_streams_and_datasets_give_the_same_blend():
    data = both()
    source = OriginContexts(data, labels="offset", decode_size=(5, 7))
    streams = {name: split.to_iterable_dataset() for name, split in data.items()}
    one, two = source.blend(), source.blend(streams)
    assert one.features == two.features
    assert rows_of(one) == rows_of(two)
    assert all(np.array_equal(a, b) for a, b in zip(pixels_of(one), pixels_of(two), strict=True))
    assert {image.shape for image in pixels_of(one)} == {(5, 7, 3)}


def test_clashing_class_names_are_prefixed_with_their_origin():
    data = {"one": digits([0]), "two": digits([1], feature=datasets.ClassLabel(names=["1", "2"]))}
    source = OriginContexts(data, labels="offset")
    assert source.class_names == ("0", "one/1", "two/1", "2")
    assert rows_of(source.blend()) == [(0, 0), (3, 1)]


def test_shared_labels_match_by_name():
    data = {
        "classes": digits([0, 1]),
        "reversed": digits([0, 1], feature=datasets.ClassLabel(names=["1", "0"])),
        "numbers": digits([0, 1], feature=datasets.Value("int32")),
        "words": digits(["1", "0"], feature=datasets.Value("string")),
    }
    source = OriginContexts(data, labels="shared")
    assert source.class_names == ("0", "1")
    assert [label for label, _ in rows_of(source.blend())] == [0, 1, 1, 0, 0, 1, 1, 0]
    with pytest.raises(DatasetError, match=r"classes of 'animals' differ from those of 'digits'.*labels='offset'"):
        OriginContexts({"digits": digits([0]), "animals": animals([0])}, labels="shared")


def test_unlabelled_rows_stay_unlabelled():
    raw = digits([0, 1]).remove_columns("label").add_column("label", np.array([-1, 1]))
    data = {"a": digits([0, 1]), "b": raw.cast_column("label", datasets.ClassLabel(names=DIGITS))}
    assert rows_of(OriginContexts(data, labels="offset").blend()) == [(0, 0), (1, 0), (-1, 1), (3, 1)]


def test_labels_can_be_left_out():
    blended = OriginContexts(both(), labels="none").blend()
    assert blended.column_names == ["image", "context_ids"]
    assert blended["context_ids"][:] == [0, 0, 1, 1, 1]
    stream = OriginContexts({k: v.to_iterable_dataset() for k, v in both().items()}, labels="none").blend()
    assert [row["context_ids"] for row in stream] == [0, 0, 1, 1, 1]
    assert "label" not in next(iter(stream))


@pytest.mark.parametrize("labels", [None, "offsets", True])
def test_how_labels_go_together_must_be_said(labels):
    with pytest.raises(ConfigError, match=r"'offset' .*'shared' .*'none'"):
        OriginContexts(both(), labels)


def test_label_columns_are_found_or_said():
    assert OriginContexts(both(), "offset").class_names[0] == "ant"
    said = OriginContexts(both(), "offset", label_columns={"animals": "coarse_label"})
    assert said.class_names == ("insect", "mammal", "0", "1")
    odd = {"a": animals([0]).rename_column("fine_label", "species"), "b": digits([0])}
    with pytest.raises(DatasetError, match=r"Dataset 'a': .*'species' .*'coarse_label' .*label_columns="):
        OriginContexts(odd, "offset")
    with pytest.raises(DatasetError, match=r"Dataset 'animals': No column 'fine_labl'.*did you mean 'fine_label'"):
        OriginContexts(both(), "offset", label_columns={"animals": "fine_labl"})
    with pytest.raises(ContextSourceError, match="Unknown origin 'animal'; did you mean 'animals'"):
        OriginContexts(both(), "offset", label_columns={"animal": "fine_label"})
    with pytest.raises(DatasetError, match=r"Dataset 'b': no column of class labels"):
        OriginContexts({"a": digits([0]), "b": digits([0]).remove_columns("label")}, "offset")


@pytest.mark.parametrize(
    "kinds",
    [
        {"coarse_label": "class", "fine_label": "class"},
        {"labels": "class", "label": "class"},
        {"fine_label": "int64", "kind": "class"},
        {"fine_label": "string", "kind": "class"},
        {"a": "class", "b": "class"},
        {"size": "int64"},
    ],
)
def test_blends_and_training_find_the_same_label_column(kinds):
    label = datasets.ClassLabel(names=["x", "y"])
    features = {name: label if kind == "class" else datasets.Value(kind) for name, kind in kinds.items()}
    row = {name: ["x" if kind == "string" else 0] for name, kind in kinds.items()}
    data = datasets.Dataset.from_dict(
        {"image": [picture(4, 4)], **row}, features=datasets.Features({"image": datasets.Image(), **features})
    )

    def outcome(find):
        try:
            return find()
        except DatasetError as error:
            return str(error).removeprefix("Dataset 'a': ")

    blended = outcome(lambda: OriginContexts({"a": data}, "offset")._origins[0].label_column)
    assert blended == outcome(lambda: find_label_column(data))


def test_columns_of_files_and_of_memory_together(tmp_path):
    data = both()
    expected = rows_of(OriginContexts(data, labels="offset").blend())
    for name, column in (("animals", "fine_label"), ("digits", "label")):
        labels, feature = data[name][column], data[name].features[column]
        data[name].remove_columns(column).save_to_disk(tmp_path / name)
        data[name] = datasets.load_from_disk(tmp_path / name).add_column(column, labels, feature=feature)
    assert rows_of(OriginContexts(data, labels="offset").blend()) == expected


def test_image_options():
    data = both()
    kept = OriginContexts(data, "offset", decode_size="keep").blend()
    assert [image.shape for image in pixels_of(kept)] == [(6, 6, 3)] * 2 + [(4, 5, 3)] * 3
    gray = OriginContexts(data, "offset", image_mode="L", decode_size=8).blend()
    assert {image.shape for image in pixels_of(gray)} == {(8, 8)}
    same = OriginContexts({"a": animals([0], (4, 5)), "b": digits([0])}, "offset").blend()
    raw = same.cast_column("image", datasets.Image(decode=False))
    original = digits([0]).cast_column("image", datasets.Image(decode=False))
    assert raw[1]["image"]["bytes"] == original[0]["image"]["bytes"]
    named = OriginContexts(data, "offset", image_column="pixels", label_column="target").blend()
    assert named.column_names == ["pixels", "target", "context_ids"]


def test_a_blend_saved_with_the_former_name_of_its_size_loads():
    source = OriginContexts(both(), "offset", decode_size=(5, 7))
    config, tensors = source._state()
    config["form"]["image_size"] = config["form"].pop("decode_size")
    loaded = OriginContexts._from_state({**config, "names": list(source.names)}, tensors, {})
    assert loaded._form == source._form


def test_images_of_the_right_size_keep_their_bytes_also_among_others():
    buffer = io.BytesIO()
    picture(6, 6).save(buffer, "JPEG")
    jpeg = datasets.Dataset.from_dict(
        {"image": [{"bytes": buffer.getvalue(), "path": None}, {"bytes": None, "path": None}], "label": [0, 1]}
    )
    rows = jpeg.to_list()
    other = io.BytesIO()
    picture(9, 3).save(other, "JPEG")
    rows[1]["image"] = {"bytes": other.getvalue(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=DIGITS)})
    mixed = datasets.Dataset.from_list(rows, features=features)
    for data in (mixed, mixed.to_iterable_dataset()):
        blended = OriginContexts({"only": data}, "shared", decode_size=6).blend()
        raw = list(blended.cast_column("image", datasets.Image(decode=False)))
        assert raw[0]["image"]["bytes"] == buffer.getvalue()
        assert PIL.Image.open(io.BytesIO(raw[1]["image"]["bytes"])).size == (6, 6)


def test_sideways_photographs_are_measured_upright():
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    picture(4, 6).save(buffer, "PNG", exif=exif)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=DIGITS)})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]}, features=features
    )
    blended = OriginContexts({"only": data}, "shared", decode_size=(6, 4)).blend()
    assert np.array_equal(pixels_of(blended)[0], np.rot90(np.asarray(picture(4, 6)), -1))


@pytest.mark.parametrize("streaming", [False, True])
def test_dicts_are_blended_split_by_split(streaming):
    def as_dict(train, test, **more):
        splits = {"train": train, "test": test, **more}
        if streaming:
            return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
        return datasets.DatasetDict(splits)

    data = {
        "animals": as_dict(animals([0, 1]), animals([2])),
        "digits": as_dict(digits([1]), digits([0]), extra=digits([1])),
    }
    source = OriginContexts(data, "offset")
    with pytest.warns(UserWarning, match=r"splits that not all .* have: \['extra'\]"):
        blended = source.blend()
    assert type(blended) is type(data["animals"])
    assert list(blended) == ["train", "test"]
    assert rows_of(blended["train"]) == [(0, 0), (1, 0), (4, 1)]
    assert rows_of(blended["test"]) == [(2, 0), (3, 1)]
    alone = source.apply(data["digits"])
    assert rows_of(alone["extra"]) == [(4, 1)]
    data["digits"].pop("train")
    with pytest.raises(DatasetError, match="Dataset 'digits': No split 'train'"):
        OriginContexts(data, "offset")


def test_one_dataset_in_the_form_of_the_blend():
    data = both()
    source = OriginContexts(data, "offset")
    assert rows_of(source.apply(data["digits"])) == [(4, 1), (3, 1), (4, 1)]
    other = digits([0, 0], size=(9, 9))
    applied = source.apply(other, origin="digits")
    assert rows_of(applied) == [(3, 1), (3, 1)]
    assert {image.shape for image in pixels_of(applied)} == {(6, 6, 3)}
    with pytest.raises(ContextSourceError, match=r"Of which origin is this dataset\?.*'animals', 'digits'"):
        source.apply(other)
    with pytest.raises(ContextSourceError, match="did you mean 'digits'"):
        source.apply(other, origin="digit")
    with pytest.raises(ConfigError, match="names its origins itself"):
        source.apply(data, origin="digits")
    with pytest.raises(ContextSourceError, match="did you mean 'digits'"):
        source.blend({"digit": other})
    assert rows_of(source.blend({"digits": other})) == [(3, 1), (3, 1)]


def test_a_label_or_image_that_cannot_be_used_is_named_with_origin_and_row():
    data = both()
    source = OriginContexts(data, "offset")
    strange = digits([0, 2], feature=datasets.ClassLabel(names=["0", "1", "2"]))
    with pytest.raises(DatasetError, match=r"Dataset 'digits': Row 1 of column 'label' has 2"):
        source.apply(strange, origin="digits")
    rows = digits([0, 1]).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:50]
    broken = datasets.Dataset.from_list(rows, features=digits([0]).features)
    for split in (broken, broken.to_iterable_dataset()):
        with pytest.raises(DatasetFileError, match="Image 1 of column 'image'"):
            rows_of(source.apply(split, origin="digits"))


def test_existing_context_ids_need_overwrite():
    data = both()
    source = OriginContexts(data, "offset")
    with_ids = data["digits"].add_column("context_ids", [0, 0, 0])
    with pytest.raises(DatasetError, match="has a column 'context_ids' already"):
        source.apply(with_ids, origin="digits")
    assert [c for _, c in rows_of(source.apply(with_ids, origin="digits", overwrite=True))] == [1, 1, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_shuffling_is_by_the_seed_and_keeps_every_row_once(streaming):
    data = both(a=[0, 1, 2] * 10, b=[0, 1] * 5)
    if streaming:
        data = {name: split.to_iterable_dataset() for name, split in data.items()}
    plain = rows_of(OriginContexts(data, "offset").blend())
    one, again, other = (rows_of(OriginContexts(data, "offset", shuffle_seed=seed).blend()) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one != plain
    assert sorted(one) == sorted(plain)


def test_datasets_of_different_kinds_do_not_blend():
    with pytest.raises(InputTypeError, match="animals: Dataset, digits: DatasetDict"):
        OriginContexts({"animals": animals([0]), "digits": datasets.DatasetDict(train=digits([0]))}, "offset")
    with pytest.raises(InputTypeError, match="IterableDataset"):
        OriginContexts({"animals": animals([0]), "digits": digits([0]).to_iterable_dataset()}, "offset")
    with pytest.raises(InputTypeError, match="Dataset 'digits': Expected a Dataset"):
        OriginContexts({"animals": animals([0]), "digits": [1]}, "offset")
    with pytest.raises(InputTypeError, match="dict from names to datasets"):
        OriginContexts(datasets.DatasetDict(train=digits([0])), "offset")
    with pytest.raises(InputTypeError, match="dict from names to datasets"):
        OriginContexts([digits([0])], "offset")
    with pytest.raises(ConfigError, match="names of origins"):
        OriginContexts({}, "offset")


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle_seed": True},
        {"shuffle_seed": -1},
        {"shuffle_seed": "3"},
        {"image_column": 3},
        {"label_column": ""},
        {"label_columns": {"digits": 3}},
        {"image_columns": "image"},
        {"decode_size": True},
        {"image_mode": "CMYK"},
        {"decode_size": "large"},
        {"decode_size": 0},
        {"label_column": "image"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        OriginContexts(both(), "offset", **options)


def test_origins_are_saved_without_their_datasets(tmp_path):
    data = both()
    source = OriginContexts(data, "offset", label_columns={"animals": "coarse_label"}, shuffle_seed=3)
    source.save(tmp_path)
    loaded = ContextSource.load(tmp_path)
    assert type(loaded) is OriginContexts
    assert loaded.names == source.names
    assert loaded.class_names == source.class_names
    assert rows_of(loaded.apply(data["digits"], origin="digits")) == rows_of(source.apply(data["digits"]))
    assert rows_of(loaded.blend(data)) == rows_of(source.blend())
    with pytest.raises(ContextSourceError, match="holds no datasets"):
        loaded.blend()
    with pytest.raises(ContextSourceError, match="cannot tell a context from pixels"):
        loaded.predict(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    config = json.loads((tmp_path / "context_source.json").read_text())
    config["origins"].pop()
    (tmp_path / "context_source.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="contradicts itself"):
        ContextSource.load(tmp_path)


def test_fit_has_nothing_to_learn():
    source = OriginContexts(both(), "offset")
    assert source.fit() is source
    assert source.fit(animals([0])) is source


def test_three_origins_and_empty_splits():
    source = OriginContexts({"a": digits([0]), "b": digits([]), "c": digits([1])}, "shared")
    assert rows_of(source.blend()) == [(0, 0), (1, 2)]


def test_cifar100_and_mnist(shared_data):
    load = datasets.load_dataset
    data = {
        "cifar100": load(str(shared_data / "cifar100"), split="train").select(range(200)),
        "mnist": load(str(shared_data / "mnist"), split="train").select(range(300)),
    }
    source = OriginContexts(data, labels="offset")
    blended = source.blend()
    assert len(source.class_names) == 110
    assert len(set(source.class_names)) == 110
    assert blended["context_ids"][:] == [0] * 200 + [1] * 300
    assert blended["label"][:200] == data["cifar100"]["fine_label"][:]
    assert blended["label"][200:] == [100 + label for label in data["mnist"]["label"]]
    assert {image.shape for image in pixels_of(blended)} == {(32, 32, 3)}


def test_mnist_and_svhn_share_their_classes(shared_data):
    load = datasets.load_dataset
    data = {name: load(str(shared_data / name), split="test", streaming=True).take(20) for name in ("mnist", "svhn")}
    source = OriginContexts(data, labels="shared")
    assert source.class_names == tuple("0123456789")
    rows = list(source.blend())
    assert [row["context_ids"] for row in rows] == [0] * 20 + [1] * 20
    assert {row["image"].size for row in rows} == {(32, 32)}
