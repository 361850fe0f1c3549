"""One table: norm class -> its context-aware counterpart, and back, by exact type.

A slot is a module whose class has been swapped in place for a subclass made here, with the normalizer as one more
child: parameters, buffers, hooks, flags and names stay where they were, and swapping the class back undoes it. Two
forms:

- a norm with *stored* statistics (batch norms): the normalizer replaces it;
- a norm with *per-sample* statistics (layer norms and their kin): its standardisation stays, the normalizer follows.

The affine map of the norm, and a dropout and activation fused into it, come after either.

Shape legend: ``N`` samples, ``C`` features; maps are ``(N, C, H, W)``, tokens ``(N, ..., C)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import PatchedAttributeError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm, FeatureBatchNorm, MixtureNorm
from cn_hf.norm.convolution import normalized_conv2d
from cn_hf.norm.em import statistics_dtype
from cn_hf.norm.fused.formulas import standardized
from cn_hf.norm.layers import check_features
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.standardize import LAYER, RMS, PerVector, Standardize, group, instance, simple, simple_of_maps
from cn_hf.patching.swapped import Swapped, has_other_forward
from cn_hf.patching.transformers_norms import (
    FROZEN_BATCH_NORMS,
    GROUP_NORMS,
    GROUP_NORMS_WITH_ACTIVATION,
    LAYER_NORMS_OF_FORMAT,
    LAYER_NORMS_OF_MAPS,
    ROOT_MEAN_SQUARE_NORMS,
)

__all__ = ["MIXING", "NORMS", "REFUSED", "NormEntry", "Slot", "adjusted_variance", "qualified_name", "slot_class"]

NORMALIZERS = (ContextNorm, DomainBatchNorm, FeatureBatchNorm, MixtureNorm)

# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class NormEntry:
    """The facts of a norm class that swapping it needs.

    Attributes:
        feature_dim: 1 for maps, -1 for tokens; norms with a ``data_format`` decide one by one (see ``axis``).
        standardize: its per-sample standardisation without the affine map; None where it stores statistics.
        fused: a dropout ``drop`` and an activation ``act`` (or ``activation``) come after the affine map.
    """

    feature_dim: int
    standardize: Standardize | None
    fused: bool = False

    def axis(self, norm: Any) -> int:
        """The feature axis of a norm of this class: 1 or -1."""
        return 1 if getattr(norm, "data_format", None) == "channels_first" else self.feature_dim

    def eps(self, norm: Any) -> float:
        """Return the number that a norm of this class adds to its variance."""
        given = (vars(norm).get(name) for name in ("eps", "variance_epsilon"))  # slots of stored norms refuse theirs
        return next((float(eps) for eps in given if eps is not None), 1e-5 if self.standardize is None else 1e-6)

    def standardized(self, norm: Any, x: Tensor) -> Tensor:
        """``x``, float32 at least, as a norm of this class standardises it; ``x`` itself where it stores statistics."""
        if self.standardize is None:
            return x
        if not isinstance(self.standardize, PerVector):
            return self.standardize(norm, x)
        axis, how = self.axis(norm), self.standardize.of(norm, x.dtype)
        return standardized(x.movedim(axis, -1), how.eps, how.centered).movedim(-1, axis)

    def num_features(self, norm: Any) -> int:
        """``C`` of a norm of this class."""
        for attribute in ("num_features", "num_channels"):
            if hasattr(norm, attribute):
                return int(getattr(norm, attribute))
        if hasattr(norm, "normalized_shape"):
            return int(norm.normalized_shape[-1])
        return int(norm.weight.shape[0])

    def refusal(self, norm: Any) -> str | None:
        """Why this very norm cannot be swapped, or None."""
        if self.standardize is None and norm.running_mean is None:
            return "it keeps no running statistics (track_running_stats=False) to start from"
        if self.standardize is instance and getattr(norm, "track_running_stats", False):
            return "an instance norm that tracks running statistics changes its meaning in evaluation"
        if len(getattr(norm, "normalized_shape", (1,))) != 1:
            return f"it normalises over several axes, normalized_shape={tuple(norm.normalized_shape)}"
        return None


_STORED_MAPS = NormEntry(1, None)
_STORED_MAPS_ACT = NormEntry(1, None, fused=True)

NORMS: dict[str, NormEntry] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": _STORED_MAPS,
    "torch.nn.modules.batchnorm.BatchNorm2d": _STORED_MAPS,
    "torch.nn.modules.batchnorm.BatchNorm3d": _STORED_MAPS,
    "torch.nn.modules.batchnorm.SyncBatchNorm": _STORED_MAPS,
    "timm.layers.norm_act.BatchNormAct2d": _STORED_MAPS_ACT,
    "timm.layers.norm_act.SyncBatchNormAct": _STORED_MAPS_ACT,
    "timm.layers.norm_act.FrozenBatchNormAct2d": _STORED_MAPS_ACT,
    "torch.nn.modules.normalization.LayerNorm": NormEntry(-1, LAYER),
    "torch.nn.modules.normalization.RMSNorm": NormEntry(-1, RMS),
    "torch.nn.modules.normalization.GroupNorm": NormEntry(1, group),
    "torch.nn.modules.instancenorm.InstanceNorm1d": NormEntry(1, instance),
    "torch.nn.modules.instancenorm.InstanceNorm2d": NormEntry(1, instance),
    "torch.nn.modules.instancenorm.InstanceNorm3d": NormEntry(1, instance),
    "timm.layers.norm.LayerNorm": NormEntry(-1, LAYER),
    "timm.layers.norm.LayerNormFp32": NormEntry(-1, LAYER),
    "timm.layers.norm.LayerNorm2d": NormEntry(1, LAYER),
    "timm.layers.norm.LayerNorm2dFp32": NormEntry(1, LAYER),
    "timm.layers.norm.LayerNormExp2d": NormEntry(1, LAYER),
    "timm.layers.norm.GroupNorm": NormEntry(1, group),
    "timm.layers.norm.GroupNorm1": NormEntry(1, group),
    "timm.layers.norm.RmsNorm": NormEntry(-1, RMS),
    "timm.layers.norm.RmsNormFp32": NormEntry(-1, RMS),
    "timm.layers.norm.RmsNorm2d": NormEntry(1, RMS),
    "timm.layers.norm.RmsNorm2dFp32": NormEntry(1, RMS),
    "timm.layers.norm.SimpleNorm": NormEntry(-1, simple),
    "timm.layers.norm.SimpleNormFp32": NormEntry(-1, simple),
    "timm.layers.norm.SimpleNorm2d": NormEntry(1, simple_of_maps),
    "timm.layers.norm.SimpleNorm2dFp32": NormEntry(1, simple_of_maps),
    "timm.layers.norm_act.LayerNormAct": NormEntry(-1, LAYER, fused=True),
    "timm.layers.norm_act.LayerNormActFp32": NormEntry(-1, LAYER, fused=True),
    "timm.layers.norm_act.LayerNormAct2d": NormEntry(1, LAYER, fused=True),
    "timm.layers.norm_act.LayerNormAct2dFp32": NormEntry(1, LAYER, fused=True),
    "timm.layers.norm_act.GroupNormAct": NormEntry(1, group, fused=True),
    "timm.layers.norm_act.GroupNorm1Act": NormEntry(1, group, fused=True),
    "timm.layers.norm_act.RmsNormAct": NormEntry(-1, RMS, fused=True),
    "timm.layers.norm_act.RmsNormActFp32": NormEntry(-1, RMS, fused=True),
    "timm.layers.norm_act.RmsNormAct2d": NormEntry(1, RMS, fused=True),
    "timm.layers.norm_act.RmsNormAct2dFp32": NormEntry(1, RMS, fused=True),
    "timm.models.metaformer.GroupNorm1NoBias": NormEntry(1, group),
    "timm.models.metaformer.LayerNorm2dNoBias": NormEntry(1, LAYER),
    "timm.models.metaformer.LayerNormNoBias": NormEntry(-1, LAYER),
    "torchvision.ops.misc.FrozenBatchNorm2d": _STORED_MAPS,
    "torchvision.models.convnext.LayerNorm2d": NormEntry(1, LAYER),
    **dict.fromkeys(LAYER_NORMS_OF_FORMAT, NormEntry(-1, LAYER)),
    **dict.fromkeys(LAYER_NORMS_OF_MAPS, NormEntry(1, LAYER)),
    **dict.fromkeys(ROOT_MEAN_SQUARE_NORMS, NormEntry(-1, RMS)),
    **dict.fromkeys(FROZEN_BATCH_NORMS, _STORED_MAPS),
    **dict.fromkeys(GROUP_NORMS, NormEntry(1, group)),
    **dict.fromkeys(GROUP_NORMS_WITH_ACTIVATION, NormEntry(1, group, fused=True)),
}
"""Every norm class cn_hf swaps, by qualified name, so that nothing is imported to look one up."""

REFUSED: dict[str, str] = {
    "torch.nn.modules.normalization.LocalResponseNorm": "it divides by neighbouring channels; no mean or variance",
    **{
        f"torch.nn.modules.{kind}.Lazy{name}Norm{rank}d": "its features are unknown until a first forward: run one"
        for kind, name in (("batchnorm", "Batch"), ("instancenorm", "Instance"))
        for rank in (1, 2, 3)
    },
    "timm.layers.inplace_abn.InplaceAbn": "it is one CUDA kernel with its activation; use BatchNormAct2d instead",
    "timm.layers.grn.GlobalResponseNorm": "it rescales channels by each other; no mean or variance",
    "timm.layers.split_batchnorm.SplitBatchNorm2d": "it holds several batch norms; convert it to BatchNorm2d first",
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": "its learned threshold is part of the normalization",
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": "it is tied to its activation",
    **{
        f"timm.layers.evo_norm.EvoNorm2d{kind}": "it is a normalization and an activation in one formula"
        for kind in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")
    },
}
"""Norm-like classes that cannot be swapped, and why."""

MIXING: dict[str, str] = {
    "timm.models.csatv2.SpatialTransformerBlock": "its attention runs across the samples of a batch",
}
"""Modules that mix the samples of a batch, and how: norms inside them would mix contexts, and are left as they are."""


def qualified_name(norm_class: type) -> str:
    """The key of ``norm_class`` in the tables."""
    return f"{norm_class.__module__}.{norm_class.__qualname__}"


# ----------------------------------------------------------------------------------------------------------- the slots


class Slot(Swapped):
    """A module with a normalizer: what all kinds of slots share."""

    adds = "normalizer"
    normalizer: ContextNorm | DomainBatchNorm | FeatureBatchNorm | MixtureNorm
    router: ContextRouter
    near_sequence_first: bool = False  # attention nearby takes (L, N, C), so x may be so

    def _context_ids(self, x: Tensor) -> Tensor | None:
        check_features(self.normalizer, x)  # one channel would broadcast to all
        return self.router.ids_for(x)

    def _normalize(self, x: Tensor, **options: Tensor | None) -> Tensor:
        if self.near_sequence_first and self.router.is_sequence_first(x):
            return self._by_context(x.transpose(0, 1), **options).transpose(0, 1)
        return self._by_context(x, **options)

    def _by_context(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        ids = self._context_ids(x)
        observer = self.router.observer
        if observer is not None and (seen := observer.normalize(self, x, ids, weight, bias)) is not None:
            return seen
        named = self.router.named_for(x) if ids is None else None
        if named is None:
            return self._call(x, ids, weight=weight, bias=bias)
        return self._partly_known(x, named, weight=weight, bias=bias)

    def _partly_known(self, x: Tensor, named: Tensor, **options: Tensor | None) -> Tensor:
        """Normalise samples by their own contexts, and by CN+ where that is -1."""
        y = self._call(x, named.clamp_min(0), **options)
        unknown = (named < 0).nonzero().squeeze(1)
        return y.index_copy(0, unknown, self._call(x[unknown], None, combined=True, **options))

    def _call(self, x: Tensor, ids: Tensor | None, **options: Any) -> Tensor:
        """Call the normalizer, as a module where hooks on it, such as those that fetch offloaded weights, must run."""
        norm = self._modules["normalizer"]  # type: ignore[attr-defined]  # of nn.Module
        if type(norm) is ContextNorm and not _is_hooked(norm):
            return norm.normalize(x, ids, **options)
        if ids is not None:
            options |= {"context_ids": ids, "checked": True}
        return cast(Tensor, norm(x, **options))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse what conversions of batch norms would put in the normalizer's place."""
        if name == "normalizer" and not isinstance(module, NORMALIZERS):
            raise PatchError(
                f"A {type(module).__name__} cannot take the place of the normalizer of a {type(self).__name__}: "
                "convert batch norms (to SyncBatchNorm, SplitBatchNorm) before patch_model."
            )
        super().add_module(name, module)  # type: ignore[misc]  # of nn.Module

    def start_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance (less the normalizer's eps) that keep the model's output; None for 0 and 1 - eps."""
        return None

    def reset_normalizer(self) -> None:
        """Bring the normalizer to where it leaves the model's output as the original module's."""
        if isinstance(self.normalizer, (ContextNorm, DomainBatchNorm)):
            self.normalizer.reset_parameters()
            start = self.start_statistics()
            if start is None:
                one = torch.ones(self.normalizer.num_features, dtype=torch.float64)
                start = torch.zeros_like(one), one - self.normalizer.eps
            self.normalizer.set_statistics(*start)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(  # type: ignore[misc]  # the swapped class's own, found by the method order
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = [key for key in state_dict if key.startswith(prefix)]
        if keys and not any(key.startswith(f"{prefix}normalizer.") for key in keys):
            self.start_anew(state_dict, prefix)

    def start_anew(self, state_dict: dict[str, Any], prefix: str) -> None:
        """A checkpoint of the plain model is being loaded: reset the normalizer from what it holds.

        Handing the normalizer its own state keeps strict loading content; torch gives each module a copy of the
        dictionary, so the caller's is untouched.
        """
        if self.normalizer.is_on_meta():  # and the checkpoint is being assigned
            loaded = next((t for t in state_dict.values() if isinstance(t, Tensor) and not t.is_meta), None)
            own = next((t for t in cast(nn.Module, self).parameters() if not t.is_meta), loaded)
            if own is not None:
                self.normalizer.to_empty(device=own.device)
        self.reset_normalizer()
        state_dict.update({f"{prefix}normalizer.{name}": value for name, value in self.normalizer.state_dict().items()})


def _finish(norm: Any, y: Tensor, fused: bool) -> Tensor:
    if fused:
        for name in ("drop", "act", "activation"):  # a norm that was built directly may lack them
            y = norm._modules[name](y) if norm._modules.get(name) is not None else y
    return y


class SampleNormSlot(Slot):
    """A norm with per-sample statistics: its standardisation, then the normalizer, then its affine map."""

    entry: ClassVar[NormEntry]
    keep_statistics: bool

    def forward(self, x: Tensor) -> Tensor:
        """Standardise each sample, normalise by context, scale and shift."""
        parameters = self._parameters  # type: ignore[attr-defined]  # of nn.Module
        weight = parameters["weight"] if "weight" in parameters else getattr(self, "weight", None)
        bias = parameters["bias"] if "bias" in parameters else getattr(self, "bias", None)
        norm, router = self._modules["normalizer"], self.router  # type: ignore[attr-defined]  # of nn.Module
        one_pass = self.entry.standardize if isinstance(norm, ContextNorm) and router.observer is None else None
        dtype, ids = statistics_dtype(x), None
        if isinstance(one_pass, PerVector) and self.keep_statistics:
            if not self.near_sequence_first or not router.is_sequence_first(x):
                ids = self._context_ids(x)
            if ids is not None:
                y = self._call(x, ids, weight=weight, bias=bias, standardize=one_pass.of(self, dtype))
                return _finish(self, y.to(x.dtype), self.entry.fused)
        wide = x.to(dtype)
        inner = self.entry.standardized(self, wide) if self.keep_statistics else wide
        y = self._normalize(inner, weight=weight, bias=bias)
        return _finish(self, y.to(x.dtype), self.entry.fused)


class StoredNormSlot(Slot, nn.Module):
    """A norm with stored statistics, which the normalizer replaces; the statistics stay for the way back.

    It is no subclass of the batch norm it was: code that folds batch norms into convolutions must not find one here.
    For code that does not ask for the class, ``eps`` is refused: no batch norm can be folded without it.
    """

    entry: ClassVar[NormEntry]
    _version = 2  # of the batch norms' state_dict: with num_batches_tracked

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by context, scale and shift."""
        y = self._normalize(x, weight=getattr(self, "weight", None), bias=getattr(self, "bias", None))
        return _finish(self, y, self.entry.fused)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        count, key = self._buffers.get("num_batches_tracked"), f"{prefix}num_batches_tracked"
        if count is None:
            state_dict.pop(key, None)  # a frozen batch norm has none, but loads what was saved unfrozen
        elif f"{prefix}running_mean" in state_dict:
            state_dict.setdefault(key, count)  # checkpoints older than this buffer
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def eps(self) -> float:
        """Refuse the batch norm's eps: code that reads it, to fold the running statistics, would drop the contexts."""
        raise AttributeError("eps")  # Python then asks ``__getattr__``

    def __getattr__(self, name: str) -> Any:
        """Look up tensors and modules, as every module does; ``eps`` is an error."""
        if name == "eps":
            raise PatchedAttributeError(
                "eps was asked of a batch norm that context normalization has replaced: it has one mean and variance a "
                "context. Use fold_context(model, context) for a plain model, or unpatch_model(model)."
            )
        return super().__getattr__(name)

    def start_statistics(self) -> tuple[Tensor, Tensor] | None:
        """The running statistics, adjusted where the normalizer's eps is another than the batch norm's.

        Raises:
            PatchError: the normalizer's eps is larger than a running variance + the batch norm's eps.
        """
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None or mean.is_meta:
            return None
        return mean.double(), adjusted_variance(var, self.entry.eps(self), self.normalizer.eps)

    def extra_repr(self) -> str:
        """The options shown by ``print(model)``."""
        return f"replaces {self.original_class.__name__}"


def adjusted_variance(var: Tensor, own_eps: float, eps: float) -> Tensor:
    """``var + own_eps - eps`` in float64: the variance that keeps the sum under another eps.

    Raises:
        PatchError: it would be negative.
    """
    adjusted = var.double() + (own_eps - eps)
    if not adjusted.is_meta and bool((adjusted < 0).any()):
        raise PatchError(
            f"eps={eps} is larger than the layer's smallest running variance + eps, {float(var.min()) + own_eps:.3g}, "
            "so the sum cannot be kept; pass a smaller eps, or none for the layer's own."
        )
    return adjusted


class InputSlot(Slot):
    """A module, usually the first convolution, whose input is normalised before it sees it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalise the input by context, then do what the module does."""
        return super().forward(self._normalize(x), *args, **kwargs)  # type: ignore[misc]  # the swapped class's own


class ConvolutionInputSlot(InputSlot):
    """An ``nn.Conv2d`` whose input is normalised: both in one function, which is cheaper in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the input by context, then convolve."""
        norm, conv = self.normalizer, cast(nn.Conv2d, self)
        one_function = (
            type(norm) is ContextNorm
            and not norm.affine
            and self.router.observer is None
            and conv.padding_mode == "zeros"
            and "_conv_forward" not in conv.__dict__  # replaced by tools that pad in their own way
            and not _is_hooked(norm)
            and self.router.ids_for(x) is not None
        )
        if not one_function:
            return cast(Tensor, super().forward(x))
        mean, var = cast(ContextNorm, norm).rows(cast(Tensor, self._context_ids(x)))
        return normalized_conv2d(
            x,
            mean,
            var,
            conv.weight,
            conv.bias,
            eps=norm.eps,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
        )


def _is_hooked(module: nn.Module) -> bool:
    """True if calling ``module`` does more than its class's ``forward``."""
    return bool(module._forward_pre_hooks or module._forward_hooks or has_other_forward(module))


class OutputSlot(Slot):
    """A module, usually the patch embedding, whose output is normalised."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module does, then normalise the result by context."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]  # the swapped class's own
        if isinstance(output, tuple):  # tokens first, then their grid
            return (self._normalize(output[0]), *output[1:])
        return self._normalize(output)


ROLES: dict[str, type[Slot]] = {"input": InputSlot, "output": OutputSlot}


def slot_class(role: str, base: Any) -> type[nn.Module]:
    """The class that makes a slot of a module of class ``base``.

    Args:
        role: ``"norm"`` for a norm in the table, ``"input"`` or ``"output"`` for any module.
        base: the module's class.
    """
    return _slot_class(role, base)


@cache
def _slot_class(role: str, base: Any) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "original_class": base,
        "recipe": (slot_class, (role, base)),
    }
    if role != "norm":
        form = ConvolutionInputSlot if role == "input" and base is nn.Conv2d else ROLES[role]
        return type(f"{base.__name__}WithContext{role.capitalize()}", (form, base), namespace)
    namespace["entry"] = entry = NORMS[qualified_name(base)]
    bases = (StoredNormSlot,) if entry.standardize is None else (SampleNormSlot, base)
    return type(f"Context{base.__name__}", bases, namespace)
