"""Mixup and CutMix of batches: against a slow pair by pair version, over processes, and what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data_for_tests import MEAN, STD, N, assert_same, held, make_dataset, pixels, streamed, together
from torch import Tensor

from cn_hf.data import DeviceBatches, Mixing, MixingConfig, build_augmentation
from cn_hf.data.batches import MIXING_STREAM
from cn_hf.data.mixing import draw_mixes
from cn_hf.data.order import stream_seed
from cn_hf.errors import ConfigError

BOTH = MixingConfig(mixup=0.4, cutmix=1.0, probability=0.8)
ONLY_MIXUP, ONLY_CUTMIX = MixingConfig(mixup=0.4), MixingConfig(cutmix=1.0)


def mixing(config: MixingConfig = BOTH) -> Mixing:
    return Mixing(config, num_classes=4, num_contexts=3)


def slow_mix(
    config: MixingConfig, images: Tensor, labels: Tensor, contexts: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair by pair, pixel by pixel, the shares counted."""
    total, _, height, width = images.shape
    draws = draw_mixes(config, (total + 1) // 2, height, width, seed)
    mixed = images.clone()
    soft_labels, soft_contexts = torch.zeros(total, 4), torch.zeros(total, 3)
    for i in range(total):
        j = i + 1 if i % 2 == 0 else i - 1
        if j == total:
            soft_labels[i, labels[i]] = soft_contexts[i, contexts[i]] = 1
            continue
        level, (top, bottom, left, right) = float(draws.level[i // 2]), draws.box[i // 2].tolist()
        share = 0.0
        for y in range(top, bottom):
            for x in range(left, right):
                mixed[i, :, y, x] = (1 - level) * images[i, :, y, x] + level * images[j, :, y, x]
                share += level / (height * width)
        soft_labels[i, labels[i]] += 1 - share
        soft_labels[i, labels[j]] += share
        soft_contexts[i, contexts[i]] += 1 - share
        soft_contexts[i, contexts[j]] += share
    return mixed, soft_labels, soft_contexts


@pytest.mark.parametrize("config", [BOTH, ONLY_MIXUP, ONLY_CUTMIX])
@pytest.mark.parametrize("total", [1, 2, 9, 32])
def test_against_pairs_mixed_one_by_one(config: MixingConfig, total: int) -> None:
    images, labels, contexts = pixels(total) / 255, torch.arange(total) % 4, torch.arange(total) % 3
    found = mixing(config)(images, labels, contexts, seed=7, places=torch.arange(total), total=total)
    for left, right in zip(found, slow_mix(config, images, labels, contexts, 7), strict=True):
        assert left is not None
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("make", [held, streamed])
def test_batches_are_mixed_after_augmentation_and_before_normalisation(make: Any) -> None:
    options = {"shuffle": True, "augment": build_augmentation(["flip", "crop"], crop_padding=2)}
    plain, mixed = make(**options), make(**options, mixing=mixing(), mean=MEAN, std=STD)
    for batches in (plain, mixed):
        batches.set_epoch(2)
    for number, (before, after) in enumerate(zip(plain, mixed, strict=True)):
        seed = stream_seed(5, 2, number, MIXING_STREAM)
        images, labels, contexts = slow_mix(BOTH, before["pixel_values"], before["labels"], before["context_ids"], seed)
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(after["pixel_values"], images)
        torch.testing.assert_close(after["labels"], labels)
        torch.testing.assert_close(after["context_ids"], contexts)
        assert torch.equal(after["index"], before["index"])


@pytest.mark.parametrize("make", [held, streamed])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 8), (2, 6), (3, 8), (4, 7), (3, 36)])
def test_parts_of_processes_are_the_batch_of_one(make: Any, processes: int, batch_size: int) -> None:
    options = {
        "batch_size": batch_size,
        "shuffle": True,
        "mixing": mixing(),
        "augment": build_augmentation(["crop"], crop_padding=1, image_size=7),
    }
    whole = make(**options)
    ranks = [make(**options, num_processes=processes, process_index=p) for p in range(processes)]
    parts = [together(list(parts)) for parts in zip(*ranks, strict=True)]
    assert_same(parts, whole, atol=1e-6)


def test_epochs_and_batches_are_mixed_differently_and_again_alike() -> None:
    batches = DeviceBatches(
        pixels(2).repeat(8, 1, 1, 1), torch.arange(16) % 2, batch_size=4, mixing=Mixing(ONLY_MIXUP, num_classes=2)
    )
    first = together(list(batches))
    assert_same(batches, batches)
    batches.set_epoch(1)
    second = together(list(batches))
    assert len(set(first["labels"][:, 0].tolist() + second["labels"][:, 0].tolist())) == 32
    assert "context_ids" not in first


