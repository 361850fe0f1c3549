"""Batch norms that take the statistics of the batch at hand: what a context for each sample is measured against.

Test-time batch norm (Nado et al. 2020; Schneider et al. 2020) works where a batch is of one domain and large; in mixed
batches, sorted ones or on single images it loses its gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.norm.em import statistics_dtype
from cn_hf.norm.functional import normalize_rows
from cn_hf.patching.convert import Slot, StoredNormSlot
from cn_hf.patching.moments import Moments
from cn_hf.patching.routing import RoutedModel, router_of

__all__ = ["batch_statistics", "has_batch_norms"]

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def has_batch_norms(network: nn.Module) -> bool:
    """True if the network has batch norms, as they were or swapped for CN."""
    return any(isinstance(module, (_BATCH_NORMS, StoredNormSlot)) for module in network.modules())


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let the batch norms of a network in evaluation mode take the statistics of each batch; none is stored.

    In a patched network the slots that replaced batch norms do so, whatever the context; other slots do what they did.
    """
    norms = [module for module in network.modules() if isinstance(module, _BATCH_NORMS)]
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    tracked = [norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    router = router_of(network) if isinstance(network, RoutedModel) else None
    if router is not None:
        router.observer = _BatchStatistics()
    try:
        yield
    finally:
        if router is not None:
            router.observer = None
        for (norm, training, momentum), count in zip(before, tracked, strict=True):
            norm.training, norm.momentum = training, momentum
            if count is not None:
                cast(Tensor, norm.num_batches_tracked).copy_(count)


class _BatchStatistics:
    """Normalises in the place of slots of batch norms, by the batch's own mean and variance."""

    def normalize(
        self, slot: Slot, x: Tensor, ids: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Return ``x`` normalised, and the affine map applied; None leaves it to slots that were no batch norms."""
        norm: Any = slot.normalizer
        if not isinstance(slot, StoredNormSlot):
            return None
        moments = Moments(1, norm.num_features, x.device)
        moments.add(x, torch.zeros(1, dtype=torch.int64, device=x.device), norm.feature_dim)
        mean, variance = (part.to(statistics_dtype(x)) for part in moments.rows())
        return normalize_rows(x, mean, variance, eps=norm.eps, feature_dim=norm.feature_dim, weight=weight, bias=bias)
