"""Small AdaMatch runs in processes of their own, with everything that could be lost or differ on the way."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from processes import free_port
from torch import nn

import cn_hf
from cn_hf.data import DeviceBatches, build_augmentation
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.data import TwoViewBatches
from cn_hf.recipes.adamatch.objective import AdaMatch
from cn_hf.recipes.adamatch.randaugment import RandAugment
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit

CLASSES = 3
CONFIG = AdaMatchConfig(
    model="small", epochs=4, batch_size=5, unlabelled_ratio=2, optimizer="sgd", learning_rate=0.05, ema_decay=0.8,
    checkpoint_steps=2, keep_best=True, progress=False,
)  # fmt: skip


def network(kind: str) -> nn.Module:
    """Two convolutions and batch norms, plain ("none"), with CN on the input ("cn"), or domain-specific ("dsbn")."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    if kind == "cn":
        return cn_hf.patch_model(model, mode="cn-channels", num_contexts=2, where="input")
    return model if kind == "none" else cn_hf.patch_model(model, mode="dsbn", num_contexts=2)


def images(count: int, domain: int, **options: Any) -> DeviceBatches:
    generator = torch.Generator().manual_seed(7 + domain)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pixels = torch.randint(0, 140, (count, 3, 9, 9), generator=generator).add(30 * labels.view(-1, 1, 1, 1))
    pixels = pixels + 50 * domain
    return DeviceBatches(pixels.to(torch.uint8), labels, torch.full((count,), domain), seed=3, mean=(0.5,), std=(0.3,),
                         **options)  # fmt: skip


def batches(
    config: AdaMatchConfig, rank: int = 0, processes: int = 1, dtype: torch.dtype = torch.float32
) -> TwoViewBatches:
    options: dict[str, Any] = {
        "batch_size": config.batch_size, "num_processes": processes, "process_index": rank, "dtype": dtype,
        "augment": build_augmentation(("crop",)),
    }  # fmt: skip
    return TwoViewBatches(
        images(17, 0, **options), images(33, 1, **options), unlabelled_ratio=config.unlabelled_ratio,
        strong=RandAugment(2, 0.5), num_classes=CLASSES,
    )  # fmt: skip


def train(
    folder: str, *, rank: int = 0, processes: int = 1, port: int = 0, kind: str = "none", dtype: str = "float32"
) -> None:
    """One run, resumed from ``folder/run``; its final weights and history go to ``folder/result.pt``."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    accelerator = make_accelerator(CONFIG)
    model, precision = network(kind), getattr(torch, dtype)
    model.to(precision)
    validation = images(
        11, 0, batch_size=4, num_processes=processes, process_index=rank, dtype=precision
    )  # labelled, of the source alone
    history = fit(
        model,
        batches(CONFIG, rank, processes, precision),
        validation,
        config=CONFIG,
        accelerator=accelerator,
        objective=AdaMatch(accelerator, tau=CONFIG.tau, alignment=CONFIG.alignment),
        output_dir=Path(folder) / "run",
        resume=True,
    )
    if rank == 0:
        curves = ("train_loss", "validation_loss", "unlabelled_loss", "confident", "threshold", "step")
        record = {name: history.curve(name) for name in curves}
        torch.save({"weights": model.state_dict(), "history": record}, Path(folder) / "result.new")
        (Path(folder) / "result.new").rename(Path(folder) / "result.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def start(folder: Path, processes: int = 1, **options: Any) -> list[BaseProcess]:
    """One process per rank."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    started = []
    for rank in range(processes):
        kwargs = {"rank": rank, "processes": processes, "port": port, **options}
        started.append(context.Process(target=train, args=(str(folder),), kwargs=kwargs, daemon=True))
        started[-1].start()
    return started


def finish(running: list[BaseProcess]) -> None:
    """Wait for processes that must end well."""
    for process in running:
        process.join(120)
        assert process.exitcode == 0


def outcome(folder: Path) -> dict[str, Any]:
    """Weights and history that a run ended with."""
    result: dict[str, Any] = torch.load(folder / "result.pt", weights_only=True)
    return result
