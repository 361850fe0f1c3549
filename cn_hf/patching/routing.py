"""How ``context_ids`` travel from ``forward()`` to the layers.

The root of a patched model gets a subclass of its own class whose ``forward`` names ``context_ids`` after the original
parameters. It checks the ids once, leaves them in the model's ``ContextRouter``, and the slots read them there. Each
model has its own router; a call's ids are taken away when the call ends, however it ends.

Shape legend: ``N`` samples, ``T`` contexts.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cn_hf.errors import ContextIdError, InputTypeError, PatchError
from cn_hf.norm.ids import ContextIds, as_tensor
from cn_hf.norm.synchronized import recomputing
from cn_hf.patching.average import average_contexts, check_averages
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.swapped import Swapped

__all__ = ["RoutedModel", "add_root_mixin", "added_names", "routed_class", "router_of", "use_contexts"]


def added_names(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that patching added; of a plain model, none."""
    added = {
        f"{name}.{module.adds}." if name else f"{module.adds}."
        for name, module in model.named_modules()
        if isinstance(module, Swapped) and module.adds
    }
    return {name for name in model.state_dict(keep_vars=True) if name.startswith(tuple(added))}


def router_of(model: nn.Module) -> ContextRouter:
    """The router of a patched model.

    Raises:
        PatchError: the model is not patched.
    """
    if not isinstance(model, RoutedModel):
        raise PatchError(
            f"{type(model).__name__} is not a patched model: call patch_model(model, ...) first, and pass the model "
            "itself rather than a wrapper (model.module of DDP, model._orig_mod of torch.compile, get_base_model() of "
            "peft)."
        )
    return model.router


# ---------------------------------------------------------------------------------------------------- the root's class


class RoutedModel(Swapped):
    """The root of a patched model: its own class, with ``context_ids`` as one more keyword of ``forward``."""

    router: ContextRouter

    @property
    def context_config(self) -> ContextNormConfig:
        """How the model was patched and how it runs without ids."""
        return self.router.config

    def no_weight_decay(self) -> set[str]:
        """Names timm's optimizers give no weight decay: the model's own and the parameters CN added."""
        inherited = getattr(super(), "no_weight_decay", None)
        names = set() if inherited is None else set(inherited())
        return names | added_names(cast(nn.Module, self))

    @property
    def _no_split_modules(self) -> set[str]:
        """Classes that a device map keeps on one device, for accelerate and transformers: slots are among them."""
        own = vars(self).get("_no_split_modules") or getattr(super(), "_no_split_modules", None) or ()
        modules = cast(nn.Module, self).modules()
        return {*own, *(type(module).__name__ for module in modules if isinstance(module, Swapped) and module.adds)}

    @_no_split_modules.setter
    def _no_split_modules(self, classes: set[str]) -> None:
        vars(self)["_no_split_modules"] = classes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, and wire the router to the new object."""
        super().__setstate__(state)  # type: ignore[misc]  # of nn.Module
        if self.router.root is None:  # a shallow copy shares a router that has its root already
            self.router.root = weakref.ref(self)  # type: ignore[arg-type]  # the combined class is a module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]  # of nn.Module
        # Slots see a plain checkpoint by their own keys; those without tensors of their own cannot.
        model = cast(nn.Module, self)
        added = {prefix + key for key in added_names(model)}
        own = {prefix + key for key in model.state_dict()} - added
        if own <= state_dict.keys() and not added & state_dict.keys():
            for name, module in model.named_modules():
                if hasattr(module, "start_anew") and not any(key.startswith(f"{prefix}{name}.") for key in own):
                    module.start_anew(state_dict, f"{prefix}{name}.")

    def _replicate_for_data_parallel(self) -> Any:
        raise PatchError(
            "nn.DataParallel runs replicas of a model in threads, which cannot each have their own context ids: "
            "use torch.nn.parallel.DistributedDataParallel (accelerate launch)."
        )


_MOST_COLOURS = 4  # channels of an image, by which it is told from features

ROOT_MIXINS: dict[str, type] = {}
"""What roots of some models can do besides: qualified name of a library's base class, or of a method -> mixin."""


