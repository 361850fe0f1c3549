"""Metrics of Trainer on two processes that hold uneven shares: those of the whole set, each sample counted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from processes import leave
from sklearn.metrics import f1_score, top_k_accuracy_score
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import cn_hf
from cn_hf.evaluation import Accuracy, MacroPrecisionRecallF1, TopKAccuracy, trainer_compute_metrics

CLASSES, SAMPLES = 4, 37  # in batches of 8 for each of two processes, so that the last ones are uneven


def make_model() -> ViTForImageClassification:
    torch.manual_seed(3)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=CLASSES,
    )  # fmt: skip
    model = cn_hf.patch_model(ViTForImageClassification(config), context_names=("day", "night"))
    torch.nn.init.normal_(model.classifier.weight)
    for module in model.modules():
        if isinstance(module, cn_hf.ContextNorm):
            module.set_statistics(torch.randn(2, module.num_features), torch.rand(2, module.num_features) + 0.5)
    return model


def make_rows() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(5)
    columns = {
        "pixel_values": torch.randn(SAMPLES, 3, 8, 8, generator=generator).tolist(),
        "labels": torch.randint(CLASSES, (SAMPLES,), generator=generator).tolist(),
        "context_ids": (torch.arange(SAMPLES) % 3 == 0).long().tolist(),
    }
    return datasets.Dataset.from_dict(columns).with_format("torch")


def evaluate_with_trainer(folder: Path) -> dict[str, float]:
    evaluate.config.HF_METRICS_CACHE = str(folder / f"metrics{os.environ.get('RANK', '0')}")
    names = ("day", "night")
    metrics = [Accuracy(contexts=names), TopKAccuracy(2, contexts=names), MacroPrecisionRecallF1()]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), per_device_eval_batch_size=8, label_names=["labels", "context_ids"],
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    compute_metrics = trainer_compute_metrics(evaluate.combine(metrics))
    trainer = Trainer(model=make_model(), args=arguments, eval_dataset=make_rows(), compute_metrics=compute_metrics)
    assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    return trainer.evaluate()


def test_trainer_on_two_processes_counts_every_sample_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    rows = make_rows()
    ids, labels = torch.as_tensor(rows["context_ids"][:]), np.asarray(rows.with_format(None)["labels"][:])
    with torch.no_grad():
        logits = make_model().eval()(torch.stack(list(rows["pixel_values"])), context_ids=ids).logits
    right = logits.argmax(1).numpy() == labels
    night = ids.numpy() == 1
    expected = {
        "eval_accuracy": right.mean(),
        "eval_accuracy/day": right[~night].mean(),
        "eval_accuracy/night": right[night].mean(),
        "eval_f1": f1_score(labels, logits.argmax(1), average="macro"),
        "eval_top_2_accuracy/night": top_k_accuracy_score(labels[night], logits[night], k=2, labels=range(CLASSES)),
    }
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


if __name__ == "__main__":  # one process of the test above
    results = evaluate_with_trainer(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    leave()
