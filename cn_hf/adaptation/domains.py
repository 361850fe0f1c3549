"""``adapt``: a trained model meets new domains, each known by some unlabelled images.

In a batch-norm network this is adaptive batch norm (AdaBN, Li et al. 2016; test-time batch norm, Schneider et al. 2020,
whose prior it has) with a context for each sample, so that it works in mixed streams and on single images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import torch
from torch import nn

from cn_hf.adaptation.images import model_inputs
from cn_hf.errors import ContextIdError, InputTypeError, nearest
from cn_hf.hub.preprocessing import preprocessing_of, record_pixel_statistics
from cn_hf.patching import add_contexts, patch_model, unpatch_model
from cn_hf.patching.calibrate import check_names_to_images
from cn_hf.patching.reference import SOURCE, check_amounts
from cn_hf.patching.routing import RoutedModel, router_of

__all__ = ["adapt"]

M = TypeVar("M", bound=nn.Module)


def adapt(
    model: M,
    images: Mapping[str, Any],
    *,
    reference: Any = None,
    prior: float = 4.0,
    max_images: int = 512,
    image_processor: Any = None,
) -> M:
    """Give a trained model one more context for each new domain, measured on unlabelled images of it; in place.

    A plain model is patched first, its own statistics being the context ``"source"``, and answers as before in it. What
    the model had keeps its output bit for bit. Images are read once; each domain costs one forward of its images.

    Args:
        model: a plain or patched model in evaluation or training mode; that stays.
        images: the domains by name. Each a float tensor as the model takes it, a uint8 tensor ``(N, C, H, W)``, a list
            of PIL images or files, a folder, a ``datasets`` data set or column, or any iterable of batches (tensors,
            mappings with ``pixel_values``, pairs whose second part is ignored). What is not normalised yet goes through
            the model's own preprocessing.
        reference: images of the domain that the model was trained on, in any of these forms; the name of a context; or
            ``{name: images}``. Norms that keep per-sample statistics (LayerNorm, GroupNorm: transformers) need images,
            or a checkpoint that stores its contexts' moments. See ``calibrate``.
        prior: how many images the reference counts for; it helps below 16 images and costs much where it is large.
        max_images: of each domain. Of folders and data sets they lie evenly over it.
        image_processor: of transformers, for a plain transformers model whose images are not normalised yet.

    Returns:
        The same object: ``model(x, context_ids="fog")``.

    Raises:
        ConfigError: a name is taken, or an option is out of range.
        ContextIdError: there is no context of the reference's name.
        PatchError: reference images are needed, or the model cannot be patched.
        DatasetError: there is no image, or a pixel is NaN or infinite.
        DatasetFileError: a folder or file is missing or cannot be read.
        InputTypeError: images of another kind. Whatever the error, the model is as it was.

    Example:
        >>> import cn_hf, timm, torch
        >>> model = timm.create_model("test_resnet").eval()
        >>> model = cn_hf.adapt(model, {"fog": torch.rand(32, 3, 64, 64) * 0.1 + 1})
        >>> model(torch.rand(2, 3, 64, 64), context_ids=["fog", "source"]).shape
        torch.Size([2, 1000])
    """
    if not isinstance(images, Mapping):
        raise InputTypeError(f"Expected domains as {{name: images}}, received {type(images).__name__}.")
    check_names_to_images(images)
    check_amounts(prior, max_images)
    pixels_of = preprocessing_of(model, image_processor)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def preprocess(pictures: Sequence[PIL.Image.Image]) -> torch.Tensor:
        return pixels_of(pictures).to(dtype)

    is_patched = isinstance(model, RoutedModel)
    known = (router_of(model).config.context_names or ()) if is_patched else (SOURCE,)
    start = {
        name: model_inputs(value, preprocess, max_images, f"of context {name!r}") for name, value in images.items()
    }

    def read(value: Any) -> Any:
        return model_inputs(value, preprocess, max_images, "of the reference")

    reference = _reference_inputs(reference, known, read)
    if is_patched:
        add_contexts(model, start=start, reference=reference, prior=prior, max_images=max_images)
        return model
    patch_model(model, context_names=[SOURCE])
    try:
        add_contexts(model, start=start, reference=reference, prior=prior, max_images=max_images)
    except BaseException:
        unpatch_model(model)
        raise
    record_pixel_statistics(model, image_processor)
    return model


def _reference_inputs(reference: Any, known: Sequence[str], read: Callable[[Any], Any]) -> Any:
    """Return a reference as ``add_contexts`` takes it: a name that is a context's, or images read."""
    if reference is None or isinstance(reference, int):
        return reference
    if isinstance(reference, str):
        if reference in known:
            return reference
        if not Path(reference).exists():
            raise ContextIdError(
                f"Expected a context or a folder of images as the reference, received {reference!r}; "
                f"{nearest(reference, known)}"
            )
    if isinstance(reference, Mapping) and len(reference) == 1 and next(iter(reference)) in known:
        return {name: read(value) for name, value in reference.items()}
    return read(reference)
