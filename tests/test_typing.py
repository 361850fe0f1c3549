"""What type checkers and editors see of the package."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import cn_hf
import cn_hf.contexts
from torch import nn


class Net(nn.Module):
    depth = 3


net = cn_hf.patch_model(Net(), num_contexts=2)
reveal_type(net)
reveal_type(cn_hf.unpatch_model(net))
cn_hf.patch_modell(net)
cn_hf.contexts.ClusterContext(2)
"""


@pytest.mark.slow
def test_types_and_misspelt_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(tmp_path / "program.py"),
    ]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500).stdout
    assert said.count('Revealed type is "program.Net"') == 2
    assert 'Module has no attribute "patch_modell"' in said
    assert 'Module has no attribute "ClusterContext"' in said
    assert "Found 2 errors" in said


@pytest.mark.parametrize("part", ["contexts", "data", "evaluation", "hub", "models", "norm", "patching", "adaptation"])
def test_parts_list_their_names(part: str) -> None:
    module = importlib.import_module(f"cn_hf.{part}")
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = module.misspelt
