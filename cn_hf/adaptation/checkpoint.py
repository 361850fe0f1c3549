"""``cn-hf adapt``: a checkpoint meets a new domain, known by unlabelled images or by a file of its context.

Shape legend: ``C`` features of a slot, ``T`` contexts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import nn

from cn_hf.adaptation.context_file import add_context_file, is_context_file, save_context
from cn_hf.adaptation.domains import adapt
from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.hub.checkpoint import from_pretrained, save_pretrained
from cn_hf.hub.description import CONFIG_FILE, read_description
from cn_hf.hub.image_files import find_images
from cn_hf.hub.repository import HubOptions, checkpoint_folder
from cn_hf.patching.config import BASELINES
from cn_hf.patching.measure import calibrated_slots, rows_of
from cn_hf.patching.reference import SOURCE, context_index
from cn_hf.patching.routing import router_of
from cn_hf.printing import for_terminal
from cn_hf.reading.loading import load_split

__all__ = ["Distance", "adapt_checkpoint", "distance_from", "domain_images"]

_PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """The distance of a context's statistics from the reference's: medians over the features of each slot.

    Attributes:
        shifts: ``|difference of means| / sigma of the reference``, by slot.
        ratios: ``sigma / sigma of the reference``, by slot.
        images: number of images that the context was measured on; 0 if that is not known.
        reference: in words.
    """

    shifts: dict[str, float]
    ratios: dict[str, float]
    images: int
    reference: str

    def __str__(self) -> str:
        def told(values: dict[str, float]) -> str:
            ordered = sorted(values.values())
            low, high = (pick(values, key=values.__getitem__) for pick in (min, max))
            median = ordered[len(ordered) // 2]
            return f"median {median:.3g}, {values[low]:.3g} ({low}) to {values[high]:.3g} ({high})"

        measured = f"{self.images} images, " if self.images else ""
        return (
            f"{measured}relative to {self.reference}, over {len(self.shifts)} slots:\n"
            f"  |mean - reference| / sigma: {told(self.shifts)}\n"
            f"  sigma / sigma of the reference: {told(self.ratios)}"
        )


def adapt_checkpoint(
    checkpoint: str,
    images: Sequence[str],
    output: Path,
    *,
    name: str | None = None,
    files: Sequence[Path] = (),
    reference: str | None = None,
    prior: float = 4.0,
    max_images: int = 512,
    split: str | None = None,
    norms_only: bool = False,
    device: str = "cpu",
    options: HubOptions | None = None,
) -> str:
    """Add contexts to a copy of a checkpoint, write it, and return what was done, in words.

    Args:
        checkpoint: folder of a checkpoint or run, or ``"user/name"`` on the Hub. It is not changed, unless it is
            ``output``.
        images: of the new domain: see ``domain_images``. Empty where ``files`` are given.
        output: folder for the checkpoint; with ``norms_only`` the file for the new context alone.
        name: of the new context; of ``files``, of which there must then be one, the one it has if None.
        files: contexts that ``norms_only`` wrote.
        reference: the name of a context; images of the domain that the model was trained on; or ``NAME=IMAGES``.
        prior: see ``cn_hf.adapt``, as is ``max_images``.
        max_images: see above.
        split: of a data set.
        norms_only: see ``output``.
        device: where the model runs.
        options: how the Hub is asked.

    Raises:
        CheckpointError: there is no checkpoint, ``output`` is taken by something else, or a file is none of a context.
        ConfigError: options contradict each other, or the name is taken.
        CnHfError: what ``cn_hf.adapt`` raises.
    """
    _check_asked(images, files, name, norms_only)
    _check_output(output, norms_only)
    options = HubOptions() if options is None else options
    folder = checkpoint_folder(
        checkpoint, options, description_file=CONFIG_FILE, files_of=lambda path: read_description(path).files()
    )
    model = from_pretrained(folder, device=device)
    config = router_of(model).config
    if config.mode in BASELINES:
        raise ConfigError(
            f"Expected a model with contexts, received one of the baseline mode {config.mode!r}. Train with a cn mode."
        )
    names = config.context_names or ()
    if files:
        new = [add_context_file(model, file, name) for file in files]
        chosen = None
    else:
        new, chosen = [str(name)], _reference(reference, names)
        adapt(
            model,
            {str(name): domain_images(images, split)},
            reference=chosen,
            prior=prior,
            max_images=max_images,
        )
    parts = [f"context {for_terminal(one)}: {distance_from(model, one, names, chosen)}" for one in new]
    if norms_only:
        save_context(model, new[0], output)
        size = f", {output.stat().st_size / 1000:,.1f} kB"
    else:
        _save(model, folder, output)
        size = f", contexts: {', '.join(map(for_terminal, router_of(model).config.context_names or ()))}"
    return "\n".join([*parts, f"written to {for_terminal(output)}{size}"])


def domain_images(given: Sequence[str], split: str | None = None) -> Any:
    """Return images as ``cn_hf.adapt`` takes them.

    Args:
        given: image files, folders, patterns, ``@LIST``; or one data set: a folder without image files, or an id on the
            Hub.
        split: of a data set; by default its training split, or the only one.

    Raises:
        ConfigError: nothing was given, or a pattern or list holds no image.
        DatasetError: the data set lacks the split.
        DatasetFileError: there is no such folder or data set.
    """
    if len(given) == 1:
        path, is_pattern = Path(given[0]), given[0].startswith("@") or any(sign in given[0] for sign in "*?[")
        is_id = not path.exists() and not is_pattern and path.suffix.lower() not in PIL.Image.registered_extensions()
        if split is not None or is_id or (path.is_dir() and not _holds_images(path)):
            return load_split(given[0], split, default="train")
    elif split is not None:
        raise ConfigError(f"Expected one data set with --split, received {len(given)} paths.")
    return find_images(given)


def distance_from(model: nn.Module, name: str, before: Sequence[str], reference: Any = None) -> Distance:
    """Return how far a context's statistics lie from those of its reference.

    Args:
        model: a patched model that has the context.
        name: of the context.
        before: names of the contexts that it was added to.
        reference: a name among them, ``{name: images}``, or anything else for ``"source"`` or the mean of all.
    """
    router, slots = router_of(model), calibrated_slots(model)
    context = context_index(name, router.config)
    named = next(iter(reference)) if isinstance(reference, dict) else reference
    chosen = named if isinstance(named, str) and named in before else SOURCE if SOURCE in before else None
    weights = torch.zeros(1, router.config.num_contexts, dtype=torch.float64)
    weights[0, : len(before)] = 1 / len(before)
    if chosen is not None:
        weights = torch.zeros_like(weights).index_fill_(1, torch.tensor([list(before).index(chosen)]), 1.0)
    shifts, ratios = {}, {}
    for slot, part in slots.items():
        rows = rows_of(part)
        row = rows.weighted(weights)
        shifts[slot] = float(((rows.mean[context] - row.mean[0]).abs() / row.variance[0].sqrt()).median())
        ratios[slot] = float((rows.variance[context] / row.variance[0]).sqrt().median())
    images = max((int(stored.images[context]) for stored in router.moments.values()), default=0)
    words = "the mean of all contexts" if chosen is None and len(before) > 1 else f"context {chosen or before[0]!r}"
    return Distance(shifts=shifts, ratios=ratios, images=images, reference=for_terminal(words))


def _check_asked(images: Sequence[str], files: Sequence[Path], name: str | None, norms_only: bool) -> None:
    if bool(images) == bool(files):
        received = "both" if images else "neither"
        raise ConfigError(f"Expected images of the new domain, or --from FILE; received {received}. Give one of them.")
    if images and name is None:
        raise ConfigError("Expected --name NAME for the new context, received none.")
    if files and norms_only:
        raise ConfigError("--from and --norms-only exclude each other: the file holds the context already.")
    if len(files) > 1 and name is not None:
        raise ConfigError(f"Expected one --from FILE to give it another --name, received {len(files)} files.")


def _check_output(output: Path, norms_only: bool) -> None:
    if norms_only:
        if output.is_dir() or (output.exists() and not is_context_file(output)):
            raise CheckpointError(
                f"Expected a new file, or one of a context, as the output; {for_terminal(output)} is something else. "
                "Name another, such as -o fog.safetensors."
            )
    elif output.exists() and not (output.is_dir() and ((output / CONFIG_FILE).is_file() or not any(output.iterdir()))):
        raise CheckpointError(
            f"Expected a new folder, or one that holds a checkpoint, as the output; {for_terminal(output)} is "
            "something else, and is left as it is. Name another with -o."
        )


def _reference(text: str | None, names: Sequence[str]) -> Any:
    if text is None or text in names:
        return text
    name, separator, images = text.partition("=")
    if separator and name in names and not Path(text).exists():
        return {name: domain_images([images])}
    is_path = "/" in text or text.startswith("@") or Path(text).exists()
    return domain_images([text]) if is_path else text  # a mistyped name, as cn_hf.adapt will say


def _holds_images(folder: Path) -> bool:
    try:
        return bool(find_images([folder]))
    except ConfigError:
        return False


def _save(model: nn.Module, checkpoint: Path, output: Path) -> None:
    """Write the model, and beside it the image processor that its checkpoint has."""
    base, processor = read_description(checkpoint / CONFIG_FILE).base, checkpoint / _PROCESSOR
    content = processor.read_bytes() if processor.is_file() else None
    save_pretrained(model, output, model_args=base.get("model_args") if base.get("library") == "timm" else None)
    if content is not None and checkpoint.resolve() != output.resolve():
        shutil.copyfile(processor, output / _PROCESSOR)
