"""TrainingConfig: what it refuses, and that nothing is lost through JSON, YAML and the command line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperOption
from typer.testing import CliRunner

from cn_hf.errors import ConfigError
from cn_hf.patching.config import MODES
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.classifier.data import CONTEXT_KINDS
from cn_hf.recipes.siamese.config import SiameseConfig
from cn_hf.training.command import training_app
from cn_hf.training.config import TrainingConfig

UNUSUAL = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "depth": 2},
    "dataset": ["a", "b/c"],
    "validation_fraction": 0.25,
    "image_size": 48,
    "augment": ["flip", "crop"],
    "augment_options": {"crop_padding": 2},
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.25],
    "mode": "cn-patches",
    "where": ["blocks.0.norm1", "norm"],
    "contexts": "column:coarse_label",
    "norm_options": {"parametrization": "table"},
    "epochs": 7,
    "optimizer": "adamw",
    "optimizer_args": {"betas": [0.8, 0.9]},
    "schedule": "step",
    "step_epochs": [2, 5],
    "patience": 3,
    "mixed_precision": "bf16",
    "accumulation_steps": 2,
    "clip_grad_norm": 1.5,
    "ema_decay": 0.99,
    "mixup": 0.2,
    "trackers": ["tensorboard"],
    "checkpoint_steps": 50,
    "compile": True,
    "calibrate": "never",
    "baseline": True,
    "output_dir": "runs/one",
}


def test_round_trips() -> None:
    config = TrainingConfig.from_dict(UNUSUAL)
    assert TrainingConfig.from_json(config.to_json()) == config
    assert TrainingConfig.from_yaml(config.to_yaml()) == config
    assert TrainingConfig.from_dict(config.to_dict()) == config
    assert config.replace(epochs=8).epochs == 8
    assert config.epochs == 7


def test_is_frozen_and_slotted() -> None:
    config = TrainingConfig(model="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_yaml_numbers_become_the_field_s_type() -> None:
    config = TrainingConfig.from_yaml("model: x\nlearning_rate: 1e-3\nepochs: 3.0\nwarmup_epochs: 1\ndataset: one\n")
    assert config.learning_rate == 1e-3
    assert isinstance(config.epochs, int)
    assert isinstance(config.warmup_epochs, float)
    assert config.dataset == ("one",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, r"unknown option 'epoch'; did you mean 'epochs'\?"),
        ({"optimizer": "adm"}, r"unknown optimizer 'adm'; did you mean 'adam'\?"),
        ({"schedule": "cosin"}, r"did you mean 'cosine'\?"),
        ({"mixed_precision": "fp8"}, r"unknown mixed_precision 'fp8'"),
        ({"mode": "cn-chanels"}, r"did you mean 'cn-channels'\?"),
        ({"mode": "cn", "norm_options": {"affin": True}}, r"did you mean 'affine'\?"),
        ({"mode": "cn", "norm_options": {"mode": "bn"}}, "norm_options holds 'mode'"),
        ({"where": "norms"}, "mode is 'none'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": "ten"}, "'epochs' must be a whole number, got 'ten'"),
        ({"epochs": 1.5}, "'epochs' must be a whole number"),
        ({"seed": True}, "'seed' must be a whole number"),
        ({"calibrate": "yes"}, "unknown calibrate 'yes'"),
        ({"baseline": "yes"}, "'baseline' must be true or false"),
        ({"learning_rate": float("nan")}, "'learning_rate' must be a finite number"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"schedule": "step"}, "needs step_epochs"),
        ({"step_epochs": [5, 2]}, "rising"),
        ({"warmup_epochs": 200}, "more than epochs"),
        ({"minimum_learning_rate": 1.0}, "above learning_rate"),
        ({"mean": [0.5], "std": []}, "one value per channel"),
        ({"mean": [0.5], "std": [0.0]}, "std positive"),
        ({"model": ""}, "model is empty"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be positive"),
        ({"batch_size": 2, "accumulation_steps": 3}, "accumulation_steps 3 is more than batch_size 2"),
        ({"mix_probability": 2}, r"mix_probability must be in \[0, 1\]"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"model_args": [1]}, "'model_args' must be a mapping"),
        ({"dataset": [1]}, "'dataset' must be text"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_dict({"model": "x", **options})


@pytest.mark.parametrize("text", ["- a\n- b", "3", "a: [", '{1: "x"}'])
def test_a_config_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="config"):
        TrainingConfig.from_yaml(text)


def test_context_norm_config() -> None:
    assert TrainingConfig(model="x").context_norm_config() is None
    config = TrainingConfig(model="x", mode="cn-channels", where=("paper",), norm_options={"affine": True})
    made = config.context_norm_config(2, ("day", "night"))
    assert made is not None
    assert (made.mode, made.where, made.affine) == ("cn-channels", "paper", True)
    assert made.context_names == ("day", "night")
    patterns = TrainingConfig(model="x", mode="mn", where=("bn3",), num_contexts=4).context_norm_config()
    assert patterns is not None
    assert (patterns.where, patterns.num_contexts) == (("bn3",), 4)


def test_no_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'model' is missing"):
        TrainingConfig.from_yaml("")
    with pytest.raises(ConfigError, match="must be JSON"):
        TrainingConfig.from_json("{")


def as_arguments(options: dict) -> list[str]:
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            arguments += [part for key, entry in value.items() for part in (flag, f"{key}={entry}")]
        elif isinstance(value, list):
            arguments += [part for entry in value for part in (flag, str(entry))]
        else:
            arguments += [flag, str(value)]
    return arguments


def run_command(arguments: list[str]) -> TrainingConfig:
    return run_command_with_flags(arguments)[0]


def run_command_with_flags(arguments: list[str]) -> tuple[TrainingConfig, dict[str, bool]]:
    seen: list[tuple[TrainingConfig, dict[str, bool]]] = []
    app = training_app(lambda config, **flags: seen.append((config, flags)), help="test")
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_flags_are_no_part_of_the_config() -> None:
    config, flags = run_command_with_flags(["--model", "x", "--resume", "--dry-run"])
    assert config == TrainingConfig(model="x")
    assert flags == {"resume": True, "overwrite": False, "dry_run": True}


def test_differences_name_what_changes_what_is_learned() -> None:
    config = TrainingConfig(model="x", where=("norms",), mode="cn")
    assert config.differences(config.replace(progress=False, keep_checkpoints=5, num_workers=3).to_dict()) == {}
    other = config.replace(epochs=7, where=("a", "b"))
    assert config.differences(other.to_dict()) == {"epochs": (7, 100), "where": (["a", "b"], ["norms"])}
    older = {name: value for name, value in config.to_dict().items() if name != "ema_decay"}
    assert config.differences(older) == {}
    assert config.replace(ema_decay=0.9).differences(older) == {"ema_decay": (None, 0.9)}


def test_every_option_is_on_the_command_line() -> None:
    assert run_command(as_arguments(UNUSUAL)) == TrainingConfig.from_dict(UNUSUAL)
    everything = {
        name: value for name, value in TrainingConfig.from_dict(UNUSUAL).to_dict().items() if value is not None
    }
    assert run_command(as_arguments(everything)) == TrainingConfig.from_dict(UNUSUAL)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TrainingConfig.from_dict(UNUSUAL).to_yaml())
    config = run_command(["--config", str(file), "--epochs", "9", "--no-baseline", "--model-args", "depth=3"])
    expected = {**UNUSUAL, "epochs": 9, "baseline": False, "model_args": {"img_size": 32, "depth": 3}}
    assert config == TrainingConfig.from_dict(expected)


@pytest.mark.parametrize("config_class", [TrainingConfig, SiameseConfig, AdaMatchConfig])
def test_help_names_the_choices_and_shows_defaults_as_they_are_typed(config_class: type[TrainingConfig]) -> None:
    command = typer.main.get_command(training_app(print, help="test", config_class=config_class))
    options = {parameter.name: parameter for parameter in command.params if isinstance(parameter, TyperOption)}
    words = re.findall(r"[\w-]+", options["mode"].help or "")
    assert set(words) >= set(MODES)
    kinds = options["contexts"].help or ""
    assert all(kind in kinds for kind in (("origin", "none") if config_class is AdaMatchConfig else CONTEXT_KINDS))
    assert not any("(" in str(option.show_default) for option in options.values())
    if config_class is SiameseConfig:
        assert options["where"].show_default == "input"
        assert options["augment"].show_default == "flip, rotation, zoom"


def test_bad_command_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        run_command(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="--model-args takes NAME=VALUE, got 'depth'"):
        run_command(["--model", "x", "--model-args", "depth"])
    result = CliRunner().invoke(training_app(print, help="test"), ["--epoch", "3"])
    assert result.exit_code != 0
    assert "--epochs" in result.output
