"""What the experiments say: their YAML files against the paper, their cells, their datasets, and what they conclude."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import timm
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

import cn_hf
import cn_hf.models
from cn_hf.errors import CheckpointError, ConfigError, DatasetError, DatasetFileError
from cn_hf.evaluation.report import ProtocolRow
from cn_hf.experiments.cells import Cell, CellResult, check_cells, plan_cells, read_result, select_cells
from cn_hf.experiments.report import check_report
from cn_hf.experiments.sources import DATASETS, check_datasets, find_datasets
from cn_hf.experiments.spec import BUDGETS, EXPERIMENTS, ROW_OPTIONS, Experiment, read_experiment
from cn_hf.experiments.summary import Results, epochs_table, epochs_to_reach, masked_difference, sentences

PLACES = {name: needed.hub_id for name, needed in DATASETS.items()}

# The paper's Tables V and VI, configurations 1 to 4 on CIFAR-10, then on CIFAR-100.
PAPER = {
    "bn": [86.9, 85.9, 82.56, 83.71, 57.48, 57.69, 50.82, 52.25],
    "mn": [87.08, 87.9, 82.07, 84.71, 61.6, 61.9, 53.08, 52.7],
    "cn": [87.32, 88.15, 83.85, 87.09, 61.79, 60.53, 56.08, 53.54],
    "cn-plus": [87.90, 88.28, 82.85, 87.50, 62.01, 60.53, 55.80, 53.15],
}
VIT = {"vit": (52.37, 80.98), "vit-bn": (53.35, 79.68), "cn-patches": (63.80, 99.74), "cn-channels": (62.48, 99.83)}
BLENDED = {"cn-patches": (77.09, 90.92, 55.04, 81.83), "cn-channels": (74.92, 89.28, 50.99, 78.55)}


def cells_of(name: str, budget: str = "paper", seeds: int | None = None, folder: Path = Path("out")) -> list[Cell]:
    experiment = read_experiment(name)
    return plan_cells(experiment, budget, seeds=seeds, places=PLACES, output_dir=folder, progress=False)


# ------------------------------------------------------------------------------------------------------- the YAML files


def test_the_papers_numbers() -> None:
    for row, numbers in PAPER.items():
        paper = read_experiment("table6" if row == "cn-plus" else "table5").rows[row].paper
        names = [f"{dataset}-{number}" for dataset in ("cifar10", "cifar100") for number in (1, 2, 3, 4)]
        assert [paper[name] for name in names] == [(number,) for number in numbers], row
    assert {name: row.paper["cifar100"] for name, row in read_experiment("table7").rows.items() if row.paper} == VIT
    assert {name: row.paper["blended"] for name, row in read_experiment("table8").rows.items() if row.paper} == BLENDED


def test_the_papers_protocol() -> None:
    first = {cell.name: cell.config for cell in cells_of("table5")}
    assert len(first) == 4 * 8 * 3
    for number, (rate, decay) in enumerate([(1e-3, 1e-4), (1e-3, 2e-5), (5e-3, 1e-4), (5e-3, 2e-5)], start=1):
        for dataset in ("cifar10", "cifar100"):
            config = first[f"cn.{dataset}-{number}.seed1"]
            assert (config.learning_rate, config.weight_decay, config.seed) == (rate, decay, 1)
            assert config.dataset == (PLACES[dataset],)
            assert (config.batch_size, config.epochs, config.optimizer, config.momentum) == (256, 100, "rmsprop", 0.9)
            assert (config.contexts, config.augment) == ("clusters:gmm:3", ())
    for name in ("table7", "table8"):
        for cell in cells_of(name):
            config = cell.config
            assert (config.batch_size, config.epochs, config.patience, config.validation_fraction) == (
                216,
                500,
                10,
                0.1,
            )
            assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adamw", 1e-3, 1e-4)
            assert (config.model, config.image_size, config.augment) == ("cn_paper_vit", 72, ("flip", "crop"))
            assert config.model_args == {}
    assert {cell.config.contexts for cell in cells_of("table7")} == {"column:coarse_label"}
    assert {cell.config.dataset for cell in cells_of("table8")} == {(PLACES["cifar100"], PLACES["mnist"])}


@pytest.mark.parametrize(
    ("name", "row", "slots"),
    [
        ("table5", "bn", None),
        ("table5", "mn", ["bn3"]),
        ("table5", "cn", ["conv1"]),
        ("table5", "cn-conv3", ["bn3"]),
        ("table7", "vit", None),
        ("table7", "vit-bn", ["patch_embed.proj"]),
        ("table7", "cn-patches", ["patch_embed"]),
        ("table7", "cn-channels", ["patch_embed.proj"]),
        ("table8", "cn-patches", ["patch_embed"]),
    ],
)
def test_every_row_is_normalised_where_the_paper_says(name: str, row: str, slots: list[str] | None) -> None:
    config = next(cell.config for cell in cells_of(name) if cell.row == row)
    norms = config.context_norm_config()
    if slots is None:
        assert norms is None
        return
    assert norms is not None
    assert norms.mode != "mn" or norms.num_contexts == 3
    network = timm.create_model(config.model)
    for buffer in network.buffers():
        buffer.fill_(1)  # batch norms that saw data, or patching warns
    report = cn_hf.patch_report(cn_hf.patch_model(network, config=norms))
    assert [slot.name for slot in report] == slots


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_differ_in_their_normalization_alone(name: str, budget: str) -> None:
    """Every cell's config is valid, and all rows of a column and seed share everything else."""
    shared: dict[tuple[str, int], dict[str, object]] = {}
    for cell in cells_of(name, budget):
        options = cell.config.to_dict()
        kept = {option: options[option] for option in options if option not in (*ROW_OPTIONS, "output_dir")}
        assert shared.setdefault((cell.column, cell.seed), kept) == kept, cell.name
        assert cell.config.seed == cell.seed
    if budget == "small":
        networks = {cell.config.model: cell.config.model_args for cell in cells_of(name, budget)}
        assert networks == {cell.config.model: cell.config.model_args for cell in cells_of(name, "paper")}
        assert all(cell.config.batch_size for cell in cells_of(name, budget))


