"""The common part of all ways of saving: cn_hf's own, timm's and transformers'."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from cn_hf.contexts import ContextSource
from cn_hf.contexts.storage import CONFIG_FILE as SOURCE_FILE
from cn_hf.errors import CheckpointError, PatchError
from cn_hf.files import as_path, sha256_of
from cn_hf.hub.base_model import describe_base
from cn_hf.hub.base_weights import base_fingerprint, base_origin
from cn_hf.hub.description import SOURCE_FOLDER, Description, context_source_of
from cn_hf.hub.moments import write_moments
from cn_hf.hub.weights import checksums, weights_in
from cn_hf.patching.inference import prediction_settings
from cn_hf.patching.routing import router_of

__all__ = ["check_savable", "describe_saved", "origin_of", "write_description", "writing_to"]


def describe_saved(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``context_norm.json`` and the context source beside weights that transformers has just saved.

    Raises:
        OSError: the folder cannot be written to.
        ConfigError: the base model could not be built again from its description.
    """
    path = Path(folder)
    base = describe_base(model) | origin_of(model, None)
    write_description(model, path, base, weights_in(path), context_source_of(model, None), norms_only=False)


def check_savable(model: nn.Module) -> None:
    """Raise for weights that a file cannot hold as the model has them, and say what to do.

    Raises:
        PatchError: they are sharded over processes, offloaded, quantised, or computed by pruning, a parametrization or
            a hook.
    """
    for name, value in model.state_dict().items():
        if hasattr(value, "full_tensor"):
            raise PatchError(
                f"Expected whole weights, received {name} sharded over processes (FSDP2). Gather them, "
                "state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True, cpu_offload=True)), load them into a patched model that is not "
                "sharded, and save that on one process."
            )
        fetched = hasattr(model, "save_pretrained")  # by transformers
        if getattr(value, "is_meta", False) and not fetched:
            raise PatchError(
                f"Expected weights with values, received {name} on the meta device: offloaded, or not loaded. Take "
                "accelerate's hooks off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
            )
        plain = type(value) in (Tensor, nn.Parameter) and not value.is_quantized
        if not plain and not name.endswith("_extra_state"):
            raise PatchError(
                f"Expected plain tensors, received {name} of type {type(value).__name__}: the model is "
                "quantised. Save it before it is quantised, and quantise what from_pretrained gives."
            )
    for name, module in model.named_modules():
        for tensor in ("weight", "bias"):
            if is_parametrized(module, tensor) or isinstance(vars(module).get(tensor), Tensor):
                raise PatchError(
                    f"Expected weights that are parameters, received {name}.{tensor}, which is computed from others. "
                    "Make it a parameter first: torch.nn.utils.prune.remove(module, name), "
                    "parametrize.remove_parametrizations(module, name), remove_weight_norm or remove_spectral_norm."
                )


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """An OSError in the block becomes a CheckpointError that names the folder; a CheckpointError stays as it is."""
    try:
        as_path(path)
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot write a checkpoint to {path}: {error}") from error


def origin_of(model: nn.Module, base_id: str | None) -> dict[str, str]:
    """Return ``id`` and ``revision`` of the base model's weights: from ``"user/name@revision"``, else as it says."""
    if base_id is None:
        return base_origin(model)
    name, _, revision = base_id.partition("@")
    return {"id": name, "revision": revision} if revision else {"id": name}


def write_description(
    model: nn.Module,
    path: Path,
    base: dict[str, Any],
    names: list[str],
    source: ContextSource | None,
    norms_only: bool,
) -> None:
    """Write ``context_norm.json``, the context source and the moments beside the weights ``names`` in ``path``."""
    router = router_of(model)
    if source is not None:
        source.save(path / SOURCE_FOLDER)
    Description(
        config=router.config,
        base=base,
        base_fingerprint=base_fingerprint(model) if norms_only else None,
        norms_only=norms_only,
        weights=checksums(path, names),
        context_source=source is not None,
        context_source_sha256=None if source is None else sha256_of(path / SOURCE_FOLDER / SOURCE_FILE),
        context_moments_sha256=write_moments(model, path),
        pixel_mean=router.pixel_mean,
        pixel_std=router.pixel_std,
        task=router.task,
        **prediction_settings(model),
    ).write(path)
