"""Images of the experiment: a training split, and test images in corrupted domains with unlabelled ones beside them.

Shape legend: ``N`` images ``(N, 3, 32, 32)``, float32 in 0..1; labels int64 ``(N,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cn_hf.data import load_splits
from cn_hf.errors import DatasetError, DatasetFileError
from cn_hf.evaluation.domains import Domains
from cn_hf.experiments.shift.corruptions import CORRUPTIONS, EXTRAS, corrupt

__all__ = ["ShiftData", "domains_of", "load_shift_data"]

LABELS = {"cifar10": "label", "cifar100": "fine_label"}
DRAW = 0  # of the test images, the same in all cells


@dataclass(frozen=True, slots=True)
class ShiftData:
    """A data set of images of one size.

    Attributes:
        images: of the training split, ``(N, 3, 32, 32)``.
        labels: of the training split.
        test_images: of the test split.
        test_labels: of the test split.
        num_classes: number of classes.
        mean: of the training split's channels, ``(3, 1, 1)``.
        std: likewise.
        published: the folder of published corrupted images, if it is used.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    published: Path | None = None

    def normalised(self, images: Tensor) -> Tensor:
        """Return images as the network takes them."""
        return (images - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 pixels of images as the network takes them."""
        return ((images * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def in_domain(self, name: str, rows: Tensor, severity: int, seed: int) -> Tensor:
        """Return test images of a domain, in 0..1."""
        if self.published is None or name not in CORRUPTIONS:
            return corrupt(name, self.test_images[rows], severity, seed=seed)
        file = self.published / f"{name}.npy"
        total = len(self.test_labels)
        try:
            levels = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DatasetFileError(f"{file} cannot be read: {error}") from error
        if levels.shape != (5 * total, 32, 32, 3):
            raise DatasetError(f"Expected {file} of shape {(5 * total, 32, 32, 3)}, received {levels.shape}.")
        chosen = levels[(severity - 1) * total + rows.numpy()]
        return torch.from_numpy(np.array(chosen)).movedim(-1, 1).float() / 255


def load_shift_data(name: str, place: str | None, published: Path | None = None) -> ShiftData:
    """Load a data set.

    Args:
        name: ``"cifar10"``, ``"cifar100"``, or ``"digits"``: scikit-learn's, enlarged, without any download.
        place: of the data set, as ``datasets`` reads it.
        published: a folder of published corrupted test images (CIFAR-10-C): one ``.npy`` each, and ``labels.npy``.

    Raises:
        DatasetError: the published images are of other labels.
        DatasetFileError: something cannot be read.
    """
    if name == "digits":
        images, labels = _digits()
        parts = images[:1000], labels[:1000], images[1000:], labels[1000:]
    else:
        splits = load_splits(str(place))
        parts = (*_read(splits["train"], LABELS[name]), *_read(splits["test"], LABELS[name]))
    mean, std = parts[0].mean((0, 2, 3))[:, None, None], parts[0].std((0, 2, 3))[:, None, None]
    if published is not None:
        try:
            labels = torch.from_numpy(np.load(published / "labels.npy")).long()
        except (OSError, ValueError) as error:
            raise DatasetFileError(f"{published / 'labels.npy'} cannot be read: {error}") from error
        if not torch.equal(labels[: len(parts[3])], parts[3]):
            raise DatasetError(f"The labels of {published} are not those of the test split of {name}.")
    return ShiftData(*parts, num_classes=int(parts[1].max()) + 1, mean=mean, std=std, published=published)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return (images * 255).round() / 255, torch.tensor(digits.target, dtype=torch.int64)


def _read(split: Any, label: str) -> tuple[Tensor, Tensor]:
    column = next(name for name, feature in split.features.items() if type(feature).__name__ == "Image")
    arrays = [np.asarray(image.convert("RGB")) for image in split[column]]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 255, torch.tensor(split[label])


def domains_of(
    data: ShiftData,
    names: Sequence[str] = ("clean", *CORRUPTIONS, *EXTRAS),
    *,
    count: int,
    unlabelled: int,
    severity: int = 5,
    seed: int = 0,
    progress: Callable[[Sequence[str]], Sequence[str]] = lambda names: names,
) -> Domains:
    """Return test images in domains, as the network takes them; unlabelled images are other ones in each domain.

    Args:
        data: its test split gives both.
        names: of domains.
        count: test images, the same in each domain and for each seed.
        unlabelled: images of each domain without labels.
        severity: of the corruptions.
        seed: of the corruptions, and of the draw of unlabelled images.
        progress: wraps the names.
    """
    order = torch.randperm(len(data.test_labels), generator=torch.Generator().manual_seed(DRAW))
    rows, others = order[:count], order[count:]
    generator = torch.Generator().manual_seed(seed)
    test, given = {}, {}
    for name in progress(names):
        test[name] = data.normalised(data.in_domain(name, rows, severity, 2 * seed + 1))
        drawn = others[torch.randperm(len(others), generator=generator)[:unlabelled]]
        given[name] = data.normalised(data.in_domain(name, drawn, severity, 2 * seed))
    outside = tuple(name for name in names if name in EXTRAS)
    return Domains(test=test, labels=data.test_labels[rows], unlabelled=given, outside=outside)
