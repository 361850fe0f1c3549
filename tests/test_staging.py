"""Saving over an older checkpoint, killed at every step: what is loaded afterwards is the old one or the new one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import cn_hf
from cn_hf.contexts import BrightnessContexts
from cn_hf.errors import CheckpointError
from cn_hf.hub.staging import settled, staged

CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile")


def vit(value: float, library: str, num_classes: int = 3) -> nn.Module:
    """A tiny patched ViT whose weights, contexts and pixel statistics all say ``value``."""
    if library == "timm":
        arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **arguments)
    else:
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=num_classes, **size))
    cn_hf.patch_model(model, mode="cn-patches", context_names=["a", "b"])
    cn_hf.set_inference(model, "cn+", mean=(value,) * 3, std=(1.0,) * 3, source=BrightnessContexts(value))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model.eval()


def value_of(model: nn.Module) -> float:
    """The one value that all parts of the model say."""
    values = {round(v, 4) for p in model.parameters() for v in p.flatten().tolist()}
    values |= {round(v, 4) for v in model.router.pixel_mean}
    assert len(values) == 1, values
    return values.pop()


WATCHERS: list[Callable[[], None]] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if WATCHERS and (event in CHANGES or writes):
        WATCHERS[-1]()


sys.addaudithook(_watch)


def each_moment(folder: Path, action: Callable[[], object], look: Callable[[int], object]) -> int:
    """Run ``action``, and call ``look`` before each change of a file: a kill there leaves just what it sees."""
    moments = 0

    def watcher() -> None:
        nonlocal moments
        moments += 1
        WATCHERS.append(lambda: None)
        try:
            look(moments)
        finally:
            WATCHERS.pop()

    WATCHERS.append(watcher)
    try:
        action()
    finally:
        WATCHERS.pop()
    return moments


def content_of(folder: Path) -> dict[str, bytes]:
    """Files that a reader may look at."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cn_hf-saving-")}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def with_base(folder: Path) -> nn.Module:
    base = vit(0.25, "timm")
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(base):
            parameter.fill_(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cn_hf.from_pretrained(folder, model=base)


def norms(folder: Path) -> float:
    values = {float(v) for p in cn_hf.context_parameters(with_base(folder)) for v in p.flatten()}
    assert len(values) == 1
    return values.pop()


def own_door(library: str) -> Callable[[Path], float]:
    if library == "timm":
        return lambda folder: value_of(timm.create_model(f"local-dir:{folder}", pretrained=True))
    return lambda folder: value_of(AutoModelForImageClassification.from_pretrained(folder))


def ours(folder: Path) -> float:
    return value_of(cn_hf.from_pretrained(folder))


SHARDS = {"max_shard_size": 600}
CASES = {
    "timm": ("timm", cn_hf.save_pretrained, {}, {}, ours, own_door("timm")),
    "transformers": ("transformers", cn_hf.save_pretrained, {}, {}, ours, own_door("transformers")),
    "shards": ("transformers", cn_hf.save_pretrained, SHARDS, SHARDS, ours, own_door("transformers")),
    "shards over one file": ("timm", cn_hf.save_pretrained, {}, SHARDS, ours, own_door("timm")),
    "one file over shards": ("transformers", cn_hf.save_pretrained, SHARDS, {}, ours, own_door("transformers")),
    "norms": ("timm", cn_hf.save_pretrained, {"norms_only": True}, {"norms_only": True}, norms, norms),
    "norms over a whole model": ("timm", cn_hf.save_pretrained, {}, {"norms_only": True}, norms, norms),
    "timm's own saving": ("timm", timm.models.save_for_hf, {}, {"safe_serialization": True}, ours, own_door("timm")),
    "transformers' own saving": (
        "transformers", lambda m, folder, **options: m.save_pretrained(folder, **options), {}, SHARDS, ours,
        own_door("transformers"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(case, tmp_path):
    library, save, first, second, load, load_as_its_library = CASES[case]
    old, new = vit(0.25, library), vit(0.5, library, 3 if "norms" in case else 4)
    folder = tmp_path / "checkpoint"
    save(old, folder, **first)
    (folder / "mine.txt").write_text("stays")
    seen: dict[int, Path] = {}
    contents: list[dict[str, bytes]] = []

    def look(moment: int) -> None:
        if (content := content_of(folder)) not in contents:
            contents.append(content)
            seen[moment] = Path(shutil.copytree(folder, tmp_path / f"killed-{moment}"))

    assert each_moment(folder, lambda: save(new, folder, **second), look) > 15
    found = []
    for number, killed in enumerate(seen.values()):
        values = {load(killed), load_as_its_library(killed)}
        assert len(values) == 1, f"{killed.name} is read as old and as new"
        found += values
        if number % 3 == 1:  # whatever is there, the next save finds its way and sweeps what was left
            save(new, killed, **second)
            assert not leftovers(killed)
            assert load(killed) == 0.5
        assert (killed / "mine.txt").read_text() == "stays"
    assert set(found) == {0.25, 0.5}
    assert found == sorted(found), "once new, always new"
    assert not leftovers(folder)
    assert load(folder) == 0.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("moment", [3, 22, 30])
def test_a_save_that_is_really_killed(moment, tmp_path):
    cn_hf.save_pretrained(vit(0.25, "timm"), tmp_path)
    new = vit(0.5, "timm", 4)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def kill(at: int) -> None:
            if at == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        each_moment(tmp_path, lambda: cn_hf.save_pretrained(new, tmp_path), kill)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert ours(tmp_path) in (0.25, 0.5)
    cn_hf.save_pretrained(new, tmp_path)
    assert not leftovers(tmp_path)


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    cn_hf.save_pretrained(vit(0.25, "timm"), folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            cn_hf.save_pretrained(vit(0.5, "timm"), folder)
    assert before == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not leftovers(folder)


def test_leftovers_are_swept_but_for_those_of_a_save_at_work(tmp_path):
    cn_hf.save_pretrained(vit(0.25, "timm"), tmp_path)
    digits = "0123456789abcdef" * 2
    (tmp_path / f".model.safetensors.{digits}.tmp").write_text("of an earlier version")
    (tmp_path / f".cn_hf-saving-{digits}").mkdir()
    (tmp_path / ".hidden").write_text("mine")
    with staged(tmp_path) as place:
        assert sorted(leftovers(tmp_path)) == sorted([place.name, ".hidden"])
        cn_hf.save_pretrained(vit(0.5, "timm"), tmp_path)
        (place / "note.txt").write_text("written at the same time")
    assert leftovers(tmp_path) == [".hidden"]
    assert (tmp_path / "note.txt").exists()
    assert ours(tmp_path) == 0.5
    assert settled(tmp_path) == tmp_path


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    cn_hf.save_pretrained(vit(0.25, "timm"), tmp_path)
    cn_hf.save_pretrained(vit(0.5, "timm"), tmp_path)
    assert ours(tmp_path) == 0.5
    assert not leftovers(tmp_path)
