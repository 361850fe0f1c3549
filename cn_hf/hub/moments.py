"""``context_moments.safetensors``: moments of the slots' real inputs, context by context.

Later contexts are measured relative to them, so that a checkpoint needs no images of its training data.

Shape legend: ``C`` features, ``T`` contexts.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from cn_hf.errors import CheckpointError
from cn_hf.files import sha256_of
from cn_hf.hub.weights import read_weights, write_weights
from cn_hf.patching.moments import StoredMoments
from cn_hf.patching.patch import named_slots
from cn_hf.patching.routing import router_of

__all__ = ["MOMENTS_FILE", "read_moments", "write_moments"]

MOMENTS_FILE = "context_moments.safetensors"
_PARTS = ("mean", "variance", "images")


def write_moments(model: nn.Module, folder: Path) -> str | None:
    """Write the moments that a model keeps, and return the file's SHA-256; None where it keeps none."""
    moments = router_of(model).moments
    if not moments:
        return None
    tensors = {f"{slot}.{part}": getattr(stored, part) for slot, stored in moments.items() for part in _PARTS}
    write_weights(folder, tensors, name=MOMENTS_FILE)
    return sha256_of(folder / MOMENTS_FILE)


def read_moments(model: nn.Module, folder: Path, checksum: str) -> dict[str, StoredMoments]:
    """Read the moments of a checkpoint that a patched model was loaded from.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model's slots.
    """
    path = folder / MOMENTS_FILE
    if not path.is_file() or sha256_of(path) != checksum:
        raise CheckpointError(f"Expected {path} as it was saved; it is missing or of another save. Save it again.")
    tensors = read_weights(folder, [MOMENTS_FILE])
    contexts = router_of(model).config.num_contexts
    shapes = {name: (contexts, slot.normalizer.num_features) for name, slot in named_slots(model)}
    found = {}
    for saved in sorted({name.rpartition(".")[0] for name in tensors}):
        parts = [tensors.get(f"{saved}.{part}") for part in _PARTS]
        slot = _name_in(saved, shapes)
        if slot is None:
            continue  # of the head that was saved, which this model lacks
        expected = [shapes.get(slot), shapes.get(slot), (contexts,)]
        if any(part is None or tuple(part.shape) != shape for part, shape in zip(parts, expected, strict=True)):
            raise CheckpointError(f"{path} holds moments of {saved!r} that do not fit the model. Save it again.")
        values = [part.float() for part in parts if part is not None]
        if not all(bool(value.isfinite().all()) for value in values):
            raise CheckpointError(f"{path} holds moments of {saved!r} that are not finite. Save it again.")
        found[slot] = StoredMoments(*values)
    return found


def _name_in(saved: str, names: Collection[str]) -> str | None:
    """Return what a slot is called in a model of the class that was saved, or of a related one.

    transformers' models for a task hold their base model under a name of its own; either loads the other's checkpoint.
    """
    if saved in names:
        return saved
    alike = [name for name in names if name.endswith(f".{saved}") or saved.endswith(f".{name}")]
    return alike[0] if len(alike) == 1 else None
