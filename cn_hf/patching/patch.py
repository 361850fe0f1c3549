"""``patch_model`` and its way back: swap slots of a model in place, wholly or not at all."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import CnHfError, ConfigTypeError, InputTypeError, PatchError
from cn_hf.norm import ContextNorm, DomainBatchNorm, FeatureBatchNorm, MixtureNorm
from cn_hf.patching.config import CN_MODES, ContextNormConfig
from cn_hf.patching.convert import NORMS, Slot, adjusted_variance, qualified_name, slot_class
from cn_hf.patching.placement import Target, find_new_norms, find_targets, fitting_mode
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.routing import (
    RoutedModel,
    accept_ids_of_parts,
    add_root_mixin,
    refuse_ids_of_parts,
    routed_class,
    router_of,
)
from cn_hf.patching.swapped import has_other_forward, own_class, swap_class

__all__ = [
    "SlotReport",
    "WithoutOwnSaving",
    "apply_inference",
    "context_parameters",
    "patch_model",
    "patch_report",
    "unpatch_model",
]

FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm's reparameterize_model calls
_UNHOOK = "Take accelerate's hooks off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
M = TypeVar("M", bound=nn.Module)
_ADAPTED = ("peft.peft_model.PeftModel", "peft.mixed_model.PeftMixedModel", "peft.tuners.tuners_utils.BaseTuner")
WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule", "FullyShardedDataParallel")


def patch_model(
    model: M,
    mode: str | None = None,
    *,
    num_contexts: int | None = None,
    where: str | Sequence[str] | None = None,
    context_names: Sequence[str] | None = None,
    config: ContextNormConfig | None = None,
    **options: Any,
) -> M:
    """Make a model context-aware, in place: its ``forward`` takes ``context_ids`` as one more keyword.

    Right after patching (default ``init``) the evaluation output equals the original's for every context and without
    ids.

    Args:
        model: a timm, transformers or any other module, not wrapped and not compiled yet.
        mode: ``"cn-patches"``, ``"cn-channels"``, ``"cn"`` (both), ``"dsbn"`` (a batch norm for each context), or a
            baseline, ``"bn"`` or ``"mn"``. None for the cn mode that fits the norms of the model.
        num_contexts: number of contexts (components for ``"mn"``); 3, the paper's K, by default.
        where: ``"norms"``, every norm layer of the mode's kind; ``"paper"``, the paper's placement; ``"input"``;
            ``"embed"``; module-name patterns (full name, suffix or regular expression); None for ``"norms"`` where the
            model has any of that kind (cn modes), else ``"paper"``.
        context_names: names of the contexts; sets their number too.
        config: a whole configuration; the arguments and options given beside it replace its fields.
        **options: further fields of ``ContextNormConfig``, such as ``view_order="view"`` for a forward that
            concatenates views of its batch, ``torch.cat([x1, x2])``.

    Returns:
        The same object.

    Raises:
        ConfigError: an option is unknown or out of range.
        InputTypeError: ``model`` is not a module, or wrapped, compiled or scripted.
        PatchError: nothing matches, a pattern matches nothing, or the model is patched already. The model is unchanged.
    """
    _check_model(model)
    if mode is None and config is None:
        mode = fitting_mode(model)
    config = _build_config(config, mode, num_contexts, where, context_names, options)
    targets = find_targets(model, config)
    _check_targets(model, targets)
    new_root = routed_class(own_class(model))
    router = ContextRouter(config)
    router.root = weakref.ref(model)
    router.inputs = tuple(target.name for target in targets if target.role == "input")
    normalizers = [_build_normalizer(model, target, config) for target in targets]
    unseen = [target.name for target in targets if _never_saw_data(target)]

    try:
        for target, normalizer in zip(targets, normalizers, strict=True):
            _install(target, normalizer, router, config)
        model.router = router  # type: ignore[assignment]  # the attribute of a routed model
        swap_class(model, new_root)
    except BaseException:
        for target in targets:
            if isinstance(target.module, Slot):
                restore_slot(target.module)
        model.__dict__.pop("router", None)
        raise
    apply_inference(model, config)
    _set_fast_paths(model)
    _guard_fusing(model)
    refuse_ids_of_parts(model)
    if unseen and config.mode in CN_MODES:
        warnings.warn(
            f"{len(unseen)} batch norms (first: {unseen[0]}) never saw data, so their contexts start from mean 0 and "
            "variance 1; call calibrate(model, batches) before training.",
            UserWarning,
            stacklevel=2,
        )
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"patch_model expects a torch.nn.Module, received {type(model).__name__}.")
    if type(model).__name__ in WRAPPERS or isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError(
            f"patch_model expects the model itself, received a {type(model).__name__}: patch first, then wrap, compile "
            "or script it."
        )
    if has_other_forward(model):
        raise PatchError(
            f"This {type(model).__name__} has a forward of its own on the instance, which would not take context_ids: "
            "patch the model before adding hooks to it (accelerate's prepare and dispatch_model do)."
        )
    for name, module in model.named_modules():
        if any(qualified_name(ancestor) in _ADAPTED for ancestor in type(module).__mro__):
            raise InputTypeError(
                f"Expected a model without adapters, received a {type(module).__name__}, which hands out the model "
                "inside it. Patch that one first: get_peft_model(patch_model(model, ...), peft_config)."
            )
        if isinstance(module, (RoutedModel, Slot)):
            raise PatchError(
                f"{name or type(model).__name__} is already patched; call unpatch_model on the patched model first."
            )


def _build_config(
    config: ContextNormConfig | None,
    mode: str | None,
    num_contexts: int | None,
    where: str | Sequence[str] | None,
    context_names: Sequence[str] | None,
    options: dict[str, Any],
) -> ContextNormConfig:
    base = ContextNormConfig() if config is None else config
    if not isinstance(base, ContextNormConfig):
        raise InputTypeError(f"config must be a ContextNormConfig, received {type(base).__name__}.")
    given: dict[str, Any] = dict(options)
    for name, value in (("mode", mode), ("num_contexts", num_contexts), ("where", where)):
        if value is not None:
            given[name] = value
    if context_names is not None:
        if isinstance(context_names, str) or not isinstance(context_names, Sequence):
            raise ConfigTypeError(f"context_names must be a list of names, received {context_names!r}.")
        given["context_names"] = tuple(context_names)
        given.setdefault("num_contexts", len(given["context_names"]))
    return base.replace(**given)


def _check_targets(model: nn.Module, targets: list[Target]) -> None:
    for target in targets:
        if target.module is model:
            raise PatchError(
                f"{type(model).__name__} is itself the layer to be swapped: use cn_hf.ContextNorm directly, or wrap it "
                "in nn.Sequential."
            )
        if has_other_forward(target.module):
            raise PatchError(
                f"{target.name} has a forward of its own on the instance, which would go past its contexts: patch the "
                "model before adding hooks to it (accelerate's prepare and dispatch_model do)."
            )
        for attribute in ("normalizer", "router"):
            if hasattr(target.module, attribute):
                raise PatchError(f"{target.name} has an attribute {attribute!r} of its own, which a slot needs.")
    if hasattr(model, "router"):
        raise PatchError(f"{type(model).__name__} has an attribute 'router' of its own, which a patched model needs.")


# ---------------------------------------------------------------------------------------------------------- installing


def _place(model: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the slot's tensors, and float32, or float64 in a double model: half loses what identity needs."""
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if tensor.is_floating_point():
                return tensor.device, torch.promote_types(tensor.dtype, torch.float32)
    return torch.device("cpu"), torch.float32


