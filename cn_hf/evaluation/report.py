"""The report of an honest evaluation: one row per protocol, and the sentences that read them together.

A *protocol* is a way to use a network at test time: with the true contexts, without any, with wrong
ones, or as a baseline. Rows hold counts, not rates, so that nothing is lost in rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from cn_hf.errors import ConfigError, nearest

__all__ = [
    "BASELINE",
    "CONTEXT_ONLY",
    "MASKED",
    "ProtocolReport",
    "ProtocolRow",
    "RowKind",
    "standard_error",
]

# Names of rows; where there are several baselines, theirs go on in brackets.
CONTEXT_ONLY, BASELINE, MASKED = "context-only floor", "baseline", "masked baseline"

RowKind = Literal["true contexts", "deployable", "control", "leak check", "baseline"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolRow:
    """One protocol's result on the whole test set, each sample counted once.

    Attributes:
        name: as it stands in the table.
        kind: what the row is for: ``"true contexts"``, ``"deployable"`` (needs no context at test time), ``"control"``,
            ``"leak check"`` or ``"baseline"``.
        explanation: in words, what was done.
        num_samples: number of test samples.
        correct: for each k, the number of samples whose true class is among the k best; empty if not available.
        context_samples: samples per context name; empty if the test set has no contexts.
        context_correct: for each k, the number right per context name.
        unavailable: why there is no result, or None.
    """

    name: str
    kind: RowKind
    explanation: str
    num_samples: int
    correct: Mapping[int, int] = dataclasses.field(default_factory=dict)
    context_samples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    context_correct: Mapping[int, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    unavailable: str | None = None

    @property
    def available(self) -> bool:
        """True if the protocol could be run."""
        return self.unavailable is None

    def accuracy(self, k: int = 1, *, context: str | None = None) -> float | None:
        """Top-k accuracy in [0, 1], over all samples or those of one context; None if there is none.

        Raises:
            ConfigError: k was not evaluated, or the context is unknown.
        """
        if not self.available:
            return None
        if k not in self.correct:
            raise ConfigError(f"top-{k} was not evaluated; this row has {', '.join(f'top-{k}' for k in self.correct)}")
        if context is None:
            return self.correct[k] / self.num_samples
        if context not in self.context_samples:
            raise ConfigError(f"unknown context {context!r}; {nearest(context, self.context_samples)}")
        count = self.context_samples[context]
        return self.context_correct[k][context] / count if count else None

    def standard_error(self, k: int = 1) -> float | None:
        """Binomial standard error of the top-k accuracy: the uncertainty that comes from the choice of test samples."""
        return standard_error(self.correct[k], self.num_samples) if self.accuracy(k) is not None else None

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the fields, and the rates ``"top_<k>"`` and, by context, ``"context_top_<k>"``."""
        values = dataclasses.asdict(self)
        values["correct"] = {str(k): count for k, count in self.correct.items()}
        values["context_correct"] = {str(k): dict(counts) for k, counts in self.context_correct.items()}
        for k in self.correct:
            values[f"top_{k}"] = self.accuracy(k)
            values[f"context_top_{k}"] = {name: self.accuracy(k, context=name) for name in self.context_samples}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProtocolRow:
        """The row that ``to_dict`` gave, also once it was written as JSON, where the k are text.

        Raises:
            KeyError: a field is missing.
        """
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        for name in ("correct", "context_correct"):
            fields[name] = {int(k): counts for k, counts in fields[name].items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolReport:
    """All rows of one evaluation. Iterates over its rows; ``report["CN+ (learned, none)"]`` is the row of that name.

    Attributes:
        rows: in the order of the table.
        top_k: the k of the accuracies, ascending.
        context_depends_on_label: whether each class occurs in one context only; None if not known.
        findings: sentences that read the rows together, the leak check first.
    """

    rows: tuple[ProtocolRow, ...]
    top_k: tuple[int, ...]
    context_depends_on_label: bool | None
    findings: tuple[str, ...]

    def __iter__(self) -> Iterator[ProtocolRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ProtocolRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(f"no row {name!r} in this report; {nearest(name, [row.name for row in self.rows])}")

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for ``results.json``."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "top_k": list(self.top_k),
            "context_depends_on_label": self.context_depends_on_label,
            "findings": list(self.findings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProtocolReport:
        """Return the report that ``to_dict`` gave, or that of a finished run.

        Args:
            values: what ``to_dict`` gave, also once it was written as JSON; or the content of a ``results.json``.

        Raises:
            ConfigError: the values hold no report, or a field is missing.

        Example:
            >>> report = ProtocolReport.from_dict(json.load(open("run/results.json")))  # doctest: +SKIP
            >>> report["true contexts"].accuracy(context="night")  # doctest: +SKIP
            0.91
        """
        found = values.get("evaluation", values) if isinstance(values, Mapping) else None
        if not isinstance(found, Mapping) or "rows" not in found:
            raise ConfigError(
                "Expected the content of a run's results.json, or what ProtocolReport.to_dict gave, received values "
                "without rows of an evaluation. A run without test and validation splits has none."
            )
        try:
            return cls(
                rows=tuple(ProtocolRow.from_dict(row) for row in found["rows"]),
                top_k=tuple(int(k) for k in found["top_k"]),
                context_depends_on_label=found["context_depends_on_label"],
                findings=tuple(found["findings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"Expected a report of cn_hf, received another: {error!r}.") from error


def standard_error(correct: int, num_samples: int) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of a rate p = correct / n, in [0, 0.5].

    All right or all wrong would give zero, as if a few samples could prove perfection; there p is Laplace's
    (correct + 1) / (n + 2) instead.
    """
    p = correct / num_samples
    if correct in (0, num_samples):
        p = (correct + 1) / (num_samples + 2)
    return math.sqrt(p * (1 - p) / num_samples)