def test_figures_and_table_6_add_no_cells() -> None:
    for name, source in (("table6", "table5"), ("fig3", "table5"), ("fig4", "table7")):
        folders = {cell.folder for cell in cells_of(source)}
        assert {cell.folder for cell in cells_of(name)} <= folders, name
    assert {cell.row for cell in cells_of("table6")} == {"cn"}
    assert {cell.row for cell in cells_of("fig3")} == {"bn", "mn", "cn"}


def test_a_small_table_5_is_what_was_asked_for() -> None:
    cells = cells_of("table5", "small")
    assert {cell.column for cell in cells} == {"cifar10-1", "cifar10-3"}
    assert {cell.seed for cell in cells} == {0, 1}


TINY = {
    "title": "Tiny",
    "options": {"model": "cn_digits_convnet", "contexts": "column:label", "epochs": 1},
    "measures": {"top-1": {"k": 1}},
    "columns": {"one": {"title": "One", "datasets": ["mnist"]}},
    "baseline": "bn",
    "rows": {
        "bn": {"title": "BN", "options": {"mode": "none"}, "paper": {"one": [1.0]}},
        "cn": {"title": "CN", "options": {"mode": "cn-channels", "where": "norms"}},
        "masked": {"title": "BN masked", "of": "bn", "protocol": "masked baseline"},
    },
    "figures": [],
    "differences": ["none"],
    "budgets": {name: {"seeds": 2, "summary": "all"} for name in BUDGETS},
}


