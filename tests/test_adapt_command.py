"""``cn-hf adapt``: checkpoints meet new domains, by images and by files of contexts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
from datasets import Dataset, Features, Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner, Result

import cn_hf
from cn_hf.adaptation.checkpoint import distance_from
from cn_hf.cli import app
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, ContextIdError, DatasetFileError, PatchError
from cn_hf.hub.preprocessing import save_image_processor
from cn_hf.patching.calibrate import record_moments
from cn_hf.patching.routing import router_of

PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def adapt(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["adapt", *map(str, arguments)])


def done(*arguments: object) -> str:
    result = adapt(*arguments)
    assert result.exit_code == 0, result.exception
    return str(result.output)


def pictures(folder: Path, low: int, high: int, count: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        array = generator.integers(low, high, size=(20, 18, 3)).astype(np.uint8)
        PIL.Image.fromarray(array).save(folder / f"{number:03d}.png")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def patched(kind: str) -> nn.Module:
    """A model with contexts day and night that differ."""
    torch.manual_seed(0)
    if kind == "transformers":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
            patch_size=4, num_labels=3,
        )  # fmt: skip
        model: nn.Module = ViTForImageClassification(config).eval()
    elif kind == "vit":
        model = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=3).eval()
        model.pretrained_cfg |= {"input_size": (3, 16, 16), "crop_mode": "squash", "crop_pct": 1.0}
    else:
        model = timm.create_model("test_resnet", num_classes=3).eval()
        model.pretrained_cfg |= {"input_size": (3, 16, 16), "crop_mode": "squash", "crop_pct": 1.0}
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.fill_(7)
    cn_hf.patch_model(model, "dsbn" if kind == "dsbn" else None, context_names=["day", "night"])
    cn_hf.calibrate(model, {"night": torch.rand(20, 3, 16, 16) * 0.3 - 1}, reference=torch.randn(20, 3, 16, 16))
    router = router_of(model)
    router.pixel_mean, router.pixel_std = PIXELS["mean"], PIXELS["std"]
    return model


@pytest.fixture(params=["resnet", "vit", "transformers", "dsbn"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that keeps its contexts' moments."""
    model = patched(request.param)
    record_moments(model, [{"pixel_values": torch.randn(20, 3, 16, 16), "context_ids": torch.arange(20) % 2}])
    folder = cn_hf.save_pretrained(model, tmp_path / "checkpoint")
    if request.param == "transformers":
        save_image_processor(folder, input_size=(3, 16, 16), **PIXELS)
    return folder


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return cn_hf.save_pretrained(patched("resnet"), tmp_path / "resnet")


@pytest.fixture
def fog(tmp_path: Path) -> Path:
    return pictures(tmp_path / "new" / "fog", 150, 220, 24)


def outputs(folder: Path, context: str) -> Tensor:
    model = cn_hf.from_pretrained(folder)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(x, context_ids=context)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.slow
def test_a_checkpoint_is_given_a_context(checkpoint: Path, fog: Path, tmp_path: Path) -> None:
    before, out = digests(checkpoint), tmp_path / "out"
    told = done(checkpoint, fog, "--name", "fog", "--reference", "day", "-o", out)
    assert digests(checkpoint) == before
    for context in ("day", "night"):
        assert torch.equal(outputs(out, context), outputs(checkpoint, context))
    model = cn_hf.from_pretrained(checkpoint)
    cn_hf.adapt(model, {"fog": fog}, reference="day")
    direct = cn_hf.save_pretrained(model, tmp_path / "direct")
    assert torch.equal(outputs(out, "fog"), outputs(direct, "fog"))
    assert not torch.equal(outputs(out, "fog"), outputs(out, "day"))
    distance = distance_from(model, "fog", ["day", "night"], "day")
    assert "context fog: 24 images, relative to context 'day'" in told
    assert f"median {sorted(distance.shifts.values())[len(distance.shifts) // 2]:.3g}, " in told
    assert f"written to {out}, contexts: day, night, fog" in told
    assert (out / "preprocessor_config.json").exists() == (checkpoint / "preprocessor_config.json").exists()
    again = done(out, fog, "--name", "haze", "-o", out)  # over itself, since it was asked
    assert "contexts: day, night, fog, haze" in again


