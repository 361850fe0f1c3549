"""What an experiment is: one YAML file for each table and figure of the paper, read into frozen dataclasses.

A table's file holds the paper's numbers, the options that all its rows share, its columns (a dataset and what the paper
varies), its rows (a network with one normalization) and its budgets. A row with ``of`` is not trained but reads
another row's cells, by another protocol. A file with ``cells_of`` trains nothing: its rows are ``of`` another's.

    paper's table = rows x columns x measures       cells = trained rows x columns of the budget x seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from cn_hf.errors import ConfigError, nearest

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number the paper prints of a row and column: top-``k`` accuracy, in percent.

    ``context``: over the test images of this context only.
    """

    title: str
    k: int
    context: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A dataset and the options the paper varies on it; several datasets are blended."""

    name: str
    title: str
    datasets: tuple[str, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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

    name: str
    title: str
    options: Mapping[str, Any]
    of: str
    protocol: str | None
    paper: Mapping[str, tuple[float | None, ...]]
    differences: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of the paper's protocol is run.

    Attributes:
        name: Of ``BUDGETS``, which every experiment has, or another one.
        seeds: Runs of every cell.
        threads: Of torch on a CPU; None: as many as it takes by itself.
        columns: Those that are run.
        options: Of ``TrainingConfig``, in place of the paper's.
        summary: All that in words, for the report.
    """

    name: str
    seeds: int
    threads: int | None
    columns: tuple[str, ...]
    options: Mapping[str, Any]
    summary: str

    @property
    def is_evidence(self) -> bool:
        """Whether results say something about the paper; else they check the machinery."""
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
    content = _load(folder / f"{name}.yaml")
    if (trains := content.values.pop("cells_of", None)) is None:
        return _trained(name, content)
    if trains == name or trains not in known:
        raise content.error("cells_of", f"is {trains!r}; {nearest(str(trains), set(known) - {name})}")
    return _derived(name, content, read_experiment(trains, folder))