def write_yaml(folder: Path, **changes: object) -> Path:
    """A folder with the tiny experiment; ``rows__bn__paper=...`` changes an entry, None removes it."""
    content = json.loads(json.dumps(TINY))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_a_file_as_it_must_be(tmp_path: Path) -> None:
    experiment = read_experiment("tiny", write_yaml(tmp_path))
    assert list(experiment.trained) == ["bn", "cn"]
    assert experiment.rows["masked"].of == "bn"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, r"tiny\.yaml: unknown option 'titel'; did you mean 'title'"),
        ({"rows__bn__titel": "x"}, r"unknown option 'rows\.bn\.titel'; did you mean 'title'"),
        ({"title": None}, "'title' is missing"),
        ({"columns__one__title": None}, r"'columns\.one\.title' is missing"),
        ({"options": {"epoch": 1}}, "options holds 'epoch'; did you mean 'epochs'"),
        ({"options": {"seed": 1}}, "options holds 'seed'"),
        ({"options": {"model": "x", "mode": "bn"}}, "options holds 'mode'"),
        ({"rows__bn__options": {"epochs": 3}}, r"rows\.bn\.options holds 'epochs'"),
        ({"rows__bn__paper": {"two": [1]}}, r"rows\.bn\.paper holds 'two'; .*'one'"),
        ({"rows__bn__paper": {"one": [1, 2]}}, r"rows\.bn\.paper\.one must list 1 numbers"),
        ({"rows__bn__paper": {"one": ["x"]}}, r"rows\.bn\.paper: option 'paper' must be a finite number, got 'x'"),
        ({"rows__bn__paper": {"one": [True]}}, "must be a finite number, got True"),
        ({"rows__masked__of": "bm"}, r"rows\.masked\.of is 'bm'; did you mean 'bn'"),
        ({"rows": {"b.n": {"title": "BN"}}}, r"rows holds 'b\.n'"),
        ({"baseline": "masked"}, "baseline is 'masked'"),
        ({"budgets__small__columns": ["two"]}, r"budgets\.small\.columns holds 'two'"),
        ({"budgets__small__seeds": 0}, r"budgets\.small\.seeds must be at least 1, got 0"),
        ({"budgets__small__seeds": True}, r"budgets\.small: option 'seeds' must be a whole number, got True"),
        ({"budgets__small__threads": 0}, "threads must be at least 1"),
        ({"budgets__small": None}, "budgets must have small besides paper, smoke"),
        ({"figures": ["curves"]}, "unknown figures 'curves'"),
        ({"measures__top-1__k": "one"}, r"measures\.top-1: option 'k' must be a whole number"),
        ({"columns": {}}, "columns is empty"),
        ({"cells_of": "tiny"}, "cells_of is 'tiny'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_experiment("tiny", write_yaml(tmp_path, **changes))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"tiny\.yaml cannot be read"):
        read_experiment("tiny", tmp_path)
    (tmp_path / "tiny.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_experiment("tiny", tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown experiment 'table55'; did you mean 'table5'"):
        read_experiment("table55")
    with pytest.raises(ConfigError, match="unknown budget 'smal'; did you mean 'small'"):
        cells_of("table5", "smal")
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        cells_of("table5", seeds=0)
    cells = cells_of("table5", "small")
    with pytest.raises(ConfigError, match=r"no cell 'cn\.cifar10-1\.seed7'; did you mean 'cn\.cifar10-1\.seed[01]'"):
        select_cells(cells, ["cn.cifar10-1.seed7"])
    assert [cell.name for cell in select_cells(cells, ["cn.*.seed1", "bn.cifar10-1.seed0"])] == [
        "bn.cifar10-1.seed0", "cn.cifar10-1.seed1", "cn.cifar10-3.seed1",
    ]  # fmt: skip
    assert select_cells(cells, []) == cells


# ------------------------------------------------------------------------------------------------------------- datasets


def write_dataset(folder: Path, name: str, **classes: int) -> None:
    columns = {"image": [None] * 4, **{column: [0] * 4 for column in classes}}
    labels = {column: ClassLabel(num_classes=count) for column, count in classes.items()}
    split = Dataset.from_dict(columns, features=Features({"image": Image(), **labels}))
    DatasetDict({"train": split, "test": split}).save_to_disk(str(folder / name))


def test_missing_datasets_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    write_dataset(tmp_path, "cifar100", fine_label=100, coarse_label=20)
    with pytest.raises(DatasetFileError, match="no dataset mnist under --data-root") as caught:
        find_datasets(["cifar100", "mnist"], tmp_path)
    assert f"{tmp_path / 'mnist'} with splits 'train' and 'test'" in str(caught.value)
    assert "'label' (10 classes)" in str(caught.value)
    assert f"hf download --repo-type dataset ylecun/mnist --local-dir {tmp_path / 'mnist'}" in str(caught.value)
    assert find_datasets(["cifar100"], tmp_path) == {"cifar100": str(tmp_path / "cifar100")}
    assert find_datasets(["cifar100"], None) == {"cifar100": "uoft-cs/cifar100"}
    with pytest.raises(ConfigError, match="unknown dataset 'cifar'"):
        find_datasets(["cifar"], tmp_path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"fine_label": 100, "coarse_label": 20}, None),
        ({"fine_label": 10, "coarse_label": 20}, "'fine_label': found 10 classes, expected 100"),
        ({"fine_label": 100}, "'coarse_label': found no such column, expected 20"),
    ],
)
def test_datasets_with_too_few_classes_are_refused(
    tmp_path: Path, classes: dict[str, int], message: str | None
) -> None:
    write_dataset(tmp_path, "cifar100", **classes)
    places = find_datasets(["cifar100"], tmp_path)
    if message is None:
        check_datasets(places)
    else:
        with pytest.raises(DatasetError, match=message):
            check_datasets(places)


