"""One pass of a classifier over batches: logits, mean loss, accuracy, each image of all processes counted once.

N images of a batch on this process, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cn_hf.errors import TrainingError
from cn_hf.evaluation.networks import bare_network, evaluating
from cn_hf.patching.routing import RoutedModel
from cn_hf.training.processes import summed

__all__ = ["Batch", "forward_logits", "mean_loss_and_accuracy", "on_device", "right_answers", "totals"]

Batch = Mapping[str, Tensor]


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
    """One sample in place of none, of context 0: transformers' attention cannot reshape an empty batch."""
    blank = values.new_zeros((1, *values.shape[1:]))
    if values.ndim == 2:  # weights of contexts
        blank[:, 0] = 1
    return blank


def _has_running_statistics(network: nn.Module) -> bool:
    """Whether a blank image would count in the statistics of a norm that trains."""
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
    loss_sum, correct, count = summed(local, accelerator).tolist()
    if count == 0:
        raise TrainingError("the validation data holds no images; check validation_split and validation_fraction")
    return loss_sum / count, correct / count


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits are highest at the label; of labels that are weights (N, classes), at the largest."""
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
