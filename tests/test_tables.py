"""Tables, results.json and the record of what produced them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cn_hf.errors import ConfigError, InputTypeError
from cn_hf.evaluation import (
    ProtocolReport,
    ProtocolRow,
    ResultRow,
    comparison_table,
    context_table,
    format_accuracy,
    format_runs,
    markdown_table,
    protocol_table,
    protocol_tables,
    run_environment,
    write_results,
)
from cn_hf.evaluation.environment import portable_command
from cn_hf.files import write_whole


def report() -> ProtocolReport:
    """Two rows that ran and one that could not."""
    rows = (
        ProtocolRow(
            name="true contexts", kind="true contexts", explanation="told.", num_samples=16, correct={1: 14, 5: 16},
            context_samples={"day": 10, "night": 6, "dusk": 0},
            context_correct={1: {"day": 10, "night": 4, "dusk": 0}, 5: {"day": 10, "night": 6, "dusk": 0}},
        ),
        ProtocolRow(name="predict", kind="deployable", explanation="", num_samples=16, unavailable="no source"),
        ProtocolRow(name="baseline", kind="baseline", explanation="never told.", num_samples=16, correct={1: 8, 5: 12}),
    )  # fmt: skip
    return ProtocolReport(rows=rows, top_k=(1, 5), context_depends_on_label=False, findings=("One.", "Two."))


def test_rows_come_back_from_json() -> None:
    for row in report():
        assert ProtocolRow.from_dict(row.to_dict()) == row
        assert ProtocolRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    with pytest.raises(KeyError, match="num_samples"):
        ProtocolRow.from_dict({"name": "predict", "kind": "deployable", "explanation": ""})


def test_markdown_columns_line_up() -> None:
    table = markdown_table(["name", "a", "b"], [["x", "1", "long text"], ["a|b\nc", "22.5", ""]], align="lrc")
    assert table == (
        "| name   |    a |     b     |\n"
        "| ------ | ---: | :-------: |\n"
        "| x      |    1 | long text |\n"
        "| a\\|b c | 22.5 |           |"
    )
    assert markdown_table(["a"], []) == "| a   |\n| --- |"


def test_markdown_errors() -> None:
    with pytest.raises(ConfigError, match="2 columns got 1"):
        markdown_table(["a", "b"], [["1"]])
    with pytest.raises(ConfigError, match="'x'"):
        markdown_table(["a", "b"], [], align="lx")
    with pytest.raises(ConfigError, match="2 columns got 1"):
        markdown_table(["a", "b"], [], align="l")


def test_accuracy_has_its_standard_error_where_samples_are_few() -> None:
    assert format_accuracy(14, 16) == "87.50 ± 8.27"  # sqrt(0.875 * 0.125 / 16) = 0.08268
    assert format_accuracy(5000, 9999) == "50.01 ± 0.50"
    assert format_accuracy(5000, 10_000) == "50.00"
    assert format_accuracy(16, 16) == "100.00 ± 5.73"  # p = 17/18: sqrt(17/18 / 18 / 16) = 0.05727
    assert format_accuracy(0, 16) == "0.00 ± 5.73"
    for correct, count in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(ConfigError):
            format_accuracy(correct, count)


def test_runs() -> None:
    assert format_runs([1.0, 2.0, 4.0]) == "2.33 ± 1.53 (n = 3)"  # sample standard deviation
    assert format_runs([1.0]) == "1.00 (n = 1)"
    assert format_runs([]) == "–"
    assert format_runs([87.316, 87.316], digits=1) == "87.3 ± 0.0 (n = 2)"


def test_protocol_table() -> None:
    assert protocol_table(report(), title="CIFAR") == (
        "### CIFAR\n\n"
        "| protocol      |      top-1, % |      top-5, % |   n |\n"
        "| ------------- | ------------: | ------------: | --: |\n"
        "| true contexts |  87.50 ± 8.27 | 100.00 ± 5.73 |  16 |\n"
        "| predict       |             – |             – |  16 |\n"
        "| baseline      | 50.00 ± 12.50 | 75.00 ± 10.83 |  16 |\n\n"
        "± is the binomial standard error over the test samples.\n\n"
        "- true contexts: told.\n- predict: not available: no source\n- baseline: never told.\n\nOne.\nTwo."
    )


def test_context_table() -> None:
    assert context_table(report()) == (
        "| top-1, %      |  day (n = 10) | night (n = 6) | dusk (n = 0) |\n"
        "| ------------- | ------------: | ------------: | -----------: |\n"
        "| true contexts | 100.00 ± 8.74 | 66.67 ± 19.25 |            – |\n"
        "| predict       |             – |             – |            – |\n"
        "| baseline      |             – |             – |            – |"
    )
    with pytest.raises(ConfigError, match="top-3"):
        context_table(report(), k=3)


def test_a_run_prints_accuracy_within_each_context() -> None:
    assert protocol_tables(report(), title="CIFAR") == (
        protocol_table(report(), title="CIFAR") + "\n\n" + context_table(report())
    )
    told = report()
    without = dataclasses.replace(
        told, rows=tuple(dataclasses.replace(row, context_samples={}, context_correct={}) for row in told)
    )
    assert protocol_tables(without) == protocol_table(without)


def test_many_contexts_stand_below_each_other() -> None:
    names = [f"camera {number}" for number in range(11)]
    row = ProtocolRow(
        name="true contexts", kind="true contexts", explanation="told.", num_samples=22, correct={1: 11},
        context_samples=dict.fromkeys(names, 2), context_correct={1: dict.fromkeys(names, 1)},
    )  # fmt: skip
    many = ProtocolReport(rows=(row,), top_k=(1,), context_depends_on_label=None, findings=())
    lines = context_table(many).splitlines()
    assert len(lines) == 13
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["top-1, %", "true contexts"]
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == ["camera 10 (n = 2)", "50.00 ± 35.36"]


def test_a_report_is_read_from_results() -> None:
    told = report()
    for values in (told.to_dict(), {"evaluation": told.to_dict(), "config": {}}):
        assert ProtocolReport.from_dict(json.loads(json.dumps(values))) == told
    rows = told.to_dict()["rows"]
    assert rows[0]["context_top_1"] == {"day": 1.0, "night": pytest.approx(4 / 6), "dusk": None}
    damaged = [{}, {"evaluation": None}, [], {"rows": [{}], "top_k": [1]}, {"rows": 3, "top_k": [1]}, {"rows": []}]
    for values in damaged:
        with pytest.raises(ConfigError, match="Expected"):
            ProtocolReport.from_dict(values)  # type: ignore[arg-type]


def test_comparison_table() -> None:
    rows = [
        ResultRow(name="BN", paper={"t1": 86.9}, ours={"t1": [85.0, 87.0], "t5": [99.0]}),
        ResultRow(name="CN", paper={"t1": 87.32}, differences="2 epochs"),
    ]
    assert comparison_table(rows, title="Table V", digits=1) == (
        "### Table V\n\n"
        "| method | t1: paper | t1: ours (mean ± std, n) | t5: paper | t5: ours (mean ± std, n) | differences |\n"
        "| ------ | --------: | -----------------------: | --------: | -----------------------: | ----------- |\n"
        "| BN     |      86.9 |       86.0 ± 1.4 (n = 2) |         – |             99.0 (n = 1) | none        |\n"
        "| CN     |      87.3 |                        – |         – |                        – | 2 epochs    |"
    )
    with pytest.raises(ConfigError, match="at least one row"):
        comparison_table([])


def test_report_rows_and_their_errors() -> None:
    found = report()
    assert found["baseline"].accuracy(5) == 0.75
    assert found["true contexts"].accuracy(context="dusk") is None
    assert [row.name for row in found] == ["true contexts", "predict", "baseline"]
    with pytest.raises(ConfigError, match="did you mean 'baseline'"):
        found["basline"]
    with pytest.raises(ConfigError, match="top-3"):
        found["baseline"].accuracy(3)
    with pytest.raises(ConfigError, match="did you mean 'night'"):
        found["true contexts"].accuracy(context="nigth")


@dataclass
class _Cell:
    seed: int
    path: Path


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results = {
        "report": report(), "loss": float("nan"), "curve": torch.tensor([1.5, float("inf")]), "n": np.int64(3),
        "cells": [_Cell(1, Path("a/b"))], "names": {"b", "a"}, "é": (1, None, True),
    }  # fmt: skip
    assert write_results(path, results) == path
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["report"]["rows"][0]["top_1"] == 0.875
    assert (read["loss"], read["curve"], read["n"]) == (None, [1.5, None], 3)
    assert (read["cells"], read["names"], read["é"]) == ([{"seed": 1, "path": "a/b"}], ["a", "b"], [1, None, True])
    assert read["environment"]["versions"]["torch"] == torch.__version__
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    write_results(path, {"x": 1}, environment={"command": "again"})
    assert json.loads(path.read_text()) == {"x": 1, "environment": {"command": "again"}}


def test_what_has_no_json_form_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"x": 1}, environment={})
    with pytest.raises(InputTypeError, match=r"results\['cells'\]\[1\] is a object"):
        write_results(path, {"cells": [1, object()]})
    with pytest.raises(InputTypeError, match="key of type tuple"):
        write_results(path, {"cells": {(1, 2): 3}})
    assert json.loads(path.read_text())["x"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_renamed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError, match=r"results\.json"):
        write_whole(tmp_path / "results.json", b"{}")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_whole(tmp_path / "file" / "results.json", b"{}")


_KILLED = """
import sys
from cn_hf.evaluation import write_results
print("go", flush=True)
for number in range(10**6):
    write_results(sys.argv[1], {"numbers": [number] * 5000}, environment={})
