"""Random convolutions and neighbours: what they do to an image, the same for a seed, in parts as in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cn_hf.data.augment import InTurn, build_augmentation
from cn_hf.errors import ConfigError, InputShapeError
from cn_hf.recipes.adamatch.neighbours import Neighbours
from cn_hf.recipes.adamatch.randaugment import RandAugment
from cn_hf.recipes.adamatch.random_convolution import RandomConvolution

POOL = torch.rand(7, 3, 12, 14)
AUGMENTS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: RandomConvolution(0.7),
    "neighbours": lambda: Neighbours(POOL, 0.7),
    "in turn": lambda: InTurn(RandomConvolution(0.7), RandAugment(2, 0.5)),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_the_same_for_a_seed_and_in_parts(name: str) -> None:
    augment, x = AUGMENTS[name](), torch.rand(10, 3, 12, 14)
    before, everything = x.clone(), torch.arange(10)
    whole = augment(x, seed=3, places=everything, total=10)
    assert torch.equal(x, before)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    assert torch.equal(whole, augment(x, seed=3, places=everything, total=10))
    assert not torch.equal(whole, augment(x, seed=4, places=everything, total=10))
    parts = [augment(x[part], seed=3, places=everything[part], total=10) for part in (slice(0, 4), slice(4, None))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert augment(x[:0], seed=3, places=everything[:0], total=10).shape == (0, 3, 12, 14)


@pytest.mark.parametrize("name", ["convolution", "neighbours"])
def test_as_many_as_the_probability_says(name: str) -> None:
    x = torch.rand(400, 3, 12, 14)
    build = {"convolution": RandomConvolution, "neighbours": lambda p: Neighbours(POOL, p)}[name]
    for probability in (0.0, 0.3, 1.0):
        changed = (build(probability)(x, seed=0) != x).flatten(1).any(1).double().mean()
        assert float(changed) == pytest.approx(probability, abs=0.08 if probability == 0.3 else 0)


def test_a_convolution_keeps_the_contrast_and_inverts_some() -> None:
    x = torch.full((300, 3, 16, 16), 0.4)
    x[:, :, 4:12, 4:12] += 0.2  # a light square, whose contrast cannot leave [0, 1]
    y = RandomConvolution(1.0)(x, seed=0)
    deviation = y.flatten(1).std(1)
    assert float(deviation.max()) < 1.3 * float(x.flatten(1).std(1)[0])
    inner, outer = y[:, :, 6:10, 6:10].mean((-2, -1)), y[:, :, :2].mean((-2, -1))
    lighter = (inner > outer).double().mean()
    assert 0.4 < float(lighter) < 0.85, "light on dark stays so where the image's share is large"
    colourful = (y - y.mean(1, keepdim=True)).abs().amax((1, 2, 3)) > 0.02
    assert float(colourful.double().mean()) > 0.9
    flat = RandomConvolution(1.0)(torch.full((8, 3, 5, 5), 0.3), seed=0)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5))


def test_images_smaller_than_the_filter_and_of_one_channel() -> None:
    assert RandomConvolution(1.0)(torch.rand(20, 1, 2, 3), seed=0).isfinite().all()


def test_an_image_stands_between_two_others() -> None:
    pool = torch.stack([torch.full((1, 6, 12), value) for value in (0.25, 0.75)])
    x = torch.zeros(200, 1, 6, 12)
    y = Neighbours(pool, 1.0)(x, seed=0)
    middle = y[..., 5:7]
    assert float(middle.max()) == 0, "an image is in the middle of its own row"
    left, right = y[:, 0, 0, 0], y[:, 0, 0, -1]
    for side in (left, right):
        seen = side[side > 0.2]
        assert 100 < len(seen) < 200, "the side of most, but not all, is another's"
        assert {0.25, 0.75} <= set(seen.tolist())
    torch.testing.assert_close(y, y[:, :, :1].expand_as(y))  # heights are kept
    shown = (y[:, 0, 0] == 0).double().sum(1) / 12
    assert 0.4 < float(shown.min()) < 0.65
    assert float(shown.max()) > 0.9


def test_neighbours_of_integers() -> None:
    pool = (POOL * 255).to(torch.uint8)
    x = torch.rand(30, 3, 12, 14)
    torch.testing.assert_close(Neighbours(pool, 1.0)(x, seed=1), Neighbours(pool.float() / 255, 1.0)(x, seed=1))


def test_augmentations_in_turn_draw_numbers_of_their_own() -> None:
    x = torch.rand(64, 3, 12, 14)
    flip = build_augmentation(["flip"])
    twice = InTurn(flip, flip)(x, seed=0, places=torch.arange(64), total=64)
    same = (twice == x).flatten(1).all(1).double().mean()
    assert 0.25 < float(same) < 0.75
    assert "RandAugment" in repr(InTurn(RandomConvolution(), RandAugment()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RandomConvolution(1.5), ConfigError, "must be in .0, 1.; got 1.5"),
        (lambda: RandomConvolution()(torch.rand(3, 8), seed=0), InputShapeError, r"\(N, C, H, W\); got \(3, 8\)"),
        (lambda: Neighbours(POOL, -1), ConfigError, "must be in .0, 1.; got -1"),
        (lambda: Neighbours(POOL[:0]), InputShapeError, r"M of 1 or more; got \(0, 3, 12, 14\)"),
        (lambda: Neighbours(POOL)(torch.rand(2, 3, 9, 9), seed=0), InputShapeError, r"got \(2, 3, 9, 9\)"),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", AUGMENTS)
def test_places_outside_the_batch_are_refused(name: str) -> None:
    with pytest.raises(InputShapeError, match="2 places in a batch of 2"):
        AUGMENTS[name]()(torch.rand(2, 3, 12, 14), seed=0, places=torch.tensor([1, 2]), total=2)
