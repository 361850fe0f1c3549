"""The rows of an honest evaluation: how each gets its scores, and what it says of itself.

Every protocol sets the network's inference before each of its batches, since all rows share one pass.

Shapes: batches of n samples, images (n, channels, H, W), T contexts, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ContextSourceError
from cn_hf.evaluation.batch_statistics import batch_statistics, has_batch_norms
from cn_hf.evaluation.leak import mask_to_context
from cn_hf.evaluation.networks import logits_of, network_device
from cn_hf.evaluation.passes import Batch, Protocol
from cn_hf.evaluation.report import BASELINE, CONTEXT_ONLY, MASKED, RowKind
from cn_hf.norm import ContextNorm
from cn_hf.patching.inference import set_inference
from cn_hf.patching.routing import router_of

__all__ = [
    "PAPERS_AND_OURS",
    "Scorer",
    "averaged",
    "batch_norms",
    "fixed_context",
    "leak_check",
    "plus",
    "predicted",
    "shuffled",
    "true_contexts",
]

PAPERS_SETTING = ("batch", "sqrt_t")
PAPERS_AND_OURS = (PAPERS_SETTING, ("learned", "none"))
OVERSHOOT = 0.25  # how far a resize of floating-point images may push pixels out of 0..1
NO_COUNTS = "the training split's images were not counted by class and context (class_counts)"


class Scorer:
    """Logits of a network for a batch; the last baseline's are kept, so that two rows can share them."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._last: tuple[nn.Module, Batch, Tensor] | None = None

    def known(self, network: nn.Module, batch: Batch) -> Tensor:
        """(n, C) logits, the batch's context ids given."""
        images = batch.images.to(network_device(network))
        return self._logits(network(images, context_ids=batch.context_ids), batch)

    def unknown(self, network: nn.Module, batch: Batch) -> Tensor:
        """(n, C) logits without ids, as the network's inference settings say."""
        return self._logits(network(batch.images.to(network_device(network))), batch)

    def shared(self, network: nn.Module, batch: Batch) -> Tensor:
        """``unknown``, without a second forward where the last call had the same network and batch."""
        if self._last is None or self._last[0] is not network or self._last[1] is not batch:
            self._last = (network, batch, self.unknown(network, batch))
        return self._last[2]

    def _logits(self, output: Any, batch: Batch) -> Tensor:
        return logits_of(output, num_samples=batch.labels.numel(), num_classes=self._num_classes)


def true_contexts(score: Scorer, network: nn.Module) -> Protocol:
    """Each sample's own context (Eq. 8)."""
    return Protocol(
        name="true contexts",
        kind="true contexts",
        explanation="the true context of each sample is given (Eq. 8), which must then be known at test time.",
        scores=lambda batch: score.known(network, batch),
        needs_contexts=True,
    )


def fixed_context(score: Scorer, network: nn.Module, context: int, name: str) -> Protocol:
    """The same context for all samples: the paper's Tables IX and X."""

    def scores(batch: Batch) -> Tensor:
        return score.known(network, dataclasses.replace(batch, context_ids=torch.full_like(batch.labels, context)))

    return Protocol(
        name=f"all as {name}",
        kind="deployable",
        explanation=f"every sample is told the context {name}, whatever its own; nothing need be known of it.",
        scores=scores,
    )


def plus(score: Scorer, network: nn.Module, stats: str, scale: str) -> Protocol:
    """CN+ (Eq. 9) in one of its settings.

    Raises:
        ConfigError: a setting is unknown.
    """
    set_inference(network, "cn+", plus_stats=stats, plus_scale=scale)  # refuses a bad setting before the pass

    def scores(batch: Batch) -> Tensor:
        set_inference(network, "cn+", plus_stats=stats, plus_scale=scale)
        return score.unknown(network, batch)

    if stats == "batch":
        of = "statistics of each test batch, so the result depends on what else is in it (here up to {batch} samples)"
    else:
        of = "the learned statistics, each sample on its own"
    factor = "outputs times sqrt(T), which training never saw" if scale == "sqrt_t" else "no factor"
    papers = " The paper's setting." if (stats, scale) == PAPERS_SETTING else ""
    densities = any(isinstance(module, ContextNorm) for module in network.modules())
    return Protocol(
        name=f"CN+ ({stats}, {scale})",
        kind="deployable",
        explanation=f"no contexts given; all are combined by their posteriors (Eq. 9); {of}; {factor}.{papers}",
        scores=scores,
        unavailable=None if densities else "the network has no learned densities to weigh contexts by",
    )


