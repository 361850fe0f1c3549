"""``inference="average"``: every context is tried, and the mean of the softmax outputs decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.errors import InputTypeError, PatchError

__all__ = ["average_contexts", "check_averages"]


def check_averages(model: nn.Module) -> None:
    """Refuse a model whose outputs are not scores of classes that exclude each other.

    Raises:
        PatchError: it says so of itself.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    classes = getattr(model, "num_classes", None)
    if problem in ("multi_label_classification", "regression") or classes in (0, 1):
        found = f"problem_type {problem!r}" if classes not in (0, 1) else f"num_classes {classes}"
        raise PatchError(
            'inference="average" averages the probabilities of classes that exclude each other, and '
            f"{type(model).__name__} has {found}. "
            'Pass context_ids, or call set_inference(model, "cn+").'
        )


def average_contexts(call: Callable[[int], Any], num_contexts: int, labels: Tensor | None) -> Any:
    """The log of the mean softmax over all contexts.

    Args:
        call: The model's output, logits ``(..., K)`` or ``(N, K, H, W)`` or what has them, in a context.
        num_contexts: ``T``.
        labels: ``(N,)``, for the loss of outputs that have one, or None.

    Returns:
        A tensor of the logits' shape and dtype, or an output of the model's type with ``logits`` and ``loss``.

    Raises:
        InputTypeError: the output has no logits, or labels are not one an image.
    """
    log_probabilities: Tensor | None = None
    output: Any = None
    for context in range(num_contexts):
        output = call(context)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise InputTypeError(
                f'inference="average" needs logits: forward returned {type(output).__name__} without them.'
            )
        classes = 1 if logits.dim() == 4 else -1  # of maps (N, K, H, W)
        log_probability = F.log_softmax(logits, dim=classes, dtype=torch.promote_types(logits.dtype, torch.float32))
        if log_probabilities is None:
            log_probabilities = log_probability
        else:
            log_probabilities = torch.logaddexp(log_probabilities, log_probability)
    assert log_probabilities is not None  # there is a context
    mean = log_probabilities - math.log(num_contexts)
    if isinstance(output, Tensor):
        return mean.to(output.dtype)
    averaged: dict[str, Any] = {"logits": mean}
    if labels is not None:
        if mean.dim() != 2 or labels.shape != mean.shape[:1]:
            raise InputTypeError(
                f'inference="average" has a loss for one label an image, ({len(mean)},), not for labels of shape '
                f"{tuple(labels.shape)} and logits of shape {tuple(mean.shape)}: leave labels out."
            )
        averaged["loss"] = F.cross_entropy(mean, labels)
    return type(output)(**averaged)
