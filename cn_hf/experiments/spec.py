"""Experiments: one YAML file for each table and figure of the paper, read into frozen dataclasses.

A table's file holds the paper's numbers, the options that all its rows share, its columns (a dataset and what the paper
varies), its rows (a network with one normalization) and its budgets. A row with ``of`` is not trained but reads
another row's cells, by another protocol. A file with ``cells_of`` trains nothing: its rows are ``of`` another's.

    paper's table = rows x columns x measures       cells = trained rows x columns of the budget x seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BeforeValidator

from cn_hf.errors import ConfigError, nearest
from cn_hf.files import MOST_YAML, read_bounded
from cn_hf.validation import Count, Number, Options, Text, Texts, one_of, several, validated

if TYPE_CHECKING:
    from cn_hf.training.config import TrainingConfig

__all__ = [
    "BUDGETS",
    "EXPERIMENTS",
    "TRAINERS",
    "Budget",
    "Column",
    "Experiment",
    "Measure",
    "Row",
    "config_class",
    "read_experiment",
]

EXPERIMENTS = ("table5", "table6", "table7", "table8", "table9", "table10", "fig3", "fig4")
BUDGETS = ("paper", "small", "smoke")
TRAINERS = ("classifier", "adamatch")
FIGURES = ("validation_error", "validation_loss", "accuracies", "contexts")

# All else is shared, so that rows differ in their normalization alone.
ROW_OPTIONS = ("mode", "where", "num_contexts", "norm_options", "calibrate")
COLUMN_OPTIONS = ("learning_rate", "weight_decay", "label_column")
# What another method's protocol may differ in, too; not reserved for columns.
TRAINER_COLUMN_OPTIONS = {
    "classifier": (),
    "adamatch": (
        "augment",
        "augment_options",
        "labelled_neighbours",
        "standardize",
        "strong_convolution",
        "strong_magnitude",
        "alignment",
    ),
}
# The runner sets these.
RESERVED = ("dataset", "seed", "output_dir", "progress", "baseline")


@validated
class Measure:
    """A number the paper prints of a row and column: top-``k`` accuracy, in percent.

    ``context``: over the test images of this context only.
    """

    title: Text
    k: Count
    context: Text | None = None


@validated
class Column:
    """A dataset and the options the paper varies on it; several datasets are blended."""

    name: Text
    title: Text
    datasets: Texts
    options: Options = dataclasses.field(default_factory=dict)


@validated
class Row:
    """A network with one normalization, or one protocol of its evaluation.

    Attributes:
        name: In cells.
        title: In tables.
        options: What makes it, where it is trained.
        of: The trained row whose cells it reads; often itself.
        protocol: The row of the evaluation that is read; None: true contexts, or the baseline itself.
        paper: For each column, the value of every measure, None where the paper prints none.
        differences: From the paper's protocol, besides those of all rows.
    """

    name: Text
    title: Text
    options: Options = dataclasses.field(default_factory=dict)
    of: Text
    protocol: Text | None = None
    paper: dict[Text, Annotated[tuple[Number | None, ...], several]] = dataclasses.field(default_factory=dict)
    differences: Text = ""


@validated
class Budget:
    """The part of the paper's protocol that is run.

    Attributes:
        name: Of ``BUDGETS``, which every experiment has, or another one.
        seeds: Runs of every cell.
        threads: Of torch on a CPU; None: as many as it takes by itself.
        columns: Those that are run; in a file none stands for all.
        options: Of ``TrainingConfig``, in place of the paper's.
        summary: All that in words, for the report.
    """

    name: Text
    seeds: Count
    threads: Count | None = None
    columns: Texts = ()
    options: Options = dataclasses.field(default_factory=dict)
    summary: Text

    @property
    def is_evidence(self) -> bool:
        """True if results say something about the paper; else they check the machinery."""
        return self.name == "paper"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
        name: "table5", ...
        title: Above its report.
        trains: The experiment whose cells it reads; its own name for a table that trains.
        trainer: Of ``TRAINERS``: how a cell is trained.
        options: Of ``TrainingConfig``, the same for all rows.
        columns: By name.
        rows: By name, in the order of the paper's table.
        trained: The rows whose cells those read, by name.
        measures: What the table prints; none for a figure.
        baseline: The row that never sees contexts, which the leak check masks.
        budgets: By name.
        figures: To draw.
        differences: From the paper's protocol, of all rows.
    """

    name: str
    title: str
    trains: str
    trainer: str
    options: Mapping[str, Any]
    columns: Mapping[str, Column]
    rows: Mapping[str, Row]
    trained: Mapping[str, Row]
    measures: tuple[Measure, ...]
    baseline: str
    budgets: Mapping[str, Budget]
    figures: tuple[str, ...]
    differences: tuple[str, ...]

    def budget(self, name: str) -> Budget:
        """The budget of this name.

        Raises:
            ConfigError: There is none.
        """
        if name not in self.budgets:
            raise ConfigError(f"unknown budget {name!r}; {nearest(name, self.budgets)}")
        return self.budgets[name]


def config_class(trainer: str) -> type[TrainingConfig]:
    """The class of a cell's config."""
    if trainer == "adamatch":
        from cn_hf.recipes.adamatch.config import AdaMatchConfig

        return AdaMatchConfig
    from cn_hf.training.config import TrainingConfig

    return TrainingConfig