def add_root_mixin(key: str, mixin: type) -> None:
    """Give the roots of some patched models the methods of ``mixin``.

    Args:
        key: qualified name of a library's class that they descend from, so that the library need not be imported; or
            the name of a method that they have.
        mixin: comes before ``RoutedModel`` among the root's base classes.
    """
    if ROOT_MIXINS.get(key) is not mixin:
        ROOT_MIXINS[key] = mixin
        _routed_class.cache_clear()


def _root_mixins(base: type) -> list[type]:
    names = {f"{ancestor.__module__}.{ancestor.__qualname__}" for ancestor in base.__mro__}
    return [mixin for key, mixin in ROOT_MIXINS.items() if key in names or hasattr(base, key)]


def routed_class(base: Any) -> type[nn.Module]:
    """The subclass of the module class ``base`` that routes context ids, under the same name.

    Raises:
        PatchError: ``base.forward`` has a parameter ``context_ids`` of its own.
    """
    return _routed_class(base)


@cache
def _routed_class(base: Any) -> type[nn.Module]:
    signature = inspect.signature(base.forward)
    if "context_ids" in signature.parameters:
        raise PatchError(f"{base.__name__}.forward already takes context_ids; cn_hf cannot add the keyword.")
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter(
        "context_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="ContextIds | None"
    )
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, extra)

    def forward(self: Any, *args: Any, context_ids: ContextIds | None = None, **kwargs: Any) -> Any:
        return _route(self, base.forward, args, kwargs, context_ids)

    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__qualname__ = f"{base.__qualname__}.forward"
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "original_class": base,
        "recipe": (routed_class, (base,)),
        "forward": forward,
    }
    return type(base.__name__, (*_root_mixins(base), RoutedModel, base), namespace)


# --------------------------------------------------------------------------------------------------------- one forward


def _route(
    model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ids: ContextIds | None
) -> Any:
    if not isinstance(args, tuple):  # torch.fx puts a proxy in place of *args
        raise PatchError(
            f"torch.fx cannot trace the forward of a patched {type(model).__name__}: trace the plain model and patch "
            "the graph module, or use hooks or torch.export."
        )
    router: ContextRouter = model.router
    _check_adapters(model, router)
    config = router.config
    if config.mode in BASELINES:
        return forward(model, *args, **kwargs)
    if ids is not None or router.default is not None:
        first = _first_tensor(args, kwargs)
        given = cast(Tensor, router.default) if ids is None else as_tensor(ids, config.context_names)
        alike = given.dim() == 0 or (ids is None and len(given) == 1)  # of all samples, however many a part has
        resolved = router.resolve(given, 1 if alike else first.shape[0], first.device)
        texts = kwargs.get("input_ids")
        num_texts = len(texts) if isinstance(texts, Tensor) and texts is not first else None
        return _run(router, lambda: forward(model, *args, **kwargs), resolved, num_texts)
    if model.training:
        raise ContextIdError(
            "Training needs context_ids: pass model(..., context_ids=ids), one id a sample "
            "(see use_contexts for calls that cannot take the keyword)."
        )
    if config.mode == "dsbn" and config.inference not in ("average", "predict"):
        raise ContextIdError(
            "Domain-specific batch norm needs the context of each sample, received none: pass context_ids=ids, "
            'or set_inference(model, "average") to try all contexts.'
        )
    if config.inference == "cn":
        raise ContextIdError(
            'inference="cn" needs context_ids: pass model(..., context_ids=ids), or call set_inference(model, "cn+").'
        )
    if config.inference == "average":
        check_averages(model)
        first = _first_tensor(args, kwargs)

        def in_context(context: int) -> Any:
            same = torch.full((first.shape[0],), context, device=first.device)
            return _run(router, lambda: forward(model, *args, **kwargs), same)

        return average_contexts(in_context, config.num_contexts, kwargs.get("labels"))
    predicted = router.predicted_ids(_images(args, kwargs)) if config.inference == "predict" else None
    return _run(router, lambda: forward(model, *args, **kwargs), predicted)


