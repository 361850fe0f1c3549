"""Choose what evaluation does without context ids (Algorithm 3 of the paper, and two ways it lacks), and beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn

from cn_hf.errors import ConfigError
from cn_hf.norm.choices import check_choice
from cn_hf.patching.config import BASELINES, INFERENCE, ContextNormConfig
from cn_hf.patching.grow import give_own_dimensions
from cn_hf.patching.patch import apply_inference
from cn_hf.patching.reference import context_index
from cn_hf.patching.router import ContextSourceLike
from cn_hf.patching.routing import router_of
from cn_hf.patching.tracking import Tracking, check_references

__all__ = [
    "check_channels",
    "check_fits",
    "needs_ids",
    "per_channel",
    "prediction_settings",
    "restore_settings",
    "set_inference",
    "unknown_of",
]


def set_inference(
    model: nn.Module,
    inference: str | None = None,
    *,
    source: ContextSourceLike | None = None,
    unknown: str | int | None = None,
    plus_stats: str | None = None,
    plus_scale: str | None = None,
    plus_posterior: str | None = None,
    track: float | str | None = "keep",
    track_contexts: Iterable[str | int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Choose what evaluation without ids does.

    Args:
        model: a patched model.
        inference: ``"cn"`` (ids are required), ``"cn+"`` (all contexts combined, Eq. 9), ``"predict"`` (a context
            source names each image's context, then CN), ``"average"`` (the log of the mean softmax over all contexts);
            None leaves it.
        source: a fitted context source for ``"predict"``; stays attached.
        unknown: the context that samples run as where the source names none (its ``predict`` says -1), or ``"cn+"`` to
            combine all contexts for these samples; None leaves it. At first they run as ``"source"`` where the model
            has a context of that name, else by CN+.
        plus_stats: CN+ statistics, ``"learned"`` or the paper's ``"batch"``; None leaves them.
        plus_scale: CN+ factor, ``"none"`` or the paper's ``"sqrt_t"``; None leaves it.
        plus_posterior: CN+ posteriors, ``"sample"`` (one for all vectors of a sample) or the paper's ``"vector"``; None
            leaves it.
        track: contexts follow the images that are given their (hard) id in evaluation: each image of a context replaces
            this part of an exponential average of the slots' moments, after the forward it is in, and only the row of
            that context moves (see ``cn_hf.patching.tracking``). An embedder becomes wider, so that each tracked
            context has a dimension of its own. None or 0 switches it off; ``"keep"`` leaves it. Refused in training
            mode, compiled and exported.
        track_contexts: names or ids of the contexts that follow; None for those that do, or, where none does yet, for
            all but ``"source"``.
        mean: per channel, what was subtracted from pixels in 0..1 before they reach the model; None leaves it (0).
        std: per channel, what they were divided by; None leaves it (1).

    Returns:
        The model.

    Raises:
        ConfigError: an option is unknown, none is given, or the source does not fit the model.
        ContextIdError: there is no such context.
        PatchError: the model is not patched; or norms without stored statistics lack moments to track a context by.
            Whatever the error, the model is unchanged.
    """
    router = router_of(model)
    given = inference, source, unknown, plus_stats, plus_scale, plus_posterior, track_contexts, mean, std
    if all(value is None for value in given) and track == "keep":
        raise ConfigError(f"Expected an inference or another option, received none. Give one of {INFERENCE}.")
    if inference is not None:
        check_choice("inference", inference, INFERENCE)
    options = {
        "inference": inference,
        "plus_stats": plus_stats,
        "plus_scale": plus_scale,
        "plus_posterior": plus_posterior,
    }
    config = router.config.replace(**{name: value for name, value in options.items() if value is not None})
    source = router.source if source is None else source
    if inference == "predict" or (inference is None and config.inference == "predict"):
        _check_source(source, config)
    unknown = router.unknown if unknown is None else unknown_of(unknown, config)
    pixel_mean = router.pixel_mean if mean is None else per_channel("mean", mean)
    pixel_std = router.pixel_std if std is None else per_channel("std", std)
    if mean is not None or std is not None:
        check_channels(model, pixel_mean, pixel_std)
    tracking = _tracking(model, track, track_contexts)
    router.config, router.source, router.unknown = config, source, unknown
    router.pixel_mean, router.pixel_std = pixel_mean, pixel_std
    apply_inference(model, config)
    router.tracking = tracking
    if tracking is not None:
        give_own_dimensions(model, tracking.contexts)
    return model


def _tracking(model: nn.Module, track: Any, contexts: Iterable[str | int] | None) -> Any:
    router = router_of(model)
    old = router.tracking
    if isinstance(track, str) and track == "keep":
        if contexts is None:
            return old
        if old is None:
            raise ConfigError("track_contexts needs track: pass the part of the average that an image replaces, 0.05.")
        track = old.rate
    if track is None or (track == 0 and not isinstance(track, (bool, str))):
        return None
    contexts = old.contexts if contexts is None and old is not None else contexts
    tracking = Tracking(track, contexts, router.config)
    check_references(model, tracking)
    return tracking


