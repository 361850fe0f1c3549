"""The demo's images: scikit-learn's handwritten digits in two domains, made without any download.

``plain`` is the digit as scanned, white on black. ``photo`` is the digit inverted over a photograph: inside the stroke
the photograph turns into its negative, ``x = (1 - a) b + a (255 - b)`` with stroke ``a`` in [0, 1] and background ``b``
in [0, 255] (the recipe of MNIST-M, Ganin et al. 2016).

Nothing of the test split is seen in training: its digits are another stretch of the collection, whose order seems to
follow the writers, and its backgrounds come from tiles of the photographs that no other split is cut from.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits, load_sample_images

from cn_hf.files import write_whole

__all__ = ["DOMAINS", "IMAGE_SIZE", "SPLITS", "digits_in_two_domains", "write_sample_sheet"]

DOMAINS = ("plain", "photo")
IMAGE_SIZE = 24
# Consecutive digits of the collection, so that few writers of the test split are also in the others.
SPLITS = {"train": range(0, 1100), "validation": range(1100, 1300), "test": range(1300, 1797)}

Pixels = npt.NDArray[np.uint8]
_CROP = 48  # pixels of photograph behind one digit, halved to IMAGE_SIZE
_TILE_ROWS, _TILE_COLUMNS = 4, 6
# The split each tile belongs to, by (row + 2 * column) % 6: every part of a photograph lends tiles to every split.
_TILE_SPLITS = ("train", "train", "train", "train", "validation", "test")


def digits_in_two_domains(seed: int = 0) -> DatasetDict:
    """Splits ``train``, ``validation`` and ``test``; columns ``image`` (24x24 RGB), ``label`` (0-9) and ``domain``.

    Every digit appears once in each domain, both times in the same split. The split is fixed; ``seed`` picks the
    backgrounds within it.
    """
    digits = load_digits()
    photographs = load_sample_images().images
    features = Features(
        {"image": Image(), "label": ClassLabel(num_classes=10), "domain": ClassLabel(names=list(DOMAINS))}
    )
    splits = {}
    for number, (split, rows) in enumerate(SPLITS.items()):
        generator = np.random.default_rng([seed, number])
        corners = tile_corners(split, [photograph.shape for photograph in photographs])
        columns: dict[str, list[object]] = {"image": [], "label": [], "domain": []}
        for row in rows:
            stroke = _enlarged_stroke(digits.images[row])
            background = _background(photographs, corners, generator)
            for domain, pixels in enumerate((_plain(stroke), _inverted_over(stroke, background))):
                columns["image"].append(PILImage.fromarray(pixels))
                columns["label"].append(int(digits.target[row]))
                columns["domain"].append(domain)
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def tile_corners(split: str, shapes: list[tuple[int, ...]]) -> list[tuple[int, int, int, int, int]]:
    """The photograph tiles of a split: (photograph, top, left, height, width) in pixels."""
    corners = []
    for photograph, (height, width, *_) in enumerate(shapes):
        tile_height, tile_width = height // _TILE_ROWS, width // _TILE_COLUMNS
        for row in range(_TILE_ROWS):
            for column in range(_TILE_COLUMNS):
                if _TILE_SPLITS[(row + 2 * column) % len(_TILE_SPLITS)] == split:
                    corners.append((photograph, row * tile_height, column * tile_width, tile_height, tile_width))
    return corners


def write_sample_sheet(dataset: Dataset, path: Path, *, columns: int = 16, zoom: int = 3) -> None:
    """A PNG of the first digits of a split: one row of ``plain`` above one of ``photo``, twice."""
    wanted = 2 * columns
    by_domain: list[list[Pixels]] = [[] for _ in DOMAINS]
    for row in dataset.select(range(min(len(dataset), 2 * wanted))):
        by_domain[row["domain"]].append(np.asarray(row["image"]))
    strips = [
        np.concatenate(images[start : start + columns], axis=1)
        for start in range(0, wanted, columns)
        for images in by_domain
        if len(images) >= start + columns
    ]
    sheet = PILImage.fromarray(np.concatenate(strips, axis=0))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), PILImage.Resampling.NEAREST)
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_whole(path, content.getvalue())


def _enlarged_stroke(digit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The 8x8 digit (values 0 to 16) at 24x24, as stroke strength in [0, 1], shape (24, 24, 1)."""
    gray = PILImage.fromarray(np.round(digit * (255.0 / 16.0)).astype(np.uint8))
    enlarged = gray.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BICUBIC)
    return np.asarray(enlarged, dtype=np.float64)[..., None] / 255.0


def _background(
    photographs: list[Pixels], corners: list[tuple[int, int, int, int, int]], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """A random square of one of the split's tiles, at 24x24, shape (24, 24, 3) in [0, 255]."""
    photograph, top, left, height, width = corners[generator.integers(len(corners))]
    y = top + int(generator.integers(height - _CROP + 1))
    x = left + int(generator.integers(width - _CROP + 1))
    square = PILImage.fromarray(photographs[photograph][y : y + _CROP, x : x + _CROP])
    return np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BOX), dtype=np.float64)


def _plain(stroke: npt.NDArray[np.float64]) -> Pixels:
    return np.round(np.repeat(stroke * 255.0, 3, axis=2)).astype(np.uint8)


def _inverted_over(stroke: npt.NDArray[np.float64], background: npt.NDArray[np.float64]) -> Pixels:
    return np.round((1.0 - stroke) * background + stroke * (255.0 - background)).astype(np.uint8)