def read_experiment(name: str, folder: Path | None = None) -> Experiment:
    """The experiment of this name.

    Args:
        name: One of ``EXPERIMENTS``.
        folder: Of YAML files; None for those that come with cn_hf.

    Raises:
        ConfigError: The name is unknown, or the file is not as it must be; the message names file and place.
    """
    known = EXPERIMENTS if folder is None else [file.stem for file in folder.glob("*.yaml")]
    if name not in known:
        raise ConfigError(f"unknown experiment {name!r}; {nearest(name, known)}")
    folder = _shipped() if folder is None else folder
    file = folder / f"{name}.yaml"
    content = _load(file)
    source = None
    if (trains := content.pop("cells_of", None)) is not None:
        if trains == name or trains not in known:
            raise ConfigError(f"{file.name}: cells_of is {trains!r}; {nearest(str(trains), set(known) - {name})}")
        source = read_experiment(trains, folder)
    try:
        return _trained(name, _Trained(**content)) if source is None else _derived(name, _Derived(**content), source)
    except ConfigError as error:
        raise type(error)(f"{file.name}: {error}") from None


def _shipped() -> Path:
    """The YAML files: inside an installed package, or in ``scripts/`` of a checkout."""
    packaged = Path(__file__).parent / "yaml"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "scripts" / "experiments"


def _load(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_bounded(file, MOST_YAML).decode())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} must be a mapping, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def _named(*keys: str) -> BeforeValidator:
    """Return a validator of a mapping of parts, which gives each part its own name under these keys."""

    def add(parts: Any) -> Any:
        if not isinstance(parts, Mapping):
            return parts
        return {
            name: {**dict.fromkeys(keys, name), **part} if isinstance(part, Mapping) else part
            for name, part in parts.items()
        }

    return BeforeValidator(add)


Measures = Annotated[dict[Text, Measure], _named("title")]
Rows = Annotated[dict[Text, Row], _named("name", "of")]
Figures = Annotated[tuple[Annotated[Text, one_of(FIGURES)], ...], several]


@validated
class _Derived:
    """The file of an experiment that reads another's cells."""

    title: Text
    measures: Measures = dataclasses.field(default_factory=dict)
    rows: Rows
    figures: Figures = ()
    differences: Texts = ()


@validated
class _Trained(_Derived):
    """The file of an experiment that trains."""

    trainer: Annotated[Text, one_of(TRAINERS)] = TRAINERS[0]
    options: Options = dataclasses.field(default_factory=dict)
    columns: Annotated[dict[Text, Column], _named("name")]
    baseline: Text
    budgets: Annotated[dict[Text, Budget], _named("name")]


def _trained(name: str, file: _Trained) -> Experiment:
    fields = _config_fields(file.trainer)
    trained = {key: row for key, row in file.rows.items() if row.of == key}
    column_options = (*COLUMN_OPTIONS, *TRAINER_COLUMN_OPTIONS[file.trainer])
    _check_known("options", file.options, fields)
    for key, column in file.columns.items():
        _check_cell_name(f"columns holds {key!r}", key)
        _check_known(f"columns.{key}.options", column.options, column_options)
    if not file.columns:
        raise ConfigError("columns is empty")
    _check_rows(file.rows, trained, file.columns, len(file.measures))
    if file.baseline not in trained:
        raise ConfigError(f"baseline is {file.baseline!r}; {nearest(file.baseline, trained)}")
    budgets = {}
    for key, budget in file.budgets.items():
        _check_known(f"budgets.{key}.columns", budget.columns, file.columns)
        _check_known(f"budgets.{key}.options", budget.options, fields)
        budgets[key] = dataclasses.replace(budget, columns=budget.columns or tuple(file.columns))
    if missing := [key for key in BUDGETS if key not in budgets]:
        raise ConfigError(f"budgets must have {', '.join(missing)} besides {', '.join(budgets) or 'none'}")
    return Experiment(
        name=name,
        title=file.title,
        trains=name,
        trainer=file.trainer,
        options=file.options,
        columns=file.columns,
        rows=file.rows,
        trained=trained,
        measures=tuple(file.measures.values()),
        baseline=file.baseline,
        budgets=budgets,
        figures=file.figures,
        differences=file.differences,
    )


def _derived(name: str, file: _Derived, source: Experiment) -> Experiment:
    """Return the experiment with its own rows, measures and figures, and all else of its source."""
    _check_rows(file.rows, source.trained, source.columns, len(file.measures))
    read = {row.of for row in file.rows.values()}
    return dataclasses.replace(
        source,
        name=name,
        title=file.title,
        rows=file.rows,
        trained={key: row for key, row in source.trained.items() if key in read},
        measures=tuple(file.measures.values()),
        figures=file.figures,
        differences=(*source.differences, *file.differences),
    )


def _check_rows(
    rows: Mapping[str, Row], trained: Mapping[str, Row], columns: Mapping[str, Column], num_measures: int
) -> None:
    if not rows:
        raise ConfigError("rows is empty")
    for key, row in rows.items():
        _check_cell_name(f"rows holds {key!r}", key)
        if row.of not in trained:
            raise ConfigError(f"rows.{key}.of is {row.of!r}; {nearest(row.of, trained)}")
        _check_known(f"rows.{key}.options", row.options, ROW_OPTIONS if row.of == key else ())
        _check_known(f"rows.{key}.paper", row.paper, columns)
        for column, values in row.paper.items():
            if len(values) != num_measures:
                raise ConfigError(f"rows.{key}.paper.{column} must list {num_measures} numbers, got {list(values)}")


def _check_cell_name(found: str, name: str) -> None:
    if not name or set(name) & set("./*?[] "):
        raise ConfigError(f"{found}; a name in cells is text without any of . / * ? [ ] and blanks")


def _check_known(place: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{place} holds {name!r}; {nearest(name, known)}")


def _config_fields(trainer: str) -> list[str]:
    reserved = {*RESERVED, *ROW_OPTIONS, *COLUMN_OPTIONS}
    return [field.name for field in dataclasses.fields(config_class(trainer)) if field.name not in reserved]
