"""The summary of an experiment's finished cells: the paper's table, honest rows, sentences, epochs needed.

Numbers are percent of the test images. A row with contexts is compared with the *masked baseline*: the network that
never saw contexts, told the same context, so that classes never seen with it in training are dropped.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cn_hf.evaluation.report import CONTEXT_ONLY, MASKED, ProtocolRow, standard_error
from cn_hf.evaluation.tables import ResultRow, comparison_table, format_runs, markdown_table
from cn_hf.experiments.cells import Cell, CellResult, protocol_name
from cn_hf.experiments.figures import Bar, Epochs
from cn_hf.experiments.spec import Budget, Column, Experiment, Measure, Row

__all__ = [
    "Results",
    "accuracy_bars",
    "epochs_table",
    "epochs_to_reach",
    "honest_tables",
    "masked_difference",
    "paper_tables",
    "sentences",
    "table_entries",
]

WITH_CONTEXTS, FLOOR = "true contexts", CONTEXT_ONLY
TOP_1 = Measure(title="top-1", k=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The finished cells of an experiment at one budget.

    Attributes:
        experiment: Which.
        budget: Which.
        cells: All that there are to be.
        finished: Results of those that are finished.
        epochs: The training of every cell that was begun, by its name.
    """

    experiment: Experiment
    budget: Budget
    cells: tuple[Cell, ...]
    finished: tuple[CellResult, ...]
    epochs: Mapping[str, Epochs]

    def columns(self) -> list[Column]:
        """Those of the budget that have a finished cell."""
        names = {result.cell.column for result in self.finished}
        return [self.experiment.columns[name] for name in self.budget.columns if name in names]

    def of(self, row: Row, column: Column) -> list[CellResult]:
        """The cells of a row in a column, seed by seed."""
        return [r for r in self.finished if r.cell.row == row.of and r.cell.column == column.name]

    def rows_with_contexts(self, column: Column) -> list[Row]:
        """Trained rows whose network is told contexts."""
        return [
            row
            for row in self.experiment.trained.values()
            if any(found.row().kind == WITH_CONTEXTS for found in self.of(row, column))
        ]

    def shown(self) -> list[Measure]:
        """Return the measures shown of each way to use a network: the table's where each is of one context, else top-k.

        The contexts' test images may be of very different numbers, and an accuracy over all of them says little then.
        """
        measures = self.experiment.measures
        if measures and all(measure.context is not None for measure in measures):
            return list(measures)
        ks = sorted({k for result in self.finished for row in result.rows for k in row.correct})
        return [Measure(title=f"top-{k}", k=k) for k in ks]

    def curves(self, column: Column) -> dict[str, dict[int, Epochs]]:
        """By title of the trained row the epochs of every seed, also of cells that were stopped or diverged."""
        found: dict[str, dict[int, Epochs]] = {}
        for row in self.experiment.trained.values():
            for cell in self.cells:
                if (cell.row, cell.column) == (row.of, column.name) and cell.name in self.epochs:
                    found.setdefault(row.title, {})[cell.seed] = self.epochs[cell.name]
        return found

    def first_with_contexts(self) -> list[CellResult]:
        """The first seed of every row and column that has contexts."""
        return [self.of(row, column)[0] for column in self.columns() for row in self.rows_with_contexts(column)]


# ---------------------------------------------------------------------------------------------------- the paper's table


def paper_tables(results: Results) -> list[str]:
    """A table *paper | ours | differences* for each column."""
    tables = []
    for column in results.columns():
        rows = []
        for row in results.experiment.rows.values():
            paper = row.paper.get(column.name, (None,) * len(results.experiment.measures))
            printed = {
                f"{measure.title}, %": value
                for measure, value in zip(results.experiment.measures, paper, strict=True)
                if value is not None
            }
            differences = f"as all rows; {row.differences}" if row.differences else "as all rows"
            rows.append(
                ResultRow(name=row.title, paper=printed, ours=_ours(results, row, column), differences=differences)
            )
        tables.append(comparison_table(rows, title=column.title))
    return tables


def table_entries(results: Results) -> list[dict[str, Any]]:
    """The same numbers for ``results.json``: one entry for each row, column and measure."""
    entries = []
    for column in results.columns():
        for row in results.experiment.rows.values():
            ours = _ours(results, row, column)
            for number, measure in enumerate(results.experiment.measures):
                values = ours[f"{measure.title}, %"]
                entries.append(
                    {
                        "row": row.name,
                        "column": column.name,
                        "measure": measure.title,
                        "paper": row.paper[column.name][number] if column.name in row.paper else None,
                        "ours": values,
                        "mean": statistics.fmean(values) if values else None,
                        "std": statistics.stdev(values) if len(values) > 1 else None,
                        "n": len(values),
                    }
                )
    return entries


