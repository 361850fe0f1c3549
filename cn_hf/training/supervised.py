"""The supervised loop: cross entropy under Accelerate, one process or several, any network, with or without contexts.

Batches arrive as dicts, already on the device and already sharded by rank: ``pixel_values`` (N, C, H, W), ``labels``
(N,), and, when the data has contexts, ``context_ids`` (N,), which go to the network by keyword. One optimizer step is
the gradient of the mean loss over the images of all processes, also when the last batch is uneven: DDP averages the
gradients of P processes, so each one weighs the sum of its losses by P / (images of this step in all processes).

N images of a batch on this process, C channels, H and W height and width, P processes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from cn_hf.errors import TrainingError
from cn_hf.evaluation.networks import bare_network, evaluating
from cn_hf.files import write_whole
from cn_hf.patching.routing import RoutedModel
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import EpochRecord, History
from cn_hf.training.optimization import build_optimizer, learning_rate_at, set_learning_rate
from cn_hf.training.progress import ProgressBar

__all__ = ["Batch", "TrainingBatches", "fit", "forward_logits", "make_accelerator", "mean_loss_and_accuracy"]

Batch = Mapping[str, Tensor]


class TrainingBatches(Protocol):
    """What the loop needs of training data: one pass per epoch, a length in batches, a shuffle per epoch."""

    @property
    def num_samples(self) -> int:
        """Images of an epoch over all processes."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Pick the shuffle and augmentation of epoch ``epoch``, counted from 0."""


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator for a run: its processes and devices from the launcher, its precision from the config if given.

    Raises:
        TrainingError: This device lacks the precision, or the process already runs with another one.
    """
    try:
        return Accelerator(mixed_precision=config.mixed_precision)
    except ValueError as error:
        raise TrainingError(
            f"mixed_precision {config.mixed_precision!r} cannot be had here: {error} "
            "Choose 'no', or start the run in another process if this one began with another precision."
        ) from error


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, classes) of a timm or transformers classifier, its contexts given by keyword where it knows any."""
    contexts = {}
    if "context_ids" in batch and isinstance(bare_network(model), RoutedModel):
        contexts["context_ids"] = batch["context_ids"]
    output = model(batch["pixel_values"], **contexts)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits if logits.dtype == torch.float64 else logits.float()


def fit(
    model: nn.Module,
    train_batches: TrainingBatches,
    validation_batches: Iterable[Batch] | None,
    *,
    config: TrainingConfig,
    accelerator: Accelerator,
    output_dir: str | Path | None = None,
    description: str = "train",
) -> History:
    """Train ``model`` in place.

    Sets the global random seeds to ``config.seed`` (plus the rank), so that networks trained one after the other with
    one config meet the same data order, augmentation and dropout.

    Args:
        model: Any image classifier that takes (N, C, H, W) and returns logits or an output with ``.logits``.
        train_batches: This process's share of the training data.
        validation_batches: This process's share of the validation data; each image in one process only. None: no
            validation, early stopping or ``keep_best``.
        config: Optimizer, schedule, epochs and the rest; its network, data and context fields are not read.
        accelerator: See ``make_accelerator``.
        output_dir: Folder that gets ``history.json`` after every epoch.
        description: What stands before the progress bar.

    Returns:
        One record per epoch.

    Raises:
        TrainingError: The training data is empty, nothing is trainable, or the loss stopped being finite (the step is
            named; on a CPU the weights are those before that step).
        ConfigError: The optimizer refuses ``optimizer_args``.
        ContextIdError: The model has contexts and the batches have none.
    """
    if len(train_batches) == 0 or train_batches.num_samples == 0:
        raise TrainingError("the training data holds no images; check the split and its size")
    set_seed(config.seed, device_specific=True)
    _check_equal_lengths(len(train_batches), accelerator)
    optimizer = build_optimizer(model, config)
    with _prepared(model, optimizer, accelerator) as (prepared_model, prepared_optimizer):
        loop = _Loop(prepared_model, prepared_optimizer, train_batches, config, accelerator, description)
        return loop.run(validation_batches, None if output_dir is None else Path(output_dir))


