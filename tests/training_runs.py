"""A small training run in processes of its own, with everything that could be lost or differ on the way.

Its network has dropout, batch norm and contexts; its data is shuffled, augmented and mixed; weights are averaged; the
best epoch is kept. A fork server imports it, so that a killed run starts again at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from processes import free_port
from torch import Tensor, nn

import cn_hf
from cn_hf.data import DeviceBatches, Mixing, MixingConfig, build_augmentation
from cn_hf.training.config import TrainingConfig
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit

CLASSES, CONTEXTS = 3, 2
CONFIG = TrainingConfig(
    model="small", epochs=3, batch_size=6, optimizer="adamw", learning_rate=0.01, schedule="cosine", warmup_epochs=0.5,
    ema_decay=0.8, clip_grad_norm=1.0, accumulation_steps=2, label_smoothing=0.1, checkpoint_steps=3,
    keep_checkpoints=2, mixup=0.4, progress=False,
)  # fmt: skip


def network(kind: str = "everything") -> nn.Module:
    """A small network: plain with batch norms ("bn"), with one of them patched ("cn", "mn"), or "cn" and dropout.

    "cn without bn" mixes no images.
    """
    torch.manual_seed(1)
    dropout = 0.3 if kind == "everything" else 0.0
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8),
        nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    if kind == "unused":
        model[9].register_parameter("mask", nn.Parameter(torch.ones(3)))
    if kind in ("bn", "unused"):
        return model
    model[5].num_batches_tracked.add_(1)
    if kind == "cn without bn":
        model[1] = nn.Identity()
    if kind == "mn":
        return cn_hf.patch_model(model, mode="mn", where=["5"], num_contexts=2)
    return cn_hf.patch_model(model, mode="cn-channels", num_contexts=CONTEXTS, where=["5"])


def tensors(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randint(0, 156, (count, 3, 9, 9), generator=generator).add(33 * labels.view(-1, 1, 1, 1))
    return images.to(torch.uint8), labels, torch.randint(CONTEXTS, (count,), generator=generator)


def batches(
    config: TrainingConfig, rank: int, processes: int, *, training: bool, dtype: torch.dtype = torch.float32
) -> DeviceBatches:
    images, labels, contexts = tensors()
    part = slice(0, 46) if training else slice(46, 64)
    mixing = Mixing(MixingConfig(mixup=config.mixup), num_classes=CLASSES, num_contexts=CONTEXTS)
    return DeviceBatches(
        images[part], labels[part], contexts[part], batch_size=config.batch_size, shuffle=training, seed=config.seed,
        augment=build_augmentation(("flip", "crop")) if training else None, mean=(0.5,), std=(0.3,),
        num_processes=processes, process_index=rank, mixing=mixing if training else None,
        dtype=dtype,
    )  # fmt: skip


def train(
    folder: str,
    result: str,
    *,
    rank: int = 0,
    processes: int = 1,
    port: int = 0,
    die_at_sync: int | None = None,
    hold_at_sync: int | None = None,
    config: TrainingConfig = CONFIG,
    kind: str = "everything",
    dtype: torch.dtype = torch.float32,
    fsdp: bool = False,
) -> None:
    """One run, resumed from ``folder``; its final weights and history go to ``result``.

    ``die_at_sync`` kills the process by SIGKILL at that call of ``os.fsync``, which is within a save. The main process
    stays in the call ``hold_at_sync`` until ``release`` is called, so that a test meets the run there however busy the
    machine is.
    """
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    if fsdp:  # every module that has parameters by itself
        os.environ.update(
            ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP",
            FSDP_MIN_NUM_PARAMS="0", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
    if die_at_sync is not None:
        _at_sync(die_at_sync, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if hold_at_sync is not None and rank == 0:
        _at_sync(hold_at_sync, lambda: _wait_for(Path(result + ".released")))
    accelerator = make_accelerator(config)
    model = network(kind).to(dtype)
    history = fit(
        model,
        batches(config, rank, processes, training=True, dtype=dtype),
        batches(config, rank, processes, training=False, dtype=dtype),
        config=config,
        accelerator=accelerator,
        output_dir=folder,
        resume=True,
    )
    assert (accelerator.distributed_type == DistributedType.FSDP) == fsdp
    if rank == 0:
        curves = ("train_loss", "validation_loss", "validation_accuracy", "step")
        record = {name: history.curve(name) for name in curves}
        torch.save({"weights": model.state_dict(), "history": record}, result + ".new")
        Path(result + ".new").rename(result)
    if processes > 1:
        torch.distributed.destroy_process_group()


class Starter:
    """Starts ``train`` in processes that have everything imported already."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training_runs"])

    def __call__(self, folder: Path, processes: int = 1, **options: Any) -> list[BaseProcess]:
        """One process per rank; state goes to ``folder/run``, the outcome to ``folder/result.pt``."""
        port = free_port()
        started = []
        for rank in range(processes):
            kwargs = {"rank": rank, "processes": processes, "port": port, **options}
            arguments = (str(folder / "run"), str(folder / "result.pt"))
            started.append(self._context.Process(target=train, args=arguments, kwargs=kwargs, daemon=True))
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


def release(folder: Path) -> None:
    """Let a run go on that ``hold_at_sync`` holds, and the next one through."""
    (folder / "result.pt.released").touch()


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def _at_sync(number: int, action: Callable[[], None]) -> None:
    original, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        original(descriptor)

    os.fsync = fsync
