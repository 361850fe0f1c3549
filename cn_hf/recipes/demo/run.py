"""``cn-hf demo``: a trained network meets eight new domains that nobody labelled, without network or GPU.

A small batch-norm network is trained on handwritten digits as scanned. Then each domain is known by 64 unlabelled
images, and becomes a context of the network (``cn_hf.adapt``). All test digits are classified in all domains, in one
mixed stream, beside the rivals and the controls that could refute it. The network is saved, loaded again and shown to
give the same results.

Shape legend: ``n`` digits; images are float32 ``(n, 1, 24, 24)``.
"""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import PIL.Image
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import cn_hf
import cn_hf.models  # registers the network with timm
from cn_hf.contexts import StatisticsContexts
from cn_hf.devices import torch_threads
from cn_hf.errors import CheckpointError
from cn_hf.evaluation import write_results
from cn_hf.evaluation.contact_sheet import write_contact_sheet
from cn_hf.evaluation.domains import (
    DomainRow,
    Domains,
    Predict,
    domain_table,
    in_each_domain,
    of_batches,
    plot_domains,
    plot_over_images,
    shuffled_names,
    summary_table,
)
from cn_hf.files import write_whole
from cn_hf.patching.reference import SOURCE
from cn_hf.recipes.demo.data import DOMAINS, demo_domains, in_domain, strokes
from cn_hf.training.run_folder import CHECKPOINT, RESULTS, OpenFolder, held_folder

__all__ = ["adapted", "run_demo", "trained_network"]

TITLE = "Handwritten digits in eight new domains (test digits)"
UNLABELLED = 64
COUNTS = (2, 8, 32, 128)
DRAWS = 3


def run_demo(output_dir: str | Path, *, seed: int = 0, epochs: int = 15, progress: bool = True) -> list[DomainRow]:
    """Train, adapt, evaluate, save, reload; print the results and write them into a folder.

    Args:
        output_dir: Gets ``results.json``, ``table.md``, three PNGs and ``checkpoint/``; other files there stay.
        seed: Of weights, data order and domains.
        epochs: Of the training on clean digits.
        progress: Show progress bars.

    Returns:
        The rows of the table, the network as trained first.

    Raises:
        CheckpointError: The folder cannot be written to, or the reloaded network differs from the saved one.
    """
    started = time.perf_counter()
    # As fast for so small a network, the same result on any number of cores, and untroubled by what else runs there.
    with held_folder(Path(output_dir)) as held, torch_threads(1):
        return _run(held, seed, epochs, progress, started)


def _run(held: OpenFolder, seed: int, epochs: int, progress: bool, started: float) -> list[DomainRow]:
    folder = held.path
    images, labels, domains = demo_domains(seed)
    network = trained_network(images, labels, seed=seed, epochs=epochs, progress=progress)
    print(
        f"A batch-norm network, trained on {len(images)} clean digits, meets {len(DOMAINS)} new domains. Each is known "
        f"by {UNLABELLED} unlabelled images; {len(domains.labels)} test digits are classified in each."
    )
    model = adapted(network, domains, UNLABELLED)
    rows, named = _rows(network, model, domains, seed)
    table = summary_table(rows, domains)
    print(f"\n{table}\n\n{domain_table(_shown(rows), domains)}\n\nContexts named right: {100 * named:.1f} % of images.")
    curve = _over_images(network, domains, seed, progress)
    held.check()
    model_again = _save_and_reload(model, folder / CHECKPOINT, rows, domains)
    seconds = time.perf_counter() - started
    _write(folder, rows, domains, table, curve, {"seed": seed, "named_right": named, "seconds": seconds})
    print(
        f"\nReloaded from {CHECKPOINT}/ with cn_hf.from_pretrained, same accuracy: {100 * model_again:.1f} %. Written "
        f"to {folder} in {seconds:.0f} s.\nNext: cn-hf inspect {folder / CHECKPOINT}"
    )
    return rows


