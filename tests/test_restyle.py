"""Restyling: the formula against numpy, every kind of image, files and the command line, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import cn_hf
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import (
    CheckpointError,
    ConfigError,
    ContextIdError,
    DatasetError,
    DatasetFileError,
    InputShapeError,
    InputTypeError,
    PatchError,
)
from cn_hf.evaluation.contact_sheet import write_contact_sheet
from cn_hf.hub.restyle_command import restyle as command
from cn_hf.hub.restyle_files import restyle_files
from cn_hf.patching.restyle import restyle
from cn_hf.reading.statistics import channel_statistics
from cn_hf.recipes.siamese.restyling import Levels, learned_levels, measure_shift

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
# Of each context's pixels in 0..1: well inside of it, so that nothing clips.
DAY = ((0.6, 0.55, 0.5), (0.1, 0.12, 0.09))
NIGHT = ((0.3, 0.25, 0.3), (0.04, 0.05, 0.04))
DUSK = ((0.45, 0.4, 0.35), (0.08, 0.1, 0.07))
LOOKS = {"day": DAY, "night": NIGHT, "dusk": DUSK}


def model_of(
    names: tuple[str, ...] | None = ("day", "night", "dusk"), channels: int = 3, **options: object
) -> nn.Module:
    """A ViT whose input contexts have the looks above, the same at every call."""
    torch.manual_seed(7)
    model = timm.create_model("test_vit", img_size=32, num_classes=4, in_chans=channels)
    settings = {"mode": "cn-channels", "where": "input", "num_contexts": 3, "context_names": names, **options}
    cn_hf.patch_model(model, **settings)
    cn_hf.set_inference(model, "cn+", mean=MEAN[:channels], std=STD[:channels])
    norm = model.patch_embed.proj.normalizer
    looks = torch.tensor(list(LOOKS.values()), dtype=torch.float64)[:, :, :channels]
    mean, std = (torch.tensor(values[:channels], dtype=torch.float64) for values in (MEAN, STD))
    norm.set_statistics((looks[:, 0] - mean) / std, (looks[:, 1] / std).square() - norm.eps)
    return model.eval()


def photograph(height: int = 9, width: int = 7, *, seed: int = 0, look: str = "day") -> np.ndarray:
    """Pixels (H, W, 3) in levels with about the look of a context, far from black and white."""
    noise = np.random.default_rng(seed).uniform(-1.5, 1.5, (height, width, 3))
    mean, std = (np.array(values) for values in LOOKS[look])
    return np.round(255 * (mean + std * noise)).astype(np.uint8)


def by_hand(levels: np.ndarray, source: str, target: str) -> np.ndarray:
    """x' = (x - mu_s)/sigma_s * sigma_t + mu_t; the normalisation of pixels cancels out."""
    (mean_s, std_s), (mean_t, std_t) = (tuple(np.array(v) for v in LOOKS[name]) for name in (source, target))
    return 255 * ((levels / 255 - mean_s) / std_s * std_t + mean_t)


