"""Patched models in timm's own ways: ``timm.create_model("hf-hub:user/name")`` and ``"local-dir:folder"``, and saving.

``config.json`` of a checkpoint names one architecture, ``context_norm``, whatever the model; timm without cn_hf does
not know it and says so. Its entry point builds the base architecture that ``context_norm.json`` names, patches it, and
loads the weights. Overrides (``num_classes``, ``in_chans``, ``img_size``, ``features_only``, drop rates and the like)
do what they do to the base: where they change its tensors, timm itself adapts the base's weights.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from cn_hf.errors import CheckpointError, ConfigError, PatchError
from cn_hf.files import write_json
from cn_hf.hub.base_model import TIMM_ARCHITECTURE, build_base, describe_base, quietly
from cn_hf.hub.bounds import check_arguments, check_values, weights_of
from cn_hf.patching.patch import named_slots, patch_model
from cn_hf.patching.router import ContextRouter
from cn_hf.patching.routing import RoutedModel, router_of

if TYPE_CHECKING:  # imported where a checkpoint is read: after cn_hf, `import timm` must cost no more than before
    from cn_hf.hub.description import Description

__all__ = ["register", "timm_config"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm's save_for_hf may have written


def register() -> None:
    """Let timm build and save patched checkpoints. Calling it again changes nothing."""
    from timm import models
    from timm.models import _hub, _registry

    if not _registry.is_model(TIMM_ARCHITECTURE):
        _registry.register_model(context_norm)
        # A name in config.json, and no architecture of its own: timm.list_models() leaves deprecated names out.
        getattr(_registry, "_deprecated_models", {})[TIMM_ARCHITECTURE] = None
    write = getattr(_hub, "save_config_for_hf", None)
    if write is not None and not hasattr(write, "__wrapped__"):
        _hub.save_config_for_hf = _saving_contexts(write)
        models.save_for_hf = _hub.save_for_hf = _saving_whole(_hub.save_for_hf)


# ------------------------------------------------------------------------------------------------------------- loading


def context_norm(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make any patched checkpoint for timm; called by ``timm.create_model("hf-hub:...")`` and the like.

    Args:
        pretrained: load the checkpoint's weights; else they are fresh.
        pretrained_cfg: timm's, with the place of the checkpoint.
        pretrained_cfg_overlay: timm's.
        cache_dir: of downloads.
        **kwargs: arguments of the base architecture: those of the checkpoint, and overrides.

    Returns:
        The patched model, in training mode as timm's models are.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or of a newer format, timm does not know its base
            architecture, or its contexts do not fit the model that the overrides ask for.
    """
    from cn_hf.hub.description import attach_source

    cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, "__dict__", {})
    folder, description = _checkpoint(cfg, cache_dir, pretrained)
    check_arguments(kwargs, "model_args")
    check_values(kwargs, "model_args")
    cfg = {**cfg, "architecture": description.base.get("architecture")}
    options = {"pretrained_cfg_overlay": pretrained_cfg_overlay, "cache_dir": cache_dir, **kwargs}
    if pretrained:
        model = _with_weights(folder, description, cfg, options)
    else:
        model = _patched(build_base(description.base, pretrained_cfg=cfg, **options), folder, description)
    attach_source(model, folder, description)
    return model


def _checkpoint(cfg: Mapping[str, Any], cache_dir: str | Path | None, pretrained: bool) -> tuple[Path, Description]:
    """Return the checkpoint's folder, after a download if need be, and its description."""
    from cn_hf.hub.description import CONFIG_FILE, read_description
    from cn_hf.hub.repository import HubOptions, checkpoint_folder

    if cfg.get("source") == "hf-hub":
        name, _, revision = str(cfg.get("hf_hub_id")).partition("@")
    elif cfg.get("file"):
        name, revision = str(cfg["file"]), ""
        if not Path(name).is_dir():
            raise CheckpointError(f"There is no folder {name}.")
    else:
        raise CheckpointError(
            f"{TIMM_ARCHITECTURE!r} is the name under which timm loads patched checkpoints, no architecture of its "
            'own: use timm.create_model("hf-hub:user/name") or "local-dir:folder"; or create a base model and call '
            "cn_hf.patch_model."
        )

    def files(path: Path) -> list[str]:
        description = read_description(path)
        return [name for name in description.files() if pretrained or name not in description.weights]

    options = HubOptions(revision=revision or None, cache_dir=cache_dir)
    folder = checkpoint_folder(name, options, description_file=CONFIG_FILE, files_of=files)
    description = read_description(folder / CONFIG_FILE)
    if description.norms_only or description.base.get("library") != "timm":
        raise CheckpointError(f"{folder} is no whole checkpoint of a timm model: use cn_hf.from_pretrained.")
    return folder, description


