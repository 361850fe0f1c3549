"""Contexts by a rule: any function of an example or image, and day or night by brightness (paper IV-E).

Shape legend: ``N`` images, ``H`` ``W`` pixels; ids are int64 ``(N,)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from cn_hf.contexts.base import RowContextSource, check_column_name, check_flag, check_names, check_number
from cn_hf.contexts.embedding import describe
from cn_hf.contexts.image_source import ImageContextSource, PixelChunk, in_mode, to_pil
from cn_hf.errors import ConfigError, ContextSourceError, DatasetError, InputTypeError, nearest
from cn_hf.reading.images import (
    check_image_options,
    decode_rows,
    find_image_column,
    images_to_arrays,
    open_image,
    to_image,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BrightnessContexts", "RuleContexts"]

SUBJECTS = ("example", "image")
LUMA = (299, 587, 114)  # thousandths of R, G and B (ITU-R BT.601, as in Pillow's mode L)


class RuleContexts(RowContextSource):
    """The context of a sample is what a function says. Needs no fit.

    The function itself is never saved: ``load`` asks for it again.

    Args:
        fn: from an example (a dict of columns, images as PIL images) to a context's id or name; with ``on="image"``,
            from an upright PIL image.
        names: of the contexts.
        on: ``"example"`` or ``"image"``; with the latter ``predict`` works.
        columns: those an example has; None for all. Images of other columns are not decoded.
        image_column: for ``on="image"``: found by its feature when None.
        image_mode: for ``on="image"``: ``"RGB"`` or ``"L"``.
    """

    type = "rule"
    has_tensors = False
    given = ("fn",)

    def __init__(
        self,
        fn: Callable[[Any], int | str],
        names: Sequence[str],
        *,
        on: str = "example",
        columns: Sequence[str] | None = None,
        image_column: str | None = None,
        image_mode: str = "RGB",
    ) -> None:
        if not callable(fn):
            raise InputTypeError(f"Expected a function as fn, received {fn!r}.")
        if on not in SUBJECTS:
            raise ConfigError(f"Unknown on={on!r}; {nearest(str(on), SUBJECTS)}")
        if columns is not None and (on == "image" or isinstance(columns, str) or not columns):
            raise ConfigError(f"columns is {columns!r}; expected a list of column names, and on='example'.")
        for column in columns or ():
            check_column_name("columns", column)
        check_column_name("image_column", image_column)
        check_image_options(image_mode, None)
        self.fn = fn
        self.on = on
        self.columns = None if columns is None else tuple(columns)
        self.image_column = image_column
        self.image_mode = image_mode
        self._names = check_names(names)

    def __repr__(self) -> str:
        return f"RuleContexts({describe(self.fn)}, names={list(self.names)}, on={self.on!r})"

    @property
    def can_predict(self) -> bool:
        """True if the rule is ``on="image"``."""
        return self.on == "image"

    def predict(self, images: Any) -> Tensor:
        """Contexts of images, for a rule ``on="image"``.

        Args:
            images: uint8 tensor ``(N, C, H, W)``, or a list of PIL images.

        Returns:
            int64 ids ``(N,)``, on the images' device.

        Raises:
            ContextSourceError: the rule needs whole examples, or its answer is no context.
            InputTypeError: neither a uint8 tensor nor PIL images.
        """
        if self.on == "example":
            return super().predict(images)
        if isinstance(images, Tensor):
            pictures: Iterable[PIL.Image.Image] = to_pil(in_mode(images, self.image_mode))
            device = images.device
        else:
            pictures = map(to_image, images_to_arrays(images, self.image_mode, None))
            device = torch.device("cpu")
        ids = [self._id(self.fn(picture), row) for row, picture in enumerate(pictures)]
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        if self.on == "image":
            return [find_image_column(features, self.image_column)]
        return list(features if self.columns is None else self.columns)

    def _batch_ids(
        self, batch: Mapping[str, list[Any]], rows: list[int], features: Mapping[str, Any]
    ) -> npt.NDArray[np.int64]:
        columns = self._columns(features)
        subjects: Iterable[Any]
        if self.on == "image":
            column = columns[0]
            subjects = map(to_image, decode_rows(batch[column], rows, column, mode=self.image_mode, size=None))
        else:
            subjects = (_example(batch, index, rows[index], columns, features) for index in range(len(rows)))
        ids = [self._id(self.fn(subject), row) for row, subject in zip(rows, subjects, strict=True)]
        return np.array(ids, dtype=np.int64)

    def _id(self, value: Any, row: int) -> int:
        """A rule's answer as an id; what is no context is an error naming the row."""
        if isinstance(value, str):
            if value not in self.names:
                raise ContextSourceError(f"The rule called row {row} {value!r}; {nearest(value, self.names)}")
            return self.names.index(value)
        try:
            index = operator.index(bool(value) if isinstance(value, np.bool_) else value)
        except TypeError as error:
            raise ContextSourceError(
                f"The rule returned {value!r} for row {row}; expected a context's id or name."
            ) from error
        if not 0 <= index < len(self.names):
            raise ContextSourceError(
                f"The rule returned {index} for row {row}; expected 0 to {len(self.names) - 1}, one of "
                f"{', '.join(self.names)}."
            )
        return index

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "function": describe(self.fn),
            "on": self.on,
            "columns": self.columns,
            "image": {"column": self.image_column, "mode": self.image_mode},
        }
        return config, {}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        if "fn" not in given:
            raise ContextSourceError(
                f"The rule {config['function']} with contexts {list(config['names'])} was saved without its code. Give "
                "it again: ContextSource.load(folder, fn=function)."
            )
        image = config["image"]
        return cls(
            given["fn"],
            config["names"],
            on=config["on"],
            columns=config["columns"],
            image_column=image["column"],
            image_mode=image["mode"],
        )


