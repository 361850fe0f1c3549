"""Verification: do two images show the same object? Distances of embeddings, judged as a Siamese network is.

A pair is called "same" where the distance of its embeddings is at most a threshold. The threshold is chosen on
validation pairs and applied to test pairs; ROC AUC and the equal error rate need none.

Pairs share images, so they are not independent: beside the binomial error of an accuracy stands a bootstrap over images
of the ROC AUC.

Shapes: N images, P pairs, D embedding dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from cn_hf.errors import ConfigError, DatasetError, InputShapeError
from cn_hf.evaluation.report import standard_error

__all__ = [
    "Verification",
    "best_threshold",
    "context_groups",
    "equal_error_rate",
    "evaluation_pairs",
    "pair_distances",
    "verify",
]

Floats = npt.NDArray[np.float64]

BOOTSTRAPS = 200
_MOST_PAIRS = 2**22  # listed, to choose from
_MOST_IMAGES = 512  # of one identity, likewise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The quality of distances as a test of same against different; rates in [0, 1].

    Attributes:
        pairs: Their number.
        same: How many of them show the same object.
        threshold: Largest distance that is called "same".
        correct: Pairs called right.
        roc_auc: Area under the ROC curve; None where all pairs are of one kind.
        roc_auc_error: Its standard error, by resampling images; likewise.
        equal_error_rate: Where false acceptances and false rejections are equally frequent; likewise.
    """

    pairs: int
    same: int
    threshold: float
    correct: int
    roc_auc: float | None
    roc_auc_error: float | None
    equal_error_rate: float | None

    @property
    def accuracy(self) -> float:
        """Rate of pairs called right."""
        return self.correct / self.pairs

    @property
    def accuracy_error(self) -> float:
        """Binomial standard error of the accuracy, as if the pairs were independent."""
        return standard_error(self.correct, self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, rates included."""
        return dataclasses.asdict(self) | {"accuracy": self.accuracy, "accuracy_error": self.accuracy_error}


def evaluation_pairs(identities: Tensor, *, seed: int = 0, most: int = 10_000, views: bool = False) -> Tensor:
    """A fixed set of pairs, half of them of the same object as far as there are any.

    Args:
        identities: (N,) integers, on the CPU.
        seed: Of the draw of different ones, and of the same ones where there are too many.
        most: Pairs of each kind at most.
        views: Pairs of the same object are an image and its second view.

    Returns:
        (P, 2) int64: places of the first and the second image; same ones first. Without ``views`` the first of a pair
        has the lower place.

    Raises:
        DatasetError: There is no pair of one of the two kinds.
    """
    count = len(identities)
    generator = torch.Generator().manual_seed(seed)
    same = torch.arange(count)[:, None].expand(-1, 2) if views else _same_pairs(identities, generator)
    different = _different_pairs(identities, generator)
    if len(same) == 0 or len(different) == 0:
        missing = "the same object" if len(same) == 0 else "different objects"
        raise DatasetError(f"{count} images of {len(set(identities.tolist()))} identities make no pair of {missing}")
    number = min(most, len(same), len(different))
    drawn = (torch.randperm(len(kind), generator=generator)[:number].sort().values for kind in (same, different))
    return torch.cat([kind[rows] for kind, rows in zip((same, different), drawn, strict=True)])


def _same_pairs(identities: Tensor, generator: torch.Generator) -> Tensor:
    """All pairs (P, 2) of one identity, in order; of many images of one, those of some drawn."""
    pairs = []
    counts: list[int] = torch.bincount(torch.unique(identities, return_inverse=True)[1]).tolist()
    for images in torch.split(identities.argsort(stable=True), counts):
        if len(images) > _MOST_IMAGES:
            images = images[torch.randperm(len(images), generator=generator)[:_MOST_IMAGES].sort().values]
        pairs.append(torch.combinations(images))
    same = torch.cat([torch.empty((0, 2), dtype=torch.int64), *pairs])
    return same[(same[:, 0] * len(identities) + same[:, 1]).argsort()]


def _different_pairs(identities: Tensor, generator: torch.Generator) -> Tensor:
    """All pairs (P, 2) of two identities, in order; of more images than can be listed, some drawn."""
    count = len(identities)
    if count * (count - 1) // 2 <= _MOST_PAIRS:
        pairs = torch.triu_indices(count, count, offset=1).T
    else:
        drawn = torch.randint(count, (_MOST_PAIRS, 2), generator=generator)
        drawn = drawn[drawn[:, 0] < drawn[:, 1]]
        ranks: Tensor = torch.unique(drawn[:, 0] * count + drawn[:, 1])
        pairs = torch.stack([ranks // count, ranks % count], dim=1)
    return pairs[identities[pairs[:, 0]] != identities[pairs[:, 1]]]


def pair_distances(embeddings: Tensor, pairs: Tensor, second: Tensor | None = None) -> Tensor:
    """Euclidean distances (P,) of pairs (P, 2) of embeddings (N, D); the second images' embeddings may be others."""
    second = embeddings if second is None else second
    distances: Tensor = torch.linalg.vector_norm(embeddings[pairs[:, 0]].double() - second[pairs[:, 1]].double(), dim=1)
    return distances


def best_threshold(distances: Tensor, different: Tensor) -> float:
    """The threshold with the most pairs right: midway between two distances, the middle of several as good.

    Args:
        distances: (P,).
        different: (P,) bool.
    """
    _check(distances, different)
    ordered, order = distances.double().sort()
    kinds = different[order].long()
    # After k pairs called "same": right are the same ones among them, and the different ones beyond.
    right = torch.cat([torch.zeros(1, dtype=torch.long), (1 - 2 * kinds).cumsum(0)]) + kinds.sum()
    candidates = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1])
    distinct = torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] > ordered[:-1], torch.ones(1, dtype=torch.bool)])
    right = right.where(distinct, torch.tensor(-1))
    best = candidates[right == right.max()]
    return float(best[len(best) // 2])


def equal_error_rate(distances: Tensor, different: Tensor) -> float:
    """The rate at which false acceptances and false rejections are equally frequent, on the ROC's straight lines."""
    _check(distances, different)
    false_rate, true_rate, _ = roc_curve(different.numpy(), distances.numpy(), drop_intermediate=False)
    gap: Floats = false_rate - (1 - true_rate)
    after = int(np.argmax(gap >= 0))
    if after == 0:
        return float(false_rate[0])
    part = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_rate[after - 1] + part * (false_rate[after] - false_rate[after - 1]))


def verify(
    distances: Tensor,
    different: Tensor,
    threshold: float,
    *,
    pairs: Tensor | None = None,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> Verification:
    """Judge distances.

    Args:
        distances: (P,).
        different: (P,) bool.
        threshold: From ``best_threshold`` on other pairs.
        pairs: (P, 2), which images each is of, to resample for the error of the ROC AUC; None for no error.
        bootstraps: Resamplings.
        seed: Of the resampling.

    Raises:
        InputShapeError: The lengths differ.
        ConfigError: There are no pairs, or a distance is not finite.
    """
    _check(distances, different)
    number_same = int((~different).sum())
    both = 0 < number_same < len(different)
    correct = int(((distances > threshold) == different).sum())
    labels, scores = different.numpy(), distances.double().numpy()
    return Verification(
        pairs=len(different),
        same=number_same,
        threshold=threshold,
        correct=correct,
        roc_auc=float(roc_auc_score(labels, scores)) if both else None,
        roc_auc_error=_bootstrap_error(labels, scores, pairs.numpy(), bootstraps, seed)
        if both and pairs is not None
        else None,
        equal_error_rate=equal_error_rate(distances, different) if both else None,
    )


def _bootstrap_error(
    labels: npt.NDArray[np.bool_], scores: Floats, pairs: npt.NDArray[np.int64], count: int, seed: int
) -> float | None:
    """Standard deviation of the ROC AUC when images are drawn anew with replacement; a pair counts as often as both."""
    generator = np.random.default_rng(seed)
    number = int(pairs.max()) + 1
    areas = []
    for _ in range(count):
        times = np.bincount(generator.integers(number, size=number), minlength=number)
        weights = times[pairs[:, 0]] * times[pairs[:, 1]]
        if weights[labels].sum() > 0 and weights[~labels].sum() > 0:
            areas.append(roc_auc_score(labels, scores, sample_weight=weights))
    return float(np.std(areas)) if len(areas) > 1 else None


def context_groups(contexts: Tensor, second: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Pairs by the contexts of their two images, whichever comes first: name such as "day-night" to (P,) bool."""
    groups: dict[str, Tensor] = {}
    for one in range(len(names)):
        for other in range(one, len(names)):
            chosen = ((contexts == one) & (second == other)) | ((contexts == other) & (second == one))
            if bool(chosen.any()):
                groups[f"{names[one]}-{names[other]}"] = chosen
    return groups


def _check(distances: Tensor, different: Tensor) -> None:
    if distances.ndim != 1 or distances.shape != different.shape:
        raise InputShapeError(
            f"expected one distance and one label a pair, received shapes {tuple(distances.shape)} and "
            f"{tuple(different.shape)}"
        )
    if len(distances) == 0 or not bool(distances.isfinite().all()):
        raise ConfigError("verification needs pairs, and their distances must be finite; check the embeddings")
