"""Contexts found in the images themselves: components of a Gaussian mixture or of k-means (paper IV-B).

Fitted on the training split alone and applied to all splits. The clustering sees pixels, their principal components,
the embeddings that a given model makes of the images, or statistics of a model's first convolution. It is fitted to a
sample that is held in memory; each image of it is decoded once.

Shape legend: ``N`` images, ``C`` channels, ``H`` ``W`` pixels, ``F = C*H*W`` pixel features, ``D`` features clustered,
``K`` components, which are the contexts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cn_hf.contexts.base import check_names, check_number
from cn_hf.contexts.clustering import Clustering, assign, fit_gaussians, fit_k_means, principal_components, project
from cn_hf.contexts.embedding import describe, embed, probe
from cn_hf.contexts.image_source import ImageContextSource, PixelChunk
from cn_hf.contexts.sample import Sample
from cn_hf.contexts.stem import Stem
from cn_hf.errors import CheckpointError, CnHfError, ConfigError, ContextSourceError, DatasetError, nearest
from cn_hf.reading.access import DatasetLike, training_split, warn_of_test_split

if TYPE_CHECKING:
    from typing_extensions import Self
from cn_hf.reading.images import accepts_image_size, size_mismatch

__all__ = ["ClusterContexts", "ClusterOptions"]

Result = TypeVar("Result")

METHODS = ("gmm", "kmeans")
FEATURES = ("pixels", "pca", "stem")
_REG_COVAR = 1e-3
_LEAST_REGULAR = 0.02  # of the features' mean variance


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Options of a fit: exactly what is saved as JSON. Fields as in ``ClusterContexts``.

    Raises:
        ConfigError: a value is out of range.
    """

    num_contexts: int
    method: str
    features: str
    seed: int
    n_init: int
    max_iterations: int
    tol: float
    reg_covar: float | None
    min_share: float
    pca_components: int
    fit_samples: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("features", (*FEATURES, "model"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"Unknown {name} {getattr(self, name)!r}; {nearest(str(getattr(self, name)), known)}")
        for name in ("num_contexts", "n_init", "max_iterations", "pca_components"):
            check_number(name, getattr(self, name), least=1, below=2**31, integer=True)
        if self.fit_samples is not None:
            check_number("fit_samples", self.fit_samples, least=1, integer=True)
        check_number("seed", self.seed, least=0, below=2**63, integer=True)
        check_number("tol", self.tol, least=0)
        check_number("min_share", self.min_share, least=0, below=1)
        if self.reg_covar is not None:
            check_number("reg_covar", self.reg_covar, above=0)
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
            if len(numbers) not in (1, 3):
                raise ConfigError(f"Expected {name} to be one number or one a channel, received {value!r}.")
            for number in numbers:
                check_number(name, number, above=0 if name == "std" else -math.inf)
            object.__setattr__(self, name, tuple(float(number) for number in numbers))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FittedClusters:
    """The result of a fit.

    Attributes:
        clustering: the components, of vectors ``(N, D)``.
        sizes: how many images of the sample each context got.
        shape: (C, H, W) of the images.
        projection: mean ``(F,)`` and components ``(D, F)`` for ``features="pca"``.
        scale: embeddings are divided by it, so that ``reg_covar`` means the same for any model.
        probe: ``(D,)``, the embedding model's fingerprint.
        stem: the first convolution for ``features="stem"``.
        deviation: ``(D,)``, each statistic of ``features="stem"`` is divided by its own.
    """

    clustering: Clustering
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    projection: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    probe: Tensor | None = None
    stem: Stem | None = None
    deviation: Tensor | None = None


class ClusterContexts(ImageContextSource):
    """The context of an image is the cluster it falls into; the clusters are fitted on the training split.

    Clusters are fitted to a sample held in memory: ``fit_samples`` rows drawn by ``seed``, the same ones of a stream as
    of a ``Dataset``. Any number of images is given contexts in bounded memory.

    Args:
        num_contexts: how many clusters (the paper's K = 3).
        method: ``"gmm"``: diagonal Gaussians by k-means++ and EM, an image goes to the likeliest; or ``"kmeans"``.
        features: what is clustered: ``"pixels"`` in [0, 1]; ``"pca"``, their leading principal components; ``"stem"``,
            means and log standard deviations of the channels of pixels and of a model's first convolution, which is
            then saved with the source: ``fit(data, model=model)``; or a model or function from standardised float
            images ``(N, C, H, W)`` to embeddings ``(N, D)``.
        image_column: found by its feature when None.
        image_mode: ``"RGB"`` or ``"L"``.
        decode_size: int or (height, width) to resize to; None requires images of one size.
        names: of the contexts; None gives ``cluster_0``, ``cluster_1``, ...
        seed: of sampling, k-means++ and PCA.
        n_init: starts of EM, of which the likeliest is taken (of k-means, the one nearest to its centres).
        max_iterations: of EM or k-means.
        tol: EM stops once the mean log-likelihood of an image changes by less; k-means once the centres' squared shifts
            sum to at most this part of the mean variance.
        reg_covar: added to every variance of a Gaussian. Pixels that never change would otherwise decide alone. None:
            1e-3, a standard deviation of 8 of 255 levels, or 2 % of the features' mean variance where that is less
            (dark images).
        min_share: a cluster with less than this part of an equal share of the images gives a warning.
        pca_components: at most so many for ``features="pca"``.
        fit_samples: fit on so many images; None fits on all that ``memory_budget_bytes`` holds.
        mean: pixels in [0, 1] are standardised with it before a model; one number or one a channel. For ``"stem"``
            the default is what the model's own configuration says.
        std: likewise.
        num_workers: threads that decode; 0 decodes in this one. They pay for photographs, not for tiny images.
        memory_budget_bytes: of the sample as float32 vectors; where it holds fewer than ``fit_samples``, a warning says
            so, and the clusters are fitted on those.
        device: where the fit and passes over images are computed, e.g. ``"cuda"``; None: where the images are, the CPU
            for those of a dataset. An embedding model stays on its own; k-means is fitted on the CPU.
    """

    type = "clusters"
    format = 2
    given = ("features",)

    @accepts_image_size
    def __init__(
        self,
        num_contexts: int = 3,
        method: str = "gmm",
        features: str | Callable[..., Any] = "pixels",
        *,
        image_column: str | None = None,
        image_mode: str = "RGB",
        decode_size: int | Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        n_init: int = 8,
        max_iterations: int = 100,
        tol: float = 1e-3,
        reg_covar: float | None = None,
        min_share: float = 0.01,
        pca_components: int = 64,
        fit_samples: int | None = 50_000,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        num_workers: int = 0,
        memory_budget_bytes: int = 4 * 2**30,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            image_column=image_column, image_mode=image_mode, decode_size=decode_size, num_workers=num_workers
        )
        if not callable(features) and features not in FEATURES:
            raise ConfigError(
                f"Unknown features {features!r}; {nearest(str(features), FEATURES)}, or give a model that embeds images"
            )
        self.options = ClusterOptions(
            num_contexts=num_contexts,
            method=method,
            features="model" if callable(features) else features,
            seed=seed,
            n_init=n_init,
            max_iterations=max_iterations,
            tol=tol,
            reg_covar=reg_covar,
            min_share=min_share,
            pca_components=pca_components,
            fit_samples=fit_samples,
            mean=mean,  # type: ignore[arg-type]  # normalised to a tuple by the options
            std=std,  # type: ignore[arg-type]  # likewise
        )
        check_number("memory_budget_bytes", memory_budget_bytes, least=0, integer=True)
        self.memory_budget_bytes = memory_budget_bytes
        self.device = None if device is None else _usable(device)
        self.model = features if callable(features) else None
        self._names = check_names([f"cluster_{k}" for k in range(num_contexts)] if names is None else names)
        if len(self._names) != num_contexts:
            raise ConfigError(f"Expected num_contexts={num_contexts} names, received {len(self._names)}.")
        self._fit: FittedClusters | None = None

    def __repr__(self) -> str:
        return f"ClusterContexts({self.options})"

    @property
    def fitted(self) -> bool:
        """True if ``fit`` has been called, or a fitted source loaded."""
        return self._fit is not None

    @property
    def clusters(self) -> FittedClusters:
        """The result of the fit: components, sizes, iterations.

        Raises:
            ContextSourceError: not fitted yet.
        """
        if self._fit is None:
            raise self._not_fitted()
        return self._fit

    def fit(self, dataset: DatasetLike, *, distributed: bool = False, model: nn.Module | None = None) -> Self:
        """Learn the contexts from the training split alone.

        Args:
            dataset: ``DatasetDict`` or ``IterableDatasetDict``, of which ``"train"`` is used and nothing else; or one
                ``Dataset`` or ``IterableDataset``, taken to be the training split.
            distributed: True: called in all processes of the default group (as ``accelerate launch`` starts them).
                Process 0 fits, and all end with its contexts, or its error. False: this process fits by itself,
                whatever the others do.
            model: its first convolution is the stem of ``features="stem"``; a copy is kept.

        Returns:
            The source itself. After an error it is as it was before.

        Raises:
            ConfigError: ``distributed`` in one of several processes that have no process group yet, or a ``model``
                without ``features="stem"``, or the reverse.
            ContextSourceError: fewer images or groups than contexts, or an embedding that is none.
            DatasetError: no split ``"train"``, a missing column, images of differing sizes.
            DatasetFileError: an image cannot be decoded; names its row.
        """
        stem = self._stem_of(model)

        def fitted() -> FittedClusters:
            split = training_split(dataset)
            warn_of_test_split(split)
            sample = Sample(self.options.fit_samples, self.options.seed, self.memory_budget_bytes)
            if isinstance(split, datasets.IterableDataset):
                rows, keep = None, sample.wants
            else:
                rows, keep = sample.choose(len(split)), sample.holds
            return self._fitted(self._split_chunks(split, rows, keep), sample, stem)

        self._fit = _on_first_process(fitted) if distributed else fitted()
        return self

    def fit_images(self, images: Any, *, model: nn.Module | None = None) -> Self:
        """As ``fit``, on training images that are decoded already.

        Args:
            images: uint8 tensor ``(N, C, H, W)``, or a list of PIL images.
            model: see ``fit``.

        Returns:
            The source itself.
        """
        stem = self._stem_of(model)
        sample = Sample(self.options.fit_samples, self.options.seed, self.memory_budget_bytes)
        self._fit = self._fitted(_wanted(self._given_chunks(images), sample), sample, stem)
        return self

    def _stem_of(self, model: nn.Module | None) -> Stem | None:
        if (self.options.features == "stem") != (model is not None):
            raise ConfigError(
                "Expected a model exactly where features='stem' needs its first convolution, received "
                f"features={self.options.features!r} and model={None if model is None else describe(model)}. "
                "Do: ClusterContexts(features='stem').fit(data, model=model)."
            )
        if model is None:
            return None
        said = (self.options.mean, self.options.std) != ((0.0,), (1.0,))
        return Stem.of(model, *((self.options.mean, self.options.std) if said else (None, None)))

    def _fit_chunks(self, chunks: Iterable[PixelChunk]) -> None:
        raise NotImplementedError  # fit and fit_images are this class's own

    def _fitted(self, chunks: Iterable[PixelChunk], sample: Sample, stem: Stem | None) -> FittedClusters:
        options = self.options
        first: tuple[int, tuple[int, ...]] | None = None
        fingerprint = None
        for rows, pixels in chunks:
            if not rows:
                continue
            shape = tuple(pixels.shape[1:])
            if first is None and self.model is not None:
                fingerprint = probe(self.model, shape, options.mean, options.std)
            first = first or (rows[0], shape)
            if shape != first[1]:
                raise size_mismatch(rows[0], shape[1:], first[0], first[1][1:])
            sample.take(rows, self._vectors_of(pixels, rows, stem))
        if first is None:
            raise DatasetError("The training split has no images to fit contexts on.")
        if len(sample) < options.num_contexts:
            raise ContextSourceError(f"{len(sample)} training images cannot form {options.num_contexts} contexts.")
        if sample.cut:
            warnings.warn(
                f"memory_budget_bytes ({self.memory_budget_bytes}) holds {len(sample)} images; the clusters are fitted "
                "on those. For more, raise it, or make images smaller: decode_size=...",
                stacklevel=4,
            )
        x, projection, scale, deviation = sample.vectors(), None, 1.0, None
        x = x if self.device is None else x.to(self.device)
        if options.features == "pca":
            mean, components = principal_components(x, min(options.pca_components, *x.shape), seed=options.seed)
            projection = mean.cpu(), components.cpu()
            x = x @ components.T
        elif options.features == "stem":
            deviation = x.std(dim=0, correction=0)
            deviation = deviation.where(deviation > 0, 1.0)
            x.div_(deviation)
        elif options.features == "model":
            scale = float(x.var(dim=0, correction=0).mean().sqrt()) or 1.0
            x.div_(scale)
        clustering, sizes = self._clustered(x)
        return FittedClusters(
            clustering=clustering,
            sizes=sizes,
            shape=first[1],  # type: ignore[arg-type]  # (C, H, W)
            projection=projection,
            scale=scale,
            probe=fingerprint,
            stem=stem,
            deviation=None if deviation is None else deviation.cpu(),
        )

    def _clustered(self, x: Tensor) -> tuple[Clustering, tuple[int, ...]]:
        options = self.options
        variance = float(x.var(dim=0, correction=0).mean())
        reg_covar = options.reg_covar or min(_REG_COVAR, _LEAST_REGULAR * variance) or _REG_COVAR
        common = {"seed": options.seed, "n_init": options.n_init, "max_iterations": options.max_iterations}
        if options.method == "gmm":
            clustering = fit_gaussians(x, options.num_contexts, tol=options.tol, reg_covar=reg_covar, **common)
        else:
            clustering = fit_k_means(x, options.num_contexts, tol=options.tol, **common)
        normal = clustering.var is None or bool((clustering.var >= torch.finfo(torch.float32).tiny).all())
        if not (normal and math.isfinite(clustering.objective)):
            raise ContextSourceError(f"The fit has left the range of float32; raise reg_covar ({reg_covar:g}).")
        sizes = tuple(assign(x, clustering).bincount(minlength=options.num_contexts).tolist())
        name = self.names[sizes.index(min(sizes))]
        advice = "Ask for fewer contexts, or try another seed, features or method."
        if min(sizes) == 0:
            if options.method == "gmm" and reg_covar > variance / 2:
                advice += f" reg_covar ({reg_covar:g}) is large beside the features' mean variance ({variance:g})."
            raise ContextSourceError(
                f"Context {name!r} got none of the training images (sizes {list(sizes)}). {advice}"
            )
        if min(sizes) < options.min_share * sum(sizes) / len(sizes):
            warnings.warn(f"Context {name!r} has {min(sizes)} of {sum(sizes)} training images. {advice}", stacklevel=5)
        return clustering, sizes

    def _vectors_of(self, pixels: Tensor, rows: Sequence[int], stem: Stem | None) -> Tensor:
        """Return the features of images that are clustered, before projection and scale."""
        try:
            if stem is not None:
                return stem.statistics(stem.standardised(pixels))
            if self.model is not None:
                return embed(self.model, pixels, self.options.mean, self.options.std)
        except ContextSourceError as error:
            if rows[0] == 0:
                raise
            raise ContextSourceError(f"Of the images from row {rows[0]} on: {error}") from error
        return pixels.flatten(1)

    def _check_size(self, row: int, height: int, width: int) -> None:
        size = self.clusters.shape[1:]
        if (height, width) != size:
            raise ContextSourceError(
                f"Image {row} is {height}x{width}, the contexts were fitted on {size[0]}x{size[1]} (height x width). "
                f"Resize it, or fit with decode_size={size} to have all resized."
            )

    def _pixel_ids(self, pixels: Tensor) -> Tensor:
        fit = self.clusters
        if not len(pixels):
            return torch.empty(0, dtype=torch.int64, device=pixels.device)
        vectors = self._vectors_of(pixels, [0], fit.stem)
        if fit.projection is not None:
            vectors = project(vectors, *fit.projection, device=self.device)
        elif fit.deviation is not None:
            vectors = vectors / fit.deviation.to(vectors)
        elif self.model is not None:
            vectors = vectors / fit.scale
        return assign(vectors, fit.clustering, device=self.device)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fit = self.clusters
        tensors = {
            "mean": fit.clustering.mean,
            "var": fit.clustering.var,
            "prior": fit.clustering.prior,
            "pca_mean": None if fit.projection is None else fit.projection[0],
            "pca_components": None if fit.projection is None else fit.projection[1],
            "probe": fit.probe,
            "deviation": fit.deviation,
            **({} if fit.stem is None else fit.stem.tensors()),
        }
        config = {
            "options": dataclasses.asdict(self.options),
            "image": {"column": self.image_column, "mode": self.image_mode, "size": self.decode_size},
            "shape": fit.shape,
            "sizes": fit.sizes,
            "objective": fit.clustering.objective,
            "num_iterations": fit.clustering.num_iterations,
            "scale": fit.scale,
            "model": None if self.model is None else describe(self.model),
            "stem": None if fit.stem is None else fit.stem.config(),
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
            decode_size=image["size"],
        )
        source._fit = _read_fit(config, tensors, source.options)
        if model is not None:
            _check_same_model(model, source._fit, source.options, config["model"])
        return source


def _wanted(chunks: Iterable[PixelChunk], sample: Sample) -> Iterator[PixelChunk]:
    for rows, pixels in chunks:
        wanted = [place for place, row in enumerate(rows) if sample.wants(row)]
        yield PixelChunk([rows[place] for place in wanted], pixels[wanted] if len(wanted) < len(rows) else pixels)


def _on_first_process(function: Callable[[], Result]) -> Result:
    """The result, or the error, of ``function()`` in process 0 of the default group, in all of them. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "distributed=True, but these processes have no process group yet. Create an accelerate.Accelerator(), "
                "or call torch.distributed.init_process_group(), first."
            )
        return function()
    outcome: list[Any] = [None, None]
    own: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except BaseException as error:  # also KeyboardInterrupt: the others would wait for ever
            own = error
            told = error if isinstance(error, CnHfError) else ContextSourceError(f"{type(error).__name__}: {error}")
            outcome[1] = type(told)(f"Process 0: {told}")
    dist.broadcast_object_list(outcome, src=0)
    if own is not None:
        raise own
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def _read_fit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ClusterOptions) -> FittedClusters:
    """The fit a saved source describes, its tensors checked."""
    components, (channels, height, width), mean = options.num_contexts, config["shape"], tensors["mean"]
    for side in (channels, height, width):
        check_number("shape", side, least=1, integer=True)
    stem = None if config.get("stem") is None else Stem.read(config["stem"], tensors)
    expected: dict[str, tuple[int, ...]] = {"mean": (components, mean.shape[-1])}
    if options.method == "gmm":
        expected |= {"var": tuple(mean.shape), "prior": (components,)}
    if options.features == "pca":
        features = channels * height * width
        expected |= {"pca_mean": (features,), "pca_components": (mean.shape[-1], features)}
    elif options.features == "pixels":
        expected["mean"] = (components, channels * height * width)
    elif options.features == "model":
        expected["probe"] = (mean.shape[-1],)
    elif stem is not None:
        expected |= {"mean": (components, stem.num_statistics), "deviation": (stem.num_statistics,)}
        expected |= {name: tuple(tensor.shape) for name, tensor in stem.tensors().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or (stem is None) != (options.features != "stem"):
        raise CheckpointError(f"The saved clusters have tensors {found}; their options call for {expected}.")
    for name, tensor in tensors.items():
        least = 0.0 if name == "prior" else -math.inf
        least = torch.finfo(torch.float32).tiny if name in ("var", "deviation") else least
        if not tensor.is_floating_point() or not tensor.isfinite().all() or tensor.min() < least:
            raise CheckpointError(f"The saved clusters' {name} holds values that no fit gives.")
    check_number("scale", config["scale"], above=0)
    check_number("objective", config["objective"])
    for number in (config["num_iterations"], *config["sizes"]):
        check_number("sizes and num_iterations", number, least=0, integer=True)
    if len(config["sizes"]) != components:
        raise CheckpointError(f"Expected {components} sizes of the saved clusters, received {len(config['sizes'])}.")
    return FittedClusters(
        clustering=Clustering(
            mean=mean,
            var=tensors.get("var"),
            prior=tensors.get("prior"),
            objective=float(config["objective"]),
            num_iterations=config["num_iterations"],
        ),
        sizes=tuple(config["sizes"]),
        shape=(channels, height, width),
        projection=(tensors["pca_mean"], tensors["pca_components"]) if options.features == "pca" else None,
        scale=float(config["scale"]),
        probe=tensors.get("probe"),
        stem=stem,
        deviation=tensors.get("deviation"),
    )


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError) as error:  # each kind of device refuses in its own way
        raise ConfigError(f"Device {device!r} cannot be used here for float64 sums ({error}).") from error


def _check_same_model(model: Callable[..., Any], fit: FittedClusters, options: ClusterOptions, name: str) -> None:
    assert fit.probe is not None  # _read_fit requires it for embeddings
    found = probe(model, fit.shape, options.mean, options.std)
    # Loose enough for another device or library version, far tighter than other weights.
    if found.shape != fit.probe.shape or not torch.allclose(found, fit.probe, rtol=1e-2, atol=1e-2 * fit.scale):
        raise ContextSourceError(
            f"The model given ({describe(model)}) embeds a test picture otherwise than the model the contexts were "
            f"fitted with ({name}). Give that one, with its weights and preprocessing."
        )