def test_an_image_without_its_partner_stays_as_it_is() -> None:
    broken = (2, 9, 14, 15)
    plain, batches = (streamed(make_dataset(broken=broken), on_error="skip", mixing=m) for m in (None, mixing()))
    before, after = together(list(plain)), together(list(batches))
    rows = after["index"].tolist()
    for row in (3, 8, 36):
        place = rows.index(row)
        assert torch.equal(after["pixel_values"][place], before["pixel_values"][place])
        assert after["labels"][place].tolist() == [float(row % 4 == c) for c in range(4)]
        assert after["context_ids"][place].tolist() == [float(row % 3 == c) for c in range(3)]
    assert not torch.equal(after["pixel_values"], before["pixel_values"])
    whole = together(list(held(mixing=mixing())))
    both = [row for row in rows if row not in (3, 8)]
    for key in whole:
        torch.testing.assert_close(after[key][[rows.index(row) for row in both]], whole[key][both])


def test_soft_contexts_and_images_of_one_class() -> None:
    weights = torch.softmax(torch.randn(N, 3), 1)
    options: dict[str, Any] = {"batch_size": N, "mixing": Mixing(BOTH, num_classes=2)}
    [batch] = DeviceBatches(pixels(), torch.ones(N, dtype=torch.int64), weights, **options)
    assert torch.equal(batch["labels"], torch.tensor([0.0, 1.0]).expand(N, 2))
    torch.testing.assert_close(batch["context_ids"].sum(1), torch.ones(N))
    pairs = batch["context_ids"][:-1].view(-1, 2, 3).sum(1)
    torch.testing.assert_close(pairs, weights[:-1].view(-1, 2, 3).sum(1))
    assert torch.equal(batch["context_ids"][-1], weights[-1])


def test_what_is_drawn_follows_the_config() -> None:
    count = 20_000
    draws = draw_mixes(MixingConfig(mixup=0.4, cutmix=1.0, probability=0.6, switch_probability=0.25), count, 32, 16, 3)
    none, cut = draws.level == 0, draws.level == 1
    assert abs(none.mean() - 0.4) < 0.02
    assert abs(cut.mean() - 0.6 * 0.25) < 0.01
    blend = draws.level[~none & ~cut]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert abs(blend.mean() - 0.5) < 0.02
    assert abs(blend.var() - 1 / (4 * 1.8)) < 0.005
    top, bottom, left, right = draws.box.T
    assert (draws.box[~none & ~cut] == [0, 32, 0, 16]).all()
    assert ((top >= 0) & (top <= bottom) & (bottom <= 32) & (left >= 0) & (left <= right) & (right <= 16)).all()
    # Uncut, a box of Beta(1, 1) area covers half of the image; the border takes some of it.
    area = ((bottom - top) * (right - left) / 512)[cut]
    assert 0.2 < area.mean() < 0.5
    inside = cut & (top > 0) & (bottom < 32) & (left > 0) & (right < 16)
    assert (np.abs((bottom - top) / 32 - (right - left) / 16)[inside] < 1 / 16 + 1 / 32).all()
    for config, level in ((ONLY_CUTMIX, 1.0), (MixingConfig(mixup=1, probability=0), 0.0)):
        assert set(draw_mixes(config, 100, 4, 4, 0).level) == {level}
    assert draw_mixes(BOTH, 0, 4, 4, 0).box.shape == (0, 4)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6])
def test_extreme_alphas_give_shares_between_nothing_and_all(alpha: float) -> None:
    for config in (MixingConfig(mixup=alpha), MixingConfig(cutmix=alpha)):
        draws = draw_mixes(config, 1000, 8, 8, 0)
        assert np.isfinite(draws.level).all()
        assert ((draws.level >= 0) & (draws.level <= 1)).all()
        assert (draws.box[:, 1] >= draws.box[:, 0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, "mixup must be at least 0, got -0.1"),
        ({"mixup": float("nan")}, "'mixup' must be a finite number"),
        ({"cutmix": float("inf")}, "'cutmix' must be a finite number"),
        ({"probability": 1.5}, r"probability must be in \[0, 1\]"),
        ({"probability": True}, "'probability' must be a finite number"),
        ({"switch_probability": -1}, r"switch_probability must be in \[0, 1\], got -1"),
    ],
)
def test_wrong_configs(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixingConfig(**options)
    assert MixingConfig().is_identity
    assert MixingConfig(mixup=1.0, probability=0).is_identity
    assert not BOTH.is_identity


@pytest.mark.parametrize("make", [held, streamed])
def test_mixing_made_for_other_data(make: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes=3, but the data holds 0 to 3; give num_classes=4"):
        # A ClassLabel column is checked by its own classes, a batch by those of mixing.
        list(make(mixing=Mixing(BOTH, num_classes=3, num_contexts=3)))
    with pytest.raises(ConfigError, match="num_contexts=2, but the data holds 0 to 2"):
        list(make(mixing=Mixing(BOTH, num_classes=4, num_contexts=2)))
    with pytest.raises(ConfigError, match="give Mixing num_contexts"):
        list(make(mixing=Mixing(BOTH, num_classes=4)))
    with pytest.raises(ConfigError, match="at least one class"):
        Mixing(BOTH, num_classes=0)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for config in (BOTH, ONLY_MIXUP, ONLY_CUTMIX):
        a, b = (together(list(held(shuffle=True, mixing=mixing(config), device=d))) for d in ("cpu", "cuda"))
        for key in a:
            torch.testing.assert_close(b[key].cpu(), a[key])
