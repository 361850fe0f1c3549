"""One cell: a source network is trained once, then meets the domains in every way that the experiment compares.

Shape legend: ``n`` test images, ``D`` domains, ``m`` unlabelled images of each domain.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import cn_hf
from cn_hf.contexts import ClusterContexts, StatisticsContexts
from cn_hf.evaluation.batch_statistics import batch_statistics, has_batch_norms
from cn_hf.evaluation.domains import DomainRow, Domains, Predict, in_each_domain, shuffled_names
from cn_hf.experiments.shift.corruptions import CORRUPTIONS, TUNING
from cn_hf.experiments.shift.data import ShiftData, domains_of
from cn_hf.experiments.shift.networks import new_network, train
from cn_hf.experiments.shift.rivals import (
    adaptive_batch_norm,
    instance_network,
    standardised,
    stream_row,
    tent,
    tuned_tent_rate,
    unmixing_network,
)
from cn_hf.files import written_whole
from cn_hf.patching.reference import SOURCE

__all__ = ["CONTEXTS", "SOURCE_ROW", "Plan", "run_cell"]

SOURCE_ROW = "source network"
CONTEXTS = "CN, contexts known"
WEIGHTS = "source.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The protocol of a cell, the same for all cells of a budget.

    Attributes:
        network: of ``NETWORKS``.
        dataset: of ``load_shift_data``.
        seed: of weights, order, corruptions and draws.
        epochs: of training.
        learning_rate: the largest of training.
        train_images: at most so many are trained on; 0: all.
        test_images: of each domain.
        unlabelled: images of each domain that contexts are measured on.
        prior: of the reference, in images.
        counts: of unlabelled images, of the curve.
        priors: of the curve.
        severities: of the other curve, besides 5.
    """

    network: str
    dataset: str
    seed: int
    epochs: int
    learning_rate: float = 3e-3
    train_images: int = 0
    test_images: int = 1000
    unlabelled: int = 64
    prior: float = 4.0
    counts: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    priors: tuple[float, ...] = (0.0, 4.0, 16.0)
    severities: tuple[int, ...] = (1, 2, 3, 4)

    @property
    def name(self) -> str:
        """Of the cell."""
        return f"{self.network}.{self.dataset}.seed{self.seed}"


