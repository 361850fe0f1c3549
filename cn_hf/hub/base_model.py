"""The description of the model under the patches of a checkpoint, and the way that model is built again.

timm models are described by architecture name and constructor arguments, transformers models by their own config. The
description is tried out when it is made: a model that would not come back is an error at saving, not at loading.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cn_hf.errors import CheckpointError, ConfigError, PatchError
from cn_hf.hub.bounds import built, check_arguments, check_values, weights_known, weights_of
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.convert import Slot
from cn_hf.patching.patch import patch_model
from cn_hf.patching.routing import routed_class

__all__ = [
    "TIMM_ARCHITECTURE",
    "build_base",
    "build_patched",
    "describe_base",
    "quietly",
    "transformers_class",
]

TIMM_ARCHITECTURE = "context_norm"  # under which timm loads all patched checkpoints; no base model is called so


def describe_base(model: Any, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON values from which ``build_base`` makes the same architecture, without weights and drop rates.

    Args:
        model: a patched model.
        model_args: constructor arguments of a timm model that it does not record itself.

    Returns:
        ``library`` (``"timm"``, ``"transformers"`` or ``"other"``) and what that library needs.

    Raises:
        ConfigError: the description does not give the model back, or is no JSON.
    """
    root = model.original_class
    if isinstance(getattr(model, "pretrained_cfg", None), dict) and "architecture" in model.pretrained_cfg:
        description = {
            "library": "timm",
            "architecture": model.pretrained_cfg["architecture"],
            "model_args": _timm_arguments(model) | dict(model_args or {}),
        }
    elif hasattr(model, "config") and hasattr(model.config, "to_diff_dict"):
        description = {
            "library": "transformers",
            "architecture": root.__name__,
            "config": {**model.config.to_diff_dict(), "model_type": model.config.model_type},
        }
    else:
        return {"library": "other", "architecture": f"{root.__module__}.{root.__qualname__}"}
    try:
        description = dict(json.loads(json.dumps(description)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{_words(description)} cannot be written as JSON ({error}). Pass model_args={{...}} with names or numbers "
            "in place of objects."
        ) from error
    _try_out(model, description)
    return description


def _timm_arguments(model: Any) -> dict[str, Any]:
    import timm.models

    recorded = getattr(timm.models, "get_model_args", None)  # timm >= 1.0.31 records what create_model was given
    arguments = _observed_arguments(model) if recorded is None else dict(recorded(model))
    if isinstance(getattr(model, "num_classes", None), int):
        arguments.setdefault("num_classes", model.num_classes)
    return arguments


def _observed_arguments(model: Any) -> dict[str, Any]:
    """Of the arguments that users give most often, those that the model shows."""
    known: dict[str, Any] = model.pretrained_cfg
    arguments: dict[str, Any] = {}
    modules = dict(model.named_modules())
    first = modules.get(known["first_conv"]) if isinstance(known.get("first_conv"), str) else None
    channels = getattr(model, "in_chans", getattr(first, "in_channels", None))
    if isinstance(channels, int) and channels % (4 * known["input_size"][0]):  # else of a stem after space-to-depth
        arguments["in_chans"] = channels
    size = getattr(modules.get("patch_embed"), "img_size", None)
    if size is not None and tuple(size) != tuple(known["input_size"][1:]):
        arguments["img_size"] = tuple(size)
    for owner in (model, modules.get("head")):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str) and pool:
            arguments["global_pool"] = pool
            break
    return arguments


def build_base(description: Mapping[str, Any], **timm_options: Any) -> nn.Module:
    """The unpatched model that ``describe_base`` described, with fresh weights.

    Args:
        description: from ``describe_base``, perhaps by way of a file that somebody else wrote.
        **timm_options: further arguments of ``timm.create_model``, before those of the description.

    Raises:
        CheckpointError: its library does not know the architecture, or it belongs to no library.
    """
    library, architecture = description.get("library"), description.get("architecture")
    if library == "timm":
        import timm

        import cn_hf.models  # noqa: F401  # registers the paper's networks

        own_name = str(architecture).partition(".")[0] == TIMM_ARCHITECTURE
        if not isinstance(architecture, str) or own_name or not timm.is_model(architecture):
            raise CheckpointError(f"timm does not know the architecture {architecture!r}: update timm, or pass model=.")
        arguments = description.get("model_args", {})
        check_arguments(arguments, "model_args")
        check_values(arguments, "model_args")
        model: nn.Module = built(
            f"timm's {architecture}",
            {**arguments, **timm_options},
            lambda values: timm.create_model(architecture, **{"pretrained": False, **values}),
        )
        return model
    if library == "transformers":
        model_class, values = transformers_class(architecture), description.get("config")
        if not isinstance(values, Mapping):
            raise CheckpointError(f"Expected a mapping as config of the base, received {values!r}.")
        check_values(values, "config")
        config_class = _config_class(values.get("model_type"))
        arguments = {name: value for name, value in values.items() if name != "model_type"}
        whole: nn.Module = built(
            f"transformers' {architecture}", arguments, lambda values: model_class(config_class.from_dict(values))
        )
        return whole
    raise CheckpointError(
        f"The checkpoint is of {architecture}, which neither timm nor transformers builds: pass model=, an instance."
    )


