"""Contexts found in the images themselves: components of a Gaussian mixture or of k-means (paper IV-B).

Fitted on the training split alone and applied to all splits. The clustering sees pixels, their principal components, or
the embeddings that a given model makes of the images. Each image is decoded once for a fit; what is clustered is held
in memory, or beyond a budget in a temporary file, and may be shared by several processes.

Shape legend: ``N`` images, ``C`` channels, ``H`` ``W`` pixels, ``F = C*H*W`` pixel features, ``D`` features clustered,
``K`` components, which are the contexts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from cn_hf.contexts.base import check_names
from cn_hf.contexts.embedding import describe, embed, probe
from cn_hf.contexts.estimators import Clustering, Stopping, assign, cluster, sizes_of
from cn_hf.contexts.image_source import ImageContextSource, PixelChunk
from cn_hf.contexts.principal import principal_components, project, project_all
from cn_hf.contexts.processes import ALONE, Processes
from cn_hf.contexts.row_store import RowStore
from cn_hf.contexts.shared_rows import SharedRows
from cn_hf.contexts.training_vectors import collect, divide_by_deviation
from cn_hf.errors import CheckpointError, ConfigError, ContextSourceError, nearest
from cn_hf.reading.access import DatasetLike, Split, training_split, warn_of_test_split

if TYPE_CHECKING:
    from typing_extensions import Self
from cn_hf.reading.images import accepts_image_size

__all__ = ["ClusterContexts", "ClusterOptions"]

METHODS = ("gmm", "kmeans")
FEATURES = ("pixels", "pca")


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
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
                raise ConfigError(f"{name} is {value!r}; expected a number of at least 0 and below {below}.")
        if self.reg_covar == 0:
            raise ConfigError("reg_covar is 0; expected more: features that never change have no variance.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = (value,) if isinstance(value, int | float) else tuple(value)
            usable = all(math.isfinite(number) and not isinstance(number, bool) for number in numbers)
            if not usable or len(numbers) not in (1, 3) or (name == "std" and not min(numbers) > 0):
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

    Data sets larger than memory are fitted, and given contexts, in bounded memory. A fit depends on the images, the
    options and the seed alone: not on the memory budget, and but for rounding not on processes, threads and device.

    Args:
        num_contexts: how many clusters (the paper's K = 3).
        method: ``"gmm"``: diagonal Gaussians by k-means++ and EM, an image goes to the likeliest; or ``"kmeans"``.
        features: what is clustered: ``"pixels"`` in [0, 1]; ``"pca"``, their leading principal components; or a model
            or function from standardised float images ``(N, C, H, W)`` to embeddings ``(N, D)``.
        image_column: found by its feature when None.
        image_mode: ``"RGB"`` or ``"L"``.
        decode_size: int or (height, width) to resize to; None requires images of one size.
        names: of the contexts; None gives ``cluster_0``, ``cluster_1``, ...
        seed: of sampling, k-means++ and PCA.
        max_iterations: of EM or k-means, at each stage: on samples first, then on all images. Of more than 131,072
            images one pass in mini-batches comes before those over all, which are then three at most; see
            ``estimators``.
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
        num_workers: threads that decode; 0 decodes in this one. They pay for photographs, not for tiny images.
        memory_budget_bytes: decoded pixels (embeddings, where a model makes them) beyond so many bytes are kept in a
            temporary file while fitting, in the folder that ``TMPDIR`` names; the contexts found are the same. Of each
            process, where several fit together.
        device: where passes over the images are computed, a chunk at a time, e.g. ``"cuda"``; None: where the images
            are, the CPU for those of a dataset. An embedding model stays on its own.
    """

    type = "clusters"
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
        max_iterations: int = 100,
        tol: float = 1e-3,
        reg_covar: float = 1e-3,
        min_share: float = 0.01,
        pca_components: int = 64,
        fit_samples: int | None = None,
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
            max_iterations=max_iterations,
            tol=tol,
            reg_covar=reg_covar,
            min_share=min_share,
            pca_components=pca_components,
            fit_samples=fit_samples,
            mean=mean,  # type: ignore[arg-type]  # normalised to a tuple by the options
            std=std,  # type: ignore[arg-type]  # likewise
        )
        if type(memory_budget_bytes) is not int or memory_budget_bytes < 0:
            raise ConfigError(f"memory_budget_bytes is {memory_budget_bytes!r}; expected a number of bytes, 0 or more.")
        self.memory_budget_bytes = memory_budget_bytes
        self.device = None if device is None else _usable(device)
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

    def fit(self, dataset: DatasetLike, *, distributed: bool = False) -> Self:
        """Learn the contexts from the training split alone.

        Args:
            dataset: ``DatasetDict`` or ``IterableDatasetDict``, of which ``"train"`` is used and nothing else; or one
                ``Dataset`` or ``IterableDataset``, taken to be the training split.
            distributed: True: all processes of the default group (as ``accelerate launch`` starts them) fit together.
                Each calls ``fit`` with the whole dataset, reads every image's bytes at most, decodes and holds its own
                part, and ends with the same contexts, those that one process alone would find but for rounding. An
                error of one is raised by all. False: this process fits by itself, whatever the others do.

        Returns:
            The source itself. After an error it is as it was before.

        Raises:
            ConfigError: ``distributed`` in one of several processes that have no process group yet.
            ContextSourceError: fewer images or groups than contexts, an embedding that is none, or no room on the disk.
            DatasetError: no split ``"train"``, a missing column, images of differing sizes.
            DatasetFileError: an image cannot be decoded; names its row.
        """
        processes = Processes.of_group() if distributed else ALONE
        self._fit_split(processes.attempt(lambda: training_split(dataset)), processes)
        return self

    def _fit_split(self, split: Split, processes: Processes = ALONE) -> None:
        warn_of_test_split(split)
        split, rows = self._training_rows(split)
        streamed = isinstance(split, datasets.IterableDataset)
        if not streamed and processes.count > 1:
            places = processes.own_rows(len(split) if rows is None else len(rows))
            rows = places if rows is None else [rows[place] for place in places]
        expected = None if streamed else len(split) if rows is None else len(rows)
        self._fit_chunks(self._split_chunks(split, rows, processes), processes, expected)

    def _fit_chunks(
        self, chunks: Iterable[PixelChunk], processes: Processes = ALONE, expected: int | None = None
    ) -> None:
        options = self.options
        projection, scale = None, 1.0
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(RowStore(self.memory_budget_bytes, expected))
            vectors, seen = collect(chunks, store, self._vectors_of, self._probe, processes, self.device)
            if vectors.count < options.num_contexts:
                raise ContextSourceError(
                    f"{vectors.count} training images cannot form {options.num_contexts} contexts."
                )
            if options.features == "pca":
                limit = min(options.pca_components, vectors.count, vectors.num_features)
                projection = principal_components(vectors, limit, seed=options.seed)
                projected = stack.enter_context(RowStore(self.memory_budget_bytes, len(vectors.rows)))
                vectors = project_all(vectors, *projection, projected)
                projection = projection[0].cpu(), projection[1].cpu()
                store.close()
            elif self.model is not None:
                scale = divide_by_deviation(vectors)
            clustering, sizes = self._cluster(vectors)
        self._check_sizes(sizes)
        self._fit = FittedClusters(
            clustering=clustering,
            sizes=tuple(sizes),
            shape=seen.shape,
            projection=projection,
            scale=scale,
            probe=seen.probe,
        )

    def _cluster(self, vectors: SharedRows) -> tuple[Clustering, list[int]]:
        options = self.options
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
        return clustering.to("cpu"), sizes_of(vectors, clustering)

    def _check_sizes(self, sizes: list[int]) -> None:
        smallest = min(sizes)
        name = self.names[sizes.index(smallest)]
        advice = "Ask for fewer contexts, or try another seed, features or method."
        if smallest == 0:
            raise ContextSourceError(f"Context {name!r} got none of the training images (sizes {sizes}). {advice}")
        if smallest < self.options.min_share * sum(sizes) / len(sizes):
            warnings.warn(f"Context {name!r} has {smallest} of {sum(sizes)} training images. {advice}", stacklevel=5)

    def _vectors_of(self, pixels: Tensor) -> Tensor:
        """What is collected of training images: their pixels, or a model's embeddings of them."""
        if self.model is None:
            return pixels.flatten(1)
        return embed(self.model, pixels, self.options.mean, self.options.std)

    def _probe(self, shape: Sequence[int]) -> Tensor | None:
        return None if self.model is None else probe(self.model, shape, self.options.mean, self.options.std)

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
        vectors = pixels.flatten(1)
        if fit.projection is not None:
            vectors = project(vectors, *fit.projection, device=self.device)
        elif self.model is not None:
            vectors = embed(self.model, pixels, self.options.mean, self.options.std) / fit.scale
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
