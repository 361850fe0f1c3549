"""Siamese training with the contrastive loss of Hadsell, Chopra & LeCun (2006), Eqs. 1 to 4.

Two images go through one network; D is the Euclidean distance of its outputs, Y is 0 for the same object and 1 for
different ones, m the margin:

    L(Y, D) = (1 - Y)/2 D^2 + Y/2 max(0, m - D)^2

It is an objective of the loop in ``supervised.py``, over batches of pairs (``cn_hf.recipes.siamese.pairs``).

Shapes: n pairs of a batch on this process, N images, D_e embedding dimensions, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cn_hf.data import Batches
from cn_hf.errors import ConfigError, InputShapeError, TrainingError
from cn_hf.evaluation.networks import bare_network, evaluating
from cn_hf.processes import gathered
from cn_hf.recipes.siamese.verification import best_threshold, evaluation_pairs, pair_distances, verify
from cn_hf.training.objective import Batch, StepInfo, StepLoss, forward_logits, on_device

__all__ = ["Contrastive", "Embeddings", "HeldOut", "contrastive_loss", "embed", "embed_views", "held_out_distances"]


def contrastive_loss(distances: Tensor, different: Tensor, margin: float = 1.0) -> Tensor:
    """L(Y, D) of each pair.

    Args:
        distances: D, (n,), not negative.
        different: Y, (n,): 0 or 1 (False or True).
        margin: m, positive.

    Returns:
        (n,), of the dtype of ``distances``.

    Raises:
        ConfigError: The margin is not positive.
        InputShapeError: The shapes differ.
    """
    if not margin > 0:
        raise ConfigError(f"margin must be positive, got {margin}")
    if distances.shape != different.shape:
        raise InputShapeError(
            f"one label a distance: got {tuple(distances.shape)} distances and {tuple(different.shape)} labels"
        )
    y = different.to(distances.dtype)
    return (1 - y) / 2 * distances.square() + y / 2 * (margin - distances).clamp_min(0).square()


class Contrastive:
    """The objective of a Siamese network.

    Args:
        margin: m.
        seed: Of the pairs of validation images.
        views: Whether the same object is the same image in two views (``PairBatches``).
    """

    metrics: tuple[str, ...] = ()
    divisible = True

    def __init__(self, margin: float = 1.0, *, seed: int = 0, views: bool = False) -> None:
        if not margin > 0:
            raise ConfigError(f"margin must be positive, got {margin}")
        self.margin, self.seed, self.views = margin, seed, views

    def __call__(self, model: nn.Module, batch: Batch, info: StepInfo) -> StepLoss:
        """Sum of the pairs' losses; right is a pair on its side of half the margin."""
        count, different = len(batch["labels"]), batch["labels"]
        # One forward for both images, so that DistributedDataParallel and batch norms see one batch.
        names = [name for name in ("pixel_values", "context_ids") if name in batch]
        both = {name: torch.cat([batch[name], batch[f"other_{name}"]]) for name in names}
        outputs = forward_logits(model, both)
        distances = torch.linalg.vector_norm(outputs[:count] - outputs[count:], dim=1)  # its gradient at 0 is 0
        loss = contrastive_loss(distances, different, self.margin).sum()
        return StepLoss(loss, ((distances.detach() > self.margin / 2) == different.bool()).sum())

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        """Mean loss, and verification accuracy at the best threshold, over fixed pairs of the images of ``batches``."""
        assert isinstance(batches, Batches)
        held_out = held_out_distances(model, batches, accelerator, seed=self.seed, views=self.views)
        distances, different = held_out.distances, held_out.different
        loss = contrastive_loss(distances, different, self.margin).mean()
        return float(loss), verify(distances, different, best_threshold(distances, different)).accuracy


class Embeddings(NamedTuple):
    """A network's outputs (N, D_e) for images, their identities (N,) and contexts (N,) or None, on the CPU."""

    outputs: Tensor
    identities: Tensor
    contexts: Tensor | None


class HeldOut(NamedTuple):
    """Distances (P,) of fixed pairs (P, 2), whether they show different objects (P,), and the images' embeddings."""

    distances: Tensor
    pairs: Tensor
    different: Tensor
    images: Embeddings


def embed(model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> Embeddings:
    """Run a network in evaluation mode over the images of all processes, in the order of their rows.

    Raises:
        TrainingError: There is no image.
    """
    network = bare_network(model)
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(network), torch.no_grad(), accelerator.autocast():
        for batch in batches:
            batch = on_device(batch, accelerator.device)
            contexts = batch.get("context_ids", torch.full_like(batch["labels"], -1))
            tensors = (batch["index"], forward_logits(network, batch), batch["labels"], contexts)
            parts.append(tuple(tensor.cpu() for tensor in tensors))
    parts = gathered(parts)
    if not sum(len(part[0]) for part in parts):
        raise TrainingError("there are no images to verify; check the split")
    rows, outputs, identities, contexts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    known = None if contexts.ndim == 1 and bool((contexts < 0).all()) else contexts[order]
    return Embeddings(outputs[order], identities[order], known)


def embed_views(model: nn.Module, batches: Batches, accelerator: Accelerator) -> Tensor:
    """Outputs (N, D_e) for a second view of every image of batches that augment and do not shuffle."""
    epoch = batches.epoch
    batches.set_epoch(epoch + 1)
    try:
        return embed(model, batches, accelerator).outputs
    finally:
        batches.set_epoch(epoch)


def held_out_distances(
    model: nn.Module, batches: Batches, accelerator: Accelerator, *, seed: int = 0, views: bool = False
) -> HeldOut:
    """Distances of a fixed set of pairs; call it in every process.

    Raises:
        TrainingError: There is no image.
        DatasetError: There is no pair of one of the two kinds.
    """
    images = embed(model, batches, accelerator)
    second = embed_views(model, batches, accelerator) if views else None
    pairs = evaluation_pairs(images.identities, seed=seed, views=views)
    different = images.identities[pairs[:, 0]] != images.identities[pairs[:, 1]]
    return HeldOut(pair_distances(images.outputs, pairs, second), pairs, different, images)