def predicted(
    score: Scorer, network: nn.Module, source: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Protocol:
    """Contexts named by a fitted source; unavailable where there is none or it does not fit the model."""
    protocol = Protocol(
        name="predict",
        kind="deployable",
        explanation="no contexts given; the fitted context source names the context of each image.",
    )
    try:
        set_inference(network, "predict", source=source)
    except (ConfigError, ContextSourceError) as error:
        protocol.unavailable = str(error)
        return protocol
    set_inference(network, "predict", mean=mean, std=std)  # wrong ones are the caller's error

    def scores(batch: Batch) -> Tensor:
        _check_pixels(network, batch.images)
        set_inference(network, "predict")
        return score.unknown(network, batch)

    protocol.scores = scores
    return protocol


def _check_pixels(network: nn.Module, images: Tensor) -> None:
    """A source is shown the pixels that images had before normalization; refuse where mean and std do not lead back."""
    router = router_of(network)
    mean, std = router.pixel_statistics(images)
    if images.numel() == 0:
        return
    pixels = images * std + mean
    low, high = float(pixels.min()), float(pixels.max())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ContextSourceError(
            f"with mean {router.pixel_mean} and std {router.pixel_std} undone, pixels lie in {low:.2f}..{high:.2f} "
            "instead of 0..1; pass the mean and std that the images were normalised with (those of images standardised "
            "one by one are not known, so their contexts cannot be predicted)"
        )


def averaged(score: Scorer, network: nn.Module, max_contexts: int) -> Protocol:
    """The mean over all contexts; unavailable where they are more than ``max_contexts``."""
    num_contexts = router_of(network).config.num_contexts

    def scores(batch: Batch) -> Tensor:
        set_inference(network, "average")
        return score.unknown(network, batch)

    protocol = Protocol(
        name="average",
        kind="deployable",
        explanation=f"no contexts given; all {num_contexts} are tried, and the mean of the softmax outputs decides.",
        scores=scores,
    )
    if num_contexts > max_contexts:
        protocol.unavailable = (
            f"it takes a forward for each of the {num_contexts} contexts; raise max_average_contexts to run it"
        )
    return protocol


def batch_norms(score: Scorer, network: nn.Module) -> list[Protocol]:
    """Batch norms that take the statistics of the test batch, mixed or of one context; none where there are none.

    Domain-specific batch norms have an affine map a context, and so no row without contexts.
    """
    if not has_batch_norms(network) or router_of(network).config.mode == "dsbn":
        return []

    def mixed(batch: Batch) -> Tensor:
        set_inference(network, "cn+")  # of slots that are no batch norms
        with batch_statistics(network):
            return score.unknown(network, batch)

    def one_context(batch: Batch) -> Tensor:
        ids = cast(Tensor, batch.context_ids)  # the pass skips protocols whose contexts are missing
        logits: Tensor | None = None
        with batch_statistics(network):
            for context in sorted(set(ids.tolist())):
                chosen = ids == context
                part = Batch(
                    images=batch.images[chosen], labels=batch.labels[chosen], context_ids=ids[chosen], index=None
                )
                found = score.known(network, part)
                logits = found.new_empty(len(ids), found.shape[1]) if logits is None else logits
                logits[chosen.to(found.device)] = found
        return score.known(network, batch) if logits is None else logits  # None: an empty batch

    return [
        Protocol(
            name="batch statistics, mixed",
            kind="deployable",
            explanation="no contexts given; batch norms take the statistics of each test batch (up to {batch} samples "
            "of any contexts), so the result depends on what else is in it.",
            scores=mixed,
        ),
        Protocol(
            name="batch statistics, one context",
            kind="control",
            explanation="batch norms take the statistics of the samples of one context in each test batch (of up to "
            "{batch} samples), which needs true contexts and many samples of each.",
            scores=one_context,
            needs_contexts=True,
        ),
    ]


def shuffled(score: Scorer, network: nn.Module) -> Protocol:
    """Wrong contexts; the pass is given them in place of the true ones."""
    protocol = true_contexts(score, network)
    protocol.name, protocol.kind = "shuffled contexts", "control"
    if router_of(network).config.num_contexts == 1:
        protocol.unavailable = "there is one context only"
    return protocol


def leak_check(score: Scorer, baselines: Mapping[str, nn.Module], counts: Tensor | None) -> list[Protocol]:
    """The context-only floor, then each baseline masked and as it is; unavailable where something is missing."""
    protocols = [
        Protocol(
            name=CONTEXT_ONLY,
            kind="leak check",
            explanation="a classifier that sees only the context: it guesses the classes most frequent with it in "
            "training.",
            needs_contexts=True,
            unavailable=None if counts is not None else NO_COUNTS,
        )
    ]
    for name, network in baselines.items():
        plain, masked = _baseline_rows(score, name, network, counts)
        protocols += [masked, plain]
    if not baselines:
        kinds: dict[str, RowKind] = {MASKED: "leak check", BASELINE: "baseline"}
        protocols += [
            Protocol(name=name, kind=kind, explanation="", unavailable="no baseline network was given")
            for name, kind in kinds.items()
        ]
    return protocols


def _baseline_rows(score: Scorer, name: str, network: nn.Module, counts: Tensor | None) -> tuple[Protocol, Protocol]:
    suffix = f" ({name})" if name else ""
    plain = Protocol(
        name=f"{BASELINE}{suffix}",
        kind="baseline",
        explanation="a network that never sees contexts.",
        scores=lambda batch: score.shared(network, batch),
    )
    masked = Protocol(
        name=f"{MASKED}{suffix}",
        kind="leak check",
        explanation="the baseline told the true context: logits of classes never seen with it in training are dropped.",
        needs_contexts=True,
    )
    if counts is None:
        masked.unavailable = NO_COUNTS
        return plain, masked

    def scores(batch: Batch) -> Tensor:
        logits = score.shared(network, batch)
        context_ids = cast(Tensor, batch.context_ids)  # the pass skips protocols whose contexts are missing
        return mask_to_context(logits, context_ids.to(logits.device), counts.to(logits.device))

    masked.scores = scores
    return plain, masked
