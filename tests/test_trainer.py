"""Transformers' own Trainer on a patched model: the losses of ``fit``, metrics per context, checkpoints, recomputation.

Both loops get the same images in the same order, the same initial weights and the same optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.metrics import f1_score, top_k_accuracy_score
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import cn_hf
from cn_hf.contexts import ColumnContexts
from cn_hf.data import DeviceBatches, load_splits, prepare_data
from cn_hf.errors import ContextIdError
from cn_hf.evaluation import Accuracy, MacroPrecisionRecallF1, TopKAccuracy, trainer_compute_metrics
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import EpochRecord
from cn_hf.training.supervised import fit

CLASSES, BATCH, EPOCHS = 4, 16, 3
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CAMERAS = ("gate", "roof", "yard")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


class Data(NamedTuple):
    """The same rows twice: as our batches, and as a dataset whose columns Trainer is to find its own in."""

    batches: Any
    rows: datasets.Dataset


def made_up_data(count: int, seed: int) -> Data:
    """Noise images whose class shows as brightness, more of it for some cameras; the last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    camera = torch.randint(len(CAMERAS), (count,), generator=generator)
    noise = torch.randint(128, (count, 3, 16, 16), generator=generator)
    images = (noise + 30 * labels.view(-1, 1, 1, 1) + 10 * camera.view(-1, 1, 1, 1)).to(torch.uint8)
    shape = (1, 3, 1, 1)
    pixel_values = (images.float() / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    rows = datasets.Dataset.from_dict(
        {
            "camera": [CAMERAS[place] for place in camera],
            "pixel_values": pixel_values.tolist(),
            "labels": labels.tolist(),
        }
    )
    rows = ColumnContexts("camera").fit(rows).apply(rows).with_format("torch")
    ids = torch.as_tensor(rows["context_ids"][:])
    assert ids.tolist() == camera.tolist()
    return Data(DeviceBatches(images, labels, ids, batch_size=BATCH, mean=MEAN, std=STD), rows)


def tiny_vit(num_labels: int = CLASSES, image_size: int = 16, **options: Any) -> ViTForImageClassification:
    """A patched ViT whose contexts differ from the start, with the same weights at every call."""
    torch.manual_seed(3)
    config = ViTConfig(
        image_size=image_size, patch_size=image_size // 4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=num_labels,
    )  # fmt: skip
    options.setdefault("context_names", CAMERAS)
    model = cn_hf.patch_model(ViTForImageClassification(config), **options)
    torch.nn.init.normal_(model.classifier.weight, std=0.2)  # as it comes, the logits hardly depend on anything
    for module in model.modules():
        if isinstance(module, cn_hf.ContextNorm):
            shape = module.num_contexts, module.num_features
            module.set_statistics(torch.randn(shape), torch.rand(shape) + 0.5)
    return model


class Run(NamedTuple):
    """The loss of every step, the last epoch's record, and the trained model."""

    losses: list[float]
    record: EpochRecord
    model: ViTForImageClassification


def run_fit(data: Data, test: Data, model: ViTForImageClassification, **options: Any) -> Run:
    """``fit``, its losses computed from the logits that the network gave in training and the batches' labels."""
    defaults = {"model": "x", "epochs": EPOCHS, "progress": False, "keep_best": False, "decay_one_dimensional": False}
    config = TrainingConfig.from_dict({**defaults, **options})
    logits: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            logits.append(output.logits.detach())

    labels = []
    for epoch in range(config.epochs):
        data.batches.set_epoch(epoch)
        labels += [batch["labels"] for batch in data.batches]
    with model.register_forward_hook(keep):
        history = fit(model, data.batches, test.batches, config=config, accelerator=Accelerator())
    losses = [F.cross_entropy(*pair).item() for pair in zip(logits, labels, strict=True)]
    return Run(losses, history.epochs[-1], model)


def make_trainer(data: Data, test: Data, model: ViTForImageClassification, folder: Path, **options: Any) -> Trainer:
    """A Trainer that logs every step's loss, drops no column by hand, and gives contexts to its metrics."""
    names = model.context_config.context_names
    metrics = evaluate.combine([Accuracy(contexts=names), TopKAccuracy(2, contexts=names), MacroPrecisionRecallF1()])
    defaults = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "optim": "adamw_torch",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "label_names": ["labels", "context_ids"],
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=data.rows,
        eval_dataset=test.rows,
        compute_metrics=trainer_compute_metrics(metrics),
    )


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIMIZERS = {
    "adamw": (
        {"optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1, "clip_grad_norm": 1.0},
        {"optim": "adamw_torch", "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0},
    ),
    "sgd": (
        {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.01},
        {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.01, "max_grad_norm": 0.0},
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainer_reaches_the_losses_of_fit(tmp_path: Path, optimizer: str) -> None:
    ours, theirs = OPTIMIZERS[optimizer]
    data, test = made_up_data(75, 1), made_up_data(37, 2)
    run = run_fit(data, test, tiny_vit(), **ours)
    trainer = make_trainer(data, test, tiny_vit(), tmp_path, **theirs)
    trainer.train()
    assert len(run.losses) == 5 * EPOCHS
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert logged_losses(trainer) == pytest.approx(run.losses, abs=1e-4)
    result = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(run.record.validation_loss, abs=1e-4)
    assert result["eval_accuracy"] == pytest.approx(run.record.validation_accuracy)


def test_the_contexts_that_trainer_passes_decide_the_losses(tmp_path: Path) -> None:
    data, test = made_up_data(75, 1), made_up_data(37, 2)
    run = run_fit(data, test, tiny_vit(), **OPTIMIZERS["sgd"][0], epochs=1)
    turned = data.rows.map(lambda row: {"context_ids": (row["context_ids"] + 1) % len(CAMERAS)})
    options = {**OPTIMIZERS["sgd"][1], "max_steps": 1}
    trainer = make_trainer(Data(data.batches, turned), test, tiny_vit(), tmp_path / "turned", **options)
    trainer.train()
    assert abs(logged_losses(trainer)[0] - run.losses[0]) > 0.05
    without = Data(data.batches, data.rows.remove_columns("context_ids"))
    with pytest.raises(ContextIdError, match="Training needs context_ids"):
        make_trainer(without, test, tiny_vit(), tmp_path / "without", **options).train()


def test_metrics_of_a_trained_model_per_context(tmp_path: Path) -> None:
    data, test = made_up_data(75, 1), made_up_data(37, 2)
    trainer = make_trainer(data, test, tiny_vit(), tmp_path, learning_rate=3e-3, eval_strategy="epoch")
    trainer.train()
    found = trainer.evaluate()
    during = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in during] == [1, 2, 3, 3]
    assert during[2]["eval_accuracy/roof"] == found["eval_accuracy/roof"]

    labels, ids = torch.as_tensor(test.rows["labels"][:]), torch.as_tensor(test.rows["context_ids"][:])
    with torch.no_grad():
        logits = trainer.model.eval()(torch.stack(list(test.rows["pixel_values"])), context_ids=ids).logits
    assert found["eval_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    for name, of in (("", ids >= 0), *((f"/{camera}", ids == place) for place, camera in enumerate(CAMERAS))):
        right = (logits[of].argmax(1) == labels[of]).double().mean().item()
        top_2 = top_k_accuracy_score(labels[of], logits[of], k=2, labels=range(CLASSES))
        assert found[f"eval_accuracy{name}"] == pytest.approx(right), name
        assert found[f"eval_top_2_accuracy{name}"] == pytest.approx(top_2), name
    assert len({found[f"eval_accuracy/{camera}"] for camera in CAMERAS}) > 1


def test_a_model_that_trainer_trained_survives_saving(tmp_path: Path) -> None:
    data, test = made_up_data(75, 1), made_up_data(37, 2)
    trainer = make_trainer(data, test, tiny_vit(), tmp_path / "run", learning_rate=3e-3)
    trainer.train()
    assert not torch.equal(trainer.model.classifier.weight, tiny_vit().classifier.weight)
    folder = cn_hf.save_pretrained(trainer.model, tmp_path / "saved")
    again = cn_hf.from_pretrained(folder)
    for (name, value), (other_name, other) in zip(
        trainer.model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(value, other), name
    found = make_trainer(data, test, again, tmp_path / "again").evaluate()
    expected = trainer.evaluate()
    changing = ("runtime", "second", "epoch", "preparation")
    assert {n: v for n, v in found.items() if not any(word in n for word in changing)} == {
        n: v for n, v in expected.items() if not any(word in n for word in changing)
    }


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path, reentrant: bool) -> None:
    data, test = made_up_data(75, 1), made_up_data(37, 2)
    calls: list[int] = []
    losses = []
    for name, options in (
        ("plain", {}),
        (
            "checkpointing",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
        ),
    ):
        model = tiny_vit()
        count: list[None] = []
        model.vit.layers[0].layernorm_before.register_forward_hook(lambda *_, count=count: count.append(None))
        trainer = make_trainer(data, test, model, tmp_path / name, **OPTIMIZERS["adamw"][1], **options)
        trainer.train()
        losses.append(logged_losses(trainer))
        calls.append(len(count))
    assert calls == [5 * EPOCHS, 2 * 5 * EPOCHS]  # it does run the blocks again
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def real_data(folder: Path, cache: Path) -> tuple[Data, Data, ColumnContexts]:
    """Some of CIFAR-100 in contexts by superclass: shuffled by our batches, and as rows in that very order."""
    splits = load_splits(folder, max_train_images=300, max_test_images=100, cache_dir=cache)
    source = ColumnContexts("coarse_label")
    prepared = prepare_data(splits, context_source=source, label_column="fine_label", batch_size=BATCH, seed=4)
    mean, std = np.array(prepared.mean, np.float32), np.array(prepared.std, np.float32)

    def pixel_values(row: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": ((np.asarray(row["img"], np.float32) / 255 - mean) / std).transpose(2, 0, 1)}

    pairs = {}
    for name, batches in (("train", prepared.train), ("test", prepared.test)):
        rows = source.apply(splits[name]).rename_column("fine_label", "labels").map(pixel_values).with_format("torch")
        pairs[name] = Data(batches, rows.select(torch.cat([batch["index"] for batch in batches]).tolist()))
    return pairs["train"], pairs["test"], source


def test_the_losses_of_fit_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    train, test, source = real_data(shared_data / "cifar100", tmp_path / "cache")
    assert source.num_contexts == 20
    ours, theirs = OPTIMIZERS["adamw"]
    make = {"num_labels": 100, "image_size": 32, "context_names": source.names}
    run = run_fit(train, test, tiny_vit(**make), **ours, epochs=1)
    trainer = make_trainer(train, test, tiny_vit(**make), tmp_path / "run", **theirs, num_train_epochs=1)
    trainer.train()
    assert len(run.losses) == 19  # the last of 12 images
    assert logged_losses(trainer) == pytest.approx(run.losses, abs=1e-4)
    result = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(run.record.validation_loss, abs=1e-4)
    assert result["eval_accuracy"] == pytest.approx(run.record.validation_accuracy)
    present = {source.names[place] for place in torch.as_tensor(test.rows["context_ids"][:]).tolist()}
    assert {name.partition("/")[2] for name in result if name.startswith("eval_accuracy/")} == present
