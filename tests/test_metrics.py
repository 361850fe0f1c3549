"""Metrics against scikit-learn and hand counts, alone, combined, across processes and from Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score, top_k_accuracy_score

from cn_hf.errors import ConfigError, ContextIdError, DatasetError, InputTypeError
from cn_hf.evaluation import Accuracy, MacroPrecisionRecallF1, TopKAccuracy, trainer_compute_metrics
from cn_hf.evaluation.ranking import label_ranks, top_k_correct


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


def _scores(num_samples: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_samples, num_classes, generator=generator)
    return scores, torch.randint(num_classes, (num_samples,), generator=generator)


def _slow_rank(row: list[float], label: int) -> int:
    if any(value != value for value in row) or row[label] == float("-inf"):
        return len(row)
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    return order.index(label)


@pytest.mark.parametrize(("num_samples", "num_classes"), [(1, 1), (7, 2), (50, 3), (40, 11), (0, 4)])
def test_ranks_equal_sorting(num_samples: int, num_classes: int) -> None:
    scores, labels = _scores(num_samples, num_classes)
    scores = (scores * 2).round() / 2  # many ties
    if num_samples > 5:
        scores[0, 0] = float("nan")
        scores[1, int(labels[1])] = float("-inf")
        scores[2] = float("inf")
    expected = [_slow_rank(row, int(label)) for row, label in zip(scores.tolist(), labels, strict=True)]
    assert label_ranks(scores, labels).tolist() == expected


def test_a_network_that_answers_alike_for_all_classes_is_right_for_class_zero_only() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    ranks = label_ranks(torch.zeros(4, 4), labels)
    assert top_k_correct(ranks, 4, 1).tolist() == [True, False, False, False]
    assert top_k_correct(ranks, 4, 9).all()


@pytest.mark.parametrize("k", [1, 2, 5, 9, 10, 50])
def test_top_k_equals_scikit_learn(k: int) -> None:
    scores, labels = _scores(60, 10)
    result = TopKAccuracy(k).compute(predictions=scores, references=labels)
    expected = 1.0 if k >= 10 else top_k_accuracy_score(labels, scores, k=k, labels=range(10))
    assert result == {f"top_{k}_accuracy": pytest.approx(expected)}


def test_accuracy_by_hand_from_ids_and_from_scores() -> None:
    assert Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 1]) == {"accuracy": 0.5}
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [float("nan"), 1.0]])
    assert Accuracy().compute(predictions=scores, references=[0, 1, 1, 1]) == {"accuracy": 0.5}
    for predictions in (np.array([1, 1]), torch.tensor([1, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]).bfloat16()):
        assert Accuracy().compute(predictions=predictions, references=[1, 0]) == {"accuracy": 0.5}


def test_macro_scores_equal_scikit_learn() -> None:
    scores, labels = _scores(80, 6)
    predicted = scores.argmax(dim=1)
    result = MacroPrecisionRecallF1().compute(predictions=scores, references=labels)
    assert result == {
        "precision": pytest.approx(precision_score(labels, predicted, average="macro")),
        "recall": pytest.approx(recall_score(labels, predicted, average="macro")),
        "f1": pytest.approx(f1_score(labels, predicted, average="macro")),
    }
    never_predicted = MacroPrecisionRecallF1().compute(predictions=[0, 0], references=[0, 1])
    assert never_predicted == {"precision": 0.25, "recall": 0.5, "f1": pytest.approx(1 / 3)}


def test_per_context_equals_the_metric_on_each_context_alone() -> None:
    scores, labels = _scores(30, 4)
    ids = torch.arange(30) % 2  # the third context has no sample
    names = ["day", "night", "dusk"]
    for make in (Accuracy, lambda **options: TopKAccuracy(2, **options), MacroPrecisionRecallF1):
        result = make(contexts=names).compute(predictions=scores, references=labels, context_ids=ids)
        whole = make().compute(predictions=scores, references=labels)
        expected = dict(whole)
        for context in (0, 1):
            chosen = ids == context
            alone = make().compute(predictions=scores[chosen], references=labels[chosen])
            expected |= {f"{metric}/{names[context]}": value for metric, value in alone.items()}
        assert result == pytest.approx(expected)


def test_batches_give_what_one_call_gives() -> None:
    scores, labels = _scores(23, 5)
    ids = torch.arange(23) % 3
    metric = TopKAccuracy(2, contexts=3)
    for start in range(0, 23, 10):
        part = slice(start, start + 10)
        metric.add_batch(predictions=scores[part], references=labels[part], context_ids=ids[part])
    in_one = TopKAccuracy(2, contexts=3).compute(predictions=scores, references=labels, context_ids=ids)
    assert metric.compute() == in_one
    in_memory = TopKAccuracy(2, contexts=3, keep_in_memory=True)
    assert in_memory.compute(predictions=scores, references=labels, context_ids=ids) == in_one


def test_combine() -> None:
    scores, labels = _scores(40, 6)
    ids = torch.arange(40) % 2
    metrics = [Accuracy(contexts=["a", "b"]), TopKAccuracy(2), TopKAccuracy(3), MacroPrecisionRecallF1()]
    result = evaluate.combine(metrics).compute(predictions=scores, references=labels, context_ids=ids)
    assert set(result) == {
        "accuracy", "accuracy/a", "accuracy/b", "top_2_accuracy", "top_3_accuracy", "precision", "recall", "f1",
    }  # fmt: skip
    assert result["top_2_accuracy"] == pytest.approx(
        top_k_accuracy_score(labels, scores, k=2, labels=range(6)), abs=1e-12
    )
    again = evaluate.combine(metrics)
    for start in (0, 16, 32):
        part = slice(start, start + 16)
        again.add_batch(predictions=scores[part], references=labels[part], context_ids=ids[part])
    assert again.compute() == result


_WORKER = """
import sys, torch
from cn_hf.evaluation import Accuracy, MacroPrecisionRecallF1, TopKAccuracy
rank, cache = int(sys.argv[1]), sys.argv[2]
generator = torch.Generator().manual_seed(0)
scores, labels = torch.randn(21, 5, generator=generator), torch.randint(5, (21,), generator=generator)
share = slice(0, 14) if rank == 0 else slice(14, 21)
options = dict(num_process=2, process_id=rank, cache_dir=cache, contexts=2)
metrics = [Accuracy(**options), TopKAccuracy(2, **options), TopKAccuracy(3, **options)]
metrics.append(MacroPrecisionRecallF1(**options))
for metric in metrics:
    metric.add_batch(predictions=scores[share], references=labels[share], context_ids=(torch.arange(21) % 2)[share])
