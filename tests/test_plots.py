"""Figures: written whole, of the size their content needs, and drawing what they were given."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tables import report

from cn_hf.errors import ConfigError, InputTypeError
from cn_hf.evaluation import plot_context_statistics, plot_protocols, plot_training_curves
from cn_hf.norm import ContextNorm


def _history(num_epochs: int, level: float = 2.0) -> list[dict[str, float | None]]:
    return [
        {
            "epoch": epoch,
            "train_loss": level / epoch,
            "validation_loss": None if epoch % 2 else level / epoch,
            "validation_accuracy": 1 - 1 / (epoch + 1),
        }
        for epoch in range(1, num_epochs + 1)
    ]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _has_color(path: Path, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(_pixels(path) - np.array(color)).max(axis=2) < 8).any())


BLUE, ROSE, GREEN = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77), (0x22, 0x88, 0x33)


def test_training_curves(tmp_path: Path) -> None:
    path = plot_training_curves(
        {"BN": _history(30), "CN": _history(30, 1.0)}, tmp_path / "new" / "curves.png", title="t"
    )
    assert _pixels(path).shape[1] == pytest.approx((0.6 + 3 * 4.2) * 150, abs=2)  # three panels
    assert _has_color(path, BLUE)
    assert _has_color(path, ROSE)
    assert not _has_color(path, GREEN)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_panels_without_values_are_left_out(tmp_path: Path) -> None:
    history = [{"epoch": 1, "train_loss": 2.0, "validation_loss": None}]
    path = plot_training_curves({"one": history}, tmp_path / "one.png")
    assert _pixels(path).shape[1] == pytest.approx((0.6 + 4.2) * 150, abs=2)
    with pytest.raises(ConfigError, match="no run has any of train_loss"):
        plot_training_curves({"one": [{"epoch": 1, "accuracy": 1.0}]}, tmp_path / "none.png")
    with pytest.raises(ConfigError, match="no run has any"):
        plot_training_curves({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_diverged_many_and_long_named_runs(tmp_path: Path) -> None:
    runs = {f"ViT+CN-Patches lr={lr}e-3 wd=1e-4": _history(40, lr + 1) for lr in range(13)}
    runs["diverged"] = [{"epoch": epoch, "train_loss": 10.0**epoch if epoch < 9 else math.inf} for epoch in range(12)]
    runs["never"] = []
    path = plot_training_curves(runs, tmp_path / "many.png", panels={"train_loss": "training loss"})
    pixels = _pixels(path)
    assert pixels.shape[0] > 5 * 150  # grown for a legend of one column
    assert (pixels[:, [0, -1]] == 255).all()  # and nothing is cut at the sides
    assert (pixels[[0, -1]] == 255).all()


def test_protocols(tmp_path: Path) -> None:
    path = plot_protocols(report(), tmp_path / "protocols.png", title="CIFAR")
    assert _has_color(path, GREEN)
    assert not _has_color(path, ROSE)  # no leak check in this report
    assert (_pixels(path)[:, [0, -1]] == 255).all()


@pytest.mark.parametrize(("num_contexts", "num_features"), [(1, 1), (2, 3), (20, 64), (300, 5)])
def test_context_statistics(tmp_path: Path, num_contexts: int, num_features: int) -> None:
    layer = ContextNorm(num_features, num_contexts, feature_dim=1, init="random", parametrization="table")
    path = plot_context_statistics(layer, tmp_path / "statistics.png", title="first layer")
    pixels = _pixels(path)
    assert max(pixels.shape) < 2000
    assert (pixels[[0, -1]] == 255).all()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in layer.parameters())


def test_context_statistics_show_values_by_colour(tmp_path: Path) -> None:
    layer = ContextNorm(1, 2, feature_dim=1, parametrization="table")
    layer.set_statistics(torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1))
    path = plot_context_statistics(layer, tmp_path / "statistics.png", context_names=["day", "a" * 100])
    assert _has_color(path, (5, 48, 97))  # the ends of the scale around zero: blue below
    assert _has_color(path, (103, 0, 31))  # and red above


def test_bad_layers_and_names(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="received BatchNorm2d"):
        plot_context_statistics(torch.nn.BatchNorm2d(3), tmp_path / "x.png")
    with pytest.raises(ConfigError, match="1 context names for a layer of 2"):
        plot_context_statistics(ContextNorm(3, 2, feature_dim=1), tmp_path / "x.png", context_names=["day"])
    assert list(tmp_path.iterdir()) == []


def test_no_window_system_and_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from cn_hf.evaluation.plots import plot_training_curves;"
        "assert 'matplotlib' not in sys.modules;"
        "plot_training_curves({'a': [{'epoch': 1, 'train_loss': 1.0}]}, sys.argv[1] + '/x.png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
