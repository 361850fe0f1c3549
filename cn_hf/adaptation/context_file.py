"""One context alone, as a safetensors file of some KB: others add it to their copy of the same model.

It holds the context's statistics at each slot and the moments of the slots' inputs. A norms-only checkpoint would not
do: it holds *all* contexts, and replaces those of the model it is loaded onto.

Shape legend: ``C`` features of a slot.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from cn_hf.errors import CheckpointError, PatchError
from cn_hf.files import written_whole
from cn_hf.hub.base_weights import base_fingerprint
from cn_hf.hub.weights import read_header, read_weights
from cn_hf.norm import DomainBatchNorm
from cn_hf.patching.grow import add_known_context
from cn_hf.patching.measure import calibrated_slots, rows_of
from cn_hf.patching.moments import Rows
from cn_hf.patching.reference import context_index
from cn_hf.patching.routing import router_of
from cn_hf.printing import for_terminal

__all__ = ["add_context_file", "is_context_file", "save_context"]

FORMAT = 1
_KEY = "cn_hf_context"
_ROW, _INPUTS, _AFFINE = ("mean", "variance"), ("inputs_mean", "inputs_variance"), ("weight", "bias")


def save_context(model: nn.Module, name: str, file: Path) -> Path:
    """Write one context of a patched model to a file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
        ContextIdError: there is no such context.
    """
    router, slots = router_of(model), calibrated_slots(model)
    context = context_index(name, router.config)
    images = max((float(stored.images[context]) for stored in router.moments.values()), default=0.0)
    tensors: dict[str, Tensor] = {}
    for slot, part in slots.items():
        named: list[tuple[tuple[str, ...], tuple[Any, ...]]] = [(_ROW, tuple(rows_of(part)))]
        if slot in router.moments and images:
            named.append((_INPUTS, (router.moments[slot].mean, router.moments[slot].variance)))
        if isinstance(part.normalizer, DomainBatchNorm) and part.normalizer.weight is not None:
            named.append((_AFFINE, (part.normalizer.weight, part.normalizer.bias)))
        for kinds, values in named:
            for kind, value in zip(kinds, values, strict=True):
                tensors[f"{slot}.{kind}"] = value.detach()[[context]].float().cpu().contiguous()
    content = {"format": FORMAT, "name": name, "images": images, "base_fingerprint": base_fingerprint(model)}
    try:
        with written_whole(file) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"format": "pt", _KEY: json.dumps(content)})
    except OSError as error:
        raise CheckpointError(f"Cannot write the context to {file}: {error}") from error
    return file


def is_context_file(file: Path) -> bool:
    """True if ``save_context`` wrote the file."""
    try:
        _content(file)
    except CheckpointError:
        return False
    return True


def add_context_file(model: nn.Module, file: Path, name: str | None = None) -> str:
    """Add the context of a file to a patched model, in place, and return its name.

    Args:
        model: patched, with the weights that the context was measured in; else a warning says so.
        file: from ``save_context``.
        name: for the context; None for the one it has.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model. Whatever the error, the model is unchanged.
        ConfigError: the model has a context of this name.
    """
    content, slots = _content(file), calibrated_slots(model)
    header = read_header(file.parent, [file.name])
    features = {slot: part.normalizer.num_features for slot, part in slots.items()}
    parts: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
    known = {f"{slot}.{kind}": (1, width) for slot, width in features.items() for kind in (*_ROW, *_INPUTS, *_AFFINE)}
    needed = {f"{slot}.{kind}" for slot in slots for kind in _ROW}
    if not needed <= set(header) or any(known.get(key) != tuple(value.shape) for key, value in header.items()):
        raise CheckpointError(
            f"Expected a context of the model's {len(slots)} slots, received {for_terminal(file)}, of a model with "
            "other slots. Add it to the checkpoint that it was measured in."
        )
    for key, value in read_weights(file.parent, [file.name]).items():
        slot, _, kind = key.rpartition(".")
        if not bool(value.isfinite().all()) or (kind.endswith("variance") and bool((value < 0).any())):
            raise CheckpointError(
                f"{for_terminal(file)} is damaged: {for_terminal(key)} is no statistic. Write it again."
            )
        parts[slot][kind] = value.double()
    if content["base_fingerprint"] != base_fingerprint(model):
        warnings.warn(
            f"The context of {for_terminal(file)} was measured in a model with other weights, and fits those.",
            UserWarning,
            stacklevel=2,
        )
    chosen = content["name"] if name is None else name
    affine = {slot: {kind: values[kind] for kind in _AFFINE if kind in values} for slot, values in parts.items()}
    moments = {slot: _pair(values, _INPUTS) for slot, values in parts.items() if _INPUTS[0] in values}
    try:
        add_known_context(
            model,
            chosen,
            {slot: _pair(values, _ROW) for slot, values in parts.items()},
            affine=affine,
            moments=moments,
            images=content["images"],
        )
    except (PatchError, KeyError) as error:
        raise CheckpointError(f"{for_terminal(file)} does not fit the model: {error}") from error
    return str(chosen)


def _pair(values: dict[str, Tensor], kinds: tuple[str, str]) -> Rows:
    return Rows(*(values[kind] for kind in kinds))


def _content(file: Path) -> dict[str, Any]:
    """Return what the file says of its context.

    Raises:
        CheckpointError: it is missing, or no file of a context.
    """
    read_header(file.parent, [file.name])
    with safetensors.safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_KEY)
    try:
        content = json.loads(text or "")
        fits = isinstance(content["name"], str) and isinstance(content["base_fingerprint"], str)
        images = float(content["images"])
    except (KeyError, TypeError, ValueError, RecursionError):
        fits, content, images = False, {}, 0.0
    if not fits or not 0 <= images < float("inf"):
        raise CheckpointError(
            f"Expected a file of one context, received {for_terminal(file)}. Write one with `cn-hf adapt --norms-only`."
        )
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{for_terminal(file)} has format {content.get('format')!r}, this version reads {FORMAT}: update cn_hf."
        )
    found: dict[str, Any] = content | {"images": images}
    return found
