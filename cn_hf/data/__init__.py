"""From a dataset by Hub id or folder to batches on the device: splits, decoding, augmentation, normalisation.

Start with ``load_splits`` and ``prepare_data``. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_hf.data.augment import Augmentation, AugmentationConfig, build_augmentation
    from cn_hf.data.batches import Batches, DeviceBatches
    from cn_hf.data.mixing import Mixing, MixingConfig
    from cn_hf.data.order import process_slice
    from cn_hf.data.prepare import PreparedData, prepare_data
    from cn_hf.data.streaming import StreamedBatches
    from cn_hf.reading.decoded import DecodedImages, decode_images, image_shape
    from cn_hf.reading.loading import (
        find_image_column,
        find_label_column,
        label_names,
        load_splits,
        read_context_ids,
        read_labels,
        take_shuffled,
    )
    from cn_hf.reading.statistics import channel_statistics

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

_HOMES = {
    "cn_hf.data.augment": ("Augmentation", "AugmentationConfig", "build_augmentation"),
    "cn_hf.data.batches": ("Batches", "DeviceBatches"),
    "cn_hf.data.mixing": ("Mixing", "MixingConfig"),
    "cn_hf.data.order": ("process_slice",),
    "cn_hf.data.prepare": ("PreparedData", "prepare_data"),
    "cn_hf.data.streaming": ("StreamedBatches",),
    "cn_hf.reading.decoded": ("DecodedImages", "decode_images", "image_shape"),
    "cn_hf.reading.loading": (
        "find_image_column",
        "find_label_column",
        "label_names",
        "load_splits",
        "read_context_ids",
        "read_labels",
        "take_shuffled",
    ),
    "cn_hf.reading.statistics": ("channel_statistics",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
