"""``cn-hf evaluate``: a checkpoint judged honestly on a data set, with contexts from a column, a folder, or none.

Classes and contexts are matched by name, since another data set numbers them otherwise. Images of contexts that the
checkpoint does not know are evaluated without contexts, each such context for itself.

Shape legend: ``N`` images, ``T`` contexts, ``C`` classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from cn_hf.contexts import CONTEXT_COLUMN
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, DatasetError, nearest
from cn_hf.evaluation.environment import portable_path
from cn_hf.evaluation.protocols import evaluate_protocols
from cn_hf.evaluation.report import ProtocolReport
from cn_hf.evaluation.tables import format_accuracy, markdown_table, protocol_tables, write_results
from cn_hf.files import read_json, write_whole
from cn_hf.hub.checkpoint import from_pretrained
from cn_hf.hub.description import CLASSIFICATION, check_task
from cn_hf.hub.preprocessing import label_names_of, preprocessing_of
from cn_hf.hub.repository import HubOptions
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import router_of
from cn_hf.printing import for_markdown
from cn_hf.reading.access import features_of, raw_batches
from cn_hf.reading.images import find_image_column, open_image, unreadable
from cn_hf.reading.loading import find_label_column, load_split

__all__ = ["CheckpointEvaluation", "evaluate_checkpoint"]

RESULTS, TABLE = "results.json", "table.md"
CONTEXT_SPECS = ("none", "column:NAME", "folder", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvaluation:
    """The findings.

    Attributes:
        report: of the images whose contexts the checkpoint knows; of all images, without contexts, if there are none.
        unknown: a report for each context of the data that the checkpoint does not know, without contexts.
        facts: what was evaluated, as JSON types.
    """

    report: ProtocolReport
    unknown: dict[str, ProtocolReport]
    facts: dict[str, Any]

    def text(self) -> str:
        """Return the tables, as Markdown."""
        data = self.facts["data"]
        tables = [
            protocol_tables(self.report, title=f"{self.facts['checkpoint']} on {data['dataset']} ({data['split']})")
        ]
        if self.unknown:
            tables += ["### Contexts that the checkpoint does not know", _unknown_table(self.unknown)]
        return "\n\n".join(tables)

    def write(self, folder: Path) -> None:
        """Write ``results.json`` and ``table.md``.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        results = {**self.facts, "evaluation": self.report, "unknown_contexts": self.unknown}
        try:
            write_whole(folder / TABLE, (self.text() + "\n").encode(errors="backslashreplace"))
            write_results(folder / RESULTS, results)
        except OSError as error:
            raise CheckpointError(f"The results cannot be written to {folder}: {error}") from error


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    *,
    contexts: str = "none",
    split: str | None = None,
    train_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    options: HubOptions | None = None,
    progress: bool = True,
) -> CheckpointEvaluation:
    """Evaluate a classifier on a data set, its images prepared as the checkpoint says.

    Args:
        checkpoint: folder of a checkpoint or run, or ``"user/name"`` on the Hub.
        data: a folder or Hub id, as ``load_splits`` reads them.
        contexts: ``"column:NAME"``; ``"folder"``: the folder above that of the class; ``"source"``: the checkpoint's
            own context source; ``"none"``: the column ``context_ids``, if there is one.
        split: by default ``test``, or the only one.
        train_split: of the same data, where the leak check counts the classes of each context; None for no leak check.
        image_column: None for the one there is.
        label_column: None for the one there is.
        batch_size: images at once.
        seed: of the shuffled contexts.
        device: where the model runs.
        options: how the Hub is asked.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: the model is no classifier, or an option is out of range.
        DatasetError: the data lacks the split or a column, or has a class that the checkpoint does not know.
        DatasetFileError: the data cannot be read.
    """
    if batch_size < 1:
        raise ConfigError(f"Expected a batch size of at least 1, received {batch_size}.")
    _check_spec(contexts)
    options = HubOptions() if options is None else options
    model = from_pretrained(
        checkpoint, device=device, revision=options.revision, subfolder=options.subfolder, token=options.token
    )
    check_task(model, CLASSIFICATION)
    reading = _Reading(model, contexts, image_column, label_column, batch_size)
    dataset = load_split(data, split)
    if len(dataset) == 0:
        raise DatasetError(f"Expected images in the split, {data} has none.")
    labels, names = reading.labels(dataset), reading.contexts(dataset)
    known = reading.known_contexts(names)
    counts = None
    if train_split is not None and known:
        counts = reading.class_counts(load_split(data, train_split), known)
    groups = _groups(names, known)
    shown: dict[str, Any] = {"num_classes": reading.num_classes, "seed": seed, "progress": progress}
    shown["top_k"] = (1, 5) if reading.num_classes > 5 else (1,)
    if not reading.has_contexts:
        network, shown = None, shown | {"baseline": model, "context_names": known}
    else:
        network = model

    def judged(rows: list[int], ids: Tensor | None, class_counts: Tensor | None = None) -> ProtocolReport:
        images = _Images(reading, dataset, rows, labels[rows], ids)
        return evaluate_protocols(network, images, class_counts=class_counts, **shown)

    unknown = {name: judged(rows, None) for name, rows in groups.items() if name not in known}
    told = [row for name in known for row in groups.get(name, [])]
    if told:
        told.sort()
        assert names is not None
        ids = torch.tensor([known.index(names[row]) for row in told])
        report = judged(told, ids, counts)
    else:
        report = judged(list(range(len(dataset))), None)
    if unknown:
        count = sum(len(groups[name]) for name in unknown)
        warnings.warn(
            f"{count} of {len(dataset)} images are of {len(unknown)} contexts that the checkpoint does not know "
            f"({', '.join(map(repr, list(unknown)[:20]))}); they are evaluated without contexts. To give it such a "
            "context: cn-hf adapt.",
            UserWarning,
            stacklevel=2,
        )
    facts = {
        "checkpoint": portable_path(checkpoint),
        "data": {
            "dataset": portable_path(data),
            "split": split or str(dataset.split or ""),
            "images": len(dataset),
            "contexts": contexts,
            "num_classes": reading.num_classes,
            "class_names": reading.class_names,
            "context_names": known or None,
        },
        "evaluated_split": split or str(dataset.split or ""),
    }
    return CheckpointEvaluation(report=report, unknown=unknown, facts=facts)


