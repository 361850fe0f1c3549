"""Digests that tell whether data is still what it was, of tensors, of a Dataset read while it is used, of a stream.

Encoded images are compared as bytes, and only a sample of them: reading all of a large dataset would take as long as
an epoch.

Shapes: N rows of a dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from cn_hf.errors import DatasetFileError
from cn_hf.reading.access import features_of, raw_batches
from cn_hf.reading.images import decode_image
from cn_hf.reading.loading import read_context_ids, read_labels

__all__ = ["dataset_fingerprint", "stream_fingerprint", "tensors_fingerprint"]

# Images of a Dataset or stream that are compared.
SAMPLED_IMAGES = 256
# Bytes digested, and copied from a device, at once.
CHUNK_BYTES = 2**24


def tensors_fingerprint(**tensors: Tensor | None) -> str:
    """Hex digest of the names, shapes, dtypes and values of tensors on any device; None for one that is not there."""
    digest = _new_digest()
    _add_tensors(digest, tensors)
    return digest.hexdigest()


def dataset_fingerprint(dataset: Any, image_column: str, label_column: str) -> str:
    """Hex digest of all labels and contexts of a Dataset, and of the bytes of images spread evenly over it.

    Raises:
        DatasetError: A label or context is missing or out of range; its row is named.
    """
    digest = _new_digest()
    labels = torch.from_numpy(read_labels(dataset, label_column))
    _add_tensors(digest, {"labels": labels, "context_ids": read_context_ids(dataset)})
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLED_IMAGES).astype(np.int64)).tolist()
    for _, columns in raw_batches(dataset, [image_column], SAMPLED_IMAGES, rows):
        _add_images(digest, columns[image_column])
    return digest.hexdigest()


def stream_fingerprint(stream: Any, columns: Sequence[str], image_column: str, num_rows: int) -> str:
    """Hex digest of the features of ``columns`` of a stream, its number of rows, and what its first rows hold."""
    digest = _new_digest()
    features = features_of(stream)
    read = datasets.Features({name: features[name] for name in columns})
    digest.update(json.dumps([num_rows, read.to_dict()], sort_keys=True).encode())
    for _, values in raw_batches(stream.take(SAMPLED_IMAGES), columns, SAMPLED_IMAGES):
        digest.update(json.dumps([values[name] for name in columns if name != image_column], default=str).encode())
        _add_images(digest, values[image_column])
    return digest.hexdigest()


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _add_tensors(digest: hashlib.blake2b, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            digest.update(f"{name}: none;".encode())
            continue
        digest.update(f"{name}: {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.reshape(-1)
        for part in torch.split(flat, CHUNK_BYTES // flat.element_size()):
            digest.update(part.cpu().numpy().data)


def _add_images(digest: hashlib.blake2b, values: Iterable[object]) -> None:
    for value in values:
        encoded = _encoded(value)
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)


def _encoded(value: object) -> bytes:
    """The bytes of an image as it is stored, its pixels where it is neither here nor in a file, nothing if missing."""
    try:
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            path = value.get("path")
            if path is not None and Path(path).is_file():
                return Path(path).read_bytes()
        return decode_image(value).tobytes()
    except (DatasetFileError, OSError):
        return b""
