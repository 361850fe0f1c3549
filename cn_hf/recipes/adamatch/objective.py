"""AdaMatch (Berthelot et al. 2021, "A Unified Approach to Semi-Supervised Learning and Domain Adaptation"; paper IV-F).

Labelled images (the source) and unlabelled ones (the target) go through the network together, each in a weak and a
strong view; the labelled ones once more alone. With logits Z of n_L labelled and n_U unlabelled images:

    Z_L = lambda Z'_L + (1 - lambda) Z''_L           lambda ~ U(0, 1) per logit; Z' joint, Z'' labelled images alone
    P~_U = normalize(P_U,weak * E[P_L,weak] / E[P_U,weak])           P = softmax(Z); E over the batch, for each class
    c = tau * mean max P_L,weak ;  mask = (max P~_U >= c)            relative confidence threshold
    L = mean H(Y, Z_L,weak) + mean H(Y, Z_L,strong) + mu(t) mean (H(P~_U, Z_U,strong) mask)
    mu(t) = 1/2 - cos(min(pi, 2 pi t / steps)) / 2

No gradient flows through P~_U and c. The forward of the labelled images alone moves no statistics of batch norms.

Shapes: n_L labelled and n_U unlabelled images of a batch on this process, K classes, C channels, H and W.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cn_hf.evaluation.networks import bare_network
from cn_hf.processes import summed
from cn_hf.training.objective import Batch, StepInfo, StepLoss, forward_logits, mean_loss_and_accuracy, right_answers

__all__ = ["AdaMatch", "align", "interpolate", "kept_statistics", "relative_threshold", "warm_up"]

SMALLEST = 1e-6  # added to both expectations, as in the published code: a class that is never predicted has none


def interpolate(joint: Tensor, alone: Tensor, weights: Tensor) -> Tensor:
    """Random logit interpolation: ``weights`` of the joint forward's logits, the rest of those of the other one.

    Args:
        joint: (..., K).
        alone: (..., K).
        weights: (..., K), in [0, 1].
    """
    return weights * joint + (1 - weights) * alone


def align(predictions: Tensor, labelled_mean: Tensor, unlabelled_mean: Tensor, how: str = "per class") -> Tensor:
    """Distribution alignment: predictions of unlabelled images, rescaled to the classes' shares in labelled ones'.

    Args:
        predictions: (n_U, K), each row a distribution.
        labelled_mean: (K,), the mean prediction of labelled images.
        unlabelled_mean: (K,), that of unlabelled ones.
        how: "per class", as published, or "overall": the means over images *and* classes, as in the code that the
            context normalization paper builds on. Both of those are 1/K, so it changes nothing.

    Returns:
        (n_U, K), each row a distribution.
    """
    if how == "overall":
        labelled_mean, unlabelled_mean = labelled_mean.mean(), unlabelled_mean.mean()
    scaled = predictions * (labelled_mean + SMALLEST) / (unlabelled_mean + SMALLEST)
    return scaled / scaled.sum(dim=-1, keepdim=True)


def relative_threshold(mean_confidence: Tensor, tau: float) -> Tensor:
    """The confidence from which a pseudo-label counts: ``tau`` of the mean confidence in labelled images."""
    return tau * mean_confidence


def warm_up(step: int, steps: int) -> float:
    """mu(t), the weight of the unlabelled loss: 0 at first, 1 from half of the run on."""
    return 0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * step / steps))


@contextlib.contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """Forwards within the block normalise by the batch as ever, but move no running statistics of batch norms."""
    norms: list[Any] = [module for module in network.modules() if getattr(module, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class AdaMatch:
    """The objective; see the module, and ``Objective`` for the calls.

    A batch holds ``pixel_values`` and ``strong_pixel_values`` (n_L + n_U, C, H, W), the views of the same images,
    labelled ones first; ``labels`` (n_L,); ``interpolation`` (n_L, 2, K), the weights lambda of weak and strong logits;
    and, where there are contexts, ``context_ids`` (n_L + n_U,). Means are over the images of all processes.

    Args:
        accelerator: Whose processes share the batches.
        tau: Of the relative threshold.
        alignment: See ``align``.
    """

    metrics: tuple[str, ...] = ("labelled_loss", "unlabelled_loss", "confident", "threshold")
    divisible = False  # labelled images come first, and statistics are of all

    def __init__(self, accelerator: Accelerator, *, tau: float, alignment: str = "per class") -> None:
        self.accelerator, self.tau, self.alignment = accelerator, tau, alignment

    def __call__(self, model: nn.Module, batch: Batch, info: StepInfo) -> StepLoss:
        """The loss of a batch; metrics are both losses, the part of unlabelled images that count, and the threshold."""
        labels = batch["labels"]
        count, unlabelled = len(labels), len(batch["pixel_values"]) - len(labels)
        images = _in_order(batch["pixel_values"], batch["strong_pixel_values"], count)
        contexts = {}
        if "context_ids" in batch:
            contexts["context_ids"] = _in_order(batch["context_ids"], batch["context_ids"], count)
        joint = forward_logits(model, {"pixel_values": images, **contexts})
        network = bare_network(model)  # DDP would share its buffers at a second forward, and so break the first's graph
        with kept_statistics(network):
            labelled = {name: value[: 2 * count] for name, value in {"pixel_values": images, **contexts}.items()}
            alone = forward_logits(network, labelled)
        weights = batch["interpolation"].transpose(0, 1).flatten(0, 1)
        mixed = interpolate(joint[: 2 * count], alone, weights.to(joint.dtype))
        weak = mixed[:count]
        unlabelled_weak, unlabelled_strong = joint[2 * count :].reshape(2, unlabelled, joint.shape[1])
        target, mask, threshold, share = self._pseudo_labels(weak.detach(), unlabelled_weak.detach())

        labelled_loss = F.cross_entropy(mixed, labels.repeat(2), reduction="sum")
        # The loop divides by the labelled images of all processes; ``share`` is their number for one unlabelled image.
        unlabelled_loss = share * (F.cross_entropy(unlabelled_strong, target, reduction="none") * mask).sum()
        further = [labelled_loss, unlabelled_loss, share * mask.sum(), threshold * count]
        return StepLoss(
            labelled_loss + warm_up(info.step, info.steps) * unlabelled_loss,
            right_answers(weak, labels),
            torch.stack(further).detach(),
        )

    def _pseudo_labels(self, labelled: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From logits of weak views: aligned predictions (n_U, K), mask (n_U,), the threshold, and n_L / n_U of all."""
        known, predictions = labelled.softmax(dim=1), unlabelled.softmax(dim=1)
        counts = known.new_tensor([len(known), len(predictions)])
        sums = torch.cat([known.sum(0), predictions.sum(0), known.amax(1).sum().view(1), counts])
        parts = [known.shape[1], predictions.shape[1], 1, 2]
        known_sum, predicted_sum, confidence, counts = torch.split(summed(sums), parts)
        aligned = align(predictions, known_sum / counts[0], predicted_sum / counts[1], self.alignment)
        threshold = relative_threshold(confidence / counts[0], self.tau).squeeze(0)
        return aligned, (aligned.amax(1) >= threshold).to(aligned.dtype), threshold, counts[0] / counts[1]

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        """Mean cross entropy, and top-1 rate, of labelled images."""
        return mean_loss_and_accuracy(model, batches, accelerator)


def _in_order(weak: Tensor, strong: Tensor, count: int) -> Tensor:
    """Labelled weak, labelled strong, unlabelled weak, unlabelled strong; the first ``count`` are labelled."""
    return torch.cat([weak[:count], strong[:count], weak[count:], strong[count:]])