# ----------------------------------------------------------------------------------------------- what a folder may hold


def write_run(cell: Cell, file: str = "run.json", **changes: object) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    config = {**cell.config.to_dict(), **changes}
    (cell.folder / file).write_text(json.dumps({"format": 1, "config": config}))


@pytest.mark.parametrize("file", ["run.json", "results.json"])
def test_runs_of_another_protocol_are_refused(tmp_path: Path, file: str) -> None:
    cell, *others = cells_of("table5", "small", folder=tmp_path)
    write_run(cell, file)
    check_cells([cell, *others])
    write_run(cell, file, dataset=["/elsewhere/cifar10"], output_dir="moved", checkpoint_steps=7)
    check_cells([cell])  # the same run, moved
    write_run(cell, file, epochs=100)
    with pytest.raises(ConfigError, match=r"epochs was 100, is 4.*Nothing was overwritten"):
        check_cells([*others, cell])
    write_run(cell, file, dataset=["/elsewhere/cifar100"])
    with pytest.raises(ConfigError, match="dataset was"):
        check_cells([cell])
    (cell.folder / file).write_text('{"config"')
    with pytest.raises(CheckpointError, match=r"cannot be read.*Remove its folder"):
        check_cells([cell])


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    cell = cells_of("table5", "small", folder=tmp_path)[0]
    assert read_result(cell) is None
    write_run(cell, "results.json")
    with pytest.raises(CheckpointError, match="not the results of a classifier"):
        read_result(cell)


def test_reports_of_another_budget_are_refused(tmp_path: Path) -> None:
    experiment = read_experiment("table5")
    check_report(tmp_path, experiment, "small")
    (tmp_path / "results.json").write_text(json.dumps({"experiment": "table5", "budget": "smoke"}))
    check_report(tmp_path, experiment, "smoke")
    with pytest.raises(ConfigError, match="report of table5 with budget smoke, this is table5 with budget small"):
        check_report(tmp_path, experiment, "small")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not the report of an experiment"):
        check_report(tmp_path, experiment, "small")


# -------------------------------------------------------------------------------------------------- what cells conclude


def protocol(name: str, kind: str, correct: int, samples: int = 1000) -> ProtocolRow:
    return ProtocolRow(name=name, kind=kind, explanation=name, num_samples=samples, correct={1: correct, 5: samples})  # type: ignore[arg-type]