def _example(
    batch: Mapping[str, list[Any]], index: int, row: int, columns: Sequence[str], features: Mapping[str, Any]
) -> dict[str, Any]:
    example = {name: batch[name][index] for name in columns}
    for name in columns:
        feature = features[name]
        if isinstance(feature, datasets.Image) and feature.decode and example[name] is not None:
            example[name] = open_image(example[name], row, name, feature.mode)
    return example


class BrightnessContexts(ImageContextSource):
    """Two contexts by an image's mean luma: bright (day) and dark (night).

    Args:
        threshold: images of at least this mean luma (0 to 255) are bright; None finds it on the training split, where
            it parts the images' lumas into the two groups with the largest variance between them (Otsu 1979).
        names: of the bright and of the dark context, in this order.
        image_column: found by its feature when None.
        num_workers: threads that decode; 0 decodes in this one.
    """

    type = "brightness"
    has_tensors = False
    one_size = False

    def __init__(
        self,
        threshold: float | None = None,
        *,
        names: Sequence[str] = ("day", "night"),
        image_column: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(image_column=image_column, image_mode="RGB", decode_size=None, num_workers=num_workers)
        if threshold is not None:
            check_number("threshold", threshold, least=0, most=255)
        self._names = check_names(names)
        if len(self._names) != 2:
            raise ConfigError(f"Expected two names, the bright context's and the dark one's; received {list(names)!r}.")
        self._given = threshold is not None
        self._threshold = None if threshold is None else float(threshold)

    def __repr__(self) -> str:
        return f"BrightnessContexts(threshold={self._threshold}, names={self.names})"

    @property
    def fitted(self) -> bool:
        """True if there is a threshold, given or found."""
        return self._threshold is not None

    @property
    def threshold(self) -> float:
        """Mean luma (0 to 255) from which an image is bright.

        Raises:
            ContextSourceError: none was given, and the source is not fitted.
        """
        if self._threshold is None:
            raise self._not_fitted()
        return self._threshold

    def _fit_chunks(self, chunks: Iterable[PixelChunk]) -> None:
        if self._given:
            return
        lumas = [mean_luma(chunk.pixels).cpu() for chunk in chunks]
        if not lumas:
            raise DatasetError("The training split has no images to find a brightness threshold on.")
        self._threshold = otsu_threshold(torch.cat(lumas))

    def _pixel_ids(self, pixels: Tensor) -> Tensor:
        return (mean_luma(pixels) < self.threshold).long()

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"threshold": self.threshold, "given": self._given, "image": {"column": self.image_column}}, {}

    @classmethod
    def _from_state(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, Callable[..., Any]]
    ) -> Self:
        source = cls(config["threshold"], names=config["names"], image_column=config["image"]["column"])
        check_flag("given", config["given"])
        if config["threshold"] is None:
            raise ConfigError("Expected a threshold, received None.")
        source._given = config["given"]
        return source


def mean_luma(pixels: Tensor) -> Tensor:
    """Mean luma of each image, exact: sums are integers.

    Args:
        pixels: uint8 ``(N, 3, H, W)``.

    Returns:
        float64 ``(N,)``, 0 to 255.
    """
    sums = pixels.sum(dim=(2, 3), dtype=torch.int64)
    weighted = (sums * torch.tensor(LUMA, device=pixels.device)).sum(dim=1)
    return weighted.double() / (sum(LUMA) * pixels.shape[2] * pixels.shape[3])


def otsu_threshold(values: Tensor) -> float:
    """The threshold with the largest variance between the two groups it makes (Otsu 1979), without a histogram.

    Args:
        values: ``(N,)``.

    Returns:
        The middle of the gap between the groups; of several equally good gaps the lowest.

    Raises:
        ContextSourceError: all values are equal.
    """
    ordered = values.double().sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    gap = ordered[1:] > ordered[:-1]
    if not gap.any():
        raise ContextSourceError(
            f"All {len(ordered)} training images have the same brightness ({float(ordered[0]):.1f}), so none can be "
            "found. Give one: BrightnessContexts(threshold=...)."
        )
    low = ordered.cumsum(0)[:-1]
    difference = (ordered.sum() - low) / (len(ordered) - count) - low / count
    between = count * (len(ordered) - count) * difference.square()
    best = int(between.where(gap, -1.0).argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
