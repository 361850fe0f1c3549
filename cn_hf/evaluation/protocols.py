"""Honest evaluation: every way to use a network at test time, and what the context alone is worth.

True contexts are told to the network, so an accuracy with them is a result only beside two others: the accuracy
without them (CN+ of Eq. 9 in the paper's setting and in ours, a context predicted from the image, the average over all
contexts, shuffled contexts), and that of baselines told the same (the leak check).

Shapes: batches of n samples, N in all, images (n, channels, H, W), T contexts, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, DatasetError
from cn_hf.evaluation.catalogue import (
    PAPERS_AND_OURS,
    Scorer,
    averaged,
    batch_norms,
    fixed_context,
    leak_check,
    plus,
    predicted,
    shuffled,
    true_contexts,
)
from cn_hf.evaluation.findings import findings
from cn_hf.evaluation.leak import checked_class_counts, context_depends_on_label, context_only_ranks
from cn_hf.evaluation.networks import baseline_network, context_network, evaluating, network_device
from cn_hf.evaluation.passes import NO_CONTEXTS, Batch, EvaluationSet, Protocol
from cn_hf.evaluation.ranking import top_k_correct
from cn_hf.evaluation.records import Records
from cn_hf.evaluation.report import CONTEXT_ONLY, ProtocolReport, ProtocolRow
from cn_hf.patching.routing import router_of

__all__ = ["evaluate_protocols"]

CHANGED = (
    "the second pass over the test set gave other samples than the first; pass batches that repeat, in the same order "
    "or with 'index', the dataset rows"
)


def evaluate_protocols(
    model: nn.Module | None,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_classes: int,
    class_counts: Any = None,
    baseline: nn.Module | Mapping[str, nn.Module] | None = None,
    source: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    plus_settings: Sequence[tuple[str, str]] = PAPERS_AND_OURS,
    max_average_contexts: int = 100,
    fixed_contexts: bool = False,
    context_names: Sequence[str] | None = None,
    top_k: Sequence[int] = (1, 5),
    seed: int = 0,
    accelerator: Any = None,
    progress: bool = True,
) -> ProtocolReport:
    """Evaluate a patched model with true contexts, without any, with wrong ones, and beside what the context tells.

    The test set is passed over once for all rows, and once more for shuffled contexts. Networks run in evaluation mode
    without gradients; their training flags and inference settings are as before afterwards, also after an error.

    Args:
        model: a network patched with a cn mode, bare or wrapped by accelerate, or None to evaluate baselines alone.
        batches: iterable twice over the test set, giving dicts with ``"pixel_values"`` (n, channels, H, W),
            ``"labels"`` int64 (n,), and where known ``"context_ids"`` int64 (n,) and ``"index"`` int64 (n,), the
            dataset rows. With several processes each passes its own share, and ``"index"`` is needed.
        num_classes: C, the number of logits.
        class_counts: (T, C) training samples of each class in each context, for the leak check.
        baseline: the network without contexts that the leak check masks, or several by name.
        source: a fitted context source for "predict"; the attached one if None.
        mean: per channel, what was subtracted from pixels in 0..1 before they reached the network, for "predict"; the
            attached values if None.
        std: per channel, what they were divided by.
        plus_settings: (``plus_stats``, ``plus_scale``) pairs of CN+; by default the paper's and the library's. Without
            ``"batch"`` among them no row depends on how the test set is cut into batches: those of batch norms with the
            statistics of the test batch are left out, too.
        max_average_contexts: with more contexts the row "average", T forwards a batch, is left out.
        fixed_contexts: add a row for each context, in which all samples are told it.
        context_names: of the test set's T contexts, where ``model``, which knows them, is None.
        top_k: numbers of guesses; those above C ask for all classes.
        seed: of the shuffled contexts.
        accelerator: the ``accelerate.Accelerator`` whose processes share the test set; all get the same report.
        progress: show a progress bar in the first process.

    Returns:
        The rows and what they say together.

    Raises:
        PatchError: ``model`` is not patched, or patched with a mode without contexts.
        ConfigError: an option is out of range.
        DatasetError: the test set is empty, lacks a column, holds a label out of range, or changes between passes.
        ContextIdError: context ids of a wrong dtype, shape or range.
        InputTypeError: a batch is no dict of tensors, or a network gives no (n, C) logits.
    """
    ks = _checked_top_k(top_k)
    judged = _checked_networks(model, baseline, num_classes, class_counts, context_names)
    test_set = EvaluationSet(
        batches,
        device=network_device(judged.networks[0]),
        num_classes=num_classes,
        num_contexts=len(judged.names) or None,
        accelerator=accelerator,
        progress=progress,
    )
    score, network = Scorer(num_classes), judged.network
    protocols: list[Protocol] = []
    leak_rows = leak_check(score, judged.baselines, judged.counts)
    with ExitStack() as restored, torch.no_grad():
        for used in judged.networks:
            restored.enter_context(evaluating(used))
        if network is not None:
            protocols.append(true_contexts(score, network))
            if fixed_contexts:
                protocols += [fixed_context(score, network, number, name) for number, name in enumerate(judged.names)]
            pairs = _checked_pairs(plus_settings)
            protocols += [plus(score, network, stats, scale) for stats, scale in pairs]
            protocols.append(predicted(score, network, source, mean, std))
            protocols.append(averaged(score, network, max_average_contexts))
            if any(stats == "batch" for stats, _ in pairs):
                protocols += batch_norms(score, network)
        records = test_set.run([*protocols, *leak_rows])
        if network is not None:
            wrong, records = _run_shuffled(score, network, test_set, records, seed)
            protocols.append(wrong)
    return _report([*protocols, *leak_rows], records, judged, num_classes, ks, test_set.largest_batch)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """The networks of an evaluation: the one with contexts, baselines by name, contexts' names, and class counts."""

    network: nn.Module | None
    baselines: dict[str, nn.Module]
    names: tuple[str, ...]
    counts: Tensor | None

    @property
    def networks(self) -> list[nn.Module]:
        """All of them."""
        return ([] if self.network is None else [self.network]) + list(self.baselines.values())


