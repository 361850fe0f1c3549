"""The base model of a checkpoint that holds the context parameters alone: where it came from, and getting it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from cn_hf.errors import CheckpointError
from cn_hf.hub.base_model import transformers_class
from cn_hf.hub.bounds import built, check_arguments, check_values, weights_of
from cn_hf.hub.repository import HubOptions, hub_errors
from cn_hf.hub.weights import WEIGHTS_FILE, fingerprint, read_weights
from cn_hf.patching.routing import added_names

__all__ = ["base_fingerprint", "base_origin", "load_base"]


def base_origin(model: Any) -> dict[str, str]:
    """``id`` and ``revision`` on the Hub of the weights that the model says it was loaded from, as far as it says.

    timm records the repository, transformers the repository and the commit. A local folder is nobody else's, so it is
    not recorded.
    """
    config, timm_config = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    if isinstance(timm_config, dict) and timm_config.get("architecture"):
        name, _, revision = str(timm_config.get("hf_hub_id") or "").partition("@")
    else:
        name, revision = str(getattr(config, "_name_or_path", "")), str(getattr(config, "_commit_hash", "") or "")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/") or Path(name).exists():
        return {}
    return {"id": name, "revision": revision} if revision else {"id": name}


def base_fingerprint(model: nn.Module) -> str:
    """Fingerprint of all weights but the context parameters', patched or not."""
    return fingerprint(base_tensors(model))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without what patching added."""
    added = added_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in added}


def load_base(base: Mapping[str, Any], options: HubOptions) -> nn.Module:
    """Load the base model, with its weights, from the Hub.

    Args:
        base: of the checkpoint's description.
        options: how the Hub is asked; its revision and subfolder are the checkpoint's and do not matter here.

    Raises:
        CheckpointError: the description says no id, or the base cannot be had.
    """
    name, revision = base.get("id"), base.get("revision")
    if not name:
        raise CheckpointError(
            f"The checkpoint holds the context norms only, and does not say where their base "
            f"{base.get('architecture')!r} is to be had: pass model=, a copy of it."
        )
    asked = HubOptions(revision=revision, local_files_only=options.local_files_only)
    load = _load_transformers if base.get("library") == "transformers" else _load_timm
    try:
        with hub_errors(f"{name}, the base model of the checkpoint,", asked):
            return load(base, str(name), revision, options)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or pass model=, a copy of the base.") from error


def _load_transformers(base: Mapping[str, Any], name: str, revision: str | None, options: HubOptions) -> nn.Module:
    from transformers import PreTrainedConfig

    model_class, config = transformers_class(base.get("architecture")), dict(base.get("config", {}))
    check_values(PreTrainedConfig.get_config_dict(name, revision=revision, **options.download_options())[0], "config")
    labels = {key: config[key] for key in ("num_labels", "id2label", "label2id") if key in config}
    model: nn.Module = model_class.from_pretrained(name, revision=revision, **labels, **options.download_options())
    return model


def _load_timm(base: Mapping[str, Any], name: str, revision: str | None, options: HubOptions) -> nn.Module:
    import huggingface_hub
    import timm

    folder = huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=["*.json", "*.safetensors"], **options.download_options()
    )
    if not (Path(folder) / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{name}, the base model of the checkpoint, has no {WEIGHTS_FILE} on the Hub.")
    weights = read_weights(Path(folder), [WEIGHTS_FILE])
    arguments = base.get("model_args", {})
    check_arguments(arguments, "model_args")
    check_values(arguments, "model_args")
    overlay = {"source": "", "state_dict": weights}  # else timm takes whichever file it finds in the folder
    with weights_of(weights):
        model: Any = built(
            name,
            arguments,
            lambda values: timm.create_model(
                f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=overlay, **values
            ),
        )
    del model.pretrained_cfg["state_dict"]
    model.pretrained_cfg |= {"hf_hub_id": name + (f"@{revision}" if revision else ""), "source": "hf-hub"}
    return cast(nn.Module, model)
