"""Parameters that a forward does not use, which DistributedDataParallel must be told of, or it waits for them."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from cn_hf.training.processes import summed
from cn_hf.training.training_batches import TrainingBatches
from cn_hf.training.validation import forward_logits, on_device

__all__ = ["leaves_parameters_unused", "may_leave_unused"]


def may_leave_unused(accelerator: Accelerator) -> bool:
    """Whether it matters: several processes, whole parameters."""
    return bool(accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP)


def leaves_parameters_unused(model: nn.Module, batches: TrainingBatches, accelerator: Accelerator) -> bool:
    """Whether some trainable parameter gets no gradient from the first batch, in any process.

    Tried on a copy in evaluation mode, which moves no statistics; every process must call it.
    """
    batches.set_epoch(0)
    batch = on_device(next(iter(batches)), accelerator.device)
    part = {name: value[:2] for name, value in batch.items()}
    tried = copy.deepcopy(model).to(accelerator.device).eval()
    torch.autograd.backward(forward_logits(tried, part).sum())
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in tried.parameters())
    return bool(summed(torch.tensor(float(unused), device=accelerator.device), accelerator).item())
