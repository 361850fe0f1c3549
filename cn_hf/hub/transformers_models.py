"""Patched transformers models in transformers' own formats: one mechanism for every architecture.

A patched model is written by transformers itself, with a ``config.json`` of model type ``"context_norm"`` that says how
it is patched. transformers without cn_hf does not know the type and refuses it. With cn_hf its loading builds the
model, on the meta device and without weights; it patches itself as the config says, and is filled: sharded files,
``dtype``, ``device_map`` and renamed keys work as for any model.

In memory a patched model's ``config`` is its base's: only files carry the subclass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from cn_hf.errors import CheckpointError, ConfigError, ContextIdError
from cn_hf.files import read_json
from cn_hf.hub.base_model import quietly, transformers_class
from cn_hf.hub.bounds import built, check_values, weights_of
from cn_hf.hub.transformers_config import MODEL_TYPE, ContextConfig, context_config, written_config
from cn_hf.patching.config import ContextNormConfig
from cn_hf.patching.inference import restore_settings
from cn_hf.patching.patch import named_slots, patch_model
from cn_hf.patching.placement import KEYWORDS
from cn_hf.patching.routing import add_root_mixin, routed_class, router_of
from cn_hf.patching.swapped import swap_class

if TYPE_CHECKING:
    from cn_hf.hub.description import Description

__all__ = ["TransformersRoot", "keep_contexts_loaded", "load_transformers", "register", "save_transformers"]

FILES_READ = ("config.json", "generation_config.json")
"""Files that transformers opens without a look at what they are."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def register() -> None:
    """Make transformers know patched checkpoints, and patched transformers models how to write them; again is harmless.

    Imports transformers' configuration modules, no model's.
    """
    from transformers import AutoConfig, PreTrainedConfig

    add_root_mixin("transformers.modeling_utils.PreTrainedModel", TransformersRoot)
    AutoConfig.register(MODEL_TYPE, context_config(PreTrainedConfig, ""), exist_ok=True)


# -------------------------------------------------------------------------------------------------------------- models


class TransformersRoot:
    """The root of a patched transformers model: it is built, written and loaded with its contexts."""

    original_class: ClassVar[Any]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the model and patch it if its config says how; else build the plain model."""
        if not isinstance(config, ContextConfig):
            cast(Any, super()).__init__(config, *args, **kwargs)
            return
        model, plain = cast(Any, self), config.context_norm_plain()
        swap_class(model, self.original_class)
        name, values = config.context_norm_architecture, plain.to_diff_dict()
        check_values(values, "base_config")

        def build(part: dict[str, Any]) -> None:
            model.__init__(plain if part == values else type(plain).from_dict(part), *args, **kwargs)

        built(f"transformers' {name}", values, build)
        _patch(model, name, config.context_norm)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the patched model as transformers writes any, with ``context_norm.json`` and the context source.

        Args:
            save_directory: where to; made if need be.
            is_main_process: whether this process writes the files that are not sharded over processes.
            push_to_hub: publish it afterwards as ``repo_id``, by default the folder's name.
            **kwargs: as for any transformers model.
        """
        from cn_hf.hub.saving import describe_saved, writing_to
        from cn_hf.hub.staging import staged

        folder, described = Path(save_directory), not getattr(self, "_hf_peft_config_loaded", False)
        whole = described and not kwargs.get("variant") and not kwargs.get("distributed_checkpoint")
        with writing_to(folder), staged(folder) if is_main_process and whole else nullcontext(folder) as place:
            save_transformers(cast(nn.Module, self), place, is_main_process=is_main_process, **kwargs)
            if is_main_process and described:
                describe_saved(cast(nn.Module, self), place)
        if push_to_hub and is_main_process:
            names = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size", "tags")
            options = {name: kwargs[name] for name in names if name in kwargs}
            cast(Any, self).push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a patched model, in evaluation mode, its context source attached; arguments as for any model.

        Raises:
            CheckpointError: the checkpoint is of a plain model, damaged, or lacks parameters of its contexts.
        """
        from transformers import AutoConfig, PreTrainedConfig

        from cn_hf.hub.staging import settled

        path = pretrained_model_name_or_path
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        if path is not None and (folder := Path(path, hub.get("subfolder") or "")) != settled(folder):
            path, hub["subfolder"] = str(settled(folder)), ""
        if not isinstance(config, PreTrainedConfig):  # as Auto classes do: what the config has no field for stays
            held: dict[str, Any] = {
                name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "quantization_config") if name in kwargs
            }
            source = path if config is None else config
            config, kwargs = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **kwargs)
            kwargs |= held
        if not isinstance(config, ContextConfig):
            raise CheckpointError(
                f"{path} is a checkpoint of a plain model: load it with {cls.__name__} of transformers, then call "
                "cn_hf.patch_model."
            )
        described = None if path is None else _described(path, hub, whole="variant" not in kwargs)
        header = None if described is None else _header(*described)
        with weights_of(header):
            try:
                model, info = cast(Any, super()).from_pretrained(
                    path, *model_args, config=config, output_loading_info=True, **hub, **kwargs
                )
            except RuntimeError as error:
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise CheckpointError(
                    f"The weights in {path} do not fit {cls.__name__}. If that is meant, pass "
                    "ignore_mismatched_sizes=True."
                ) from error
        _check_loaded(model, config, info, str(path))
        _check_kinds(model, header or {}, str(path))
        keep_contexts_loaded(model)
        if described is not None:
            from cn_hf.hub.description import attach_source

            attach_source(model, *described)
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load in place, also what transformers wrote under the names of an earlier release (as ``Trainer`` does)."""
        own = cast(nn.Module, self).state_dict().keys()
        if not state_dict.keys() <= own and any(".normalizer." in key for key in state_dict):
            state_dict = _renamed(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]  # of nn.Module

    def initialize_weights(self) -> None:
        """Start what a checkpoint lacked, with slots in their original classes, by which transformers knows them."""
        slots = [(slot, cast(type[nn.Module], type(slot))) for _, slot in named_slots(cast(nn.Module, self))]
        for slot, _ in slots:
            swap_class(cast(nn.Module, slot), slot.original_class)
            for module in slot.normalizer.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark
        try:
            super().initialize_weights()  # type: ignore[misc]  # of the model's own class
        finally:
            for slot, slot_class in slots:
                swap_class(cast(nn.Module, slot), slot_class)