def _ours(results: Results, row: Row, column: Column) -> dict[str, list[float]]:
    """For each measure the values of all seeds, in percent."""
    found = [result.row(row.protocol) for result in results.of(row, column)]
    return {
        f"{measure.title}, %": _percent(found, measure.k, measure.context) for measure in results.experiment.measures
    }


def _percent(rows: Sequence[ProtocolRow], k: int, context: str | None = None) -> list[float]:
    return [100 * value for row in rows if (value := row.accuracy(k, context=context)) is not None]


# ---------------------------------------------------------------------------------------------------------- honest rows


def honest_tables(results: Results) -> list[str]:
    """For each column every way to use every network, and what is not available and why."""
    tables = []
    for column in results.columns():
        ways = _ways(results, column)
        shown = results.shown()
        lines = [[name, *(format_runs(_percent(rows, m.k, m.context)) for m in shown)] for name, rows in ways]
        text = [
            f"### {column.title}",
            markdown_table(["network: protocol", *(f"{measure.title}, %" for measure in shown)], lines),
            *_test_images(ways[0][1][0], shown),
        ]
        missing = {protocol_name(rows[0]): rows[0].unavailable for _, rows in ways if not rows[0].available}
        text += [f"Not available: {name}, since {reason}" for name, reason in missing.items()]
        tables.append("\n\n".join(text))
    explained: dict[str, str] = {}
    for result in results.finished:
        explained |= {protocol_name(row): row.explanation for row in result.rows if row.explanation}
    return [*tables, "\n".join(f"- {name}: {explanation}" for name, explanation in explained.items())]


def _test_images(row: ProtocolRow, shown: Sequence[Measure]) -> list[str]:
    """Return the number of test images and the error that follows from it."""
    counts = {
        "" if m.context is None else f" of {m.context}": row.num_samples
        if m.context is None
        else row.context_samples.get(m.context, 0)
        for m in shown
    }
    return [
        f"{count:,} test images{of}: the choice of these alone leaves a standard error of up to "
        f"{50 / math.sqrt(count):.2f} points."
        for of, count in counts.items()
        if count
    ]


def accuracy_bars(results: Results, column: Column, measure: Measure) -> list[Bar]:
    """The same numbers as bars."""
    return [
        Bar(name=name, kind=rows[0].kind, values=values)
        for name, rows in _ways(results, column)
        if (values := _percent([row for row in rows if measure.k in row.correct], measure.k, measure.context))
    ]


def _ways(results: Results, column: Column) -> list[tuple[str, list[ProtocolRow]]]:
    """Names of networks and protocols, each with its evaluation rows, seed by seed; the context alone comes last."""
    ways: dict[str, list[ProtocolRow]] = {}
    floors: dict[int, ProtocolRow] = {}
    for row in results.experiment.trained.values():
        for result in results.of(row, column):
            for found in result.rows:
                if found.name == FLOOR:
                    floors.setdefault(result.cell.seed, found)
                # A network with contexts has no baseline of its own: the table's stands beside it.
                elif found.available or found.kind not in ("leak check", "baseline"):
                    ways.setdefault(f"{row.title}: {protocol_name(found)}", []).append(found)
    ways[f"no network: {FLOOR}"] = list(floors.values())
    return [(name, rows) for name, rows in ways.items() if rows]


# ------------------------------------------------------------------------------------------------------------ sentences


def sentences(results: Results) -> list[str]:
    """Return the information of the context on the label, and if each row with contexts beats the masked baseline."""
    said = []
    baseline = results.experiment.trained.get(results.experiment.baseline)
    for column in results.columns():
        first = next(result for result in results.finished if result.cell.column == column.name)
        said += [f"{column.title}: {leak}" for leak in first.findings[:1]]
        for row in results.rows_with_contexts(column):
            if baseline is None:
                continue
            masked = [found.row(MASKED).available for found in results.of(baseline, column)]
            if all(masked):
                against = [_against_masked(results, row, baseline, column)]
            else:  # labels of some contexts are not known, so that nothing can be masked
                against = [_against_untold(results, row, baseline, column, measure) for measure in results.shown()]
            said += [f"{column.title}: {sentence}" for sentence in against]
    return said


def _against_masked(results: Results, row: Row, baseline: Row, column: Column) -> str:
    """One sentence: whether a row with contexts beats the masked baseline of the same seeds."""
    masked = {found.cell.seed: found.row(MASKED) for found in results.of(baseline, column)}
    pairs = [(found.row(), masked[found.cell.seed]) for found in results.of(row, column) if found.cell.seed in masked]
    if not pairs:
        return f"Whether {row.title} beats the masked {baseline.title} is not known: not both are finished."
    verdict, numbers = _compared(pairs, TOP_1)
    return (
        f"{row.title} with true contexts {verdict} the masked {baseline.title}, which is told the same contexts: top-1 "
        f"{numbers}."
    )