def _build_normalizer(model: nn.Module, target: Target, config: ContextNormConfig) -> nn.Module:
    own_eps = NORMS[qualified_name(own_class(target.module))].eps(target.module) if target.role == "norm" else 1e-5
    usual = own_eps if 0 < own_eps < 1 else 1e-5  # of a variance that starts as 1 less eps
    eps = usual if config.eps is None else config.eps
    device, dtype = _place(model, target.module)
    common: dict[str, Any] = {
        "feature_dim": target.feature_dim,
        "eps": eps,
        "affine": config.affine and target.role != "norm",
        "device": device,
        "dtype": dtype,
    }
    try:
        if config.mode == "bn":
            return FeatureBatchNorm(target.num_features, momentum=config.momentum, **common)
        if config.mode == "mn":
            return MixtureNorm(
                target.num_features,
                config.num_contexts,
                momentum=config.momentum,
                em_iterations=config.em_iterations,
                max_vectors=config.em_vectors,
                **common,
            )
        _check_stored_eps(target, own_eps, eps, config)
        if config.mode == "dsbn":
            common["affine"] = True
            return DomainBatchNorm(target.num_features, config.num_contexts, momentum=config.momentum, **common)
        return ContextNorm(
            target.num_features,
            config.num_contexts,
            parametrization=config.parametrization,
            embedding_dim=config.embedding_dim,
            variance_activation=config.variance_activation,
            init=config.init,
            sparse=config.sparse,
            **common,
        )
    except CnHfError as error:
        raise type(error)(f"{target.name}: {error}") from error


def _check_stored_eps(target: Target, own_eps: float, eps: float, config: ContextNormConfig) -> None:
    if config.init == "identity" and eps != own_eps and _is_stored(target):
        adjusted_variance(cast(Tensor, target.module.running_var), own_eps, eps)