def save_transformers(model: nn.Module, folder: Any, **options: Any) -> None:
    """Write config and weights of a patched transformers model as transformers does, without ``context_norm.json``.

    Args:
        model: a patched transformers model.
        folder: where to; made if need be.
        **options: of ``PreTrainedModel.save_pretrained``, e.g. ``max_shard_size``.
    """
    from cn_hf.hub.saving import check_savable

    router_of(model)
    if options.get("state_dict") is None and not options.get("distributed_checkpoint"):
        check_savable(model)
    with _config_for_files(model):
        super(TransformersRoot, cast(TransformersRoot, model)).save_pretrained(folder, **options)  # type: ignore[misc]


def load_transformers(folder: Any, **options: Any) -> nn.Module:
    """Load what ``save_transformers`` wrote, as the class it was, in evaluation mode, its context source attached.

    Args:
        folder: a folder, or a repository on the Hub.
        **options: of ``PreTrainedModel.from_pretrained``, e.g. ``dtype``, ``device_map``, ``revision``.

    Raises:
        CheckpointError: it is no checkpoint of a patched model, or damaged.
    """
    import transformers

    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        for name in FILES_READ:
            if (file := Path(folder, hub.get("subfolder", ""), name)).exists():
                read_json(file)
        config = transformers.AutoConfig.from_pretrained(folder, **hub)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json is missing, truncated or no config. Save it again.") from error
    if not isinstance(config, ContextConfig):
        raise CheckpointError(f"{folder} is a checkpoint of a plain transformers model; it has no contexts.")
    model_class = cast(Any, routed_class(transformers_class(config.context_norm_architecture)))
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    for kind in ("missing", "unexpected"):
        if names := sorted(info[f"{kind}_keys"]):
            raise CheckpointError(
                f"The weights in {folder} do not fit {config.context_norm_architecture}: {len(names)} {kind} "
                f"(first: {names[0]})."
            )
    return cast(nn.Module, model)


# ------------------------------------------------------------------------------------------------- patched as described


@contextmanager
def _config_for_files(model: Any) -> Iterator[Any]:
    """Let the model have the config that its files carry."""
    own, written = model.config, written_config(model)
    model.config = written
    try:
        yield written
    finally:
        model.config = own


def _patch(model: Any, architecture: str, description: Mapping[str, Any]) -> None:
    config = ContextNormConfig.from_dict(description["config"])
    exact = config
    if config.where is not None and config.where not in KEYWORDS:  # patterns of the class that was saved
        names = _names_in(model, description["slots"], [name for name, _ in model.named_modules()])
        exact = config.replace(where=[f"(?:{re.escape(name)})" for name in names])
    with quietly():
        built("The contexts", config.to_dict(), lambda _: patch_model(model, config=exact))
    router = router_of(model)
    router.config = config if type(model).__name__ == architecture else exact
    router.pixel_mean, router.pixel_std = tuple(description["pixel_mean"]), tuple(description["pixel_std"])
    try:
        restore_settings(model, description.get("unknown"), description.get("track"))
    except (ConfigError, ContextIdError) as error:
        raise CheckpointError(f"config.json contradicts itself: {error}") from error


