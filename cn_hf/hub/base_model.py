"""What a checkpoint says of the model under its patches, and how that model is built again.

timm models are described by architecture name and constructor arguments, transformers models by their own config. The
description is tried out when it is made: a model that would not come back is an error at saving, not at loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.patching.convert import Slot

__all__ = ["build_base", "describe_base"]


def describe_base(model: Any, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON values from which ``build_base`` makes the same architecture, without weights.

    Args:
        model: a patched model.
        model_args: constructor arguments of a timm model that it does not record itself.

    Returns:
        ``library`` (``"timm"``, ``"transformers"`` or ``"other"``) and what that library needs.

    Raises:
        ConfigError: the description does not give the model back.
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
    _try_out(model, description)
    return description


def _timm_arguments(model: Any) -> dict[str, Any]:
    import timm.models

    recorded = getattr(timm.models, "get_model_args", None)  # timm >= 1.0.31 records what create_model was given
    arguments = dict(recorded(model)) if recorded is not None else {}
    arguments.setdefault("num_classes", model.num_classes)
    channels = getattr(model, "in_chans", None)
    if isinstance(channels, int):
        arguments.setdefault("in_chans", channels)
    return arguments


def build_base(description: Mapping[str, Any]) -> nn.Module:
    """The unpatched model that ``describe_base`` described, with fresh weights.

    Raises:
        CheckpointError: its library does not know the architecture, or it belongs to no library.
    """
    library, architecture = description.get("library"), description.get("architecture")
    if library == "timm":
        import timm

        import cn_hf.models  # noqa: F401  # registers the paper's networks

        if not timm.is_model(architecture):
            raise CheckpointError(f"timm does not know the architecture {architecture!r}: update timm, or pass model=.")
        model: nn.Module = timm.create_model(architecture, pretrained=False, **description.get("model_args", {}))
        return model
    if library == "transformers":
        import transformers

        model_class = getattr(transformers, str(architecture), None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise CheckpointError(f"transformers has no model class {architecture!r}: update it, or pass model=.")
        values = dict(description["config"])
        built: nn.Module = model_class(transformers.AutoConfig.for_model(values.pop("model_type"), **values))
        return built
    raise CheckpointError(
        f"The checkpoint is of {architecture}, which neither timm nor transformers builds: pass model=, an instance."
    )


def _try_out(model: nn.Module, description: dict[str, Any]) -> None:
    try:
        try:
            with torch.device("meta"):
                rebuilt = build_base(description)
        except (NotImplementedError, RuntimeError):  # constructors that compute need real tensors
            rebuilt = build_base(description)
    except (CheckpointError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"This model cannot be built again from {_words(description)}: {error}") from error
    own, new = _anatomy(model), _anatomy(rebuilt)
    for name in {**own, **new}:
        if own.get(name) != new.get(name):
            raise ConfigError(
                f"{_words(description)} builds another model: {name or 'the root'} is {new.get(name, 'absent')} there "
                f"and {own.get(name, 'absent')} here. Pass model_args={{...}}, the arguments it was created with."
            )


def _words(description: Mapping[str, Any]) -> str:
    if description["library"] == "timm":
        return f"timm.create_model({description['architecture']!r}, **{description['model_args']})"
    return f"transformers.{description['architecture']}(config)"


def _anatomy(model: nn.Module) -> dict[str, str]:
    """Each module's class, options and own tensors' shapes, with patches looked through."""
    anatomy: dict[str, str] = {}
    normalizers: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Slot):
            normalizers.append(f"{name}.normalizer")
        if any(name == normalizer or name.startswith(f"{normalizer}.") for normalizer in normalizers):
            continue
        known: Any = getattr(module, "original_class", type(module))
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = [f"{key}{tuple(tensor.shape)}" for key, tensor in tensors]
        anatomy[name] = f"{known.__name__}({known.extra_repr(module)}) {' '.join(shapes)}".strip()
    return anatomy
