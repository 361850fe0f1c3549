"""Cluster contexts on pixels, components, embeddings and statistics of a stem; alone and in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_together
from sklearn.metrics import adjusted_rand_score
from torch import nn

from cn_hf.contexts import ClusterContexts, ContextSource
from cn_hf.contexts.storage import read_source, write_source
from cn_hf.errors import (
    CheckpointError,
    ConfigError,
    ContextSourceError,
    DatasetError,
    DatasetFileError,
    InputTypeError,
)

TESTS = Path(__file__).parent

COLOURS = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])


def groups(counts, size=6, seed=0):
    """Images of one noisy colour each: uint8 (N, 3, size, size), and which colour."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    kinds = kinds[torch.randperm(len(kinds), generator=generator)]
    noise = torch.randint(-30, 31, (len(kinds), 3, size, size), generator=generator)
    return (COLOURS[kinds][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), kinds


def table(pixels):
    images = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    features = datasets.Features({"img": datasets.Image(), "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"img": images, "row": list(range(len(images)))}, features=features)


def ids_of(split):
    return [row["context_ids"] for row in split]


def test_a_context_of_a_single_outlier_warns():
    pixels, _ = groups([400, 400])
    pixels = pixels // 8 * 8  # little noise
    pixels[:, 1:] //= 4
    pixels[0] = 255
    with pytest.warns(UserWarning, match=r"has 1 of 800 training images\. Ask for fewer contexts"):
        source = ClusterContexts(3, "kmeans").fit_images(pixels)
    assert min(source.clusters.sizes) == 1
    assert min(ClusterContexts(2).fit_images(pixels).clusters.sizes) >= 400


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
@pytest.mark.parametrize("features", ["pixels", "pca"])
def test_groups_are_found_on_every_kind_of_dataset(method, features):
    train, kinds = groups([30, 40, 50])
    test, test_kinds = groups([5, 6, 7], seed=1)
    data = datasets.DatasetDict(train=table(train), test=table(test))
    source = ClusterContexts(3, method, features).fit(data)
    applied = source.apply(data)
    assert adjusted_rand_score(kinds, applied["train"]["context_ids"][:]) == 1
    assert adjusted_rand_score(test_kinds, applied["test"]["context_ids"][:]) == 1
    assert sorted(source.clusters.sizes) == [30, 40, 50]
    assert applied["test"].features["context_ids"].names == ["cluster_0", "cluster_1", "cluster_2"]
    streams = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in data.items()})
    streamed = ClusterContexts(3, method, features).fit(streams).apply(streams)
    assert ids_of(streamed["test"]) == applied["test"]["context_ids"][:]
    assert np.array_equal(np.asarray(next(iter(streamed["test"]))["img"]), np.asarray(data["test"][0]["img"]))


def test_predict_agrees_with_apply_exactly_whatever_the_batches():
    pixels = torch.randint(0, 256, (150, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = table(pixels)
    for method in ("gmm", "kmeans"):
        source = ClusterContexts(5, method).fit(data)
        expected = source.apply(data)["context_ids"][:]
        assert source.predict(pixels).tolist() == expected
        assert source.predict(data["img"][:]).tolist() == expected
        assert torch.cat([source.predict(part) for part in pixels.split(7)]).tolist() == expected
        assert ClusterContexts(5, method).fit_images(pixels).predict(pixels).tolist() == expected


def test_the_test_split_changes_nothing():
    train, _ = groups([20, 20, 20])
    fits = []
    for other in (groups([9])[0], 255 - groups([5, 5])[0]):
        source = ClusterContexts(3).fit(datasets.DatasetDict(train=table(train), test=table(other)))
        fits.append(source.clusters.clustering)
    for name in ("mean", "var", "prior"):
        assert torch.equal(getattr(fits[0], name), getattr(fits[1], name))
    with pytest.raises(DatasetError, match="No split 'train'"):
        ClusterContexts(3).fit(datasets.DatasetDict(test=table(train)))


def test_the_same_seed_gives_the_same_contexts_and_another_another_start():
    pixels = torch.randint(0, 256, (200, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def fitted(seed, noise):
        torch.manual_seed(noise)
        return ClusterContexts(4, seed=seed, features="pca").fit_images(pixels).clusters.clustering.mean

    assert torch.equal(fitted(0, 1), fitted(0, 2))
    assert not torch.equal(fitted(0, 1), fitted(3, 1))


def test_fit_samples_are_drawn_by_the_seed():
    pixels, _ = groups([30, 40, 50])
    source = ClusterContexts(3, fit_samples=25).fit(table(pixels))
    assert sum(source.clusters.sizes) == 25
    again = ClusterContexts(3, fit_samples=25).fit(table(pixels))
    assert torch.equal(source.clusters.clustering.mean, again.clusters.clustering.mean)
    for other in (
        ClusterContexts(3, fit_samples=25).fit(table(pixels).to_iterable_dataset()),
        ClusterContexts(3, fit_samples=25).fit_images(pixels),
    ):
        assert torch.equal(other.clusters.clustering.mean, source.clusters.clustering.mean)
    other = ClusterContexts(3, fit_samples=25, seed=1).fit(table(pixels))
    assert not torch.equal(other.clusters.clustering.mean, source.clusters.clustering.mean)
    assert sum(ClusterContexts(3, fit_samples=10_000).fit(table(pixels)).clusters.sizes) == 120


def test_pixels_that_never_change_do_no_harm():
    pixels, kinds = groups([40, 40])
    pixels[:, :, :3] = 0
    source = ClusterContexts(2).fit_images(pixels)
    assert adjusted_rand_score(kinds, source.predict(pixels)) == 1
    stray = pixels.clone()
    stray[:, :, 0, 0] = 255
    assert torch.equal(source.predict(stray), source.predict(pixels))


def test_a_fit_beyond_floating_point_is_an_error():
    pixels, _ = groups([40, 40])
    pixels[:, :, :3] = 0
    pixels[0, 0, 0, 0] = 255
    with pytest.raises(ContextSourceError, match="raise reg_covar"):
        ClusterContexts(2, reg_covar=1e-40).fit_images(pixels)


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_fewer_images_or_groups_than_contexts_is_an_error(method):
    with pytest.raises(ContextSourceError, match="2 training images cannot form 3 contexts"):
        ClusterContexts(3, method).fit_images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    source = ClusterContexts(3, method)
    with pytest.raises(ContextSourceError, match=r"got none of the training images \(sizes"):
        source.fit_images(torch.full((9, 3, 4, 4), 7, dtype=torch.uint8))
    assert not source.fitted
    with pytest.raises(DatasetError, match="no images"):
        ClusterContexts(3, method).fit(table(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)))


def test_one_context_and_as_many_as_images():
    pixels, _ = groups([6, 6])
    assert ClusterContexts(1).fit_images(pixels).predict(pixels).tolist() == [0] * 12
    few = pixels[:3]
    assert sorted(ClusterContexts(3).fit_images(few).predict(few).tolist()) == [0, 1, 2]


def test_many_contexts():
    pixels = torch.randint(0, 256, (600, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = ClusterContexts(100, "kmeans", image_mode="L").fit_images(pixels)
    assert source.num_contexts == 100
    assert sum(source.clusters.sizes) == 600
    assert min(source.clusters.sizes) > 0


def test_images_of_differing_sizes_need_decode_size():
    small, kinds = groups([20, 20], size=6)
    large, more = groups([20, 20], size=9, seed=1)
    data = datasets.concatenate_datasets([table(small), table(large)])
    for dataset in (data, data.to_iterable_dataset()):
        with pytest.raises(DatasetError, match="Image 40 is 9x9, image 0 is 6x6"):
            ClusterContexts(2).fit(dataset)
    source = ClusterContexts(2, decode_size=5).fit(data)
    ids = source.apply(data)["context_ids"][:]
    assert adjusted_rand_score(torch.cat([kinds, more]), ids) == 1
    assert source.predict(large).tolist() == ids[40:]
    assert source.predict(data["img"][:]).tolist() == ids
    strict = ClusterContexts(2).fit_images(small)
    for images in (large, table(large)["img"][:]):
        with pytest.raises(ContextSourceError, match="Image 0 is 9x9, the contexts were fitted on 6x6"):
            strict.predict(images)
    with pytest.raises(ContextSourceError, match="Image 40 is 9x9"):
        ids_of(strict.apply(data.to_iterable_dataset(), overwrite=True).skip(40))


def test_a_corrupt_image_is_named_with_its_row():
    pixels, _ = groups([10, 10])
    rows = table(pixels).cast_column("img", datasets.Image(decode=False)).to_list()
    rows[13]["img"]["bytes"] = rows[13]["img"]["bytes"][:40]
    data = datasets.Dataset.from_list(rows, features=table(pixels[:1]).features)
    for num_workers in (0, 2):
        with pytest.raises(DatasetFileError, match="Image 13 of column 'img'"):
            ClusterContexts(2, num_workers=num_workers).fit(data)
    with pytest.raises(DatasetFileError, match="Split 'test': Image 13 of column 'img'"):
        ClusterContexts(2).fit_images(pixels).apply(datasets.DatasetDict(train=table(pixels), test=data))


def test_gray_images_and_alpha_go_through_the_same_conversion():
    pixels, kinds = groups([30, 30])
    data = table(pixels)
    source = ClusterContexts(2, image_mode="L").fit(data)
    expected = source.apply(data)["context_ids"][:]
    assert source.predict(pixels).tolist() == expected
    assert source.predict([image.convert("RGBA") for image in data["img"]]).tolist() == expected
    colour = ClusterContexts(2).fit(data)
    alpha = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)
    assert adjusted_rand_score(kinds, colour.predict(alpha)) == 1
    gray = pixels[:, :1]
    assert torch.equal(colour.predict(gray), colour.predict(gray.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 6, 6), InputTypeError, "uint8 pixels .* received torch.float32"),
        (torch.zeros(3, 6, 6, dtype=torch.uint8), ContextSourceError, r"shape \(3, 6, 6\)"),
        (torch.zeros(2, 5, 6, 6, dtype=torch.uint8), ContextSourceError, "1, 3 or 4 channels"),
        (7, InputTypeError, "list of PIL images, received int"),
        ([1], InputTypeError, "Image 0 is int"),
    ],
)
def test_images_of_another_kind_are_refused(images, error, message):
    source = ClusterContexts(2).fit_images(groups([9, 9])[0])
    with pytest.raises(error, match=message):
        source.predict(images)


def test_no_images_have_no_contexts():
    source = ClusterContexts(2).fit_images(groups([9, 9])[0])
    for images in (torch.zeros(0, 3, 6, 6, dtype=torch.uint8), []):
        ids = source.predict(images)
        assert ids.shape == (0,)
        assert ids.dtype == torch.int64


class Embedder(nn.Module):
    """Mean colour, with parts that behave otherwise in training and half of its parameters frozen."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(self.frozen(self.linear(x.mean(dim=(2, 3)))))


def test_embeddings_of_a_model_are_clustered_and_the_model_is_left_as_it_was():
    pixels, kinds = groups([30, 40, 50])
    model = Embedder()
    source = ClusterContexts(3, features=model, mean=(0.5, 0.4, 0.3), std=0.25).fit(table(pixels))
    assert adjusted_rand_score(kinds, source.apply(table(pixels))["context_ids"][:]) == 1
    assert [part.training for part in model.modules()] == [True, True, False, True]
    assert model.frozen.num_batches_tracked == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    function = ClusterContexts(3, "kmeans", lambda x: x.mean(dim=(2, 3))).fit_images(pixels)
    assert adjusted_rand_score(kinds, function.predict(pixels)) == 1


def test_a_transformers_model_can_embed():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=6, patch_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    pixels, _ = groups([30, 40])
    source = ClusterContexts(2, features=ViTModel(config)).fit_images(pixels)
    assert source.clusters.clustering.mean.shape == (2, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, r"returned shape \(1, 3, 6, 6\) for 1 images; expected a tensor \(N, D\)"),
        (lambda x: [1.0], "returned list"),
        (lambda x: torch.zeros(3, 2), r"returned shape \(3, 2\) for 1 images"),
        (lambda x: x.mean(dim=(2, 3)) / 0, "embedding of image 0 is not finite"),
    ],
)
def test_models_that_do_not_embed_are_refused(model, message):
    with pytest.raises(ContextSourceError, match=message):
        ClusterContexts(2, features=model).fit_images(groups([9, 9])[0])


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
@pytest.mark.parametrize("features", ["pixels", "pca"])
def test_saved_clusters_give_the_same_contexts(tmp_path, method, features):
    pixels = torch.randint(0, 256, (120, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = ClusterContexts(4, method, features, names=list("abcd"), image_column="img", decode_size=(6, 6), seed=5)
    source.fit_images(pixels).save(tmp_path)
    loaded = ContextSource.load(tmp_path)
    assert type(loaded) is ClusterContexts
    assert loaded.names == ("a", "b", "c", "d")
    assert loaded.options == source.options
    assert loaded.clusters.sizes == source.clusters.sizes
    assert (loaded.image_column, loaded.decode_size, loaded.image_mode) == ("img", (6, 6), "RGB")
    more = torch.randint(0, 256, (90, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(loaded.predict(more), source.predict(more))
    assert loaded.apply(table(more))["context_ids"][:] == source.predict(more).tolist()
    with pytest.raises(ContextSourceError, match="take no model"):
        ContextSource.load(tmp_path, features=Embedder())


def test_saved_embeddings_need_the_same_model_again(tmp_path):
    pixels, _ = groups([30, 40])
    source = ClusterContexts(2, features=Embedder(), std=(0.2, 0.3, 0.4)).fit_images(pixels)
    source.save(tmp_path)
    config = json.loads((tmp_path / "context_source.json").read_text())
    assert config["model"] == "Embedder with 48 parameters"
    with pytest.raises(ContextSourceError, match=r"Embedder with 48 parameters.*load\(folder, features=model\)"):
        ContextSource.load(tmp_path)
    assert torch.equal(ContextSource.load(tmp_path, features=Embedder()).predict(pixels), source.predict(pixels))
    for other in (Embedder(seed=1), lambda x: x.mean(dim=(2, 3))):
        with pytest.raises(ContextSourceError, match="embeds a test picture otherwise"):
            ContextSource.load(tmp_path, features=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_contexts": 0}, "num_contexts to be an integer of at least 1, received 0"),
        ({"num_contexts": 2.0}, "num_contexts to be an integer .*received 2.0"),
        ({"num_contexts": True}, "num_contexts to be an integer .*received True"),
        ({"n_init": 0}, "n_init .*received 0"),
        ({"method": "gnm"}, "did you mean 'gmm'"),
        ({"features": "pixel"}, "did you mean 'pixels'"),
        ({"features": 3}, "Unknown features 3"),
        ({"names": ["a", "b"]}, "Expected num_contexts=3 names, received 2"),
        ({"names": ["a", "a", "b"]}, "all different"),
        ({"seed": -1}, "seed .*received -1"),
        ({"seed": None}, "seed .*received None"),
        ({"seed": True}, "seed .*received True"),
        ({"max_iterations": 0}, "max_iterations .*received 0"),
        ({"tol": -1}, "tol .*received -1"),
        ({"tol": True}, "tol .*received True"),
        ({"tol": float("nan")}, "tol .*received nan"),
        ({"tol": float("inf")}, "tol .*received inf"),
        ({"reg_covar": "x"}, "reg_covar .*received 'x'"),
        ({"reg_covar": 0}, "reg_covar to be a number above 0, received 0"),
        ({"min_share": 1}, "min_share .*below 1, received 1"),
        ({"fit_samples": 0}, "fit_samples .*received 0"),
        ({"fit_samples": 2.5}, "fit_samples .*received 2.5"),
        ({"pca_components": -2}, "pca_components .*received -2"),
        ({"image_column": 3}, "image_column to be the name of a column or None, received 3"),
        ({"image_mode": "CMYK"}, "Unknown image_mode 'CMYK'"),
        ({"decode_size": 0}, "decode_size is 0"),
        ({"decode_size": True}, "decode_size is True"),
        ({"decode_size": 2.5}, "decode_size is 2.5"),
        ({"std": 0}, "std .*above 0, received 0"),
        ({"std": (1, 1, float("nan"))}, "std .*received nan"),
        ({"mean": (1, 2)}, "mean to be one number or one a channel"),
        ({"mean": "xyz"}, "mean .*received 'xyz'"),
        ({"mean": None}, "mean .*received None"),
        ({"num_workers": -1}, "num_workers .*received -1"),
        ({"num_workers": True}, "num_workers .*received True"),
        ({"device": "gpu"}, "Device 'gpu' cannot be used here"),
        ({"memory_budget_bytes": -1}, "memory_budget_bytes .*received -1"),
        ({"memory_budget_bytes": 1e9}, "memory_budget_bytes .*received 1000000000.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterContexts(**options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [1, 2, 8, 60])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_dark_and_tiny_images_have_clusters_too(seed, levels, size):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, levels + 1, (300, 3, size, size), generator=generator, dtype=torch.uint8)
    source = ClusterContexts(3, seed=seed).fit_images(pixels)
    assert min(source.clusters.sizes) > 0
    assert sum(source.clusters.sizes) == 300


def test_dark_groups_are_parted_and_a_given_reg_covar_is_taken_as_it_is():
    pixels, kinds = groups([60, 70])
    pixels //= 64
    source = ClusterContexts(2).fit_images(pixels)
    assert adjusted_rand_score(kinds, source.predict(pixels)) == 1
    with pytest.raises(ContextSourceError, match=r"reg_covar \(0\.1\) is large beside the features' mean variance"):
        ClusterContexts(3, reg_covar=0.1).fit_images(pixels)


def test_a_budget_below_the_sample_makes_it_smaller_with_a_warning():
    pixels, kinds = groups([30, 40, 50])
    options = {"num_contexts": 3, "memory_budget_bytes": 4 * 108 * 60}
    for data in (table(pixels), table(pixels).to_iterable_dataset()):
        with pytest.warns(UserWarning, match=r"memory_budget_bytes \(25920\) holds 60 images"):
            source = ClusterContexts(**options).fit(data)
        assert sum(source.clusters.sizes) == 60
        assert adjusted_rand_score(kinds, source.predict(pixels)) == 1
    smaller = ClusterContexts(3, fit_samples=60).fit(table(pixels))
    assert torch.equal(smaller.clusters.clustering.mean, source.clusters.clustering.mean)


def test_of_a_stream_only_what_may_be_sampled_is_decoded(monkeypatch):
    from cn_hf.reading import images

    pixels, _ = groups([700, 700], size=3)
    decoded, decode = [], images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda *given: (decoded.append(0), decode(*given))[1])
    source = ClusterContexts(2, fit_samples=50).fit(table(pixels).to_iterable_dataset())
    assert sum(source.clusters.sizes) == 50
    assert len(decoded) < 400
    decoded.clear()
    ClusterContexts(2, fit_samples=50).fit(table(pixels))
    assert len(decoded) == 50


MEMORY_SCRIPT = """
import io, sys
import datasets, torch, PIL.Image
from cn_hf.contexts import ClusterContexts, image_source
image_source._GROUP_BYTES = 2**21

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
source = ClusterContexts(2, fit_samples=int(sys.argv[1])).fit(data.to_iterable_dataset())
ids = source.apply(data)["context_ids"][:]
assert ids == ids[:100] * 300 and len(set(ids)) == 2
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is asked of Linux")
def test_resident_memory_is_bounded_by_the_sample():
    grown = []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back to the system at once
    for samples in (1000, 30_000):
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(samples)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=environment)
        assert run.returncode == 0, run.stderr
        grown.append(float(run.stdout))
    assert grown[0] < 100  # MiB: 12 of vectors, and a few chunks
    assert grown[1] > 250  # 352 MiB of vectors: the script measures


def failures():
    good = table(groups([300, 300])[0])
    rows = good.select(range(9)).cast_column("img", datasets.Image(decode=False)).to_list()
    rows[5]["img"]["bytes"] = rows[5]["img"]["bytes"][:40]
    broken = datasets.Dataset.from_list(rows, features=good.features)
    return {
        "corrupt": (DatasetFileError, "Image 5 of column 'img'", broken),
        "corrupt stream": (DatasetFileError, "Image 5 of column 'img'", broken.to_iterable_dataset()),
        "few": (ContextSourceError, "2 training images cannot form 3 contexts", good.select(range(2))),
        "split": (DatasetError, "No split 'train'", datasets.DatasetDict(test=good)),
    }


def _process(rank, count, port, folder):
    from accelerate import PartialState

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank)
    )
    pixels, _ = groups([30, 40, 50])
    with pytest.raises(ConfigError, match=r"no process group yet. Create an accelerate.Accelerator"):
        ClusterContexts(3).fit(table(pixels), distributed=True)
    PartialState(cpu=True)
    found = {}
    for name, options in FITS.items():
        data = table(pixels)
        data = data.to_iterable_dataset() if "stream" in name else data
        model = stem_network() if options.get("features") == "stem" else None
        # Another process's images are never looked at: only those of process 0 decide.
        data = data if rank == 0 else data.take(1)
        found[name] = ClusterContexts(3, **options).fit(data, distributed=True, model=model).predict(pixels)
    for error, message, data in failures().values():
        source = ClusterContexts(3)
        with pytest.raises(error, match=message if rank == 0 else "Process 0: "):
            source.fit(data, distributed=True)
        assert not source.fitted
    bug = ClusterContexts(3, features=lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError if rank == 0 else ContextSourceError, match="division by zero"):
        bug.fit(table(pixels), distributed=True)
    if rank == 0:
        assert ClusterContexts(3).fit(table(pixels)).fitted  # by itself: it must not wait for the others
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