def tiny_results(tmp_path: Path, cn: list[int], masked: list[int]) -> Results:
    """Two rows' cells with these numbers of right answers, seed by seed."""
    experiment: Experiment = read_experiment("tiny", write_yaml(tmp_path / "yaml"))
    cells = plan_cells(experiment, "small", seeds=2, places=PLACES, output_dir=tmp_path, progress=False)
    finished = []
    for cell in cells:
        if cell.row == "bn" and cell.seed < len(masked):
            rows = (
                protocol("masked baseline (x)", "leak check", masked[cell.seed]),
                protocol("baseline (x)", "baseline", 9),
            )
        elif cell.row == "cn" and cell.seed < len(cn):
            rows = (protocol("true contexts", "true contexts", cn[cell.seed]),)
        else:
            continue
        finished.append(CellResult(cell=cell, rows=rows, findings=("A leak.",), content={}))
    return Results(
        experiment=experiment,
        budget=experiment.budget("small"),
        cells=tuple(cells),
        finished=tuple(finished),
        epochs={},
    )


@pytest.mark.parametrize(
    ("cn", "masked", "verdict", "numbers"),
    [
        ([600, 610], [500, 520], "beats the masked BN", "top-1 60.50 % against 51.00 %, +9.50"),
        ([500, 520], [600, 610], "does not beat the masked BN", "top-1 51.00 % against 60.50 %, -9.50"),
        ([600], [590], "cannot be told apart from the masked BN", "+1.00"),
        ([600], [], "is not known", ""),
    ],
)
def test_the_sentence_on_the_masked_baseline(
    tmp_path: Path, cn: list[int], masked: list[int], verdict: str, numbers: str
) -> None:
    leak, sentence = sentences(tiny_results(tmp_path, cn, masked))
    assert leak == "One: A leak."
    assert verdict in sentence
    assert numbers in sentence


def test_a_baseline_alone_says_what_the_contexts_tell(tmp_path: Path) -> None:
    assert sentences(tiny_results(tmp_path, [], [500])) == ["One: A leak."]


def test_the_standard_error_against_the_masked_baseline() -> None:
    pairs = [
        (protocol("a", "true contexts", 630), protocol("b", "leak check", 580)),
        (protocol("a", "true contexts", 660), protocol("b", "leak check", 570)),
    ]
    difference, error = masked_difference(pairs)
    assert difference == pytest.approx((5.0 + 9.0) / 2)
    binomial = [p * (1 - p) / 1000 for p in (0.63, 0.58, 0.66, 0.57)]
    images = 1e4 * (binomial[0] + binomial[1] + binomial[2] + binomial[3]) / 2
    assert error == pytest.approx(math.sqrt(images + statistics.stdev([5.0, 9.0]) ** 2 / 2))
    one, only_images = masked_difference(pairs[:1])
    assert (one, only_images) == pytest.approx((5.0, 100 * math.sqrt(binomial[0] + binomial[1])))


def history(*accuracies: float | None) -> list[dict[str, float | None]]:
    return [{"epoch": number, "validation_accuracy": value} for number, value in enumerate(accuracies, start=1)]


def test_epochs_to_reach() -> None:
    assert epochs_to_reach(history(0.1, 0.3, 0.2), 0.3) == 2
    assert epochs_to_reach(history(0.1, None, 0.4), 0.3) == 3
    assert epochs_to_reach(history(0.1), 0.3) is None


def test_the_table_of_epochs(tmp_path: Path) -> None:
    """The best of the same seed's baseline is to be reached; a stopped cell counts with what it has."""
    results = tiny_results(tmp_path, [600, 610], [500, 520])
    epochs = {
        "bn.one.seed0": history(0.2, 0.5, 0.4),
        "bn.one.seed1": history(0.2, 0.3, 0.6),
        "cn.one.seed0": history(0.5, 0.6, 0.7),
        "cn.one.seed1": history(0.5),
    }
    table = epochs_table(dataclasses.replace(results, epochs=epochs))
    assert "best of BN, validation %" in table
    row = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert row[1:-1] == ["One", "55.00 ± 7.07 (n = 2)", "2.5 ± 0.7 (n = 2)", "1.0 (n = 1), never in 1 of 2"]
