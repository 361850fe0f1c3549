"""One pass over a test set for all protocols at once: batches checked, scored, ranked and recorded.

Shapes: batches of n samples, N in all, images (n, channels, H, W), T contexts, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cn_hf.errors import ContextIdError, ContextSourceError, DatasetError, InputTypeError
from cn_hf.evaluation.ranking import label_ranks
from cn_hf.evaluation.records import Records, SampleRecorder
from cn_hf.evaluation.report import RowKind

__all__ = ["NO_CONTEXTS", "Batch", "EvaluationSet", "Protocol"]

NO_CONTEXTS = "the test set has no context_ids"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A checked batch on the networks' device: images, (n,) int64 labels, context ids and dataset rows where known."""

    images: Tensor
    labels: Tensor
    context_ids: Tensor | None
    index: Tensor | None


@dataclasses.dataclass(slots=True, kw_only=True)
class Protocol:
    """A row to be filled.

    Attributes:
        name: of the row.
        kind: of the row.
        explanation: of the row; ``{batch}`` in it stands for the size of the largest batch.
        scores: gives (n, C) scores for a batch; None where the ranks come without a pass.
        needs_contexts: whether the test set must have context ids.
        unavailable: why there is no result, or None.
    """

    name: str
    kind: RowKind
    explanation: str
    scores: Callable[[Batch], Tensor] | None = None
    needs_contexts: bool = False
    unavailable: str | None = None


class EvaluationSet:
    """A test set that can be passed over again and again.

    Args:
        batches: as for ``evaluate_protocols``.
        device: where batches go.
        num_classes: C.
        num_contexts: T, or None if not known.
        accelerator: whose processes share the set, or None.
        progress: show a progress bar in the first process.

    Raises:
        InputTypeError: ``batches`` can be iterated only once, or not at all.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        device: torch.device,
        num_classes: int,
        num_contexts: int | None,
        accelerator: Any,
        progress: bool,
    ) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
            raise InputTypeError(
                f"batches must be iterable more than once, as a DataLoader or a list is, received "
                f"{type(batches).__name__}"
            )
        self._batches = batches
        self._device = device
        self._num_classes = num_classes
        self._num_contexts = num_contexts
        self._accelerator = accelerator
        self._progress = progress and (accelerator is None or accelerator.is_main_process)
        self.largest_batch = 0

    def run(
        self,
        protocols: Sequence[Protocol],
        *,
        replace_contexts: Callable[[Batch, int], Tensor] | None = None,
        description: str = "evaluation",
    ) -> Records:
        """Pass over the set once; protocols that turn out impossible get their ``unavailable`` set.

        Args:
            protocols: those without ``scores``, or unavailable, are left alone.
            replace_contexts: gives other context ids for a batch and the number of samples before it.
            description: of the progress bar.

        Returns:
            The outcomes of all processes.

        Raises:
            DatasetError: the set is empty, lacks a column, or holds a label out of range.
            ContextIdError: context ids of a wrong dtype, shape or range.
            InputTypeError: a batch is no dict of tensors, or a network gives no (n, C) logits.
        """
        recorder = SampleRecorder(self._accelerator)
        total = len(self._batches) if isinstance(self._batches, Sized) else None
        with tqdm(total=total, desc=description, unit="batch", disable=not self._progress, leave=False) as bar:
            for raw in self._batches:
                batch = self._checked(raw)
                bar.update()
                if batch.labels.numel() == 0:  # this process's part of a small last batch
                    continue
                context_ids = batch.context_ids
                if replace_contexts is not None:
                    batch = dataclasses.replace(batch, context_ids=replace_contexts(batch, recorder.num_samples))
                ranks = {p.name: r for p in protocols if (r := _ranks(p, batch)) is not None}
                recorder.add(labels=batch.labels, context_ids=context_ids, index=batch.index, ranks=ranks)
        self.largest_batch = max(self.largest_batch, recorder.largest_batch)
        records = recorder.merged()
        for protocol in protocols:
            if protocol.scores is not None and protocol.unavailable is None and protocol.name not in records.ranks:
                protocol.unavailable = "another process could not run it"
        return records

    def _checked(self, raw: Any) -> Batch:
        if not isinstance(raw, Mapping):
            raise InputTypeError(
                f"a batch must be a dict with 'pixel_values' and 'labels', received {type(raw).__name__}"
            )
        for name in ("pixel_values", "labels"):
            if name not in raw:
                raise DatasetError(f"a test batch lacks {name!r}; it has {', '.join(map(repr, raw))}")
        columns: dict[str, Tensor] = {}
        for name in ("pixel_values", "labels", "context_ids", "index"):
            column = raw.get(name)
            if column is not None and not isinstance(column, Tensor):
                raise InputTypeError(f"{name!r} of a test batch must be a tensor, received {type(column).__name__}")
            if column is not None:
                columns[name] = column.to(self._device, non_blocking=True)
        images, labels = columns["pixel_values"], columns["labels"]
        context_ids, index = columns.get("context_ids"), columns.get("index")
        num_samples = images.shape[0] if images.ndim else 0
        self._check_ids("labels", labels, num_samples, self._num_classes, DatasetError)
        if context_ids is not None:
            self._check_ids("context_ids", context_ids, num_samples, self._num_contexts, ContextIdError)
        if index is not None:
            self._check_ids("index", index, num_samples, None, DatasetError)
        return Batch(
            images=images,
            labels=labels.long(),
            context_ids=None if context_ids is None else context_ids.long(),
            index=index,
        )

    @staticmethod
    def _check_ids(
        name: str, ids: Tensor, num_samples: int, limit: int | None, error: type[DatasetError | ContextIdError]
    ) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or tuple(ids.shape) != (num_samples,):
            raise error(
                f"{name!r} of a test batch must be integers of shape ({num_samples},), received {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        if num_samples and (int(ids.min()) < 0 or (limit is not None and int(ids.max()) >= limit)):
            known = "0 or more" if limit is None else f"0..{limit - 1}"
            raise error(f"{name!r} of a test batch holds {int(ids.min())}..{int(ids.max())}; expected {known}")


def _ranks(protocol: Protocol, batch: Batch) -> Tensor | None:
    """Ranks of the true classes, or None for a protocol that cannot run, now or from now on."""
    if protocol.scores is None or protocol.unavailable is not None:
        return None
    if protocol.needs_contexts and batch.context_ids is None:
        protocol.unavailable = NO_CONTEXTS
        return None
    try:
        scores = protocol.scores(batch)
    except ContextSourceError as error:
        protocol.unavailable = str(error)
        return None
    return label_ranks(scores, batch.labels.to(scores.device))