def _is_stored(target: Target) -> bool:
    return target.role == "norm" and NORMS[qualified_name(own_class(target.module))].standardize is None


def _never_saw_data(target: Target) -> bool:
    tracked = getattr(target.module, "num_batches_tracked", None)
    return _is_stored(target) and isinstance(tracked, Tensor) and not tracked.is_meta and int(tracked) == 0


def _install(target: Target, normalizer: nn.Module, router: ContextRouter, config: ContextNormConfig) -> None:
    module = target.module
    is_stored = _is_stored(target)
    normalizer.train(module.training)
    if is_stored and isinstance(normalizer, FeatureBatchNorm):
        normalizer.load_state_dict(dict(module.named_buffers(recurse=False)), strict=False)
    swap_class(module, slot_class(target.role, own_class(module)))
    module.add_module("normalizer", normalizer)
    module.router = router  # type: ignore[assignment]  # the attribute of a slot
    if target.near_sequence_first:
        module.near_sequence_first = True  # type: ignore[assignment]
    if target.role == "norm" and not is_stored:
        module.keep_statistics = config.keep_statistics and config.mode in CN_MODES  # type: ignore[assignment]
    if is_stored and config.init == "identity":
        cast(Slot, module).reset_normalizer()


def _set_fast_paths(model: nn.Module) -> None:
    # torch's encoder layer reads the weights of its norms in evaluation and never calls them; this flag makes it call.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, Slot) for m in module.children()):
            module.cn_hf_fast_path = module.activation_relu_or_gelu  # type: ignore[assignment]
            module.activation_relu_or_gelu = 0


def _guard_fusing(model: nn.Module) -> None:
    # These methods make one layer of what a module's children hold, and would read past the slots among them.
    for module in model.modules():
        methods = [method for method in FUSING if hasattr(module, method)]
        if methods and any(isinstance(part, Slot) for part in module.modules()):
            for method in methods:
                setattr(module, method, refuse_fusing)
        holds_slots = module is not model and any(isinstance(part, Slot) for part in module.modules())
        if holds_slots and hasattr(module, "save_pretrained"):
            module.save_pretrained = refuse_saving  # type: ignore[assignment]  # a method of transformers' models


def refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``save_pretrained`` of a part of a patched model, which would save weights without their contexts.

    Raises:
        PatchError: always.
    """
    raise PatchError(
        "Expected the whole patched model to be saved, received a part, whose files would not say how to make its "
        "contexts. Call save_pretrained of the model that was patched; an Auto class loads the part from its folder."
    )


def refuse_fusing(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for the methods of a module that would fuse its slots away.

    Raises:
        PatchError: always.
    """
    raise PatchError(
        "Fusing (timm's reparameterize_model) would drop the contexts of this model: fold_context(model, context) "
        "gives a plain model for one context, and unpatch_model(model) the one without contexts; either can be fused."
    )


class WithClassifier:
    """The root of a patched model that can replace its own classifier."""

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Replace the classifier as the model's class does; norms of the new one become slots as those of the old."""
        model: Any = self
        known = set(model.modules())
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]  # of the model's class
        if any(isinstance(module, Slot) and module.recipe[1][0] == "norm" for module in known):
            config = model.router.config
            for target in find_new_norms(model, config, known):
                _install(target, _build_normalizer(model, target, config), model.router, config)
            apply_inference(model, config)


class WithoutOwnSaving:
    """The root of a patched model whose class has huggingface_hub's ``PyTorchModelHubMixin``."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: ``from_pretrained`` of the model's class would build a plain model and leave the contexts out.

        Raises:
            PatchError: always.
        """
        name = type(self).__name__
        raise PatchError(
            f"PyTorchModelHubMixin's own saving would lose the contexts of this model: {name}.from_pretrained builds a "
            f"plain {name}. Use cn_hf.save_pretrained(model, folder) or cn_hf.push_to_hub(model, repo_id), and "
            f"cn_hf.from_pretrained(folder, model={name}(...)) to load it."
        )

    push_to_hub = _save_pretrained = save_pretrained


add_root_mixin("reset_classifier", WithClassifier)
add_root_mixin("huggingface_hub.hub_mixin.PyTorchModelHubMixin", WithoutOwnSaving)


# -------------------------------------------------------------------------------------------------------- the way back


