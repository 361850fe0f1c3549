"""The objective of a run: the loss of a batch, and how a network is validated.

The loop (``supervised.py``) draws batches, steps, averages, validates, saves and resumes; an objective says what the
loss of a batch is. Cross entropy is here; other methods bring their own.

N images of a batch on this process, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cn_hf.errors import TrainingError
from cn_hf.evaluation.networks import bare_network, evaluating
from cn_hf.patching.routing import RoutedModel
from cn_hf.processes import summed

__all__ = [
    "Batch",
    "CrossEntropy",
    "Objective",
    "StepInfo",
    "StepLoss",
    "TrainingBatches",
    "forward_logits",
    "mean_loss_and_accuracy",
    "on_device",
    "right_answers",
    "totals",
]

Batch = Mapping[str, Tensor]


class TrainingBatches(Protocol):
    """The training data as the loop needs it: one pass per epoch, a length in batches, a shuffle per epoch."""

    @property
    def num_samples(self) -> int:
        """Images of an epoch over all processes."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Pick the shuffle and augmentation of epoch ``epoch`` and the batch to begin with, both counted from 0."""

    def fingerprint(self) -> str:
        """A text that differs where the data does."""


class StepInfo(NamedTuple):
    """Step number, total steps and global batch size of the current step.

    Attributes:
        step: Optimizer steps done before this one, in all epochs.
        steps: Those of the whole run.
        images: Images of this step in all processes and parts; the loop divides the summed loss by it.
    """

    step: int
    steps: int
    images: Tensor


class StepLoss(NamedTuple):
    """The loss and the counts of a batch, or of a part of one.

    Attributes:
        loss: Scalar with gradients; a sum, such that the sum over all processes and parts, divided by
            ``StepInfo.images``, is the loss of the step.
        correct: Scalar; number of right answers among the images.
        further: (k,) sums over the images, one for each of the objective's ``metrics``; None for none.
    """

    loss: Tensor
    correct: Tensor
    further: Tensor | None = None


class Objective(Protocol):
    """The loss that ``fit`` minimises. It holds no state that changes, so that a run can be resumed.

    Batches are dicts of tensors; ``labels`` are there, and their number counts the images. With ``pixel_values`` (and
    ``context_ids``) as the network takes them.
    """

    metrics: tuple[str, ...]
    """Names of further numbers, whose means per image go into the history and to the trackers."""

    divisible: bool
    """True if the network may be given a batch in parts, cut along its first axis."""

    def __call__(self, model: nn.Module, batch: Batch, info: StepInfo) -> StepLoss:
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

    def __call__(self, model: nn.Module, batch: Batch, info: StepInfo) -> StepLoss:
        """Sum of the losses, and how many of the logits are highest at the label."""
        logits, labels = forward_logits(model, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return StepLoss(loss, right_answers(logits, labels))

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        """Mean cross entropy without smoothing, and top-1 rate."""
        return mean_loss_and_accuracy(model, batches, accelerator)


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, classes) of a timm or transformers classifier, its contexts given by keyword where it knows any.

    N may be 0: every process must run the network, also one without images in this batch.
    """
    network, count = bare_network(model), len(batch["pixel_values"])
    images, contexts = batch["pixel_values"], {}
    if "context_ids" in batch and isinstance(network, RoutedModel):
        contexts["context_ids"] = batch["context_ids"]
    if count == 0 and not (network.training and _has_running_statistics(network)):
        images, contexts = _blank(images), {name: _blank(value) for name, value in contexts.items()}
    output = model(images, **contexts)
    logits = (output if isinstance(output, Tensor) else output.logits)[:count]
    return logits if logits.dtype == torch.float64 else logits.float()


def _blank(values: Tensor) -> Tensor:
    """Return a dummy sample of context 0 for an empty batch: transformers' attention cannot reshape N = 0."""
    blank = values.new_zeros((1, *values.shape[1:]))
    if values.ndim == 2:  # weights of contexts
        blank[:, 0] = 1
    return blank


def _has_running_statistics(network: nn.Module) -> bool:
    """True if a blank image would count in the statistics of a norm that trains."""
    return any(name.rpartition(".")[2].startswith("running_") for name, _ in network.named_buffers())


def mean_loss_and_accuracy(model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
    """Mean cross entropy per image and top-1 rate in [0, 1] in eval mode, over the batches of all processes.

    The training flags of the model's modules are put back afterwards.

    Raises:
        TrainingError: There is no image.
    """
    plain = bare_network(model)
    sums = [torch.zeros(3, device=accelerator.device)]
    with evaluating(plain), torch.no_grad(), accelerator.autocast():
        for batch in batches:
            batch = on_device(batch, accelerator.device)
            logits = forward_logits(plain, batch)
            loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
            sums.append(totals(loss, right_answers(logits, batch["labels"]), len(batch["labels"])))
    # float64, since a float32 count stops at 16.7 million images.
    local = torch.stack(sums).cpu().double().sum(0)
    loss_sum, correct, count = summed(local).tolist()
    if count == 0:
        raise TrainingError("the validation data holds no images; check validation_split and validation_fraction")
    return loss_sum / count, correct / count


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the logits that are highest at the label; of labels that are weights (N, classes), at the largest."""
    classes = labels.argmax(dim=1) if labels.ndim == 2 else labels
    return (logits.detach().argmax(dim=1) == classes).sum()


def totals(loss_sum: Tensor, correct: Tensor, count: int, further: Tensor | None = None) -> Tensor:
    """Sum of losses, number of right answers, number of images, then further sums (k,): (3 + k,) float32."""
    loss_sum = loss_sum.detach().float()
    first = torch.stack([loss_sum, correct.detach().float(), torch.full_like(loss_sum, count)])
    return first if further is None else torch.cat([first, further.detach().float()])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on ``device``."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
