"""Going on in the middle of an epoch, telling data that changed, and worker processes that die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_for_tests import MEAN, STD, N, arrays, assert_same, held, make_dataset, pixels, png, streamed
from datasets import Dataset

from cn_hf.data import Batches, DeviceBatches, Mixing, MixingConfig, build_augmentation, decode_images, load_splits
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError

MIXING = Mixing(MixingConfig(mixup=0.4, cutmix=1.0), num_classes=4, num_contexts=3)


# -------------------------------------------------------------------------------------- the middle of an epoch


def stream(dataset: Any = None, **options: Any) -> Batches:
    source = (make_dataset() if dataset is None else dataset).to_iterable_dataset(num_shards=3)
    return streamed(source, **{"shuffle_buffer": 10, **options})


@pytest.mark.parametrize(
    ("make", "workers"),
    [(held, {}), *((make, {"num_workers": count}) for make in (streamed, stream) for count in (0, 1, 3))],
)
def test_what_follows_a_start_is_the_tail_of_a_whole_pass(make: Any, workers: dict[str, int]) -> None:
    options = {"shuffle": True, "augment": build_augmentation(["flip", "crop"]), "mean": MEAN, "std": STD}
    whole, batches = make(**options), make(**options, **workers)
    for mixing in (None, MIXING):
        whole.mixing = batches.mixing = mixing
        whole.set_epoch(1)
        expected = list(whole)
        for start in (0, 2, 4, 5):
            batches.set_epoch(1, start)
            assert (len(batches), batches.num_samples) == (5, N)
            assert_same(batches, expected[start:])
    batches.set_epoch(1, start=3)
    assert_same(batches, expected[3:])
    assert_same(batches, expected[3:])  # the start stays
    batches.set_epoch(1)
    assert_same(batches, expected)


@pytest.mark.parametrize("make", [held, streamed, stream])
def test_a_start_in_several_processes_without_the_last_batch(make: Any) -> None:
    options = {"shuffle": True, "drop_last": True, "num_processes": 3, "process_index": 1, "batch_size": 7}
    expected, batches = list(make(**options)), make(**options)
    batches.set_epoch(0, 3)
    assert len(expected) == 5
    assert_same(batches, expected[3:])


def test_a_start_that_is_no_batch() -> None:
    for make in (held, streamed, stream):
        batches = make()
        for start in (-1, 6):
            with pytest.raises(ConfigError, match=f"0 to 4, or 5 for none; got {start}"):
                batches.set_epoch(0, start)
        assert (batches.epoch, batches.start) == (0, 0)


def test_nothing_before_the_start_is_decoded() -> None:
    # Broken images before the start raise no error, since nobody looks at them.
    dataset = make_dataset(broken=(0, 9, 15))
    for make in (streamed, stream):
        batches = make(dataset)
        batches.set_epoch(0, 2)
        assert sum(len(batch["labels"]) for batch in batches) == N - 16
    with pytest.raises(DatasetFileError, match="Image 0 "):
        list(streamed(dataset))


def test_the_rows_of_a_stream_are_counted_from_its_beginning() -> None:
    for rows, message in ((N, None), (N + 1, f"has {N} rows, but num_rows is {N + 1}")):
        batches = stream(num_rows=rows)
        batches.set_epoch(0, 3)
        if message is None:
            assert len(list(batches)) == 2
        else:
            with pytest.raises(DatasetError, match=message):
                list(batches)


# ------------------------------------------------------------------------------------------- is it the same data?


def kinds(images: Any = None, labels: Any = None, contexts: Any = None, **options: Any) -> list[str]:
    """Fingerprints of the same data held in memory, read from a Dataset, and streamed."""
    images = arrays() if images is None else images
    labels = [i % 4 for i in range(N)] if labels is None else labels
    contexts = [i % 3 for i in range(N)] if contexts is None else contexts
    dataset = Dataset.from_dict(
        {"image": [png(a) for a in images], "label": labels, "context_ids": contexts}, features=make_dataset().features
    )
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(contexts)
    options = {"batch_size": 8, **options}
    workers = options.pop("num_workers", 0)
    return [
        DeviceBatches(*tensors, **options).fingerprint(),
        streamed(dataset, num_workers=workers, **options).fingerprint(),
        streamed(dataset.to_iterable_dataset(), num_workers=workers, **options).fingerprint(),
    ]


def test_the_same_data_has_one_fingerprint_however_it_is_read() -> None:
    first = kinds()
    assert all(len(bytes.fromhex(text)) == 16 for text in first)
    assert len(set(first)) == 3
    other = kinds(num_workers=2, num_processes=2, process_index=1, batch_size=3, seed=9, shuffle=True, mixing=MIXING)
    assert other == first
    batches = stream()
    before = batches.fingerprint()
    list(batches)
    batches.set_epoch(3, 1)
    assert batches.fingerprint() == before


def test_one_changed_pixel_label_context_or_row_changes_the_fingerprint() -> None:
    first = kinds()
    images = arrays()
    images[17, 3, 2, 1] ^= 1
    labels, contexts = [i % 4 for i in range(N)], [i % 3 for i in range(N)]
    labels[30], contexts[5] = 3, 0
    swapped = arrays()
    swapped[[3, 4]] = swapped[[4, 3]]
    for changed in (kinds(images=images), kinds(labels=labels), kinds(contexts=contexts), kinds(images=swapped)):
        assert not set(changed) & set(first)
    fewer = make_dataset(N - 1)
    assert streamed(fewer).fingerprint() != first[1]
    assert streamed(fewer.to_iterable_dataset()).fingerprint() != first[2]
    tensors = pixels(), torch.arange(N) % 4
    by_rows = [
        DeviceBatches(*tensors, rows=rows, batch_size=8).fingerprint()
        for rows in (None, torch.arange(N), torch.arange(N).flip(0))
    ]
    assert by_rows[0] == by_rows[1] != by_rows[2]
    assert DeviceBatches(*tensors, torch.zeros(N, 2), batch_size=8).fingerprint() not in (*by_rows, *first)


def test_images_in_files_are_told_by_what_is_in_them(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(3):
                place = tmp_path / "pets" / split / name / f"{i}.png"
                PIL.Image.fromarray(np.full((4, 4, 3), 10 * i, dtype=np.uint8)).save(place)
    splits = load_splits(tmp_path / "pets", cache_dir=tmp_path / "cache")
    sources = [splits["train"], load_splits(tmp_path / "pets", streaming=True)["train"]]
    assert splits["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"] is None
    before = [streamed(source, batch_size=2).fingerprint() for source in sources]
    assert before == [streamed(source, batch_size=4).fingerprint() for source in sources]
    PIL.Image.fromarray(np.full((4, 4, 3), 77, dtype=np.uint8)).save(tmp_path / "pets" / "train" / "dog" / "1.png")
    changed = [streamed(source, batch_size=2).fingerprint() for source in sources]
    (tmp_path / "pets" / "train" / "dog" / "1.png").write_bytes(b"no image")
    broken = streamed(sources[0], batch_size=2).fingerprint()
    (tmp_path / "pets" / "train" / "dog" / "1.png").unlink()
    missing = streamed(sources[0], batch_size=2).fingerprint()
    assert len({*before, *changed, broken, missing}) == 6


def test_a_stream_without_types_or_with_images_made_on_the_way() -> None:
    def rows() -> Any:
        for i, array in enumerate(arrays(6)):
            yield {"image": PIL.Image.fromarray(array), "label": i % 2}

    features = make_dataset().features
    made = datasets.IterableDataset.from_generator(
        rows, features=datasets.Features({"image": features["image"], "label": features["label"]})
    )
    first = streamed(made).fingerprint()
    assert first == streamed(made).fingerprint()
    mapped = made.map(lambda row: {"label": 1 - row["label"]})
    assert streamed(mapped).fingerprint() != first


def test_large_data_takes_no_time() -> None:
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    batches = DeviceBatches(images, torch.zeros(50_000, dtype=torch.int64), batch_size=8)
    started = time.process_time()
    before = batches.fingerprint()
    assert time.process_time() - started < 1.5
    images[-1, -1, -1, -1] ^= 1
    assert batches.fingerprint() != before


# ----------------------------------------------------------------------------------------------- a worker that dies


class Slow:
    """A stream's map that takes its time in worker processes."""

    def __init__(self) -> None:
        self.own = os.getpid()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if os.getpid() != self.own:
            time.sleep(0.02)
        return row