def _with_weights(folder: Path, description: Description, cfg: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    from cn_hf.hub.fitting import check_plan
    from cn_hf.hub.weights import check_weights, read_header, read_weights

    header = read_header(folder, description.weights)
    with weights_of(header):
        check_plan(description, header, folder)
        check_weights(folder, description.weights)
        tensors = read_weights(folder, description.weights)
        plain = {name: tensor for name, tensor in tensors.items() if ".normalizer." not in name}
        model = build_base(description.base, pretrained_cfg=cfg, **options)
        if not _fits(model, plain, allow_surplus=bool(options.get("features_only"))):
            model = _adapted(description.base, plain, cfg, options)
        with quietly():
            _patched(model, folder, description)
    saved = description.base.get("model_args", {})
    resized = any(options.get(name, saved.get(name)) != saved.get(name) for name in ("num_classes", "in_chans"))
    _load(model, tensors, folder, strict=not resized)
    return model


def _adapted(
    base: Mapping[str, Any], plain: dict[str, Tensor], cfg: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    """The base model with the weights as timm adapts them to overrides, by its own rules and strictness."""
    nowhere = dict.fromkeys(("source", "file", "url", "hf_hub_id", "hf_hub_filename"))
    loading = {**cfg, **nowhere, "custom_load": False, "label_offset": None, "state_dict": plain}
    model: Any = build_base(base, **{**options, "pretrained": True, "pretrained_cfg": loading})
    del model.pretrained_cfg["state_dict"]
    model.pretrained_cfg.update({key: cfg[key] for key in nowhere if cfg.get(key) is not None})
    return cast(nn.Module, model)


def _patched(model: nn.Module, folder: Path, description: Description) -> nn.Module:
    try:
        return patch_model(model, config=description.config)
    except PatchError as error:
        raise CheckpointError(
            f"The contexts of {folder} have no place in the {type(model).__name__} that these arguments make: {error}"
        ) from error


def _fits(model: nn.Module, tensors: dict[str, Tensor], *, allow_surplus: bool) -> bool:
    """True if the model's tensors are those of the checkpoint by name and shape; tied ones are stored once."""
    own, stored = model.state_dict(), _renamed(tensors, model)
    surplus = stored.keys() - own.keys()
    given = {own[name].data_ptr() for name in stored.keys() & own.keys() if own[name].shape == stored[name].shape}
    return (allow_surplus or not surplus) and all(tensor.data_ptr() in given for tensor in own.values())


def _renamed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under their names in a feature extractor: ``model.blocks.0.a``, ``stages_0.blocks.0.a``."""
    own = model.state_dict()
    names = {_flat(name.removeprefix("model.").removeprefix("graph_module.")): name for name in own}
    return {name if name in own else names.get(_flat(name), name): tensor for name, tensor in tensors.items()}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _load(model: nn.Module, tensors: dict[str, Tensor], folder: Path, *, strict: bool) -> None:
    """Load what is exactly the checkpoint's: contexts slot by slot, and the base's tensors but for those adapted."""
    own, stored = model.state_dict(), _renamed(tensors, model)
    matching = {name: stored[name] for name in stored.keys() & own.keys() if own[name].shape == stored[name].shape}
    slots = {
        name: {f"{name}.normalizer.{key}" for key in slot.normalizer.state_dict()} for name, slot in named_slots(model)
    }
    pointers = {own[name].data_ptr() for name in matching}
    fresh = [name for name, keys in slots.items() if not all(own[key].data_ptr() in pointers for key in keys)]
    modules = {name for name, _ in model.named_modules()}
    homeless = {name.partition(".normalizer.")[0] for name in stored if ".normalizer." in name} & modules - slots.keys()
    if fresh or homeless:
        words = (
            f"{len(fresh)} slots have no contexts of their shape in {folder}, and {len(homeless)} of its contexts no "
            f"slot (first: {[*fresh, *sorted(homeless)][0]}): these arguments make another model than was saved"
        )
        if strict:
            raise CheckpointError(f"{words}.")
        warnings.warn(f"{words}; contexts without a match start anew.", UserWarning, stacklevel=5)
    unfit = set().union(*(slots[name] for name in fresh))
    model.load_state_dict({name: tensor for name, tensor in matching.items() if name not in unfit}, strict=False)


# -------------------------------------------------------------------------------------------------------------- saving


def timm_config(
    model: nn.Module,
    *,
    model_args: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    **timm_options: Any,
) -> dict[str, Any]:
    """The ``config.json`` by which timm, with cn_hf, loads a patched timm model.

    Args:
        model: a patched timm model.
        model_args: constructor arguments that older timm versions do not record, e.g. ``img_size``.
        model_config: further entries, as for ``timm.models.push_to_hf_hub``: ``label_names`` and the like.
        **timm_options: further arguments of timm's ``save_config_for_hf``.

    Returns:
        JSON values: timm's own for the base model, under the architecture ``context_norm``. The pixel statistics are
        those of ``set_inference`` where they were given.

    Raises:
        ConfigError: the base model could not be built again from its description, or contradicts ``timm_options``.
        PatchError: the model is not patched.
    """
    from timm.models import _hub

    router = router_of(model)
    arguments = describe_base(model, model_args)["model_args"]
    write = inspect.unwrap(_hub.save_config_for_hf)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.json"
        try:
            write(
                _seen_by_timm(model), path, model_config=dict(model_config or {}), model_args=arguments, **timm_options
            )
        except ValueError as error:
            raise ConfigError(f"timm cannot describe this {type(model).__name__}: {error}") from error
        content: dict[str, Any] = json.loads(path.read_bytes())
    cfg = content["pretrained_cfg"]
    cfg |= {"custom_load": False, "label_offset": None}  # both are of the weights' first publication
    if cfg.get("num_classes") != content["num_classes"]:
        cfg |= {"num_classes": content["num_classes"], "label_names": None, "label_descriptions": None}
    if timm_options.get("data_config") is None:
        cfg |= _input_entries(cfg, arguments, router)
    cfg = {name: value for name, value in cfg.items() if value is not None or name in ("first_conv", "classifier")}
    return {**content, "architecture": TIMM_ARCHITECTURE, "pretrained_cfg": cfg}


def _input_entries(cfg: Mapping[str, Any], arguments: Mapping[str, Any], router: ContextRouter) -> dict[str, Any]:
    """Return the model's input: its own channels and size, and the pixel statistics if they were given."""
    known_channels, *known_size = cfg.get("input_size", (3, 224, 224))
    channels, size = arguments.get("in_chans", known_channels), arguments.get("img_size", known_size)
    size = [size, size] if isinstance(size, int) else list(size)
    entries: dict[str, Any] = {"input_size": [channels, *size]}
    if size != known_size:
        entries |= {"test_input_size": None, "pool_size": None, "test_pool_size": None}
    elif cfg.get("test_input_size"):
        entries["test_input_size"] = [channels, *cfg["test_input_size"][1:]]
    given = (router.pixel_mean, router.pixel_std) != ((0.0,), (1.0,))
    for name, values in (("mean", router.pixel_mean), ("std", router.pixel_std)):
        values = values if given else cfg[name]
        fitting = values if len(values) == channels else [sum(values) / len(values)] * channels  # as timm does it
        entries[name] = list(fitting)
    return entries


def _seen_by_timm(model: Any) -> Any:
    """Attributes that timm's writer reads of a model; a feature extractor lacks the number of classes."""
    if hasattr(model, "num_classes"):
        return model
    traits = {name: getattr(model, name) for name in ("_traits", "in_chans") if hasattr(model, name)}
    return SimpleNamespace(
        pretrained_cfg=model.pretrained_cfg, num_classes=0, num_features=model.feature_info.channels()[-1], **traits
    )


def _saving_contexts(write: Callable[..., None]) -> Callable[..., None]:
    """Wrap timm's ``save_config_for_hf``, through which its ``save_for_hf`` and ``push_to_hf_hub`` go.

    For a patched model timm itself would name the base architecture, and a load that is not strict would give a plain
    model without a word.
    """

    @functools.wraps(write)
    def save_config_for_hf(model: Any, config_path: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, RoutedModel):
            write(model, config_path, *args, **kwargs)
            return
        from cn_hf.hub import save_pretrained

        options = inspect.signature(write).bind(model, config_path, *args, **kwargs).arguments
        del options["model"], options["config_path"]
        content = timm_config(cast(nn.Module, model), **options)
        path = Path(config_path)
        if any((path.parent / name).exists() for name in WEIGHTS):  # written just now, perhaps pickled
            save_pretrained(cast(nn.Module, model), path.parent, model_args=options.get("model_args"))
        write_json(path, content)

    return save_config_for_hf


def _saving_whole(write: Callable[..., None]) -> Callable[..., None]:
    """Wrap timm's ``save_for_hf``: a patched model replaces the checkpoint that was there whole or not at all."""

    @functools.wraps(write)
    def save_for_hf(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, RoutedModel):
            write(model, save_directory, *args, **kwargs)
            return
        from cn_hf.hub.saving import writing_to
        from cn_hf.hub.staging import staged

        with writing_to(Path(save_directory)), staged(Path(save_directory)) as place:
            write(model, place, *args, **kwargs)

    return save_for_hf