def check_results_folder(folder: Path) -> None:
    """Raise ``CheckpointError`` for a folder whose results are not those of an evaluation of a checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"Expected a folder for the results, {folder} is a file. Name another with -o.")
    if not any((folder / name).exists() for name in (RESULTS, TABLE)):
        return
    try:
        own = "unknown_contexts" in read_json(folder / RESULTS)
    except (OSError, ValueError, TypeError):
        own = False
    if not own:
        raise CheckpointError(
            f"Expected a folder of its own for the results, {folder} holds those of something else, a run perhaps. "
            "Name another with -o."
        )


# ------------------------------------------------------------------------------------------------------------- reading


class _Reading:
    """The reading of data for one model: columns, classes by name, contexts by name, preprocessing."""

    def __init__(
        self, model: nn.Module, spec: str, image_column: str | None, label_column: str | None, batch_size: int
    ) -> None:
        config, router = getattr(model, "config", None), router_of(model)
        found = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
        if not found:
            raise ConfigError(f"Expected a classifier of images, received a {type(model).__name__} without classes.")
        self.num_classes = int(found)
        names = label_names_of(model, self.num_classes)
        unnamed = all(name in (f"class {n}", f"LABEL_{n}") for n, name in enumerate(names))
        self.class_names = None if unnamed else names
        self.has_contexts = router.config.mode not in BASELINES
        count = router.config.num_contexts
        self.own_contexts = list(router.config.context_names or map(str, range(count))) if self.has_contexts else []
        self.preprocess, self.source, self.batch_size = preprocessing_of(model), router.source, batch_size
        self._spec, self._image_column, self._label_column = spec, image_column, label_column

    def image_column(self, dataset: Any) -> str:
        return find_image_column(features_of(dataset), self._image_column)

    def labels(self, dataset: Any) -> Tensor:
        """Return the class of each image as the model numbers it, ``(N,)``."""
        features, column = features_of(dataset), self._label_column
        if column is None:
            column = "label" if _is_text(features.get("label")) else find_label_column(dataset)
        elif not _is_text(features.get(column)):
            column = find_label_column(dataset, column)
        values, named = _values(dataset, column)
        if named and self.class_names is not None:
            place = {name: number for number, name in enumerate(self.class_names)}
            for row, value in enumerate(values):
                if value not in place:
                    raise DatasetError(
                        f"Row {row} is of the class {value!r}, which the checkpoint does not know; "
                        f"{nearest(str(value), self.class_names)}"
                    )
            return torch.tensor([place[value] for value in values])
        if named:
            order = _order(features[column], values)
            warnings.warn(
                f"The checkpoint knows no names of its {self.num_classes} classes: those of the data are taken in "
                "their order.",
                UserWarning,
                stacklevel=3,
            )
            values = [order[value] for value in values]
        labels = torch.tensor(values)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise DatasetError(
                f"Expected labels 0 to {self.num_classes - 1} in column {column!r}, received {int(labels.min())} to "
                f"{int(labels.max())}."
            )
        return labels

    def contexts(self, dataset: Any) -> list[str] | None:
        """Return the name of each image's context, or None without contexts."""
        kind, _, column = self._spec.partition(":")
        if kind == "none" and CONTEXT_COLUMN not in features_of(dataset):
            return None
        if kind == "folder":
            return _folders(dataset, self.image_column(dataset))
        if kind == "source":
            if self.source is None:
                raise ConfigError("Expected a checkpoint with a context source, this one has none. Give column:NAME.")
            ids = self.source.apply(dataset)[CONTEXT_COLUMN]  # type: ignore[attr-defined]
            return [str(self.source.names[number]) for number in ids]  # type: ignore[attr-defined]
        column = column or CONTEXT_COLUMN
        if column not in features_of(dataset):
            raise DatasetError(f"The data has no column {column!r}; {nearest(column, features_of(dataset))}")
        values, named = _values(dataset, column)
        if column == CONTEXT_COLUMN and not named and self.own_contexts:  # ids
            wrong = next((row for row, value in enumerate(values) if not 0 <= value < len(self.own_contexts)), None)
            if wrong is not None:
                raise DatasetError(
                    f"Expected context ids 0 to {len(self.own_contexts) - 1}, row {wrong} has {values[wrong]!r}."
                )
            return [self.own_contexts[value] for value in values]
        return [str(value) for value in values]

    def known_contexts(self, names: Sequence[str] | None) -> list[str]:
        """Return the contexts that ids count: the model's, or those of the data for a baseline without."""
        return self.own_contexts if self.has_contexts or names is None else sorted(set(names))

    def class_counts(self, train: Any, known: Sequence[str]) -> Tensor | None:
        """Return the training images of each class in each context, ``(T, C)``; None where they have no contexts."""
        names = self.contexts(train)
        if names is None:
            return None
        counts = torch.zeros(len(known), self.num_classes, dtype=torch.int64)
        for name, label in zip(names, self.labels(train).tolist(), strict=True):
            if name in known:
                counts[known.index(name), label] += 1
        return counts if bool(counts.any()) else None