def tensor_of(*arrays: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize(("source", "target"), [("day", "night"), ("night", "day"), ("dusk", "night"), ("day", "day")])
def test_levels_are_those_of_the_formula(source: str, target: str) -> None:
    photo = photograph(look=source)
    restyled = restyle(model_of(), tensor_of(photo), source, target)
    assert restyled.dtype == torch.uint8
    expected = np.round(by_hand(photo, source, target).clip(0, 255))
    difference = np.abs(restyled[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1  # a value at .5 may fall to either side
    assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_floats_are_restyled_in_the_space_the_model_sees(dtype: torch.dtype, atol: float) -> None:
    mean, std = (np.array(values) for values in (MEAN, STD))
    x = (photograph() / 255 - mean) / std
    expected = (by_hand(photograph(), "day", "night") / 255 - mean) / std
    restyled = restyle(model_of(), tensor_of(x).to(dtype))
    assert restyled.dtype == dtype
    torch.testing.assert_close(restyled.double(), tensor_of(expected), atol=atol, rtol=1e-5)


def test_there_and_back_is_where_it_began() -> None:
    model = model_of()
    x = torch.randn(3, 3, 11, 5)
    back = restyle(model, restyle(model, x, "day", "night", clip=False), "night", "day", clip=False)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    photo = tensor_of(photograph(40, 30))
    night = restyle(model, photo)
    assert int(night.min()) > 0
    assert int(night.max()) < 255
    assert float((restyle(model, night, "night", "day").float() - photo.float()).abs().mean()) <= 1


def test_values_are_clipped_once_at_the_end() -> None:
    model, black, white = model_of(), np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    restyled = restyle(model, tensor_of(black, white), "night", "day")
    assert int(restyled[0].max()) == 0  # below -10 before clipping, which would wrap around
    assert int(restyled[1].min()) == 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    x = (tensor_of(black, white).float() / 255 - mean) / std
    floats = restyle(model, x, "night", "day") * std + mean
    torch.testing.assert_close(floats, tensor_of(black, white).float() / 255, atol=1e-6, rtol=0)
    assert float((restyle(model, x, "night", "day", clip=False) * std + mean).max()) > 1.3


def test_every_image_may_have_contexts_of_its_own() -> None:
    model, photo = model_of(), photograph()
    batch = tensor_of(photo, photo, photo)
    for source, target in ((["day", "night", "dusk"], "night"), (torch.tensor([0, 1, 2]), [1, 1, 1])):
        restyled = restyle(model, batch, source, target)
        for place, name in enumerate(("day", "night", "dusk")):
            assert torch.equal(restyled[place], restyle(model, tensor_of(photo), name, "night")[0])
    several = restyle(model, [PIL.Image.fromarray(photo), PIL.Image.fromarray(photo[:4])], ["day", "dusk"], "night")
    assert np.array_equal(np.asarray(several[1]), np.asarray(restyle(model, PIL.Image.fromarray(photo[:4]), "dusk")))


def test_a_source_that_knows_brightness_names_the_context() -> None:
    model = two_contexts()
    photos = [photograph(look="day"), photograph(look="night")]
    expected = restyle(model, tensor_of(*photos), ["day", "night"], "night")
    assert torch.equal(restyle(model, tensor_of(*photos), None, "night"), expected)
    pictures = restyle(model, [PIL.Image.fromarray(photo) for photo in photos], None, "night")
    assert torch.equal(tensor_of(*(np.asarray(picture) for picture in pictures)), expected)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    floats = restyle(model, (tensor_of(*photos) / 255 - mean) / std, None, "night")
    torch.testing.assert_close(255 * (floats * std + mean), expected.float(), atol=0.51, rtol=0)


def two_contexts() -> nn.Module:
    model = timm.create_model("test_vit", img_size=32, num_classes=4)
    cn_hf.patch_model(model, "cn-channels", where="input", context_names=["day", "night"])
    source = BrightnessContexts(threshold=100)
    cn_hf.set_inference(model, "predict", source=source, mean=MEAN, std=STD)
    norm = model.patch_embed.proj.normalizer
    looks = torch.tensor([DAY, NIGHT], dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    norm.set_statistics((looks[:, 0] - mean) / std, (looks[:, 1] / std).square() - norm.eps)
    return model.eval()


# ----------------------------------------------------------------------------------------------------- kinds of images


def test_the_same_kind_comes_back() -> None:
    model, photo = model_of(), photograph()
    one = restyle(model, tensor_of(photo))
    assert torch.equal(restyle(model, tensor_of(photo)[0]), one[0])
    image = restyle(model, PIL.Image.fromarray(photo))
    assert np.array_equal(np.asarray(image), one[0].permute(1, 2, 0).numpy())
    listed = restyle(model, [PIL.Image.fromarray(photo)])
    assert isinstance(listed, list)
    assert np.array_equal(np.asarray(listed[0]), np.asarray(image))
    assert restyle(model, []) == []
    assert restyle(model, torch.empty(0, 3, 4, 4, dtype=torch.uint8)).shape == (0, 3, 4, 4)
    assert restyle(model, torch.empty(2, 3, 0, 4)).shape == (2, 3, 0, 4)
    assert model.training is False


def test_images_of_different_sizes_keep_theirs_and_their_order() -> None:
    model = model_of()
    sizes = [(4, 6), (1, 1), (4, 6), (31, 2), (1, 1)]
    photos = [photograph(*size, seed=place) for place, size in enumerate(sizes)]
    restyled = restyle(model, [PIL.Image.fromarray(photo) for photo in photos])
    for photo, image in zip(photos, restyled, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(restyle(model, PIL.Image.fromarray(photo))))


def test_alpha_stays() -> None:
    photo, alpha = photograph(), np.arange(63, dtype=np.uint8).reshape(9, 7)
    image = PIL.Image.fromarray(np.dstack([photo, alpha]), "RGBA")
    restyled = np.asarray(restyle(model_of(), image))
    assert np.array_equal(restyled[..., 3], alpha)
    assert np.array_equal(restyled[..., :3], np.asarray(restyle(model_of(), PIL.Image.fromarray(photo))))
    gray = PIL.Image.merge("LA", [PIL.Image.fromarray(photo[..., 0]), PIL.Image.fromarray(alpha)])
    assert np.array_equal(np.asarray(restyle(model_of(), gray))[..., 3], alpha)
    palette = PIL.Image.fromarray(photo).quantize(8)
    palette.info["transparency"] = bytes([0, 128, 255])
    through = restyle(model_of(), palette)
    assert np.array_equal(np.asarray(through)[..., 3], np.asarray(palette.convert("RGBA"))[..., 3])
    assert "transparency" not in through.info


def test_other_modes_come_back_in_colour() -> None:
    model, photo = model_of(), photograph()
    gray = PIL.Image.fromarray(photo[..., 0])
    expected = np.asarray(restyle(model, gray.convert("RGB")))
    assert np.array_equal(np.asarray(restyle(model, gray)), expected)
    wide = PIL.Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    assert wide.mode.startswith("I")
    assert np.array_equal(np.asarray(restyle(model, wide)), expected)
    brighter = np.minimum(photo[..., 0].astype(np.int64) * 257 + 256, 65535).astype(np.uint16)
    assert np.array_equal(np.asarray(restyle(model, PIL.Image.fromarray(brighter))), expected)  # 257 levels each
    for mode in ("CMYK", "YCbCr", "P", "1", "HSV", "LAB"):
        image = PIL.Image.fromarray(photo).convert(mode) if mode != "LAB" else PIL.Image.new("LAB", (3, 2), (120, 9, 9))
        restyled = restyle(model, image)
        assert (restyled.mode, restyled.size) == ("RGB", image.size)


def test_a_model_of_gray_images_gives_gray_ones() -> None:
    photo = photograph()
    restyled = restyle(model_of(channels=1), PIL.Image.fromarray(photo[..., 0]))
    assert restyled.mode == "L"
    assert np.abs(np.asarray(restyled) - by_hand(photo, "day", "night")[..., 0]).max() <= 0.51
    assert restyle(model_of(channels=1), PIL.Image.fromarray(photo)).mode == "L"


def test_orientation_and_profile_go_along_where_they_are_true() -> None:
    image = PIL.Image.fromarray(photograph())
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.info |= {"exif": exif.tobytes(), "icc_profile": b"profile"}
    restyled = restyle(model_of(), image)
    assert restyled.size == image.size
    assert restyled.getexif()[0x0112] == 6
    assert restyled.info["icc_profile"] == b"profile"
    turned = PIL.Image.fromarray(photograph())
    turned.getexif()[0x0112] = 3
    assert restyle(model_of(), turned).getexif()[0x0112] == 3
    printed = image.convert("CMYK")
    printed.info["icc_profile"] = b"of four inks"
    assert "icc_profile" not in restyle(model_of(), printed).info


def test_it_works_between_any_contexts_of_any_model_with_channels_on_its_input() -> None:
    photo = tensor_of(photograph())
    unnamed = model_of(None)
    assert torch.equal(restyle(unnamed, photo, 0, 1), restyle(model_of(), photo))
    for name, options in (("resnet18", {}), ("test_convnext", {}), ("test_resnet", {"in_chans": 3})):
        model = timm.create_model(name, **options)
        cn_hf.patch_model(
            model, "cn-channels", where="input", context_names=["x", "y", "z", "w"], parametrization="table"
        )
        assert torch.equal(restyle(model, photo, "w", "x"), photo)  # right after patching all contexts are alike
    both = timm.create_model("test_vit", img_size=32)
    cn_hf.patch_model(both, "cn", where="paper", context_names=["day", "night"])
    assert torch.equal(restyle(both, photo), photo)
    inner = timm.create_model("test_resnet")
    cn_hf.patch_model(inner, "cn-channels", where=["bn1"], context_names=["day", "night"])
    with pytest.raises(PatchError, match="name a slot: bn1"):
        restyle(inner, photo)
    with pytest.raises(InputShapeError, match=r"\(N, 32, H, W\)"):
        restyle(inner, photo, slot="bn1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    photo = tensor_of(photograph())
    restyled = restyle(model_of().cuda(), photo.cuda())
    assert restyled.is_cuda
    assert int((restyled.cpu().int() - restyle(model_of(), photo).int()).abs().max()) <= 1
    image = restyle(model_of().cuda(), PIL.Image.fromarray(photograph()))
    assert int((tensor_of(np.asarray(image)).int() - restyled.cpu().int()).abs().max()) <= 1


# ------------------------------------------------------------------------------------------------------------- refusals


def test_models_without_channels_on_their_input_are_refused() -> None:
    photo = tensor_of(photograph())
    plain = timm.create_model("test_vit", img_size=32)
    with pytest.raises(PatchError, match="not a patched model"):
        restyle(plain, photo)
    patches = cn_hf.patch_model(plain, "cn-patches", context_names=["day", "night"])
    with pytest.raises(PatchError, match=r"no CN-Channels on its input .*mode='cn-channels', where='input'"):
        restyle(patches, photo)
    baseline = cn_hf.patch_model(timm.create_model("test_vit", img_size=32), "bn")
    with pytest.raises(PatchError, match="no CN-Channels on its input"):
        restyle(baseline, photo)
    with pytest.raises(PatchError, match=r"No CN-Channels at 'proj'; .*'patch_embed.proj'"):
        restyle(model_of(), photo, slot="proj")


def test_unknown_contexts_are_refused_and_the_nearest_named() -> None:
    photo = tensor_of(photograph())
    with pytest.raises(ContextIdError, match="Unknown context 'nigth'; did you mean 'night'"):
        restyle(model_of(), photo, "day", "nigth")
    with pytest.raises(ContextIdError, match="Unknown context 'dya'; did you mean 'day'"):
        restyle(model_of(), [PIL.Image.fromarray(photograph())], "dya")
    with pytest.raises(ContextIdError, match="no names: give integers"):
        restyle(model_of(None), photo)
    with pytest.raises(ContextIdError, match=r"0\.\.2; sample 0 has 3"):
        restyle(model_of(), photo, 3, 0)
    with pytest.raises(ContextIdError, match="2 context_ids for a batch of 1"):
        restyle(model_of(), photo, ["day", "day"])
    with pytest.raises(ContextIdError, match="not weights"):
        restyle(model_of(), photo, torch.tensor([[0.5, 0.5, 0.0]]))
    with pytest.raises(ContextIdError, match=r"no context source .*'day', 'night', 'dusk'"):
        restyle(model_of(), photo, None, "night")


def test_images_that_are_none_are_refused() -> None:
    model = model_of()
    with pytest.raises(InputTypeError, match=r"uint8 or floating point, received torch.int64"):
        restyle(model, torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    for wrong in (torch.zeros(1, 1, 4, 4), torch.zeros(4, 4), torch.zeros(1, 4, 4, 3)):
        with pytest.raises(InputShapeError, match=r"Expected images \(N, 3, H, W\)"):
            restyle(model, wrong)
    with pytest.raises(InputTypeError, match="a list of PIL images, received ndarray"):
        restyle(model, photograph())
    with pytest.raises(InputTypeError, match="received str"):
        restyle(model, ["photograph.jpg"])
    for mode, reason in (("F", "floats have no known black and white"), ("I", "more than 16 bits")):
        with pytest.raises(InputTypeError, match=reason):
            restyle(model, PIL.Image.new(mode, (2, 2), 70000))
    with pytest.raises(InputShapeError, match="input has 2 channels"):
        restyle(model_of(channels=2), PIL.Image.fromarray(photograph()))


def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(ContextIdError, match=r"context_ids must be .* received NoneType"):
        restyle(model_of(), torch.zeros(1, 3, 4, 4), "day", None)  # type: ignore[arg-type]  # what is tested


def test_floats_of_another_scale_are_refused() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"between -2 \(black\) and 3 \(white\); received 0 to 200.*clip=False"):
        restyle(model, torch.linspace(0, 200, 48).view(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="lie between"):
        restyle(model, torch.full((1, 3, 4, 4), float("nan")))
    with pytest.raises(ConfigError, match="Expected 1 or 3 values of mean, received 2"):
        cn_hf.set_inference(model, "cn+", mean=(0.5, 0.5), std=(1.0, 1.0))


# ------------------------------------------------------------------------------------------------------ files, commands


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cn_hf.save_pretrained(model_of(), tmp_path_factory.mktemp("model"), model_args={"img_size": 32})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    image, exif = PIL.Image.fromarray(photograph(20, 30)), PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.png", exif=exif)
    image.save(folder / "b.jpg", exif=exif)
    image.resize((8, 5)).save(folder / "c.webp", lossless=True, exif=exif)
    image.putalpha(100)
    image.save(folder / "d.png")
    image.convert("L").save(folder / "e.bmp")
    return folder


def test_files_keep_name_size_orientation_and_alpha(saved: Path, files: Path, tmp_path: Path) -> None:
    paths = sorted(files.iterdir())
    written = restyle_files(paths, saved, tmp_path / "out", source="day")
    assert [path.name for path in written] == [path.name for path in paths]
    with PIL.Image.open(written[0]) as restyled, PIL.Image.open(paths[0]) as original:
        assert restyled.getexif()[0x0112] == 6
        assert np.array_equal(np.asarray(restyled), np.asarray(restyle(model_of(), original)))
    for path in written[1:3]:
        with PIL.Image.open(path) as restyled:
            assert restyled.getexif()[0x0112] == 6
            assert restyled.size == ((8, 5) if path.suffix == ".webp" else (30, 20))
    with PIL.Image.open(written[3]) as restyled:
        assert restyled.mode == "RGBA"
        assert set(np.asarray(restyled)[..., 3].flat) == {100}
    assert not list((tmp_path / "out").glob(".*"))
    (single,) = restyle_files([paths[0]], saved, tmp_path / "one.bmp", source="day")
    with PIL.Image.open(single) as upright:  # the format has no orientation, so it is applied
        assert upright.size == (20, 30)


def test_of_two_contexts_the_source_is_the_other_one_or_what_brightness_says(files: Path, tmp_path: Path) -> None:
    model = two_contexts()
    folder = cn_hf.save_pretrained(model, tmp_path / "knows", model_args={"img_size": 32})
    photos = {"bright": photograph(look="day"), "dark": photograph(look="night")}
    for name, photo in photos.items():
        PIL.Image.fromarray(photo).save(tmp_path / f"{name}.png")
    bright, dark = restyle_files([tmp_path / "bright.png", tmp_path / "dark.png"], folder, tmp_path / "told")
    assert np.array_equal(np.asarray(PIL.Image.open(dark)), photos["dark"])  # it is night already
    assert not np.array_equal(np.asarray(PIL.Image.open(bright)), photos["bright"])
    model.router.source = None
    folder = cn_hf.save_pretrained(model, tmp_path / "does not", model_args={"img_size": 32})
    (dark,) = restyle_files([tmp_path / "dark.png"], folder, tmp_path / "other.png")
    expected = restyle(model, PIL.Image.fromarray(photos["dark"]), "day", "night")
    assert np.array_equal(np.asarray(PIL.Image.open(dark)), np.asarray(expected))


def test_the_command_line(saved: Path, files: Path, tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    arguments = [str(files / "a.png"), str(files / "d.png"), "--model", str(saved), "--from", "day", "--no-progress"]
    done = CliRunner().invoke(app, [*arguments, "--to", "night", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "2 images written" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    failed = CliRunner().invoke(app, [*arguments, "--to", "nihgt", "-o", str(tmp_path / "new")])
    assert isinstance(failed.exception, ContextIdError)
    failed = CliRunner().invoke(app, [*arguments, "--to", "night", "-o", str(tmp_path / "new"), "--device", "gpu"])
    assert isinstance(failed.exception, ConfigError)
    assert "device 'gpu' cannot be had" in str(failed.exception)
    assert not (tmp_path / "new").exists()


def test_files_that_cannot_be_are_named_before_anything_is_written(saved: Path, files: Path, tmp_path: Path) -> None:
    good, out = files / "a.png", tmp_path / "out"
    (files / "broken.png").write_bytes(good.read_bytes()[:60])
    (files / "text.jpg").write_text("no image")
    PIL.Image.new("I", (2, 2), 70000).save(files / "wide.tif")
    frames = [PIL.Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(files / "film.gif", save_all=True, append_images=frames[1:])
    for name, reason in (
        ("absent.png", "no file .*absent.png; did you mean"), ("text.jpg", "text.jpg cannot be read"),
        ("film.gif", "film.gif holds 2 frames"),
    ):  # fmt: skip
        with pytest.raises(DatasetFileError, match=reason):
            restyle_files([good, files / name], saved, out, source="day")
    assert not out.exists()
    for name in ("broken.png", "wide.tif"):
        with pytest.raises(DatasetFileError, match=name):
            restyle_files([files / name], saved, out, source="day")
    with pytest.raises(ContextIdError, match="no context source"):
        restyle_files([good], saved, out)
    (files / "folder.png").mkdir()
    with pytest.raises(DatasetFileError, match="is a folder"):
        restyle_files([files / "folder.png"], saved, out, source="day")


def test_outputs_that_cannot_be_are_refused(saved: Path, files: Path, tmp_path: Path) -> None:
    good = files / "a.png"
    other = tmp_path / "a.png"
    other.write_bytes(good.read_bytes())
    for paths, output, reason in (
        ([good, other], tmp_path / "out", "would both become"), ([good], files, "replaced by its own result"),
        ([good, files / "b.jpg"], tmp_path / "one.png", "2 images cannot go into the one file"),
        ([], tmp_path / "out", "no image was given"), ([files / "d.png"], tmp_path / "x.jpg", "cannot hold .* alpha"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            restyle_files(paths, saved, output, source="day")
    with pytest.raises(CheckpointError, match="is there already"):
        restyle_files([good], saved, other, source="day")
    before = other.read_bytes()
    restyle_files([good], saved, other, source="day", overwrite=True)
    assert other.read_bytes() != before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        restyle_files([good], saved, tmp_path / "file" / "out", source="day")


# ------------------------------------------------------------------------------------------------------------ measuring


def test_a_shift_is_measured_against_real_images() -> None:
    model = model_of()
    days, nights = (tensor_of(*(photograph(16, 12, seed=s, look=look) for s in range(6))) for look in ("day", "night"))
    images, contexts = torch.cat([days, nights]), torch.arange(12) // 6
    shift = measure_shift(model, images, contexts, "day", "night")
    assert (shift.images, shift.real_images) == (6, 6)
    for levels, of in ((shift.original, days), (shift.real, nights), (shift.restyled, restyle(model, days))):
        assert levels.mean == pytest.approx([255 * value for value in channel_statistics(of)[0]])
        assert levels.std == pytest.approx(of.double().std((0, 2, 3), correction=0).tolist(), rel=1e-6)
    by_channel = [abs(a - b) for a, b in zip(shift.original.mean, shift.real.mean, strict=True)]
    assert shift.before[0] == pytest.approx(sum(by_channel) / 3)
    assert shift.after[0] < 0.05 * shift.before[0]
    assert shift.after[1] < 0.2 * shift.before[1]
    assert shift.clipped == 0
    assert shift.cycle_error < 1e-3
    assert shift.cycle_error_8bit == shift.cycle_error_clipped <= 1
    learned = learned_levels(model)
    assert learned["night"].mean == pytest.approx([255 * value for value in NIGHT[0]], rel=1e-4)
    assert learned["night"].std == pytest.approx([255 * value for value in NIGHT[1]], rel=1e-4)
    with pytest.raises(DatasetError, match="no held-out image of context 'dusk'"):
        measure_shift(model, images, contexts, "day", "dusk")


def test_what_clips_is_counted() -> None:
    images = torch.cat([torch.full((1, 3, 2, 2), 10), torch.full((1, 3, 2, 2), 150)]).to(torch.uint8)
    shift = measure_shift(model_of(), images, torch.tensor([1, 0]), "night", "day")
    assert shift.clipped > 0
    assert shift.original.std == (0, 0, 0)
    assert Levels(mean=(1.0,), std=(2.0,)).distance(Levels(mean=(4.0,), std=(1.0,))) == (3.0, 1.0)


def test_a_contact_sheet_holds_its_pictures(tmp_path: Path) -> None:
    pictures = [PIL.Image.new("RGB", (40 + 10 * place, 30), (250, 0, 0)) for place in range(3)]
    path = write_contact_sheet([{"first": pictures}, {"first": pictures}], tmp_path / "sheet.png", title="Title")
    sheet = np.asarray(PIL.Image.open(path).convert("RGB")).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1:].max(-1) < 60)
    columns = np.flatnonzero(np.diff(red.any(0).astype(int)))
    rows = np.flatnonzero(np.diff(red.any(1).astype(int)))
    assert (len(columns), len(rows)) == (6, 4)
    for wrong in ([], [{}], [{"a": []}], [{"a": pictures, "b": pictures[:1]}]):
        with pytest.raises(ConfigError, match="equally many pictures"):
            write_contact_sheet(wrong, path, title="")