FITS = {
    "gmm": {},
    "k-means of a stream": {"method": "kmeans", "fit_samples": 100},
    "principal components": {"features": "pca", "pca_components": 8},
    "stem": {"features": "stem"},
}


@pytest.mark.slow
def test_processes_get_what_the_first_finds(tmp_path):
    run_together(_process, 2, free_port(), str(tmp_path), processes=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    pixels, kinds = groups([30, 40, 50])
    for name, options in FITS.items():
        assert torch.equal(one[name], other[name])
        if name != "stem":
            assert torch.equal(one[name], ClusterContexts(3, **options).fit(table(pixels)).predict(pixels))
        assert adjusted_rand_score(kinds, one[name]) == 1


def test_one_process_may_say_distributed_too():
    pixels, _ = groups([30, 40])
    one, other = ClusterContexts(2).fit(table(pixels), distributed=True), ClusterContexts(2).fit(table(pixels))
    assert torch.equal(one.clusters.clustering.mean, other.clusters.clustering.mean)


def stem_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_statistics_of_a_stem_are_clustered_and_saved_with_the_source(tmp_path, method):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randint(120, 130, (60, 3, 1, 1), generator=generator).expand(-1, -1, 8, 8)
    noise = torch.randint(-40, 41, (60, 3, 8, 8), generator=generator)
    kinds = torch.arange(60) % 2
    pixels = (smooth + noise * kinds.view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)
    model = stem_network()
    source = ClusterContexts(2, method, "stem").fit_images(pixels, model=model)
    expected = source.predict(pixels)
    assert adjusted_rand_score(kinds, expected) == 1
    with torch.no_grad():
        model[0].weight.zero_()  # the source has a copy
    assert torch.equal(source.predict(pixels), expected)
    source.save(tmp_path)
    assert torch.equal(ContextSource.load(tmp_path).predict(pixels), expected)
    applied = source.fit(table(pixels), model=stem_network()).apply(table(pixels))
    assert adjusted_rand_score(kinds, applied["context_ids"][:]) == 1


def test_a_model_is_given_exactly_where_a_stem_is_needed():
    pixels, _ = groups([9, 9])
    for source, model in ((ClusterContexts(2, features="stem"), None), (ClusterContexts(2), stem_network())):
        with pytest.raises(ConfigError, match=r"Do: ClusterContexts\(features='stem'\)"):
            source.fit_images(pixels, model=model)
        with pytest.raises(ConfigError, match="received features="):
            source.fit(table(pixels), model=model)
    with pytest.raises(ConfigError, match="begins with a Conv2d, received Sequential, whose first layer is Linear"):
        ClusterContexts(2, features="stem").fit_images(pixels, model=nn.Sequential(nn.Flatten(), nn.Linear(108, 2)))


@pytest.mark.parametrize("features", ["pixels", "pca", "stem", "model"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda config, tensors: config.update(sizes=[1]),
        lambda config, tensors: config.update(sizes=[1, -1]),
        lambda config, tensors: config.update(shape=[3, 6]),
        lambda config, tensors: config.update(shape=[3, 6, True]),
        lambda config, tensors: config.update(scale=float("nan")),
        lambda config, tensors: config.update(objective="low"),
        lambda config, tensors: config["options"].update(num_contexts=10**12),
        lambda config, tensors: config["options"].update(num_contexts=True),
        lambda config, tensors: config["options"].update(method="kmeans"),
        lambda config, tensors: config["image"].update(size=[6, 6, 6]),
        lambda config, tensors: tensors["var"].neg_(),
        lambda config, tensors: tensors["mean"].fill_(float("nan")),
        lambda config, tensors: tensors.update(mean=tensors["mean"][:, 1:].contiguous()),
        lambda config, tensors: tensors.update(mean=tensors["mean"].int()),
        lambda config, tensors: tensors.update(extra=torch.zeros(1)),
        lambda config, tensors: tensors.pop("prior"),
        lambda config, tensors: config["stem"].update(stride=[0, 1]) if config["stem"] else config.pop("stem"),
    ],
)
def test_saved_clusters_that_no_fit_gives_are_one_clear_error(tmp_path, features, damage):
    pixels, _ = groups([20, 20])
    given = Embedder() if features == "model" else features
    model = stem_network() if features == "stem" else None
    ClusterContexts(2, features=given).fit_images(pixels, model=model).save(tmp_path)
    config, tensors = read_source(tmp_path)
    complete = dict(config)
    damage(config, tensors)
    write_source(tmp_path, config, tensors)
    load = {"features": Embedder()} if features == "model" else {}
    if "stem" in complete and "stem" not in config:  # as files of before are
        assert torch.equal(ContextSource.load(tmp_path, **load).predict(pixels[:0]), torch.empty(0, dtype=torch.int64))
        return
    with pytest.raises(CheckpointError):
        ContextSource.load(tmp_path, **load)


def test_gmm_contexts_of_cifar10(shared_data):
    train = datasets.load_dataset(str(shared_data / "cifar10"), split="train").select(range(0, 50_000, 25))
    source = ClusterContexts().fit(train)
    applied = source.apply(train)
    counts = np.bincount(applied["context_ids"][:], minlength=3)
    assert tuple(counts) == source.clusters.sizes
    assert counts.min() > 200
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in train["img"]])).permute(0, 3, 1, 2)
    assert source.predict(pixels).tolist() == applied["context_ids"][:]


def test_gmm_contexts_of_a_stream_of_mnist(shared_data):
    stream = datasets.load_dataset(str(shared_data / "mnist"), split="train", streaming=True)
    source = ClusterContexts(image_mode="L", features="pca", fit_samples=300).fit(stream)
    assert sum(source.clusters.sizes) == 300
    assert set(ids_of(source.apply(stream).take(50))) <= {0, 1, 2}
