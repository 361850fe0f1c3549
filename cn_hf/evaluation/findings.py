"""Sentences that read the rows of an honest evaluation together, so that no table is misread.

Differences between two protocols are paired: both met the same samples, so their uncertainty is that of the per-sample
difference, much smaller than the two accuracies' own.

Shapes: N samples, T contexts, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cn_hf.evaluation.leak import context_depends_on_label, label_bits
from cn_hf.evaluation.report import MASKED, ProtocolRow

__all__ = ["compared", "findings", "leak_finding", "paired_difference"]


def findings(
    rows: Sequence[ProtocolRow], right: Mapping[str, Tensor], class_counts: Tensor | None, *, k: int
) -> tuple[str, ...]:
    """The sentences of a report, the leak check first.

    Args:
        rows: of the table.
        right: for each row that could be run, (N,) bool whether its k best guesses hold the true class; all rows over
            the same samples in the same order.
        class_counts: (T, C) int64 training samples of each class in each context, or None.
        k: the number of guesses.
    """
    sentences = []
    if any(row.available and row.kind == "true contexts" for row in rows) or class_counts is not None:
        sentences.append(leak_finding(class_counts))
    depends = None if class_counts is None else context_depends_on_label(class_counts)
    sentences += _masked_baseline_findings(rows, right, k, depends=depends)
    return (*sentences, *_without_contexts_findings(rows, right, k))


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Difference of two accuracies on the same samples and its standard error.

    Args:
        first: (N,) bool, whether the first protocol is right.
        second: (N,) bool, the same samples in the same order.

    Returns:
        (accuracy of the first minus that of the second, its standard error), both in units of 1. Where both are right
        and wrong alike, or one always, one disagreeing sample is assumed, so that the error is never zero.
    """
    count = first.numel()
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    difference = (only_first - only_second) / count
    discordant = max(1, only_first + only_second) / count
    return difference, math.sqrt(max(discordant - difference**2, discordant / (count + 2)) / count)


def compared(first: str, first_right: Tensor, second: str, second_right: Tensor, *, k: int = 1) -> str:
    """One sentence: whether the first protocol beats the second, by how much, and how sure that is."""
    difference, error = paired_difference(first_right, second_right)
    change = f"{100 * difference:+.2f} ± {100 * error:.2f} points"
    numbers = f"(top-{k} {_percent(first_right)} against {_percent(second_right)}: {change})"
    if abs(difference) <= 2 * error:
        return f"{first} cannot be told apart from {second} on {first_right.numel()} samples {numbers}."
    return f"{first} {'beats' if difference > 0 else 'does not beat'} {second} {numbers}."


def leak_finding(class_counts: Tensor | None) -> str:
    """One sentence: what the context gives away about the class, in the training split."""
    if class_counts is None:
        return (
            "Whether the context depends on the label is not known: the training split's images were not counted by "
            "class and context."
        )
    num_contexts = int((class_counts.sum(dim=1) > 0).sum())
    if num_contexts == 1:
        return "All training samples belong to one context, which tells nothing about the label."
    known, entropy = label_bits(class_counts)
    bits = f"knowing the context tells {known:.2f} of the {entropy:.2f} bits of the label"
    if context_depends_on_label(class_counts):
        most = int((class_counts > 0).sum(dim=1).max())
        return (
            f"The context depends on the label: each class occurs in one of the {num_contexts} contexts only, at most "
            f"{most} in one, so {bits}. Compare results with true contexts to the masked baseline, not to the baseline."
        )
    contexts_per_class = (class_counts > 0).sum(dim=0)
    shared, occurring = int((contexts_per_class > 1).sum()), int((contexts_per_class > 0).sum())
    return f"{shared} of {occurring} classes occur in several of the {num_contexts} contexts; {bits}."


def _masked_baseline_findings(
    rows: Sequence[ProtocolRow], right: Mapping[str, Tensor], k: int, *, depends: bool | None
) -> list[str]:
    """True if CN with true contexts beats each masked baseline."""
    true = next((row.name for row in rows if row.kind == "true contexts" and row.available), None)
    if true is None:
        return []
    masked = [row for row in rows if row.kind == "leak check" and row.name.startswith(MASKED)]
    sentences = [
        compared("CN with true contexts", right[true], f"the {row.name}", right[row.name], k=k)
        for row in masked
        if row.available
    ]
    if not sentences and depends is not False:
        sentences.append(
            "Whether CN beats the masked baseline is not known: that takes a network without contexts (baseline), and "
            "the training split's images counted by class and context."
        )
    return sentences


def _without_contexts_findings(rows: Sequence[ProtocolRow], right: Mapping[str, Tensor], k: int) -> list[str]:
    """Sentences on the accuracy that is lost where the true contexts are not given."""
    true = next((row.name for row in rows if row.kind == "true contexts" and row.available), None)
    if true is None:
        return []
    losses = []
    for row in rows:
        if row.available and row.kind in ("deployable", "control"):
            difference, error = paired_difference(right[row.name], right[true])
            losses.append(f"{row.name} {100 * difference:+.2f} ± {100 * error:.2f}")
    return [f"Against true contexts, in points of top-{k}: {'; '.join(losses)}."] if losses else []


def _percent(right: Tensor) -> str:
    return f"{100 * float(right.to(torch.float64).mean()):.2f} %"
