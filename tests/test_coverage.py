"""evaluation/coverage.py and the committed table: complete, up to date, and what an interrupted sweep leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
from packaging.version import Version

from cn_hf import ConfigError
from scripts.coverage import sweep as coverage
from scripts.coverage.sweep import Rows, build_timm, chosen_timm_models, structure_of_timm, sweep
from scripts.coverage.table import headline, write_coverage
from scripts.coverage.transformers_models import TRANSFORMERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "model_cards" / "results"
SAMPLE = ["test_vit", "test_resnet", "test_convnext", "resnet18", "caformer_s18", "mobilevit_xxs", "convnextv2_atto"]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((RESULTS / "coverage.json").read_text())
    return table


# ------------------------------------------------------------------------------------------------- the committed table


@pytest.fixture
def of_today(committed: dict[str, Any]) -> None:
    """The table can have missed nothing: timm is of its version, or older."""
    installed, of_table = (metadata.version("timm"), committed["versions"]["timm"])
    if Version(installed) > Version(of_table):
        pytest.skip(f"timm {installed} is newer than the table's {of_table}; make it again with scripts/coverage")


@pytest.mark.usefixtures("of_today")
def test_nothing_is_missing(committed: dict[str, Any]) -> None:
    names = [name for name in timm.list_models() if not name.startswith("cn_")]
    modules = {timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name in names}
    assert modules <= set(committed["modules"])
    assert set(timm.list_models("test_*")) <= {row["name"] for row in committed["real"]}
    if metadata.version("timm") == committed["versions"]["timm"]:
        assert set(committed["structure"]) == set(names)


def test_every_module_is_checked_and_nothing_fails(committed: dict[str, Any]) -> None:
    checked = {row["module"] for row in committed["real"] if row["library"] == "timm"}
    assert checked == set(committed["modules"])
    real = {row["name"] for row in committed["real"]}
    assert set(TRANSFORMERS) <= real
    assert [row["name"] for row in committed["real"] if row["failures"] or not row["checks"]] == []


@pytest.mark.usefixtures("of_today")
@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_is_what_the_norms_of_today_say(name: str, committed: dict[str, Any]) -> None:
    row = structure_of_timm(name)
    assert row["failures"] == []
    assert row["slots"]["cn"] == committed["structure"][name]


def test_the_markdown_says_what_the_json_says(committed: dict[str, Any]) -> None:
    text = (RESULTS / "coverage.md").read_text()
    assert committed["headline"] in text
    assert "Unfinished" not in text
    assert "**fail" not in text
    for module in committed["modules"]:
        assert re.search(rf"^\| {module} +\|", text, re.MULTILINE), module
    for row in committed["real"]:
        assert re.search(rf"^\| {row['name']}[ ,]", text, re.MULTILINE), row["name"]
    for words in {words for row in committed["real"] for words in row.get("refused", ())}:
        assert words.partition(": ")[2] in text


# ------------------------------------------------------------------------------------------------------------ the sweep


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "deep" / "rows.jsonl")
    made = sweep(rows, ["test_vit", "vit"])
    assert next(made) == "structure/test_vit"
    made.close()
    with rows.path.open("a") as file:
        file.write('{"key": "timm/test_vit", "versi')  # killed while it wrote
    again = Rows(rows.path)
    assert list(again.rows) == ["structure/test_vit"]
    assert list(sweep(again, ["test_vit", "vit"])) == ["transformers/vit", "timm/test_vit"]
    assert list(sweep(Rows(rows.path), ["test_vit", "vit"])) == []


def test_failures_and_other_versions_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add("a", {"failures": []})
    rows.add("b", {"failures": ["words"]})
    again = Rows(rows.path)
    assert (again.has("a"), again.has("b"), again.has("c")) == (True, False, False)
    monkeypatch.setattr(coverage.metadata, "version", lambda name: "0")
    assert not Rows(rows.path).has("a")


def test_a_model_that_fails_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "IMAGE_SIZES", ())
    monkeypatch.setattr(coverage, "DOES_NOT_RUN", (RuntimeError,))

    def refuse(self: Any, x: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward", refuse)
    rows = Rows(tmp_path / "rows.jsonl")
    list(sweep(rows, ["test_vit"]))
    assert "runs at none of the image sizes" in rows.rows["timm/test_vit"]["failures"][0]
    text = write_coverage(rows, tmp_path / "out").read_text()
    assert "1 fail" in headline(rows.rows.values())
    assert "**Unfinished**" in text
    assert "- test_vit: ConfigError: test_vit runs at none" in text


def test_unknown_names_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'test_vit'"):
        list(sweep(Rows(tmp_path / "rows.jsonl"), ["tset_vit"]))


def test_the_choice_has_every_module_and_norm_and_nothing_large_without_need() -> None:
    def row(name: str, module: str, parameters: int, *norms: str) -> dict[str, Any]:
        what = {"architecture": "A", "norms": dict.fromkeys(norms, 1)}
        return {"name": name, "module": module, "parameters": parameters, **what}

    rows = [
        row("small", "m", 10, "LN"),
        row("medium", "m", 20, "LN"),
        row("other_norm", "m", 30, "RMS"),
        row("huge_norm", "m", 10**9, "BN"),
        row("only", "n", 10**9, "BN"),
        row("test_tiny", "m", 15, "LN"),
    ]
    assert chosen_timm_models(rows) == ["small", "test_tiny", "other_norm", "only"]


def test_models_are_built_at_the_smallest_size_they_take() -> None:
    assert build_timm("test_resnet")[1].shape == (3, 3, 64, 64)
    model, images = build_timm("swin_tiny_patch4_window7_224")  # of fixed size, but built for any
    assert model(images).shape[0] == 3
    assert images.shape[-1] == 64


@pytest.mark.parametrize(("name", "code", "words"), [("test_vit", 0, ""), ("tset_vit", 1, "did you mean 'test_vit'")])
def test_the_script(name: str, code: int, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/coverage", "--rows", str(tmp_path / "rows.jsonl"), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    if code == 0:
        assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
