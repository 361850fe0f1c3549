"""Known contexts named from an image's statistics: linear discriminant analysis, with an answer for unknown images.

Every context is a Gaussian over the statistics of ``stem``; all share one covariance, estimated with shrinkage (Ledoit
and Wolf 2004). An image belongs to the context whose mean is nearest in Mahalanobis distance ``d``; context ``t`` has
probability proportional to ``exp(-d_t^2 / 2)``. An image farther from all means than nearly all images that a fit did
not see is of no known context.

Shape legend: ``N`` images, ``T`` contexts, ``D`` statistics; ids are int64 ``(N,)``, -1 for unknown.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from cn_hf.contexts.base import check_names, check_number
from cn_hf.contexts.image_source import ImageContextSource, PixelChunk
from cn_hf.contexts.sample import Sample
from cn_hf.contexts.stem import Stem
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, ContextSourceError, InputTypeError, nearest
from cn_hf.reading.access import CONTEXT_COLUMN, is_split_dict, training_split
from cn_hf.reading.images import images_to_arrays

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StatisticsContexts"]

FEATURES = ("pixels+stem", "pixels", "stem")
UNKNOWN = -1
_FOLDS = 5
_SAMPLE_BYTES = 2**30


class Discriminant(NamedTuple):
    """Means ``(T, D)`` and a matrix ``(D, D)`` that makes Mahalanobis distances Euclidean; float64."""

    mean: Tensor
    whitening: Tensor

    @classmethod
    def of(cls, x: Tensor, ids: Tensor) -> Discriminant:
        """Of statistics ``(N, D)`` of contexts ``ids`` ``(N,)``, each of which has an image."""
        from sklearn.covariance import ledoit_wolf

        means = torch.stack([x[ids == context].mean(dim=0) for context in range(int(ids.max()) + 1)])
        residuals = x - means[ids]
        deviation = residuals.square().mean(dim=0).sqrt()
        deviation = deviation.where(deviation > 0, deviation[deviation > 0].min() if (deviation > 0).any() else 1.0)
        covariance = torch.from_numpy(ledoit_wolf((residuals / deviation).numpy(), assume_centered=True)[0])
        floor = torch.finfo(torch.float32).eps * torch.eye(len(covariance), dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance + floor)
        return cls(means, torch.linalg.solve_triangular(factor, torch.diag(1 / deviation), upper=False))

    def distances(self, x: Tensor) -> Tensor:
        """Mahalanobis distances ``(N, T)`` of statistics ``(N, D)`` to the contexts' means."""
        mean, whitening = self.mean.to(x.device), self.whitening.to(x.device)
        return torch.stack([((x.double() - row) @ whitening.T).norm(dim=1) for row in mean], dim=1)


