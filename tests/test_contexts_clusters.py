"""Cluster contexts: the estimators against scikit-learn, and the source on pixels, components and embeddings."""

from __future__ import annotations

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import nn

from cn_hf.contexts import ClusterContexts, ContextSource
from cn_hf.contexts.chunks import map_chunks, sum_chunks
from cn_hf.contexts.estimators import Clustering, Stopping, assign, full_passes, lloyd
from cn_hf.contexts.principal import principal_components, project
from cn_hf.contexts.shared_rows import SharedRows
from cn_hf.contexts.steps import GaussianSteps
from cn_hf.errors import ConfigError, ContextSourceError, DatasetError, DatasetFileError, InputTypeError

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


def blobs(count=400, features=7, components=3, seed=0):
    generator = np.random.default_rng(seed)
    centers = generator.normal(0, 3, (components, features))
    scales = generator.uniform(0.3, 2, (components, features))
    kinds = generator.integers(0, components, count)
    return torch.from_numpy(centers[kinds] + generator.normal(size=(count, features)) * scales[kinds])


def expectation_maximisation(x, mean, var, prior, *, shift, stopping=None, reg_covar=1e-3):
    start = Clustering(mean=mean, var=var, prior=prior, objective=0.0, num_iterations=0)
    return full_passes(SharedRows(x), start, GaussianSteps(shift, var.mean(dim=0), reg_covar), stopping or Stopping())


@pytest.mark.parametrize("reg_covar", [1e-6, 1e-3])
@pytest.mark.parametrize("components", [1, 3])
def test_em_agrees_with_scikit_learn_from_the_same_start(components, reg_covar):
    x = blobs()
    mean = x[:components].clone()
    var = x.var(dim=0, correction=0).expand(components, -1).clone()
    prior = torch.full((components,), 1 / components, dtype=torch.float64)
    reference = GaussianMixture(
        components,
        covariance_type="diag",
        tol=1e-6,
        reg_covar=reg_covar,
        max_iter=200,
        means_init=mean.numpy(),
        precisions_init=1 / var.numpy(),
        weights_init=prior.numpy(),
    ).fit(x.numpy())
    found = expectation_maximisation(
        x,
        mean,
        var,
        prior,
        shift=x.mean(dim=0),
        stopping=Stopping(max_iterations=200, tol=1e-6),
        reg_covar=reg_covar,
    )
    np.testing.assert_allclose(found.mean, reference.means_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.var, reference.covariances_, rtol=1e-6)
    np.testing.assert_allclose(found.prior, reference.weights_, rtol=1e-6)
    assert found.objective == pytest.approx(reference.lower_bound_, rel=1e-6)
    assert found.num_iterations == reference.n_iter_
    assert np.array_equal(assign(x, found), reference.predict(x.numpy()))


def test_em_over_uint8_chunks_is_em_over_floats(monkeypatch):
    pixels, _ = groups([40, 50, 60])
    x = pixels.flatten(1)
    floats = x.double() / 255
    start = floats[:3], floats.var(dim=0, correction=0).expand(3, -1) + 1e-3, torch.full((3,), 1 / 3).double()
    whole = expectation_maximisation(floats, *start, shift=floats.mean(dim=0))
    monkeypatch.setattr("cn_hf.contexts.chunks._CHUNK_ELEMENTS", 11 * x.shape[1])
    chunked = expectation_maximisation(x, *start, shift=floats.mean(dim=0))
    torch.testing.assert_close(chunked.mean, whole.mean)
    torch.testing.assert_close(chunked.var, whole.var)
    assert torch.equal(assign(x, chunked), assign(floats, whole))


