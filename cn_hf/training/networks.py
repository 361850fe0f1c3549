"""A classifier by name: timm's (the paper's networks among them), or one that transformers loads.

N images, C channels, H and W height and width.
"""

from __future__ import annotations

import copy
import difflib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

import cn_hf.models  # noqa: F401  # registers the paper's networks with timm
from cn_hf.errors import CheckpointError, ConfigError

__all__ = ["check_network_name", "create_network", "published_normalization", "save_plain", "timm_arguments"]

# What a factory raises on a wrong name, argument or file; each becomes a ConfigError.
_FACTORY_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OSError,
    KeyError,
    HFValidationError,
    SafetensorError,
)


def create_network(
    name: str,
    *,
    num_classes: int,
    input_size: tuple[int, int, int],
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """An image classifier that takes ``(N, *input_size)``.

    Args:
        name: A timm architecture (also ``hf-hub:...`` and ``local-dir:...``), or a transformers id or folder.
        num_classes: Outputs of the classifier.
        input_size: (C, H, W) of the images.
        model_args: Further arguments of timm's factory, or entries of the transformers config.
        pretrained: Start from the published weights (of a folder: the weights in it).

    Returns:
        The network, on the CPU.

    Raises:
        ConfigError: Neither library knows the name, an argument is wrong, or the network cannot take such images.
    """
    given = dict(model_args or {})
    timm_name = _timm_name(name)
    try:
        if timm_name is not None:
            options = timm_arguments(name, num_classes=num_classes, input_size=input_size, model_args=given)
            network = _timm_network(timm_name, options, pretrained)
        else:
            network = _transformers_network(name, num_classes, input_size, given, pretrained)
    except ConfigError:
        raise
    except _FACTORY_ERRORS as error:
        raise ConfigError(_cannot_build(name, timm_name is not None, given, error)) from error
    _try_out(network, name, input_size, num_classes)
    return network


def check_network_name(name: str) -> None:
    """Look the name up without building anything.

    Raises:
        ConfigError: Neither timm nor transformers knows it.
    """
    if _timm_name(name) is None:
        try:
            _transformers_config(name)
        except _FACTORY_ERRORS as error:
            raise ConfigError(_cannot_build(name, False, {}, error)) from error


def published_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel that a network's published weights expect, if they are known."""
    timm_name = _timm_name(name)
    if timm_name is not None:
        known = timm.get_pretrained_cfg(timm_name, allow_unregistered=True)
        return None if known is None else (tuple(known.mean), tuple(known.std))
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except _FACTORY_ERRORS:
        return None  # published without its preprocessing; the network itself reports a wrong name
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def save_plain(network: nn.Module, folder: str | Path, model_args: Mapping[str, Any] | None = None) -> Path:
    """Write a network without contexts as its own library does, so that this library loads it again.

    The files are made beside the folder and moved into it one by one, each whole; others there stay.

    Args:
        network: From ``create_network``.
        folder: Where to; made if need be.
        model_args: As given to ``create_network``; older timm versions do not record them.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as made:
            if isinstance(network, transformers.PreTrainedModel):
                network.save_pretrained(made)
            else:
                if not all(tensor.is_contiguous() for tensor in network.state_dict().values()):  # channels-last
                    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
                timm.models.save_for_hf(network, made, model_args=dict(model_args or {}), safe_serialization=True)
            for file in sorted(Path(made).iterdir()):
                shutil.move(file, path / file.name)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {path}: {error}") from error
    return path


def _timm_name(name: str) -> str | None:
    """The name under which timm makes the network; None where it is not timm's."""
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name):
        return name
    config_file = Path(name) / "config.json"
    if config_file.is_file():
        try:
            described = json.loads(config_file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{config_file} cannot be read: {error}") from error
        if isinstance(described, dict) and "architecture" in described:
            return f"local-dir:{name}"
    return None


def timm_arguments(
    name: str, *, num_classes: int, input_size: tuple[int, int, int], model_args: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments that ``create_network`` gives timm's factory: also those that follow from the data.

    Returns:
        The arguments; empty where the network is not timm's.
    """
    timm_name = _timm_name(name)
    if timm_name is None:
        return {}
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": input_size[0], **model_args}
    known = timm.get_pretrained_cfg(timm_name, allow_unregistered=True)
    # Networks of a fixed input size learn it when they are built; convolutional ones take any.
    if known is not None and known.fixed_input_size and tuple(known.input_size[1:]) != input_size[1:]:
        options.setdefault("img_size", input_size[1] if input_size[1] == input_size[2] else input_size[1:])
    return options


def _timm_network(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """A timm network. The weights of a folder are read here, since timm 1.0.20 unpickles them, whatever they are."""
    folder = Path(name.removeprefix("local-dir:"))
    weights = folder / "model.safetensors"
    if not (pretrained and name.startswith("local-dir:")):
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return network
    if not weights.is_file():
        raise ConfigError(
            f"{folder} holds no weights: model.safetensors is missing; leave pretrained off to train anew"
        )
    saved_classes = int(json.loads((folder / "config.json").read_bytes()).get("num_classes", options["num_classes"]))
    network = timm.create_model(name, pretrained=False, **{**options, "num_classes": saved_classes})
    timm.models.load_checkpoint(network, str(weights))
    if saved_classes != options["num_classes"]:
        cast(Any, network).reset_classifier(options["num_classes"])
    return network


def _transformers_config(name: str, **entries: Any) -> Any:
    if "/" not in name and not Path(name).is_dir():  # a mistyped timm name; asking the Hub would only take time
        raise ValueError("it is neither a folder nor an id of the form owner/name")
    return transformers.AutoConfig.from_pretrained(name, **entries)


def _transformers_network(
    name: str, num_classes: int, input_size: tuple[int, int, int], given: dict[str, Any], pretrained: bool
) -> nn.Module:
    config = _transformers_config(name, num_labels=num_classes, **given)
    if hasattr(config, "num_channels"):
        config.num_channels = input_size[0]
    if isinstance(getattr(config, "image_size", None), int | list | tuple) and "image_size" not in given:
        if pretrained and _pair(config.image_size) != input_size[1:]:
            raise ConfigError(
                f"the published weights of {name!r} are for images of {_pair(config.image_size)}, these are "
                f"{input_size[1:]} (height, width); give image_size={_pair(config.image_size)[0]}"
            )
        config.image_size = input_size[1] if input_size[1] == input_size[2] else list(input_size[1:])
    if not pretrained:
        built: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
        return built
    loaded: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        name, config=config, ignore_mismatched_sizes=True
    )
    return loaded


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _try_out(network: nn.Module, name: str, input_size: tuple[int, int, int], num_classes: int) -> None:
    """One black image in evaluation mode, so that a network that does not fit the data says so before training."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, *input_size))
        logits = getattr(output, "logits", output)
        shape = tuple(getattr(logits, "shape", ()))
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name!r} cannot take images of {input_size} (channels, height, width): {error}; give another image_size, "
            "or the network's own size in model_args"
        ) from error
    finally:
        network.train(training)
    if shape != (1, num_classes):
        raise ConfigError(f"{name!r} gives outputs of shape {shape} for one image instead of (1, {num_classes}) logits")


def _cannot_build(name: str, is_timm: bool, given: dict[str, Any], error: BaseException) -> str:
    if is_timm:
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        fixed = known is not None and known.fixed_input_size
        own = f"; its own image_size is {known.input_size[1]}" if fixed else ""
        return f"timm cannot make {name!r} with model_args {given}: {error}{own}"
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f" Near names: {', '.join(map(repr, near))}." if near else ""
    reason = " ".join(str(error).split())
    return (
        f"cannot make the network {name!r}: timm has no architecture of this name, and for transformers: "
        f"{reason[:300]}{hint} timm.list_models() lists all."
    )
