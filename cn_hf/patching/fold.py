"""One context -> a plain model of the same root class, without cn_hf in it.

With the context fixed, CN is an affine map per feature. It moves into the norm's own affine map, into a batch norm's
statistics, or into the neighbouring convolution or linear layer where that is exact. In front of a zero-padded
convolution it is not: the padding must stay 0 after normalization, so an evaluation batch norm stays there.

Shape legend: ``C`` features; ``y = x * scale + offset`` with ``scale`` and ``offset`` ``(C,)`` in float64.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import PatchError
from cn_hf.norm import ContextNorm
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.convert import NORMS, qualified_name
from cn_hf.patching.patch import named_slots, unpatch_model
from cn_hf.patching.routing import router_of

__all__ = ["fold_context"]


def fold_context(model: nn.Module, context: ContextIds) -> nn.Module:
    """A plain copy of a patched model for one fixed context: same evaluation output, no cn_hf in it.

    Args:
        model: a patched model of a cn mode; it is not changed.
        context: an id, a name, or weights ``(1, T)``.

    Returns:
        A model of the original root class, in evaluation mode.

    Raises:
        ContextIdError: there is no such context.
        PatchError: the model is not patched, or with a baseline.
    """
    router = router_of(model)
    slots = named_slots(model)
    if not all(isinstance(slot.normalizer, ContextNorm) for _, slot in slots):
        raise PatchError(f"fold_context needs context normalization; the model's mode is {router.config.mode!r}.")
    ids = router.resolve(context, 1, torch.device("cpu"))
    folded = copy.deepcopy(model).eval()
    maps = {name: _affine_map(cast(ContextNorm, slot.normalizer), ids) for name, slot in slots}
    kept = {name: getattr(slot, "keep_statistics", True) for name, slot in slots}
    roles = {name: slot.recipe[1][0] for name, slot in slots}
    unpatch_model(folded)
    with torch.no_grad():
        for name, (scale, offset) in maps.items():
            module = folded.get_submodule(name)
            if roles[name] == "input":
                _fold_input(folded, name, module, scale, offset)
            elif roles[name] == "output":
                _fold_output(folded, name, module, scale, offset)
            else:
                _fold_norm(folded, name, module, scale, offset, kept[name])
    return folded.eval()


def _affine_map(norm: ContextNorm, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        mean, var = (row[0].double() for row in norm.rows(ids))
        scale = torch.rsqrt(var + norm.eps)
        weight, bias = norm.weight, norm.bias
        if weight is not None and bias is not None:
            return scale * weight.double(), bias.double() - mean * scale * weight.double()
        return scale, -mean * scale


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    old = cast("Tensor | None", module._parameters.get(name))
    dtype = old.dtype if old is not None else next((p.dtype for p in module.parameters()), torch.float32)
    if old is None and name in module._buffers:
        module._buffers[name] = value.to(cast(Tensor, module._buffers[name]).dtype)
        return
    module.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=old is None or old.requires_grad))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def _evaluation_batch_norm(dims: int, scale: Tensor, offset: Tensor, like: nn.Module) -> nn.Module:
    parameter = next(iter(like.parameters()), scale)
    kind = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    norm = kind(len(scale), eps=1e-5, device=parameter.device)
    norm.running_var = torch.full_like(cast(Tensor, norm.running_var), 1 - norm.eps)
    _set_parameter(norm, "weight", scale)
    _set_parameter(norm, "bias", offset)
    return norm.to(parameter.dtype).eval()


def _affine_tokens(scale: Tensor, offset: Tensor, like: nn.Module) -> nn.Module:
    from timm.models.mlp_mixer import Affine

    parameter = next(iter(like.parameters()), scale.float())
    affine = Affine(len(scale)).to(parameter.device, parameter.dtype)
    affine.alpha.data.copy_(scale.view_as(affine.alpha))
    affine.beta.data.copy_(offset.view_as(affine.beta))
    return cast(nn.Module, affine)


# --------------------------------------------------------------------------------------------------------------- norms


def _fold_norm(root: nn.Module, name: str, norm: Any, scale: Tensor, offset: Tensor, kept: bool) -> None:
    entry = NORMS[qualified_name(type(norm))]
    if entry.standardize is None:
        norm.running_mean.copy_(-offset / scale)
        norm.running_var.copy_((scale.square().reciprocal() - norm.eps).clamp_min(0))
        return
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        scale, offset = scale * weight.double(), offset * weight.double()
    if bias is not None:
        offset = offset + bias.double()
    if kept and isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
        _set_parameter(norm, "weight", scale)
        _set_parameter(norm, "bias", offset)
        return
    after = (
        _evaluation_batch_norm(4, scale, offset, norm)
        if entry.feature_dim == 1
        else _affine_tokens(scale, offset, norm)
    )
    rest = [norm.drop, norm.act] if entry.fused else []
    _replace(root, name, nn.Sequential(*([_without_affine(norm, entry.fused)] if kept else []), after, *rest))


def _without_affine(norm: nn.Module, fused: bool) -> nn.Module:
    plain = copy.deepcopy(norm)
    for name in ("weight", "bias"):
        if plain._parameters.get(name) is not None:
            plain._parameters[name] = None
    if fused:
        plain.drop, plain.act = nn.Identity(), nn.Identity()
    return plain


# ----------------------------------------------------------------------------------------------- inputs and embeddings


def _fold_input(root: nn.Module, name: str, module: Any, scale: Tensor, offset: Tensor) -> None:
    if type(module) is nn.Linear:
        weight = module.weight.double()
        _set_linear(module, weight * scale, weight @ offset)
        return
    plain_conv = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    padded = (
        plain_conv and module.padding_mode == "zeros" and module.padding not in ("valid", (0,) * len(module.stride))
    )
    if plain_conv and not padded:
        weight = module.weight.double()  # (out, C / groups, ...)
        per_group = weight.shape[1]
        groups = torch.arange(weight.shape[0], device=weight.device) // (weight.shape[0] // module.groups)
        channels = groups[:, None] * per_group + torch.arange(per_group, device=weight.device)
        shape = (*channels.shape, *[1] * (weight.dim() - 2))
        shift = (weight * offset[channels].reshape(shape)).flatten(1).sum(dim=1)
        _set_linear(module, weight * scale[channels].reshape(shape), shift)
        return
    dims = module.weight.dim() if plain_conv else 4
    _replace(root, name, nn.Sequential(_evaluation_batch_norm(dims, scale, offset, module), module))


def _set_linear(module: Any, weight: Tensor, shift: Tensor) -> None:
    _set_parameter(module, "bias", shift if module.bias is None else module.bias.double() + shift)
    _set_parameter(module, "weight", weight)


def _fold_output(root: nn.Module, name: str, module: Any, scale: Tensor, offset: Tensor) -> None:
    projection: Any = getattr(module, "proj", None) or getattr(module, "projection", None)
    is_last = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
    if is_last and type(projection) in (nn.Conv2d, nn.Linear):
        weight = projection.weight.double()
        bias = 0.0 if projection.bias is None else projection.bias.double()
        _set_parameter(projection, "bias", bias * scale + offset)
        _set_parameter(projection, "weight", weight * scale.view(-1, *[1] * (weight.dim() - 1)))
        return
    _replace(root, name, nn.Sequential(module, _affine_tokens(scale, offset, module)))
