"""Saving a patched model to a folder, loading it from a folder or the Hub, and publishing it.

A checkpoint is safetensors and JSON only: ``context_norm.json`` (what the model is), ``model.safetensors`` (all
weights) or ``context_norm.safetensors`` (the parameters CN added, nothing else), ``context_source/`` where a source
that names contexts travels along, and the ``config.json`` by which timm and transformers load it themselves. Nothing in
it is executed, and no name in it leads out of its folder.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cn_hf.contexts import ContextSource
from cn_hf.devices import available_device
from cn_hf.errors import CheckpointError, ConfigError, InputTypeError, nearest
from cn_hf.files import as_path, write_json
from cn_hf.hub.base_model import build_base, describe_base
from cn_hf.hub.base_weights import base_fingerprint, load_base
from cn_hf.hub.bounds import weights_of
from cn_hf.hub.card import checkpoint_card
from cn_hf.hub.description import (
    CONFIG_FILE,
    SOURCE_FOLDER,
    Description,
    attach_source,
    context_source_of,
    described,
    read_description,
)
from cn_hf.hub.fitting import check_plan, check_tensors, context_tensors, patch_as_saved, tied_names
from cn_hf.hub.moments import MOMENTS_FILE
from cn_hf.hub.preprocessing import known_labels, restore_preprocessing
from cn_hf.hub.repository import HubOptions, checkpoint_folder, upload
from cn_hf.hub.saving import check_savable, origin_of, write_description, writing_to
from cn_hf.hub.staging import staged
from cn_hf.hub.weights import (
    INDEX_FILE,
    NORMS_FILE,
    PATCHED_FILE,
    WEIGHTS_FILE,
    check_shard_size,
    check_weights,
    read_header,
    read_weights,
    weights_in,
    write_weights,
)
from cn_hf.patching import ContextNormConfig, context_parameters, unpatch_model
from cn_hf.patching.patch import WithoutOwnSaving, apply_inference, named_slots
from cn_hf.patching.routing import RoutedModel, router_of

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

OWN_FILES = (
    WEIGHTS_FILE, WEIGHTS_FILE.replace(".", "-*-of-*."), INDEX_FILE, "patched_model*.safetensors*", NORMS_FILE,
    MOMENTS_FILE, CONFIG_FILE, f"{SOURCE_FOLDER}/*",
)  # fmt: skip
"""Patterns of the files that make a checkpoint: a new one replaces them all."""


# -------------------------------------------------------------------------------------------------------------- saving


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    norms_only: bool = False,
    *,
    context_source: ContextSource | None = None,
    model_args: Mapping[str, Any] | None = None,
    base_id: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a patched model to a folder; a checkpoint there is replaced whole or not at all, and other files stay.

    Args:
        model: a patched model.
        folder: where to; made if need be.
        norms_only: only the parameters CN added, for any copy of the same base model.
        context_source: the fitted source that names the contexts of new images; by default the one attached by
            ``set_inference``.
        model_args: constructor arguments of a timm model that older timm versions do not record, e.g. ``img_size``.
        base_id: repository of the base model's weights, ``"user/name"`` or ``"user/name@revision"``; by default what
            the model says it was loaded from.
        max_shard_size: bytes, or words such as ``"5GB"``, above which weights go into several files. timm's own loader
            reads one file only.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: the base model could not be built again from its description, or ``max_shard_size`` is no size.
        InputTypeError: ``folder`` is no path.
        PatchError: the model is not patched; or its weights are sharded, quantised or computed.
    """
    path = as_path(folder)
    given: tuple[Any, Any] = (model_args, base_id)
    if not all(value is None or isinstance(value, kind) for value, kind in zip(given, (Mapping, str), strict=True)):
        raise InputTypeError(f"model_args must be a mapping and base_id a string (or None), received {given!r}.")
    check_shard_size(max_shard_size)
    source = context_source_of(model, context_source)
    check_savable(model)
    base = describe_base(model, model_args)
    with writing_to(path), staged(path) as place:
        if norms_only:
            names = write_weights(place, context_tensors(model), name=NORMS_FILE)
        elif base["library"] == "transformers":
            from cn_hf.hub.transformers_models import save_transformers

            save_transformers(model, place, max_shard_size=max_shard_size)
            names = weights_in(place)
        else:
            name = PATCHED_FILE if base["library"] == "other" and isinstance(model, WithoutOwnSaving) else WEIGHTS_FILE
            names = write_weights(place, model.state_dict(), name=name, max_shard_size=max_shard_size)
        if base["library"] == "timm" and not norms_only:
            from cn_hf.hub.timm_models import timm_config

            content = timm_config(model, model_args=model_args, model_config=known_labels(model))
            write_json(place / "config.json", content)
        # timm names a repository also for a model whose weights are not from there; a whole checkpoint needs none.
        origin = origin_of(model, base_id) if norms_only or base_id or base["library"] == "transformers" else {}
        write_description(model, place, base | origin, names, source, norms_only)
    return path


