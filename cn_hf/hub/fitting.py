"""Comparison of a checkpoint's weights with the model that its description asks for, before either is in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from cn_hf.errors import CheckpointError
from cn_hf.hub.base_model import build_patched, quietly
from cn_hf.hub.bounds import built
from cn_hf.hub.description import Description
from cn_hf.patching import ContextNormConfig, patch_model
from cn_hf.patching.patch import named_slots

__all__ = ["check_plan", "check_tensors", "context_tensors", "patch_as_saved", "tied_names", "with_slots_of"]


def check_plan(description: Description, weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Build the described model on the meta device and compare it with the header of the weights.

    Args:
        description: of a whole checkpoint of a timm model.
        weights: its tensors by name, also on the meta device; in a block of ``weights_of``.
        folder: of the checkpoint, for messages.

    Returns:
        The model, without weights.

    Raises:
        CheckpointError: it cannot be built, or other tensors belong to it.
    """
    model = build_patched(description.base, with_slots_of(description.config, weights))
    check_tensors(model, weights, str(folder))
    return model


def with_slots_of(config: ContextNormConfig, names: Iterable[str]) -> ContextNormConfig:
    """The configuration with the slots that have tensors in place of patterns, which may match for ever."""
    if config.where is None or isinstance(config.where, str):
        return config
    slots = dict.fromkeys(name.partition(".normalizer.")[0] for name in names if ".normalizer." in name)
    if not slots:
        raise CheckpointError("The weights hold no contexts, of which the description names modules.")
    return config.replace(where=[f"(?:{re.escape(slot)})" for slot in slots])


def patch_as_saved(model: nn.Module, config: ContextNormConfig, names: Iterable[str]) -> nn.Module:
    """Patch a model for the tensors of a checkpoint, within the bounds of these.

    Raises:
        CheckpointError: the configuration asks for more than the tensors fill.
        PatchError: the configuration does not fit the model, which is unchanged.
    """
    exact = with_slots_of(config, names)
    with quietly():
        return built("The contexts", config.to_dict(), lambda _: patch_model(model, config=exact))


def context_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a patched model's contexts, by their names in its state."""
    return {
        f"{name}.normalizer.{key}": tensor.detach()
        for name, slot in named_slots(model)
        for key, tensor in slot.normalizer.state_dict().items()
    }


def tied_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for the names that tied weights have besides the stored one."""
    state = model.state_dict(keep_vars=True)
    stored = {_place(tensor): tensors[name] for name, tensor in state.items() if name in tensors}
    return {
        name: stored[_place(tensor)]
        for name, tensor in state.items()
        if name not in tensors and _place(tensor) in stored and tensor.numel()
    }


def _place(tensor: Tensor) -> tuple[object, object]:
    """Return the address of a tensor; on the meta device, that of its storage."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str, *, norms_only: bool = False) -> None:
    """Raise ``CheckpointError`` unless the tensors are those of the model, by name, shape and kind of number.

    Args:
        model: a patched model, also on the meta device.
        tensors: of a checkpoint; tied ones are stored once.
        where: the checkpoint is, for messages.
        norms_only: they are those of the contexts alone.
    """
    expected = context_tensors(model) if norms_only else model.state_dict()
    tied = tied_names(model, tensors)
    missing = [name for name in expected if name not in tensors and name not in tied]
    surplus = [name for name in tensors if name not in expected]
    wrong = [name for name in tensors if name in expected and _kind(tensors[name]) != _kind(expected[name])]
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("unknown", surplus))
        parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds if names]
        if wrong:
            name = wrong[0]
            parts.append(f"{name} is {_shown(tensors[name])}, expected {_shown(expected[name])}")
        raise CheckpointError(f"The weights in {where} do not fit {type(model).__name__}: {'; '.join(parts)}.")


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
