"""Decoding to uint8: pixels, modes, orientation, sizes, and images that cannot be read; channel statistics."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from cn_hf.contexts import ClusterContexts, OriginContexts
from cn_hf.data import StreamedBatches, channel_statistics, decode_images, load_splits, prepare_data
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError, InputShapeError, InputTypeError
from cn_hf.reading.decoded import image_shape
from cn_hf.reading.statistics import ChannelSums


def encoded(array: Any, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image = array if isinstance(array, PIL.Image.Image) else PIL.Image.fromarray(array)
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def dataset_of(*images: Any) -> Dataset:
    return Dataset.from_dict({"image": list(images)}, features=Features({"image": Image()}))


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_are_those_stored(num_workers: int) -> None:
    pixels = random_pixels(600, 5, 7, 3)
    decoded = decode_images(dataset_of(*[encoded(p) for p in pixels]), num_workers=num_workers)
    assert decoded.images.dtype == torch.uint8
    assert decoded.images.is_contiguous()
    assert torch.equal(decoded.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert torch.equal(decoded.rows, torch.arange(600))
    assert decoded.skipped == ()


def test_modes_become_rgb() -> None:
    grey = random_pixels(6, 6)
    wide = grey.astype(np.uint16) * 257
    rgba = np.concatenate([np.repeat(grey[..., None], 3, 2), np.full((6, 6, 1), 255, np.uint8)], 2)
    palette = PIL.Image.fromarray(np.repeat(grey[..., None], 3, 2)).convert("P", palette=PIL.Image.Palette.WEB)
    images = [encoded(grey), encoded(wide), encoded(rgba), encoded(palette), encoded(grey > 127)]
    decoded = decode_images(dataset_of(*images)).images
    expected = torch.from_numpy(grey).expand(3, 6, 6)
    for i in range(3):
        assert torch.equal(decoded[i], expected)
    assert torch.equal(decoded[3], torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1))
    assert torch.equal(decoded[4], (expected > 127) * torch.tensor(255, dtype=torch.uint8))
    one_channel = decode_images(dataset_of(encoded(grey)), image_mode="L").images
    assert torch.equal(one_channel, expected[None, :1])


def test_orientation_of_the_camera_is_applied() -> None:
    pixels = random_pixels(4, 6, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    decoded = decode_images(dataset_of(encoded(pixels, exif=exif.tobytes())))
    assert torch.equal(decoded.images[0].permute(1, 2, 0), torch.from_numpy(np.rot90(pixels, -1).copy()))


SIZED: dict[str, Callable[..., Any]] = {
    "decode_images": lambda data, **size: decode_images(data, **size).images.shape[2:],
    "image_shape": lambda data, **size: image_shape(data, "image", **size)[1:],
    "prepare_data": lambda data, **size: prepare_data(DatasetDict(train=data), batch_size=2, **size).input_size[1:],
    "StreamedBatches": lambda data, **size: next(iter(StreamedBatches(data, batch_size=2, **size)))[
        "pixel_values"
    ].shape[2:],
    "ClusterContexts": lambda data, **size: ClusterContexts(2, **size).decode_size,
    "OriginContexts": lambda data, **size: stored_size(OriginContexts({"only": data}, "shared", **size).blend()),
}


def image_size_of(batch: dict[str, torch.Tensor]) -> torch.Size:
    return batch["pixel_values"].shape[2:]


def stored_size(data: Dataset) -> tuple[int, int]:
    return data[0]["image"].height, data[0]["image"].width


@pytest.mark.parametrize("name", SIZED)
def test_the_former_name_of_decode_size_is_understood(name: str) -> None:
    data = dataset_of(*[encoded(random_pixels(4, 4, 3))] * 2).add_column(
        "label", [0, 1], feature=ClassLabel(num_classes=2)
    )
    assert tuple(SIZED[name](data, decode_size=(6, 8))) == (6, 8)
    with pytest.warns(DeprecationWarning, match="image_size is called decode_size") as warned:
        assert tuple(SIZED[name](data, image_size=(6, 8))) == (6, 8)
    assert warned[0].filename == __file__
    with pytest.raises(ConfigError, match="Give decode_size alone"):
        SIZED[name](data, image_size=8, decode_size=6)


def test_resize_and_differing_sizes() -> None:
    mixed = dataset_of(encoded(random_pixels(4, 4, 3)), encoded(random_pixels(8, 6, 3)))
    with pytest.raises(DatasetError, match=r"8x6.*4x4.*decode_size"):
        decode_images(mixed)
    assert decode_images(mixed, decode_size=5).images.shape == (2, 3, 5, 5)
    assert decode_images(mixed, decode_size=(4, 2)).images.shape == (2, 3, 4, 2)
    # Also where the odd one is in a later chunk.
    many = dataset_of(*[encoded(random_pixels(4, 4, 3))] * 300, encoded(random_pixels(4, 5, 3)))
    with pytest.raises(DatasetError, match="Image 300 is 4x5"):
        decode_images(many)


def broken_dataset() -> Dataset:
    good = [encoded(p, "JPEG") for p in random_pixels(6, 16, 16, 3)]
    half = {"bytes": good[2]["bytes"][: len(good[2]["bytes"]) // 2], "path": None}
    rubbish = {"bytes": b"this is no image", "path": None}
    return dataset_of(good[0], good[1], half, good[3], rubbish, good[5])


def test_truncated_image_is_named() -> None:
    with pytest.raises(DatasetFileError, match=r"[Ii]mage 2 .*'image'") as caught:
        decode_images(broken_dataset())
    assert isinstance(caught.value, OSError)


def test_skipping_is_counted() -> None:
    decoded = decode_images(broken_dataset(), on_error="skip")
    assert decoded.rows.tolist() == [0, 1, 3, 5]
    assert decoded.skipped == (2, 4)
    whole = decode_images(broken_dataset().select([0, 1, 3, 5]))
    assert torch.equal(decoded.images, whole.images)
    assert whole.num_rows == 4


def test_nothing_readable_nothing_there_and_a_missing_image() -> None:
    rubbish = dataset_of({"bytes": b"no", "path": None}, {"bytes": b"", "path": None})
    with pytest.raises(DatasetFileError, match="none of the 2 images"):
        decode_images(rubbish, on_error="skip")
    with pytest.raises(DatasetError, match="no rows"):
        decode_images(dataset_of())
    with pytest.raises(DatasetFileError, match=r"[Ii]mage 1"):
        decode_images(dataset_of(encoded(random_pixels(2, 2, 3)), None))
    with pytest.raises(DatasetFileError, match=r"[Ii]mage 0"):
        decode_images(dataset_of({"bytes": None, "path": "no/such/file.png"}))
    with pytest.raises(DatasetFileError, match="none of the first"):
        image_shape(rubbish)


def test_images_in_files(tmp_path: Path) -> None:
    pixels = random_pixels(3, 4, 4, 3)
    for i, array in enumerate(pixels):
        PIL.Image.fromarray(array).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    dataset = Dataset.from_dict({"file": paths}).cast_column("file", Image())
    assert torch.equal(decode_images(dataset).images, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_undecoded_columns_and_formats_make_no_difference() -> None:
    dataset = dataset_of(*[encoded(p) for p in random_pixels(4, 3, 3, 3)])
    expected = decode_images(dataset).images
    assert torch.equal(decode_images(dataset.cast_column("image", Image(decode=False))).images, expected)
    assert torch.equal(decode_images(dataset.with_format("torch")).images, expected)
    assert torch.equal(decode_images(dataset.select([3, 1])).images, expected[[3, 1]])


def test_image_shape() -> None:
    dataset = dataset_of({"bytes": b"no", "path": None}, encoded(random_pixels(5, 7)))
    assert image_shape(dataset) == (3, 5, 7)
    assert image_shape(dataset, "image", decode_size=4, image_mode="L") == (1, 4, 4)
    assert image_shape(dataset.to_iterable_dataset()) == (3, 5, 7)


def test_wrong_options() -> None:
    dataset = dataset_of(encoded(random_pixels(2, 2, 3)))
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        decode_images(dataset, on_error="skipp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="RGB"):
        decode_images(dataset, image_mode="HSV")
    with pytest.raises(ConfigError, match="positive"):
        decode_images(dataset, decode_size=0)
    with pytest.raises(DatasetError, match="image"):
        decode_images(Dataset.from_dict({"x": [1]}, features=Features({"x": Value("int64")})))


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    mnist = load_splits(shared_data / "mnist", train_split=None, test_split="test[:300]", cache_dir=tmp_path)["test"]
    decoded = decode_images(mnist).images
    assert decoded.shape == (300, 3, 28, 28)
    assert torch.equal(decoded[:, 0], decoded[:, 2])
    assert torch.equal(decoded[7, 0], torch.from_numpy(np.array(mnist[7]["image"])))
    cameras = load_splits(shared_data / "daynight_cameras", train_split=None, cache_dir=tmp_path)["test"]
    assert decode_images(cameras, decode_size=(24, 32)).images.shape == (160, 3, 24, 32)


# ----------------------------------------------------------------------------------------------------- statistics


def test_channel_statistics_against_numpy() -> None:
    images = torch.from_numpy(random_pixels(50, 3, 9, 7))
    images[:, 1] //= 5
    mean, std = channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)


def test_channel_statistics_stay_exact_where_floats_would_not() -> None:
    images = torch.full((3000, 1, 32, 32), 250, dtype=torch.uint8)
    images[0, 0, 0, 0] = 251
    mean, std = channel_statistics(images)
    p = 1 / images.numel()
    assert mean[0] == pytest.approx((250 + p) / 255, rel=1e-14)
    assert std[0] == pytest.approx((p * (1 - p)) ** 0.5 / 255, rel=1e-9)


def test_channel_statistics_in_parts_constants_and_bad_input() -> None:
    images = torch.from_numpy(random_pixels(40, 3, 5, 5))
    sums = ChannelSums()
    for part in images.split(7):
        sums.update(part)
    assert sums.mean_and_std() == channel_statistics(images)
    assert channel_statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))
    with pytest.raises(InputTypeError, match="uint8"):
        channel_statistics(images.float())
    with pytest.raises(InputShapeError, match="N, C, H, W"):
        channel_statistics(images[0])
    with pytest.raises(InputShapeError, match="empty"):
        channel_statistics(images[:0])
    with pytest.raises(InputShapeError, match="N, 3, H, W"):
        sums.update(images[:, :1])


def test_statistics_of_real_images_are_near_the_published_ones(shared_data: Path) -> None:
    stream = load_splits(shared_data / "cifar10", streaming=True, train_split=None)["test"]
    pixels = np.stack([np.array(row["img"]) for row in stream.take(2000)])
    mean, std = channel_statistics(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=0.02)
    np.testing.assert_allclose(std, [0.2470, 0.2435, 0.2616], atol=0.01)
