"""The parts of honest evaluation: leak check, paired differences, findings, records, what importing costs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

import cn_hf.evaluation
from cn_hf.errors import DatasetError
from cn_hf.evaluation.findings import compared, leak_finding, paired_difference
from cn_hf.evaluation.leak import context_depends_on_label, context_only_ranks, label_bits, mask_to_context
from cn_hf.evaluation.ranking import label_ranks
from cn_hf.evaluation.records import SampleRecorder


def _random_counts(num_contexts: int, num_classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_contexts)
    counts = torch.randint(4, (num_contexts, num_classes), generator=generator)
    counts[0, 0] += 1
    return counts


@pytest.mark.parametrize(("num_contexts", "num_classes"), [(1, 1), (3, 4), (5, 20), (40, 3)])
def test_context_only_guesses_equal_a_slow_sort(num_contexts: int, num_classes: int) -> None:
    counts = _random_counts(num_contexts, num_classes)
    overall = counts.sum(dim=0)
    for context, label in itertools.product(range(num_contexts), range(num_classes)):
        order = sorted(range(num_classes), key=lambda c: (-int(counts[context, c]), -int(overall[c]), c))
        rank = context_only_ranks(torch.tensor([label]), torch.tensor([context]), counts)
        assert rank.tolist() == [order.index(label)]


def test_the_floor_is_the_best_any_rule_of_the_context_can_do() -> None:
    """On the training split itself, no assignment of a class to each context beats the floor."""
    counts = _random_counts(3, 4)
    labels, ids = (torch.tensor(column) for column in zip(*_samples(counts), strict=True))
    floor = int((context_only_ranks(labels, ids, counts) == 0).sum())
    best = max(
        sum(int(counts[context, guess]) for context, guess in enumerate(rule))
        for rule in itertools.product(range(4), repeat=3)
    )
    assert floor == best


def _samples(counts: torch.Tensor) -> list[tuple[int, int]]:
    return [
        (label, context)
        for context in range(counts.shape[0])
        for label in range(counts.shape[1])
        for _ in range(int(counts[context, label]))
    ]


def test_mask() -> None:
    counts = torch.tensor([[1, 0, 2], [0, 0, 0], [0, 5, 0]])
    logits = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])
    inf = float("inf")
    masked = mask_to_context(logits, torch.tensor([0, 1, 2]), counts)
    assert masked.tolist() == [[1, -inf, 3], [1, 2, 3], [-inf, 2, -inf]]
    assert mask_to_context(logits.half(), torch.tensor([0, 1, 2]), counts).dtype == torch.float16
    assert logits.isfinite().all()


def test_bits_equal_scikit_learn() -> None:
    counts = _random_counts(4, 6)
    labels, ids = zip(*_samples(counts), strict=True)
    known, entropy = label_bits(counts)
    assert known == pytest.approx(mutual_info_score(labels, ids) / np.log(2), abs=1e-12)
    assert entropy == pytest.approx(mutual_info_score(labels, labels) / np.log(2), abs=1e-12)


def test_whether_the_context_depends_on_the_label() -> None:
    superclasses = torch.zeros(2, 4, dtype=torch.int64)
    superclasses[0, :2], superclasses[1, 2:] = 5, 5
    assert context_depends_on_label(superclasses)
    assert "at most 2 in one, so knowing the context tells 1.00 of the 2.00 bits" in leak_finding(superclasses)
    superclasses[0, 2] = 1
    assert not context_depends_on_label(superclasses)
    assert leak_finding(superclasses).startswith("1 of 4 classes occur in several of the 2 contexts")
    assert not context_depends_on_label(torch.tensor([[3, 4], [0, 0]]))
    assert "one context" in leak_finding(torch.tensor([[3, 4], [0, 0]]))
    assert "not known" in leak_finding(None)


def test_superclasses_of_cifar_100(shared_data: Path) -> None:
    """The case that made the check necessary: the superclass alone gives every top-5."""
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    columns = {}
    for split in ("train", "test"):
        files = sorted((shared_data / "cifar100" / "data").glob(f"{split}-*.parquet"))
        tables = [pyarrow_parquet.read_table(file, columns=["fine_label", "coarse_label"]) for file in files]
        columns[split] = [
            torch.tensor(np.concatenate([table[name].to_numpy() for table in tables]))
            for name in ("fine_label", "coarse_label")
        ]
    counts = torch.zeros(20, 100, dtype=torch.int64)
    fine, coarse = columns["train"]
    counts.index_put_((coarse, fine), torch.ones_like(fine), accumulate=True)
    ranks = context_only_ranks(*columns["test"], counts)
    assert context_depends_on_label(counts)
    assert float((ranks < 1).double().mean()) == pytest.approx(0.2)
    assert bool((ranks < 5).all())
    assert "4.32 of the 6.64 bits" in leak_finding(counts)


def test_paired_difference_equals_the_per_sample_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 400, generator=generator) < torch.tensor([[0.7], [0.6]])
    difference, error = paired_difference(first, second)
    per_sample = first.double() - second.double()
    assert difference == pytest.approx(float(per_sample.mean()))
    assert error == pytest.approx(float(per_sample.std(correction=0)) / 20)
    same, sure = paired_difference(first, first)
    assert same == 0
    assert 0 < sure < 1 / 100
    all_right, none_right = torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    difference, error = paired_difference(all_right, none_right)
    assert difference == 1
    assert 0 < error < 0.2


def test_sentences_on_differences() -> None:
    right = torch.arange(100) < 80
    worse = torch.arange(100) < 50
    assert compared("CN", right, "the baseline", worse) == (
        "CN beats the baseline (top-1 80.00 % against 50.00 %: +30.00 ± 4.58 points)."
    )
    assert compared("CN", worse, "the baseline", right).startswith(
        "CN does not beat the baseline (top-1 50.00 % against"
    )
    near = torch.arange(100) < 78  # two samples of a hundred prove nothing
    assert compared("CN", right, "the baseline", near).startswith("CN cannot be told apart from the baseline")
    assert compared("CN", right, "the baseline", right).startswith("CN cannot be told apart from the baseline on 100")


def test_records_keep_dataset_order_and_refuse_ambiguity() -> None:
    recorder = SampleRecorder()
    recorder.add(
        labels=torch.tensor([5, 6]), context_ids=None, index=torch.tensor([7, 2]), ranks={"a": torch.tensor([0, 1])}
    )
    recorder.add(labels=torch.tensor([4]), context_ids=None, index=torch.tensor([3]), ranks={"a": torch.tensor([2])})
    records = recorder.merged()
    assert records.index is not None
    assert (records.index.tolist(), records.labels.tolist()) == ([2, 3, 7], [6, 4, 5])
    assert records.ranks["a"].tolist() == [1, 2, 0]
    assert recorder.largest_batch == 2
    recorder.add(labels=torch.tensor([6]), context_ids=None, index=torch.tensor([2]), ranks={})
    with pytest.raises(DatasetError, match="row 2 occurs twice"):
        recorder.merged()
    with pytest.raises(DatasetError, match="no samples"):
        SampleRecorder().merged()


def test_ranks_do_not_depend_on_precision_beyond_ties() -> None:
    scores = torch.tensor([[1.0, 1.0001, 0.5]])
    assert label_ranks(scores, torch.tensor([0])).tolist() == [1]
    assert label_ranks(scores.half(), torch.tensor([0])).tolist() == [
        0
    ]  # a tie in half precision goes to the lower class


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, cn_hf.evaluation as e; heavy = {'evaluate', 'sklearn', 'matplotlib', 'datasets', 'accelerate'};"
        "assert not heavy & set(sys.modules); assert 'torch' not in sys.modules;"
        "e.format_accuracy(1, 2); assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_exist() -> None:
    assert set(cn_hf.evaluation.__all__) <= set(dir(cn_hf.evaluation))
    assert all(getattr(cn_hf.evaluation, name) is not None for name in cn_hf.evaluation.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = cn_hf.evaluation.nothing_like_this