def run_cell(plan: Plan, data: ShiftData, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Train (or load, where that was done before), adapt and evaluate; return results, with rows as ``DomainRow``.

    Args:
        plan: what to compute.
        data: of the plan's data set.
        folder: gets the source's weights and the adapted checkpoint.
        progress: show progress bars.
    """
    started = time.perf_counter()
    network = _source_network(plan, data, folder, progress)
    trained = time.perf_counter()
    most = max(plan.unlabelled, *plan.counts)
    domains = domains_of(data, count=plan.test_images, unlabelled=most, seed=plan.seed)
    rows, facts = _rows(plan, network, data, domains, folder)
    curve = _over_counts(plan, network, domains, progress)
    severities = _over_severities(plan, network, data, rows, progress)
    seconds = {"training": trained - started, "all": time.perf_counter() - started}
    return {**facts, "plan": asdict(plan), "rows": rows, "curve": curve, "severities": severities, "seconds": seconds}


def _source_network(plan: Plan, data: ShiftData, folder: Path, progress: bool) -> nn.Module:
    network = new_network(plan.network, data.num_classes, plan.seed)
    file = folder / WEIGHTS
    if file.is_file():
        network.load_state_dict(safetensors.torch.load_file(file))
        return network.eval()
    count = plan.train_images or len(data.labels)
    train(
        network,
        data.normalised(data.images[:count]),
        data.labels[:count],
        epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        seed=plan.seed,
        progress=progress,
    )
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    with written_whole(file) as temporary:
        safetensors.torch.save_file(state, temporary)
    return network


def _context(domain: str) -> str:
    return SOURCE if domain == "clean" else domain


def _adapted(plan: Plan, network: nn.Module, domains: Domains, images: dict[str, Tensor], prior: float) -> nn.Module:
    """Return a copy with contexts; norms that keep statistics of each sample are given clean reference images."""
    reference = None if has_batch_norms(network) else domains.unlabelled["clean"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Contexts measured on fewer")
        most = max(len(value) for value in images.values())
        return cn_hf.adapt(copy.deepcopy(network), images, reference=reference, prior=prior, max_images=most)


def _known(plan: Plan, network: nn.Module, domains: Domains, count: int, prior: float) -> nn.Module:
    images = {name: x[:count] for name, x in domains.unlabelled.items() if name != "clean"}
    return _adapted(plan, network, domains, images, prior)


def _in_context(model: nn.Module) -> Callable[[str], Predict]:
    return lambda domain: lambda x: model(x, context_ids=_context(domain))


def _rows(
    plan: Plan, network: nn.Module, data: ShiftData, domains: Domains, folder: Path
) -> tuple[list[DomainRow], dict[str, Any]]:
    """Return all rows, and facts beside them."""
    seed, count = plan.seed, plan.unlabelled
    model = _known(plan, network, domains, count, plan.prior)
    cn_hf.save_pretrained(model, folder / "checkpoint")
    names = [_context(name) for name in domains.test]
    source = StatisticsContexts(mean=data.mean.flatten().tolist(), std=data.std.flatten().tolist())
    source.fit({_context(name): images[:count] for name, images in domains.unlabelled.items()}, model=model)

    def predicted(x: Tensor) -> Any:
        ids = source.predict(x)
        return model(x, context_ids=ids.masked_fill(ids < 0, names.index(SOURCE)))

    def shuffled(x: Tensor) -> Any:
        return model(x, context_ids=shuffled_names(names, len(x), seed))

    pooled = torch.cat([x[:count] for name, x in domains.unlabelled.items() if name != "clean"])
    pooled_model = _adapted(plan, network, domains, {"pooled": pooled}, plan.prior)
    rows = [
        in_each_domain(lambda _: network, domains, SOURCE_ROW),
        in_each_domain(lambda _: lambda x: network(standardised(x)), domains, "every image standardised"),
    ]
    facts: dict[str, Any] = {}
    if has_batch_norms(network):
        found, facts["tent_learning_rate"] = _batch_rows(plan, network, data, domains)
        rows += found
    rows += [
        in_each_domain(_in_context(model), domains, CONTEXTS, "the domain's name"),
        in_each_domain(lambda _: predicted, domains, "CN, contexts predicted"),
        _clustered(plan, network, data, domains),
        in_each_domain(lambda _: lambda x: pooled_model(x, context_ids="pooled"), domains, "CN, one pooled context"),
    ]
    for name, options in _PLUS.items():
        cn_hf.set_inference(model, "cn+", **options)
        rows.append(in_each_domain(lambda _: model, domains, name))
    rows.append(in_each_domain(lambda _: shuffled, domains, "CN, shuffled contexts (control)", "a wrong name"))
    right = [(source.predict(x) == source.names.index(_context(name))).float() for name, x in domains.test.items()]
    return rows, {**facts, "named_right": float(torch.cat(right).mean()), "clean": rows[0].accuracy(["clean"])}


_PLUS: dict[str, dict[str, Any]] = {
    "CN+, one posterior a sample": {"plus_stats": "learned", "plus_scale": "none", "plus_posterior": "sample"},
    "CN+, one posterior a vector": {"plus_stats": "learned", "plus_scale": "none", "plus_posterior": "vector"},
    "CN+, the paper's": {"plus_stats": "batch", "plus_scale": "sqrt_t", "plus_posterior": "vector"},
}


def _batch_rows(plan: Plan, network: nn.Module, data: ShiftData, domains: Domains) -> tuple[list[DomainRow], float]:
    """Return the rows of rivals that need batch norms, and TENT's learning rate."""
    seed = plan.seed
    tuning = domains_of(data, list(TUNING), count=plan.test_images, unlabelled=1, seed=seed)
    rate = tuned_tent_rate(network, tuning, seed=seed)
    alone = instance_network(network)
    adapted = {name: adaptive_batch_norm(network, images) for name, images in domains.unlabelled.items()}
    most = len(domains.unlabelled["clean"])

    def run(x: Tensor) -> Tensor:
        with batch_statistics(network):
            logits: Tensor = network(x)
        return logits

    def unmixed() -> Predict:
        return unmixing_network(network, seed=seed)

    batch, domain = "the batch", "200 of its domain"
    return [
        stream_row(lambda: run, domains, "BN of mixed batches", order="mixed", seed=seed, needs=batch),
        stream_row(lambda: run, domains, "BN of batches of one domain", order="one domain", seed=seed, needs=domain),
        stream_row(lambda: run, domains, "BN of batches sorted by class", order="sorted", seed=seed, needs=domain),
        in_each_domain(lambda _: alone, domains, "BN of single images"),
        in_each_domain(
            lambda name: adapted[name], domains, f"AdaBN, {most} images a domain", "the domain's own network"
        ),
        stream_row(lambda: tent(network, rate), domains, "TENT, mixed batches", order="mixed", seed=seed, needs=batch),
        stream_row(
            lambda: tent(network, rate),
            domains,
            "TENT, batches of one domain",
            order="one domain",
            seed=seed,
            needs=domain,
        ),
        stream_row(unmixed, domains, "UnMix-TNS, mixed batches", order="mixed", seed=seed, needs="the stream"),
    ], rate


def _clustered(plan: Plan, network: nn.Module, data: ShiftData, domains: Domains) -> DomainRow:
    """Return the row of domains that nobody named: clusters of the unlabelled images of all domains."""
    pool = torch.cat([images[: plan.unlabelled] for images in domains.unlabelled.values()])
    pixels = data.pixels(pool)
    clusters = ClusterContexts(
        len(domains.test),
        features="stem",
        seed=plan.seed,
        mean=data.mean.flatten().tolist(),
        std=data.std.flatten().tolist(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of small clusters, which the row's accuracy tells
        clusters.fit_images(pixels, model=network)
    ids = clusters.predict(pixels)
    images = {f"cluster_{number}": pool[ids == number] for number in range(len(domains.test)) if (ids == number).any()}
    model = _adapted(plan, network, domains, images, plan.prior)
    places = torch.zeros(len(domains.test), dtype=torch.int64)  # an empty cluster is the source
    for place, name in enumerate(images, start=1):
        places[int(name.removeprefix("cluster_"))] = place

    def predict(x: Tensor) -> Any:
        return model(x, context_ids=places[clusters.predict(data.pixels(x))])

    return in_each_domain(lambda _: predict, domains, "CN, clusters as contexts")


def _over_counts(plan: Plan, network: nn.Module, domains: Domains, progress: bool) -> dict[str, dict[int, float]]:
    """Return the shifted accuracy by prior and number of unlabelled images."""
    shown = Domains({name: domains.test[name] for name in domains.shifted}, domains.labels, domains.unlabelled)
    found: dict[str, dict[int, float]] = {}
    jobs = [(prior, count) for prior in plan.priors for count in plan.counts]
    for prior, count in tqdm(jobs, desc="adapt", leave=False, disable=None if progress else True):
        model = _known(plan, network, domains, count, prior)
        row = in_each_domain(_in_context(model), shown, "")
        found.setdefault(f"{prior:g}", {})[count] = row.accuracy(domains.shifted)
    return found


def _over_severities(
    plan: Plan, network: nn.Module, data: ShiftData, rows: list[DomainRow], progress: bool
) -> dict[str, dict[int, float]]:
    """Return the shifted accuracy of the source and of known contexts by severity."""
    found = {row.name: {5: row.accuracy(list(CORRUPTIONS))} for row in rows if row.name in (SOURCE_ROW, CONTEXTS)}
    for severity in tqdm(plan.severities, desc="severities", leave=False, disable=None if progress else True):
        domains = domains_of(
            data,
            ("clean", *CORRUPTIONS),
            count=plan.test_images,
            unlabelled=plan.unlabelled,
            severity=severity,
            seed=plan.seed,
        )
        model = _known(plan, network, domains, plan.unlabelled, plan.prior)
        shown = Domains({name: domains.test[name] for name in CORRUPTIONS}, domains.labels, domains.unlabelled)
        found[SOURCE_ROW][severity] = in_each_domain(lambda _: network, shown, "").accuracy(list(CORRUPTIONS))
        found[CONTEXTS][severity] = in_each_domain(_in_context(model), shown, "").accuracy(list(CORRUPTIONS))
    return found
