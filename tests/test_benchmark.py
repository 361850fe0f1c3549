"""The benchmark's rows, settings and report: ratios, limits, merging, tables, the picture, and its command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

from cn_hf.errors import CheckpointError, ConfigError
from scripts.benchmark.picture import limited_rows, plot_report
from scripts.benchmark.program import run_benchmark, update_table
from scripts.benchmark.report import (
    BEGIN,
    END,
    Record,
    Report,
    put_table,
    read_report,
    readme_table,
    report_markdown,
    section_table,
    write_report,
)
from scripts.benchmark.rows import MICROSECONDS, SPEED, WAITS, Row, Trial, compared, differing, single
from scripts.benchmark.sections import SECTIONS, Section, chosen_sections, left_out, planned_rows
from scripts.benchmark.settings import NetworkOptions, Settings, usable_device

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def smoke(**options: object) -> Settings:
    return Settings(**{"device": CPU, "size": "smoke", "rounds": 2, "progress": False, **options})


# ----------------------------------------------------------------------------------------------------------------- rows


def test_ratios_are_taken_within_each_round() -> None:
    """The machine is ten times as slow in the third round, for both."""
    row = compared(Row(what="a", rival="b", limit=1.0), [1.0, 1.2, 10.0], [2.0, 2.0, 20.0], amount=(6, "images/s"))
    assert row.value == pytest.approx(0.5)
    assert (row.low, row.high) == (pytest.approx(0.5), pytest.approx(0.55))
    assert row.rounds == 3
    assert (row.milliseconds, row.rival_milliseconds) == (1200, 2000)
    assert row.note == "5.0 against 3.0 images/s; 3 rounds only"
    assert row.holds
    faster = compared(Row(what="a", rival="b", limit=1.9, at_least=True), [1.0, 1.2, 10.0], [2.0, 2.0, 20.0])
    assert faster.value == pytest.approx(2.0)
    assert faster.holds
    assert faster.to_limit == pytest.approx(0.95)
    assert compared(Row(what="a"), [1.0] * 20, [1.0] * 20).note == ""
    assert compared(Row(what="a"), [3.0], [2.0]).low == 1.5
    with pytest.raises(ValueError, match="shorter"):
        compared(Row(what="a"), [1.0, 1.0], [1.0])


def test_differences_are_in_microseconds() -> None:
    row = differing(Row(what="a", unit=MICROSECONDS, limit=50.0), [30e-6, 90e-6, 50e-6], [10e-6, 20e-6, 20e-6])
    assert row.value == pytest.approx(30)
    assert row.value_in_words == "30.00 µs"


@pytest.mark.parametrize(
    ("options", "value", "to_limit", "holds"),
    [
        ({"limit": 0.75}, 0.6, 0.8, True),
        ({"limit": 0.75}, 0.7549, 0.7549 / 0.75, True),  # shown as 0.75
        ({"limit": 0.75}, 0.7551, 0.7551 / 0.75, False),
        ({"limit": 0.95, "at_least": True}, 0.9451, 0.95 / 0.9451, True),
        ({"limit": 0.75}, 0.9, 1.2, False),
        ({"limit": 0.95, "at_least": True}, 0.9, 0.95 / 0.9, False),
        ({"limit": 0.95, "at_least": True}, 0.0, math.inf, False),
        ({"limit": 0.0, "unit": WAITS}, 0.0, 1.0, True),
        ({"limit": 0.0, "unit": WAITS}, 2.0, 3.0, False),
        ({}, 0.9, None, None),
        ({"limit": 1.0}, None, None, None),
    ],
)
def test_limits(options: dict[str, object], value: float | None, to_limit: float | None, holds: bool | None) -> None:
    row = Row(what="a", value=value, **options)
    assert row.to_limit == (None if to_limit is None else pytest.approx(to_limit))
    assert row.holds is holds


def test_words() -> None:
    assert Row(what="a").value_in_words == "not measured"
    assert single(Row(what="a"), 1234.5).value_in_words == "1,234.50× time"
    assert single(Row(what="a", unit=WAITS), 3.0).value_in_words == "3 waits"
    assert Row(what="a", limit=0.95, at_least=True).limit_in_words == "≥ 0.95"
    assert Row(what="a", limit=1.2).limit_in_words == "≤ 1.20"
    assert Row(what="a").limit_in_words == ""


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "quik"}, "did you mean 'quick'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"images": 2}, "images must be at least 3"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smoke(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "convne"}, "did you mean 'convnet'"),
        ({"mixed_precision": "fp61"}, "unknown mixed_precision 'fp61'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_network_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkOptions(**options)


def test_devices() -> None:
    assert usable_device("cpu") == CPU
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be had"):
        usable_device("gpu")
    with pytest.raises(ConfigError, match="device 'meta' cannot be timed"):
        usable_device("meta")
    with pytest.raises(ConfigError, match="device 'cpu:1' is not the first"):
        usable_device("cpu:1")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' cannot be had"):
            usable_device("cuda")


def test_sizes_and_devices_choose() -> None:
    sizes = {"full": 4, "quick": 3, "smoke": 1, "gpu": 9}
    assert [smoke(size=size).of(**sizes) for size in ("full", "quick", "smoke")] == [4, 3, 1]
    cuda = torch.device("cuda")
    assert [smoke(size=size, device=cuda).of(**sizes) for size in ("full", "quick", "smoke")] == [9, 9, 1]


def test_sections_are_chosen_in_their_order() -> None:
    assert chosen_sections(["models", "ops", "ops"], smoke()) == ["ops", "models"]
    assert chosen_sections(None, smoke()) == [*SECTIONS]
    assert chosen_sections(None, smoke(size="quick")) == ["ops", "plus", "mixture", "models", "scale"]
    with pytest.raises(ConfigError, match="did you mean 'mixture'"):
        chosen_sections(["mixtur"], smoke())


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", ["full", "quick", "smoke"])
def test_plans_need_no_device_and_name_each_row_once(device: str, size: str) -> None:
    for section in SECTIONS:
        rows = planned_rows(section, device, size)
        assert all(row.value is None and row.rounds == 0 for row in rows)
        named = [(*row.key, row.dtype) for row in rows]
        assert len(set(named)) == len(named)
        shown = [row.key for row in rows if row.headline]
        assert len(set(shown)) == len(shown)


def test_the_limits_are_those_that_were_set() -> None:
    def limits(section: str, device: str) -> dict[str, set[float | None]]:
        found: dict[str, set[float | None]] = {}
        for row in planned_rows(section, device):
            found.setdefault(f"{row.what} | {row.rival}", set()).add(row.limit)
        return found

    gpu, cpu = limits("ops", "cuda"), limits("ops", "cpu")
    for layout in ("maps", "channels-last maps", "small maps"):
        assert gpu[f"CN op on {layout}, forward | copy"] == {0.85}
        assert gpu[f"CN layer on {layout}, step | nn.BatchNorm2d"] == {0.75}
        assert cpu[f"CN layer on {layout}, step | nn.BatchNorm2d"] == {1.0, None}  # bfloat16: none
    for name in ("CN op", "CN layer", "LN → CN slot"):
        assert gpu[f"{name} on tokens, step | nn.LayerNorm"] == {1.0}
        assert cpu[f"{name} on tokens, step | nn.LayerNorm"] == {1.2, None}
    assert gpu["CN layer on maps, T = 1,000, step | T = 2"] == {1.1}
    assert limits("plus", "cuda")["CN+ (learned, none) on tokens | CN forward"] == {None}
    assert limits("plus", "cpu")["CN+ (learned, none) on tokens | its four products and softmax"] == {1.5}
    assert limits("plus", "cpu")["CN+ (batch, sqrt_t) on tokens | its six products and softmax"] == {None}
    assert limits("mixture", "cuda")["MN (K = 3) on maps, step | nn.BatchNorm2d"] == {None}
    models = limits("models", "cpu")
    assert models["vit_small_patch16_224, training step | plain model"] == {0.97}
    assert models["wide_resnet50_2, training step | plain model"] == {1.03}
    assert models["routing of context_ids, per forward | the same layers without"] == {50.0}
    assert {row.shape for row in planned_rows("ops", "cpu")} == {
        "(256, 64, 56, 56)", "(256, 197, 768)", "(256, 128, 8, 8)"
    }  # fmt: skip


def test_what_a_quick_run_leaves_out_is_named() -> None:
    assert left_out("ops", smoke(size="full")) == []
    missing = left_out("ops", smoke(size="quick"))
    assert "CN op on tokens, step (bfloat16)" in missing
    assert not any("float32" in name for name in missing)
    assert left_out("pipeline", smoke(size="quick")) == ["training on 224-pixel JPEGs, decoded by workers (float32)"]


# -------------------------------------------------------------------------------------------------------------- reports


def record(*rows: Row, **options: object) -> Record:
    environment = {
        "command": "python scripts/benchmark", "device": "Some GPU", "cpu": "Some CPU",
        "versions": {"torch": "2.0", "cn_hf": "1"},
    }  # fmt: skip
    return Record(**{
        "date": "2026-01-02 03:04", "seconds": 1.5, "size": "full", "kernels": "native", "threads": 2,
        "environment": environment, "left_out": [], "rows": [*rows], **options,
    })  # fmt: skip


def measured(what: str = "CN layer on maps, step", value: float = 0.9, **options: object) -> Row:
    return Row(what=what, rival="nn.BatchNorm2d", limit=1.0, headline=True, value=value, low=0.8, high=1.0, rounds=20,
               milliseconds=1.0, rival_milliseconds=2.0, **options)  # fmt: skip


def test_reports_are_read_as_written(tmp_path: Path) -> None:
    assert read_report(tmp_path) == {}
    report: Report = {
        "cpu": {"ops": record(measured()), "plus": record()},
        "cuda": {"ops": record(measured(value=0.5))},
    }
    write_report(report, tmp_path / "deep")
    assert read_report(tmp_path / "deep") == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "truncated or no JSON"),
        ("[]", "not a benchmark report"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "KeyError: 'devices'"),
        ('{"format": 1, "devices": {"cpu": {"ops": {"rows": []}}}}', "TypeError"),
        ('{"format": 1, "devices": {"cpu": {"ops": {"rows": [{"novelty": 1}]}}}}', "novelty"),
        ('{"format": 1, "devices": {"cpu": []}}', "AttributeError"),
    ],
)
def test_a_broken_report_is_refused_and_kept(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "benchmark.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path)
    assert "Remove the file" in str(raised.value)
    assert (tmp_path / "benchmark.json").read_text() == content


def test_markdown_has_all_sections_and_what_is_not_measured() -> None:
    text = report_markdown({"cpu": {"ops": record(measured(), left_out=["a thing"], size="quick")}})
    assert "## CPU\n" in text
    assert "## GPU: not measured" in text
    assert "2026-01-02 03:04, Some CPU, 2 threads; torch 2.0, native kernels, cn_hf 1; quick run of 2 s" in text
    assert "0.90× time (0.80 to 1.00)" in text
    assert "Left out of a quick run: a thing." in text
    assert text.count("### models: Whole networks\n\nNot measured.") == 2
    assert "### scale" not in text.partition("## GPU")[2]


def test_a_table_says_which_limits_hold() -> None:
    lines = section_table([measured(), measured(value=1.2), measured(note="why")]).splitlines()
    assert "yes" in lines[2]
    assert "**no**" in lines[3]
    assert "why" in lines[4]


def test_the_readme_table_shows_both_devices() -> None:
    report: Report = {
        "cpu": {"ops": record(measured(), size="quick")},
        "cuda": {"ops": record(measured(value=1.6, dtype="bfloat16"), kernels="triton 3")},
    }
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in readme_table(report).splitlines()}
    line = rows["CN layer on maps, step", "nn.BatchNorm2d"]
    assert "0.90× time (≤ 1.00)" in line
    assert "1.60× time (≤ 1.00, missed)" in line
    assert rows["CN op on maps, forward", "copy"].count("not measured (≥ 0.85)") == 1
    end = readme_table(report).splitlines()[-1]
    assert end == (
        "CPU: Some CPU, 2 threads, torch 2.0, native kernels, cn_hf 1, quick run. "
        "GPU: Some GPU, torch 2.0, triton 3 kernels, cn_hf 1."
    )


def test_the_table_is_put_between_its_markers(tmp_path: Path) -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert put_table(text, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    assert put_table(put_table(text, "new"), "new") == put_table(text, "new")
    for broken in ("", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"):
        with pytest.raises(ConfigError, match="marked once"):
            put_table(broken, "new")
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ConfigError, match="holds no report to make a table of"):
        update_table(tmp_path / "README.md", tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    report: Report = {"cpu": {"ops": record(measured())}}
    write_report(report, tmp_path)
    table = update_table(tmp_path / "README.md", tmp_path)
    assert table == readme_table(report)
    assert (tmp_path / "README.md").read_text() == put_table(text, table)
    with pytest.raises(CheckpointError, match="cannot be read"):
        update_table(tmp_path / "absent.md", tmp_path)


def test_the_readme_has_the_table_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme_table(read_report(ROOT / "model_cards" / "results" / "benchmark"))
    assert put_table(readme, table) == readme


# -------------------------------------------------------------------------------------------------------------- picture


def test_the_picture_has_a_bar_for_each_limit(tmp_path: Path) -> None:
    rows = [measured(f"number {number}", 0.05 * number) for number in range(40)]
    rows += [Row(what="no limit", value=1.0), Row(what="no value", limit=1.0)]
    rows += [Row(what="fast", limit=0.9, at_least=True, unit=SPEED, value=0.0), measured("negative", -1.0)]
    report: Report = {"cpu": {"plus": record(*rows)}, "cuda": {"ops": record(measured())}}
    found = limited_rows(report)
    assert [device for device, _, _ in found] == ["cpu"] * 42 + ["cuda"]
    path = plot_report(report, tmp_path / "picture.png")
    assert path is not None
    image = PIL.Image.open(path).convert("RGB")
    assert image.height > 40 * 20
    colors = {color for _, color in image.getcolors(maxcolors=1 << 24)}
    assert {(0x22, 0x88, 0x33), (0xEE, 0x66, 0x77)} <= colors
    assert plot_report({"cpu": {"ops": record()}}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


# -------------------------------------------------------------------------------------------------------------- running


def fake(*names: str, error: Exception | None = None) -> Section:
    """A section whose trials give values at once; the last one raises, if asked."""

    def trials(settings: Settings) -> list[Trial]:
        def measure(row: Row, last: bool) -> list[Row]:
            if last and error is not None:
                raise error
            return [single(row, 0.5)]

        rows = [Row(what=name, limit=1.0) for name in names]
        return [Trial(row.what, (row,), lambda row=row: measure(row, row is rows[-1])) for row in rows]

    return Section("Fake", trials)


def test_runs_merge_by_section_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECTIONS:
        monkeypatch.setitem(SECTIONS, name, fake(f"{name} first"))
    write_report({"cuda": {"ops": record(measured())}, "cpu": {"ops": record(), "plus": record()}}, tmp_path)
    assert run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path)
    report = read_report(tmp_path)
    assert [row.what for row in report["cpu"]["ops"].rows] == ["ops first"]
    assert report["cpu"]["plus"] == record()
    assert report["cuda"] == {"ops": record(measured())}
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["devices"]["cpu"]["ops"]["environment"]["versions"]["torch"] == torch.__version__
    assert "ops first" in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").is_file()


def test_a_killed_run_loses_the_running_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SECTIONS, "ops", fake("done"))
    monkeypatch.setitem(SECTIONS, "plus", fake("half", "way", error=KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(smoke(), sections=["ops", "plus"], output_dir=tmp_path, threads=1)
    assert [*read_report(tmp_path)["cpu"]] == ["ops"]
    assert "done" in capsys.readouterr().out


def test_a_trial_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SECTIONS, "ops", fake("well", "not", error=RuntimeError("out of memory\nmore")))
    assert not run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path)
    well, broken = read_report(tmp_path)["cpu"]["ops"].rows
    assert well.value == 0.5
    assert (broken.value, broken.note) == (None, "failed: out of memory")
    printed = capsys.readouterr()
    assert printed.err == "ops, not: failed: out of memory\n"
    assert "1 of 1 limits hold" in printed.out


def test_threads_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "ops", fake("a"))
    before = torch.get_num_threads()
    run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path, threads=before + 1)
    assert torch.get_num_threads() == before
    assert read_report(tmp_path)["cpu"]["ops"].threads == before + 1
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path, threads=0)


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        run_benchmark(smoke(), sections=["networks"], output_dir=tmp_path / "file" / "folder")


def test_the_verdict_names_broken_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SECTIONS, "ops", fake("a"))
    write_report({"cpu": {"plus": record(measured(value=1.5))}}, tmp_path)
    run_benchmark(smoke(), sections=["ops"], output_dir=tmp_path)
    assert "1 of 2 limits hold; not these:\n- plus, CN layer on maps, step (float32, cpu)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- command line


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip


def test_the_program(tmp_path: Path) -> None:
    options = ("--smoke", "--section", "plus", "--device", "cpu", "--threads", "1", "--rounds", "3", "--no-progress")
    script = run(str(ROOT / "scripts" / "benchmark"), *options, cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    assert "| CN+ (learned, none) on maps" in script.stdout
    assert "1 threads" in script.stdout
    assert read_report(tmp_path / "runs" / "benchmark")["cpu"]["plus"].rows[0].rounds == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--section", "op"), "error: unknown section 'op'; did you mean 'ops'?"),
        (("--device", "gpu"), "error: device 'gpu' cannot be had"),
        (("--threads", "0"), "error: threads must be at least 1"),
        (("--network", "vitt"), "error: unknown network 'vitt'; did you mean 'vit'?"),
        (("--table", "absent.md"), "holds no report to make a table of: measure first"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(str(ROOT / "scripts" / "benchmark"), *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
