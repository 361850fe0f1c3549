"""Image files on the command line: which are found, what is written of them, and how much memory a large one takes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
from typer.testing import CliRunner

import cn_hf
import cn_hf.models
from cn_hf.cli import app
from cn_hf.errors import ConfigError, DatasetFileError
from cn_hf.hub.description import EMBEDDING
from cn_hf.hub.image_files import find_images, read_image
from cn_hf.hub.prediction import predict
from cn_hf.hub.restyle_files import restyle_files

HOSTILE = ["a b", "a,b", 'a"b', "a\nb", "🦊", "\x1b[31mred"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def saved(folder: Path, task: str | None = None, names: tuple[str, str] = ("day", "night")) -> Path:
    model = timm.create_model("cn_cifar_convnet", num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batch norms that never saw data
        cn_hf.patch_model(model, mode="cn-channels", where="input", context_names=list(names))
    model.router.task = task
    return cn_hf.save_pretrained(model.eval(), folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name in ("b.JPG", "deep/er/a.png", ".hidden/c.png", "deep/.d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "Thumbs.db").write_text("no image")
    (folder / "deep" / "up").symlink_to(folder)
    return folder


def run(*arguments: object, fails: bool = False) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--no-progress"])
    if not fails:
        assert done.exit_code == 0, done.exception
    elif done.exception is not None:
        assert isinstance(done.exception, (DatasetFileError, ConfigError)), done.exception
    assert bool(done.exception) == fails
    return done.stdout


def test_what_paths_name(photos, tmp_path):
    both = [photos / "b.JPG", photos / "deep/er/a.png"]
    assert find_images([photos]) == both
    assert find_images([str(photos / "**/*.png")]) == both[1:]
    assert find_images([photos / "b.JPG", photos / "absent.png"]) == [photos / "b.JPG", photos / "absent.png"]
    (tmp_path / "list").write_text(f"{both[1]}\n\n{photos}\n")
    assert find_images([f"@{tmp_path / 'list'}"]) == [both[1], *both]
    (photos / "a\nb [1].png").write_bytes(both[1].read_bytes())
    (tmp_path / "list").write_bytes(os.fsencode(photos / "a\nb [1].png") + b"\0" + os.fsencode(both[0]) + b"\0")
    assert find_images([f"@{tmp_path / 'list'}"]) == [photos / "a\nb [1].png", both[0]]
    assert find_images([photos / "a\nb [1].png"]) == [photos / "a\nb [1].png"]
    (tmp_path / "empty").mkdir()
    for given in ([tmp_path / "empty"], [tmp_path / "*.webp"], []):
        with pytest.raises(ConfigError, match="Expected image files"):
            find_images(given)
    with pytest.raises(DatasetFileError, match="list"):
        find_images(["@nowhere"])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_of_all_kinds_come_back_from_csv_and_json(kind, checkpoint, tmp_path):
    names = [f"{name}.png" for name in HOSTILE] + [os.fsdecode(b"\xff.png")]
    for name in names:
        PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / name, format="PNG")
    done = subprocess.run(
        [sys.executable, "-m", "cn_hf", "predict", checkpoint, tmp_path, "--format", kind, "--context", "night"],
        capture_output=True, check=True, timeout=300, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    written = os.fsdecode(done.stdout)
    rows = (
        list(csv.DictReader(io.StringIO(written)))
        if kind == "csv"
        else [json.loads(line) for line in written.splitlines()]
    )
    assert sorted(row["path"] for row in rows) == sorted(str(tmp_path / name) for name in names)
    for row in rows:
        assert row["context"] == "night"
        best = row if kind == "csv" else row["classes"][0]
        assert best["label"].startswith("class ")
        assert 1 / 3 <= float(best["probability"]) <= 1


def test_predictions_are_those_of_one_image_at_a_time(checkpoint, photos):
    for number in range(5):
        array = np.random.default_rng(number).integers(0, 255, (9, 7 + number, 3), dtype=np.uint8)
        PIL.Image.fromarray(array).save(photos / f"{number}.png")
    rows = [
        json.loads(line)
        for line in run("predict", checkpoint, photos, "--format", "jsonl", "--batch-size", 2).splitlines()
    ]
    model = cn_hf.from_pretrained(checkpoint)
    for row in rows:
        (alone,) = predict(model, [read_image(Path(row["path"]))])
        assert [c["label"] for c in row["classes"]] == list(alone.labels)
        assert [c["probability"] for c in row["classes"]] == pytest.approx(alone.probabilities, abs=1e-5)


def test_files_that_cannot_be_read_are_left_out_and_named_at_the_end(checkpoint, photos):
    (photos / "broken.png").write_bytes((photos / "b.JPG").read_bytes()[:100])
    os.mkfifo(photos / "pipe.png")
    done = CliRunner().invoke(app, ["predict", str(checkpoint), str(photos), str(photos / "no.png"), "--format", "csv"])
    assert [Path(row["path"]).name for row in csv.DictReader(io.StringIO(done.stdout))] == ["b.JPG", "a.png"]
    assert isinstance(done.exception, DatasetFileError)
    assert "3 of 5 images were left out" in str(done.exception)
    for name in ("broken.png", "pipe.png", "no.png"):
        assert name in str(done.exception)
    only = CliRunner().invoke(app, ["predict", str(checkpoint), str(photos / "b.JPG"), "--max-pixels", "63"])
    assert "Expected at most" in str(only.exception)
    assert "8 x 8 pixels" in str(only.exception)


def test_a_checkpoint_of_another_task_is_refused(photos, tmp_path):
    embeds = saved(tmp_path / "siamese", task=EMBEDDING)
    done = CliRunner().invoke(app, ["predict", str(embeds), str(photos)])
    assert isinstance(done.exception, ConfigError)
    assert "a Siamese network" in str(done.exception)
    assert "%" not in done.stdout
    model = cn_hf.from_pretrained(embeds)
    assert cn_hf.from_pretrained(cn_hf.save_pretrained(model, tmp_path / "again")).router.task == EMBEDDING
    headless = cn_hf.patch_model(timm.create_model("test_vit", num_classes=0), context_names=["a", "b"])
    with pytest.raises(ConfigError, match="without classes"):
        predict(headless.eval(), [PIL.Image.new("RGB", (8, 8))])
    assert "task: image-feature-extraction" in CliRunner().invoke(app, ["inspect", str(embeds)]).stdout


def test_restyle_names_what_is_wrong_with_its_input(checkpoint, photos, tmp_path):
    for given, words in ((photos, "is a folder; name its images"), (photos / "a\0b.png", r"a\\x00b\.png")):
        with pytest.raises(DatasetFileError, match=words):
            restyle_files([given], checkpoint, tmp_path / "out", source="day", target="night")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_bands_give_what_the_whole_gives(mode, checkpoint, tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 255, (61, 90, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(array).convert(mode)
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    model = cn_hf.from_pretrained(checkpoint)
    (whole,) = predict(model, [read_image(path)])
    (restyled,) = restyle_files([path], checkpoint, tmp_path / "whole", source="day", target="night")
    monkeypatch.setattr("cn_hf.hub.preprocessing._BAND_PIXELS", 1000)
    monkeypatch.setattr("cn_hf.hub.restyle_files._BAND_PIXELS", 1000)
    (bands,) = predict(model, [read_image(path)])
    assert bands.probabilities == pytest.approx(whole.probabilities, abs=0.01)
    (again,) = restyle_files([path], checkpoint, tmp_path / "bands", source="day", target="night")
    with PIL.Image.open(restyled) as first, PIL.Image.open(again) as second:
        assert first.mode == second.mode
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert second.getexif().get(0x0112) == (None if mode == "CMYK" else 6)  # Pillow turns TIFF files upright itself


MEMORY = """
import sys
from typer.testing import CliRunner
from cn_hf.cli import app
def peak(*arguments):
    done = CliRunner().invoke(app, [*arguments, "--no-progress"])
    assert done.exit_code == 0, done.exception
    status = open("/proc/self/status").read()  # getrusage's peak would be that of the process before exec
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
command, checkpoint, small, large, out = sys.argv[1:]
arguments = [["predict", checkpoint, file] for file in (small, large)]
if command == "restyle":
    options = ["--model", checkpoint, "--to", "night", "--from", "day", "-o", out]
    arguments = [["restyle", file, *options] for file in (small, large)]
print(peak(*arguments[0]), peak(*arguments[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("command", ["predict", "restyle"])
@pytest.mark.parametrize(("mode", "ending"), [("RGB", "jpg"), ("RGBA", "png")])
def test_a_picture_of_89_megapixels_costs_at_most_a_gigabyte(command, mode, ending, checkpoint, tmp_path):
    small, large = tmp_path / f"small.{ending}", tmp_path / f"large.{ending}"
    PIL.Image.new(mode, (8, 8), "red").save(small)
    PIL.Image.new(mode, (9430, 9430), "red").save(large, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, command, checkpoint, small, large, tmp_path / "out"],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after - before < 1000, f"{after - before:.0f} MB"
