"""The experiment of new domains: corruptions, rivals against slow references, packed outcomes, and the smoke budget."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from cn_hf.errors import ConfigError, DatasetError
from cn_hf.evaluation.domains import DomainRow, Domains
from cn_hf.experiments.shift.corruptions import CORRUPTIONS, EXTRAS, SEVERITIES, TUNING, corrupt, plasma
from cn_hf.experiments.shift.data import load_shift_data
from cn_hf.experiments.shift.networks import NETWORKS, ResNet9, new_network
from cn_hf.experiments.shift.report import findings, mean_rows, packed, unpacked
from cn_hf.experiments.shift.rivals import (
    UnmixingNorm,
    adaptive_batch_norm,
    instance_network,
    standardised,
    stream_row,
    tent,
    unmixing_network,
)
from cn_hf.experiments.shift.run import reproduce_shift


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return (x * 255).round() / 255


def trained_like(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    network = ResNet9(10, norm).train()
    for _ in range(3):
        network(torch.randn(32, 3, 32, 32))
    return network.eval()


# ---------------------------------------------------------------------------------------------------------- corruptions


@pytest.mark.parametrize("name", [*CORRUPTIONS, *EXTRAS, *TUNING])
def test_corruption_is_seeded_and_in_range(name, images):
    before = images.clone()
    first = corrupt(name, images, 5, seed=1)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    torch.testing.assert_close(first * 255, (first * 255).round(), atol=1e-3, rtol=0)
    assert torch.equal(first, corrupt(name, images, 5, seed=1))
    assert torch.equal(images, before)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_strongest_severity_changes_more_than_the_weakest(name, images):
    changes = [float((corrupt(name, images, severity) - images).abs().mean()) for severity in SEVERITIES]
    # The published elastic constants trade strength for smoothness; the affine part is largest at severity 1.
    if name == "elastic_transform":
        assert min(changes) > 0
    else:
        assert changes[-1] > changes[0]


def test_noise_has_the_published_strength():
    grey = torch.full((20, 3, 32, 32), 0.5)
    assert float((corrupt("gaussian_noise", grey, 5) - grey).std()) == pytest.approx(0.10, rel=0.05)
    assert float((corrupt("shot_noise", grey, 5) - grey).std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    assert float((corrupt("impulse_noise", grey, 5) - grey).abs().gt(0.4).float().mean()) == pytest.approx(
        0.07, rel=0.1
    )


def test_contrast_and_extras_are_their_formulas(images):
    mean = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt("contrast", images, 3), (images - mean) * 0.4 + mean, atol=1 / 400, rtol=0)
    torch.testing.assert_close(corrupt("inversion", images, 1), 1 - images)
    grey = corrupt("grayscale", images, 1)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_blurs_keep_a_constant_image():
    grey = torch.full((2, 3, 32, 32), 128 / 255)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"):
        torch.testing.assert_close(corrupt(name, grey, 5), grey, atol=1.01 / 255, rtol=0, msg=name)


def test_plasma_fills_0_to_1():
    clouds = plasma(3, 32, 1.75, torch.Generator().manual_seed(0))
    assert clouds.amin((1, 2)).eq(0).all()
    assert clouds.amax((1, 2)).eq(1).all()
    assert not torch.equal(clouds[0], clouds[1])


def test_unknown_corruption_and_severity(images):
    with pytest.raises(ConfigError, match="fog"):
        corrupt("fogg", images, 1)
    with pytest.raises(ConfigError, match="severity"):
        corrupt("fog", images, 6)


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_are_seeded(name):
    x = torch.randn(2, 3, 32, 32)
    first, second = (new_network(name, 10, 3).eval() for _ in range(2))
    assert first(x).shape == (2, 10)
    assert torch.equal(first(x), second(x))


def test_resnet_has_the_stated_number_of_weights():
    assert sum(weight.numel() for weight in ResNet9(10).parameters()) == 264_986


# --------------------------------------------------------------------------------------------------------------- rivals


def test_single_image_statistics_equal_batches_of_one():
    network = trained_like()
    x = torch.randn(4, 3, 32, 32) * 2 + 1
    alone = instance_network(network)(x)
    reference = copy.deepcopy(network).train()
    torch.testing.assert_close(alone, torch.cat([reference(one[None]) for one in x]), atol=1e-4, rtol=1e-4)


def test_adabn_has_the_statistics_of_its_images():
    network = trained_like()
    x = torch.randn(16, 3, 32, 32) * 2 + 1
    before = network(x)
    adapted = adaptive_batch_norm(network, x)
    found = adapted.stem[0](x)
    torch.testing.assert_close(adapted.stem[1].running_mean, found.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert torch.equal(network(x), before)


def test_tent_lowers_entropy_and_leaves_the_network():
    network = trained_like()
    x = torch.randn(32, 3, 32, 32) * 2 + 1
    before = network(x)
    predict = tent(network, 1e-2)

    def entropy(logits):
        return float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean())

    entropies = [entropy(predict(x)) for _ in range(8)]
    assert entropies[-1] < entropies[0]
    assert torch.equal(network(x), before)
    assert all(weight.requires_grad for weight in network.parameters())


def test_unmixing_norm_against_a_slow_reference():
    norm = nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_()
    norm.bias.data.normal_()
    layer = UnmixingNorm(norm, components=4)
    means, variances = layer.means.clone(), layer.variances.clone()
    # The mixture of the components is the stored distribution.
    torch.testing.assert_close(means.mean(0), norm.running_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(variances.mean(0) + means.var(0, correction=0), norm.running_var, atol=1e-5, rtol=1e-5)
    x = torch.randn(3, 5, 4, 4)
    out = layer(x)
    for image, found in zip(x, out, strict=True):
        mean, variance = image.mean((1, 2)), image.var((1, 2), correction=0)
        p = torch.stack([nn.functional.cosine_similarity(mean, row, dim=0) / 0.07 for row in means]).softmax(0)
        mixed = [(1 - p[k]) * means[k] + p[k] * mean for k in range(4)]
        mixed_variance = [(1 - p[k]) * variances[k] + p[k] * variance for k in range(4)]
        center = sum(mixed) / 4
        spread = sum(mixed_variance) / 4 + sum(m**2 for m in mixed) / 4 - center**2
        expected = (image - center[:, None, None]) / (spread[:, None, None] + norm.eps).sqrt()
        expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(layer.means, means)


def test_rivals_understand_norms_with_activation():
    network = new_network("wrn28_2", 10, 0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in instance_network(network).modules())
    assert unmixing_network(network)(x).isfinite().all()
    reference = copy.deepcopy(network).train()
    torch.testing.assert_close(
        instance_network(network)(x), torch.cat([reference(one[None]) for one in x]), atol=1e-3, rtol=1e-3
    )


def test_standardised_images():
    x = standardised(torch.rand(3, 3, 8, 8) * 5 + 2)
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((2, 3)), torch.ones(3, 3), atol=1e-5, rtol=0)


def test_streams_hold_every_image_once_in_their_order():
    labels = torch.tensor([2, 0, 1, 0, 2, 1])
    test = {name: torch.stack([labels.float(), torch.full((6,), float(k))], 1) for k, name in enumerate("abc")}
    domains = Domains({name: x[:, :, None, None] for name, x in test.items()}, labels, {})
    seen = []

    def start():
        seen.append([])

        def predict(x):
            seen[-1].append(x[:, :, 0, 0])
            return nn.functional.one_hot(x[:, 0, 0, 0].long(), 3)

        return predict

    for order, streams in (("mixed", 1), ("one domain", 3), ("sorted", 3)):
        seen.clear()
        row = stream_row(start, domains, "", order=order, batch_size=4)
        assert row.accuracy("abc") == 1
        assert len(seen) == streams
        assert sum(len(batch) for stream in seen for batch in stream) == 18
    for stream in seen:
        classes = torch.cat(stream)[:, 0]
        assert torch.equal(classes, classes.sort().values)


# --------------------------------------------------------------------------------------------------------------- report


def test_outcomes_are_packed_to_a_bit_each():
    correct = torch.rand(1001) < 0.5
    assert len(packed(correct)) == 168  # 126 bytes in base64
    assert torch.equal(unpacked(packed(correct), 1001), correct)


def test_seeds_are_averaged_image_by_image():
    first, second = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    cells = [
        {"test_images": 3, "rows": [{"name": "r", "needs": "", "correct": {"fog": packed(x)}}]} for x in (first, second)
    ]
    assert mean_rows(cells)[0].correct["fog"].tolist() == [1.0, 0.5, 0.5]


def test_findings_name_domains_where_contexts_do_not_help():
    right, wrong = torch.ones(100), torch.zeros(100)
    domains = Domains(dict.fromkeys(["clean", "fog", "snow"], torch.empty(0)), torch.empty(0), {})
    source = DomainRow("source network", {"clean": right, "fog": wrong, "snow": right})
    known = DomainRow("CN, contexts known", {"clean": right, "fog": right, "snow": right})
    said = " ".join(findings([source, known], domains))
    assert "+50.0" in said
    assert "do not help, beyond two standard errors, in: snow (+0.0 ± 0.0)." in said
    assert "Better" not in said


# -------------------------------------------------------------------------------------------------------------- command


def test_published_images_are_read_by_severity(tmp_path):
    data = load_shift_data("digits", None)
    total = len(data.test_labels)
    np.save(tmp_path / "labels.npy", data.test_labels.numpy())
    levels = np.repeat(np.arange(5, dtype=np.uint8), total)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.save(tmp_path / "fog.npy", levels)
    data = load_shift_data("digits", None, tmp_path)
    read = data.in_domain("fog", torch.tensor([3, 7]), 4, 0)
    assert read.shape == (2, 3, 32, 32)
    torch.testing.assert_close(read, torch.full_like(read, 3 / 255))
    np.save(tmp_path / "labels.npy", 9 - data.test_labels.numpy())
    with pytest.raises(DatasetError, match="labels"):
        load_shift_data("digits", None, tmp_path)


def test_smoke_runs_once_and_says_that_it_is_no_evidence(tmp_path, capsys):
    reproduce_shift(budget="smoke", output_dir=tmp_path, progress=False)
    said = capsys.readouterr().out
    assert "no evidence" in said
    home = tmp_path / "shift" / "cells" / "resnet.digits.seed0"
    before = (home / "results.json").stat().st_mtime_ns
    results = json.loads((tmp_path / "shift" / "results.json").read_text())
    assert results["is_evidence"] is False
    rows = [row["name"] for row in results["cells"][0]["rows"]]
    for name in ("source network", "UnMix-TNS, mixed batches", "TENT, mixed batches", "CN, contexts known"):
        assert name in rows
    assert (tmp_path / "shift" / "digits.sheet.png").is_file()
    assert (home / "checkpoint").is_dir()
    reproduce_shift(budget="smoke", output_dir=tmp_path, progress=False)
    assert "is finished" in capsys.readouterr().out
    assert (home / "results.json").stat().st_mtime_ns == before
    content = json.loads((home / "results.json").read_text())
    content["plan"]["epochs"] += 1
    (home / "results.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="epochs"):
        reproduce_shift(budget="smoke", output_dir=tmp_path, progress=False)


def test_wrong_words_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="smoke"):
        reproduce_shift(budget="smok", output_dir=tmp_path)
    with pytest.raises(ConfigError, match="cell"):
        reproduce_shift(budget="smoke", output_dir=tmp_path, only=["vit.*"])
