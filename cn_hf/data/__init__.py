"""From a dataset by Hub id or folder to batches on the device: splits, decoding, augmentation, normalisation.

Start with ``load_splits`` and ``prepare_data``. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.data.augment import Augmentation, AugmentationConfig, build_augmentation
    from cn_hf.data.batches import Batches, DeviceBatches
    from cn_hf.data.images import DecodedImages, decode_images, image_shape
    from cn_hf.data.loading import (
        find_image_column,
        find_label_column,
        label_names,
        load_splits,
        read_context_ids,
        read_labels,
        take_shuffled,
    )
    from cn_hf.data.mixing import Mixing, MixingConfig
    from cn_hf.data.order import process_slice
    from cn_hf.data.prepare import PreparedData, prepare_data
    from cn_hf.data.statistics import channel_statistics
    from cn_hf.data.streaming import StreamedBatches

__all__ = [
    "Augmentation",
    "AugmentationConfig",
    "Batches",
    "DecodedImages",
    "DeviceBatches",
    "Mixing",
    "MixingConfig",
    "PreparedData",
    "StreamedBatches",
    "build_augmentation",
    "channel_statistics",
    "decode_images",
    "find_image_column",
    "find_label_column",
    "image_shape",
    "label_names",
    "load_splits",
    "prepare_data",
    "process_slice",
    "read_context_ids",
    "read_labels",
    "take_shuffled",
]

_MODULES = {
    "augment": ("Augmentation", "AugmentationConfig", "build_augmentation"),
    "batches": ("Batches", "DeviceBatches"),
    "images": ("DecodedImages", "decode_images", "image_shape"),
    "loading": (
        "find_image_column",
        "find_label_column",
        "label_names",
        "load_splits",
        "read_context_ids",
        "read_labels",
        "take_shuffled",
    ),
    "mixing": ("Mixing", "MixingConfig"),
    "order": ("process_slice",),
    "prepare": ("PreparedData", "prepare_data"),
    "statistics": ("channel_statistics",),
    "streaming": ("StreamedBatches",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
