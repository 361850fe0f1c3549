"""scripts/coverage/suites.py: tests of other libraries, run unpatched and patched, and what the table says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.coverage.suites import CRASHED, FAILED, IMPOSSIBLE, OPEN, PASSED, Results, run_suite, write_results

COMMITTED = Path(__file__).resolve().parents[1] / "model_cards" / "results" / "suites.json"
CASES = """
import copy, os, signal
import pytest, torch
from timm import create_model

pytestmark = pytest.mark.base
IMAGES = torch.randn(2, 3, 64, 64)

@pytest.mark.parametrize("model_name", ["test_resnet.r160_in1k", "test_vit2"])
def test_output(model_name):
    assert create_model("test_resnet").eval()(IMAGES).shape == (2, 1000)

def test_training():
    model = copy.deepcopy(create_model("test_resnet", num_classes=2)).train()
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()(IMAGES)

def test_is_plain():
    assert not hasattr(create_model("test_vit"), "router")

def test_kills_when_patched():
    if hasattr(create_model("test_resnet"), "router"):
        os.kill(os.getpid(), signal.SIGKILL)

def test_fails():
    raise ValueError("always")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("suites")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_models.py").write_text(CASES)
    results = Results(folder / "rows.jsonl")
    run_suite("timm", folder, results, chunks=[["test_resnet", ""]])
    return results


@pytest.mark.slow
def test_what_passes_is_run_again_patched(results: Results) -> None:
    plain = {test: row["outcome"] for test, row in results.outcomes(patched=False).items()}
    patched = {test: row["outcome"] for test, row in results.outcomes(patched=True).items()}
    passing = {"test_output[test_resnet.r160_in1k]": PASSED, "test_training": PASSED}
    assert plain == {**passing, "test_is_plain": PASSED, "test_kills_when_patched": PASSED, "test_fails": FAILED}
    assert patched == {**passing, "test_is_plain": FAILED, "test_kills_when_patched": CRASHED}
    assert results.lost() == ["test_is_plain", "test_kills_when_patched"]
    assert all(row["models"] for row in results.outcomes(patched=True).values() if row["outcome"] == PASSED)


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(results: Results) -> None:
    before = results.path.read_text()
    run_suite("timm", results.path.parent, results, chunks=[["test_resnet", ""]])
    assert results.path.read_text() == before


@pytest.mark.slow
def test_a_line_that_a_kill_cut_short_is_left_out(results: Results, tmp_path: Path) -> None:
    cut = Results(tmp_path / "rows.jsonl")
    cut.path.write_text(results.path.read_text() + '{"test": "test_tra')
    assert cut.lost() == results.lost()


@pytest.mark.slow
def test_the_table_names_what_is_lost(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPOSSIBLE, "test_is_plain", "it asks for a plain model")
    text = write_results({"timm": results}, tmp_path).read_text()
    assert "5 tests ran unpatched (4 passed, 1 failed)" in text
    assert "- `test_is_plain`: it asks for a plain model" in text.partition("### Impossible in principle")[2]
    assert "- `test_kills_when_patched`" in text.partition("### Fails only patched")[2]


def test_nothing_more_is_lost_than_is_known() -> None:
    table = json.loads(COMMITTED.read_text())
    assert set(table) == {"timm", "transformers", "peft"}
    for found in table.values():
        assert found["patched"][PASSED] > 0
        functions = {test.rpartition("::")[2].partition("[")[0] for test in found["lost"]}
        assert functions <= IMPOSSIBLE.keys() | OPEN.keys()