def _names_in(model: Any, slots: Collection[str], modules: Collection[str]) -> list[str]:
    """The slots a checkpoint names, as they are called in a model of the same or a related class.

    A model for a task holds its base model under ``base_model_prefix``; either loads the other's checkpoint.
    """
    prefix = f"{model.base_model_prefix}."
    names = set(modules)
    candidates = ((slot, slot.removeprefix(prefix), prefix + slot) for slot in slots)
    return [name for name in (next((c for c in cs if c in names), None) for cs in candidates) if name is not None]


def _check_loaded(model: Any, config: ContextConfig, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose contexts were not all in the checkpoint; start those of slots it never had."""
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    lacking = set(info["missing_keys"]) | mismatched
    slots = dict(named_slots(model))
    saved = set(_names_in(model, config.context_norm["slots"], slots))
    keys = {name: [f"{name}.normalizer.{key}" for key in slot.normalizer.state_dict()] for name, slot in slots.items()}
    missing = {name: found for name in slots if (found := [key for key in keys[name] if key in lacking])}
    if missing and (saved & missing.keys() or len(missing) == len(slots)):
        first = next(iter(missing.values()))[0]
        raise CheckpointError(
            f"{where} lacks parameters of its contexts, e.g. {first}: it is incomplete, of a plain model, or has "
            "another number of contexts than its config.json says."
        )
    for name in missing:
        slots[name].reset_normalizer()


def _check_kinds(model: nn.Module, header: Mapping[str, Tensor], where: str) -> None:
    """Refuse integers in place of weights, which transformers takes; names on disk differ but for their last part."""
    kinds = {(name.rpartition(".")[2], tensor.is_floating_point()) for name, tensor in model.state_dict().items()}
    for name, tensor in header.items():
        last = name.rpartition(".")[2]
        if (last, True) in kinds and (last, tensor.is_floating_point()) not in kinds:
            raise CheckpointError(f"Expected floating-point numbers as {name} in {where}, received {tensor.dtype}.")


def keep_contexts_loaded(model: nn.Module) -> None:
    """Bring back what a device map offloaded of the contexts: they are small, and slots do not call them as modules."""
    for _, slot in named_slots(model):
        for module in slot.normalizer.modules():
            hook = getattr(module, "_hf_hook", None)  # accelerate's, which loads at a call and offloads after it
            if hook is not None:
                hook.pre_forward(module)


def _renamed(model: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict as transformers writes it, with the names that the model's modules have."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a report on missing keys is the caller's business
    try:
        with _config_for_files(model) as config:
            loaded, info = super(TransformersRoot, cast(Any, type(model))).from_pretrained(
                None, config=config, state_dict=dict(state_dict), output_loading_info=True
            )
    finally:
        logging.set_verbosity(verbosity)
    found = {key: value for key, value in loaded.state_dict().items() if key not in info["missing_keys"]}
    return found | {key: state_dict[key] for key in info["unexpected_keys"] if key in state_dict}


def _header(folder: Path, description: Description) -> dict[str, Tensor] | None:
    from cn_hf.hub.weights import read_header

    files = [name for name in description.weights if (folder / name).exists()]
    return read_header(folder, files) if files else None


def _described(path: Any, hub: Mapping[str, Any], *, whole: bool) -> tuple[Path, Description] | None:
    """Folder and content of ``context_norm.json``, if there is one; ``whole``: the weights it names are as saved."""
    from huggingface_hub.errors import EntryNotFoundError

    from cn_hf.hub.description import CONFIG_FILE, SOURCE_FOLDER, read_description  # brings datasets with it
    from cn_hf.hub.moments import MOMENTS_FILE
    from cn_hf.hub.repository import HubOptions, checkpoint_folder
    from cn_hf.hub.weights import check_weights, read_header

    options = HubOptions(**{name: value for name, value in hub.items() if name != "proxies" and value is not None})
    try:
        folder = checkpoint_folder(
            path,
            options,
            description_file=CONFIG_FILE,
            files_of=lambda file: read_description(file).files() if whole else [f"{SOURCE_FOLDER}/*", MOMENTS_FILE],
        )
    except CheckpointError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        return None
    if not (folder / CONFIG_FILE).is_file():
        return None
    description = read_description(folder / CONFIG_FILE)
    if whole:
        read_header(folder, description.weights)
        check_weights(folder, description.weights)
        if not Path(path).exists() and (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds an adapter beside a whole checkpoint, and transformers would load the base that the "
                f"adapter names: load {folder} instead."
            )
    return folder, description
