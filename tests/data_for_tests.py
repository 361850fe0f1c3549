"""Small datasets and batches of them, held in memory and streamed, and how to compare batches."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import Tensor

from cn_hf.data import DeviceBatches, StreamedBatches

N = 37
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def arrays(n: int = N, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_dataset(n: int = N, *, contexts: bool = True, broken: tuple[int, ...] = ()) -> Dataset:
    images = [png(a) for a in arrays(n)]
    for row in broken:
        images[row] = {"bytes": images[row]["bytes"][:40], "path": None}
    columns: dict[str, Any] = {"image": images, "label": [i % 4 for i in range(n)]}
    features: dict[str, Any] = {"image": Image(), "label": ClassLabel(num_classes=4)}
    if contexts:
        columns["context_ids"] = [i % 3 for i in range(n)]
        features["context_ids"] = ClassLabel(num_classes=3)
    return Dataset.from_dict(columns, features=Features(features))


def pixels(n: int = N) -> Tensor:
    return torch.from_numpy(arrays(n)).permute(0, 3, 1, 2)


def held(n: int = N, **options: Any) -> DeviceBatches:
    contexts = torch.arange(n) % 3
    return DeviceBatches(pixels(n), torch.arange(n) % 4, contexts, **{"batch_size": 8, "seed": 5, **options})


def streamed(dataset: Any = None, **options: Any) -> StreamedBatches:
    return StreamedBatches(make_dataset() if dataset is None else dataset, **{"batch_size": 8, "seed": 5, **options})


def assert_same(a: Any, b: Any, atol: float = 0.0) -> None:
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert list(left) == list(right)
        for key in left:
            assert left[key].dtype == right[key].dtype
            torch.testing.assert_close(left[key], right[key], atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
