"""The ``config.json`` of a patched transformers model: its base's config, and how it is patched.

Reading one makes a subclass of the base's config class, and registers it in the Auto mappings with the patched
counterparts of the base's models. The file's model type is ``"context_norm"`` for every architecture.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, cast

from cn_hf.errors import CheckpointError
from cn_hf.hub.bounds import built, check_values
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.inference import per_channel, prediction_settings
from cn_hf.patching.patch import named_slots
from cn_hf.patching.routing import routed_class, router_of

__all__ = ["MODEL_TYPE", "ContextConfig", "context_config", "written_config"]

MODEL_TYPE = "context_norm"
FORMAT = 1  # raised when a release can no longer be read by the ones before
PREFIX = "ContextNorm"  # of architectures' names in files: no class of transformers may be taken for ours
WRITTEN = ("architectures", "model_type", "base_model_type", "transformers_version", "context_norm", "base_config")
GUARD = "this model has context normalization: import cn_hf and load it with an Auto class or cn_hf.from_pretrained"


class ContextConfig:
    """The fields that the config class of a patched model adds to its base's: how the model is patched.

    Attributes:
        context_norm_base: the config class of the model under the patches.
        context_norm_architecture: the name of that model's class.
        context_norm: ``"config"`` (of ``ContextNormConfig``), ``"slots"`` (their names), ``"pixel_mean"``,
            ``"pixel_std"``, and ``"unknown"`` and ``"track"`` of ``set_inference``.
    """

    # All names added here begin alike: fields of the base's own (TimmWrapper's ``architecture``) must not hide them.
    context_norm_base: ClassVar[Any]
    context_norm_architecture: ClassVar[str]
    context_norm: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any, **values: Any) -> None:
        """Take values as the base's class does, or all that ``to_dict`` gives."""
        if "base_config" not in values:
            self.context_norm_base.__init__(self, *args, **values)
            return
        _, _, base, description = _read_values(values)
        others = {name: value for name, value in values.items() if name not in WRITTEN and value != GUARD}
        self.context_norm_base.__init__(self, **base | others)
        self.context_norm = description
        self.architectures = [PREFIX + self.context_norm_architecture]

    def context_norm_plain(self) -> Any:
        """The base model's own config."""
        config: Any = copy.copy(self)
        config.__dict__.pop("context_norm", None)
        config.__class__ = self.context_norm_base
        config.architectures = [self.context_norm_architecture]
        return config

    def to_dict(self) -> dict[str, Any]:
        """All values, as they stand in ``config.json``."""
        return self._context_norm_written(self.context_norm_plain().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """The values that differ from defaults, as they stand in ``config.json``."""
        return self._context_norm_written(self.context_norm_plain().to_diff_dict())

    def _context_norm_written(self, base: dict[str, Any]) -> dict[str, Any]:
        # No "model_type" may stand beside the base's values: the base's class would find them by it.
        written = {
            "architectures": [PREFIX + self.context_norm_architecture],
            "model_type": MODEL_TYPE,
            "base_model_type": base.pop("model_type"),
            "transformers_version": base.pop("transformers_version", None),
            "context_norm": {"format": FORMAT, **self.context_norm},
        }
        if "pretrained_cfg" in base:  # TimmWrapper's image processor looks for it here
            written["pretrained_cfg"] = base.pop("pretrained_cfg")
        guarded = _guarded_field(self.context_norm_base)
        return written | {"base_config": base} | ({guarded: GUARD} if guarded else {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from the values of a ``config.json``, of the subclass for its base and architecture.

        Raises:
            CheckpointError: it describes no patched model, one of a newer format, or one transformers cannot build.
        """
        base_class, architecture, base, description = _read_values(config_dict)
        config_class = context_config(base_class, architecture)
        _register_models(config_class)
        own = cast(Any, super(ContextConfig, config_class)).from_dict  # of the base's class
        made = built(f"The config of transformers' {architecture}", base, lambda values: own(values, **dict(kwargs)))
        config = made[0] if isinstance(made, tuple) else made
        config.context_norm = description
        config.architectures = [PREFIX + architecture]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle how the class is made, which no module contains."""
        return (_new_config, (self.context_norm_base, self.context_norm_architecture), self.__dict__.copy())


@cache
def context_config(base: Any, architecture: str) -> Any:
    """The subclass of the config class ``base`` for patched models of one architecture."""
    namespace = {"__module__": __name__, "__doc__": ContextConfig.__doc__, "context_norm_base": base}
    namespace["__init__"] = ContextConfig.__init__  # transformers gives a class without its own another one
    if not architecture:  # what AutoConfig finds, of which no instance is made
        namespace["model_type"] = MODEL_TYPE
    return type(
        f"{PREFIX}{architecture}Config", (ContextConfig, base), namespace | {"context_norm_architecture": architecture}
    )


def written_config(model: Any) -> Any:
    """The config that a patched transformers model's files carry: its own values, and how it is patched."""
    router = router_of(model)
    written = copy.deepcopy(model.config)
    written.__class__ = context_config(cast(Any, type(model.config)), model.original_class.__name__)
    written.context_norm = {
        "config": router.config.to_dict(),
        "slots": [name for name, _ in named_slots(model)],
        "pixel_mean": list(router.pixel_mean),
        "pixel_std": list(router.pixel_std),
        **prediction_settings(model),
    }
    return written


def _new_config(base: Any, architecture: str) -> Any:
    config_class = context_config(base, architecture)
    return config_class.__new__(config_class)


def _guarded_field(config_class: Any) -> str | None:
    """A number of the base's own, in whose place the file holds words: the base's own class then refuses the file."""
    from transformers import PreTrainedConfig

    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field for field in dataclasses.fields(config_class) if field.name not in general]
    numbers = [field.name for field in own if type(field.default) in (int, float)]
    return numbers[0] if numbers else None


def _read_values(values: Mapping[str, Any]) -> tuple[Any, str, dict[str, Any], dict[str, Any]]:
    """Base config class, architecture, base config's values and description in the values of a ``config.json``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        description = dict(values["context_norm"])
        version = description.pop("format")
        base_type, base = str(values["base_model_type"]), dict(values["base_config"])
        (architecture,) = values["architectures"]
        ContextNormConfig.from_dict(description["config"])
        slots = description["slots"]
        if not isinstance(slots, list) or not all(isinstance(name, str) for name in slots):
            raise TypeError("slots must be a list of names")
        if type(version) is not int or version < 1:
            raise ValueError(f"format must be a number from 1, received {version!r}")
        for name in ("mean", "std"):
            description[f"pixel_{name}"] = list(per_channel(name, description[f"pixel_{name}"]))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json does not describe a patched transformers model: {error!r}.") from error
    if version > FORMAT:
        raise CheckpointError(f"config.json has format {version}, this version reads up to {FORMAT}: update cn_hf.")
    if base_type not in CONFIG_MAPPING or base_type == MODEL_TYPE:
        raise CheckpointError(
            f"transformers does not know the base model type {base_type!r}: update it, or call AutoConfig.register."
        )
    if "pretrained_cfg" in values:
        if not isinstance(values["pretrained_cfg"], dict):
            raise CheckpointError(f"Expected a mapping as pretrained_cfg, received {values['pretrained_cfg']!r}.")
        base["pretrained_cfg"] = dict(values["pretrained_cfg"])
    check_values({**base, "model_type": base_type}, "base_config")
    return CONFIG_MAPPING[base_type], str(architecture).removeprefix(PREFIX), base, description


def _register_models(config_class: Any) -> None:
    """Tell the Auto classes that know ``config_class``'s base which models and processors belong to it."""
    from transformers.models.auto import auto_factory, image_processing_auto, modeling_auto

    for mapping in {
        id(m): m for m in vars(modeling_auto).values() if type(m) is auto_factory._LazyAutoMapping
    }.values():
        if config_class not in mapping and config_class.context_norm_base in mapping:
            found = mapping[config_class.context_norm_base]
            classes = found if isinstance(found, (list, tuple)) else (found,)
            named = [
                model_class for model_class in classes if model_class.__name__ == config_class.context_norm_architecture
            ]
            mapping.register(config_class, routed_class((named or classes)[0]))
    processors = image_processing_auto.IMAGE_PROCESSOR_MAPPING
    if config_class not in processors and config_class.context_norm_base in processors:
        processors.register(config_class, processors[config_class.context_norm_base])