def _shipped() -> Path:
    """The YAML files: inside an installed package, or in ``scripts/`` of a checkout."""
    packaged = Path(__file__).parent / "yaml"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "scripts" / "experiments"


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Content:
    """A mapping of a YAML file, and where in which file it stands. Entries are taken out; what is left is unknown."""

    file: str
    place: str
    values: dict[str, Any]

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {self.place}{key} {problem}")

    def take(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.values.pop(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be a {kind.__name__}, got {value!r}")
        return value

    def names(self, key: str, known: Iterable[str] | None = None, default: list[str] | None = None) -> tuple[str, ...]:
        """A list of texts, each one of ``known``."""
        listed = self.take(key, list, default)
        for entry in listed:
            if not isinstance(entry, str):
                raise self.error(key, f"must list texts, got {entry!r}")
            if known is not None and entry not in known:
                raise self.error(key, f"holds {entry!r}; {nearest(entry, known)}")
        return tuple(listed)

    def options(self, known: Iterable[str]) -> dict[str, Any]:
        options = self.take("options", dict, {})
        for name in options:
            if name not in known:
                raise self.error("options", f"holds {name!r}; {nearest(str(name), known)}")
        return options

    def parts(self, key: str) -> dict[str, _Content]:
        """A mapping of names to mappings."""
        parts = {}
        for name, value in self.take(key, dict).items():
            if not isinstance(name, str) or not name or (key in ("rows", "columns") and set(name) & set("./*?[] ")):
                raise self.error(key, f"holds {name!r}; a name is text, in cells without any of . / * ? [ ] and blanks")
            if not isinstance(value, dict):
                raise self.error(f"{key}.{name}", f"must be a mapping, got {value!r}")
            parts[name] = _Content(self.file, f"{self.place}{key}.{name}.", dict(value))
        if not parts:
            raise self.error(key, "is empty")
        return parts

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        for key in self.values:
            raise self.error(str(key), "is unknown")


def _load(file: Path) -> _Content:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} must be a mapping, got {type(values).__name__}")
    return _Content(file.name, "", values)


def _trained(name: str, content: _Content) -> Experiment:
    trainer = content.take("trainer", str, TRAINERS[0])
    if trainer not in TRAINERS:
        raise content.error("trainer", f"is {trainer!r}; {nearest(trainer, TRAINERS)}")
    columns = {key: _column(key, part, trainer) for key, part in content.parts("columns").items()}
    measures = _measures(content)
    parts = content.parts("rows")
    own = [key for key, part in parts.items() if "of" not in part.values]
    rows = {key: _row(key, part, columns, measures, own) for key, part in parts.items()}
    experiment = Experiment(
        name=name,
        title=content.take("title", str),
        trains=name,
        trainer=trainer,
        options=content.options(_config_fields(trainer)),
        columns=columns,
        rows=rows,
        trained={key: rows[key] for key in own},
        measures=measures,
        baseline=_one_of(content, "baseline", own),
        budgets=_budgets(content, columns, trainer),
        figures=content.names("figures", FIGURES),
        differences=content.names("differences"),
    )
    content.finish()
    return experiment


def _derived(name: str, content: _Content, source: Experiment) -> Experiment:
    """An experiment that reads another's cells: its own rows, measures and figures, all else the other's."""
    measures = _measures(content) if "measures" in content.values else ()
    rows = {
        key: _row(key, part, source.columns, measures, source.trained) for key, part in content.parts("rows").items()
    }
    experiment = dataclasses.replace(
        source,
        name=name,
        title=content.take("title", str),
        rows=rows,
        trained={key: row for key, row in source.trained.items() if key in {other.of for other in rows.values()}},
        measures=measures,
        figures=content.names("figures", FIGURES, []),
        differences=(*source.differences, *content.names("differences", default=[])),
    )
    content.finish()
    return experiment


def _column(name: str, content: _Content, trainer: str) -> Column:
    column = Column(
        name=name,
        title=content.take("title", str),
        datasets=content.names("datasets"),
        options=content.options((*COLUMN_OPTIONS, *TRAINER_COLUMN_OPTIONS[trainer])),
    )
    content.finish()
    return column


def _measures(content: _Content) -> tuple[Measure, ...]:
    measures = []
    for title, part in content.parts("measures").items():
        context = part.take("context", str) if "context" in part.values else None
        measures.append(Measure(title=title, k=part.take("k", int), context=context))
        part.finish()
    return tuple(measures)


def _row(
    name: str,
    content: _Content,
    columns: Mapping[str, Column],
    measures: tuple[Measure, ...],
    trained: Iterable[str],
) -> Row:
    paper = {}
    for column, values in content.take("paper", dict, {}).items():
        if column not in columns:
            raise content.error("paper", f"holds {column!r}; {nearest(str(column), columns)}")
        if not isinstance(values, list) or len(values) != len(measures):
            raise content.error(f"paper.{column}", f"must list {len(measures)} numbers, got {values!r}")
        if not all(value is None or type(value) in (int, float) for value in values):
            raise content.error(f"paper.{column}", f"must list numbers, got {values!r}")
        paper[column] = tuple(None if value is None else float(value) for value in values)
    row = Row(
        name=name,
        title=content.take("title", str),
        options=content.options(ROW_OPTIONS) if "of" not in content.values else {},
        of=_one_of(content, "of", trained) if "of" in content.values else name,
        protocol=content.take("protocol", str) if "protocol" in content.values else None,
        paper=paper,
        differences=content.take("differences", str, ""),
    )
    if row.of not in trained:
        raise content.error("of", "is missing: this experiment trains nothing")
    content.finish()
    return row


def _budgets(content: _Content, columns: Mapping[str, Column], trainer: str) -> dict[str, Budget]:
    budgets = {}
    fields = _config_fields(trainer)
    for name, part in content.parts("budgets").items():
        budgets[name] = Budget(
            name=name,
            seeds=part.take("seeds", int),
            threads=part.take("threads", int) if "threads" in part.values else None,
            columns=part.names("columns", columns, list(columns)),
            options=part.options(fields),
            summary=part.take("summary", str),
        )
        for key, value in (("seeds", budgets[name].seeds), ("threads", budgets[name].threads)):
            if value is not None and value < 1:
                raise part.error(key, f"must be at least 1, got {value}")
        part.finish()
    if missing := [name for name in BUDGETS if name not in budgets]:
        raise content.error("budgets", f"must have {', '.join(missing)} besides {', '.join(budgets) or 'none'}")
    return budgets


def _one_of(content: _Content, key: str, known: Iterable[str]) -> str:
    value = content.take(key, str)
    if value not in known:
        raise content.error(key, f"is {value!r}; {nearest(value, known)}")
    return value


def _config_fields(trainer: str) -> list[str]:
    reserved = {*RESERVED, *ROW_OPTIONS, *COLUMN_OPTIONS}
    return [field.name for field in dataclasses.fields(config_class(trainer)) if field.name not in reserved]
