"""Cluster contexts at scale: files in place of memory, mini-batches, several processes, bars, another device."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_together
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from cn_hf.contexts import ClusterContexts, images
from cn_hf.contexts.chunks import BLOCK_ROWS
from cn_hf.contexts.estimators import Stopping, assign, cluster, full_passes, lloyd
from cn_hf.contexts.processes import Processes
from cn_hf.contexts.row_store import FileRows, RowStore
from cn_hf.contexts.shared_rows import SharedRows
from cn_hf.contexts.steps import GaussianSteps
from cn_hf.errors import ConfigError, ContextSourceError, DatasetError, DatasetFileError

TESTS = Path(__file__).parent


def pictures(count, size=6, seed=0):
    """Noise about one of three pictures: uint8 (N, 3, size, size), of a spread that leaves clusters overlapping."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (count,), generator=generator)
    centers = torch.randint(90, 160, (3, 3, size, size), generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator) * 40
    return (centers[kinds] + noise).clamp(0, 255).to(torch.uint8)


def table(pixels):
    rows = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    return datasets.Dataset.from_dict({"img": rows}, features=datasets.Features({"img": datasets.Image()}))


def mean_colour(x):
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


def blobs(count=6000, features=7, components=3, seed=0, apart=3.0):
    """Vectors sorted by the Gaussian they are from, and which that is."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(0, apart, (components, features))
    scales = generator.uniform(0.5, 2, (components, features))
    kinds = np.sort(generator.integers(0, components, count))
    x = centers[kinds] + generator.normal(size=(count, features)) * scales[kinds]
    return torch.from_numpy(x).float(), kinds


@pytest.fixture
def few_are_many(monkeypatch):
    """Mini-batches of 256 vectors after a sample of 500, for more than 1000 vectors."""
    make_few_many(monkeypatch.setattr)


def make_few_many(setattr):
    setattr("cn_hf.contexts.estimators._SAMPLE_VECTORS", 500)
    setattr("cn_hf.contexts.estimators._START_VECTORS", 200)
    setattr("cn_hf.contexts.estimators._START_ELEMENTS", 0)
    setattr("cn_hf.contexts.estimators._MOST_FULL_PASSES_OVER", 1000)
    setattr("cn_hf.contexts.shared_rows._BATCH_RUNS", 16)


def same_clusters(found, expected, **tolerance):
    for name in ("mean", "var", "prior"):
        mine, its = getattr(found.clustering, name), getattr(expected.clustering, name)
        if its is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, its, **tolerance)
    assert found.sizes == expected.sizes
    assert found.shape == expected.shape
    assert found.clustering.num_iterations == expected.clustering.num_iterations


# ------------------------------------------------------------------------------------------------ files and memory


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_in_a_file_are_indexed_as_a_tensor_is(dtype):
    x = (torch.rand(50, 7) * 255).to(dtype)
    rows = FileRows(7, dtype)
    for part in x.split([20, 0, 1, 29]):
        rows.append(part.T.contiguous().T)  # also what is not contiguous
    for key in (slice(None), slice(3, 20), slice(45, 99), slice(9, 9), torch.tensor([4, 49, 0, 4]), torch.tensor([0])):
        assert torch.equal(rows[key], x[key])
    assert rows[torch.empty(0, dtype=torch.int64)].shape == (0, 7)
    assert (len(rows), rows.shape, rows.dtype) == (50, x.shape, dtype)
    if dtype == torch.float32:
        rows.div_(3.0)
        assert torch.equal(rows[:], x / 3)


def test_a_store_spills_once_its_budget_is_spent_and_at_once_where_it_knows():
    x = torch.arange(60).view(20, 3).to(torch.uint8)
    for budget, expected, filed in (
        (60, None, False),
        (59, None, True),
        (60, 20, False),
        (59, 20, True),
        (0, 20, True),
    ):
        with RowStore(budget, expected) as store:
            for number, part in enumerate(x.split(6)):
                store.append(part)
                if number == 0:
                    assert (store._file is not None) == (filed and expected is not None)
            rows = store.rows(3, torch.uint8)
            assert isinstance(rows, FileRows) == filed
            assert torch.equal(rows[:], x)
    with RowStore(0) as store:
        store.append(x)  # what comes in one piece is in memory already
        assert store.rows(3, torch.uint8) is x
    with RowStore(0) as store:
        assert store.rows(5, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
@pytest.mark.parametrize("features", ["pixels", "pca", mean_colour])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_fit_from_a_file_is_the_fit_from_memory_bit_for_bit(method, features, streamed, monkeypatch, few_are_many):
    monkeypatch.setattr("cn_hf.contexts.image_source._GROUP_BYTES", 10_000)
    monkeypatch.setattr("cn_hf.contexts.principal._PROJECTED_ROWS", 100)
    data = table(pictures(1100))
    options = {"num_contexts": 3, "method": method, "features": features, "pca_components": 8}
    expected = ClusterContexts(**options).fit(data)
    split = data.to_iterable_dataset() if streamed else data
    spilled, decoded = [], []
    spill, decode = RowStore._spill, images.decode_image
    monkeypatch.setattr(RowStore, "_spill", lambda *given: (spilled.append(given), spill(*given)))
    monkeypatch.setattr(images, "decode_image", lambda *given: (decoded.append(0), decode(*given))[1])
    found = ClusterContexts(**options, memory_budget_bytes=10_000).fit(split)
    assert len(spilled) == (2 if features == "pca" else 1)
    assert len(decoded) == 1100
    same_clusters(found.clusters, expected.clusters, rtol=0, atol=0)
    assert found.clusters.clustering.objective == expected.clusters.clustering.objective
    assert found.apply(data)["context_ids"][:] == expected.apply(data)["context_ids"][:]


MEMORY_SCRIPT = """
import io, sys
import datasets, torch, PIL.Image
from cn_hf.contexts import ClusterContexts, estimators, image_source
image_source._GROUP_BYTES = 2**21
estimators._SAMPLE_VECTORS = estimators._START_VECTORS = 500
estimators._START_ELEMENTS = 0

