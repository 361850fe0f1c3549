"""The training loop under Accelerate: one process or several, any network and objective, with or without contexts.

Batches arrive as dicts, already on the device and already sharded by rank: ``pixel_values`` (N, C, H, W), ``labels``
(N,) or weights (N, classes), and, when the data has contexts, ``context_ids``, which go to the network by keyword. The
objective (``objective.py``) defines the loss; it defaults to the cross entropy of a classifier. One optimizer step is
the gradient of the mean loss over the images of all processes, also when the last batch is uneven or goes through the
network in parts: DDP averages the gradients of P processes, so each one weighs the sum of its losses by
P / (images of this step in all processes).

A run is a function of its config, data and starting weights. Its whole state is saved in checkpoints, so that one
that was killed goes on as if it had not been: data order and augmentation follow from seed, epoch and batch number, and
everything else is stored.

N images of a batch on this process, C channels, H and W height and width, P processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from cn_hf.errors import CheckpointError, DivergedError, TrainingError, TrainingInterruptedError
from cn_hf.evaluation.networks import bare_network
from cn_hf.patching.synchronize import synchronize_batch_norms
from cn_hf.processes import explain_lost_process, gathered, on_main, share_buffers, summed
from cn_hf.training.checkpoints import newest_step, save_checkpoint, write_together
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import EpochRecord, History
from cn_hf.training.memory import largest_fitting_batch, out_of_memory, out_of_memory_message
from cn_hf.training.objective import (
    Batch,
    CrossEntropy,
    Objective,
    StepInfo,
    StepLoss,
    TrainingBatches,
    on_device,
    totals,
)
from cn_hf.training.optimization import learning_rate_at, set_learning_rate
from cn_hf.training.preparation import (
    check_equal_lengths,
    find_unused_parameters,
    make_accelerator,
    obey_fsdp_settings,
    prepared,
    reset_loss_scale,
    trained_as_a_whole,
)
from cn_hf.training.progress import ProgressBar
from cn_hf.training.run_folder import CHECKPOINTS, OpenFolder
from cn_hf.training.run_state import RunState
from cn_hf.training.signals import StopRequest

__all__ = ["TrainingBatches", "fit", "make_accelerator"]


def fit(
    model: nn.Module,
    train_batches: TrainingBatches,
    validation_batches: Iterable[Batch] | None,
    *,
    config: TrainingConfig,
    accelerator: Accelerator,
    objective: Objective | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    description: str = "train",
    log_offset: int = 0,
) -> History:
    """Train ``model`` in place.

    Sets the global random seeds to ``config.seed`` (plus the rank), so that networks trained one after the other with
    one config meet the same data order, augmentation and dropout. Batch norms take the statistics of all processes'
    images. SIGTERM, SIGHUP and Ctrl-C end the run at the end of a step (of several processes with GPUs within 20
    steps, when they next tell each other their losses), with a checkpoint. Where Accelerate is set up for FSDP2
    (also on a CPU), parameters are sharded meanwhile, and after an error the network is as it was before.

    Args:
        model: Any network that takes (N, C, H, W) and returns a tensor or an output with ``.logits``.
        train_batches: This process's share of the training data.
        validation_batches: This process's share of the validation data; each image in one process only. None: no
            validation, early stopping or ``keep_best``.
        config: Optimizer, schedule, epochs and the rest; its network, data and context fields are only compared.
        accelerator: See ``make_accelerator``.
        objective: Defines the loss; None: the cross entropy of a classifier.
        output_dir: Folder that gets ``history.json`` after every epoch, and ``checkpoints/``.
        resume: Go on from the newest whole checkpoint in ``output_dir``, where there is one.
        description: What stands before the progress bar and the numbers given to trackers.
        log_offset: Added to the step that trackers are told; of several networks in one run, those trained before.

    Returns:
        One record per epoch.

    Raises:
        TrainingError: The training data is empty or not what the checkpoint was trained on, nothing is trainable, the
            first batch does not fit into memory, or the loss stopped being finite (step and images are named).
        TrainingInterruptedError: A signal asked the run to stop.
        ConfigError: The optimizer refuses ``optimizer_args``, or the checkpoint is of a run with another config.
        CheckpointError: A checkpoint cannot be written, or none can be read.
        ContextIdError: The model has contexts and the batches have none.
    """
    if len(train_batches) == 0 or train_batches.num_samples == 0:
        raise TrainingError("the training data holds no images; check the split and its size")
    obey_fsdp_settings(accelerator)
    check_equal_lengths(len(train_batches))
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None and not resume and newest_step(folder / CHECKPOINTS) > 0:
        raise CheckpointError(f"{folder / CHECKPOINTS} holds a run's; resume it, remove it or give another folder")
    if config.patience is not None and validation_batches is None:
        raise TrainingError(f"patience {config.patience} needs validation data to look at; there is none")
    reset_loss_scale(accelerator)
    find_unused_parameters(model, train_batches, accelerator)
    set_seed(config.seed, device_specific=True)
    with (
        explain_lost_process(),
        contextlib.nullcontext() if folder is None else OpenFolder(folder) as opened,
        trained_as_a_whole(model, accelerator) as network,
        synchronize_batch_norms(network),
        prepared(network, config, accelerator) as (prepared_model, optimizer),
    ):
        objective = CrossEntropy(config.label_smoothing) if objective is None else objective
        loop = _Loop(
            prepared_model, optimizer, train_batches, config, accelerator, objective, opened, description, log_offset
        )
        if resume and folder is not None:
            loop.state.resume(folder / CHECKPOINTS, description)
        with StopRequest() as stop:
            return loop.run(validation_batches, stop)


class _Loop:
    """One run of ``fit``: model and optimizer as Accelerate prepared them, and everything that changes on the way."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: TrainingBatches,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: Objective,
        folder: OpenFolder | None,
        description: str,
        log_offset: int,
    ) -> None:
        self.model, self.optimizer, self.batches, self.log_offset = model, optimizer, batches, log_offset
        self.config, self.accelerator, self.description = config, accelerator, description
        self.opened, self.folder = folder, None if folder is None else folder.path
        self.objective, self.network = objective, bare_network(model)
        fingerprint = None if folder is None else batches.fingerprint()
        self.state = RunState(self.network, optimizer, config, accelerator, fingerprint)
        self.state.place.totals = self._no_totals()
        # Reading the loss stalls a GPU; on a CPU it is free, and a bad step is caught before it changes the weights.
        self.check_every = 1 if accelerator.device.type == "cpu" else 20
        self.pending: list[tuple[Tensor, Tensor | None]] = []
        self.is_first_step = True
        self.clock = time.perf_counter()

    # ------------------------------------------------------------------------------------------------ epochs and steps

    def run(self, validation_batches: Iterable[Batch] | None, stop: StopRequest) -> History:
        config, place = self.config, self.state.place
        done = place.epoch * self.batches.num_samples + int(place.totals[2])
        with ProgressBar(
            config.epochs * self.batches.num_samples,
            initial=done,
            description=self.description,
            enabled=config.progress and self.accelerator.is_main_process,
            device=self.accelerator.device,
        ) as bar:
            while not place.finished:
                self._train_epoch(bar, stop)
                self._close_epoch(validation_batches, bar)
                if place.finished or config.checkpoint_steps is None or self._is_due():
                    self._save()
                self._obey(stop)
        self.state.settle()
        return self.state.history

    def _train_epoch(self, bar: ProgressBar, stop: StopRequest) -> None:
        place = self.state.place
        self.batches.set_epoch(place.epoch, place.batch)
        self.model.train()
        bar.show(epoch=f"{place.epoch + 1}/{self.config.epochs}")
        self.clock = time.perf_counter()
        for batch in self.batches:
            self._step_or_explain(on_device(batch, self.accelerator.device), bar)
            if place.batch == len(self.batches):
                break  # the epoch is closed before anything is saved, so that a step has one state only
            if self._is_due():
                self._collect(bar)
                self._save()
            if stop.received is not None and self.accelerator.num_processes == 1:
                self._collect(bar)
            if not self.pending:
                self._obey(stop)
        self._collect(bar)
        self._stop_clock()

    def _close_epoch(self, validation_batches: Iterable[Batch] | None, bar: ProgressBar) -> None:
        """Validate, record the epoch, keep the weights if they are the best, and move on to the next epoch."""
        config, place = self.config, self.state.place
        loss_sum, correct, count, *further = place.totals
        share_buffers(self.network)
        validation: tuple[float, float] | None = None
        with contextlib.nullcontext() if self.state.average is None else self.state.average.applied():
            if validation_batches is not None:
                validation = self.objective.validate(self.model, validation_batches, self.accelerator)
                bar.show(validation=f"{100 * validation[1]:.1f}%")
            record = EpochRecord(
                epoch=place.epoch + 1,
                step=place.step,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                train_loss=loss_sum / count,
                train_accuracy=correct / count,
                validation_loss=None if validation is None else validation[0],
                validation_accuracy=None if validation is None else validation[1],
                seconds=place.seconds,
                images_per_second=count / place.seconds,
                further={name: value / count for name, value in zip(self.objective.metrics, further, strict=True)},
            )
            if self.state.history.append(record) and config.keep_best:
                self.state.keep_as_best()
        self._log(record.numbers())
        place.epoch, place.batch, place.seconds, place.totals = place.epoch + 1, 0, 0.0, self._no_totals()
        self.state.history.stopped_early = self._out_of_patience()
        place.finished = self.state.history.stopped_early or place.epoch >= config.epochs
        if self.opened is not None:
            on_main(self.opened.check)
            write_together(self.opened.path / "history.json", self.state.history.to_dict())

    def _step_or_explain(self, batch: Batch, bar: ProgressBar) -> None:
        """A training step; where the very first one runs out of memory, the error says what would fit."""
        try:
            self._train_step(batch, bar)
        except (RuntimeError, MemoryError) as error:
            if not self.is_first_step or not out_of_memory(error):
                raise
            raise TrainingError(self._what_would_fit(batch)) from error
        self.is_first_step = False

    def _train_step(self, batch: Batch, bar: ProgressBar) -> None:
        config, accelerator, place = self.config, self.accelerator, self.state.place
        set_learning_rate(self.optimizer, learning_rate_at(place.step, len(self.batches), config))
        count = torch.full((), float(len(batch["labels"])), device=accelerator.device)
        images = summed(count)
        scale = accelerator.num_processes / images
        sums = torch.zeros(len(place.totals), device=accelerator.device)
        parts = self._micro_batches(batch, images)
        for number, part in enumerate(parts, start=1):
            # Gradients are averaged over processes once, with the last part.
            with contextlib.nullcontext() if number == len(parts) else accelerator.no_sync(self.model):
                step = self._loss(self.model, part, images)
                sums += totals(step.loss, step.correct, len(part["labels"]), step.further)
                accelerator.backward(step.loss * scale)
        self.pending.append((sums, batch.get("index")))
        place.step, place.batch = place.step + 1, place.batch + 1
        if len(self.pending) >= self.check_every:
            self._collect(bar)
        if config.clip_grad_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.state.average is not None:
            self.state.average.update()

    def _loss(self, model: nn.Module, batch: Batch, images: Tensor) -> StepLoss:
        """The objective's, for a batch or a part of one; ``images`` are those of the step in all processes."""
        if self.config.channels_last:
            batch = {
                name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
                for name, value in batch.items()
            }
        info = StepInfo(self.state.place.step, len(self.batches) * self.config.epochs, images)
        return self.objective(model, batch, info)

    def _no_totals(self) -> list[float]:
        return [0.0] * (3 + len(self.objective.metrics))

    def _micro_batches(self, batch: Batch, images: Tensor) -> list[Batch]:
        """The parts of a batch that go through the network one after the other.

        Equally many in every process, and so many that none is empty everywhere.
        """
        number = self.config.accumulation_steps
        if number == 1:
            return [batch]
        processes = self.accelerator.num_processes
        number = min(number, len(batch["labels"]) if processes == 1 else math.ceil(images.item() / processes))
        names, values = zip(*batch.items(), strict=True)
        parts = zip(*(value.tensor_split(number) for value in values), strict=True)
        return [dict(zip(names, part, strict=True)) for part in parts]

    def _collect(self, bar: ProgressBar) -> None:
        """Read the pending steps' losses, summed over the processes, so that all of them stop at the same step."""
        if not self.pending:
            return
        place = self.state.place
        steps = summed(torch.stack([sums for sums, _ in self.pending])).tolist()
        rows = [index for _, index in self.pending]
        self.pending.clear()
        for number, sums in enumerate(steps):
            if not math.isfinite(sums[0]):
                self._give_up(place.step - len(steps) + 1 + number, sums[0] / sums[2], rows[number])
            place.totals = [total + value for total, value in zip(place.totals, sums, strict=True)]
        images = sum(sums[2] for sums in steps)
        loss = sum(sums[0] for sums in steps) / images
        bar.show(loss=f"{loss:.3f}")
        bar.advance(int(images), steps=len(steps))
        self._log({"step_loss": loss, "learning_rate": self.optimizer.param_groups[0]["lr"]})

    def _give_up(self, step: int, loss: float, rows: Tensor | None) -> None:
        """End a run whose loss is no longer finite, keeping what is needed to find out why."""
        images = gathered([] if rows is None else rows.tolist())
        shown = ", ".join(map(str, images[:16])) + (", ..." if len(images) > 16 else "")
        where = ""
        if self.folder is not None:
            files = {**self.state.files(), **({"images.pt": images} if self.accelerator.is_main_process else {})}
            path = save_checkpoint(
                self.folder / CHECKPOINTS, step, files, keep=1, accelerator=self.accelerator, prefix="failed"
            )
            now = f"weights of now (step {self.state.place.step})"
            where = f" The {now} and this list are in {path}; the checkpoints before it are kept."
        precision = self.accelerator.mixed_precision
        remedies = "warm-up or clip_grad_norm"
        if precision != "no":
            remedies = f"warm-up, clip_grad_norm or mixed_precision 'no' (now {precision!r})"
        raise DivergedError(
            f"the training loss is {loss} at step {step}, whose images are the dataset's rows [{shown}]; a lower "
            f"learning rate (now {self.optimizer.param_groups[0]['lr']:g}), {remedies} may help.{where}"
        )

    def _what_would_fit(self, batch: Batch) -> str:
        """Try smaller parts of the batch that was too large."""
        divisible = self.objective.divisible
        if divisible:
            images = -(-len(batch["labels"]) // self.config.accumulation_steps)
        else:
            images = sum(len(value) for name, value in batch.items() if name.endswith("pixel_values"))
        fitting = None
        self.optimizer.zero_grad()
        if divisible and self.accelerator.num_processes == 1:  # else a forward can be a matter of all processes

            def attempt(count: int) -> None:
                part = {name: value[:count] for name, value in batch.items()}
                try:
                    with self.accelerator.autocast():
                        images_of_part = torch.tensor(float(count), device=self.accelerator.device)
                        loss = self._loss(self.network, part, images_of_part).loss
                    self.accelerator.backward(loss)
                finally:
                    self.network.zero_grad()

            fitting = largest_fitting_batch(attempt, images)
        return out_of_memory_message(
            self.config,
            images=images,
            fitting=fitting,
            num_processes=self.accelerator.num_processes,
            divisible=divisible,
        )

    def _out_of_patience(self) -> bool:
        history = self.state.history
        if self.config.patience is None or history.best_epoch is None:
            return False
        return len(history.epochs) - history.best_epoch >= self.config.patience

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.state.place.seconds, self.clock = self.state.place.seconds + now - self.clock, now

    def _log(self, numbers: dict[str, float]) -> None:
        named = {f"{self.description}/{name}": number for name, number in numbers.items()}
        self.accelerator.log(named, step=self.log_offset + self.state.place.step)

    # ------------------------------------------------------------------------------------------- stopping and resuming

    def _obey(self, stop: StopRequest) -> None:
        """End the run with a checkpoint if any process was asked to stop."""
        asked = torch.tensor(float(stop.received is not None), device=self.accelerator.device)
        if summed(asked).item() == 0:
            return
        saved = self._save()
        kept = "no output_dir was given, so nothing is kept" if saved is None else f"go on with --resume from {saved}"
        name = stop.received or "another process"
        raise TrainingInterruptedError(f"stopped by {name} after step {self.state.place.step}; {kept}")

    def _save(self) -> Path | None:
        """Write a checkpoint; None where the run has no folder."""
        if self.opened is None:
            return None
        self._stop_clock()
        on_main(self.opened.check)
        path = self.state.save(self.opened.path / CHECKPOINTS)
        self.clock = time.perf_counter()
        return path

    def _is_due(self) -> bool:
        every = self.config.checkpoint_steps
        return every is not None and self.state.place.step % every == 0