def mean_loss_and_accuracy(model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
    """Mean cross entropy per image and top-1 rate in [0, 1] in eval mode, over the batches of all processes.

    The training flags of the model's modules are put back afterwards.

    Raises:
        TrainingError: There is no image.
    """
    plain = bare_network(model)
    totals = [torch.zeros(3, device=accelerator.device)]
    with evaluating(plain), torch.no_grad(), accelerator.autocast():
        for batch in batches:
            batch = _on_device(batch, accelerator.device)
            logits = forward_logits(plain, batch)
            loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
            totals.append(_totals(loss, logits, batch["labels"]))
    # float64, since a float32 count stops at 16.7 million images.
    local = torch.stack(totals).cpu().double().sum(0)
    loss_sum, correct, count = _summed(local, accelerator).tolist()
    if count == 0:
        raise TrainingError("the validation data holds no images; check validation_split and validation_fraction")
    return loss_sum / count, correct / count


class _Loop:
    """The state of one run of ``fit``: model and optimizer as Accelerate prepared them, and the step counter."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: TrainingBatches,
        config: TrainingConfig,
        accelerator: Accelerator,
        description: str,
    ) -> None:
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.config, self.accelerator, self.description = config, accelerator, description
        self.step = 0
        # Reading the loss stalls a GPU; on a CPU it is free, and a bad step is caught before it changes the weights.
        self.check_every = 1 if accelerator.device.type == "cpu" else 20
        self.pending: list[Tensor] = []
        self.epoch_totals = [0.0, 0.0, 0.0]

    def run(self, validation_batches: Iterable[Batch] | None, output_dir: Path | None) -> History:
        history, best_weights = History(), None
        total = self.config.epochs * self.batches.num_samples
        enabled = self.config.progress and self.accelerator.is_main_process
        with ProgressBar(total, description=self.description, enabled=enabled) as bar:
            for epoch in range(1, self.config.epochs + 1):
                record = self._epoch(epoch, validation_batches, bar)
                is_best = history.append(record)
                if is_best and self.config.keep_best:
                    best_weights = _copy_of_state(bare_network(self.model))
                history.stopped_early = self._out_of_patience(history)
                if output_dir is not None and self.accelerator.is_main_process:
                    write_whole(output_dir / "history.json", json.dumps(history.to_dict(), indent=2).encode())
                if history.stopped_early:
                    break
        if best_weights is not None:
            bare_network(self.model).load_state_dict(best_weights)
        return history

    def _epoch(self, epoch: int, validation_batches: Iterable[Batch] | None, bar: ProgressBar) -> EpochRecord:
        self.batches.set_epoch(epoch - 1)
        self.epoch_totals = [0.0, 0.0, 0.0]
        self.model.train()
        bar.show(epoch=f"{epoch}/{self.config.epochs}")
        started = time.perf_counter()
        for batch in self.batches:
            self._train_step(_on_device(batch, self.accelerator.device), bar)
        self._collect(bar)
        seconds = time.perf_counter() - started
        loss_sum, correct, count = self.epoch_totals
        validation: tuple[float, float] | None = None
        if validation_batches is not None:
            _share_buffers(bare_network(self.model), self.accelerator)
            validation = mean_loss_and_accuracy(self.model, validation_batches, self.accelerator)
            bar.show(validation=f"{100 * validation[1]:.1f}%")
        return EpochRecord(
            epoch=epoch,
            step=self.step,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            train_loss=loss_sum / count,
            train_accuracy=correct / count,
            validation_loss=None if validation is None else validation[0],
            validation_accuracy=None if validation is None else validation[1],
            seconds=seconds,
            images_per_second=count / seconds,
        )

    def _train_step(self, batch: Batch, bar: ProgressBar) -> None:
        set_learning_rate(self.optimizer, learning_rate_at(self.step, len(self.batches), self.config))
        count = torch.full((), float(len(batch["labels"])), device=self.accelerator.device)
        images = _summed(count, self.accelerator)
        logits = forward_logits(self.model, batch)
        loss = F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=self.config.label_smoothing)
        self.pending.append(_totals(loss, logits, batch["labels"]))
        self.step += 1
        if len(self.pending) >= self.check_every:
            self._collect(bar)
        self.accelerator.backward(loss * (self.accelerator.num_processes / images))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _collect(self, bar: ProgressBar) -> None:
        """Read the pending steps' losses, summed over the processes, so that all of them stop at the same step."""
        if not self.pending:
            return
        steps = _summed(torch.stack(self.pending), self.accelerator).tolist()
        first = self.step - len(steps) + 1
        self.pending.clear()
        for step, (loss_sum, correct, count) in enumerate(steps, start=first):
            if not loss_sum - loss_sum == 0.0:
                raise TrainingError(
                    f"the training loss is {loss_sum / count} at step {step}; a lower learning rate, warm-up or "
                    f"mixed_precision 'no' may help (learning rate {self.optimizer.param_groups[0]['lr']:g}, "
                    f"mixed_precision {self.accelerator.mixed_precision!r})"
                )
            for place, value in enumerate((loss_sum, correct, count)):
                self.epoch_totals[place] += value
        images = sum(count for _, _, count in steps)
        bar.show(loss=f"{sum(loss for loss, _, _ in steps) / images:.3f}")
        bar.advance(int(images))

    def _out_of_patience(self, history: History) -> bool:
        if self.config.patience is None or history.best_epoch is None:
            return False
        return len(history.epochs) - history.best_epoch >= self.config.patience


@contextlib.contextmanager
def _prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> Iterator[tuple[nn.Module, Any]]:
    """Model and optimizer as Accelerate wraps them; afterwards the model has its own ``forward`` back."""
    names = ("forward", "_original_forward")
    own: dict[str, Any] = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        accelerator.free_memory()


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _totals(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of losses, number of right answers, number of images: (3,) float32."""
    loss_sum = loss_sum.detach().float()
    correct = (logits.detach().argmax(dim=1) == labels).sum()
    return torch.stack([loss_sum.detach().float(), correct.float(), torch.full_like(loss_sum, len(labels))])


def _summed(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum of ``values`` over all processes."""
    if accelerator.num_processes == 1:
        return values
    total: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return total


def _check_equal_lengths(steps: int, accelerator: Accelerator) -> None:
    """Processes with different numbers of steps would wait for each other forever."""
    lengths = accelerator.gather(torch.tensor([steps], device=accelerator.device)).tolist()
    if len(set(lengths)) > 1:
        raise TrainingError(f"every process needs the same number of batches, got {lengths} by rank; shard them evenly")


def _share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main one's running statistics, so that all validate and keep the same network."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _copy_of_state(model: nn.Module) -> dict[str, Any]:
    """The state dict in the CPU's memory, untouched by further training."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
