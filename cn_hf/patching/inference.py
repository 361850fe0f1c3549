"""What evaluation without context ids does: Algorithm 3 of the paper, and two ways it lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from cn_hf.errors import ConfigError
from cn_hf.norm import ContextNorm
from cn_hf.norm.choices import check_choice
from cn_hf.patching.config import BASELINES, INFERENCE, ContextNormConfig
from cn_hf.patching.router import ContextSourceLike
from cn_hf.patching.routing import router_of

__all__ = ["apply_inference", "check_channels", "check_fits", "needs_ids", "per_channel", "set_inference"]


def set_inference(
    model: nn.Module,
    inference: str,
    *,
    source: ContextSourceLike | None = None,
    plus_stats: str | None = None,
    plus_scale: str | None = None,
    plus_posterior: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Choose what evaluation without ids does.

    Args:
        model: a patched model.
        inference: ``"cn"`` (ids are required), ``"cn+"`` (all contexts combined, Eq. 9), ``"predict"`` (a context
            source names each image's context, then CN), ``"average"`` (the log of the mean softmax over all contexts).
        source: a fitted context source for ``"predict"``; stays attached.
        plus_stats: CN+ statistics, ``"learned"`` or the paper's ``"batch"``; None leaves them.
        plus_scale: CN+ factor, ``"none"`` or the paper's ``"sqrt_t"``; None leaves it.
        plus_posterior: CN+ posteriors, ``"sample"`` (one for all vectors of a sample) or the paper's ``"vector"``; None
            leaves it.
        mean: per channel, what was subtracted from pixels in 0..1 before they reach the model; None leaves it (0).
        std: per channel, what they were divided by; None leaves it (1).

    Returns:
        The model.

    Raises:
        ConfigError: an option is unknown, or the source does not fit the model.
        PatchError: the model is not patched.
    """
    router = router_of(model)
    check_choice("inference", inference, INFERENCE)
    options = {
        "inference": inference,
        "plus_stats": plus_stats,
        "plus_scale": plus_scale,
        "plus_posterior": plus_posterior,
    }
    config = router.config.replace(**{name: value for name, value in options.items() if value is not None})
    source = router.source if source is None else source
    if inference == "predict":
        _check_source(source, config)
    pixel_mean = router.pixel_mean if mean is None else per_channel("mean", mean)
    pixel_std = router.pixel_std if std is None else per_channel("std", std)
    if mean is not None or std is not None:
        check_channels(model, pixel_mean, pixel_std)
    router.config, router.source = config, source
    router.pixel_mean, router.pixel_std = pixel_mean, pixel_std
    apply_inference(model, config)
    return model


def needs_ids(config: ContextNormConfig, *, has_source: bool) -> bool:
    """Whether evaluation without context ids is an error.

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


def apply_inference(model: nn.Module, config: ContextNormConfig) -> None:
    """Hand the inference options to the layers."""
    for module in model.modules():
        if isinstance(module, ContextNorm):
            module.inference = "cn+" if config.inference == "cn+" else "cn"  # else past forward, in silence, CN+
            module.plus_stats = config.plus_stats
            module.plus_scale = config.plus_scale
            module.plus_posterior = config.plus_posterior


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
