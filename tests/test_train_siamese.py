"""``scripts/train_siamese.py`` from end to end: what it leaves, resumed and on two processes, and bad input."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import cn_hf
from cn_hf.errors import CnHfError, ConfigError, ContextIdError, DatasetError
from cn_hf.patching.restyle import restyle
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.recipes.siamese.networks import SiameseRun
from cn_hf.recipes.siamese.run import train_siamese
from cn_hf.training.checkpoints import newest_step
from cn_hf.training.config import TrainingConfig

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_siamese.py"
LIGHT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PLACES = ("bridge", "harbour", "market", "tower")


def picture(place: int, night: int, generator: np.random.Generator) -> PIL.Image.Image:
    """A place is a bright quarter of the image; by night all is darker, flatter and bluer. Sizes differ."""
    height, width = generator.integers(16, 24, size=2)
    pixels = generator.normal(120, 15, size=(height, width, 3))
    pixels[(place // 2) * height // 2 :][: height // 2, (place % 2) * width // 2 :][:, : width // 2] += 70
    if night:
        pixels = pixels * (0.25, 0.25, 0.4) + 10
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def split_of(count: int, seed: int, places: tuple[str, ...] = PLACES, *, night: Any = None) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    nights = generator.permutation(np.arange(count) % 2) if night is None else np.full(count, night)
    images = [picture(row % len(places), nights[row], generator) for row in range(count)]
    columns = {"image": images, "time": nights, "place": [places[row % len(places)] for row in range(count)]}
    features = {"image": datasets.Image(), "time": datasets.ClassLabel(names=["day", "night"])}
    return datasets.Dataset.from_dict(columns, datasets.Features({**features, "place": datasets.Value("string")}))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "places"
    datasets.DatasetDict(train=split_of(40, 0), test=split_of(24, 1)).save_to_disk(folder)
    return folder


def config_of(dataset: object, **options: object) -> SiameseConfig:
    settings: dict[str, Any] = {
        "dataset": dataset, "identity_column": "place", "contexts": "column:time", "image_size": 32, "epochs": 2,
        "embedding_dim": 8, "batch_size": 10, "warmup_epochs": 0, "augment": ("zoom",), "progress": False,
    }  # fmt: skip
    return SiameseConfig(**{**settings, **options})


def trained(config: SiameseConfig, **flags: bool) -> SiameseRun:
    run = train_siamese(config, **flags)
    assert run is not None
    return run


# ------------------------------------------------------------------------------------------------------- what it leaves


@pytest.fixture(scope="module")
def compared(places: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SiameseRun, Path]:
    folder = tmp_path_factory.mktemp("run") / "compared"
    return trained(config_of(str(places), compare=True, output_dir=str(folder))), folder


def test_three_networks_are_compared_on_the_same_pairs(compared: tuple[SiameseRun, Path]) -> None:
    run, folder = compared
    assert list(run.networks) == ["no contexts", "CN-Channels, identity start", "CN-Channels, calibrated start"]
    plain, identity, calibrated = run.networks.values()
    for network in run.networks.values():
        assert len(network.history.epochs) == 2
        assert list(network.held_out) == ["all", "day-day", "day-night", "night-night"]
        whole = network.held_out["all"]
        parts = [network.held_out[group] for group in ("day-day", "day-night", "night-night")]
        assert sum(part.pairs for part in parts) == whole.pairs == 2 * whole.same
        assert sum(part.correct for part in parts) == whole.correct
        assert {part.threshold for part in (whole, *parts)} == {network.validation.threshold}
    assert plain.shifts == ()
    assert identity.levels_at_start["day"] == identity.levels_at_start["night"]
    for direction in (0, 1):
        assert identity.shifts_at_start[direction].after == pytest.approx(identity.shifts[direction].before, abs=1)
        start, end = calibrated.shifts_at_start[direction], calibrated.shifts[direction]
        assert start.after[0] < 0.1 * start.before[0]
        assert end.after[0] < 0.2 * end.before[0]
        assert end.cycle_error < 1e-3
    assert calibrated.levels_at_start["night"].mean == pytest.approx(end.original.mean, abs=6)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "run.json", "config.yaml", "networks", "curves.png", "contexts.png", "contact_sheet.png", "report.md",
        "results.json", "checkpoint",
    }  # fmt: skip


def test_the_report_says_what_was_measured(compared: tuple[SiameseRun, Path]) -> None:
    run, folder = compared
    report = (folder / "report.md").read_text()
    calibrated = run.networks["CN-Channels, calibrated start"]
    accuracy = calibrated.held_out["all"].accuracy
    assert f"{100 * accuracy:.1f} ± " in report
    assert "4 of the 4 identities of test are also in train (a closed set; images differ)" in report
    assert "CN-Channels, identity start: the learned statistics did not become day and night" in report
    assert "CN-Channels, calibrated start: the learned statistics became day and night" in report
    assert "threshold chosen on validation pairs." in report
    results = json.loads((folder / "results.json").read_text())
    stored = results["networks"]["CN-Channels, calibrated start"]
    assert stored["held_out"]["all"]["accuracy"] == accuracy
    assert stored["restyling"][0]["distance_after"] == list(calibrated.shifts[0].after)
    assert results["data"]["identities_in_both"] == 4
    assert results["environment"]["versions"]["torch"] == torch.__version__
    for name in ("curves.png", "contexts.png", "contact_sheet.png"):
        assert (folder / name).stat().st_size < 500_000
        assert f"![{name}]({name})" in report


def test_the_checkpoint_restyles_as_the_network_did(compared: tuple[SiameseRun, Path]) -> None:
    run, folder = compared
    photo = PIL.Image.fromarray(np.full((5, 4, 3), 130, np.uint8))
    before = restyle(run.networks["CN-Channels, calibrated start"].model, photo)
    assert np.array_equal(np.asarray(restyle(cn_hf.from_pretrained(folder / "checkpoint"), photo)), np.asarray(before))
    assert np.asarray(before).mean() < 70


def test_a_finished_run_is_left_alone(compared: tuple[SiameseRun, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = compared
    before = (folder / "results.json").read_bytes()
    assert train_siamese(run.config, resume=True) is None
    assert "finished; nothing to do" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"margin was 1.0, is 2.0"):
        train_siamese(run.config.replace(margin=2.0), resume=True)


def test_new_objects_brightness_and_views(tmp_path: Path) -> None:
    numbered = {"place": [7, 8, 9] * 8}
    test = split_of(24, 1).remove_columns("place").add_column("place", numbered["place"])
    train = split_of(40, 0).remove_columns("place").add_column("place", [0, 1, 2, 3] * 10)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "open")
    run = trained(config_of(str(tmp_path / "open"), contexts="brightness", epochs=1))
    assert len(run.data.identities) == 7
    from cn_hf.recipes.siamese.results import summary

    assert "0 of the 3 identities of test are also in train (new objects; images differ)" in summary(run)
    views = trained(config_of(str(tmp_path / "open"), identity_column="none", epochs=1, test_split="none"))
    assert views.data.views
    result = views.networks["CN-Channels, calibrated start"].held_out["all"]
    assert (result.pairs, result.same) == (16, 8)
    assert "which are also those reported" in summary(views)


def test_contexts_from_folders_and_from_datasets(tmp_path: Path) -> None:
    for split, count in (("train", 24), ("test", 12)):
        for night, name in enumerate(("day", "night")):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            generator = np.random.default_rng(night)
            for row in range(count):
                picture(row % 4, night, generator).save(folder / f"{row}.png")
    options = {"contexts": "column:label", "identity_column": "none", "epochs": 1}
    run = trained(config_of(str(tmp_path / "folders"), **options))
    assert run.data.prepared.context_names == ("day", "night")
    for night, name in enumerate(("day", "night")):
        splits = {
            split: split_of(24, seed, night=night).remove_columns("time")
            for seed, split in enumerate(("train", "test"))
        }
        labelled = {split: data.class_encode_column("place") for split, data in splits.items()}
        datasets.DatasetDict(labelled).save_to_disk(tmp_path / name)
    blended = trained(config_of((str(tmp_path / "day"), str(tmp_path / "night")), contexts="origin", epochs=1))
    assert blended.data.prepared.context_names == ("day", "night")
    assert len(blended.data.identities) == 4
    assert blended.networks["CN-Channels, calibrated start"].held_out["day-night"].same > 0


@pytest.mark.slow
def test_real_photographs_by_day_and_by_night(shared_data: Path) -> None:
    options = {"identity_column": "identity", "contexts": "column:label", "image_size": 64, "epochs": 3}
    run = trained(config_of(str(shared_data / "daynight_cameras"), **options))
    (network,) = run.networks.values()
    assert len(run.data.identities) == 17
    area = network.held_out["all"].roc_auc
    assert area is not None
    assert area > 0.6
    for shift in network.shifts:
        assert shift.after[0] < 0.5 * shift.before[0]
        assert shift.cycle_error < 1
        assert shift.cycle_error_8bit < 1


# --------------------------------------------------------------------------------------------- resuming, two processes


def script(arguments: list[str], *, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    environment = {**os.environ, **LIGHT, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def arguments_of(config: SiameseConfig, folder: Path, path: Path) -> list[str]:
    path.write_text(config.to_yaml())
    return ["--config", str(path), "--output-dir", str(folder)]


@pytest.mark.slow
def test_killed_resumed_and_shared_runs_end_alike(places: Path, tmp_path: Path) -> None:
    # Adam would make steps of full size from gradients that are nothing but rounding.
    config = config_of(str(places), optimizer="sgd", learning_rate=0.05, epochs=6, checkpoint_steps=3)
    whole = trained(config.replace(output_dir=str(tmp_path / "whole")))
    arguments = arguments_of(config, tmp_path / "killed", tmp_path / "config.yaml")
    running = script(arguments)
    shared = script(arguments_of(config, tmp_path / "shared", tmp_path / "config.yaml"), processes=2)
    deadline = time.monotonic() + 200
    while newest_step(tmp_path / "killed" / "checkpoints") == 0 and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    output = shared.communicate(timeout=300)[0]
    assert shared.returncode == 0, output
    resumed = script([*arguments, "--resume"])
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output
    assert "going on after step" in output
    expected = load_file(tmp_path / "whole" / "checkpoint" / "model.safetensors")
    for folder, tolerance in (("killed", 0.0), ("shared", 1e-5)):
        weights = load_file(tmp_path / folder / "checkpoint" / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=tolerance, rtol=tolerance, msg=f"{folder} {name}")
        results = json.loads((tmp_path / folder / "results.json").read_text())
        (network,) = results["networks"].values()
        (own,) = whole.networks.values()
        losses = [epoch["validation_loss"] for epoch in network["history"]["epochs"]]
        assert losses == pytest.approx(own.history.curve("validation_loss"), abs=max(tolerance, 1e-12))
        assert network["held_out"]["all"]["correct"] == own.held_out["all"].correct


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (
            {"identity_column": None},
            ConfigError,
            r"--identity-column NAME, of 'image' \(Image\), 'time'",
        ),
        ({"identity_column": "palce"}, DatasetError, "no column 'palce' of identities; did you mean 'place'"),
        ({"identity_column": "image"}, DatasetError, "identities are ClassLabels, integers or text"),
        ({"contexts": "none"}, ConfigError, "needs contexts and the data has none; .*column:NAME"),
        ({"contexts": "column:tiem"}, DatasetError, "did you mean 'time'"),
        ({"target_context": "nigth"}, ContextIdError, "unknown context 'nigth' .*did you mean 'night'"),
        (
            {"contexts": "brightness:0"},
            DatasetError,
            r"no image of context 'night' \(images: day 32, night 0",
        ),
        ({"image_size": None}, DatasetError, "One size is needed here"),
        ({"validation_fraction": 0.0}, DatasetError, "threshold is chosen on validation pairs"),
        ({"memory": 0.0}, ConfigError, "do not fit into memory 0 GiB"),
        ({"model": "test_vitt"}, ConfigError, "'test_vit'"),
        ({"optimizer_args": {"beta": 1}}, ConfigError, "did you mean 'betas'"),
        ({"output_dir": None, "resume": True}, ConfigError, "give output_dir"),
    ],
)
def test_what_cannot_be_is_said(
    places: Path, tmp_path: Path, options: dict[str, Any], error: type[CnHfError], reason: str
) -> None:
    options = {"output_dir": str(tmp_path / "run"), **options}
    flags = {"resume": options.pop("resume")} if "resume" in options else {}
    with pytest.raises(error, match=reason):
        train_siamese(config_of(str(places), **options), **flags)
    assert not (tmp_path / "run" / "run.json").exists()  # the corrected command is not refused


def test_data_that_makes_no_pairs_is_refused(tmp_path: Path) -> None:
    for name, train, test, reason in (
        ("one place", split_of(20, 0, ("tower",)), split_of(12, 1), "all 16 images are of one"),
        ("no night", split_of(20, 0, night=0), split_of(12, 1), "'train' has no image of context 'night'"),
        ("no test night", split_of(40, 0), split_of(12, 1, night=0), "'test' has no image of context 'night'"),
    ):
        datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / name)
        with pytest.raises(DatasetError, match=reason):
            train_siamese(config_of(str(tmp_path / name)))
    single = split_of(20, 0).cast_column("time", datasets.Value("int64")).remove_columns("time")
    single = single.add_column("time", ["day"] * 20)
    datasets.DatasetDict(train=single, test=single).save_to_disk(tmp_path / "one context")
    with pytest.raises(DatasetError, match=r"two contexts at least; contexts 'column:time' give \['day'\]"):
        train_siamese(config_of(str(tmp_path / "one context")))
    missing = split_of(20, 0)
    missing = missing.remove_columns("place").add_column("place", ["tower"] * 19 + [None])
    datasets.DatasetDict(train=missing, test=split_of(12, 1)).save_to_disk(tmp_path / "missing")
    with pytest.raises(DatasetError, match="has no identity in column 'place'"):
        train_siamese(config_of(str(tmp_path / "missing")))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"margin": 0.0}, "margin must be positive"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"label_column": "place"}, "label_column has no meaning for pairs of images; identity_column says"),
        ({"mixup": 0.2}, "mixup has no meaning"),
        ({"streaming": True}, "streaming has no meaning"),
        ({"source_context": "night"}, "are both 'night'"),
        ({"compare": True, "mode": "none", "where": ()}, "mode must not be 'none'"),
        ({"identity_column": "none", "augment": ()}, "two views of an image need augmentation"),
        ({"margins": 1.0}, "unknown option 'margins'; did you mean 'margin'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SiameseConfig.from_dict(options)


def test_the_config_survives_yaml_and_knows_its_networks() -> None:
    config = SiameseConfig(dataset="d", identity_column="place", compare=True)
    assert SiameseConfig.from_yaml(config.to_yaml()) == config
    assert type(config.replace(margin=2.0)) is SiameseConfig
    assert config.differences(config.replace(margin=2.0).to_dict()) == {"margin": (2.0, 1.0)}
    networks = config.networks()
    assert [(c.mode, c.calibrate, c.compare) for c in networks.values()] == [
        ("none", "always", False), ("cn-channels", "never", False), ("cn-channels", "always", False)
    ]  # fmt: skip
    folders = {config.folder_of(name, Path("run")) for name in networks}
    assert len(folders) == 3
    assert config.replace(compare=False).folder_of("any", Path("run")) == Path("run")
    with pytest.raises(ConfigError, match="option 'model' is missing"):
        TrainingConfig.from_dict({})


def test_the_script_shows_what_it_would_do(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_of(config_of(str(places)), tmp_path / "run", tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--margin", "1.5", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    output = capsys.readouterr().out
    assert end.value.code in (0, None), output
    assert "margin: 1.5" in output
    assert "identity_column: place" in output
    assert (tmp_path / "run" / "first_batch.png").is_file()
    assert not (tmp_path / "run" / "run.json").exists()