@pytest.fixture
def _no_child_death_handler() -> Iterator[None]:
    """That of torch may be there already, from a loader of a test before: ours leaves handlers as they were."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.usefixtures("_no_child_death_handler")
@pytest.mark.parametrize("as_stream", [False, True])
def test_a_killed_worker_is_one_clear_error_when_the_next_batch_is_asked_for(as_stream: bool) -> None:
    dataset = make_dataset(800)
    source = dataset.to_iterable_dataset().map(Slow(), features=dataset.features) if as_stream else dataset
    before = set(multiprocessing.active_children())
    batches = iter(streamed(source, num_workers=2, num_rows=800 if as_stream else None))
    assert len(next(batches)["labels"]) == 8
    [victim, *_] = set(multiprocessing.active_children()) - before
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(0.3)  # no error amid what the main thread does
    started = time.monotonic()
    with pytest.raises(DatasetFileError, match=rf"process {victim.pid} was ended by SIGKILL .*memory.*num_workers=0"):
        list(batches)
    assert time.monotonic() - started < 20
    del batches
    assert not set(multiprocessing.active_children()) - before


def test_a_worker_killed_while_images_are_decoded_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    real = PIL.Image.open

    def die(*args: Any) -> Any:
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    monkeypatch.setattr(PIL.Image, "open", die)  # processes started by fork inherit it
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("workers are not forked here")
    assert len(decode_images(make_dataset()).images) == N
    with pytest.raises(DatasetFileError, match="ended by SIGKILL"):
        decode_images(make_dataset(), num_workers=2)


class DieInWorker:
    """A stream's map that ends the process it runs in, unless that is the test's own."""

    def __init__(self, error: Exception | None = None) -> None:
        self.own = os.getpid()
        self.error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if os.getpid() != self.own:
            if self.error is not None:
                raise self.error
            os._exit(3)
        return row


def test_a_worker_that_exits_and_one_that_raises_are_told_apart() -> None:
    dataset = make_dataset()
    plain = dataset.to_iterable_dataset()
    dying = plain.map(DieInWorker(), features=dataset.features)
    assert len(list(streamed(dying))) == 5
    with pytest.raises(DatasetFileError, match="exited with code 3"):
        list(streamed(dying, num_workers=1, num_rows=N))
    raising = plain.map(DieInWorker(RuntimeError("of its own")), features=dataset.features)
    with pytest.raises(RuntimeError, match="of its own"):
        list(streamed(raising, num_workers=1, num_rows=N))


def test_the_handler_of_child_deaths_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    list(streamed(num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) == before


KEPT = """
import torch
from cn_hf.reading.workers import iterate

class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            raise RuntimeError("broken")
        return index

items = iterate(Broken(), num_workers=1)
if {abandoned}:
    next(items)
else:
    try:
        list(items)
    except RuntimeError as error:
        kept = error  # its traceback holds the iterator
print("end")
"""


@pytest.mark.parametrize("abandoned", [True, False])
def test_a_program_ends_though_its_workers_take_no_signals(abandoned: bool) -> None:
    code = KEPT.format(abandoned=abandoned)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "end\n"