def prediction_settings(model: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint keeps of ``unknown=`` and ``track=``, ready for JSON."""
    router = router_of(model)
    return {"unknown": router.unknown, "track": None if router.tracking is None else router.tracking.to_dict()}


def restore_settings(model: nn.Module, unknown: Any, track: Any) -> None:
    """Give a loaded model what ``prediction_settings`` returned.

    Raises:
        ConfigError: they are no such settings.
        ContextIdError: they name contexts that the model lacks.
    """
    router = router_of(model)
    known = None if unknown is None else unknown_of(unknown, router.config)
    tracking = None if track is None else Tracking.from_dict(track, router.config)
    router.unknown, router.tracking = known, tracking


def unknown_of(unknown: str | int, config: ContextNormConfig) -> int | str:
    """Return how samples of no known context run: the id of the context of that name, or ``"cn+"``.

    Raises:
        ConfigError: it is ``"cn+"`` for a model without, or the model has no contexts.
        ContextIdError: there is no such context.
    """
    if config.mode in BASELINES:
        raise ConfigError(f"unknown= belongs to modes with contexts; the model's is {config.mode!r}.")
    if unknown != "cn+" or "cn+" in (config.context_names or ()):
        return context_index(unknown, config)
    if config.mode == "dsbn":
        raise ConfigError('Expected a context as unknown, received "cn+", which mode="dsbn" lacks. Name a context.')
    return unknown


def needs_ids(config: ContextNormConfig, *, has_source: bool) -> bool:
    """True if evaluation without context ids is an error.

    Args:
        config: how the model is patched and runs.
        has_source: it has a context source.
    """
    if config.mode in BASELINES or config.inference == "average":
        return False
    if config.inference == "predict":
        return not has_source
    return config.inference == "cn" or config.mode == "dsbn"


def per_channel(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return the mean or standard deviation of pixels as one number a channel.

    Raises:
        ConfigError: ``values`` are no finite numbers, or, as ``"std"``, not positive.
    """
    if isinstance(values, (bytes, bytearray, Set, Mapping)):  # have no order, or are no numbers
        raise ConfigError(f"{name} must be a list of one number a channel, received {values!r}.")
    try:
        numbers = tuple(float(value) for value in values if not isinstance(value, (bool, str)))
        usable = len(numbers) == len(values) > 0 and all(math.isfinite(number) for number in numbers)
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be one number a channel, received {values!r}.") from error
    if not usable:
        raise ConfigError(f"{name} must be one finite number a channel, received {values!r}.")
    if name == "std" and not all(number > 0 for number in numbers):
        raise ConfigError(f"std must be positive in every channel, received {values!r}.")
    return numbers


def check_channels(model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ``ConfigError`` if pixels' mean or standard deviation are as many as neither 1 nor the image's channels."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    config, described = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    size = tuple(described.get("input_size") or ()) if isinstance(described, dict) else ()
    counts = (getattr(model, "in_chans", None), getattr(config, "num_channels", None), *size[:1])
    known = {count for count in (*counts, getattr(first, "in_channels", None)) if isinstance(count, int)}
    for name, values in (("mean", mean), ("std", std)):
        if known and len(values) not in known | {1}:
            expected = " or ".join(str(count) for count in sorted(known | {1}))
            raise ConfigError(f"Expected {expected} values of {name}, received {len(values)}. Give one per channel.")


def _check_source(source: Any, config: ContextNormConfig) -> None:
    if source is None:
        raise ConfigError('inference="predict" needs a fitted context source: pass source=...')
    kind = type(source).__name__
    if not hasattr(source, "predict"):
        raise ConfigError(f"source must be a context source with predict(images), received {kind}.")
    if not getattr(source, "fitted", True):
        raise ConfigError(f"The {kind} is not fitted: call fit(dataset) with training data, or load a saved one.")
    if not getattr(source, "can_predict", True):
        raise ConfigError(
            f"{kind} cannot tell a context from pixels alone. Use ClusterContexts, BrightnessContexts or "
            "RuleContexts(on='image') to predict, or give context_ids."
        )
    check_fits(source, config)


def check_fits(source: Any, config: ContextNormConfig) -> None:
    """Refuse a source with another number of contexts than the model, or that numbers names of the model's otherwise.

    Raises:
        ConfigError: it is such a source.
    """
    if source.num_contexts != config.num_contexts:
        raise ConfigError(f"The source names {source.num_contexts} contexts, the model has {config.num_contexts}.")
    known = tuple(config.context_names or ())
    names = tuple(getattr(source, "names", ()))
    if moved := [name for number, name in enumerate(names) if name in known and known.index(name) != number]:
        raise ConfigError(
            f"The source numbers its contexts {list(names)} and the model {list(known)}: {moved} would be taken for "
            "others. Patch the model with context_names=source.names."
        )
