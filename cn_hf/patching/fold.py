"""One context -> a plain model of the same root class, without cn_hf in it.

With the context fixed, CN is an affine map per feature. It moves into the norm's own affine map, into a batch norm's
statistics, or into the neighbouring convolution or linear layer where that is exact. In front of a zero-padded
convolution it is not: the padding must stay 0 after normalization, so an evaluation batch norm stays there.

Shape legend: ``C`` features; ``y = x * scale + offset`` with ``scale`` and ``offset`` ``(C,)`` in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cn_hf.errors import PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm
from cn_hf.norm.functional import context_rows
from cn_hf.norm.ids import ContextIds
from cn_hf.patching.convert import NORMS, Slot, qualified_name
from cn_hf.patching.patch import own_slots, unpatch_model
from cn_hf.patching.routing import router_of
from cn_hf.patching.swapped import copied, own_class

__all__ = ["fold_context"]


def fold_context(model: nn.Module, context: ContextIds) -> nn.Module:
    """A plain copy of a patched model for one fixed context: same evaluation output, no cn_hf in it.

    Args:
        model: a patched model of a cn mode or ``"dsbn"``; it is not changed.
        context: an id, a name, or weights ``(1, T)``.

    Returns:
        A model of the original root class, in evaluation mode.

    Raises:
        ContextIdError: there is no such context.
        PatchError: the model is not patched, or with a baseline; or it was patched at a patch embedding that adds
            position embeddings itself.
    """
    router = router_of(model)
    slots = own_slots(model)
    if not all(isinstance(slot.normalizer, (ContextNorm, DomainBatchNorm)) for _, slot in slots):
        raise PatchError(f"fold_context needs context normalization; the model's mode is {router.config.mode!r}.")
    ids = router.resolve(context, 1, torch.device("cpu"))
    folded = copied(model).eval()
    slots_by_name = dict(slots)
    plans = [(name, *_plan(slot, ids)) for name, slot in slots]
    unpatch_model(folded)
    folder = _Folder(folded)
    with torch.no_grad():
        for name, role, kept, norm_eps, maps, scale, offset in plans:
            module = folded.get_submodule(name)
            _make_plain(module)
            if role == "input":
                folder.input(module, scale, offset)
            elif role == "output":
                folder.output(module, scale, offset, maps)
            else:
                folder.norm(module, scale, offset, maps, kept, norm_eps)
                folder.own_affine(module, slots_by_name[name].normalizer, ids)
    return folded.eval()


def _plan(slot: Slot, ids: Tensor) -> tuple[str, bool, float, bool, Tensor, Tensor]:
    """Role, whether the norm's own standardisation stays, eps, whether on maps, and the context's affine map."""
    norm = cast(Any, slot.normalizer)
    kept = getattr(slot, "keep_statistics", True)
    with torch.no_grad():
        if isinstance(norm, DomainBatchNorm):  # its affine map may be negative, and so is no part of a variance
            mean, var = (context_rows(table.double(), ids)[0] for table in (norm.running_mean, norm.running_var))
            scale = torch.rsqrt(var + norm.eps)
            return slot.recipe[1][0], kept, norm.eps, norm.feature_dim == 1, scale, -mean * scale
        mean, var = (row[0].double() for row in norm.rows(ids.to(next(norm.parameters()).device)))
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        offset = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
    return slot.recipe[1][0], kept, norm.eps, norm.feature_dim == 1, scale, offset


_REMOVERS: dict[type, Callable[..., Any]] = {
    prune.BasePruningMethod: prune.remove,
    SpectralNorm: remove_spectral_norm,
    WeightNorm: remove_weight_norm,
}
"""Hooks that make a tensor before each forward, and what leaves the tensor as a parameter in their place."""


def _make_plain(module: nn.Module) -> None:
    """Make parameters of the weights and biases in ``module`` that a parametrization, pruning or a hook computes."""
    for part in module.modules():
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(part, name):
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
        for hook in list(part._forward_pre_hooks.values()):
            for kind, remove in _REMOVERS.items():
                if isinstance(hook, kind):
                    remove(part, vars(hook).get("_tensor_name") or vars(hook)["name"])


class _Folder:
    """Writes affine maps into a plain model, in the dtype and on the device of each module or else of the model."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.like = next((p for p in root.parameters() if p.is_floating_point()), torch.empty(0))

    # ----------------------------------------------------------------------------------------------------------- norms

    def norm(self, norm: Any, scale: Tensor, offset: Tensor, maps: bool, kept: bool, eps: float) -> None:
        """A norm layer: into its statistics, into its affine map, or an affine map after it."""
        entry = NORMS[qualified_name(own_class(norm))]
        if entry.standardize is None:
            norm.running_mean.copy_(-offset / scale)
            if hasattr(norm, "eps"):
                norm.eps = eps
                norm.running_var.copy_((scale.square().reciprocal() - eps).clamp_min(0))
            else:  # a frozen batch norm with an eps in its code
                norm.running_var.fill_(1 - entry.eps(norm))
                self._set(norm, "weight", norm.weight.double() * scale)
            return
        if getattr(norm, "weight", None) is not None:
            scale, offset = scale * norm.weight.double(), offset * norm.weight.double()
        if getattr(norm, "bias", None) is not None:
            offset = offset + norm.bias.double()
        if kept and isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):  # fused or not: the activation comes after
            self._set(norm, "weight", scale)
            self._set(norm, "bias", offset)
            return
        dims = {"InstanceNorm1d": 3, "InstanceNorm3d": 5}.get(type(norm).__name__, 4)
        after = self._affine_map(dims if maps else 2, scale, offset)
        fused = [norm._modules[name] for name in ("drop", "act", "activation") if entry.fused and name in norm._modules]
        first = [_without_affine(norm, entry.fused)] if kept else []
        self._replace(norm, nn.Sequential(*first, after, *fused))

    def own_affine(self, norm: Any, normalizer: Any, ids: Tensor) -> None:
        """Put a context's own affine map (``"dsbn"``) before that of the batch norm."""
        if not isinstance(normalizer, DomainBatchNorm) or normalizer.weight is None or normalizer.bias is None:
            return
        weight, bias = (context_rows(t.double(), ids)[0] for t in (normalizer.weight, normalizer.bias))
        after = None if norm.weight is None else norm.weight.double()
        bias = bias if after is None else bias * after
        self._set(norm, "weight", weight if after is None else weight * after)
        self._set(norm, "bias", bias if norm.bias is None else bias + norm.bias.double())

    # ------------------------------------------------------------------------------------------- inputs and embeddings

    def input(self, module: Any, scale: Tensor, offset: Tensor) -> None:
        """A layer whose input is normalised: into its weights, or a batch norm before a zero-padded convolution."""
        if type(module) is nn.Linear:
            weight = module.weight.double()
            self._set_linear(module, weight * scale, weight @ offset)
            return
        plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        unpadded = plain and module.padding in ("valid", (0,) * len(module.stride))
        if plain and (unpadded or module.padding_mode != "zeros"):
            weight = module.weight.double()  # (out, C / groups, ...)
            group = torch.arange(weight.shape[0], device=weight.device) // (weight.shape[0] // module.groups)
            channels = group[:, None] * weight.shape[1] + torch.arange(weight.shape[1], device=weight.device)
            shape = (*channels.shape, *[1] * (weight.dim() - 2))
            shift = (weight * offset[channels].reshape(shape)).flatten(1).sum(dim=1)
            self._set_linear(module, weight * scale[channels].reshape(shape), shift)
            return
        dims = module.weight.dim()
        self._replace(module, nn.Sequential(self._affine_map(dims, scale, offset), module))

    def output(self, module: Any, scale: Tensor, offset: Tensor, maps: bool) -> None:
        """A patch embedding whose output is normalised: into its norm or its projection, or an affine map after it."""
        if module._parameters or any(isinstance(child, nn.Embedding) for child in module.children()):
            raise PatchError(
                f"{type(module).__name__} adds position embeddings to its patches itself, so what follows them cannot "
                "be folded into its weights; patch where='norms' instead."
            )
        dims = 4 if maps else 2
        names = ("norm", "layer_norm", "layernorm", "proj", "projection")
        layers = {name: module._modules[name] for name in names if module._modules.get(name) is not None}
        name, last = next((item for item in layers.items() if not isinstance(item[1], nn.Identity)), ("", module))
        if type(last) in (nn.Conv2d, nn.Linear) or _ends_in_affine(last):
            self._scale_after(last, scale, offset)
        elif name.endswith("norm"):
            setattr(module, name, nn.Sequential(last, self._affine_map(dims, scale, offset)))
        else:
            self._replace(module, nn.Sequential(module, self._affine_map(dims, scale, offset)))

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        old = module._parameters.get(name)
        buffer = module._buffers.get(name)
        if buffer is not None:
            module._buffers[name] = value.to(buffer)
            return
        like = self.like if old is None else old
        trained = old is None or old.requires_grad
        module.register_parameter(name, nn.Parameter(value.to(like), requires_grad=trained))

    def _scale_after(self, module: Any, scale: Tensor, offset: Tensor) -> None:
        """Scale and shift the output features of a layer that ends in ``weight`` and ``bias``."""
        weight = torch.ones_like(scale) if module.weight is None else module.weight.double()
        bias = 0.0 if module.bias is None else module.bias.double()
        self._set(module, "bias", bias * scale + offset)
        self._set(module, "weight", weight * scale.view(-1, *[1] * (weight.dim() - 1)))

    def _set_linear(self, module: Any, weight: Tensor, shift: Tensor) -> None:
        self._set(module, "bias", shift if module.bias is None else module.bias.double() + shift)
        self._set(module, "weight", weight)

    def _affine_map(self, dims: int, scale: Tensor, offset: Tensor) -> nn.Module:
        """``x * scale + offset`` for maps of ``dims`` axes, features in axis 1; for tokens of any with ``dims=2``."""
        if dims == 2:
            from timm.models.mlp_mixer import Affine

            affine = Affine(len(scale)).to(self.like)
            affine.alpha.data.copy_(scale.view_as(affine.alpha))
            affine.beta.data.copy_(offset.view_as(affine.beta))
            return cast(nn.Module, affine)
        kind = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
        norm = kind(len(scale), device=self.like.device, dtype=self.like.dtype)
        cast(Tensor, norm.running_var).fill_(1 - norm.eps)
        self._set(norm, "weight", scale)
        self._set(norm, "bias", offset)
        return norm.eval()

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` in every place that held ``old``."""
        for parent in list(self.root.modules()):
            for name, child in parent._modules.items():
                if child is old and parent is not new:
                    parent._modules[name] = new


def _ends_in_affine(norm: nn.Module) -> bool:
    entry = NORMS.get(qualified_name(own_class(norm)))
    has_bias = isinstance(norm, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
    return entry is not None and not entry.fused and has_bias


def _without_affine(norm: nn.Module, fused: bool) -> nn.Module:
    plain = copy.deepcopy(norm)
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        old = plain._parameters.get(name)
        if old is not None:
            plain._parameters[name] = nn.Parameter(torch.full_like(old, value), requires_grad=False)
    for name in ("drop", "act", "activation"):
        if fused and name in plain._modules:
            plain._modules[name] = nn.Identity()
    return plain