@pytest.mark.slow
def test_a_context_travels_alone(checkpoint: Path, fog: Path, tmp_path: Path) -> None:
    dusk, both = pictures(tmp_path / "new" / "dusk", 20, 60, 20, seed=3), tmp_path / "both"
    for name, images in (("fog", fog), ("dusk", dusk)):
        told = done(checkpoint, images, "--name", name, "--norms-only", "-o", tmp_path / f"{name}.safetensors")
        assert f"written to {tmp_path / name}.safetensors, " in told
        assert (tmp_path / f"{name}.safetensors").stat().st_size < 60_000
        done(checkpoint, images, "--name", name, "-o", tmp_path / name)
    done(checkpoint, "--from", tmp_path / "fog.safetensors", "--from", tmp_path / "dusk.safetensors", "-o", both)
    for name in ("fog", "dusk"):
        torch.testing.assert_close(outputs(both, name), outputs(tmp_path / name, name), rtol=1e-4, atol=1e-5)
    for name in ("day", "night"):
        assert torch.equal(outputs(both, name), outputs(checkpoint, name))
    kept = {folder: router_of(cn_hf.from_pretrained(tmp_path / folder)).moments for folder in ("fog", "both")}
    for slot, stored in kept["fog"].items():
        for part in ("mean", "variance", "images"):
            torch.testing.assert_close(getattr(kept["both"][slot], part)[2], getattr(stored, part)[2])
    renamed = tmp_path / "renamed"
    done(checkpoint, "--from", tmp_path / "fog.safetensors", "--name", "mist", "-o", renamed)
    assert torch.equal(outputs(renamed, "mist"), outputs(both, "fog"))


@pytest.mark.slow
def test_a_file_of_another_model_is_refused(resnet: Path, fog: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "fog.safetensors", tmp_path / "out"
    done(resnet, fog, "--name", "fog", "--norms-only", "-o", file)
    other = cn_hf.save_pretrained(patched("vit"), tmp_path / "vit")
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    nameless = {**metadata, "cn_hf_context": json.dumps({"format": 1})}
    newer = {**metadata, "cn_hf_context": metadata["cn_hf_context"].replace('"format": 1', '"format": 2')}
    first = next(name for name in tensors if name.endswith(".variance"))
    wrong = {
        "missing": None,
        "plain": (tensors, {"format": "pt"}),
        "nameless": (tensors, nameless),
        "newer": (tensors, newer),
        "narrow": ({**tensors, first: tensors[first][:, :-1].contiguous()}, metadata),
        "negative": ({**tensors, first: -tensors[first]}, metadata),
        "infinite": ({**tensors, first: tensors[first] / 0}, metadata),
        "short": ({name: value for name, value in tensors.items() if name != first}, metadata),
        "more": ({**tensors, "other.mean": tensors[first].clone()}, metadata),
    }
    for name, content in wrong.items():
        if content is not None:
            safetensors.torch.save_file(content[0], tmp_path / name, content[1])
        assert isinstance(adapt(resnet, "--from", tmp_path / name, "-o", out).exception, CheckpointError), name
    (tmp_path / "text").write_text("no tensors")
    assert isinstance(adapt(resnet, "--from", tmp_path / "text", "-o", out).exception, CheckpointError)
    refused = adapt(other, "--from", file, "-o", out)
    assert isinstance(refused.exception, CheckpointError)
    assert "other slots" in str(refused.exception)
    taken = adapt(resnet, "--from", file, "--name", "day", "-o", out)
    assert isinstance(taken.exception, ConfigError)
    assert not out.exists()
    model = cn_hf.from_pretrained(resnet)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    changed = cn_hf.save_pretrained(model, tmp_path / "changed")
    result = adapt(changed, "--from", file, "-o", out)
    assert result.exit_code == 0
    assert "warning: The context of" in result.stderr


@pytest.mark.slow
def test_every_way_to_name_images(resnet: Path, fog: Path, tmp_path: Path) -> None:
    files = sorted(fog.glob("*.png"))
    Dataset.from_dict({"image": [str(file) for file in files]}, features=Features({"image": Image()})).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    ways = {
        "folder": [fog],
        "above": [fog.parent],
        "files": files,
        "pattern": [f"{fog}/*.png"],
        "list": [f"@{tmp_path / 'list.txt'}"],
        "data": [tmp_path / "data"],
        "split": [tmp_path / "data", "--split", "train"],
        "imagefolder": [fog.parent, "--split", "train"],
    }
    expected = None
    for name, given in ways.items():
        done(resnet, *given, "--name", "fog", "-o", tmp_path / "out" / name)
        found = outputs(tmp_path / "out" / name, "fog")
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, msg=name)
    few = adapt(resnet, fog, "--name", "fog", "--max-images", 8, "-o", tmp_path / "few")
    assert few.exit_code == 0
    assert "warning: Contexts measured on fewer than 16 images: 'fog' (8)" in few.stderr
    assert "UserWarning" not in few.stderr


