"""Running a network for evaluation: under its wrappers, without gradients, and leaving no trace.

Shapes: images (n, channels, H, W), logits (n, C).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.errors import InputTypeError, PatchError
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.patch import apply_inference
from cn_hf.patching.routing import RoutedModel, router_of

__all__ = ["bare_network", "baseline_network", "context_network", "evaluating", "logits_of", "network_device"]


def bare_network(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile.

    A wrapper of several processes must not run here: it makes processes wait for each other at every forward, and their
    shares of a test set differ. Mixed precision set up by accelerate lives in the network itself and stays.

    Raises:
        InputTypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"a network to evaluate must be a torch.nn.Module, received {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def context_network(model: nn.Module) -> nn.Module:
    """The bare network of a model that has contexts.

    Raises:
        InputTypeError: ``model`` is no module.
        PatchError: it is not patched, is patched with a mode without contexts, or stands in a ``use_contexts`` block.
    """
    network = bare_network(model)
    router = router_of(network)
    if router.config.mode in BASELINES:
        raise PatchError(
            f"the model is patched with mode {router.config.mode!r}, which has no contexts; pass it as baseline=..."
        )
    if router.calls.block() is not None:
        raise PatchError("evaluation gives the contexts itself; call it outside of use_contexts")
    return network


def baseline_network(model: nn.Module) -> nn.Module:
    """The bare network of a model without contexts.

    Raises:
        InputTypeError: ``model`` is no module.
        PatchError: it is patched with a mode that has contexts.
    """
    network = bare_network(model)
    if isinstance(network, RoutedModel) and network.context_config.mode not in BASELINES:
        raise PatchError(
            f"the baseline is patched with mode {network.context_config.mode!r}; pass a network without contexts"
        )
    return network


def network_device(network: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a network without any."""
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards training flags and inference settings are as before.

    Contexts that follow their images stand still: passes must not depend on those before them.
    """
    training = [(module, module.training) for module in network.modules()]
    router = router_of(network) if isinstance(network, RoutedModel) else None
    settings: tuple[ContextNormConfig, Any, tuple[float, ...], tuple[float, ...]] | None = None
    if router is not None:
        settings = (router.config, router.source, router.pixel_mean, router.pixel_std)
        tracking, router.tracking = router.tracking, None
    network.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        if router is not None and settings is not None:
            router.config, router.source, router.pixel_mean, router.pixel_std = settings
            router.tracking = tracking
            apply_inference(network, router.config)


def logits_of(output: Any, *, num_samples: int, num_classes: int) -> Tensor:
    """The logits in what a classifier returned: a tensor, an output with ``logits``, or a tuple that begins so.

    Raises:
        InputTypeError: there are no (num_samples, num_classes) logits in it.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    elif isinstance(output, tuple) and output and not hasattr(output, "logits"):
        output = output[0]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or tuple(output.shape) != (num_samples, num_classes):
        received = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputTypeError(
            f"a classifier of {num_classes} classes must give logits ({num_samples}, {num_classes}) for a batch of "
            f"{num_samples} images, received {received}; check num_classes and the network's head"
        )
    return output
