"""What a run minimises and how it is judged: the part of a training loop that differs from method to method.

The loop (``supervised.py``) draws batches, steps, averages, validates, saves and resumes; an objective says what the
loss of a batch is. Cross entropy is here; other methods bring their own.

N images of a batch on this process, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cn_hf.training.validation import Batch, forward_logits, mean_loss_and_accuracy, right_answers

__all__ = ["CrossEntropy", "Moment", "Objective", "StepLoss"]


class Moment(NamedTuple):
    """Where in a run a step is, and how large.

    Attributes:
        step: Optimizer steps done before this one, in all epochs.
        steps: Those of the whole run.
        images: Images of this step in all processes and parts; the loop divides the summed loss by it.
    """

    step: int
    steps: int
    images: Tensor


class StepLoss(NamedTuple):
    """What an objective gives for a batch, or a part of one.

    Attributes:
        loss: Scalar with gradients; a sum, such that the sum over all processes and parts, divided by
            ``Moment.images``, is the loss of the step.
        correct: Scalar; number of right answers among the images.
        further: (k,) sums over the images, one for each of the objective's ``metrics``; None for none.
    """

    loss: Tensor
    correct: Tensor
    further: Tensor | None = None


class Objective(Protocol):
    """What ``fit`` takes as ``objective``. It holds no state that changes, so that a run can be resumed.

    Batches are dicts of tensors; ``labels`` are there, and their number counts the images. With ``pixel_values`` (and
    ``context_ids``) as the network takes them.
    """

    metrics: tuple[str, ...]
    """Names of further numbers, whose means per image go into the history and to the trackers."""

    divisible: bool
    """Whether the network may be given a batch in parts, cut along its first axis."""

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment) -> StepLoss:
        """The loss of a batch, which may be empty in some processes; ``model`` is as Accelerate prepared it."""

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        """Mean loss, and a rate in [0, 1], whose highest value marks the best epoch; over all processes' batches."""


class CrossEntropy:
    """Cross entropy of an image classifier.

    Args:
        label_smoothing: In [0, 1).
    """

    metrics: tuple[str, ...] = ()
    divisible = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment) -> StepLoss:
        """Sum of the losses, and how many of the logits are highest at the label."""
        logits, labels = forward_logits(model, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return StepLoss(loss, right_answers(logits, labels))

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        """Mean cross entropy without smoothing, and top-1 rate."""
        return mean_loss_and_accuracy(model, batches, accelerator)
