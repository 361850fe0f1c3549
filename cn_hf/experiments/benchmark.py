"""How much time a training step takes with each norm: BN, CN as an added first layer, CN in conv3's place, MN.

All variants are built first and timed in turn, round after round, so that whatever else the machine does meets all of
them alike. A step is what ``training/supervised.py`` does of it: normalise a batch held on the device, forward,
backward, optimizer. Images are noise, since time does not depend on what they show.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cn_hf.data import DeviceBatches, PreparedData
from cn_hf.errors import CheckpointError, ConfigError, nearest
from cn_hf.evaluation import write_results
from cn_hf.evaluation.environment import run_environment
from cn_hf.evaluation.tables import markdown_table
from cn_hf.training.classifier import build_classifier
from cn_hf.training.config import TrainingConfig
from cn_hf.training.optimization import build_optimizer
from cn_hf.training.validation import forward_logits

__all__ = ["VARIANTS", "Timing", "benchmark", "benchmark_table", "run_benchmark"]

CONTEXTS, CLASSES = 3, 10
PRECISIONS = {"no": None, "bf16": torch.bfloat16}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "convnet": {
        "BN": {"mode": "none"},
        "CN-Channels, added first layer": {"mode": "cn-channels", "where": ["input"]},
        "CN-Channels in conv3's place": {"mode": "cn-channels", "where": ["bn3"]},
        "MN in conv3's place": {"mode": "mn", "where": ["paper"]},
    },
    "vit": {
        "ViT": {"mode": "none"},
        "BN on the input": {"mode": "bn", "where": ["input"]},
        "CN-Patches": {"mode": "cn-patches", "where": ["embed"]},
        "CN-Patches, every norm": {"mode": "cn-patches", "where": ["norms"]},
        "CN-Channels": {"mode": "cn-channels", "where": ["input"]},
    },
}
"""What is compared for each network; the first is what the others are measured against."""

_NETWORKS: dict[str, dict[str, Any]] = {
    "convnet": {"model": "cn_cifar_convnet", "optimizer": "rmsprop"},
    "vit": {"model": "cn_paper_vit", "image_size": 72, "optimizer": "adamw"},
}
_SIDES = {"convnet": 32, "vit": 72}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured of one variant.

    Attributes:
        name: Of the variant.
        seconds: Of a step, one number for each round.
        ratios: To the first variant's step in the same round.
        images_per_second: At the median.
    """

    name: str
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    images_per_second: float

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


