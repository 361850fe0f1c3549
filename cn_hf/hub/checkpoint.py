"""Saving a patched model to a folder, and loading it from a folder or the Hub.

A checkpoint is safetensors and JSON only: ``context_norm.json`` (what the model is), ``model.safetensors`` (all
weights) or ``context_norm.safetensors`` (the parameters CN added, nothing else), and ``context_source/`` where a source
that names contexts travels along. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cn_hf.contexts import ContextSource
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError, InputTypeError
from cn_hf.files import read_description, write_whole
from cn_hf.hub.base_model import build_base, describe_base
from cn_hf.patching import ContextNormConfig, patch_model, unpatch_model
from cn_hf.patching.inference import apply_inference
from cn_hf.patching.patch import named_slots
from cn_hf.patching.routing import ContextSourceLike, RoutedModel, router_of

__all__ = ["from_pretrained", "save_pretrained"]

FORMAT = 1  # raised when a release can no longer be read by the ones before
CONFIG_FILE = "context_norm.json"
WEIGHTS_FILE = "model.safetensors"
NORMS_FILE = "context_norm.safetensors"
SOURCE_FOLDER = "context_source"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    norms_only: bool = False,
    *,
    context_source: ContextSource | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Write a patched model to a folder. Every file appears whole, the description last; other files stay.

    Args:
        model: a patched model.
        folder: where to; made if need be.
        norms_only: only the parameters CN added, for any copy of the same base model.
        context_source: the fitted source that names the contexts of new images; by default the one attached by
            ``set_inference``.
        model_args: constructor arguments of a timm model that older timm versions do not record, e.g. ``img_size``.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: the base model could not be built again from its description.
        PatchError: the model is not patched.
    """
    router = router_of(model)
    source = router.source if context_source is None else context_source
    if source is not None and not isinstance(source, ContextSource):
        raise InputTypeError(f"context_source must be a ContextSource, received {type(source).__name__}.")
    if source is not None and source.num_contexts != router.config.num_contexts:
        raise ConfigError(
            f"The source names {source.num_contexts} contexts, the model has {router.config.num_contexts}."
        )
    description = {
        "format": FORMAT,
        "config": router.config.to_dict(),
        "base": describe_base(model, model_args),
        "norms_only": norms_only,
        "context_source": source is not None,
        "pixel_mean": list(router.pixel_mean),
        "pixel_std": list(router.pixel_std),
    }
    path = Path(folder)
    try:
        tensors = _context_tensors(model) if norms_only else _without_aliases(model.state_dict())
        data = safetensors.torch.save(tensors, {"format": "pt"})
        description["weights_sha256"] = hashlib.sha256(data).hexdigest()
        write_whole(path / (NORMS_FILE if norms_only else WEIGHTS_FILE), data)
        if source is not None:
            source.save(path / SOURCE_FOLDER)
        write_whole(path / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot write a checkpoint to {path}: {error}") from error
    return path


def _context_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.normalizer.{key}": tensor.detach().cpu().contiguous()
        for name, slot in named_slots(model)
        for key, tensor in slot.normalizer.state_dict().items()
    }


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name a storage: tied weights are stored once, under their first name."""
    kept: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        kept.setdefault(key, name)
    return {name: state[name].detach().cpu().contiguous().clone() for name in kept.values()}


# ------------------------------------------------------------------------------------------------------------- loading


def from_pretrained(
    id_or_folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load a patched model from a folder or a Hub repository, in evaluation mode, its context source attached.

    Args:
        id_or_folder: a folder written by ``save_pretrained``, or ``"user/name"`` on the Hub.
        model: the base model to load onto; needed for norms-only checkpoints and for models that neither timm nor
            transformers builds. It is patched in place if it is not yet, and left as it was after an error.
        revision: Hub branch, tag or commit.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: do not ask the Hub.
        device: where the model goes.

    Returns:
        The model.

    Raises:
        CheckpointError: nothing there, truncated, of a newer format, of another architecture or number of contexts.
    """
    folder = _folder(id_or_folder, revision, token, cache_dir, local_files_only)
    description = read_description(folder / CONFIG_FILE, newest=FORMAT, what="checkpoint")
    try:
        config = ContextNormConfig.from_dict(description["config"])
        norms_only = bool(description["norms_only"])
        base = dict(description["base"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a patched model: {error!r}.") from error
    if model is None and norms_only:
        raise CheckpointError(
            f"{folder} holds the context norms only: pass model=, a copy of their base {base.get('architecture')!r}."
        )
    tensors = _read_tensors(folder / (NORMS_FILE if norms_only else WEIGHTS_FILE), description.get("weights_sha256"))
    source = _read_source(folder) if description.get("context_source") else None
    _check_architecture(model, base, norms_only)
    target = build_base(base) if model is None else model
    _load(target, config, tensors, norms_only, str(folder))
    router = router_of(target)
    router.config = config  # of a model that was patched before: names and inference are the checkpoint's
    apply_inference(target, config)
    router.source = cast("ContextSourceLike | None", source)
    router.pixel_mean = tuple(description.get("pixel_mean", (0.0,)))
    router.pixel_std = tuple(description.get("pixel_std", (1.0,)))
    return target.to(device).eval() if device is not None else target.eval()


def _folder(
    id_or_folder: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    path = Path(id_or_folder)
    if path.is_dir():
        return path
    name = str(id_or_folder)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise CheckpointError(f"There is no folder {name}.")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot: str = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors"],
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise CheckpointError(f"{name} is no local folder and cannot be had from the Hub: {error}") from error
    return Path(snapshot)


def _read_tensors(path: Path, checksum: object) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"The weights are missing: {path}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise CheckpointError(f"{path} is truncated, changed, or of another save than {CONFIG_FILE} beside it.")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return tensors


def _read_source(folder: Path) -> ContextSource | None:
    try:
        return ContextSource.load(folder / SOURCE_FOLDER)
    except ContextSourceError as error:
        warnings.warn(f"The checkpoint's context source is not attached: {error}", UserWarning, stacklevel=3)
        return None


def _check_architecture(model: Any, base: Mapping[str, Any], norms_only: bool) -> None:
    if model is None or norms_only or base.get("library") == "other":
        return
    original = getattr(model, "original_class", type(model)).__name__
    own = getattr(model, "pretrained_cfg", None) or {}
    found = own.get("architecture") if base["library"] == "timm" else original
    if found != base["architecture"]:
        raise CheckpointError(
            f"The checkpoint is of the architecture {base['architecture']!r}, model= is {found or original!r}."
        )


def _load(
    model: nn.Module, config: ContextNormConfig, tensors: dict[str, Tensor], norms_only: bool, where: str
) -> None:
    patched_here = not isinstance(model, RoutedModel)
    if patched_here:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # batch norms that never saw data are about to be loaded
            patch_model(model, config=config)
    try:
        _check_contexts(model, config, where)
        expected = _context_tensors(model) if norms_only else model.state_dict()
        _check_tensors(expected, tensors, model, where)
    except CheckpointError:
        if patched_here:
            unpatch_model(model)
        raise
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:  # the checkpoint's dtypes, in the tensors the model has: ties and flags stay
            tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors | _tied_names(model, tensors), strict=not norms_only)


def _check_contexts(model: nn.Module, config: ContextNormConfig, where: str) -> None:
    own = router_of(model).config
    for field in ("mode", "num_contexts", "parametrization", "variance_activation", "eps", "keep_statistics"):
        if getattr(own, field) != getattr(config, field):
            raise CheckpointError(
                f"{where} was saved with {field}={getattr(config, field)!r}, model= is patched with "
                f"{getattr(own, field)!r}: pass the unpatched model, or one patched alike."
            )


def _tied_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for the names that tied weights have besides the stored one."""
    stored = {tensor.data_ptr(): tensors[name] for name, tensor in model.state_dict().items() if name in tensors}
    return {
        name: stored[tensor.data_ptr()]
        for name, tensor in model.state_dict().items()
        if name not in tensors and tensor.data_ptr() in stored and tensor.numel()
    }


def _check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    tied = _tied_names(model, tensors)
    missing = [name for name in expected if name not in tensors and name not in tied]
    surplus = [name for name in tensors if name not in expected]
    wrong = [name for name in tensors if name in expected and tensors[name].shape != expected[name].shape]
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("unknown", surplus))
        parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds if names]
        if wrong:
            name = wrong[0]
            parts.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
        raise CheckpointError(f"The weights in {where} do not fit {type(model).__name__}: {'; '.join(parts)}.")