def _against_untold(results: Results, row: Row, baseline: Row, column: Column, measure: Measure) -> str:
    """One sentence: whether a row with contexts beats the baseline, which is told none."""
    untold = {found.cell.seed: found.row() for found in results.of(baseline, column)}
    pairs = [(found.row(), untold[found.cell.seed]) for found in results.of(row, column) if found.cell.seed in untold]
    if not pairs:
        return f"Whether {row.title} beats {baseline.title} is not known: not both are finished."
    verdict, numbers = _compared(pairs, measure)
    return f"{row.title} with true contexts {verdict} {baseline.title}, which is told none: {measure.title} {numbers}."


def _compared(pairs: Sequence[tuple[ProtocolRow, ProtocolRow]], measure: Measure) -> tuple[str, str]:
    """A verdict, and the numbers that it rests on."""
    difference, error = masked_difference(pairs, measure)
    ours, theirs = (statistics.fmean(_percent(rows, measure.k, measure.context)) for rows in zip(*pairs, strict=True))
    if abs(difference) <= 2 * error:
        verdict = "cannot be told apart from"
    else:
        verdict = "beats" if difference > 0 else "does not beat"
    return verdict, (
        f"{ours:.2f} % against {theirs:.2f} %, {difference:+.2f} ± {error:.2f} points (standard error, "
        f"{_right(pairs[0][0], measure)[1]:,} test images, n = {len(pairs)})"
    )


def _right(row: ProtocolRow, measure: Measure) -> tuple[int, int]:
    """Test images that are right by a measure, and all that it is over."""
    if measure.context is None:
        return row.correct[measure.k], row.num_samples
    return row.context_correct[measure.k][measure.context], row.context_samples[measure.context]


def masked_difference(
    pairs: Sequence[tuple[ProtocolRow, ProtocolRow]], measure: Measure = TOP_1
) -> tuple[float, float]:
    """Mean difference of two protocols' accuracies over seeds, and its standard error, in points.

    The error has two parts: the choice of the test images, which all seeds share (binomial, as if the two had met
    different images, which overstates it), and the seeds.

    Args:
        pairs: For each seed the two rows.
        measure: Which accuracy.
    """
    counts = [[_right(row, measure) for row in pair] for pair in pairs]
    differences = [100 * (one[0] / one[1] - other[0] / other[1]) for one, other in counts]
    images = statistics.fmean(sum((100 * standard_error(*count)) ** 2 for count in pair) for pair in counts)
    seeds = statistics.variance(differences) / len(differences) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), math.sqrt(images + seeds)


# -------------------------------------------------------------------------------------------------------- epochs needed


def epochs_to_reach(epochs: Epochs, accuracy: float) -> int | None:
    """The first epoch whose validation accuracy is at least ``accuracy``, in [0, 1]; None if there is none."""
    for record in epochs:
        reached = record["validation_accuracy"]
        if reached is not None and reached >= accuracy:
            return int(record["epoch"])
    return None


def epochs_table(results: Results) -> str:
    """For each column the baseline's best validation accuracy, and the epochs every row needs to reach it."""
    baseline = results.experiment.trained.get(results.experiment.baseline)
    rows = list(results.experiment.trained.values())
    if baseline is None or len(rows) < 2:
        return ""
    lines = []
    for column in results.columns():
        curves = results.curves(column)
        best = {
            seed: max(accuracies)
            for seed, epochs in curves.get(baseline.title, {}).items()
            if (accuracies := [e["validation_accuracy"] for e in epochs if e["validation_accuracy"] is not None])
        }
        if best:
            cells = [_needed(curves.get(row.title, {}), best) for row in rows]
            lines.append([column.title, format_runs([100 * value for value in best.values()]), *cells])
    if not lines:
        return ""
    header = ["configuration", f"best of {baseline.title}, validation %", *(f"{row.title}, epoch" for row in rows)]
    note = (
        "The best validation accuracy of the same seed's baseline is to be reached. Validation gives networks with "
        "contexts the true ones."
    )
    return f"{markdown_table(header, lines)}\n\n{note}"


def _needed(runs: Mapping[int, Epochs], best: Mapping[int, float]) -> str:
    needed = [epochs_to_reach(epochs, best[seed]) for seed, epochs in runs.items() if seed in best]
    reached = [epoch for epoch in needed if epoch is not None]
    never = f"never in {len(needed) - len(reached)} of {len(needed)}"
    if len(reached) == len(needed):
        return format_runs(reached, digits=1)
    return f"{format_runs(reached, digits=1)}, {never}" if reached else never