"""


def test_a_run_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"numbers": [-1] * 5000}, environment={})
    worker = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "go\n"
    for _ in range(200):
        numbers = json.loads(path.read_text())["numbers"]
        assert len(numbers) == 5000
        assert len(set(numbers)) == 1
    worker.kill()
    worker.wait()
    worker.stdout.close()
    assert len(json.loads(path.read_text())["numbers"]) == 5000


def test_environment_names_hardware_versions_and_command() -> None:
    found = run_environment(["cn-hf", "demo"])
    assert found["command"] == "cn-hf demo"
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_cores"] >= 1
    assert {"cn_hf", "torch", "timm", "transformers", "datasets", "accelerate"} <= set(found["versions"])
    assert found["device"]
    assert json.loads(json.dumps(found)) == found


def test_commands_carry_no_paths_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    inside = str(tmp_path / "runs" / "one")
    assert portable_command(["/opt/env/bin/cn-hf", "demo", "--output", inside]) == "cn-hf demo --output runs/one"
    assert portable_command([str(tmp_path / "scripts" / "train.py"), "--data=/data/big set"]) == (
        "python scripts/train.py '--data=big set'"
    )
    assert (
        portable_command(["scripts/train.py", "a=b", "x/y", "--lr=1e-3"]) == "python scripts/train.py a=b x/y --lr=1e-3"
    )
    assert portable_command(["cn-hf", "~/data", "/"]) == "cn-hf data /"
    assert portable_command([]) == ""
    home = os.path.expanduser("~")
    assert home not in portable_command(["cn-hf", f"{home}/x/data", f"--data-root={home}/x/data"])
