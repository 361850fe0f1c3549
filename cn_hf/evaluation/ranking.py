"""The rank of the true class among a classifier's scores: the one tie rule behind every top-k figure.

Metrics and protocols count with it, so that a top-1 of one never differs from an accuracy of the other.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["label_ranks", "top_k_correct"]


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of classes that a classifier puts before the true one.

    Equal scores are ordered by class index, as ``argmax`` does, so a network that answers the same for every class is
    not credited with knowing them all. A row holding a NaN, and a true class whose score is minus infinity (masked
    out), rank last of all: they are wrong at every k.

    Args:
        scores: (N, C) logits, probabilities or any scores, floating.
        labels: (N,) int64 true classes in 0..C-1.

    Returns:
        (N,) int64 ranks in 0..C; top-k is right where the rank is below k, and C is right for no k.
    """
    true = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device)[None, :] < labels[:, None]
    ranks = ((scores > true) | ((scores == true) & earlier)).sum(dim=1)
    unanswered = scores.isnan().any(dim=1) | torch.isneginf(true[:, 0])
    return ranks.masked_fill(unanswered, scores.shape[1])


def top_k_correct(ranks: Tensor, num_classes: int, k: int) -> Tensor:
    """True if the true class is among the k highest scores; ``k`` beyond the number of classes asks for all of them.

    Args:
        ranks: (N,) ranks of the true class from :func:`label_ranks`.
        num_classes: C, the number of scores per sample.
        k: how many guesses are allowed, at least 1.

    Returns:
        (N,) bool.
    """
    return ranks < min(k, num_classes)
