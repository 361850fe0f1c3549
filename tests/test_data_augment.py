"""Augmentation: each image for itself, the same for a seed, in parts as in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cn_hf.data import Augmentation, AugmentationConfig, build_augmentation
from cn_hf.errors import ConfigError, InputShapeError, InputTypeError

ALL = ["flip", "crop", "rotation", "zoom", "invert"]


def images(n: int = 16, side: int = 12) -> Tensor:
    return torch.rand(n, 3, side, side + 2)


def copies(n: int, side: int = 12) -> Tensor:
    return images(1, side).expand(n, -1, -1, -1).contiguous()


def test_flip_mirrors_some_and_leaves_others() -> None:
    x = images(64)
    y = build_augmentation(["flip"])(x, seed=1)
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    same = (y == x).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 16 < mirrored.sum() < 48
    assert torch.equal(build_augmentation(["flip"], horizontal_flip=1.0)(x, seed=0), x.flip(3))


def test_invert_makes_negatives_of_some_and_leaves_others() -> None:
    x = images(64)
    y = build_augmentation(["invert"])(x, seed=1)
    negative = torch.isclose(y, 1 - x).flatten(1).all(1)
    same = (y == x).flatten(1).all(1)
    assert (negative ^ same).all()
    assert 16 < negative.sum() < 48
    beyond = build_augmentation(["crop"], invert=1.0)(torch.ones(200, 3, 8, 8), seed=0)
    assert beyond.max() == 1, "the crop's black is inverted, too"
    assert beyond.min() == 0


def test_crop_shifts_by_up_to_the_padding_with_black_beyond() -> None:
    x = copies(200)
    y = build_augmentation(["crop"], crop_padding=2)(x, seed=0)
    assert y.shape == x.shape
    padded = F.pad(x[:1], (2, 2, 2, 2))
    height, width = x.shape[-2:]
    shifts = {(i, j): padded[0, :, i : i + height, j : j + width] for i in range(5) for j in range(5)}
    seen = set()
    for image in y:
        matches = [shift for shift, crop in shifts.items() if torch.equal(image, crop)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25


def test_crop_by_resampling_is_the_crop_by_slicing() -> None:
    import kornia.augmentation as K

    x = images(32)
    augment = build_augmentation(["crop"], crop_padding=3)
    _, crop, *_ = augment._random_operations(x)
    drawn = crop.forward_parameters(x.shape)
    resampling = K.RandomCrop((12, 14), padding=3, cropping_mode="resample")
    torch.testing.assert_close(crop(x, params=dict(drawn)), resampling(x, params=dict(drawn)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_each_image_is_drawn_for_itself(name: str) -> None:
    y = build_augmentation([name])(copies(32, side=32), seed=0)
    distinct = {tuple(image.flatten().tolist()) for image in y}
    assert len(distinct) >= (2 if name in ("flip", "invert") else 16)


@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL])
def test_same_seed_same_result_and_another_seed_another(names: list[str]) -> None:
    x, augment = images(32, side=32), build_augmentation(names)
    first = augment(x, seed=7)
    torch.rand(5)
    assert torch.equal(augment(x, seed=7), first)
    assert torch.equal(build_augmentation(names)(x, seed=7), first)
    assert not torch.equal(augment(x, seed=8), first)


def test_large_seeds() -> None:
    x, augment = images(), build_augmentation(ALL)
    assert not torch.equal(augment(x, seed=2**63 - 1), augment(x, seed=2**62))


def test_global_random_state_is_left_alone() -> None:
    x, state = images(), torch.get_rng_state()
    build_augmentation(ALL, image_size=9)(x, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_global_random_state_is_left_alone_after_an_error() -> None:
    augment, x, state = Augmentation(AugmentationConfig(crop_padding=1)), images(), torch.get_rng_state()
    augment._random_operations = lambda images: iter([torch.nn.Identity()])  # type: ignore[method-assign]
    with pytest.raises(AttributeError, match="forward_parameters"):
        augment(x, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


# 4 is also the length of a parameter that kornia returns per batch; 1 and 13 are odd.
@pytest.mark.parametrize("total", [1, 4, 13])
@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_parts_of_a_batch_are_the_batch(total: int, num_parts: int) -> None:
    x, augment = images(total), build_augmentation(ALL, image_size=(20, 18))
    whole = augment(x, seed=5)
    parts = []
    for places in torch.arange(total).tensor_split(num_parts):
        parts.append(augment(x[places], seed=5, places=places, total=total))
        assert parts[-1].shape == (len(places), 3, 20, 18)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_images_left_out_do_not_change_the_others() -> None:
    x, augment = images(10), build_augmentation(ALL)
    places = torch.tensor([0, 3, 4, 9])
    part = augment(x[places], seed=2, places=places, total=10)
    torch.testing.assert_close(part, augment(x, seed=2)[places], atol=1e-6, rtol=0)


def test_evaluation_only_resizes() -> None:
    x = images()
    augment = build_augmentation(ALL, image_size=24)
    y = augment.evaluation()(x, seed=1)
    assert torch.equal(y, augment.evaluation()(x, seed=2))
    assert torch.equal(y, F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False))
    assert torch.equal(build_augmentation(ALL).evaluation()(x), x)
    assert build_augmentation(ALL).evaluation().is_identity
    assert not augment.evaluation().is_identity
    assert not augment.is_identity


def test_shrinking_is_antialiased() -> None:
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 1
    small = build_augmentation(image_size=8)(stripes)
    assert (small - 0.5).abs().max() < 0.1


def test_zoom_and_rotation_stay_within_their_strength() -> None:
    # A bright dot near the corner of a 33x33 image, 14 pixels off the centre both ways.
    x = torch.zeros(100, 3, 33, 33)
    x[:, :, 2, 2] = 1
    zoomed = build_augmentation(zoom=0.1)(x, seed=0)
    rows = zoomed[:, 0].amax(2).argmax(1)
    assert rows.min() >= 16 - round(14 * 1.1) - 1
    assert rows.max() <= 16 - round(14 * 0.9) + 1
    assert len(rows.unique()) > 1


def test_values_stay_in_range_and_dtype() -> None:
    y = build_augmentation(ALL, image_size=40)(images(side=32).double(), seed=0)
    assert y.dtype == torch.float64
    assert y.min() >= 0
    assert y.max() <= 1


def test_config_round_trips_json() -> None:
    config = AugmentationConfig(horizontal_flip=0.25, crop_padding=2, rotation=5.0, zoom=0.1, invert=0.5, image_size=72)
    assert config.image_size == (72, 72)
    assert AugmentationConfig.from_json(config.to_json()) == config
    assert AugmentationConfig.from_json(AugmentationConfig().to_json()) == AugmentationConfig()
    with pytest.raises(ConfigError, match="did you mean 'crop_padding'"):
        AugmentationConfig.from_json('{"crop_paddin": 3}')
    assert "crop_padding=2" in repr(Augmentation(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip must be in \[0, 1\], got 1.5"),
        ({"invert": -0.1}, r"invert must be in \[0, 1\]"),
        ({"crop_padding": -1}, "crop_padding must be at least 0"),
        ({"crop_padding": 1.5}, "'crop_padding' must be a whole number"),
        ({"crop_padding": True}, "'crop_padding' must be a whole number, got True"),
        ({"rotation": -3}, r"rotation must be in \[0, 180\], got -3"),
        ({"zoom": 1.0}, r"zoom must be in \[0, 1\)"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": (3, 4, 5)}, r"image_size must be a whole number or \(height, width\), got \(3, 4, 5\)"),
        ({"croppadding": 4}, "did you mean 'crop_padding'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_augmentation(**options)  # type: ignore[arg-type]


def test_wrong_names_and_inputs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'flip'"):
        build_augmentation(["flipp"])
    augment = build_augmentation(["flip"])
    with pytest.raises(InputTypeError, match="255"):
        augment(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputShapeError, match="N, C, H, W"):
        augment(torch.zeros(3, 4, 4))
    with pytest.raises(InputShapeError, match="batch of 2"):
        augment(images(2), places=torch.tensor([0, 2]), total=2)
    with pytest.raises(InputShapeError, match="2 places"):
        augment(images(2), places=torch.tensor([0]), total=2)