def _check_adapters(model: nn.Module, router: ContextRouter) -> None:
    """Refuse adapters around a layer whose input is normalised: they would see the input before that."""
    for name in router.inputs:
        module: Any = model
        for part in name.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.Module) and "base_layer" in module._modules:
            raise PatchError(
                f"The input of {name} is normalised by context, inside the layer; the adapter around it "
                f"({type(module).__module__}.{type(module).__name__}) takes its input before that, so merging it would "
                f"give another result. Leave {name} out of target_modules (exclude_modules={[name]!r}); to train it, "
                f"modules_to_save={[name]!r}."
            )


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = kwargs.get("pixel_values")  # of several inputs, that of the images
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
        if isinstance(value, Mapping):  # such as patches and their places
            return _first_tensor((), cast("dict[str, Any]", value))
    raise InputTypeError("A patched model needs a batch: no tensor was among the arguments of forward.")


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch that a context source looks at: labels may come before it."""
    named = kwargs.get("pixel_values")
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value
    return _first_tensor(args, kwargs)


def _run(router: ContextRouter, call: Callable[[], Any], ids: Tensor | None, num_texts: int | None = None) -> Any:
    with nullcontext() if torch.compiler.is_compiling() else router.lock:  # threads that share a model take turns
        if router.backward_ids is not None and not recomputing():
            router.backward_ids = None  # left by a backward that failed
        previous = router.ids, router.num_texts
        router.ids, router.num_texts = ids, num_texts
        try:
            output = call()
        finally:
            router.ids, router.num_texts = previous
    if ids is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _restore_in_backward(router, output, ids)
    return output


def _restore_in_backward(router: ContextRouter, output: Any, ids: Tensor) -> None:
    # Activation checkpointing runs the layers again during backward. Each call's ids must be there while its own part
    # of the graph runs, which begins at the call's outputs, and be gone afterwards.
    def reset() -> None:
        router.backward_ids = None

    def restore(grad: Tensor) -> None:
        router.backward_ids = ids
        torch.autograd.Variable._execution_engine.queue_callback(reset)

    for leaf in (output,) if isinstance(output, Tensor) else pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(restore)  # type: ignore[no-untyped-call]  # torch leaves it untyped


# -------------------------------------------------------------------------------------------------------- for the user


@contextmanager
def use_contexts(model: nn.Module, context_ids: ContextIds) -> Iterator[None]:
    """Give every call inside the ``with`` block these ids, in all threads, for callers that cannot pass the keyword.

    For ``forward_features``, ``forward_intermediates``, pipelines. With activation checkpointing, keep ``backward``
    inside the block.

    Args:
        model: a patched model.
        context_ids: as for ``forward``.

    Raises:
        ContextIdError: the ids are invalid, or, where a module of the model meets images, not one an image.
        PatchError: the model is not patched.
    """
    router = router_of(model)
    _check_adapters(model, router)
    tensor = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    ids = as_tensor(context_ids, router.config.context_names)
    previous = router.default
    router.default = router.resolve(ids, ids.shape[0] if ids.dim() else 1, device)
    hooks = [child.register_forward_pre_hook(_check_images(router), with_kwargs=True) for child in model.children()]
    try:
        yield
    finally:
        router.default = previous
        for hook in hooks:
            hook.remove()


def _check_images(router: ContextRouter) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """For calls past the root's forward, which checks by itself: ids of another number than images are an error."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = router.default
        if ids is None or len(ids) == 1 or router.ids is not None:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] <= _MOST_COLOURS < value.shape[2]:
                if value.shape[0] != len(ids):
                    raise ContextIdError(
                        f"Received {len(ids)} context_ids for a batch of {value.shape[0]} images; give one each."
                    )
                return

    return check
