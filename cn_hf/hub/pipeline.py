"""transformers pipelines of patched models: ``pipe(image, context="night")``, ``pipe(images, context_ids=[0, 2])``.

The pipelines of image tasks are replaced by subclasses of themselves, which differ for patched models only. Each image
travels with its own id, so that batching, datasets and generators keep them together.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cn_hf.errors import ContextIdError, InputTypeError
from cn_hf.norm.ids import as_tensor
from cn_hf.patching.routing import RoutedModel

__all__ = ["ContextPipeline", "register"]

TASKS = {
    "image-classification": "ImageClassificationPipeline",
    "image-feature-extraction": "ImageFeatureExtractionPipeline",
}


def register() -> None:
    """Let ``transformers.pipeline`` make pipelines that take contexts; calling it again is harmless."""
    from transformers.pipelines import PIPELINE_REGISTRY

    for task, name in TASKS.items():
        entry = PIPELINE_REGISTRY.supported_tasks[task]
        if isinstance(entry["impl"], str):  # resolved when the pipeline is made: nothing is imported before
            implementation: Any = f"{__name__}.{name}"
        else:
            implementation = __getattr__(name)
        PIPELINE_REGISTRY.supported_tasks[task] = {**entry, "impl": implementation}


def __getattr__(name: str) -> Any:
    if name not in TASKS.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _context_pipeline(name)


@cache
def _context_pipeline(name: str) -> type:
    import transformers

    base = getattr(transformers, name)
    return type(name, (ContextPipeline, base), {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__})


@dataclass(frozen=True, slots=True)
class InContext:
    """One image and its context: an id ``(1,)``, or float weights ``(1, T)``."""

    image: Any
    context_ids: Tensor


class DatasetInContext(Dataset[InContext]):
    """Images of a dataset, each with its context."""

    def __init__(self, images: Any, ids: Tensor) -> None:
        self.images, self.ids = images, ids

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> InContext:
        """One image and its context."""
        return InContext(self.images[index], _id_of(self.ids, index))


class ContextPipeline:
    """A mixin for the pipeline of a patched model: it takes contexts."""

    model: Any
    _context_ids: Any = None

    def _sanitize_parameters(self, context_ids: Any = None, context: Any = None, **kwargs: Any) -> Any:
        # Reached with contexts only when the pipeline is made: __call__ takes them out.
        if context_ids is not None or context is not None:
            self._context_ids = self._chosen(context_ids, context)
        return super()._sanitize_parameters(**kwargs)  # type: ignore[misc]  # of the pipeline

    def _chosen(self, context_ids: Any, context: Any) -> Tensor:
        if not isinstance(self.model, RoutedModel):
            raise InputTypeError(
                f"context_ids and context are for patched models, this pipeline has a plain "
                f"{type(self.model).__name__}: call cn_hf.patch_model on it, or load a patched checkpoint."
            )
        if context_ids is not None and context is not None:
            raise ContextIdError("Pass context_ids= or context=, not both: they mean the same.")
        router = self.model.router
        ids = as_tensor(context if context_ids is None else context_ids, router.config.context_names)
        resolved = router.resolve(ids, len(ids) if ids.dim() else 1, torch.device("cpu"))
        return resolved if ids.dim() else resolved[0]

    def __call__(
        self, inputs: Any = None, *args: Any, context_ids: Any = None, context: Any = None, **kwargs: Any
    ) -> Any:
        """As the pipeline does, in the given contexts.

        Args:
            inputs: one image, or a list, dataset or generator of images.
            *args: of the pipeline.
            context_ids: an id or name for all images, or a list of one for each, or float weights ``(N, T)``.
            context: the same, for names.
            **kwargs: of the pipeline.

        Raises:
            ContextIdError: an id or name is unknown, or there is not one for each image.
            InputTypeError: the model is not patched.
        """
        inputs = kwargs.pop("images", inputs)
        ids = self._context_ids if context_ids is None and context is None else self._chosen(context_ids, context)
        if ids is not None and inputs is not None:
            inputs = _in_context(inputs, ids)
        return super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline does; the context goes with the pixels."""
        if not isinstance(image, InContext):
            return super().preprocess(image, *args, **kwargs)  # type: ignore[misc]
        model_inputs = super().preprocess(image.image, *args, **kwargs)  # type: ignore[misc]
        model_inputs["context_ids"] = image.context_ids
        return model_inputs


def _id_of(ids: Tensor, index: int) -> Tensor:
    return ids[index : index + 1] if ids.dim() else ids.reshape(1)


def _in_context(inputs: Any, ids: Tensor) -> Any:
    """The same kind of inputs, each image with its context; ``ids`` is one for all (no dimension) or one for each."""
    if isinstance(inputs, (types.GeneratorType, IterableDataset)):
        return _stream(inputs, ids)
    if isinstance(inputs, (list, tuple, Dataset)):
        count = len(inputs)  # type: ignore[arg-type]  # a map-style dataset has a length
        if ids.dim() and len(ids) != count:
            raise ContextIdError(f"Received {len(ids)} context_ids for {count} images; give one each, or one for all.")
        if isinstance(inputs, Dataset):
            return DatasetInContext(inputs, ids)
        return [InContext(image, _id_of(ids, index)) for index, image in enumerate(inputs)]
    if ids.dim() and len(ids) != 1:
        raise ContextIdError(f"Received {len(ids)} context_ids for one image.")
    return InContext(inputs, _id_of(ids, 0))


def _stream(images: Iterable[Any], ids: Tensor) -> Iterator[InContext]:
    count = 0
    for count, image in enumerate(images, start=1):
        if ids.dim() and count > len(ids):
            break
        yield InContext(image, _id_of(ids, count - 1))
    if ids.dim() and count != len(ids):
        raise ContextIdError(f"Received {len(ids)} context_ids for another number of images; give one each.")