@pytest.mark.parametrize("count", [0, 1, 5, 23])
def test_chunks_are_walked_whole_whatever_the_threads(monkeypatch, count):
    monkeypatch.setattr("cn_hf.contexts.chunks._CHUNK_ELEMENTS", 6)
    x = torch.randint(0, 256, (count, 3), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.full((count, 3), torch.nan).double()
            assert torch.equal(map_chunks(x, torch.float64, lambda chunk: chunk * 255, out), x.double())
            if count:
                sums = sum_chunks(x, torch.float32, lambda chunk: (chunk.sum(dim=0), chunk.new_tensor(len(chunk))))
                torch.testing.assert_close(sums[0], x.double().sum(dim=0) / 255, rtol=1e-6, atol=0)
                assert sums[1] == count
            with pytest.raises(ZeroDivisionError):
                map_chunks(torch.zeros(9, 3), torch.float32, lambda chunk: 1 / 0, torch.zeros(9))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("components", [1, 4])
def test_k_means_agrees_with_scikit_learn_from_the_same_start(components):
    x = blobs(components=4)
    start = x[:components].clone()
    reference = KMeans(components, init=start.numpy(), n_init=1, max_iter=300, tol=0).fit(x.numpy())
    found = lloyd(x, start, shift=x.mean(dim=0), spread=x.var(dim=0), stopping=Stopping(max_iterations=300, tol=0))
    np.testing.assert_allclose(found.mean, reference.cluster_centers_, rtol=1e-9, atol=1e-9)
    assert found.objective * len(x) == pytest.approx(reference.inertia_, rel=1e-9)
    assert np.array_equal(assign(x, found), reference.labels_)


@pytest.mark.parametrize(("count", "features"), [(300, 40), (30, 200)])
def test_principal_components_span_those_of_scikit_learn(count, features):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, features)) * np.geomspace(10, 0.1, features) + 5
    reference = PCA(5, svd_solver="full").fit(x)
    mean, components = principal_components(torch.from_numpy(x), 5, seed=1)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-5)
    torch.testing.assert_close(components @ components.T, torch.eye(5), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.abs(np.diag(components.numpy() @ reference.components_.T)), 1, atol=1e-3)
    variance = project(torch.from_numpy(x), mean, components).var(dim=0)
    np.testing.assert_allclose(variance, reference.explained_variance_, rtol=1e-3)


def test_a_lost_component_takes_half_of_the_largest():
    x = torch.cat([torch.randn(300, 4), torch.randn(100, 4) + 20]).double()
    mean = torch.stack([x[0], x[350], torch.full((4,), 1e4).double()])
    var, prior = torch.ones(3, 4).double(), torch.full((3,), 1 / 3).double()
    lost = expectation_maximisation(x, mean, var, prior, shift=x.mean(dim=0))
    assert torch.bincount(assign(x, lost), minlength=3)[2] == 0
    revive = Stopping(min_share=0.01)
    found = expectation_maximisation(x, mean, var, prior, shift=x.mean(dim=0), stopping=revive)
    assert (torch.bincount(assign(x, found), minlength=3) >= 20).all()
    centres = lloyd(x, mean, shift=x.mean(dim=0), spread=x.var(dim=0), stopping=revive)
    assert (torch.bincount(assign(x, centres), minlength=3) >= 20).all()


def test_a_context_of_a_single_outlier_warns():
    pixels, _ = groups([400, 400])
    pixels[0] = 255
    with pytest.warns(UserWarning, match=r"has 1 of 800 training images\. Ask for fewer contexts"):
        source = ClusterContexts(4).fit_images(pixels)
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
    streamed = ClusterContexts(3, fit_samples=25).fit(table(pixels).to_iterable_dataset())
    first = ClusterContexts(3).fit_images(pixels[:25])
    assert torch.equal(streamed.clusters.clustering.mean, first.clusters.clustering.mean)
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
        ({"num_contexts": 0}, "num_contexts is 0"),
        ({"num_contexts": 2.0}, "num_contexts is 2.0"),
        ({"method": "gnm"}, "did you mean 'gmm'"),
        ({"features": "pixel"}, "did you mean 'pixels'"),
        ({"features": 3}, "Unknown features 3"),
        ({"names": ["a", "b"]}, "Received 2 names for num_contexts=3"),
        ({"names": ["a", "a", "b"]}, "all different"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tol": -1}, "tol is -1"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"reg_covar": "x"}, "reg_covar is 'x'"),
        ({"reg_covar": 0}, "reg_covar is 0"),
        ({"min_share": 1}, "min_share is 1"),
        ({"fit_samples": 0}, "fit_samples is 0"),
        ({"pca_components": -2}, "pca_components is -2"),
        ({"image_mode": "CMYK"}, "Unknown image_mode 'CMYK'"),
        ({"decode_size": 0}, "decode_size is 0"),
        ({"std": 0}, "std is 0"),
        ({"mean": (1, 2)}, "mean is"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterContexts(**options)


def test_assign_works_on_any_float_dtype():
    clustering = Clustering(mean=torch.tensor([[0.0], [1.0]]), var=None, prior=None, objective=0.0, num_iterations=1)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert assign(torch.tensor([[0.2], [0.9]], dtype=dtype), clustering).tolist() == [0, 1]


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
