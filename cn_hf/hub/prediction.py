"""``cn-hf predict``: what a checkpoint sees in image files, with a known context, without one, or with each in turn.

Shape legend: ``N`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import nn

from cn_hf.errors import ConfigError, DatasetFileError, nearest
from cn_hf.hub.preprocessing import label_names_of, to_pixels
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import router_of
from cn_hf.reading.images import DECODE_ERRORS

__all__ = ["Prediction", "context_names", "open_images", "predict", "prediction_lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One image, one way to run it.

    Attributes:
        image: its name.
        context: the context it was given; None for the model's own way without one.
        labels: the most probable classes, best first.
        probabilities: theirs, in [0, 1].
    """

    image: str
    context: str | None
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def open_images(paths: Sequence[Path]) -> list[PIL.Image.Image]:
    """Read image files.

    Raises:
        DatasetFileError: one is missing or no image.
    """
    images = []
    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                image.load()
                images.append(image)
        except DECODE_ERRORS as error:
            raise DatasetFileError(f"{path} cannot be read as an image: {error}") from error
    return images


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Sequence[PIL.Image.Image],
    *,
    contexts: Sequence[str | int | None] = (None,),
    names: Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 32,
) -> list[Prediction]:
    """Classify images, each once for every given context.

    Args:
        model: a patched classifier.
        images: PIL images of any size and mode.
        contexts: names or numbers of contexts; None for the way ``set_inference`` chose.
        names: of the images; their numbers by default.
        top: classes told.
        batch_size: images at once.

    Returns:
        image by image, and within an image context by context.

    Raises:
        ConfigError: an unknown context, or contexts for a baseline model.
    """
    known = context_names(model)
    given = [context if context is None else _context(context, known) for context in contexts]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    shown = [str(number) for number in range(len(images))] if names is None else list(names)
    found: list[list[Prediction]] = [[] for _ in images]
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(model, images[start : start + batch_size]).to(device)
        for context in given:
            output = model(pixels) if context is None else model(pixels, context_ids=known.index(context))
            logits = output if isinstance(output, torch.Tensor) else output.logits
            labels = label_names_of(model, logits.shape[-1])
            best, order = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
            for offset, (p, classes) in enumerate(zip(best.tolist(), order.tolist(), strict=True)):
                prediction = Prediction(
                    image=shown[start + offset],
                    context=context,
                    labels=tuple(labels[number] for number in classes),
                    probabilities=tuple(p),
                )
                found[start + offset].append(prediction)
    return [prediction for predictions in found for prediction in predictions]


def context_names(model: nn.Module) -> list[str]:
    """Names of a patched model's contexts, numbers as words where they have none; nothing for a baseline."""
    config = router_of(model).config
    if config.mode in BASELINES:
        return []
    return list(config.context_names or map(str, range(config.num_contexts)))


def _context(context: str | int, known: Sequence[str]) -> str:
    number = context if isinstance(context, int) else int(context) if context.isdecimal() else -1
    name = str(context) if context in known or not 0 <= number < len(known) else known[number]
    if name not in known:
        if not known:
            raise ConfigError("the model is a baseline without contexts: leave the context out.")
        raise ConfigError(f"unknown context {context!r}; {nearest(str(context), known)}")
    return name


def prediction_lines(predictions: Sequence[Prediction]) -> str:
    """Predictions as text, a line each."""
    lines = []
    for prediction in predictions:
        told = "no context given" if prediction.context is None else f"context {prediction.context}"
        classes = ", ".join(
            f"{label} {probability:.1%}"
            for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
        )
        lines.append(f"{prediction.image} ({told}): {classes}")
    return "\n".join(lines)
