"""Contexts found in the images themselves: components of a Gaussian mixture or of k-means (paper IV-B).

Fitted on the training split alone and applied to all splits. The clustering sees pixels, their principal components, or
the embeddings that a given model makes of the images.

Shape legend: ``N`` images, ``C`` channels, ``H`` ``W`` pixels, ``F = C*H*W`` pixel features, ``D`` features clustered,
``K`` components, which are the contexts.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from cn_hf.contexts.access import Split
from cn_hf.contexts.base import check_names
from cn_hf.contexts.embedding import describe, embed, probe
from cn_hf.contexts.estimators import Clustering, Stopping, assign, cluster, principal_components, project
from cn_hf.contexts.image_source import ImageContextSource, PixelChunk
from cn_hf.contexts.images import size_mismatch
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError, DatasetError, nearest

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClusterContexts", "ClusterOptions"]

METHODS = ("gmm", "kmeans")
FEATURES = ("pixels", "pca")
_MEMORY_LIMIT = 4 * 2**30  # bytes of decoded training pixels


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How clusters are fitted: exactly what is saved as JSON. Fields as in ``ClusterContexts``.

    Raises:
        ConfigError: a value is out of range.
    """

    num_contexts: int
    method: str
    features: str
    seed: int
    max_iterations: int
    tol: float
    reg_covar: float
    min_share: float
    pca_components: int
    fit_samples: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("features", (*FEATURES, "model"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"Unknown {name} {getattr(self, name)!r}; {nearest(str(getattr(self, name)), known)}")
        for name in ("num_contexts", "max_iterations", "pca_components", "fit_samples"):
            value = getattr(self, name)
            if (value is not None or name != "fit_samples") and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a positive integer.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; expected a non-negative integer.")
        for name, below in (("tol", float("inf")), ("reg_covar", float("inf")), ("min_share", 1)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < below:
                raise ConfigError(f"{name} is {value!r}; expected a number of at least 0 and below {below}.")
        if self.reg_covar == 0:
            raise ConfigError("reg_covar is 0; expected more: features that never change have no variance.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = (value,) if isinstance(value, int | float) else tuple(value)
            if len(numbers) not in (1, 3) or (name == "std" and not min(numbers) > 0):
                raise ConfigError(f"{name} is {value!r}; expected one number or one a channel, std positive.")
            object.__setattr__(self, name, tuple(float(number) for number in numbers))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FittedClusters:
    """What fitting found.

    Attributes:
        clustering: the components, of vectors ``(N, D)``.
        sizes: how many training images each context got.
        shape: (C, H, W) of the images.
        projection: mean ``(F,)`` and components ``(D, F)`` for ``features="pca"``.
        scale: embeddings are divided by it, so that ``reg_covar`` means the same for any model.
        probe: ``(D,)``, the embedding model's fingerprint.
    """

    clustering: Clustering
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    projection: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    probe: Tensor | None = None


class ClusterContexts(ImageContextSource):
    """The context of an image is the cluster it falls into; the clusters are fitted on the training split.

    Args:
        num_contexts: how many clusters (the paper's K = 3).
        method: ``"gmm"``: diagonal Gaussians by k-means++ and EM, an image goes to the likeliest; or ``"kmeans"``.
        features: what is clustered: ``"pixels"`` in [0, 1]; ``"pca"``, their leading principal components; or a model
            or function from standardised float images ``(N, C, H, W)`` to embeddings ``(N, D)``.
        image_column: found by its feature when None.
        image_mode: ``"RGB"`` or ``"L"``.
        image_size: int or (height, width) to resize to; None requires images of one size.
        names: of the contexts; None gives ``cluster_0``, ``cluster_1``, ...
        seed: of sampling, k-means++ and PCA.
        max_iterations: of EM or k-means, at each stage: on samples first, then on all images.
        tol: EM stops once the mean log-likelihood of an image changes by less; k-means once the centres' squared shifts
            sum to at most this part of the mean variance.
        reg_covar: added to every variance of a Gaussian. Pixels that never change would otherwise decide alone; 1e-3
            is a standard deviation of 8 of 255 levels.
        min_share: a cluster with less than this part of an equal share of the images is set anew while fitting, a few
            times; one that stays so small gives a warning.
        pca_components: at most so many for ``features="pca"``.
        fit_samples: fit on so many images, drawn by ``seed`` (of a stream: its first); None fits on all.
        mean: pixels in [0, 1] are standardised with it before an embedding model; one number or one a channel.
        std: likewise.
        num_workers: threads that decode; 0 decodes in this one.
    """

    type = "clusters"
    given = ("features",)

    def __init__(
        self,
        num_contexts: int = 3,
        method: str = "gmm",
        features: str | Callable[..., Any] = "pixels",
        *,
        image_column: str | None = None,
        image_mode: str = "RGB",
        image_size: int | Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        max_iterations: int = 100,
        tol: float = 1e-3,
        reg_covar: float = 1e-3,
        min_share: float = 0.01,
        pca_components: int = 64,
        fit_samples: int | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            image_column=image_column, image_mode=image_mode, image_size=image_size, num_workers=num_workers
        )
        self.options = ClusterOptions(
            num_contexts=num_contexts,
            method=method,
            features="model" if callable(features) else features,
            seed=seed,
            max_iterations=max_iterations,
            tol=tol,
            reg_covar=reg_covar,
            min_share=min_share,
            pca_components=pca_components,
            fit_samples=fit_samples,
            mean=mean,  # type: ignore[arg-type]  # normalised to a tuple by the options
            std=std,  # type: ignore[arg-type]  # likewise
        )
        self.model = features if callable(features) else None
        self._names = check_names([f"cluster_{k}" for k in range(num_contexts)] if names is None else names)
        if len(self._names) != num_contexts:
            raise ConfigError(f"Received {len(self._names)} names for num_contexts={num_contexts}.")
        self._fit: FittedClusters | None = None

    def __repr__(self) -> str:
        return f"ClusterContexts({self.options})"

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` has been called, or a fitted source loaded."""
        return self._fit is not None

    @property
    def clusters(self) -> FittedClusters:
        """What fitting found: components, sizes, iterations.

        Raises:
            ContextSourceError: not fitted yet.
        """
        if self._fit is None:
            raise self._not_fitted()
        return self._fit

    def _training_rows(self, split: Split) -> tuple[Split, list[int] | None]:
        count = self.options.fit_samples
        if count is None:
            return split, None
        if isinstance(split, datasets.IterableDataset):
            return split.take(count), None
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.options.seed))
        return split, order[:count].sort().values.tolist()

    def _fit_chunks(self, chunks: Iterable[PixelChunk]) -> None:
        options, pixels = self.options, self._collect(chunks)
        shape: Any = tuple(pixels.shape[1:])
        projection, scale, fingerprint, vectors = None, 1.0, None, pixels.flatten(1)
        if options.features == "pca":
            limit = min(options.pca_components, *vectors.shape)
            projection = principal_components(vectors, limit, seed=options.seed)
            vectors = project(vectors, *projection).float()
        elif self.model is not None:
            fingerprint = probe(self.model, shape, options.mean, options.std)
            vectors = embed(self.model, pixels, options.mean, options.std)
            scale = float(vectors.var(dim=0, correction=0).mean().sqrt()) or 1.0
            vectors = vectors / scale
        clustering = cluster(
            vectors,
            options.num_contexts,
            method=options.method,
            seed=options.seed,
            stopping=Stopping(max_iterations=options.max_iterations, tol=options.tol, min_share=options.min_share),
            reg_covar=options.reg_covar,
        )
        if not math.isfinite(clustering.objective):
            raise ContextSourceError(f"The fit has left the range of float32; raise reg_covar ({options.reg_covar}).")
        sizes = torch.bincount(assign(vectors, clustering), minlength=options.num_contexts).tolist()
        self._check_sizes(sizes)
        self._fit = FittedClusters(
            clustering=clustering,
            sizes=tuple(sizes),
            shape=shape,
            projection=projection,
            scale=scale,
            probe=fingerprint,
        )

    def _check_sizes(self, sizes: list[int]) -> None:
        smallest = min(sizes)
        name = self.names[sizes.index(smallest)]
        advice = "Ask for fewer contexts, or try another seed, features or method."
        if smallest == 0:
            raise ContextSourceError(f"Context {name!r} got none of the training images (sizes {sizes}). {advice}")
        if smallest < self.options.min_share * sum(sizes) / len(sizes):
            warnings.warn(f"Context {name!r} has {smallest} of {sum(sizes)} training images. {advice}", stacklevel=5)

    def _collect(self, chunks: Iterable[PixelChunk]) -> Tensor:
        """All training pixels, uint8 ``(N, C, H, W)``."""
        parts: list[Tensor] = []
        first, held = -1, 0
        for rows, pixels in chunks:
            if not rows:
                continue
            if parts and pixels.shape[1:] != parts[0].shape[1:]:
                raise size_mismatch(rows[0], pixels.shape[2:], first, parts[0].shape[2:])
            first = rows[0] if first < 0 else first
            parts.append(pixels)
            held += pixels.nbytes
            if held > _MEMORY_LIMIT:
                raise ContextSourceError(
                    f"The first {sum(map(len, parts))} training images take {held / 2**30:.1f} GiB decoded. Fit on "
                    "fewer, fit_samples=..., or on smaller ones, image_size=..."
                )
        count = sum(map(len, parts))
        if count == 0:
            raise DatasetError("The training split has no images to fit contexts on.")
        if count < self.options.num_contexts:
            raise ContextSourceError(f"{count} training images cannot form {self.options.num_contexts} contexts.")
        return torch.cat(parts)

    def _check_size(self, row: int, height: int, width: int) -> None:
        size = self.clusters.shape[1:]
        if (height, width) != size:
            raise ContextSourceError(
                f"Image {row} is {height}x{width}, the contexts were fitted on {size[0]}x{size[1]} (height x width). "
                f"Resize it, or fit with image_size={size} to have all resized."
            )

    def _pixel_ids(self, pixels: Tensor) -> Tensor:
        fit = self.clusters
        if not len(pixels):
            return torch.empty(0, dtype=torch.int64, device=pixels.device)
        vectors = pixels.flatten(1)
        if fit.projection is not None:
            vectors = project(vectors, *fit.projection)
        elif self.model is not None:
            vectors = embed(self.model, pixels, self.options.mean, self.options.std) / fit.scale
        return assign(vectors, fit.clustering)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fit = self.clusters
        tensors = {
            "mean": fit.clustering.mean,
            "var": fit.clustering.var,
            "prior": fit.clustering.prior,
            "pca_mean": None if fit.projection is None else fit.projection[0],
            "pca_components": None if fit.projection is None else fit.projection[1],
            "probe": fit.probe,
        }
        config = {
            "options": dataclasses.asdict(self.options),
            "image": {"column": self.image_column, "mode": self.image_mode, "size": self.image_size},
            "shape": fit.shape,
            "sizes": fit.sizes,
            "objective": fit.clustering.objective,
            "num_iterations": fit.clustering.num_iterations,
            "scale": fit.scale,
            "model": None if self.model is None else describe(self.model),
        }
        return config, {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        options, image = dict(config["options"]), config["image"]
        features, model = options["features"], given.get("features")
        if features == "model" and model is None:
            raise ContextSourceError(
                f"These contexts were fitted on embeddings by a model ({config['model']}), which is not saved with "
                "them. Give the same model again: ContextSource.load(folder, features=model)."
            )
        if features != "model" and model is not None:
            raise ContextSourceError(f"These contexts were fitted on {features!r} and take no model (features=).")
        options["features"] = model or features
        source = cls(
            **options,
            names=config["names"],
            image_column=image["column"],
            image_mode=image["mode"],
            image_size=image["size"],
        )
        source._fit = _read_fit(config, tensors, source.options)
        if model is not None:
            _check_same_model(model, source._fit, source.options, config["model"])
        return source


def _read_fit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ClusterOptions) -> FittedClusters:
    """The fit a saved source describes, its tensors' shapes checked."""
    channels, height, width = (int(side) for side in config["shape"])
    mean = tensors["mean"]
    expected: dict[str, tuple[int, ...]] = {"mean": (options.num_contexts, mean.shape[-1])}
    if options.method == "gmm":
        expected |= {"var": tuple(mean.shape), "prior": (options.num_contexts,)}
    if options.features == "pca":
        features = channels * height * width
        expected |= {"pca_mean": (features,), "pca_components": (mean.shape[-1], features)}
    elif options.features == "pixels":
        expected["mean"] = (options.num_contexts, channels * height * width)
    else:
        expected["probe"] = (mean.shape[-1],)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise CheckpointError(f"The saved clusters have tensors {found}; their options call for {expected}.")
    return FittedClusters(
        clustering=Clustering(
            mean=mean,
            var=tensors.get("var"),
            prior=tensors.get("prior"),
            objective=float(config["objective"]),
            num_iterations=int(config["num_iterations"]),
        ),
        sizes=tuple(int(size) for size in config["sizes"]),
        shape=(channels, height, width),
        projection=(tensors["pca_mean"], tensors["pca_components"]) if options.features == "pca" else None,
        scale=float(config["scale"]),
        probe=tensors.get("probe"),
    )


def _check_same_model(model: Callable[..., Any], fit: FittedClusters, options: ClusterOptions, name: str) -> None:
    assert fit.probe is not None  # _read_fit requires it for embeddings
    found = probe(model, fit.shape, options.mean, options.std)
    # Loose enough for another device or library version, far tighter than other weights.
    if found.shape != fit.probe.shape or not torch.allclose(found, fit.probe, rtol=1e-2, atol=1e-2 * fit.scale):
        raise ContextSourceError(
            f"The model given ({describe(model)}) embeds a test picture otherwise than the model the contexts were "
            f"fitted with ({name}). Give that one, with its weights and preprocessing."
        )