def _checked_networks(
    model: nn.Module | None,
    baseline: nn.Module | Mapping[str, nn.Module] | None,
    num_classes: int,
    class_counts: Any,
    context_names: Sequence[str] | None,
) -> _Judged:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ConfigError(f"num_classes={num_classes!r}; a classifier has a whole number of classes, at least one")
    network, baselines = None if model is None else context_network(model), _named_baselines(baseline)
    if network is None and not baselines:
        raise ConfigError("nothing to evaluate: pass a patched model, a baseline, or both")
    names = tuple(context_names or ()) if network is None else _context_names(network)
    counts = None
    if class_counts is not None:
        counts = checked_class_counts(class_counts, num_classes=num_classes, num_contexts=len(names) or None)
        names = names or tuple(f"context_{number}" for number in range(counts.shape[0]))
    return _Judged(network=network, baselines=baselines, names=names, counts=counts)


def _report(
    protocols: Sequence[Protocol],
    records: Records,
    judged: _Judged,
    num_classes: int,
    ks: tuple[int, ...],
    largest_batch: int,
) -> ProtocolReport:
    """Return the rows that the records give, and what they say together."""
    counts = judged.counts
    records = _fill_context_only(protocols, records, counts)
    rows = tuple(_row(protocol, records, ks, num_classes, judged.names, largest_batch) for protocol in protocols)
    right = {row.name: top_k_correct(records.ranks[row.name], num_classes, ks[0]) for row in rows if row.available}
    return ProtocolReport(
        rows=rows,
        top_k=ks,
        context_depends_on_label=None if counts is None else context_depends_on_label(counts),
        findings=findings(rows, right, counts, k=ks[0]),
    )