def png(seed):
    pixels = torch.randint(0, 100, (32, 32, 3), generator=torch.Generator().manual_seed(seed)) + seed % 2 * 100
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG", compress_level=0)
        return {"bytes": file.getvalue(), "path": None}

features = datasets.Features({"img": datasets.Image()})
few = datasets.Dataset.from_dict({"img": [png(k) for k in range(100)]}, features=features)
data = datasets.concatenate_datasets([few] * 300)
ClusterContexts(2).fit(few).apply(few)

def peak():
    status = open("/proc/self/status").read()  # getrusage would count the parent's memory too
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

before = peak()
source = ClusterContexts(2, memory_budget_bytes=int(sys.argv[1]))
ids = source.fit(data).apply(data)["context_ids"][:]
assert ids == ids[:100] * 300 and len(set(ids)) == 2
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is asked of Linux")
def test_resident_memory_is_bounded_by_the_budget():
    grown = []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back to the system at once
    for budget in (2**20, 2**30):
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(budget)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=environment)
        assert run.returncode == 0, run.stderr
        grown.append(float(run.stdout))
    assert grown[0] < 70  # MiB: samples, and a few chunks
    assert grown[1] > 85  # 88 MiB of pixels, and the same


def open_files():
    return [
        os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and os.path.lexists(link)
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are asked of Linux")
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_file_is_gone_after_a_fit_an_error_and_an_interrupt(error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("cn_hf.contexts.image_source._GROUP_BYTES", 1000)
    held = []

    def interrupted(*given, **options):
        held.extend(name for name in open_files() if str(tmp_path) in name)
        if error is not None:
            raise error
        return cluster(*given, **options)

    monkeypatch.setattr("cn_hf.contexts.clusters.cluster", interrupted)
    source = ClusterContexts(2, memory_budget_bytes=1000)
    if error is None:
        source.fit(table(pictures(50)))
    else:
        with pytest.raises(error) as caught:  # which holds on to all that the failed call held
            source.fit(table(pictures(50)))
        assert caught.tb is not None
    assert len(held) == 1
    assert not [name for name in open_files() if str(tmp_path) in name]
    assert not list(tmp_path.iterdir())
    assert source.fitted == (error is None)


def test_a_disk_without_room_is_an_error_before_anything_is_decoded_twice(monkeypatch):
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("cn_hf.contexts.image_source._GROUP_BYTES", 1000)
    data = table(pictures(60))
    source = ClusterContexts(2, memory_budget_bytes=1000)
    for split in (data, data.to_iterable_dataset()):
        with pytest.raises(ContextSourceError, match=r"GiB are free. Set TMPDIR .*fit_samples=.*decode_size="):
            source.fit(split)
    assert not source.fitted
    assert ClusterContexts(2, memory_budget_bytes=1000, fit_samples=9).fit(data).fitted


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_disk_that_fills_up_is_an_error(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    monkeypatch.setattr("cn_hf.contexts.image_source._GROUP_BYTES", 1000)
    with pytest.raises(ContextSourceError, match=r"no room: it was full after .*TMPDIR"):
        ClusterContexts(2, memory_budget_bytes=1000).fit(table(pictures(60)))


# --------------------------------------------------------------------------------------------------- mini-batches


@pytest.mark.parametrize("seed", [0, 1])
def test_mini_batch_em_reaches_the_likelihood_and_labels_of_full_em_and_of_scikit_learn(seed, few_are_many):
    x, kinds = blobs(seed=seed, apart=4)
    found = cluster(x, 3, method="gmm", seed=seed, reg_covar=1e-6)
    assert found.num_iterations <= 4
    reference = GaussianMixture(3, covariance_type="diag", n_init=5, random_state=0, tol=1e-6, max_iter=500).fit(x)
    assert found.objective == pytest.approx(reference.score(x), abs=2e-3)
    ids = assign(x, found)
    assert adjusted_rand_score(kinds, ids) > 0.98
    assert adjusted_rand_score(reference.predict(x.numpy()), ids) > 0.995
    steps = GaussianSteps(x.mean(dim=0), found.var.mean(dim=0), 1e-6)
    full = full_passes(SharedRows(x), found, steps, Stopping(tol=1e-7, max_iterations=500))
    assert abs(full.objective - found.objective) < 2e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_mini_batch_k_means_reaches_the_inertia_and_labels_of_full_k_means_and_of_scikit_learn(seed, few_are_many):
    x, _ = blobs(seed=seed, components=4)
    found = cluster(x, 4, method="kmeans", seed=seed)
    assert found.num_iterations <= 4
    reference = KMeans(4, n_init=5, random_state=0, tol=1e-8).fit(x)
    assert found.objective == pytest.approx(reference.inertia_ / len(x), rel=1e-3)
    assert adjusted_rand_score(reference.labels_, assign(x, found)) > 0.98
    full = lloyd(x, found.mean, shift=x.mean(dim=0), spread=x.var(dim=0), stopping=Stopping(tol=0))
    assert full.objective == pytest.approx(found.objective, rel=1e-3)


def test_mini_batches_hold_every_vector_once_and_are_spread_over_the_data(monkeypatch):
    monkeypatch.setattr("cn_hf.contexts.shared_rows._BATCH_RUNS", 5)
    x = torch.arange(1003).view(-1, 1).float()

    def walk(seed):
        generator, parts = torch.Generator().manual_seed(seed), []
        for sum_over in SharedRows(x).sums_of_batches(torch.float32, generator, "batches"):
            held = []
            sum_over(lambda chunk, held=held: [held.extend(chunk.flatten().tolist()) or chunk.sum()])
            parts.append(held)
        return parts

    parts = walk(0)
    assert sorted(row for part in parts for row in part) == list(range(1003))
    assert max(map(len, parts)) == 80
    assert min(map(len, parts)) > 50
    assert all(np.ptp(part) > 300 for part in parts)
    assert walk(0) == parts
    assert walk(1) != parts


def test_a_component_lost_in_mini_batches_is_set_anew(few_are_many):
    from cn_hf.contexts.estimators import _mini_batches
    from cn_hf.contexts.steps import Clustering, KMeansSteps

    x, _ = blobs(components=3, apart=10)
    mean = torch.cat([x[:1], x[-1:], torch.full((1, 7), 1e4)])
    start = Clustering(mean=mean, var=None, prior=None, objective=math.inf, num_iterations=0)
    steps = KMeansSteps(x.mean(dim=0), x.var(dim=0))
    kept, once = _mini_batches(SharedRows(x), start, steps, Stopping(), torch.Generator().manual_seed(0))
    assert once == 1
    assert assign(x, kept).bincount(minlength=3)[2] == 0
    found, passes = _mini_batches(
        SharedRows(x), start, steps, Stopping(min_share=0.01), torch.Generator().manual_seed(0)
    )
    assert passes > 1
    assert assign(x, found).bincount(minlength=3).min() > 60


def test_full_passes_alone_are_taken_over_data_that_is_not_far_larger_than_the_sample(monkeypatch, few_are_many):
    x, _ = blobs(count=1000, apart=0.7)
    monkeypatch.setattr("cn_hf.contexts.estimators._mini_batches", lambda *_: pytest.fail("mini-batches"))
    assert cluster(x, 3, method="gmm").num_iterations > 4


# ----------------------------------------------------------------------------------------------------- processes


def corrupted(data, row):
    rows = data.cast_column("img", datasets.Image(decode=False)).to_list()
    rows[row]["img"]["bytes"] = rows[row]["img"]["bytes"][:40]
    return datasets.Dataset.from_list(rows, features=data.features)


FITS = {
    # length, options, streamed; 1100 is no multiple of processes or blocks, 270 leaves one 14 rows and a third none
    "gmm": (1100, {}, False),
    "gmm of a stream": (1100, {}, True),
    "k-means": (1100, {"method": "kmeans"}, False),
    "k-means of a stream, samples": (1100, {"method": "kmeans", "fit_samples": 900}, True),
    "samples": (1100, {"fit_samples": 900}, False),
    "principal components": (1100, {"features": "pca", "pca_components": 8}, False),
    "embeddings in files": (1100, {"features": mean_colour, "memory_budget_bytes": 0}, False),
    "in files": (1100, {"memory_budget_bytes": 0}, True),
    "tiny and empty shares": (270, {}, False),
    "tiny and empty shares of a stream": (270, {"features": "pca", "pca_components": 8}, True),
    "embeddings of few": (100, {"features": mean_colour}, False),
}


def fit_case(name, **distributed):
    length, options, streamed = FITS[name]
    data = table(pictures(length))
    source = ClusterContexts(3, **options)
    return source.fit(data.to_iterable_dataset() if streamed else data, **distributed).clusters


def failures():
    """What must fail everywhere with the same error: a broken or odd image in another process's block, a full disk."""
    good = table(pictures(600))
    odd = datasets.concatenate_datasets([good.select(range(300)), table(pictures(300, size=7))])
    broken = corrupted(good, BLOCK_ROWS + 3)
    model = lambda x: mean_colour(x) / (0 if x.shape[0] != 64 and dist.get_rank() == 1 else 1)  # noqa: E731
    return {
        "corrupt": (DatasetFileError, "Image 259 of column 'img'", {}, broken),
        "corrupt stream": (DatasetFileError, "Image 259 of column 'img'", {}, broken.to_iterable_dataset()),
        "sizes": (DatasetError, r"is 7x7, image (0|256) is 6x6", {"num_workers": 1}, odd),
        "few": (ContextSourceError, "2 training images cannot form 3 contexts", {}, good.select(range(2))),
        "none": (DatasetError, "no images to fit", {}, good.select([])),
        "split": (DatasetError, "No split 'train'", {}, datasets.DatasetDict(test=good)),
        "embedding": (ContextSourceError, "not finite", {"features": model}, good),
        "one kind": (ContextSourceError, "got none of the training", {}, table(torch.zeros(600, 3, 4, 4).byte())),
        "a bug of one": (ContextSourceError, "Process 1 failed: ZeroDivisionError", {"features": _fails}, good),
    }


def _fails(x):
    return mean_colour(x) if dist.get_rank() == 0 or len(x) == 1 else 1 / 0


def _process(rank, count, port, folder):
    from accelerate import PartialState

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank)
    )
    with pytest.raises(ConfigError, match=r"no process group yet. Create an accelerate.Accelerator"):
        ClusterContexts(2).fit(table(pictures(9)), distributed=True)
    PartialState(cpu=True)
    held = []
    append = RowStore.append
    RowStore.append = lambda self, x: (held.append(len(x)), append(self, x))[1]
    results = {name: dataclasses.asdict(fit_case(name, distributed=True)) for name in FITS}
    parts = sum(held)
    make_few_many(pytest.MonkeyPatch().setattr)
    results |= {f"{name}, mini-batches": dataclasses.asdict(fit_case(name, distributed=True)) for name in FITS}
    if count == 2:
        for name, (error, message, options, data) in failures().items():
            kind = ZeroDivisionError if name == "a bug of one" and rank == 1 else error
            with pytest.raises(kind, match="division by zero" if kind is ZeroDivisionError else message):
                ClusterContexts(3, **options).fit(data, distributed=True)
        pytest.MonkeyPatch().setattr("cn_hf.contexts.image_source._GROUP_BYTES", 1000)
        if rank == 1:
            RowStore._spill = _full
        with pytest.raises(ContextSourceError, match="no room"):
            ClusterContexts(3, memory_budget_bytes=0).fit(table(pictures(600)), distributed=True)
        if rank == 0:
            assert ClusterContexts(3).fit(table(pictures(100))).fitted  # by itself: it must not wait for the others
    torch.save((parts, results), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _full(self, like, needed):
    raise ContextSourceError("no room")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_find_together_what_one_finds_alone(count, tmp_path, monkeypatch):
    run_together(_process, count, free_port(), str(tmp_path), processes=count)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]
    parts, results = [part for part, _ in saved], [result for _, result in saved]
    expected = {name: dataclasses.asdict(fit_case(name)) for name in FITS}
    make_few_many(monkeypatch.setattr)
    expected |= {f"{name}, mini-batches": dataclasses.asdict(fit_case(name)) for name in FITS}
    assert any(fit["clustering"]["num_iterations"] > 4 for fit in expected.values())
    for name, fit in expected.items():
        tolerance = {"rtol": 0, "atol": 0}
        for result in results:  # alike on all processes to the last bit, and within 1e-6 what one finds alone
            _same(result[name], results[0][name], name, **tolerance)
        _same(results[0][name], fit, name, rtol=1e-6, atol=1e-6)
    held = [(options.get("fit_samples", length), "pca" in options.values()) for length, options, _ in FITS.values()]
    assert sum(parts) == sum(length * (1 + projected) for length, projected in held)
    assert max(parts) < 0.75 * sum(parts)


def _same(found, expected, name, **tolerance):
    for key in ("mean", "var", "prior"):
        mine, its = found["clustering"][key], expected["clustering"][key]
        if its is not None:
            torch.testing.assert_close(mine, its, msg=f"{name}, {key}: {mine} is not {its}", **tolerance)
    assert found["clustering"]["objective"] == pytest.approx(expected["clustering"]["objective"], rel=1e-6, abs=1e-6), (
        name
    )
    assert found["clustering"]["num_iterations"] == expected["clustering"]["num_iterations"], name
    assert found["sizes"] == expected["sizes"], name
    assert found["shape"] == expected["shape"], name


def test_every_row_is_one_process_s_and_has_a_place_there():
    for count in (1, 2, 3):
        shares = [Processes(count, rank) for rank in range(count)]
        rows = [share.own_rows(1000) for share in shares]
        assert sorted(row for own in rows for row in own) == list(range(1000))
        for share, own in zip(shares, rows, strict=True):
            assert own == [row for row in range(1000) if share.owns(row)]
            mine, places = share.places(torch.arange(1000))
            assert mine.nonzero().flatten().tolist() == own
            assert places.tolist() == list(range(len(own)))


def test_one_process_may_say_distributed_too():
    data = table(pictures(100))
    same_clusters(ClusterContexts(3).fit(data, distributed=True).clusters, ClusterContexts(3).fit(data).clusters)


# ------------------------------------------------------------------------------------------------ bars and devices


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_shown_inside_passes_and_mini_batches_on_a_terminal_only(monkeypatch, few_are_many):
    monkeypatch.setattr("cn_hf.contexts.chunks._BAR_AFTER", 0)
    data = table(pictures(1100))
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", file)
        ClusterContexts(3, features="pca").fit(data).apply(data)
        shown = ["decoding", "principal components, pass 2", "projecting", "mini-batches", "pass 1:", "assigning"]
        for text in shown:
            assert (text in file.getvalue()) == file.isatty(), text
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "Device 'gpu' cannot be used here"),
        ({"device": "cpux"}, "Device 'cpux' cannot be used here"),
        ({"memory_budget_bytes": -1}, "memory_budget_bytes is -1"),
        ({"memory_budget_bytes": 1e9}, "memory_budget_bytes is 1000000000.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterContexts(2, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["gmm", "kmeans"])
@pytest.mark.parametrize("features", ["pixels", "pca"])
def test_passes_on_a_gpu_find_the_clusters_of_the_cpu(method, features, few_are_many):
    data = table(pictures(1100))
    options = {"num_contexts": 3, "method": method, "features": features, "pca_components": 8}
    expected, found = ClusterContexts(**options).fit(data), ClusterContexts(**options, device="cuda").fit(data)
    torch.testing.assert_close(found.clusters.clustering.mean, expected.clusters.clustering.mean, rtol=1e-3, atol=1e-3)
    assert adjusted_rand_score(expected.apply(data)["context_ids"][:], found.apply(data)["context_ids"][:]) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pass_on_a_gpu_never_waits_for_it():
    from cn_hf.contexts.steps import Clustering, GaussianSteps, KMeansSteps

    x = pictures(3000).flatten(1)
    data = SharedRows(x, device=torch.device("cuda"))
    shift, spread = torch.rand(108, device="cuda"), torch.rand(108, device="cuda")
    mean, var, prior = torch.rand(3, 108), torch.rand(3, 108) + 0.1, torch.full((3,), 1 / 3)
    mixture = Clustering(mean=mean, var=var, prior=prior, objective=0.0, num_iterations=0).to("cuda")
    centers = dataclasses.replace(mixture, var=None, prior=None)
    for steps, start in ((GaussianSteps(shift, spread, 1e-3), mixture), (KMeansSteps(shift, spread), centers)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            data.sum(steps.expectation(start), torch.float32)
        finally:
            torch.cuda.set_sync_debug_mode("default")
