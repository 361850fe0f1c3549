"""Batches in memory and streamed: order, parts per process, normalisation, and both kinds against each other."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from data_for_tests import MEAN, STD, N, arrays, assert_same, held, make_dataset, pixels, png, streamed, together
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import Tensor

from cn_hf.data import Batches, DeviceBatches, StreamedBatches, build_augmentation, decode_images, load_splits
from cn_hf.data.order import process_slice, stream_seed
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError, InputShapeError, InputTypeError

# ---------------------------------------------------------------------------------------------------- what is in one


def test_a_batch_holds_what_it_says() -> None:
    [batch, *_] = held(mean=MEAN, std=STD)
    assert list(batch) == ["pixel_values", "labels", "context_ids", "index"]
    expected = (pixels()[:8] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1, 2, 3] * 2
    assert batch["context_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch["index"].tolist() == list(range(8))
    assert all(batch[key].dtype == torch.int64 for key in ("labels", "context_ids", "index"))


def test_without_contexts_without_normalisation_and_in_other_dtypes() -> None:
    images = pixels()
    [batch, *_] = DeviceBatches(images, torch.zeros(N, dtype=torch.int32), batch_size=4)
    assert list(batch) == ["pixel_values", "labels", "index"]
    torch.testing.assert_close(batch["pixel_values"], images[:4] / 255)
    [half, *_] = held(dtype=torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16
    [grey, *_] = DeviceBatches(images[:, :1], torch.zeros(N, dtype=torch.int64), batch_size=4, mean=[0.5], std=[0.1])
    torch.testing.assert_close(grey["pixel_values"], (images[:4, :1] / 255 - 0.5) / 0.1)


def test_soft_contexts_and_dataset_rows() -> None:
    weights = torch.softmax(torch.randn(N, 3), 1).double()
    rows = torch.arange(N) * 2 + 1
    labels = torch.zeros(N, dtype=torch.int64)
    batches = DeviceBatches(pixels(), labels, weights, rows=rows, batch_size=8, shuffle=True)
    whole = together(list(batches))
    assert whole["context_ids"].dtype == torch.float32
    torch.testing.assert_close(whole["context_ids"], weights[(whole["index"] - 1) // 2].float())


def test_images_are_not_changed() -> None:
    images = pixels().contiguous()
    before = images.clone()
    list(DeviceBatches(images, torch.zeros(N, dtype=torch.int64), batch_size=8, mean=MEAN, std=STD))
    assert torch.equal(images, before)


# -------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("make", [held, streamed])
def test_each_image_once_in_an_order_of_each_epoch(make: Any) -> None:
    batches = make(shuffle=True)
    assert isinstance(batches, Batches)
    assert (len(batches), batches.num_samples, batches.batch_size) == (5, N, 8)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(together(list(batches))["index"].tolist())
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert together(list(make(shuffle=True)))["index"].tolist() == orders[0]
    assert together(list(make(shuffle=True, seed=6)))["index"].tolist() != orders[0]
    assert together(list(make()))["index"].tolist() == list(range(N))


@pytest.mark.parametrize("make", [held, streamed])
def test_dropping_the_last_batch(make: Any) -> None:
    batches = make(shuffle=True, drop_last=True)
    assert (len(batches), batches.num_samples) == (4, 32)
    assert [len(b["labels"]) for b in batches] == [8] * 4
    none = make(batch_size=100, drop_last=True)
    assert (len(none), none.num_samples, list(none)) == (0, 0, [])


def test_seeds_of_near_numbers_are_unlike() -> None:
    seeds = {stream_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 2, 3) == stream_seed(1, 2, 3)


@pytest.mark.parametrize("total", [0, 1, 2, 5, 8, 37])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_slices_of_processes(total: int, processes: int) -> None:
    parts = [list(range(total))[process_slice(total, processes, p)] for p in range(processes)]
    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    pairs = [list(range(total))[process_slice(total, processes, p, group=2)] for p in range(processes)]
    assert [row for part in pairs for row in part] == list(range(total))
    assert max(map(len, pairs)) - min(map(len, pairs)) <= 2
    assert all(part[0] % 2 == 0 for part in pairs if part)


# --------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("make", [held, streamed])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 8), (3, 8), (4, 7), (3, 36)])
def test_parts_in_rank_order_are_the_batch_of_one_process(make: Any, processes: int, batch_size: int) -> None:
    options = {
        "batch_size": batch_size,
        "shuffle": True,
        "augment": build_augmentation(["flip", "crop"], crop_padding=2, image_size=7),
        "mean": MEAN,
        "std": STD,
    }
    whole = make(**options)
    ranks = [make(**options, num_processes=processes, process_index=p) for p in range(processes)]
    for batches in (whole, *ranks):
        batches.set_epoch(3)
        assert (len(batches), batches.num_samples) == (-(-N // batch_size), N)
    # The last global batch of 36 + 1 images leaves two of three processes without any.
    parts = [together(list(parts)) for parts in zip(*ranks, strict=True)]
    assert_same(parts, whole, atol=1e-5)


def run_rank(rank: int, queue: Any) -> None:
    batches = held(shuffle=True, num_processes=2, process_index=rank, augment=build_augmentation(["flip", "crop"]))
    queue.put((rank, [batch["pixel_values"].numpy() for batch in batches]))


def test_parts_in_real_processes() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=run_rank, args=(rank, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    parts = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    whole = held(shuffle=True, augment=build_augmentation(["flip", "crop"]))
    for batch, first, second in zip(whole, parts[0], parts[1], strict=True):
        torch.testing.assert_close(batch["pixel_values"], torch.from_numpy(np.concatenate([first, second])))


# ------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("make", [held, streamed])
def test_augmentation_changes_with_the_epoch_and_the_batch(make: Any) -> None:
    batches = make(batch_size=4, augment=build_augmentation(["crop"], crop_padding=3))
    first = [b["pixel_values"] for b in batches]
    assert_same(batches, batches)
    batches.set_epoch(1)
    second = [b["pixel_values"] for b in batches]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    same_image = DeviceBatches(
        pixels(1).expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64), batch_size=8, augment=batches.augment
    )
    assert len({tuple(b["pixel_values"].flatten().tolist()) for b in same_image}) == 8


def test_any_function_can_augment() -> None:
    calls = []

    def darken(images: Tensor, *, seed: int, places: Tensor, total: int) -> Tensor:
        calls.append((seed, places.tolist(), total))
        return images / 2

    batches = held(10, batch_size=8, augment=darken, num_processes=2, process_index=1)
    torch.testing.assert_close(together(list(batches))["pixel_values"], pixels(10)[[4, 5, 6, 7, 9]] / 255 / 2)
    assert [call[1:] for call in calls] == [([4, 5, 6, 7], 8), ([1], 2)]
    assert calls[0][0] != calls[1][0]


# ------------------------------------------------------------------------------------------------ streamed == in memory


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streamed_dataset_gives_what_memory_gives(num_workers: int, shuffle: bool) -> None:
    options = {"shuffle": shuffle, "mean": MEAN, "std": STD, "augment": build_augmentation(["flip", "crop"])}
    a, b = held(**options), streamed(num_workers=num_workers, **options)
    for epoch in range(2):
        a.set_epoch(epoch)
        b.set_epoch(epoch)
        assert_same(a, b)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_stream_gives_what_memory_gives(num_workers: int, num_shards: int) -> None:
    stream = make_dataset().to_iterable_dataset(num_shards=num_shards)
    batches = streamed(stream, num_workers=num_workers, mean=MEAN, std=STD)
    assert_same(held(mean=MEAN, std=STD), batches)
    assert (len(batches), batches.num_samples) == (5, N)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shuffled_stream_is_the_same_for_a_seed_whatever_the_workers(num_workers: int) -> None:
    # Rows carry their number as label, since index counts rows as they come.
    dataset = make_dataset().remove_columns("label").add_column("label", np.arange(N))
    stream = dataset.to_iterable_dataset(num_shards=3)
    batches = streamed(stream, shuffle=True, shuffle_buffer=10, num_workers=num_workers)
    first = together(list(batches))["labels"].tolist()
    assert sorted(first) == list(range(N))
    assert first != list(range(N))
    reference = streamed(stream, shuffle=True, shuffle_buffer=10)
    assert together(list(reference))["labels"].tolist() == first
    batches.set_epoch(1)
    assert together(list(batches))["labels"].tolist() != first
    parts = [streamed(stream, shuffle=True, shuffle_buffer=10, num_processes=2, process_index=p) for p in range(2)]
    assert_same([together(list(pair)) for pair in zip(*parts, strict=True)], reference)


def test_length_of_a_stream() -> None:
    stream = make_dataset().to_iterable_dataset()
    assert len(streamed(stream, num_rows=N)) == 5
    for wrong in (N - 1, N + 9):
        with pytest.raises(DatasetError, match=f"has {N} rows, but num_rows is {wrong}"):
            list(streamed(stream, num_rows=wrong))
    with pytest.raises(ConfigError, match="num_rows is for streams"):
        streamed(num_rows=N)


def test_untyped_and_filtered_streams() -> None:
    stream = make_dataset().to_iterable_dataset().filter(lambda row: row["label"] != 3)
    batches = streamed(stream)
    assert batches.num_samples == N - N // 4
    assert set(together(list(batches))["labels"].tolist()) == {0, 1, 2}


def test_soft_contexts_and_images_resized_while_streaming() -> None:
    dataset = make_dataset(contexts=False)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), N)
    dataset = dataset.add_column("context_ids", weights.tolist())
    whole = together(list(streamed(dataset, decode_size=(3, 4), image_mode="L")))
    assert whole["pixel_values"].shape == (N, 1, 3, 4)
    np.testing.assert_allclose(whole["context_ids"], weights.astype(np.float32))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("as_stream", [False, True])
def test_a_truncated_image_is_named_wherever_it_is_decoded(num_workers: int, as_stream: bool) -> None:
    dataset = make_dataset(broken=(20,))
    source = dataset.to_iterable_dataset() if as_stream else dataset
    batches = iter(streamed(source, num_workers=num_workers))
    assert sum(len(next(batches)["labels"]) for _ in range(2)) == 16
    with pytest.raises(DatasetFileError, match=r"^Image 20 of column 'image' cannot be read") as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("as_stream", [False, True])
def test_skipped_images_are_counted_and_change_no_others(num_workers: int, as_stream: bool) -> None:
    dataset = make_dataset(broken=(1, 20))
    source = dataset.to_iterable_dataset() if as_stream else dataset
    augment = build_augmentation(["flip", "crop"])
    batches = streamed(source, on_error="skip", num_workers=num_workers, augment=augment)
    found = together(list(batches))
    assert batches.skipped == (1, 20)
    good = [row for row in range(N) if row not in (1, 20)]
    assert found["index"].tolist() == good
    whole = together(list(held(augment=augment)))
    for key in whole:
        torch.testing.assert_close(found[key], whole[key][good])
    list(batches)
    assert batches.skipped == (1, 20)


def test_a_batch_of_unreadable_images_is_empty_but_has_a_shape() -> None:
    for source in (make_dataset(broken=tuple(range(8))), make_dataset(broken=tuple(range(8))).to_iterable_dataset()):
        first, second, *_ = streamed(source, on_error="skip")
        assert first["pixel_values"].shape == (0, 3, 6, 5)
        assert first["labels"].shape == (0,)
        assert len(second["labels"]) == 8
    with pytest.raises(DatasetFileError, match="none"):
        list(streamed(make_dataset(8, broken=tuple(range(8))), on_error="skip"))


def test_leaving_an_epoch_early_is_no_harm() -> None:
    batches = streamed(num_workers=2, shuffle=True)
    expected = [b["index"] for b in batches]
    for _ in batches:
        break
    assert all(torch.equal(a, b["index"]) for a, b in zip(expected, batches, strict=True))


@pytest.mark.parametrize("as_stream", [False, True])
def test_label_out_of_range_names_its_row(as_stream: bool) -> None:
    dataset = make_dataset().cast_column("label", Value("int64"))
    labels = [i % 4 for i in range(N)]
    labels[13] = 4
    dataset = dataset.remove_columns("label").add_column("label", labels)
    table = dataset.data.table
    broken = Dataset(
        table, info=datasets.DatasetInfo(features=Features({**dataset.features, "label": ClassLabel(num_classes=4)}))
    )
    with pytest.raises(DatasetError, match="row 13 has 'label' 4; labels must be 0 to 3"):
        list(streamed(broken.to_iterable_dataset() if as_stream else broken))


def test_missing_label_names_its_row() -> None:
    dataset = make_dataset().remove_columns("label").add_column("label", [0] * 9 + [None] + [1] * (N - 10))
    with pytest.raises(DatasetError, match="row 9 has no 'label'"):
        list(streamed(dataset))


def test_images_of_differing_sizes_need_a_size() -> None:
    images = [png(a) for a in arrays(4)] + [png(a) for a in arrays(4, 8, 8)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=1)})
    dataset = Dataset.from_dict({"image": images, "label": [0] * 8}, features=features)
    with pytest.raises(DatasetError, match="decode_size"):
        list(streamed(dataset))
    with pytest.raises(DatasetError, match=r"row 4 is .3, 8, 8.*give an image size"):
        list(streamed(dataset, batch_size=4))
    assert len(list(streamed(dataset, batch_size=4, decode_size=6))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"process_index": 2, "num_processes": 2}, "process_index"),
        ({"process_index": -1}, "process_index"),
        ({"dtype": torch.int32}, "floating point"),
        ({"seed": -1}, "seed"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "3 channels"),
        ({"mean": (0.5, 0.5, 0.5), "std": (1.0,)}, "one value per channel"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    for make in (held, streamed):
        with pytest.raises(ConfigError, match=message):
            list(make(**options))


def test_wrong_options_of_streams_and_epochs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        streamed(on_error="skipp")
    with pytest.raises(ConfigError, match="num_workers"):
        streamed(num_workers=-1)
    with pytest.raises(ConfigError, match="epoch"):
        held().set_epoch(-1)
    with pytest.raises(DatasetError, match="no rows"):
        streamed(make_dataset(0))
    with pytest.raises(DatasetError, match="did you mean 'label'"):
        streamed(label_column="lable")


def test_wrong_tensors() -> None:
    images, labels = pixels(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputTypeError, match="uint8"):
        DeviceBatches(images.float(), labels, batch_size=2)
    with pytest.raises(InputTypeError, match="labels must be integers"):
        DeviceBatches(images, labels.float(), batch_size=2)
    with pytest.raises(InputTypeError, match="bool"):
        DeviceBatches(images, labels, labels.bool(), batch_size=2)
    with pytest.raises(InputShapeError, match="N, C, H, W"):
        DeviceBatches(images[0], labels, batch_size=2)
    with pytest.raises(InputShapeError, match=r"labels must be .4,."):
        DeviceBatches(images, labels[:3], batch_size=2)
    with pytest.raises(InputShapeError, match="rows must be"):
        DeviceBatches(images, labels, rows=torch.arange(5), batch_size=2)
    with pytest.raises(InputShapeError, match="one row per"):
        DeviceBatches(images, labels, torch.zeros(4), batch_size=2)
    with pytest.raises(InputShapeError, match="one row per"):
        DeviceBatches(images, labels, labels[:2], batch_size=2)
    with pytest.raises(DatasetError, match="no images"):
        DeviceBatches(images[:0], labels[:0], batch_size=2)


# --------------------------------------------------------------------------------------------------------- real data


def test_real_images_streamed_as_in_memory(shared_data: Path, tmp_path: Path) -> None:
    splits = load_splits(shared_data / "svhn", train_split=None, cache_dir=tmp_path)
    decoded = decode_images(splits["test"])
    labels = torch.tensor(splits["test"]["label"][:])
    options: dict[str, Any] = {"batch_size": 100, "mean": MEAN, "std": STD, "augment": build_augmentation(["crop"])}
    a = DeviceBatches(decoded.images, labels, shuffle=True, **options)
    assert_same(a, StreamedBatches(splits["test"], shuffle=True, num_workers=2, **options))
    stream = load_splits(shared_data / "svhn", train_split=None, streaming=True)["test"]
    a.shuffle = False
    assert_same(a, StreamedBatches(stream, num_workers=2, **options))
