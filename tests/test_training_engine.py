"""What the supervised loop does beside stepping: accumulation, clipping, averages, failures, against plain code."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_training_supervised import CLASSES, TensorBatches, small_config, small_data, small_network, with_contexts
from torch import nn

from cn_hf.errors import CheckpointError, TrainingError
from cn_hf.training.checkpoints import find_checkpoint, save_checkpoint
from cn_hf.training.objective import mean_loss_and_accuracy
from cn_hf.training.optimization import build_optimizer
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit


def trained(model: nn.Module, batches: Any = None, **options: Any) -> nn.Module:
    fit(model, batches or small_data(), None, config=small_config(**options), accelerator=Accelerator())
    return model


def assert_same_weights(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulation_changes_nothing_where_images_do_not_mix(parts: int) -> None:
    model = with_contexts(small_network(), init="random")
    other = copy.deepcopy(model)
    assert_same_weights(trained(model, accumulation_steps=parts), trained(other), 1e-5)


def test_clipping_is_torch_s() -> None:
    model, expected = small_network(), small_network()
    trained(model, optimizer="sgd", clip_grad_norm=0.1)
    optimizer = build_optimizer(expected, small_config(optimizer="sgd"))
    batches = small_data()
    clipped = 0
    for epoch in range(3):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(expected(batch["pixel_values"]), batch["labels"]).backward()
            clipped += nn.utils.clip_grad_norm_(expected.parameters(), 0.1).item() > 0.1
            optimizer.step()
    assert clipped > 5
    assert_same_weights(model, expected)


def test_averaged_weights_are_validated_and_kept() -> None:
    model, expected = small_network(), small_network()
    validation = list(small_data(11, shuffle=False))
    config = small_config(ema_decay=0.7, keep_best=False, optimizer="sgd")
    history = fit(model, small_data(), validation, config=config, accelerator=Accelerator())
    average = {name: value.clone() for name, value in expected.state_dict().items()}
    optimizer = build_optimizer(expected, config)
    batches = small_data()
    for epoch in range(3):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(expected(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()
            for name, value in expected.state_dict().items():
                average[name] = 0.7 * average[name] + 0.3 * value if value.is_floating_point() else value.clone()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], msg=name)
    loss, accuracy = mean_loss_and_accuracy(model, validation, Accelerator())
    assert history.epochs[-1].validation_loss == pytest.approx(loss)
    assert history.epochs[-1].validation_accuracy == pytest.approx(accuracy)


def test_compiled_and_channels_last_train_alike() -> None:
    plain = with_contexts(small_network())
    other = copy.deepcopy(plain)
    trained(plain, epochs=1)
    trained(other, epochs=1, compile=True, channels_last=True)
    assert_same_weights(other, plain, 1e-4)
    assert other._compiled_call_impl is None  # it leaves the loop as it came


def test_bfloat16_trains() -> None:
    model = with_contexts(small_network())
    AcceleratorState._reset_state(reset_partial_state=True)
    config = small_config(epochs=8, mixed_precision="bf16")
    try:
        history = fit(model, small_data(64), None, config=config, accelerator=make_accelerator(config))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


class Unlucky(TensorBatches):
    """Data of which image 17 is not a number."""

    def __init__(self) -> None:
        data = small_data()
        super().__init__(data.images.clone(), data.labels, 5, contexts=data.contexts)
        self.images[17] = float("nan")


def test_a_loss_that_is_no_number_names_its_images(tmp_path: Path) -> None:
    model = small_network()
    data = Unlucky()
    data.set_epoch(0)
    step, batch = next((n, b) for n, b in enumerate(data, start=1) if 17 in b["index"])
    before = copy.deepcopy(model)
    config = small_config(checkpoint_steps=1)
    with pytest.raises(TrainingError, match=f"nan at step {step}, whose images are the dataset's rows") as caught:
        fit(model, data, None, config=config, accelerator=Accelerator(), output_dir=tmp_path)
    listed = str(caught.value).split("rows [")[1].split("]")[0]
    assert listed == ", ".join(map(str, batch["index"].tolist()))
    (kept,) = (tmp_path / "checkpoints").glob("failed-*")
    assert torch.load(kept / "images.pt", weights_only=True) == batch["index"].tolist()
    failed = torch.load(kept / "state-00000.pt", weights_only=True)["model"]
    weights = {name for name, _ in before.named_parameters()}
    assert all(torch.isfinite(failed[name]).all() for name in weights)  # from before the step
    good = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in good] == [f"step-{n:08d}" for n in range(1, step)][-2:]


def test_a_full_disk_ends_the_run_and_keeps_what_there_was(tmp_path: Path) -> None:
    model = small_network()
    config = small_config(checkpoint_steps=2)
    fit(model, small_data(), None, config=config, accelerator=Accelerator(), output_dir=tmp_path)
    newest, last = sorted((tmp_path / "checkpoints").glob("step-*"))[::-1]
    shutil.rmtree(newest)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    assert last in before
    options: dict[str, Any] = {"accelerator": Accelerator(), "output_dir": tmp_path, "resume": True}
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a checkpoint cannot be written: .*MiB free.*--resume"):
            fit(small_network(), small_data(), None, config=config, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


def test_resuming_a_finished_run_gives_its_end(tmp_path: Path) -> None:
    validation = list(small_data(11, shuffle=False))
    config = small_config(keep_best=True)
    first, second = small_network(), small_network()
    options: dict[str, Any] = {"config": config, "accelerator": Accelerator(), "output_dir": tmp_path}
    history = fit(first, small_data(), validation, **options)
    again = fit(second, small_data(), validation, resume=True, **options)
    assert again.to_dict() == history.to_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert json.loads((tmp_path / "history.json").read_text()) == history.to_dict()


def test_soft_labels(tmp_path: Path) -> None:
    class Soft(TensorBatches):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for batch in super().__iter__():
                weights = F.one_hot(batch["labels"], CLASSES).float() * 0.7 + 0.1
                contexts = F.one_hot(batch["context_ids"], 2).float()
                yield {**batch, "labels": weights, "context_ids": contexts}

    data = small_data()
    soft = Soft(data.images, data.labels, 5, contexts=data.contexts)
    model, hard = with_contexts(small_network()), with_contexts(small_network())
    trained(model, soft)
    # weights 0.8 and 0.1 are label smoothing of 0.3 over 3 classes
    trained(hard, label_smoothing=0.3)
    assert_same_weights(model, hard, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(tmp_path: Path, precision: str) -> None:
    class Stopping(TensorBatches):
        """Data that fails in the second epoch."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            for number, batch in enumerate(super().__iter__()):
                if self.epoch == 1 and number == 3:
                    raise KeyboardInterrupt
                yield batch

    AcceleratorState._reset_state(reset_partial_state=True)
    config = small_config(mixed_precision=precision, checkpoint_steps=2, ema_decay=0.9, clip_grad_norm=1.0)
    data = small_data()
    try:
        alone, stopped = with_contexts(small_network()), with_contexts(small_network())
        fit(alone, data, None, config=config, accelerator=make_accelerator(config), output_dir=tmp_path / "alone")
        options: dict[str, Any] = {"config": config, "output_dir": tmp_path / "stopped"}
        failing = Stopping(data.images, data.labels, data.batch_size, contexts=data.contexts)
        with pytest.raises(KeyboardInterrupt):
            fit(stopped, failing, None, accelerator=make_accelerator(config), **options)
        again = with_contexts(small_network())
        fit(again, data, None, accelerator=make_accelerator(config), resume=True, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert next(again.parameters()).device.type == "cuda"
    assert_same_weights(again, alone, 1e-3 if precision != "no" else 1e-5)


def test_a_folder_with_checkpoints_is_not_trained_into_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": small_config(), "accelerator": Accelerator(), "output_dir": tmp_path}
    fit(small_network(), small_data(), None, **options)
    with pytest.raises(CheckpointError, match="holds a run's; resume it"):
        fit(small_network(), small_data(), None, **options)


def test_patience_needs_validation() -> None:
    with pytest.raises(TrainingError, match="patience 2 needs validation data"):
        trained(small_network(), patience=2)


def test_a_launcher_s_accumulation_does_not_divide_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, launched = small_network(), small_network()
    trained(plain)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = small_config()
    fit(launched, small_data(), None, config=config, accelerator=make_accelerator(config))
    assert_same_weights(launched, plain)


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    accelerator = Accelerator()
    for step in (80, 100):
        save_checkpoint(tmp_path, step, {"a.pt": [step]}, keep=5, accelerator=accelerator)
    (tmp_path / "step-00000100" / "a.pt").write_bytes(b"")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, len(found.damaged)) == (80, 1)
    save_checkpoint(tmp_path, 90, {"a.pt": [90]}, keep=1, accelerator=accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000090"]
    (tmp_path / "step-00000090" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="KeyError"):
        find_checkpoint(tmp_path)