# ------------------------------------------------------------------------------------------------------------- loading


def from_pretrained(
    id_or_folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Load a patched model from a folder or a Hub repository, in evaluation mode, its context source attached.

    Args:
        id_or_folder: a folder written by ``save_pretrained`` or by a run, or ``"user/name"`` on the Hub.
        model: the base model to load onto; needed for models that neither timm nor transformers builds, and for
            norms-only checkpoints whose base is not on the Hub. It is patched in place if it is not yet, and left as it
            was after an error.
        revision: Hub branch, tag or commit.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: do not ask the Hub.
        force_download: download even what the cache has.
        subfolder: folder inside the repository or folder.
        device: where the model goes.
        device_map: how its parts are spread over devices, as in accelerate and transformers: ``"auto"`` or a mapping.
        dtype: floating-point dtype of the weights, also by name; None or ``"auto"`` for the stored ones. The
            parameters CN added stay float32 at least.
        torch_dtype: the older name of ``dtype``.

    Returns:
        The model.

    Raises:
        CheckpointError: nothing there, truncated, of a newer format, of another architecture or number of contexts.
        ConfigError: an option is unknown, or contradicts another, or there is no such device.
        InputTypeError: ``id_or_folder`` is no path, or ``model`` no module.
    """
    if device is not None and device_map is not None:
        raise ConfigError(f"Pass device= or device_map=, not both; received {device!r} and {device_map!r}.")
    if dtype is not None and torch_dtype is not None:
        raise ConfigError(f"Pass dtype= or torch_dtype=, not both; received {dtype!r} and {torch_dtype!r}.")
    if model is not None and not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be an nn.Module to load onto, received {model!r}.")
    device = None if device is None else available_device(device)
    dtype = _dtype(torch_dtype if dtype is None else dtype)
    options = HubOptions(
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=subfolder,
    )
    folder = checkpoint_folder(
        id_or_folder,
        options,
        description_file=CONFIG_FILE,
        files_of=lambda path: read_description(path).files(),
    )
    description = read_description(folder / CONFIG_FILE)
    if model is None and not description.norms_only and description.base.get("library") == "transformers":
        from cn_hf.hub.transformers_models import load_transformers

        target = load_transformers(folder, dtype="auto" if dtype is None else dtype, device_map=device_map)
        _align(target)
        device_map = None
    else:
        header = read_header(folder, description.weights)
        with weights_of(header):
            target = _loaded_onto(model, folder, description, header, options)
        if dtype is not None:
            _cast(target, dtype)
    attach_source(target, folder, description)
    target.eval()
    if device_map is not None:
        return _dispatched(target, device_map)
    return target if device is None else target.to(device)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype != "auto":
        known = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
        if dtype.removeprefix("torch.") not in known:
            raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, known)}")
        dtype = getattr(torch, dtype.removeprefix("torch."))
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point one, received {dtype}.")
    return dtype if isinstance(dtype, torch.dtype) else None


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    kept = {id(parameter) for parameter in context_parameters(model)}
    kept |= {id(buffer) for _, slot in named_slots(model) for buffer in slot.normalizer.buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            new = torch.promote_types(dtype, torch.float32) if id(tensor) in kept else dtype
            tensor.data = tensor.data.to(new)


def _align(model: nn.Module) -> None:
    # transformers leaves tensors where they lie in the mapped file; kernels sum in another order on an odd address, and
    # the outputs would not be those of the saved model to the last bit.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _dispatched(model: nn.Module, device_map: str | Mapping[str, Any]) -> nn.Module:
    import accelerate

    from cn_hf.hub.transformers_models import keep_contexts_loaded

    if isinstance(device_map, str):
        if device_map != "auto":  # one device by name, as in transformers
            return model.to(available_device(device_map))
        places: Mapping[str, Any] = accelerate.infer_auto_device_map(model)
    else:
        places = device_map
    try:
        dispatched: nn.Module = accelerate.dispatch_model(model, dict(places))
    except ValueError as error:
        raise ConfigError(f"device_map={device_map!r} does not fit the model: {error}") from error
    keep_contexts_loaded(dispatched)
    return dispatched


def _loaded_onto(
    model: nn.Module | None, folder: Path, description: Description, header: Mapping[str, Tensor], options: HubOptions
) -> nn.Module:
    """The checkpoint's weights on the given model, or on its base, built or downloaded."""
    base, norms_only = description.base, description.norms_only
    if model is not None:
        _check_architecture(model, base, norms_only)
        tensors = _stored_tensors(folder, description)
    elif norms_only:
        tensors = _stored_tensors(folder, description)
        model = load_base(base, options)
        _check_architecture(model, base, norms_only=False)
    else:
        check_plan(description, header, folder)
        tensors = _stored_tensors(folder, description)
        model = build_base(base)
        restore_preprocessing(model, folder / "config.json")
    if norms_only and description.base_fingerprint not in (None, base_fingerprint(model)):
        warnings.warn(
            f"The weights under the context norms of {folder} are not those they were trained with, {described(base)}: "
            "this is as it should be for a fine-tuned copy or another dtype, and else gives other results.",
            UserWarning,
            stacklevel=3,
        )
    _load(model, description.config, tensors, norms_only, str(folder))
    router = router_of(model)
    router.config = description.config  # of a model that was patched before: names and inference are the checkpoint's
    apply_inference(model, description.config)
    return model


def _stored_tensors(folder: Path, description: Description) -> dict[str, Tensor]:
    if description.base.get("library") == "transformers" and not description.norms_only:
        from cn_hf.hub.transformers_models import load_transformers  # it alone knows its names on disk

        return dict(load_transformers(folder).state_dict())
    check_weights(folder, description.weights)
    return read_weights(folder, description.weights)


def _check_architecture(model: Any, base: Mapping[str, Any], norms_only: bool) -> None:
    if norms_only or base.get("library") == "other":
        return
    original = getattr(model, "original_class", type(model)).__name__
    own = getattr(model, "pretrained_cfg", None) or {}
    found = own.get("architecture") if base.get("library") == "timm" else original
    if found != base.get("architecture"):
        raise CheckpointError(
            f"The checkpoint is of the architecture {base.get('architecture')!r}, the model is {found or original!r}."
        )


def _load(
    model: nn.Module, config: ContextNormConfig, tensors: dict[str, Tensor], norms_only: bool, where: str
) -> None:
    patched_here = not isinstance(model, RoutedModel)
    if patched_here:
        patch_as_saved(model, config, tensors)
    try:
        _check_contexts(model, config, where)
        check_tensors(model, tensors, where, norms_only=norms_only)
    except CheckpointError:
        if patched_here:
            unpatch_model(model)
        raise
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:  # the checkpoint's dtypes, in the tensors the model has: ties and flags stay
            tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors | tied_names(model, tensors), strict=not norms_only)


