"""Contexts of a large data set: fitting ``ClusterContexts`` to a ``datasets.Dataset`` of small PNGs, decoding included.

The images are made here. They differ in brightness and colour without falling into groups, as photographs do, so that
the fit has to iterate, and have structure and noise, so that they compress as photographs do.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scripts.benchmark.races import Duel, race
from scripts.benchmark.rivals import fit_gaussian_mixture
from scripts.benchmark.rows import MINUTES, Row, Trial, single
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run

__all__ = ["trials"]

CONTEXTS, SIDE, MILLION = 3, 32, 1_000_000
DIFFERENT = 5_000
"""So many different images are encoded; a larger data set holds them several times, each decoded whenever it comes."""
RIVAL = "GaussianMixture.fit"


def trials(settings: Settings) -> list[Trial]:
    """The fit on many images, and on decoded pixels against scikit-learn's; on a CPU, where the images are decoded."""
    if settings.on_gpu:
        return []
    found = [_fit(settings)]
    return found if settings.size == "quick" else [*found, _against_sklearn(settings)]


def _fit(settings: Settings) -> Trial:
    default = settings.of(full=MILLION, quick=20_000, smoke=300)
    count = default if settings.images is None else settings.images
    extrapolated = "" if count == MILLION else f"extrapolated from {count:,}"
    row = Row(
        what="fitting 3 clusters to 1,000,000 images, decoding included",
        shape=f"({count}, 3, {SIDE}, {SIDE})",
        dtype="uint8",
        unit=MINUTES,
        limit=10.0,
        headline=True,
        note=extrapolated,
    )

    def measure() -> list[Row]:
        from cn_hf.contexts import ClusterContexts

        data = png_dataset(count)
        contexts = ClusterContexts(CONTEXTS, num_workers=torch.get_num_threads())
        started = time.perf_counter()
        contexts.fit(data)
        seconds = time.perf_counter() - started
        steps = contexts.clusters.clustering.num_iterations
        words = [extrapolated, f"{count / seconds:,.0f} images/s", f"{steps} iterations"]
        minutes = seconds / 60 * MILLION / count
        return [single(row, minutes, milliseconds=1000 * seconds, note="; ".join(filter(None, words)))]

    return Trial(f"fitting clusters to {count:,} images", (row,), measure)


def _against_sklearn(settings: Settings) -> Trial:
    count = settings.of(full=4_000, quick=0, smoke=100)
    row = Row(what="fitting 3 clusters to decoded images", rival=RIVAL, shape=f"({count}, 3, {SIDE}, {SIDE})")

    def contestants() -> Mapping[str, Run]:
        from cn_hf.contexts import ClusterContexts

        images = drawn_images(count)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        vectors = images.reshape(count, -1).astype(np.float32) / 255
        return {
            row.what: lambda: ClusterContexts(CONTEXTS).fit_images(pixels),
            RIVAL: lambda: fit_gaussian_mixture(vectors, CONTEXTS, reg_covar=1e-3),
        }

    return race(f"fitting {count:,} decoded images", [Duel(row.what, row)], contestants, settings, calls=1)


def drawn_images(count: int, *, side: int = SIDE, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images (count, side, side, 3): a brightness, a colour cast, a coarse pattern and noise, each normal."""
    rng = np.random.default_rng(seed)

    def normal(deviation: float, *shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal((count, *shape), dtype=np.float32) * deviation

    coarse = normal(30, 4, 4, 3).repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    pixels = 120 + normal(35, 1, 1, 1) + normal(20, 1, 1, 3) + coarse + normal(6, side, side, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def png_dataset(count: int) -> Any:
    """A data set of so many images, encoded and held in memory."""
    import datasets
    import PIL.Image

    rows = []
    for array in drawn_images(min(count, DIFFERENT)):
        file = io.BytesIO()
        PIL.Image.fromarray(array).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    different = datasets.Dataset.from_dict({"image": rows}, features=features)
    copies, rest = divmod(count, len(rows))
    return datasets.concatenate_datasets([different] * copies + [different.select(range(rest))] * bool(rest))