def _run_shuffled(
    score: Scorer, network: nn.Module, test_set: EvaluationSet, records: Records, seed: int
) -> tuple[Protocol, Records]:
    """The row of shuffled contexts, from a pass of its own: its contexts are a permutation of the whole set's."""
    protocol = shuffled(score, network)
    if records.context_ids is None:
        protocol.unavailable = NO_CONTEXTS
    if records.context_ids is None or protocol.unavailable is not None:
        return protocol, records
    order = torch.randperm(records.labels.numel(), generator=torch.Generator().manual_seed(seed))
    permuted = records.context_ids[order]
    own = float((permuted == records.context_ids).double().mean())
    protocol.explanation = (
        f"the test set's contexts in random order (seed {seed}; by chance {100 * own:.1f} % of samples keep theirs): "
        "what the network loses is how much it relies on them."
    )

    def shuffled_ids(batch: Batch, start: int) -> Tensor:
        if records.index is None or batch.index is None:
            found = permuted[start : start + batch.labels.numel()]
            if found.numel() < batch.labels.numel():
                raise DatasetError(CHANGED)
        else:
            rows = batch.index.cpu()
            positions = torch.searchsorted(records.index, rows).clamp_max(records.index.numel() - 1)
            if not torch.equal(records.index[positions], rows):
                raise DatasetError(CHANGED)
            found = permuted[positions]
        return found.to(batch.labels.device)

    again = test_set.run([protocol], replace_contexts=shuffled_ids, description=protocol.name)
    if not torch.equal(again.labels, records.labels):
        raise DatasetError(CHANGED)
    return protocol, dataclasses.replace(records, ranks={**records.ranks, **again.ranks})


def _fill_context_only(protocols: Sequence[Protocol], records: Records, counts: Tensor | None) -> Records:
    """The floor needs no network: its ranks follow from the labels and contexts recorded."""
    if counts is None:
        return records
    if records.context_ids is None:
        for protocol in protocols:
            if protocol.name == CONTEXT_ONLY:
                protocol.unavailable = NO_CONTEXTS
        return records
    ranks = context_only_ranks(records.labels, records.context_ids, counts)
    return dataclasses.replace(records, ranks={**records.ranks, CONTEXT_ONLY: ranks})


def _row(
    protocol: Protocol, records: Records, ks: Sequence[int], num_classes: int, names: Sequence[str], largest_batch: int
) -> ProtocolRow:
    num_samples, ids = records.labels.numel(), records.context_ids
    samples: dict[str, int] = {}
    if ids is not None and names:
        samples = dict(zip(names, torch.bincount(ids, minlength=len(names)).tolist(), strict=True))
    explanation = protocol.explanation.replace("{batch}", str(largest_batch))
    if protocol.unavailable is not None:
        return ProtocolRow(
            name=protocol.name,
            kind=protocol.kind,
            explanation=explanation,
            num_samples=num_samples,
            context_samples=samples,
            unavailable=protocol.unavailable,
        )
    ranks = records.ranks[protocol.name]
    right = {k: top_k_correct(ranks, num_classes, k) for k in ks}
    per_context: dict[int, dict[str, int]] = {}
    if ids is not None and names:
        for k, correct in right.items():
            counts = torch.bincount(ids[correct], minlength=len(names)).tolist()
            per_context[k] = dict(zip(names, counts, strict=True))
    unanswered = int((ranks == num_classes).sum())
    if unanswered and protocol.kind != "leak check":  # masked classes are minus infinity on purpose
        explanation += f" {unanswered} samples got NaN or infinite logits and count as wrong."
    return ProtocolRow(
        name=protocol.name,
        kind=protocol.kind,
        explanation=explanation,
        num_samples=num_samples,
        correct={k: int(correct.sum()) for k, correct in right.items()},
        context_samples=samples,
        context_correct=per_context,
    )


def _context_names(network: nn.Module) -> tuple[str, ...]:
    config = router_of(network).config
    return config.context_names or tuple(f"context_{number}" for number in range(config.num_contexts))


def _named_baselines(baseline: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    if baseline is None:
        return {}
    given = dict(baseline) if isinstance(baseline, Mapping) else {"": baseline}
    return {name: baseline_network(module) for name, module in given.items()}


def _checked_pairs(plus_settings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    pairs = [tuple(pair) for pair in plus_settings]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(value, str) for value in pair):
            raise ConfigError(f"plus_settings holds {pair!r}; each entry is (plus_stats, plus_scale)")
    return list(dict.fromkeys((stats, scale) for stats, scale in pairs))


def _checked_top_k(top_k: Sequence[int]) -> tuple[int, ...]:
    if isinstance(top_k, (str, bytes)) or not isinstance(top_k, Sequence):
        raise ConfigError(f"top_k={top_k!r}; pass a list of numbers of guesses, such as (1, 5)")
    if not top_k or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in top_k):
        raise ConfigError(f"top_k={top_k!r}; numbers of guesses are whole, at least 1, and there is at least one")
    return tuple(sorted(set(top_k)))
