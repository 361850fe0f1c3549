"""Checkpoints written by earlier releases load, and give the logits they gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers

import cn_hf

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402  # beside the checkpoints

EXPECTED = {folder.name: folder / "expected.json" for folder in sorted(GOLDEN.iterdir()) if folder.is_dir()}
EXPECTED.pop("__pycache__", None)


def base_of(kind: str) -> torch.nn.Module | None:
    """What the checkpoint does not hold itself."""
    if kind == "norms-only":
        return make.known_base()
    return make.convolutional() if kind in ("other", "mixture") else None


def close(found: dict[str, list[float]], kind: str) -> None:
    expected = json.loads(EXPECTED[kind].read_text())["logits"]
    assert set(found) == set(expected)
    for context, values in expected.items():
        assert found[context] == pytest.approx(values, rel=1e-5, abs=1e-6), context


def test_every_kind_is_there():
    assert set(EXPECTED) == set(make.KINDS)
    for kind in EXPECTED:
        assert sum(file.stat().st_size for file in (GOLDEN / kind).rglob("*")) < 100_000


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_golden_checkpoint_gives_its_logits(kind):
    model = cn_hf.from_pretrained(GOLDEN / kind, model=base_of(kind))
    close(make.logits(model), kind)


@pytest.mark.parametrize("kind", ["timm", "source"])
def test_timm_loads_it_too(kind):
    model = timm.create_model(f"local-dir:{GOLDEN / kind}", pretrained=True)
    close(make.logits(model.eval()), kind)


@pytest.mark.parametrize("kind", ["transformers", "sharded"])
def test_transformers_loads_it_too(kind):
    close(make.logits(transformers.AutoModelForImageClassification.from_pretrained(GOLDEN / kind).eval()), kind)