def unpatch_model(model: M) -> M:
    """Give a patched model its original modules back, in place: bit-equal if nothing was trained.

    Affine weights stay as trained; what the contexts learned is dropped.

    Args:
        model: a patched model, or a part of one that is gone.

    Returns:
        The same object.

    Raises:
        PatchError: the model is not patched, is a part of one that is, or is hooked by accelerate.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"unpatch_model expects a torch.nn.Module, received {type(model).__name__}.")
    if not isinstance(model, RoutedModel):
        _check_has_no_root(model)
    for name, module in model.named_modules():
        if has_other_forward(module) and isinstance(module, (RoutedModel, Slot)):
            raise PatchError(
                f"{name or type(model).__name__} has a forward of its own on the instance, which would go on as if it "
                f"were patched. {_UNHOOK}"
            )
    for module in list(model.modules()):
        if isinstance(module, Slot):
            restore_slot(module)
        if hasattr(module, "cn_hf_fast_path"):
            module.activation_relu_or_gelu = module.cn_hf_fast_path
            del module.cn_hf_fast_path
    restore_root(model)
    return model


def _check_has_no_root(model: nn.Module) -> None:
    slots = [module for module in model.modules() if isinstance(module, Slot)]
    if not slots:
        router_of(model)
    for slot in slots:
        root = None if slot.router.root is None else slot.router.root()
        if root is not None and any(module is slot for module in root.modules()):
            raise PatchError(
                f"Expected the model that was patched, a {type(root).__name__}, received a {type(model).__name__}, "
                "which shares layers with it. Call unpatch_model on the patched model."
            )


def restore_slot(slot: Slot) -> None:
    """Make a slot the module it was."""
    module = cast(nn.Module, slot)
    for attribute in ("normalizer", "router", "keep_statistics", "near_sequence_first"):
        if attribute in module.__dict__ or attribute in module._modules:
            delattr(module, attribute)
    swap_class(module, slot.original_class)


def restore_root(model: nn.Module) -> None:
    """Make the root of a patched model the class it was."""
    for module in model.modules():
        for method in FUSING:
            if module.__dict__.get(method) is refuse_fusing:
                delattr(module, method)
        if module.__dict__.get("save_pretrained") is refuse_saving:
            del module.save_pretrained
    accept_ids_of_parts(model)
    if isinstance(model, RoutedModel):  # no part of a model that is gone
        del model.router
        swap_class(cast(nn.Module, model), model.original_class)


# ----------------------------------------------------------------------------------------------------------- reporting


class SlotReport(NamedTuple):
    """One slot of a patched model."""

    name: str
    old_class: str
    new_class: str
    num_features: int


class PatchReport(list[SlotReport]):
    """The slots of a patched model, printed as a table."""

    def __str__(self) -> str:
        """One line a slot."""
        rows = [("slot", "was", "is", "features"), *((r[0], r[1], r[2], str(r[3])) for r in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def named_slots(model: nn.Module) -> list[tuple[str, Slot]]:
    """Names and slots of a patched model.

    Raises:
        PatchError: the model is not patched.
    """
    router_of(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Slot)]


def own_slots(model: nn.Module) -> list[tuple[str, Slot]]:
    """``named_slots``, for what changes their layers: these must be the layers that patching put there.

    Raises:
        PatchError: the model is not patched, or something wraps the layers.
    """
    slots = named_slots(model)
    for name, slot in slots:
        layer: nn.Module = slot.normalizer
        if not isinstance(layer, (ContextNorm, DomainBatchNorm, FeatureBatchNorm, MixtureNorm)):
            raise PatchError(
                f"The context-aware layer of {name} is wrapped in a {type(layer).__name__}, as by PEFT's "
                "modules_to_save: take it off first, with peft_model.merge_and_unload() or peft_model.unload()."
            )
        if layer.is_on_meta() and has_other_forward(layer):
            raise PatchError(f"The context-aware layer of {name} has no values: its tensors are offloaded. {_UNHOOK}")
    return slots


def patch_report(model: nn.Module) -> PatchReport:
    """List the slots of a patched model: name, old class, new class, features.

    Raises:
        PatchError: the model is not patched.
    """
    return PatchReport(
        SlotReport(name, slot.original_class.__name__, type(slot).__name__, slot.normalizer.num_features)
        for name, slot in named_slots(model)
    )


def apply_inference(model: nn.Module, config: ContextNormConfig) -> None:
    """Hand the inference options to the layers."""
    for module in model.modules():
        if isinstance(module, ContextNorm):
            module.inference = "cn+" if config.inference == "cn+" else "cn"  # else past forward, in silence, CN+
            module.plus_stats = config.plus_stats
            module.plus_scale = config.plus_scale
            module.plus_posterior = config.plus_posterior


def context_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters CN added, for parameter groups (no weight decay) and norms-only checkpoints.

    Raises:
        PatchError: the model is not patched.
    """
    return [parameter for _, slot in named_slots(model) for parameter in slot.normalizer.parameters()]