def trained_network(images: Tensor, labels: Tensor, *, seed: int, epochs: int, progress: bool) -> nn.Module:
    """Train the digits network on clean images, ``(n, 1, 24, 24)``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model("cn_digits_convnet", in_chans=1)
    steps = epochs * len(images) // 64
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="train", unit="step", leave=False, disable=None if progress else True):
        rows = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    trained: nn.Module = network.eval()
    return trained


def adapted(network: nn.Module, domains: Domains, count: int, first: int = 0) -> nn.Module:
    """Return a copy of the network with a context for each domain, measured on ``count`` unlabelled images."""
    images = {name: domains.unlabelled[name][first : first + count] for name in domains.shifted}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Contexts measured on fewer")
        return cn_hf.adapt(copy.deepcopy(network), images)


def _context(domain: str) -> str:
    return SOURCE if domain == "clean" else domain


def _rows(network: nn.Module, model: nn.Module, domains: Domains, seed: int) -> tuple[list[DomainRow], float]:
    """Return all rows, and the part of images whose context is named right."""
    source = StatisticsContexts()
    source.fit({_context(name): images[:UNLABELLED] for name, images in domains.unlabelled.items()}, model=model)
    names = [_context(name) for name in domains.test]
    pooled = torch.cat([domains.unlabelled[name][:UNLABELLED] for name in domains.shifted])
    all_in_one = cn_hf.adapt(copy.deepcopy(network), {"pooled": pooled}, max_images=len(pooled))

    def in_context(domain: str) -> Predict:
        return lambda x: model(x, context_ids=_context(domain))

    def predicted(x: Tensor) -> Any:
        ids = source.predict(x)
        return model(x, context_ids=ids.masked_fill(ids < 0, names.index(SOURCE)))

    def shuffled(x: Tensor) -> Any:
        return model(x, context_ids=shuffled_names(names, len(x), seed))

    rows = [
        in_each_domain(lambda _: network, domains, "as trained (each image standardised)"),
        of_batches(network, domains, "batch norm of mixed batches of 200", mixed=True, seed=seed, needs="the batch"),
        of_batches(
            network, domains, "batch norm of batches of one domain", mixed=False, seed=seed, needs="200 of its domain"
        ),
        in_each_domain(in_context, domains, f"CN, {UNLABELLED} images a domain", "the domain's name"),
        in_each_domain(lambda _: predicted, domains, "CN, contexts predicted", ""),
        in_each_domain(lambda _: model, domains, "CN+, one posterior a sample", ""),
        in_each_domain(lambda _: lambda x: all_in_one(x, context_ids="pooled"), domains, "one context for all domains"),
        in_each_domain(lambda _: shuffled, domains, "CN, shuffled contexts (control)", "a wrong name"),
    ]
    right = [(source.predict(x) == source.names.index(_context(name))).float() for name, x in domains.test.items()]
    return rows, float(torch.cat(right).mean())


def _shown(rows: list[DomainRow]) -> list[DomainRow]:
    return [rows[0], rows[1], rows[3], rows[4]]


def _over_images(network: nn.Module, domains: Domains, seed: int, progress: bool) -> dict[int, list[float]]:
    """Return accuracies in shifted domains with other numbers of unlabelled images, several draws of each."""
    found: dict[int, list[float]] = {}
    jobs = [(count, draw) for count in COUNTS for draw in range(DRAWS)]
    for count, draw in tqdm(jobs, desc="adapt", unit="draw", leave=False, disable=None if progress else True):
        model = adapted(network, domains, count, first=draw * COUNTS[-1])
        row = in_each_domain(
            lambda domain, model=model: lambda x: model(x, context_ids=_context(domain)),  # type: ignore[misc]
            domains,
            "",
        )
        found.setdefault(count, []).append(row.accuracy(domains.shifted))
    return found


def _save_and_reload(model: nn.Module, folder: Path, rows: list[DomainRow], domains: Domains) -> float:
    """Save the adapted network, load it again and evaluate what was loaded."""
    cn_hf.save_pretrained(model, folder)
    loaded = cn_hf.from_pretrained(folder).eval()
    again = in_each_domain(lambda domain: lambda x: loaded(x, context_ids=_context(domain)), domains, "reloaded")
    known = next(row for row in rows if "images a domain" in row.name)
    if any(not torch.equal(again.correct[name], known.correct[name]) for name in domains.test):
        raise CheckpointError("The reloaded network classifies other images right than the saved one.")
    return again.accuracy(domains.shifted)


def _write(
    folder: Path,
    rows: list[DomainRow],
    domains: Domains,
    table: str,
    curve: dict[int, list[float]],
    facts: dict[str, Any],
) -> None:
    try:
        x, _ = strokes()
        sheet = {name: [_picture(image) for image in in_domain(name, x[:12], 0)] for name in domains.test}
        write_contact_sheet([sheet], folder / "domains.png", title="The domains, each image standardised", height=56)
        plot_domains(_shown(rows), domains, folder / "accuracy.png", title=TITLE)
        plot_over_images(
            {"CN, contexts known": curve},
            {rows[0].name: rows[0].accuracy(domains.shifted), rows[1].name: rows[1].accuracy(domains.shifted)},
            folder / "images.png",
            title=f"{TITLE}: {DRAWS} draws",
        )
        text = f"### {TITLE}\n\n{table}\n\n{domain_table(rows, domains)}\n"
        write_whole(folder / "table.md", text.encode())
        accuracies = {row.name: {name: row.accuracy([name]) for name in domains.test} for row in rows}
        write_results(folder / RESULTS, {**facts, "accuracy": accuracies, "accuracy_over_images": curve})
    except OSError as error:
        raise CheckpointError(f"The results cannot be written to {folder}: {error}") from error


def _picture(image: Tensor) -> PIL.Image.Image:
    pixels = ((image[0] + 1.5) / 4.5 * 255).clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())