class _Images:
    """Batches of some rows of a data set, prepared for the model; they can be passed over again and again."""

    def __init__(self, reading: _Reading, dataset: Any, rows: list[int], labels: Tensor, ids: Tensor | None) -> None:
        self._reading, self._dataset, self._rows = reading, dataset, rows
        self._labels, self._ids = labels, ids

    def __len__(self) -> int:
        return -(-len(self._rows) // self._reading.batch_size)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        column, start = self._reading.image_column(self._dataset), 0
        for rows, batch in raw_batches(self._dataset, [column], self._reading.batch_size, self._rows):
            pixels = [self._prepared(value, row, column) for row, value in zip(rows, batch[column], strict=True)]
            stop = start + len(rows)
            found = {"pixel_values": torch.cat(pixels), "labels": self._labels[start:stop], "index": torch.tensor(rows)}
            if self._ids is not None:
                found["context_ids"] = self._ids[start:stop]
            yield found
            start = stop

    def _prepared(self, value: object, row: int, column: str) -> Tensor:
        image = open_image(value, row, column, None)
        try:
            return self._reading.preprocess([image])
        except CnHfError:
            raise
        except ValueError as error:  # of a mode that has no 8-bit meaning
            raise unreadable(row, column, str(error)) from error


def _check_spec(spec: str) -> None:
    kind, separator, column = spec.partition(":")
    if spec not in ("none", "folder", "source") and not (kind == "column" and separator and column):
        raise ConfigError(f"Expected --contexts as {', '.join(CONTEXT_SPECS)}; received {spec!r}.")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _values(dataset: Any, column: str) -> tuple[list[Any], bool]:
    """Return the values of a column, by name where they have names, and whether they have."""
    feature = features_of(dataset)[column]
    values = dataset.with_format(None).select_columns([column])[:][column]
    named = feature.names if isinstance(feature, datasets.ClassLabel) else None
    missing = next((row for row, value in enumerate(values) if value is None or (named and value == -1)), None)
    if missing is not None:
        raise DatasetError(f"Row {missing} has no {column!r}: every row needs one.")
    if named is not None:
        return [named[value] for value in values], True
    if not all(isinstance(value, (str, int)) for value in values[:1]):
        raise DatasetError(f"Expected names or integers in column {column!r}, received {feature}.")
    return values, _is_text(feature)


def _order(feature: Any, values: Sequence[str]) -> dict[str, int]:
    names = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(values))
    return {name: number for number, name in enumerate(names)}


def _folders(dataset: Any, column: str) -> list[str]:
    """Return the name of the folder above that of the class, for each image."""
    names = []
    for rows, batch in raw_batches(dataset, [column], 1000):
        for row, value in zip(rows, batch[column], strict=True):
            name = Path((value or {}).get("path") or "").parent.parent.name
            if not name:
                raise DatasetError(
                    f"Expected image files in folders context/class/image, row {row} knows no such path. Give "
                    "--contexts column:NAME."
                )
            names.append(name)
    return names


def _groups(names: Sequence[str] | None, known: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each context, the known ones first."""
    groups: dict[str, list[int]] = {name: [] for name in known}
    for row, name in enumerate(names or ()):
        groups.setdefault(name, []).append(row)
    return {name: rows for name, rows in groups.items() if rows}


def _unknown_table(reports: Mapping[str, ProtocolReport]) -> str:
    first, *_ = found = list(reports.values())
    k = min(first.top_k)
    rows = []
    for name in [row.name for row in first if all(report[row.name].available for report in found)]:
        rows.append([name, *(format_accuracy(report[name].correct[k], report[name].num_samples) for report in found)])
    heads = [f"{for_markdown(name)} (n = {report.rows[0].num_samples})" for name, report in reports.items()]
    return markdown_table([f"top-{k}, %", *heads], rows)
