"""``cn-hf predict``: what a checkpoint sees in image files, with a known context, without one, or with each in turn.

Shape legend: ``N`` images, ``K`` classes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, DatasetFileError, nearest
from cn_hf.hub.description import CLASSIFICATION, check_task
from cn_hf.hub.image_files import MAX_PIXELS, read_image
from cn_hf.hub.preprocessing import label_names_of, to_pixels
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import router_of
from cn_hf.printing import for_terminal

__all__ = ["Prediction", "context_names", "predict", "predict_files", "prediction_lines", "written_as"]


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
        top: classes returned.
        batch_size: images at once.

    Returns:
        image by image, and within an image context by context.

    Raises:
        ConfigError: an unknown context, contexts for a baseline model, or a model that is no classifier.
    """
    shown = map(str, range(len(images))) if names is None else names
    pixels = ((name, to_pixels(model, [image])) for name, image in zip(shown, images, strict=True))
    return list(_predictions(model, pixels, contexts, top, batch_size))


def predict_files(
    model: nn.Module,
    paths: Iterable[Path],
    *,
    contexts: Sequence[str | int | None] = (None,),
    top: int = 5,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    unreadable: Callable[[Path, DatasetFileError], None],
) -> Iterator[Prediction]:
    """Classify image files as ``predict`` does, each read when its turn has come; at most one is in memory.

    Args:
        model: see ``predict``.
        paths: image files; a prediction's ``image`` is the path.
        contexts: see ``predict``.
        top: see ``predict``.
        batch_size: see ``predict``.
        max_pixels: images of more are not read.
        unreadable: called for each file that cannot be read, which is then left out.

    Raises:
        ConfigError: see ``predict``.
    """

    def pixels() -> Iterator[tuple[str, Tensor]]:
        for path in paths:
            try:
                one = to_pixels(model, [read_image(path, max_pixels)])
            except ConfigError:
                raise
            except DatasetFileError as error:
                unreadable(path, error)
            except ValueError as error:  # of a mode that has no 8-bit meaning
                unreadable(path, DatasetFileError(f"{for_terminal(path)} cannot be read: {error}"))
            else:
                yield str(path), one

    return _predictions(model, pixels(), contexts, top, batch_size)


def _predictions(
    model: nn.Module,
    pixels: Iterator[tuple[str, Tensor]],
    contexts: Sequence[str | int | None],
    top: int,
    batch_size: int,
) -> Iterator[Prediction]:
    known = context_names(model)
    given = [context if context is None else _context(context, known) for context in contexts]
    check_task(model, CLASSIFICATION)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    while batch := list(itertools.islice(pixels, batch_size)):
        images = torch.cat([image for _, image in batch]).to(device)
        found = [_best(model, images, None if context is None else known.index(context), top) for context in given]
        for place, (name, _) in enumerate(batch):
            for context, rows in zip(given, found, strict=True):
                labels, probabilities = rows[place]
                yield Prediction(image=name, context=context, labels=labels, probabilities=probabilities)


@torch.no_grad()
def _best(
    model: nn.Module, images: Tensor, context: int | None, top: int
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """Labels and probabilities of the ``top`` classes of each image."""
    output = model(images) if context is None else model(images, context_ids=context)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.ndim != 2 or getattr(model, "num_classes", None) == 0:
        raise ConfigError(f"Expected a classifier of images, received a {type(model).__name__} without classes.")
    labels = label_names_of(model, logits.shape[-1])
    best, order = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        (tuple(labels[number] for number in classes), tuple(values))
        for values, classes in zip(best.tolist(), order.tolist(), strict=True)
    ]


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


def prediction_lines(predictions: Iterable[Prediction]) -> str:
    """Predictions as text, a line each."""
    return "".join(_text(prediction) for prediction in predictions).rstrip("\n")


def written_as(kind: str | None, predictions: Iterable[Prediction]) -> Iterator[str]:
    """Return predictions as the lines of a text, of a CSV file with a header, or of JSON; images with full paths.

    Args:
        kind: ``"csv"``, ``"jsonl"``, or None for text to be read by people.
        predictions: all with the same number of labels.
    """
    for number, prediction in enumerate(predictions):
        if kind is None:
            yield _text(prediction)
        elif kind == "jsonl":
            pairs = zip(prediction.labels, prediction.probabilities, strict=True)
            classes = [{"label": label, "probability": probability} for label, probability in pairs]
            row = {"path": os.path.abspath(prediction.image), "context": prediction.context, "classes": classes}
            yield json.dumps(row) + "\n"
        else:
            if number == 0:
                numbers = range(2, len(prediction.labels) + 1)
                more = [name for n in numbers for name in (f"label_{n}", f"probability_{n}")]
                yield _csv(["path", "context", "label", "probability", *more])
            cells = [c for pair in zip(prediction.labels, prediction.probabilities, strict=True) for c in pair]
            yield _csv([os.path.abspath(prediction.image), prediction.context or "", *cells])


def _text(prediction: Prediction) -> str:
    given = "no context given" if prediction.context is None else f"context {for_terminal(prediction.context)}"
    classes = ", ".join(
        f"{for_terminal(label)} {probability:.1%}"
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    )
    return f"{for_terminal(prediction.image)} ({given}): {classes}\n"


def _csv(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