def test_a_reference(fog: Path, tmp_path: Path) -> None:
    model = patched("vit")
    router_of(model).moments = {}
    bare, day = cn_hf.save_pretrained(model, tmp_path / "bare"), pictures(tmp_path / "day", 0, 255, 20, seed=5)
    refused = adapt(bare, fog, "--name", "fog", "-o", tmp_path / "out")
    assert isinstance(refused.exception, PatchError)
    assert "reference images" in str(refused.exception)
    mistyped = adapt(bare, fog, "--name", "fog", "--reference", "dya", "-o", tmp_path / "out")
    assert isinstance(mistyped.exception, ContextIdError)
    assert "'day'" in str(mistyped.exception)
    assert not (tmp_path / "out").exists()
    done(bare, fog, "--name", "fog", "--reference", day, "-o", tmp_path / "mean")
    told = done(bare, fog, "--name", "fog", "--reference", f"day={day}", "-o", tmp_path / "named")
    assert "relative to context 'day'" in told
    cn_hf.adapt(model, {"fog": fog}, reference={"day": day})
    direct = cn_hf.save_pretrained(model, tmp_path / "direct")
    assert torch.equal(outputs(tmp_path / "named", "fog"), outputs(direct, "fog"))
    assert not torch.equal(outputs(tmp_path / "mean", "fog"), outputs(direct, "fog"))


def test_what_is_there_is_left_alone(resnet: Path, fog: Path, tmp_path: Path) -> None:
    own, note = tmp_path / "own", tmp_path / "note.txt"
    own.mkdir()
    (own / "thesis.tex").write_text("x")
    note.write_text("x")
    for output, more in ((own, ()), (note, ()), (own, ("--norms-only",)), (note, ("--norms-only",))):
        refused = adapt(resnet, fog, "--name", "fog", *more, "-o", output)
        assert isinstance(refused.exception, CheckpointError), output
        assert "something else" in str(refused.exception)
    assert [path.name for path in own.iterdir()] == ["thesis.tex"]
    assert note.read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    done(resnet, fog, "--name", "fog", "-o", empty)


def test_bad_input(resnet: Path, fog: Path, tmp_path: Path) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    pictures(broken, 0, 255, 3)
    (broken / "x.png").write_text("no image")
    (tmp_path / "nothing").mkdir()
    wrong: list[tuple[list[object], type[CnHfError], str]] = [
        ([resnet], ConfigError, "--from FILE"),
        ([resnet, fog, "--from", "x"], ConfigError, "both"),
        ([resnet, fog], ConfigError, "--name"),
        ([resnet, "--from", "x", "--norms-only"], ConfigError, "exclude"),
        ([resnet, "--from", "x", "--from", "y", "--name", "fog"], ConfigError, "2 files"),
        ([resnet, fog, "--name", "day"], ConfigError, "already"),
        ([resnet, fog, "--name", "fog", "--prior", "-1"], ConfigError, "prior"),
        ([resnet, fog, "--name", "fog", "--max-images", "0"], ConfigError, "max_images"),
        ([resnet, tmp_path / "absent", "--name", "fog"], DatasetFileError, "absent"),
        ([resnet, tmp_path / "absent.png", "--name", "fog"], DatasetFileError, "absent.png"),
        ([resnet, tmp_path / "nothing", "--name", "fog"], DatasetFileError, "nothing"),
        ([resnet, broken, "--name", "fog"], DatasetFileError, "x.png"),
        ([tmp_path / "nowhere", fog, "--name", "fog"], CheckpointError, "nowhere"),
        ([fog, fog, "--name", "fog"], CheckpointError, "context_norm.json"),
    ]
    for arguments, error, words in wrong:
        result = adapt(*arguments, "-o", out)
        assert isinstance(result.exception, error), (arguments, result.exception)
        assert words in str(result.exception), result.exception
        assert result.exit_code == 1
    assert not out.exists()
    assert adapt(resnet, fog, "--name", "fog").exit_code != 0  # without -o
