"""The leak check of honest evaluation: how much of an accuracy the context alone gives away.

A CIFAR-100 superclass narrows 100 classes to 5. Whoever is told the superclass at test time is right in its five
guesses without looking at the image, so a result with true contexts must be set beside two others: the *context-only
floor*, the best classifier that sees nothing but the context, and the *masked baseline*, the network without contexts
whose logits are kept only for classes seen with that context in training.

Shapes: N samples, T contexts, C classes; ``class_counts`` (T, C) int64 training samples of each class in each context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cn_hf.errors import DatasetError

__all__ = [
    "checked_class_counts",
    "context_depends_on_label",
    "context_only_ranks",
    "label_bits",
    "mask_to_context",
]


def checked_class_counts(class_counts: Any, *, num_classes: int, num_contexts: int | None = None) -> Tensor:
    """``class_counts`` as an int64 tensor on the CPU.

    Args:
        class_counts: (T, C) whole numbers, as a tensor, array or nested list.
        num_classes: C.
        num_contexts: T where it is known.

    Raises:
        DatasetError: another shape, a count that is negative or not whole, or no sample at all.
    """
    counts = torch.as_tensor(class_counts).detach().cpu()
    rows = counts.shape[0] if counts.ndim else 0
    expected = (rows if num_contexts is None else num_contexts, num_classes)
    if tuple(counts.shape) != expected:
        wanted = ("T" if num_contexts is None else num_contexts, num_classes)
        raise DatasetError(
            f"class_counts has shape {tuple(counts.shape)}; expected {wanted}: the training samples of each class "
            "(columns) in each context (rows)"
        )
    whole = counts.to(torch.int64)
    if not torch.equal(whole.to(counts.dtype), counts) or (whole < 0).any() or whole.sum() == 0:
        raise DatasetError("class_counts must hold whole numbers of training samples, none negative and not all zero")
    return whole


def context_depends_on_label(class_counts: Tensor) -> bool:
    """True if every class occurs in one context only, and the classes fall into two contexts or more."""
    occurs = class_counts > 0
    return bool((occurs.sum(dim=0) <= 1).all() and occurs.any(dim=1).sum() > 1)


def label_bits(class_counts: Tensor) -> tuple[float, float]:
    """Return (mutual information of context and class, entropy of the class) in training, in bits."""
    joint = class_counts.double() / class_counts.sum()
    classes, contexts = joint.sum(dim=0), joint.sum(dim=1)
    entropy = _entropy(classes)
    return max(0.0, entropy + _entropy(contexts) - _entropy(joint)), entropy


def context_only_ranks(labels: Tensor, context_ids: Tensor, class_counts: Tensor) -> Tensor:
    """Ranks of the true classes for the best classifier that sees only the context.

    It guesses the classes in the order of how often each occurred with that context in training, then of how often at
    all, then of their index.

    Args:
        labels: (N,) int64.
        context_ids: (N,) int64.
        class_counts: (T, C) int64.

    Returns:
        (N,) int64 ranks in 0..C-1, to be read as those of :func:`cn_hf.evaluation.ranking.label_ranks`.
    """
    by_overall = class_counts.sum(dim=0).argsort(descending=True, stable=True)
    by_context = class_counts[:, by_overall].argsort(dim=1, descending=True, stable=True)
    order = by_overall[by_context]
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return ranks[context_ids, labels]


def mask_to_context(logits: Tensor, context_ids: Tensor, class_counts: Tensor) -> Tensor:
    """Logits with minus infinity for classes never seen with the sample's context in training.

    A context without any training sample forbids nothing, since nothing is known about it.

    Args:
        logits: (N, C) floating.
        context_ids: (N,) int64, on the device of ``logits``.
        class_counts: (T, C) int64, on the device of ``logits``.

    Returns:
        (N, C), dtype of ``logits``.
    """
    seen = class_counts > 0
    allowed = seen | ~seen.any(dim=1, keepdim=True)
    return logits.masked_fill(~allowed[context_ids], float("-inf"))


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum()) / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