def _check_contexts(model: nn.Module, config: ContextNormConfig, where: str) -> None:
    own = router_of(model).config
    for field in ("mode", "num_contexts", "parametrization", "variance_activation", "eps", "keep_statistics"):
        if getattr(own, field) != getattr(config, field):
            raise CheckpointError(
                f"{where} was saved with {field}={getattr(config, field)!r}, model= is patched with "
                f"{getattr(own, field)!r}: pass the unpatched model, or one patched alike."
            )


# ---------------------------------------------------------------------------------------------------------- publishing


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    norms_only: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a context-normalized model",
    context_source: ContextSource | None = None,
    model_args: Mapping[str, Any] | None = None,
    base_id: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Any:
    """Publish a patched model on the Hub: what ``save_pretrained`` writes, and a card if the repository has none.

    The repository is made if need be. One commit replaces the checkpoint that was there; other files stay.

    Args:
        model: a patched model.
        repo_id: ``"user/name"``, or ``"name"`` for the token's own account.
        norms_only: see ``save_pretrained``, as are ``context_source``, ``model_args``, ``base_id``, ``max_shard_size``.
        private: whether a repository made here is private; None for the account's default.
        token: Hub token with write access; None for the stored one.
        revision: branch to push to, made if need be.
        create_pr: open a pull request instead of a commit on the branch.
        commit_message: of the commit.
        context_source: see above.
        model_args: see above.
        base_id: see above.
        max_shard_size: see above.

    Returns:
        huggingface_hub's ``CommitInfo``.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached.
        ConfigError: the base model could not be built again from its description.
        PatchError: the model is not patched.
    """
    if not isinstance(repo_id, str):
        raise InputTypeError(f"repo_id must be a string, received {repo_id!r}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(
            model,
            temporary,
            norms_only,
            context_source=context_source,
            model_args=model_args,
            base_id=base_id,
            max_shard_size=max_shard_size,
        )
        return upload(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            replaced=OWN_FILES,
            card=lambda name: str(checkpoint_card(model, name, norms_only=norms_only)),
        )
