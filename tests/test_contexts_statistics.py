"""Known contexts by statistics of pixels and of a stem: named, unknown, saved, and attached to a model."""

from __future__ import annotations

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cn_hf
from cn_hf.contexts import ColumnContexts, ContextSource, StatisticsContexts
from cn_hf.contexts.statistics import Discriminant
from cn_hf.contexts.stem import Stem, channel_statistics
from cn_hf.contexts.storage import read_source, write_source
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, ContextSourceError, InputTypeError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def network(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, **options), nn.BatchNorm2d(6), nn.ReLU())
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    model.pretrained_cfg = {"mean": MEAN, "std": STD, "first_conv": "0"}
    return model.eval()


def images(kind, count=60, size=12, seed=0):
    """uint8 (count, 3, size, size): blocks of random gray, and what a domain does to them."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, kind)))
    x = torch.randint(40, 215, (count, 3, size // 3, size // 3), generator=generator).float()
    x = x.repeat_interleave(3, 2).repeat_interleave(3, 3)
    if kind == "noise":
        x = x + torch.randn(x.shape, generator=generator) * 40
    if kind == "dark":
        x = x * 0.3
    if kind == "red":
        x = x + torch.tensor([60.0, -30, -30])[:, None, None]
    return x.clamp(0, 255).to(torch.uint8)


KINDS = ("clear", "noise", "dark")
DOMAINS = {kind: images(kind) for kind in KINDS}


def standardised(pixels):
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pictures(pixels):
    return [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


@pytest.fixture(scope="module")
def source():
    return StatisticsContexts().fit(DOMAINS, model=network())


@pytest.mark.parametrize("features", ["pixels+stem", "pixels", "stem"])
def test_held_out_images_are_named_and_strange_ones_are_unknown(features):
    source = StatisticsContexts(features).fit(DOMAINS, model=None if features == "pixels" else network())
    assert source.names == KINDS
    assert source.num_contexts == 3
    for number, kind in enumerate(KINDS):
        ids = source.predict(images(kind, seed=1))
        assert ids.dtype == torch.int64
        assert (ids == number).float().mean() >= 0.9
        assert (ids == -1).float().mean() <= 0.1
    assert (source.predict(images("red", seed=1)) == -1).float().mean() > 0.9
    probabilities = source.predict_proba(images("dark", seed=1))
    assert probabilities.shape == (60, 3)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(60))
    assert (probabilities.argmax(dim=1) == 2).all()


def test_the_quantile_is_that_of_held_out_images():
    counts = []
    for quantile in (0.5, 0.99):
        source = StatisticsContexts(quantile=quantile).fit({"clear": images("clear", 300)}, model=network())
        assert source.names == ("clear",)
        counts.append((source.predict(images("clear", 1000, seed=5)) == -1).float().mean())
    assert counts[0] == pytest.approx(0.5, abs=0.12)
    assert counts[1] < 0.04


def test_distances_are_mahalanobis_with_a_shrunken_covariance():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 4)) * [1, 2, 3, 0.1] + 5
    ids = np.arange(50) % 2
    x[ids == 1] += 2
    found = Discriminant.of(torch.from_numpy(x), torch.from_numpy(ids)).distances(torch.from_numpy(x))
    means = np.stack([x[ids == context].mean(axis=0) for context in range(2)])
    residuals = x - means[ids]
    deviation = np.sqrt((residuals**2).mean(axis=0))
    covariance = ledoit_wolf(residuals / deviation, assume_centered=True)[0] * np.outer(deviation, deviation)
    inverse = np.linalg.inv(covariance)
    expected = [[mahalanobis(row, mean, inverse) for mean in means] for row in x]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_statistics_are_means_and_log_deviations_of_the_model_s_first_convolution():
    model, pixels = network(), DOMAINS["noise"]
    stem = Stem.of(model)
    x = standardised(pixels)
    expected = torch.cat([channel_statistics(x), channel_statistics(model[0](x).detach())], dim=1)
    torch.testing.assert_close(stem.statistics(stem.standardised(pixels)), expected, rtol=1e-4, atol=1e-4)
    assert stem.num_statistics == 18
    torch.testing.assert_close(expected[:, 3:6], x.flatten(2).std(dim=2, correction=0).log())
    patched = cn_hf.patch_model(network(), mode="cn-channels", where="input", num_contexts=2)
    assert torch.equal(Stem.of(patched).weight, stem.weight)


def test_the_model_may_be_timm_s_or_transformers_s():
    import timm
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(image_size=12, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    for model in (timm.create_model("test_vit"), timm.create_model("resnet10t"), ViTModel(config)):
        same = {kind: images(kind, size=48) for kind in KINDS}
        source = StatisticsContexts().fit(same, model=model)
        assert (source.predict(images("dark", size=48, seed=2)) == 2).float().mean() > 0.8


@pytest.mark.parametrize(
    "form",
    [
        lambda pixels: pictures(pixels),
        lambda pixels: standardised(pixels),
        lambda pixels: datasets.Dataset.from_dict({"img": pictures(pixels)}),
        lambda pixels: datasets.Dataset.from_dict({"img": pictures(pixels)}).to_iterable_dataset(),
        lambda pixels: DataLoader(TensorDataset(standardised(pixels), torch.zeros(len(pixels))), batch_size=7),
        lambda pixels: [{"pixel_values": standardised(part)} for part in pixels.split(20)],
        lambda pixels: list(standardised(pixels)),
    ],
)
def test_images_come_in_many_forms(source, form):
    found = StatisticsContexts().fit({kind: form(pixels) for kind, pixels in DOMAINS.items()}, model=network())
    torch.testing.assert_close(found._discriminant.mean, source._discriminant.mean, rtol=1e-3, atol=1e-3)
    more = images("noise", seed=3)
    expected = source.predict(more)
    assert torch.equal(source.predict(pictures(more)), expected)
    assert (source.predict(standardised(more)) == expected).float().mean() > 0.98


def test_a_dataset_with_context_ids_says_which_images_are_whose(source):
    label = datasets.ClassLabel(names=list(KINDS))
    features = datasets.Features({"img": datasets.Image(), "domain": label})
    rows = {"img": [p for kind in KINDS for p in pictures(DOMAINS[kind])], "domain": np.repeat(np.arange(3), 60)}
    data = ColumnContexts("domain").apply(datasets.Dataset.from_dict(rows, features=features))
    found = StatisticsContexts().fit(data, model=network())
    assert found.names == KINDS
    torch.testing.assert_close(found._discriminant.mean, source._discriminant.mean)
    applied = found.apply(data, overwrite=True)
    assert np.mean(np.array(applied["context_ids"][:]) == np.repeat(np.arange(3), 60)) > 0.95


def test_saved_sources_need_no_model(tmp_path):
    model = network()
    source = StatisticsContexts(quantile=0.9, decode_size=12, seed=3).fit(DOMAINS, model=model)
    more = images("noise", seed=3)
    expected = source.predict(more), source.predict_proba(more)
    source.save(tmp_path)
    with torch.no_grad():
        model[0].weight.zero_()
    for again in (source, ContextSource.load(tmp_path)):
        assert torch.equal(again.predict(more), expected[0])
        assert torch.equal(again.predict_proba(more), expected[1])
    loaded = StatisticsContexts.load(tmp_path)
    assert (loaded.names, loaded.quantile, loaded.decode_size, loaded.seed) == (KINDS, 0.9, (12, 12), 3)


def test_a_model_names_its_images_by_the_source(source):
    model = cn_hf.patch_model(network(), mode="cn-channels", context_names=list(KINDS))
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.eval()
    cn_hf.set_inference(model, "predict", source=source, mean=MEAN, std=STD)
    x = images("dark", seed=4)
    x = standardised(x[source.predict(x) == 2])
    torch.testing.assert_close(model(x), model(x, context_ids=[2] * len(x)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"fog": torch.zeros(1, 3, 8, 8)},
            ContextSourceError,
            "Context 'fog': Expected at least two images, received 1",
        ),
        ({"fog": []}, ContextSourceError, "Context 'fog': Expected at least two images, received 0"),
        ({"fog": torch.full((4, 3, 8, 8), torch.nan)}, ContextSourceError, "Context 'fog': Expected finite pixels"),
        ({"fog": torch.zeros(4, 1, 8, 8)}, ContextSourceError, "'fog': Expected images of 3 channels"),
        ({"fog": torch.zeros(4, 8, 8, dtype=torch.int64)}, CnHfError, "'fog'"),
        ({"fog": 7}, InputTypeError, "'fog': Expected a tensor, PIL images"),
        ({"fog": "folder"}, InputTypeError, "'fog': Expected a tensor, PIL images"),
        ({"fog": [1, 2]}, InputTypeError, "'fog': Expected batches"),
        ({}, ConfigError, "Expected context names"),
        ({3: torch.zeros(4, 3, 8, 8)}, ConfigError, "Expected context names"),
        ({"pixel_values": torch.zeros(4, 3, 8, 8)}, InputTypeError, r"received a batch. Do: fit\(\{name: \[batch\]"),
        (torch.zeros(4, 3, 8, 8), InputTypeError, "Expected a mapping from context names"),
    ],
)
def test_bad_images_are_one_clear_error_and_leave_the_source_unfitted(given, error, message):
    source = StatisticsContexts()
    with pytest.raises(error, match=message):
        source.fit(given, model=network())
    assert not source.fitted
    with pytest.raises(ContextSourceError, match="not fitted"):
        source.predict(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "pixel"}, "did you mean 'pixels'"),
        ({"quantile": 1}, "quantile .*received 1"),
        ({"quantile": True}, "quantile .*received True"),
        ({"fit_samples": 1}, "fit_samples .*received 1"),
        ({"mean": 0.5}, "mean .*received 0.5"),
        ({"std": (0.1, 0.0, 1)}, "std .*received 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        StatisticsContexts(**options)


def test_a_model_that_does_not_begin_with_a_convolution_is_refused():
    for model in (None, nn.Linear(3, 4), nn.Sequential()):
        with pytest.raises(ConfigError, match="Expected a model"):
            StatisticsContexts().fit(DOMAINS, model=model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda config, tensors: config.update(threshold=float("nan")),
        lambda config, tensors: config.update(names=["a", "b"]),
        lambda config, tensors: config["options"].update(quantile=2),
        lambda config, tensors: config["stem"].update(groups=0),
        lambda config, tensors: config["stem"].update(mean=[float("nan")]),
        lambda config, tensors: config.pop("stem"),
        lambda config, tensors: tensors["mean"].fill_(float("inf")),
        lambda config, tensors: tensors.pop("whitening"),
        lambda config, tensors: tensors.update(stem_weight=torch.zeros(6, 3)),
        lambda config, tensors: tensors.update(stem_bias=torch.zeros(5)),
        lambda config, tensors: tensors.update(other=torch.zeros(5)),
    ],
)
def test_saved_statistics_that_no_fit_gives_are_one_clear_error(tmp_path, source, damage):
    source.save(tmp_path)
    config, tensors = read_source(tmp_path)
    damage(config, tensors)
    write_source(tmp_path, config, tensors)
    with pytest.raises(CheckpointError):
        ContextSource.load(tmp_path)
