"""The way of ``context_ids`` from ``forward()`` to the layers.

The root of a patched model gets a subclass of its own class whose ``forward``, and other methods that take tensors,
name ``context_ids`` after the original parameters. They check the ids once and leave them in the model's
``ContextRouter``, where the slots read them. Each model has its own router; a call's ids are taken away when the call
ends, however it ends.

Shape legend: ``N`` samples, ``T`` contexts.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ContextIdError, InputTypeError, PatchError
from cn_hf.norm.ids import ContextIds, as_tensor
from cn_hf.patching.average import average_contexts, check_averages
from cn_hf.patching.calls import Call
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
        """The configuration: the way the model was patched and runs without ids."""
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


ROOT_MIXINS: dict[str, type] = {}
"""Further abilities of some roots: qualified name of a library's base class, or of a method -> mixin."""


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
    if "context_ids" in inspect.signature(base.forward).parameters:
        raise PatchError(f"{base.__name__}.forward already takes context_ids; cn_hf cannot add the keyword.")
    mixins = [*_root_mixins(base), RoutedModel]
    methods = ["forward", *(name for name in _tensor_methods(base) if not any(hasattr(m, name) for m in mixins))]
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "original_class": base,
        "recipe": (routed_class, (base,)),
        **{name: _routed_method(base, name) for name in methods},
    }
    return type(base.__name__, (*mixins, base), namespace)


def _tensor_methods(base: type) -> Iterator[str]:
    """Names of public methods, other than ``forward`` and those of all modules, that may take a tensor."""
    for name in dir(base):
        method = inspect.getattr_static(base, name)
        is_own = isinstance(method, types.FunctionType) and not name.startswith("_") and not hasattr(nn.Module, name)
        if is_own and not (inspect.isgeneratorfunction(method) or inspect.iscoroutinefunction(method)):
            parameters = inspect.signature(method).parameters
            kinds = [str(p.annotation) for p in list(parameters.values())[1:]]
            if "context_ids" not in parameters and any(
                "Tensor" in kind or kind == str(inspect.Parameter.empty) for kind in kinds
            ):
                yield name


def _routed_method(base: type, name: str) -> Callable[..., Any]:
    original = getattr(base, name)
    route = _route_forward if name == "forward" else _route_method
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter(
        "context_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="ContextIds | None"
    )
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, extra)

    def method(self: Any, *args: Any, context_ids: ContextIds | None = None, **kwargs: Any) -> Any:
        return route(self, original, args, kwargs, context_ids)

    functools.update_wrapper(method, original)
    vars(method).pop("__wrapped__")
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # torch compiles up to eight graphs a code object, so each class needs its own. ``functools.wraps`` copies what a
    # function's dictionary holds: a signature there would show ``self`` in wrappers of the bound method.
    code = method.__code__.replace(co_name=f"{base.__name__}_{name}")
    routed = types.FunctionType(code, method.__globals__, name, None, method.__closure__)
    routed.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(routed, original)
    routed.__wrapped__ = method  # type: ignore[attr-defined]
    routed.__dict__.pop("__signature__", None)
    return routed


# --------------------------------------------------------------------------------------------------------- one forward