results = [metric.compute() for metric in metrics]
print(repr(results))
"""


def test_two_processes_of_uneven_shares_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "shared")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [worker.communicate(timeout=180) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    scores, labels = _scores(21, 5)
    ids = torch.arange(21) % 2
    expected = [
        make(contexts=2).compute(predictions=scores, references=labels, context_ids=ids)
        for make in (
            Accuracy,
            lambda **options: TopKAccuracy(2, **options),
            lambda **options: TopKAccuracy(3, **options),
            MacroPrecisionRecallF1,
        )
    ]
    assert outputs[0][0].strip() == repr(expected)
    assert outputs[1][0].strip() == repr([None] * 4)


@pytest.mark.parametrize("batchwise", [False, True])
def test_transformers_trainer_with_a_patched_model(tmp_path: Path, batchwise: bool) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    import cn_hf

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=4,
    )  # fmt: skip
    model = cn_hf.patch_model(ViTForImageClassification(config), num_contexts=2, init="random")
    generator = torch.Generator().manual_seed(3)
    columns = {
        "pixel_values": torch.randn(11, 3, 8, 8, generator=generator),
        "labels": torch.randint(4, (11,), generator=generator),
        "context_ids": torch.arange(11) % 2,
    }
    dataset = Dataset.from_dict({name: column.tolist() for name, column in columns.items()}).with_format("torch")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_eval_batch_size=4,
        label_names=["labels", "context_ids"],
        batch_eval_metrics=batchwise,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    metrics = evaluate.combine([Accuracy(contexts=2), TopKAccuracy(2)])
    trainer = Trainer(
        model=model, args=arguments, eval_dataset=dataset, compute_metrics=trainer_compute_metrics(metrics)
    )
    result = trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()(columns["pixel_values"], context_ids=columns["context_ids"]).logits
    right = logits.argmax(dim=1) == columns["labels"]
    assert result["eval_accuracy"] == pytest.approx(float(right.double().mean()))
    assert result["eval_accuracy/context_1"] == pytest.approx(float(right[1::2].double().mean()))
    assert result["eval_top_2_accuracy"] == pytest.approx(
        top_k_accuracy_score(columns["labels"], logits, k=2, labels=range(4))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 0}, "at least one"),
        ({"contexts": ["a", "a"]}, "differ"),
        ({"contexts": "day"}, "list of their names"),
        ({"contexts": [1, 2]}, "list of their names"),
    ],
)
def test_bad_contexts(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Accuracy(**options)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "5"])
def test_bad_k(k: object) -> None:
    with pytest.raises(ConfigError, match="top-k"):
        TopKAccuracy(k)


def test_bad_inputs() -> None:
    with pytest.raises(DatasetError, match="2 predictions, 1 references"):
        Accuracy().compute(predictions=[1, 2], references=[1])
    with pytest.raises(DatasetError, match="at least one"):
        Accuracy().compute(predictions=[], references=[])
    with pytest.raises(DatasetError, match="no references"):
        Accuracy().add_batch(predictions=[1])
    with pytest.raises(ContextIdError, match="context_ids"):
        Accuracy(contexts=2).add_batch(predictions=[1], references=[1])
    with pytest.raises(ContextIdError, match=r"context id 2 .* 0\.\.1"):
        Accuracy(contexts=2).compute(predictions=[1], references=[1], context_ids=[2])
    with pytest.raises(InputTypeError, match="no class ids"):
        Accuracy().compute(predictions=[0.7], references=[1])
    with pytest.raises(InputTypeError, match="different lengths"):
        Accuracy().compute(predictions=[[0.1, 0.2], [0.3]], references=[1, 0])
    with pytest.raises(ValueError, match="format"):
        TopKAccuracy().compute(predictions=[1, 2], references=[1, 2])
    with pytest.raises(DatasetError, match=r"label 3 .* 0\.\.2"):
        TopKAccuracy().compute(predictions=[[0.1, 0.2, 0.3]], references=[3])
    with pytest.raises(DatasetError, match="label -1"):
        Accuracy().compute(predictions=[0], references=[-1])
