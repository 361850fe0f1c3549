"""Context sources in general, column contexts, and the files of a saved source."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cn_hf.contexts import (
    BrightnessContexts,
    ClusterContexts,
    ColumnContexts,
    ContextSource,
    OriginContexts,
    RuleContexts,
)
from cn_hf.contexts.storage import CONFIG_FILE, write_source
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError, DatasetError, InputTypeError

SPECIES = ("ant", "bee", "cat")


def table(values, feature):
    rows = len(values)
    images = [{"bytes": b"no image", "path": None}] * rows  # column contexts never decode them
    features = {"image": datasets.Image(), "kind": feature, "n": datasets.Value("int64")}
    return datasets.Dataset.from_dict(
        {"image": images, "kind": list(values), "n": list(range(rows))}, features=datasets.Features(features)
    )


def splits(feature, train, test):
    return datasets.DatasetDict(train=table(train, feature), test=table(test, feature))


def ids_of(split):
    if isinstance(split, datasets.Dataset):
        return split["context_ids"][:]
    return [row["context_ids"] for row in split.select_columns(["context_ids"])]


LABEL = datasets.ClassLabel(names=list(SPECIES))


def test_class_label_column_gives_its_names_and_numbers():
    data = splits(LABEL, [2, 0, 1, 0], [1, 1])
    source = ColumnContexts("kind").fit(data)
    assert source.names == SPECIES
    assert source.num_contexts == 3
    applied = source.apply(data)
    assert ids_of(applied["train"]) == [2, 0, 1, 0]
    assert ids_of(applied["test"]) == [1, 1]
    feature = applied["train"].features["context_ids"]
    assert isinstance(feature, datasets.ClassLabel)
    assert tuple(feature.names) == SPECIES
    assert feature.dtype == "int64"
    assert "context_ids" not in data["train"].column_names


def test_class_label_column_needs_no_fit():
    data = table([2, 0], LABEL)
    source = ColumnContexts("kind")
    assert not source.fitted
    assert ids_of(source.apply(data)) == [2, 0]
    assert source.names == SPECIES


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (datasets.Value("int64"), [10, -2, 10, 3], ("-2", "3", "10")),
        (datasets.Value("uint8"), [7, 0], ("0", "7")),
        (datasets.Value("string"), ["b", "a", "b"], ("a", "b")),
        (datasets.Value("large_string"), ["b", "a"], ("a", "b")),
        (datasets.Value("bool"), [True, False], ("False", "True")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_plain_columns_are_numbered_by_their_sorted_values(feature, values, names, streaming):
    data = table(values, feature)
    data = data.to_iterable_dataset() if streaming else data
    source = ColumnContexts("kind").fit(data)
    assert source.names == names
    assert ids_of(source.apply(data)) == [names.index(str(value)) for value in values]


def test_plain_column_needs_a_fit():
    with pytest.raises(ContextSourceError, match="not fitted"):
        ColumnContexts("kind").apply(table(["a"], datasets.Value("string")))


def test_value_unseen_in_training_is_named_with_its_row_and_split():
    data = splits(datasets.Value("string"), ["photo", "sketch"], ["sketch", "photo", "skech"])
    source = ColumnContexts("kind").fit(data)
    with pytest.raises(DatasetError, match=r"Split 'test': Row 2 .*'skech'.*did you mean 'sketch'"):
        source.apply(data)


@pytest.mark.parametrize("value", [-1, 3])
def test_label_out_of_range_is_named_with_its_row(value):
    data = table([0, 1], datasets.Value("int64")).remove_columns("kind")
    data = data.add_column("kind", np.array([1, value]), feature=LABEL)
    with pytest.raises(DatasetError, match=rf"Row 1 of column 'kind' has {value},.*expected 0 to 2"):
        ColumnContexts("kind").apply(data)


def test_missing_value_is_named_with_its_row():
    data = table(["a", "b", None], datasets.Value("string"))
    source = ColumnContexts("kind").fit(data)
    assert source.names == ("a", "b")
    with pytest.raises(DatasetError, match=r"Row 2 .* has None"):
        source.apply(data)


def test_missing_column_names_the_nearest():
    source = ColumnContexts("kinds")
    for dataset in (table([0], LABEL), table([0], LABEL).to_iterable_dataset()):
        with pytest.raises(DatasetError, match=r"No column 'kinds'.*did you mean 'kind'"):
            source.fit(dataset)
        with pytest.raises(DatasetError, match="did you mean 'kind'"):
            source.apply(dataset)


@pytest.mark.parametrize("feature", [datasets.Value("float32"), datasets.List(datasets.Value("int64"))])
def test_columns_without_categories_are_refused(feature):
    values = [[1], [2]] if isinstance(feature, datasets.List) else [0.5, 1.5]
    with pytest.raises(DatasetError, match="expected class labels, integers, booleans or strings"):
        ColumnContexts("kind").fit(table(values, feature))


def test_class_labels_in_another_order_and_strings_match_by_name():
    source = ColumnContexts("kind").fit(table([0, 1, 2], LABEL))
    reversed_label = datasets.ClassLabel(names=list(reversed(SPECIES)))
    assert ids_of(source.apply(table([0, 1, 2], reversed_label))) == [2, 1, 0]
    assert ids_of(source.apply(table(["cat", "ant"], datasets.Value("string")))) == [2, 0]
    assert ids_of(source.apply(table([2, 0], datasets.Value("int32")))) == [2, 0]
    with pytest.raises(DatasetError, match=r"Row 1 .* 1 \(dog\)"):
        source.apply(table([0, 1], datasets.ClassLabel(names=["ant", "dog"])))


def test_fit_uses_the_training_split_alone():
    feature = datasets.Value("string")
    one = ColumnContexts("kind").fit(splits(feature, ["a", "b"], ["z"]))
    two = ColumnContexts("kind").fit(splits(feature, ["a", "b"], ["a"]))
    assert one.names == two.names == ("a", "b")
    with pytest.raises(DatasetError, match=r"No split 'train' among \['test'\]"):
        one.fit(datasets.DatasetDict(test=table(["a"], feature)))
    assert one.names == ("a", "b")


def test_all_kinds_of_datasets_agree():
    data = splits(LABEL, [2, 0, 1, 0, 2], [1])
    streams = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in data.items()})
    source = ColumnContexts("kind").fit(streams)
    applied, streamed = source.apply(data), source.apply(streams)
    assert type(streamed) is datasets.IterableDatasetDict
    assert {name: ids_of(split) for name, split in streamed.items()} == {
        name: ids_of(split) for name, split in applied.items()
    }
    assert streamed["train"].features == applied["train"].features


def test_untyped_streams_work_and_become_typed():
    def rows():
        for n in range(5):
            yield {"kind": "ab"[n % 2], "n": n}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    applied = ColumnContexts("kind").fit(stream).apply(stream)
    assert applied.features["context_ids"].names == ["a", "b"]
    assert [row["context_ids"] for row in applied] == [0, 1, 0, 1, 0]


def test_existing_column_is_kept_unless_overwritten():
    source = ColumnContexts("kind")
    for data in (table([2, 0], LABEL), table([2, 0], LABEL).to_iterable_dataset()):
        applied = source.apply(data)
        with pytest.raises(DatasetError, match="has a column 'context_ids' already"):
            source.apply(applied)
        rule = RuleContexts(lambda row: 1, ["x", "y"], columns=["n"])
        again = rule.apply(applied, overwrite=True)
        assert ids_of(again) == [1, 1]
        assert again.features["context_ids"].names == ["x", "y"]
        assert ids_of(applied) == [2, 0]


@pytest.mark.parametrize("columns", [None, ["kind"]])
def test_output_format_is_kept(columns):
    data = table([2, 0], LABEL).remove_columns("image").with_format("torch", columns=columns)
    row = ColumnContexts("kind").apply(data)[0]
    assert set(row) == {"kind", "context_ids"} | (set() if columns else {"n"})
    assert row["context_ids"].dtype == torch.int64
    stream = table([2, 0], LABEL).remove_columns("image").to_iterable_dataset().with_format("torch")
    assert torch.is_tensor(next(iter(ColumnContexts("kind").apply(stream)))["context_ids"])


def test_indices_of_a_shuffled_and_selected_dataset_are_followed():
    data = table([0, 1, 2, 0, 1, 2], LABEL).shuffle(seed=3).select(range(1, 5))
    applied = ColumnContexts("kind").apply(data)
    assert ids_of(applied) == data["kind"][:]
    assert applied["n"][:] == data["n"][:]


def test_streams_keep_the_source_as_it_was_and_travel_to_workers():
    stream = table(["a", "b"], datasets.Value("string")).remove_columns("image").to_iterable_dataset()
    source = ColumnContexts("kind").fit(stream)
    applied = source.apply(stream)
    source.fit(table(["0", "a", "b"], datasets.Value("string")))
    assert ids_of(applied) == [0, 1]
    loader = torch.utils.data.DataLoader(applied.with_format("torch"), batch_size=2, num_workers=1)
    assert [batch["context_ids"].tolist() for batch in loader] == [[0, 1]]


def test_streams_with_contexts_interleave_and_concatenate():
    source = ColumnContexts("kind")
    one, two = (
        source.apply(table(values, LABEL).remove_columns("image").to_iterable_dataset()) for values in ([0, 1], [2])
    )
    assert ids_of(datasets.concatenate_datasets([one, two])) == [0, 1, 2]
    mixed = datasets.interleave_datasets([one, two], stopping_strategy="all_exhausted")
    assert mixed.features["context_ids"].names == list(SPECIES)
    assert ids_of(mixed)[:2] == [0, 2]


def test_empty_splits_get_an_empty_column():
    data = splits(LABEL, [1], [])
    applied = ColumnContexts("kind").apply(data)
    assert ids_of(applied["test"]) == []
    assert "context_ids" in applied["test"].features
    with pytest.raises(DatasetError, match="holds no value"):
        ColumnContexts("kind").fit(table([], datasets.Value("string")))


@pytest.mark.parametrize("thing", [[1, 2], {"train": [1]}, None, "cifar10"])
def test_other_things_are_no_datasets(thing):
    with pytest.raises(InputTypeError, match="Expected a Dataset"):
        ColumnContexts("kind").fit(thing)
    with pytest.raises(InputTypeError, match="Expected a Dataset"):
        ColumnContexts("kind").apply(thing)


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_column_names_are_refused(name):
    with pytest.raises(ConfigError, match="name of a column"):
        ColumnContexts(name)


def test_columns_cannot_be_predicted_from_pixels():
    source = ColumnContexts("kind").fit(table([0], LABEL))
    with pytest.raises(ContextSourceError, match="cannot tell a context from pixels"):
        source.predict(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_unfitted_sources_say_so(tmp_path):
    for source in (ClusterContexts(), BrightnessContexts()):
        assert not source.fitted
        with pytest.raises(ContextSourceError, match="not fitted"):
            source.apply(table([0], LABEL))
        with pytest.raises(ContextSourceError, match="not fitted"):
            source.predict(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        with pytest.raises(ContextSourceError, match="not fitted"):
            source.save(tmp_path)
    with pytest.raises(ContextSourceError, match="not fitted"):
        _ = ColumnContexts("kind").names
    assert list(tmp_path.iterdir()) == []


def test_column_contexts_are_saved_and_loaded(tmp_path):
    data = splits(datasets.Value("string"), ["b", "a"], ["a"])
    source = ColumnContexts("kind").fit(data)
    source.save(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [CONFIG_FILE]
    for cls in (ContextSource, ColumnContexts):
        loaded = cls.load(tmp_path / "new" / "folder")
        assert type(loaded) is ColumnContexts
        assert loaded.names == ("a", "b")
        assert ids_of(loaded.apply(data)["train"]) == [1, 0]
    with pytest.raises(CheckpointError, match="holds a ColumnContexts, not a ClusterContexts"):
        ClusterContexts.load(tmp_path / "new" / "folder")
    with pytest.raises(ContextSourceError, match="takes no fn="):
        ContextSource.load(tmp_path / "new" / "folder", fn=len)


def brightness(tmp_path):
    BrightnessContexts(threshold=10.0).save(tmp_path)
    return tmp_path / CONFIG_FILE


def test_files_that_cannot_be_read_are_one_clear_error_each(tmp_path):
    with pytest.raises(CheckpointError, match="No context source in"):
        ContextSource.load(tmp_path / "nowhere")
    config = brightness(tmp_path)
    whole = config.read_text()
    for text, message in [
        (whole[: len(whole) // 2], "truncated or no JSON"),
        ("[]", "has no format number"),
        (json.dumps({**json.loads(whole), "format": 99}), "update cn_hf"),
        (json.dumps({**json.loads(whole), "type": "brightnes"}), "did you mean 'brightness'"),
        (json.dumps({**json.loads(whole), "names": ["day"]}), "does not describe a BrightnessContexts"),
        (json.dumps({**json.loads(whole), "threshold": "high"}), "does not describe a BrightnessContexts"),
        (json.dumps({"format": 1, "type": "brightness"}), "does not describe a BrightnessContexts"),
    ]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            ContextSource.load(tmp_path)
    config.write_text(whole)
    assert ContextSource.load(tmp_path).threshold == 10.0


def saved_clusters(folder, contexts=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    ClusterContexts(contexts).fit_images(pixels).save(folder)
    [tensors] = folder.glob("*.safetensors")
    return tensors


def saved_sources(folder):
    """A source of each kind that needs no tensors, saved, and what its ``load`` needs."""
    labelled = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict({"image": [pixels, pixels], "label": [0, 1]}, features=labelled)
    sources = {
        "column": ColumnContexts("label").fit(data),
        "brightness": BrightnessContexts(99.5),
        "rule": RuleContexts(len, ["x", "y"], columns=["label"]),
        "origin": OriginContexts({"one": data, "other": data}, "offset"),
    }
    for name, source in sources.items():
        source.save(folder / name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("column", {"numbered": 1}),
        ("column", {"column": 3}),
        ("column", {"names": ["a", "a"]}),
        ("brightness", {"threshold": True}),
        ("brightness", {"threshold": float("nan")}),
        ("brightness", {"threshold": None}),
        ("brightness", {"given": "yes"}),
        ("brightness", {"names": ["a", "b", "c"]}),
        ("brightness", {"image": {"column": 7}}),
        ("rule", {"columns": [True]}),
        ("rule", {"on": 1}),
        ("rule", {"image": {"column": None, "mode": "CMYK"}}),
        ("origin", {"labels": "none"}),
        ("origin", {"shuffle_seed": True}),
        ("origin", {"names": ["one"]}),
        ("origin", {"form.decode_size": [1, 2, 3]}),
        ("origin", {"form.class_names": ["a"]}),
        ("origin", {"form.image_column": "label"}),
        ("origin", {"origins.1.offset": True}),
        ("origin", {"origins.1.offset": 3}),
        ("origin", {"origins.1.offset": -1}),
        ("origin", {"origins.1.index": 0}),
        ("origin", {"origins.1.categories": None}),
        ("origin", {"origins.1.categories.numbered": "no"}),
    ],
)
def test_saved_values_that_no_save_writes_are_one_clear_error(tmp_path, name, damage):
    saved_sources(tmp_path)
    path = tmp_path / name / CONFIG_FILE
    config = json.loads(path.read_text())
    for key, value in damage.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[last] = value
    given = {"fn": len} if name == "rule" else {}
    assert ContextSource.load(tmp_path / name, **given).fitted
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        ContextSource.load(tmp_path / name, **given)


def test_tensors_beside_a_source_that_has_none_are_an_error(tmp_path):
    write_source(
        tmp_path,
        {"format": 1, "type": "column", "names": ["a"], "column": "c", "numbered": True},
        {"x": torch.zeros(1)},
    )
    with pytest.raises(CheckpointError, match="Expected no tensors"):
        ContextSource.load(tmp_path)


def test_tensors_that_are_truncated_changed_missing_or_unfitting_are_errors(tmp_path):
    tensors = saved_clusters(tmp_path)
    whole, config = tensors.read_bytes(), tmp_path / CONFIG_FILE
    tensors.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="truncated or changed"):
        ContextSource.load(tmp_path)
    save_file({"mean": torch.zeros(2, 48)}, tensors)
    with pytest.raises(CheckpointError, match="truncated or changed"):
        ContextSource.load(tmp_path)
    tensors.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ContextSource.load(tmp_path)
    tensors.write_bytes(whole)
    content = json.loads(config.read_text())
    for change, message in [
        ({"shape": [3, 5, 5]}, "their options call for"),
        ({"tensors_sha256": "../../" + "0" * 58}, "checksum of its tensors"),
        ({"tensors_sha256": None}, "does not describe a ClusterContexts"),
    ]:
        config.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            ContextSource.load(tmp_path)
    config.write_text(json.dumps(content))
    assert ContextSource.load(tmp_path).fitted


def test_saving_over_an_older_source_leaves_nothing_behind(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    first = saved_clusters(tmp_path / "sub").name
    second = saved_clusters(tmp_path / "sub", contexts=3).name
    assert first != second
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {CONFIG_FILE, second}
    BrightnessContexts(threshold=3).save(tmp_path / "sub")
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {CONFIG_FILE}
    BrightnessContexts(threshold=3).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_a_save_killed_at_any_moment_leaves_one_whole_source(tmp_path):
    code = (
        "import sys, torch; from cn_hf.contexts import ClusterContexts\n"
        "pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)\n"
        "sources = [ClusterContexts(contexts).fit_images(pixels) for contexts in (2, 3)]\n"
        "sources[0].save(sys.argv[1]); print('saved once', flush=True)\n"
        "while True:\n"
        "    for source in sources: source.save(sys.argv[1])"
    )
    for pause in (0.01, 0.05, 0.083):
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(pause)
            process.kill()
        loaded = ContextSource.load(tmp_path)
        assert len(loaded.clusters.clustering.mean) == loaded.num_contexts


def test_a_save_that_fails_half_way_keeps_the_old_files(tmp_path):
    config = brightness(tmp_path)
    before = config.read_bytes()
    code = (
        "import resource, sys; from cn_hf.contexts import BrightnessContexts\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"  # as on a full disk: files end after 20 bytes
        "BrightnessContexts(threshold=99).save(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert "CheckpointError: Cannot write the context source" in done.stderr
    assert config.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_FILE]


def test_a_folder_that_is_a_file_cannot_be_saved_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Cannot write"):
        BrightnessContexts(threshold=1).save(tmp_path / "file")


def test_sources_pickle():
    data = table([2, 0], LABEL)
    pixels = torch.randint(0, 256, (12, 3, 4, 4), dtype=torch.uint8)
    clusters = ClusterContexts(2).fit_images(pixels)
    assert torch.equal(pickle.loads(pickle.dumps(clusters)).predict(pixels), clusters.predict(pixels))
    assert ids_of(pickle.loads(pickle.dumps(ColumnContexts("kind").fit(data))).apply(data)) == [2, 0]


class EvenOdd(ContextSource):
    """A user's own source, saved and loaded like the package's."""

    type = "even-odd"
    _names = ("even", "odd")

    def _apply_split(self, split, overwrite):
        return RuleContexts(lambda row: row["n"] % 2, self.names, columns=["n"]).apply(split, overwrite=overwrite)

    @classmethod
    def _from_state(cls, config, tensors, given):
        return cls()


def test_own_sources_take_part(tmp_path):
    EvenOdd().save(tmp_path)
    loaded = ContextSource.load(tmp_path)
    assert type(loaded) is EvenOdd
    assert ids_of(loaded.fit(table([0], LABEL)).apply(table([0, 0, 0], LABEL))) == [0, 1, 0]


def test_importing_the_package_is_light():
    code = "import sys, cn_hf.contexts; print(sorted({'datasets', 'sklearn', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert OriginContexts.__name__ in dir(sys.modules["cn_hf.contexts"])


def test_cifar100_superclasses(shared_data):
    stream = datasets.load_dataset(str(shared_data / "cifar100"), split="test", streaming=True).take(64)
    source = ColumnContexts("coarse_label")
    rows = list(source.apply(stream).remove_columns("img"))
    assert source.num_contexts == 20
    assert source.names[0] == "aquatic_mammals"
    assert [row["context_ids"] for row in rows] == [row["coarse_label"] for row in rows]