def _config_class(model_type: object) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers does not know the model type {model_type!r}: update it.")
    return CONFIG_MAPPING[model_type]


def transformers_class(name: object) -> Any:
    """The model class that transformers has under a name.

    Raises:
        CheckpointError: it has none.
    """
    import transformers

    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers has no model class {name!r}: update it, pass model= or use an Auto class.")
    return found


def build_patched(description: Mapping[str, Any], config: ContextNormConfig) -> nn.Module:
    """``build_base`` patched, to be looked at: on the meta device where the constructors allow that.

    Raises:
        CheckpointError: it cannot be built, or the configuration does not fit it.
    """
    return _on_meta(lambda: _build_patched(description, config))


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except CheckpointError as error:  # constructors that compute need real tensors
        if not (weights_known() and isinstance(error.__cause__, (NotImplementedError, RuntimeError))):
            raise
    return build()


def _build_patched(description: Mapping[str, Any], config: ContextNormConfig) -> nn.Module:
    model = build_base(description)
    try:
        with quietly():
            return built("The contexts", config.to_dict(), lambda _: patch_model(model, config=config))
    except PatchError as error:
        raise CheckpointError(f"The contexts have no place in {_words(description)}: {error}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Patch in the block without warnings: they were given when the model was first patched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _try_out(model: Any, description: dict[str, Any]) -> None:
    try:
        with weights_of(model.state_dict()):
            if description["library"] == "transformers":
                rebuilt = _on_meta(lambda: _built_by_transformers(model))
            else:
                rebuilt = build_patched(description, model.router.config)
    except CheckpointError as error:
        raise ConfigError(f"This model cannot be built again from {_words(description)}: {error!r}") from error
    own, new = _anatomy(model), _anatomy(rebuilt)
    for name in {**own, **new}:
        if own.get(name) != new.get(name):
            raise ConfigError(
                f"{_words(description)} builds another model: {name or 'the root'} is {new.get(name, 'absent')} there "
                f"and {own.get(name, 'absent')} here. Pass model_args={{...}}, the arguments it was created with; or, "
                "where the model was changed after it was patched, change it first and patch it then."
            )


def _built_by_transformers(model: Any) -> nn.Module:
    """The model as transformers makes it from the ``config.json`` of a checkpoint, without weights."""
    from cn_hf.hub.transformers_config import ContextConfig, written_config

    config = ContextConfig.from_dict(json.loads(json.dumps(written_config(model).to_dict())))
    built_again: nn.Module = routed_class(transformers_class(model.original_class.__name__))(config)
    return built_again


def _words(description: Mapping[str, Any]) -> str:
    if description["library"] == "timm":
        return f"timm.create_model({description['architecture']!r}, **{description['model_args']})"
    return f"transformers.{description['architecture']}(config)"


def _anatomy(model: nn.Module) -> dict[str, str]:
    """Each module's class and options before it was patched, its own tensors' shapes, and whether it has contexts."""
    anatomy: dict[str, str] = {}
    normalizers: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Slot):
            normalizers.append(f"{name}.normalizer")
        if any(name == normalizer or name.startswith(f"{normalizer}.") for normalizer in normalizers):
            continue
        known: Any = getattr(module, "original_class", type(module))
        if known.__name__ == "Identity" or "Drop" in known.__name__:  # drop rates are no part of the description
            continue
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = sorted(f"{key}{tuple(tensor.shape)}" for key, tensor in tensors)  # pruning leaves another order
        contexts = ["with contexts"] if isinstance(module, Slot) else []
        anatomy[name] = " ".join([f"{known.__name__}({known.extra_repr(module)})", *shapes, *contexts])
    return anatomy