def _route_forward(
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
    around = router.calls.innermost()
    if ids is not None or (around is not None and around.is_block):
        call = _call(router, ids, around, args, kwargs, views=True)
        return (router.tracking or router.calls).run(call, forward, model, *args, **kwargs)
    if around is not None:
        return forward(model, *args, **kwargs)  # in the call of another method
    if model.training:
        raise ContextIdError(
            "Training needs context_ids: pass model(..., context_ids=ids), one id a sample (see use_contexts for "
            "calls that cannot take the keyword). transformers' Trainer drops columns of strings: give it integers, "
            "such as those of ColumnContexts."
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
            return router.calls.run(Call(same), forward, model, *args, **kwargs)

        return average_contexts(in_context, config.num_contexts, kwargs.get("labels"))
    call = router.predicted(_images(args, kwargs)) if config.inference == "predict" else Call(None)
    return (router.tracking or router.calls).run(call, forward, model, *args, **kwargs)


def _route_method(
    model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ids: ContextIds | None
) -> Any:
    router: ContextRouter = model.router
    if router.config.mode in BASELINES:
        return method(model, *args, **kwargs)
    around = router.calls.innermost()
    if ids is None and around is not None and (not around.is_block or _find_tensor(args, kwargs) is None):
        return method(model, *args, **kwargs)
    call = Call(None) if ids is None and around is None else _call(router, ids, around, args, kwargs)
    return (router.tracking or router.calls).run(call, method, model, *args, **kwargs)


def _call(
    router: ContextRouter,
    ids: ContextIds | None,
    around: Call | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    views: bool = False,
) -> Call:
    """Return a call with checked ids, given or of the block around: one a sample, or if ``views`` one a view."""
    first = _first_tensor(args, kwargs)
    num_samples = first.shape[0]
    given = cast(Tensor, cast(Call, around).ids) if ids is None else as_tensor(ids, router.config.context_names)
    count = given.shape[0] if given.dim() else 1
    alike = given.dim() == 0 or (ids is None and count == 1)  # of all samples, however many a part has
    per_view = views and not alike and count > num_samples > 0 and count % num_samples == 0
    if not alike and not per_view and count != num_samples:
        unit = "images" if first.dim() == 4 else "samples"
        raise ContextIdError(f"Received {count} context_ids for a batch of {num_samples} {unit}; give one each.")
    if alike and router.tracking is not None:  # which counts images
        given, alike, count = given.expand(num_samples, *given.shape[1:]), False, num_samples
    call = Call(router.resolve(given, 1 if alike else count, first.device))
    call.outer = around
    if per_view:
        call.batch_size = num_samples
    texts = kwargs.get("input_ids")
    call.num_texts = len(texts) if isinstance(texts, Tensor) and texts is not first else None
    return call


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
    first = _find_tensor(args, kwargs)
    if first is None:
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
        images = next((value for value in lists if value and all(isinstance(item, Tensor) for item in value)), None)
        received = "no tensor" if images is None else f"a list of {len(images)} tensors"
        raise InputTypeError(
            f"Expected a batch, a tensor of N samples, among the arguments of a patched model, received {received}. "
            "For a detector that takes a list of images, patch the part that receives them as one batch, "
            "patch_model(model.backbone), and call the model inside use_contexts(model.backbone, ids)."
        )
    return first


def _find_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    named = kwargs.get("pixel_values")  # of several inputs, that of the images
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
        if isinstance(value, Mapping):  # such as patches and their places
            return _find_tensor((), cast("dict[str, Any]", value))
    return None


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch that a context source looks at: labels may come before it."""
    named = kwargs.get("pixel_values")
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value
    return _first_tensor(args, kwargs)


# -------------------------------------------------------------------------------------------------- parts of the model

_REFUSAL = "cn_hf"  # a hook's key that is the same in all processes


def refuse_ids_of_parts(model: nn.Module) -> None:
    """Let the parts of a model that would take ``context_ids`` among any keywords, and ignore them, raise an error."""
    for module in model.modules():
        if module is not model and not isinstance(module, Swapped) and _takes_any_keyword(cast(Any, type(module))):
            module._forward_pre_hooks[_REFUSAL] = _refuse_ids  # type: ignore[index]  # torch numbers its own
            module._forward_pre_hooks_with_kwargs[_REFUSAL] = True  # type: ignore[index]


def accept_ids_of_parts(model: nn.Module) -> None:
    """Undo ``refuse_ids_of_parts``."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(_REFUSAL, None)  # type: ignore[call-overload]


@cache
def _takes_any_keyword(module_class: Any) -> bool:
    try:
        parameters = inspect.signature(module_class.forward).parameters
    except (TypeError, ValueError):
        return False
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any and "context_ids" not in parameters


def _refuse_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("context_ids") is not None:
        raise ContextIdError(
            f"Expected context_ids for the whole patched model, received them for its part {type(module).__name__}, "
            "which ignores them. Pass them to the model that was patched, or call its parts inside "
            "use_contexts(model, ids)."
        )


# -------------------------------------------------------------------------------------------------------- for the user


@contextmanager
def use_contexts(model: nn.Module, context_ids: ContextIds) -> Iterator[None]:
    """Give every call inside the ``with`` block these ids, for callers that cannot pass the keyword.

    For pipelines and parts of the model. The block is of its thread or asyncio task alone. Graphs keep the ids for
    backward.

    Args:
        model: a patched model.
        context_ids: as for ``forward``.

    Raises:
        ContextIdError: the ids are invalid, or, in a call of the model or its methods, not one a sample.
        PatchError: the model is not patched.
    """
    router = router_of(model)
    _check_adapters(model, router)
    tensor = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    ids = as_tensor(context_ids, router.config.context_names)
    resolved = router.resolve(ids, ids.shape[0] if ids.dim() else 1, device)
    with router.calls.run_block(Call(resolved, is_block=True)):
        yield
