"""Contexts by rule and by brightness."""

from __future__ import annotations

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import accuracy_score

from cn_hf.contexts import BrightnessContexts, ContextSource, RuleContexts
from cn_hf.contexts.rules import mean_luma, otsu_threshold
from cn_hf.errors import ConfigError, ContextSourceError, DatasetError, DatasetFileError, InputTypeError

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "weather": datasets.Value("string"),
    }
)


def picture(level, height=4, width=5, seed=0):
    pixels = np.random.default_rng(seed).integers(max(0, level - 20), min(255, level + 20) + 1, (height, width, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def table(levels, sizes=None):
    images = [picture(level, *(sizes[row] if sizes else (4, 5)), seed=row) for row, level in enumerate(levels)]
    rows = len(levels)
    return datasets.Dataset.from_dict(
        {"image": images, "label": [row % 3 for row in range(rows)], "weather": ["rain", "sun"] * (rows // 2)},
        features=FEATURES,
    )


def ids_of(split):
    return [row["context_ids"] for row in split]


LEVELS = [40, 200, 30, 190, 60, 220]


@pytest.mark.parametrize("streaming", [False, True])
def test_rules_see_whole_examples_and_answer_with_ids_or_names(streaming):
    data = table(LEVELS)
    data = data.to_iterable_dataset() if streaming else data
    seen = []

    def rule(example):
        seen.append(example)
        return example["weather"] if example["label"] else np.int64(0)

    source = RuleContexts(rule, ["rain", "sun"])
    assert source.fitted
    assert ids_of(source.fit(data).apply(data)) == [0, 1, 0, 0, 0, 1]
    assert set(seen[0]) == {"image", "label", "weather"}
    assert isinstance(seen[0]["image"], PIL.Image.Image)
    assert np.array_equal(np.asarray(seen[1]["image"]), np.asarray(picture(200, seed=1)))


def test_rules_on_columns_decode_no_image():
    broken = table(LEVELS).cast_column("image", datasets.Image(decode=False)).to_list()
    for row in broken:
        row["image"]["bytes"] = b"broken"
    data = datasets.Dataset.from_list(broken, features=FEATURES)
    source = RuleContexts(lambda row: row["weather"] == "sun", ["rain", "sun"], columns=["weather"])
    assert source.apply(data)["context_ids"][:] == [0, 1] * 3
    with pytest.raises(DatasetFileError, match="Image 0 of column 'image'"):
        RuleContexts(lambda row: 0, ["x"]).apply(data)
    with pytest.raises(DatasetError, match="did you mean 'weather'"):
        RuleContexts(lambda row: 0, ["x"], columns=["wether"]).apply(data)


@pytest.mark.parametrize("streaming", [False, True])
def test_rules_on_images_agree_with_predict(streaming):
    data = table(LEVELS)
    source = RuleContexts(lambda image: int(np.asarray(image).mean() > 128), ["dark", "bright"], on="image")
    expected = [0, 1, 0, 1, 0, 1]
    assert ids_of(source.apply(data.to_iterable_dataset() if streaming else data)) == expected
    assert source.predict(data["image"][:]).tolist() == expected
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in data["image"]])).permute(0, 3, 1, 2)
    ids = source.predict(pixels)
    assert ids.tolist() == expected
    assert ids.dtype == torch.int64
    assert source.predict(pixels[:, :1]).tolist() == expected
    assert source.predict(pixels[:0]).shape == (0,)


def test_rules_on_images_get_the_mode_asked_for():
    modes = []
    source = RuleContexts(lambda image: modes.append(image.mode) or 0, ["x"], on="image", image_mode="L")
    source.apply(table(LEVELS[:2]))
    source.predict(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    source.predict([picture(9)])
    assert modes == ["L"] * 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (2, "returned 2 for row 1; expected 0 to 1"),
        (-1, "returned -1 for row 1"),
        ("sunn", "called row 1 'sunn'; did you mean 'sun'"),
        (0.5, "returned 0.5 for row 1; expected a context's id or name"),
        (None, "returned None for row 1"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_that_are_no_context_are_named_with_their_row(answer, message, streaming):
    data = table(LEVELS[:2])
    data = data.to_iterable_dataset() if streaming else data
    with pytest.raises(ContextSourceError, match=message):
        ids_of(RuleContexts(lambda row: answer if row["label"] == 1 else 0, ["rain", "sun"]).apply(data))


def test_rules_on_examples_cannot_predict():
    with pytest.raises(ContextSourceError, match="cannot tell a context from pixels"):
        RuleContexts(lambda row: 0, ["x"]).predict(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (InputTypeError, ("label", ["x"]), {}),
        (ConfigError, (len, "day"), {}),
        (ConfigError, (len, ["x", "x"]), {}),
        (ConfigError, (len, []), {}),
        (ConfigError, (len, ["x", 1]), {}),
        (ConfigError, (len, ["x"]), {"on": "images"}),
        (ConfigError, (len, ["x"]), {"on": "image", "columns": ["image"]}),
        (ConfigError, (len, ["x"]), {"columns": "label"}),
        (ConfigError, (len, ["x"]), {"columns": [3]}),
        (ConfigError, (len, ["x"]), {"image_column": True}),
        (ConfigError, (len, ["x"]), {"image_mode": "CMYK"}),
    ],
)
def test_bad_rules_are_refused(error, arguments, options):
    with pytest.raises(error):
        RuleContexts(*arguments, **options)


def test_rules_are_saved_without_code(tmp_path):
    RuleContexts(lambda row: row["label"] == 2, ["no", "yes"], columns=["label"]).save(tmp_path)
    assert "lambda" in (tmp_path / "context_source.json").read_text()
    with pytest.raises(ContextSourceError, match=r"saved without its code.*load\(folder, fn=function\)"):
        ContextSource.load(tmp_path)
    loaded = ContextSource.load(tmp_path, fn=lambda row: "yes")
    assert loaded.names == ("no", "yes")
    assert loaded.columns == ("label",)
    assert loaded.apply(table(LEVELS[:2]))["context_ids"][:] == [1, 1]


def test_brightness_parts_day_from_night():
    data = datasets.DatasetDict(train=table(LEVELS), test=table([50, 210]))
    source = BrightnessContexts().fit(data)
    assert source.names == ("day", "night")
    assert 60 < source.threshold < 190
    applied = source.apply(data)
    assert applied["train"]["context_ids"][:] == [1, 0, 1, 0, 1, 0]
    assert applied["test"]["context_ids"][:] == [1, 0]
    assert applied["test"].features["context_ids"].names == ["day", "night"]


def test_brightness_is_fitted_on_the_training_split_alone():
    one = BrightnessContexts().fit(datasets.DatasetDict(train=table(LEVELS), test=table([0, 0])))
    two = BrightnessContexts().fit(datasets.DatasetDict(train=table(LEVELS), test=table([255, 1])))
    assert one.threshold == two.threshold


def test_fitting_on_a_test_split_warns():
    data = table(LEVELS)
    data = datasets.Dataset(data.data, data.info, split="test")
    with pytest.warns(UserWarning, match="contexts of test data must come from training data"):
        BrightnessContexts().fit(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_brightness_takes_images_of_any_size_and_predict_agrees(num_workers):
    sizes = [(4, 5), (9, 2), (1, 1), (4, 5), (9, 2), (30, 40)]
    data = table(LEVELS, sizes)
    source = BrightnessContexts(num_workers=num_workers).fit(data)
    expected = [1, 0, 1, 0, 1, 0]
    assert source.apply(data)["context_ids"][:] == expected
    assert ids_of(source.apply(data.to_iterable_dataset())) == expected
    assert source.predict(data["image"][:]).tolist() == expected
    assert source.predict(data["image"][0]).tolist() == [1]
    assert BrightnessContexts().fit_images(data["image"][:]).threshold == source.threshold
    assert BrightnessContexts().fit(data.to_iterable_dataset()).threshold == source.threshold


def test_mean_luma_is_that_of_the_standard():
    pixels = torch.randint(0, 256, (3, 3, 7, 9), dtype=torch.uint8)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    reference = (pixels.double() * weights[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(mean_luma(pixels), reference, rtol=1e-12, atol=0)
    assert mean_luma(torch.full((1, 3, 3, 3), 255, dtype=torch.uint8)).item() == 255


@pytest.mark.parametrize("seed", range(5))
def test_otsu_maximises_the_variance_between_the_groups(seed):
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.normal(60, 20, 30), generator.normal(150, 30, 50), [60.0, 60.0]]).clip(0, 255)

    def between(threshold):
        low, high = values[values < threshold], values[values >= threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    found = otsu_threshold(torch.from_numpy(values))
    assert between(found) == pytest.approx(max(map(between, values)), rel=1e-9)


def test_a_given_threshold_needs_no_fit_and_stays():
    source = BrightnessContexts(threshold=250)
    assert source.fit(table(LEVELS)).threshold == 250
    assert source.predict(torch.full((1, 3, 2, 2), 250, dtype=torch.uint8)).tolist() == [0]
    assert source.predict(torch.full((1, 3, 2, 2), 249, dtype=torch.uint8)).tolist() == [1]


def test_images_of_one_brightness_have_no_threshold():
    data = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", (4, 4), (9, 9, 9))] * 3})
    source = BrightnessContexts()
    with pytest.raises(ContextSourceError, match="same brightness"):
        source.fit(data.cast_column("image", datasets.Image()))
    assert not source.fitted
    with pytest.raises(DatasetError, match="no images"):
        source.fit(table([]))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 300},
        {"threshold": True},
        {"threshold": float("nan")},
        {"threshold": "x"},
        {"names": ["day"]},
        {"num_workers": -1},
        {"num_workers": False},
        {"image_column": ""},
    ],
)
def test_bad_brightness_options_are_refused(options):
    with pytest.raises(ConfigError):
        BrightnessContexts(**options)


def test_brightness_is_saved_and_loaded(tmp_path):
    source = BrightnessContexts(names=("light", "dark"), image_column="image").fit(table(LEVELS))
    source.save(tmp_path)
    loaded = ContextSource.load(tmp_path)
    assert (loaded.threshold, loaded.names, loaded.image_column) == (source.threshold, ("light", "dark"), "image")
    assert loaded.fit(table([0, 10, 20, 250])).threshold != source.threshold


def test_a_jpeg_stream_keeps_its_bytes():
    buffer = io.BytesIO()
    picture(200, 16, 16).save(buffer, "JPEG", quality=30)
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": buffer.getvalue(), "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    applied = BrightnessContexts(threshold=9).apply(data.to_iterable_dataset())
    raw = next(iter(applied.cast_column("image", datasets.Image(decode=False))))
    assert raw["image"]["bytes"] == buffer.getvalue()
    assert next(iter(applied))["image"].format == "JPEG"


def test_day_and_night_photographs(shared_data):
    data = datasets.load_dataset(str(shared_data / "daynight"))
    applied = BrightnessContexts().fit(data).apply(data)
    assert accuracy_score(applied["test"]["label"][:], applied["test"]["context_ids"][:]) >= 0.95