def benchmark(
    network: str = "convnet",
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    rounds: int = 15,
    steps: int | None = None,
    mixed_precision: str = "no",
    channels_last: bool = False,
    compile: bool = False,
    progress: bool = True,
) -> list[Timing]:
    """Time training steps of all variants of a network.

    Args:
        network: "convnet" (Table IV's, 32 x 32) or "vit" (section IV-C's, 72 x 72).
        device: Where to.
        batch_size: Images of a step.
        rounds: How often each variant has its turn, after one that does not count.
        steps: In one turn; None: 1 on a CPU, 50 elsewhere, where single steps would measure their launch.
        mixed_precision: "no" or "bf16".
        channels_last: Layout of images and convolutions.
        compile: ``torch.compile`` the networks.
        progress: Show a progress bar.

    Raises:
        ConfigError: An unknown network or precision, or a number below 1.
    """
    if network not in VARIANTS:
        raise ConfigError(f"unknown network {network!r}; {nearest(network, VARIANTS)}")
    if mixed_precision not in PRECISIONS:
        raise ConfigError(f"unknown mixed_precision {mixed_precision!r}; {nearest(mixed_precision, PRECISIONS)}")
    device = _usable(device)
    steps = (1 if device.type == "cpu" else 50) if steps is None else steps
    for option, value in (("batch_size", batch_size), ("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, got {value}")
    data = _noise(_SIDES[network], batch_size, device)
    shared = {**_NETWORKS[network], "batch_size": batch_size, "channels_last": channels_last, "compile": compile}
    run = {
        name: _stepper(TrainingConfig.from_dict({**shared, **options}), data, PRECISIONS[mixed_precision])
        for name, options in VARIANTS[network].items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for name in tqdm([*run] * (1 + rounds), desc=f"{network} on {device}", disable=not progress, leave=False):
        seconds[name].append(_timed(run[name], steps, device))
    return _timings({name: values[1:] for name, values in seconds.items()}, batch_size)


def benchmark_table(timings: Sequence[Timing], *, title: str) -> str:
    """A Markdown table of step times, throughputs and ratios."""
    first = timings[0].name
    rows = [
        [
            timing.name,
            f"{1000 * statistics.median(timing.seconds):,.2f}",
            f"{timing.images_per_second:,.0f}",
            f"{timing.ratio:.3f}",
            f"{min(timing.ratios):.3f} to {max(timing.ratios):.3f}",
        ]
        for timing in timings
    ]
    table = markdown_table(["step with", "ms", "images/s", f"time / {first}'s", "of single rounds"], rows)
    return f"### {title}\n\n{table}"


def run_benchmark(options: Mapping[str, Any], *, threads: int | None = None, output: Path | None = None) -> None:
    """Run ``benchmark(**options)``, print its table and write what was measured, how and where.

    Args:
        options: Of ``benchmark``.
        threads: CPU threads of torch; None: as many as it chose.
        output: JSON file, with the machine in it; None: nothing is written.

    Raises:
        ConfigError: An option is out of range, or the device cannot be had.
        CheckpointError: The file cannot be written.
    """
    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        timings = benchmark(**options)
        used = {**options, "threads": torch.get_num_threads()}
        machine = run_environment()
    finally:
        torch.set_num_threads(before)
    on_cpu = torch.device(options["device"]).type == "cpu"
    where = f"{machine['cpu']}, {machine['threads']} threads" if on_cpu else machine["device"]
    print(benchmark_table(timings, title=f"{options['network']}, batches of {options['batch_size']}, {where}"))
    if output is not None:
        measured = [dataclasses.asdict(timing) for timing in timings]
        try:
            write_results(output, {"options": used, "timings": measured})
        except OSError as error:
            raise CheckpointError(f"{output} cannot be written: {error}") from error


def _usable(device: torch.device | str) -> torch.device:
    try:
        usable = torch.device(device)
        torch.empty(0, device=usable)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be had: {str(error).splitlines()[0]}") from error
    return usable


def _noise(side: int, batch_size: int, device: torch.device) -> PreparedData:
    generator = torch.Generator().manual_seed(0)
    batches = DeviceBatches(
        torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.randint(CLASSES, (batch_size,), generator=generator),
        torch.arange(batch_size) % CONTEXTS,
        batch_size=batch_size,
        mean=(0.5,),
        std=(0.25,),
        device=device,
    )
    return PreparedData(
        train=batches, validation=None, test=None, num_classes=CLASSES, class_names=None,
        context_names=tuple(f"context_{number}" for number in range(CONTEXTS)), context_source=None,
        input_size=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3, skipped={},
    )  # fmt: skip


def _stepper(config: TrainingConfig, data: PreparedData, dtype: torch.dtype | None) -> Callable[[], None]:
    """A function that trains the variant for one step."""
    batches = data.train
    assert batches is not None
    model = build_classifier(config, data).to(batches.device).train()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    optimizer = build_optimizer(model, config)

    def step() -> None:
        (batch,) = batches
        if config.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        with torch.autocast(batches.device.type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(forward_logits(model, batch), batch["labels"])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of one step."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timings(seconds: Mapping[str, Sequence[float]], batch_size: int) -> list[Timing]:
    first = next(iter(seconds.values()))
    return [
        Timing(
            name=name,
            seconds=tuple(values),
            ratios=tuple(value / base for value, base in zip(values, first, strict=True)),
            images_per_second=batch_size / statistics.median(values),
        )
        for name, values in seconds.items()
    ]
