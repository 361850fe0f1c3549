"""Images of a dataset decoded to pixels: modes, sizes, orientation, processes, and images that cannot be decoded."""

from __future__ import annotations

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from cn_hf.contexts import drop_corrupt_images
from cn_hf.errors import ConfigError, DatasetError, DatasetFileError, InputTypeError
from cn_hf.reading.images import find_image_column, iter_decoded, stack_arrays, to_array

IMAGES = datasets.Features({"picture": datasets.Image(), "n": datasets.Value("int64")})


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def noise(height=5, width=7, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def table(values):
    values = list(values)
    return datasets.Dataset.from_dict({"picture": values, "n": list(range(len(values)))}, features=IMAGES)


def corrupt(rows=6, bad=(1, 4)):
    values = [encode(noise(seed=row)) for row in range(rows)]
    for row in bad:
        values[row] = {"bytes": values[row]["bytes"][:60], "path": None}
    return table(values)


def decoded(data, **options):
    """The rows of each batch and their pixels, uint8 (N, C, H, W)."""
    return [(rows, stack_arrays(arrays, rows)) for rows, arrays in iter_decoded(data, **options)]


@pytest.mark.parametrize("kind", ["dataset", "stream", "torch format", "shuffled", "undecoded"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_are_the_images_in_order(kind, num_workers):
    images = [noise(seed=row) for row in range(10)]
    data = table(map(encode, images))
    order = list(range(10))
    if kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "torch format":
        data = data.with_format("torch")
    elif kind == "shuffled":
        data = data.shuffle(seed=1)
        order = data["n"][:]
    elif kind == "undecoded":
        data = data.cast_column("picture", datasets.Image(decode=False))
        data = data.cast_column("picture", datasets.Image())
    batches = decoded(data, batch_size=4, num_workers=num_workers)
    assert [rows for rows, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    expected = np.stack([np.asarray(images[row]) for row in order]).transpose(0, 3, 1, 2)
    assert all(pixels.is_contiguous() for _, pixels in batches)
    pixels = torch.cat([pixels for _, pixels in batches])
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), expected)


def test_chosen_rows_keep_their_numbers():
    data = table(encode(noise(seed=row)) for row in range(5))
    [(rows, pixels)] = decoded(data, rows=[4, 1])
    assert rows == [4, 1]
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.asarray(noise(seed=4)))
    with pytest.raises(DatasetFileError, match="Image 4 "):
        decoded(corrupt(), rows=[2, 4])


def test_grayscale_becomes_rgb_and_colour_becomes_luma():
    gray, colour = noise(channels=1), noise()
    [(_, pixels)] = decoded(table([encode(gray), encode(colour)]))
    assert torch.equal(pixels[0], torch.tensor(np.asarray(gray)).expand(3, -1, -1))
    [(_, pixels)] = decoded(table([encode(gray), encode(colour)]), mode="L")
    assert pixels.shape == (2, 1, 5, 7)
    assert np.array_equal(pixels[1, 0].numpy(), np.asarray(colour.convert("L")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_of_eight_or_sixteen_bits_is_converted(mode):
    gray = noise(channels=1)
    if mode.startswith("I"):
        wide = np.asarray(gray).astype(np.uint16) * 257
        image = PIL.Image.fromarray(wide) if mode == "I;16" else PIL.Image.fromarray(wide.astype(np.int32))
        assert image.mode == mode
    else:
        image = gray.convert("RGB").convert(mode)
    array = to_array(image, "RGB")
    assert array.shape == (5, 7, 3)
    reference = np.asarray(gray if mode.startswith("I") else image.convert("RGB").convert("L"))
    assert np.abs(array[..., 0].astype(int) - reference).max() <= (0 if mode.startswith("I") else 1)


# The last has overshoot, which a pass cuts off; it is small where what shrinks does so first.
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("old", "new", "darkest", "brightest"),
    [
        ((37, 52), (16, 21), 60, 190),
        ((9, 7), (20, 33), 60, 190),
        ((24, 40), (33, 32), 60, 190),
        ((1, 1), (3, 2), 60, 190),
        ((100, 60), (33, 87), 0, 256),
        ((60, 100), (87, 33), 0, 256),
    ],
)
def test_resizing_is_exact_to_the_roundings_of_two_passes(old, new, darkest, brightest, mode):
    generator = np.random.default_rng(0)
    drawn = generator.integers(darkest, brightest, (*old, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(drawn).convert(mode)
    array = to_array(image, mode, new)
    assert array.shape == (*new, len(image.getbands()))
    assert array.dtype == np.uint8
    wide = torch.tensor(np.array(image), dtype=torch.float64).reshape(*old, -1).permute(2, 0, 1)[None]
    exact = F.interpolate(wide, size=new, mode="bicubic", antialias=True)[0].permute(1, 2, 0).clamp(0, 255)
    assert np.abs(array - exact.numpy()).max() <= 1.5  # each pass rounds by a half, the second weighs by up to 1.3


def test_sixteen_bits_are_scaled_whatever_else_is_in_the_image():
    dark = np.full((2, 2), 200, dtype=np.uint16)
    bright = dark.copy()
    bright[0, 0] = 60000
    for image in (dark, bright):
        assert to_array(PIL.Image.fromarray(image), "L")[1, 1, 0] == 0  # of 257 levels, none
    assert to_array(PIL.Image.fromarray(dark.astype(np.int32)), "L")[1, 1, 0] == 200  # of a wider type: 8 bits


def test_sixteen_bits_are_scaled_by_257():
    """White is white, and every 8-bit level is that of 257 16-bit ones: a division by 256 would give the last more."""
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(to_array(PIL.Image.fromarray(levels), "L")[..., 0], levels // 257)
    assert to_array(PIL.Image.fromarray(levels[1:]), "L")[0, 0, 0] == 256 // 257 == 0


def test_float_images_and_wide_integers_are_refused_with_their_row():
    wide = PIL.Image.fromarray(np.full((4, 4), 70000, dtype=np.int32))
    floats = PIL.Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    for image in (wide, floats):
        data = table([encode(noise()), encode(image, "TIFF")])
        with pytest.raises(DatasetFileError, match=r"Image 1 of column 'picture' .* no 8-bit meaning"):
            decoded(data, size=4)


def test_exif_orientation_is_applied():
    image = noise(4, 6)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    [(_, pixels)] = decoded(table([encode(image, exif=exif)]))
    assert pixels.shape == (1, 3, 6, 4)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.rot90(np.asarray(image), -1))


def test_sizes_are_unified_on_request_and_else_an_error_naming_the_row():
    data = table([encode(noise(5, 7)), encode(noise(5, 7)), encode(noise(8, 9))])
    [(_, pixels)] = decoded(data, size=(6, 4))
    assert pixels.shape == (3, 3, 6, 4)
    [(_, pixels)] = decoded(data, size=6)
    assert pixels.shape == (3, 3, 6, 6)
    with pytest.raises(DatasetError, match=r"Image 2 is 8x9, image 0 is 5x7 .*decode_size"):
        decoded(data)
    assert [array.shape for array in next(iter_decoded(data)).arrays] == [(5, 7, 3), (5, 7, 3), (8, 9, 3)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_are_named(num_workers, streaming):
    data = corrupt()
    data = data.to_iterable_dataset() if streaming else data
    with pytest.raises(DatasetFileError, match=r"Image 1 of column 'picture' cannot be read .*drop_corrupt_images"):
        decoded(data, num_workers=num_workers, batch_size=2)
    rows = [row for batch in iter_decoded(data, skip_corrupt=True, num_workers=num_workers) for row in batch.rows]
    assert rows == [0, 2, 3, 5]


@pytest.mark.parametrize(
    "value",
    [None, {"bytes": b"", "path": None}, {"bytes": b"GIF89a", "path": None}, {"bytes": None, "path": "/nowhere/x.png"}],
)
def test_missing_empty_and_foreign_values_are_named(value):
    data = table([encode(noise()), value])
    with pytest.raises(DatasetFileError, match="Image 1 of column 'picture' cannot be read"):
        decoded(data)


def test_corrupt_images_are_dropped_on_request_and_counted():
    data = datasets.DatasetDict(train=corrupt(), test=corrupt(bad=()))
    with pytest.warns(UserWarning, match="Left out 2 of 6 images that cannot be read: rows 1, 4"):
        kept = drop_corrupt_images(data)
    assert kept["train"]["n"][:] == [0, 2, 3, 5]
    assert kept["test"]["n"][:] == list(range(6))
    assert len(data["train"]) == 6


def test_corrupt_images_are_dropped_from_streams_one_warning_each():
    data = corrupt()
    stream = drop_corrupt_images(data.to_iterable_dataset())
    with pytest.warns(UserWarning, match="Left out image") as caught:
        rows = list(stream)
    assert [str(warning.message)[:16] for warning in caught] == ["Left out image 1", "Left out image 4"]
    assert [row["n"] for row in rows] == [0, 2, 3, 5]
    assert np.array_equal(np.asarray(rows[1]["picture"]), np.asarray(noise(seed=2)))
    with pytest.warns(UserWarning, match="Left out image 0"):
        assert list(drop_corrupt_images(corrupt(2, bad=(0, 1)).to_iterable_dataset())) == []


def test_the_image_column_is_found_or_said():
    two = {"a": datasets.Image(), "b": datasets.Image(), "n": datasets.Value("int64")}
    assert find_image_column(IMAGES) == "picture"
    assert find_image_column(two, "b") == "b"
    with pytest.raises(DatasetError, match=r"several image columns: \['a', 'b'\]"):
        find_image_column(two)
    with pytest.raises(DatasetError, match="no image column among"):
        find_image_column({"n": datasets.Value("int64")})
    with pytest.raises(DatasetError, match="did you mean 'picture'"):
        find_image_column(IMAGES, "pictures")
    with pytest.raises(DatasetError, match=r"cast_column\('n', datasets.Image\(\)\)"):
        find_image_column(IMAGES, "n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "RGBB"}, "did you mean 'RGB'"),
        ({"size": 0}, "decode_size is 0"),
        ({"size": (4, -1)}, "decode_size"),
        ({"size": (4, 4, 3)}, "decode_size"),
        ({"size": (4.5, 4)}, "decode_size"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decoded(corrupt(), **options)


def test_empty_split_has_no_chunks():
    assert decoded(table([])) == []
    with pytest.raises(InputTypeError, match="Expected a Dataset"):
        drop_corrupt_images([1])