class StatisticsContexts(ImageContextSource):
    """Names known contexts by the means and log standard deviations of channels: fog, night, another camera.

        source = StatisticsContexts().fit({"clear": clear, "fog": fog}, model=model)
        set_inference(model, "predict", source=source)

    Args:
        features: the channels: of ``"pixels+stem"``, ``"pixels"``, or ``"stem"``, a model's first convolution. A copy
            of it is saved with the source, so that neither ``predict`` nor ``load`` needs the model.
        quantile: this part of the held-out training images counts as known.
        fit_samples: at most so many images of each context, drawn by ``seed``.
        seed: of the draw, and of what is held out.
        mean: pixels in [0, 1] are standardised with it; None takes what the model was given by ``set_inference`` or
            timm's configuration says.
        std: likewise.
        image_column: found by its feature when None.
        image_mode: ``"RGB"`` or ``"L"``.
        decode_size: int or (height, width) that images are resized to; None takes them as they are. Float tensors are
            never resized.
        num_workers: threads that decode; 0 decodes in this one.
    """

    type = "statistics"
    names_unknown = True
    one_size = False

    def __init__(
        self,
        features: str = "pixels+stem",
        *,
        quantile: float = 0.99,
        fit_samples: int = 10_000,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_column: str | None = None,
        image_mode: str = "RGB",
        decode_size: int | Sequence[int] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            image_column=image_column, image_mode=image_mode, decode_size=decode_size, num_workers=num_workers
        )
        if features not in FEATURES:
            raise ConfigError(f"Unknown features {features!r}; {nearest(str(features), FEATURES)}")
        check_number("quantile", quantile, above=0, below=1)
        check_number("fit_samples", fit_samples, least=2, integer=True)
        check_number("seed", seed, least=0, below=2**63, integer=True)
        for name, numbers, above in (("mean", mean, -math.inf), ("std", std, 0.0)):
            if numbers is not None and (not isinstance(numbers, list | tuple) or len(numbers) not in (1, 3)):
                raise ConfigError(f"Expected {name} to be one number a channel, received {numbers!r}.")
            for number in numbers or ():
                check_number(name, number, above=above)
        self.features = features
        self.quantile = float(quantile)
        self.fit_samples = fit_samples
        self.seed = seed
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.threshold = float("nan")
        self._stem: Stem | None = None
        self._discriminant: Discriminant | None = None

    def __repr__(self) -> str:
        return f"StatisticsContexts({self.features!r}, names={list(self._names or ())})"

    def fit(self, images: Any, *, model: nn.Module | None = None) -> Self:
        """Learn what the contexts look like.

        Args:
            images: by context name: a tensor ``(N, C, H, W)``, uint8 or as the model takes it; PIL images; a dataset,
                of which the training split is used; or an iterable of batches (tensors, mappings with ``pixel_values``,
                or pairs whose first part is the images). Or one ``Dataset`` with a column ``context_ids``.
            model: its first convolution is the stem; patched or not.

        Returns:
            The source itself. After an error it is as it was before.

        Raises:
            ConfigError: no model where ``features`` needs one, or one that does not begin with a convolution.
            ContextSourceError: fewer than two images of a context, or pixels that are not finite; names the context.
            InputTypeError: images of another kind.
        """
        named = _by_name(images)
        names = check_names(list(named))
        stem = self._new_stem(model)
        found = []
        for name, value in named.items():
            with _naming(name):
                found.append(self._sampled(value, stem))
        x = torch.cat(found)
        ids = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(part) for part in found]))
        held_out = _held_out_distances(x, ids, self.seed)
        discriminant = Discriminant.of(x, ids)
        self.threshold = float(held_out.quantile(self.quantile))
        self._names, self._stem, self._discriminant = names, stem, discriminant
        return self

    def fit_images(self, images: Any, *, model: nn.Module | None = None) -> Self:
        """As ``fit``."""
        return self.fit(images, model=model)

    def predict(self, images: Any) -> Tensor:
        """Contexts of images.

        Args:
            images: a tensor ``(N, C, H, W)``, uint8 or as the model takes it, or PIL images.

        Returns:
            int64 ids ``(N,)``, -1 for images of no known context, on the images' device.

        Raises:
            ContextSourceError: the source is not fitted, or an image cannot be used.
            InputTypeError: images of another kind.
        """
        return self._ids(self._distances(images))

    def predict_proba(self, images: Any) -> Tensor:
        """Probabilities of the known contexts, float32 ``(N, T)``, whose rows sum to one; images as for ``predict``."""
        return (self._distances(images).square() / -2).softmax(dim=1).float()

    def _ids(self, distances: Tensor) -> Tensor:
        nearest_, ids = distances.min(dim=1)
        return ids.where(nearest_ <= self.threshold, UNKNOWN)

    def _distances(self, images: Any) -> Tensor:
        self._check_fitted()
        assert self._stem is not None
        assert self._discriminant is not None
        if isinstance(images, Tensor):
            return self._discriminant.distances(self._statistics(images, self._stem))
        arrays = images_to_arrays(images, self.image_mode, self.decode_size)
        out = torch.empty(len(arrays), self.num_contexts, dtype=torch.float64)
        for rows, pixels in self._by_size(arrays, range(len(arrays))):
            out[rows] = self._discriminant.distances(self._statistics(pixels, self._stem))
        return out

    def _pixel_ids(self, pixels: Tensor) -> Tensor:
        return self._ids(self._distances(pixels))

    def _fit_chunks(self, chunks: Iterable[PixelChunk]) -> None:
        raise NotImplementedError  # fit is this class's own

    def _new_stem(self, model: nn.Module | None) -> Stem:
        if self.features == "pixels":
            return Stem(mean=self.mean or (0.0,), std=self.std or (1.0,))
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"Expected a model, whose first convolution features={self.features!r} look at, received {model!r}. "
                "Do: fit(images, model=model), or use features='pixels'."
            )
        return Stem.of(model, self.mean, self.std, pixels=self.features != "stem")

    def _statistics(self, images: Tensor, stem: Stem) -> Tensor:
        """Statistics ``(N, D)`` of a caller's tensor."""
        if images.is_floating_point():
            if images.dim() != 4:
                raise ContextSourceError(f"Expected images (N, C, H, W), received shape {tuple(images.shape)}.")
            return stem.statistics(images)
        return stem.statistics(stem.standardised(self._as_pixels(images)))

    def _sampled(self, value: Any, stem: Stem) -> Tensor:
        """float64 statistics of at most ``fit_samples`` images of one context, on the CPU."""
        sample = Sample(self.fit_samples, self.seed, _SAMPLE_BYTES)
        seen = 0
        for images in self._tensors(value, stem):
            wanted = [place for place in range(len(images)) if sample.wants(seen + place)]
            if wanted:
                sample.take([seen + place for place in wanted], self._statistics(images[wanted], stem).cpu())
            seen += len(images)
        if seen < 2:
            raise ContextSourceError(f"Expected at least two images, received {seen}. Give more.")
        return sample.vectors().double()

    def _tensors(self, value: Any, stem: Stem) -> Iterator[Tensor]:
        """A caller's images as tensors ``(N, C, H, W)``."""
        if isinstance(value, Tensor):
            yield value if value.dim() != 3 else value[None]
        elif isinstance(value, datasets.Dataset | datasets.IterableDataset) or is_split_dict(value):
            for chunk in self._split_chunks(training_split(value)):
                yield from [chunk.pixels] if len(chunk.pixels) else []
        elif isinstance(value, PIL.Image.Image) or (
            isinstance(value, Sequence) and value and isinstance(value[0], PIL.Image.Image)
        ):
            for chunk in self._given_chunks(value):
                yield chunk.pixels
        elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            for batch in value:
                first = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
                first = first[0] if isinstance(first, list | tuple) and first else first
                if not isinstance(first, Tensor | PIL.Image.Image):
                    raise InputTypeError(
                        f"Expected batches with a tensor of images, received one of type {type(batch).__name__}."
                    )
                yield from self._tensors(first, stem)
        else:
            raise InputTypeError(
                f"Expected a tensor, PIL images, a dataset or an iterable of batches, received {type(value).__name__}."
            )

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert self._stem is not None
        assert self._discriminant is not None
        config = {
            "options": {
                "features": self.features,
                "quantile": self.quantile,
                "fit_samples": self.fit_samples,
                "seed": self.seed,
                "mean": self.mean,
                "std": self.std,
                "image_column": self.image_column,
                "image_mode": self.image_mode,
                "decode_size": self.decode_size,
            },
            "threshold": self.threshold,
            "stem": self._stem.config(),
        }
        return config, {**self._discriminant._asdict(), **self._stem.tensors()}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        source = cls(**config["options"])
        names = check_names(config["names"])
        stem = Stem.read(config["stem"], tensors)
        check_number("threshold", config["threshold"], least=0)
        size = tensors["mean"].shape[-1]
        expected: dict[str, tuple[int, ...]] = {"mean": (len(names), size), "whitening": (size, size)}
        expected |= {name: tuple(tensor.shape) for name, tensor in stem.tensors().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or (stem.weight is not None and size != stem.num_statistics):
            raise CheckpointError(f"The saved statistics have tensors {found}; their options call for {expected}.")
        if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise CheckpointError("The saved statistics hold values that no fit gives.")
        source.threshold = float(config["threshold"])
        source._names, source._stem = names, stem
        source._discriminant = Discriminant(tensors["mean"], tensors["whitening"])
        return source


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except CnHfError as error:
        raise type(error)(f"Context {name!r}: {error}") from error


def _by_name(images: Any) -> Mapping[str, Any]:
    """A caller's images by context name; of a dataset with the column ``context_ids``, its training rows by that."""
    if isinstance(images, Mapping) and not is_split_dict(images):
        if "pixel_values" in images or CONTEXT_COLUMN in images:
            raise InputTypeError(
                "Expected images by context name, received a batch. Do: fit({name: [batch]}, model=model)."
            )
        return images
    if isinstance(images, datasets.Dataset) or is_split_dict(images):
        split = training_split(images)
        feature = None if split.features is None else split.features.get(CONTEXT_COLUMN)
        if isinstance(split, datasets.Dataset) and isinstance(feature, datasets.ClassLabel):
            ids = np.asarray(split.with_format(None)[CONTEXT_COLUMN][:])
            return {name: split.select(np.flatnonzero(ids == number)) for number, name in enumerate(feature.names)}
    raise InputTypeError(
        f"Expected a mapping from context names to images, or a Dataset with a ClassLabel column {CONTEXT_COLUMN!r}, "
        f"received {type(images).__name__}."
    )


def _held_out_distances(x: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Each image's distance to the nearest mean, from a discriminant that was fitted without it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ids.bincount()
    folds = min(_FOLDS, int(sizes.min()))
    fold = torch.cat([torch.randperm(int(size), generator=generator) % folds for size in sizes])
    distances = torch.empty(len(x), dtype=torch.float64)
    for number in range(folds):
        held = fold == number
        distances[held] = Discriminant.of(x[~held], ids[~held]).distances(x[held]).min(dim=1).values
    return distances
