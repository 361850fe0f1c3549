"""Epochs in which every context is drawn equally often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from data_for_tests import assert_same, make_dataset, pixels, together
from datasets import ClassLabel, Dataset, Value

from cn_hf.data import DeviceBatches, Mixing, MixingConfig, StreamedBatches, build_augmentation
from cn_hf.data.order import balanced_order
from cn_hf.errors import ConfigError

# Context 1 has no rows, context 3 a single one.
CONTEXTS = torch.tensor([0] * 25 + [2] * 11 + [3])
N = len(CONTEXTS)


def dataset(contexts: Any = CONTEXTS) -> Dataset:
    column = contexts.tolist()
    return make_dataset(N, contexts=False).add_column("context_ids", column)


def in_memory(**options: Any) -> DeviceBatches:
    options = {"batch_size": 8, "shuffle": True, "balance_contexts": True, "seed": 5, **options}
    return DeviceBatches(pixels(N), torch.arange(N) % 4, CONTEXTS, **options)


def from_dataset(**options: Any) -> StreamedBatches:
    options = {"batch_size": 8, "shuffle": True, "balance_contexts": True, "seed": 5, **options}
    return StreamedBatches(dataset().cast_column("context_ids", ClassLabel(num_classes=4)), **options)


@pytest.mark.parametrize("make", [in_memory, from_dataset])
def test_contexts_come_equally_often_and_their_rows_as_evenly_as_can_be(make: Any) -> None:
    batches = make()
    assert (len(batches), batches.num_samples) == (5, N)
    extra = set()
    for epoch in range(20):
        batches.set_epoch(epoch)
        whole = together(list(batches))
        assert len(whole["index"]) == N
        assert torch.equal(CONTEXTS[whole["index"]], whole["context_ids"])
        assert torch.equal(whole["index"] % 4, whole["labels"])
        count = Counter(whole["context_ids"].tolist())
        assert sorted(count) == [0, 2, 3]
        assert sorted(count.values()) == [12, 12, 13]
        extra.add(max(count, key=lambda context: count[context]))
        drawn = Counter(whole["index"].tolist())
        assert max(drawn[row] for row in range(25)) == 1  # more rows than draws: none twice
        assert {drawn[row] for row in range(25, 36)} <= {1, 2}  # fewer: each before any comes again
    assert extra == {0, 2, 3}


def test_every_row_is_met_and_orders_differ() -> None:
    orders = [balanced_order(CONTEXTS, 0, epoch).tolist() for epoch in range(30)]
    assert {row for order in orders for row in order} == set(range(N))
    assert len({tuple(order) for order in orders}) == 30
    assert balanced_order(CONTEXTS, 0, 4).tolist() == orders[4]
    assert balanced_order(CONTEXTS, 1, 4).tolist() != orders[4]
    # Contexts are mixed over the epoch, not one after the other.
    assert len(set(CONTEXTS[orders[0]][:8].tolist())) > 1


def test_one_context_and_one_row() -> None:
    assert sorted(balanced_order(torch.zeros(9, dtype=torch.int64), 0, 0).tolist()) == list(range(9))
    assert balanced_order(torch.tensor([5]), 0, 0).tolist() == [0]
    many = balanced_order(torch.arange(1000), 0, 0)
    assert sorted(many.tolist()) == list(range(1000))
    few_of_many = balanced_order(torch.tensor([0] * 50_000 + [1]), 0, 0)
    assert int((few_of_many == 50_000).sum()) in (25_000, 25_001)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_all_kinds_agree_and_starts_processes_and_mixing_work(num_workers: int) -> None:
    options: dict[str, Any] = {
        "augment": build_augmentation(["flip", "crop"]),
        "mixing": Mixing(MixingConfig(mixup=0.3), num_classes=4, num_contexts=4),
    }
    whole = list(in_memory(**options))
    assert_same(from_dataset(**options, num_workers=num_workers), whole)
    late = from_dataset(**options, num_workers=num_workers)
    late.set_epoch(0, 3)
    assert_same(late, whole[3:])
    ranks = [in_memory(**options, num_processes=2, process_index=p) for p in range(2)]
    assert_same([together(list(parts)) for parts in zip(*ranks, strict=True)], whole, atol=1e-6)


def test_what_cannot_be_balanced() -> None:
    labels = torch.zeros(N, dtype=torch.int64)
    options: dict[str, Any] = {"batch_size": 8, "shuffle": True, "balance_contexts": True}
    with pytest.raises(ConfigError, match="needs contexts, and the data has none"):
        DeviceBatches(pixels(N), labels, **options)
    with pytest.raises(ConfigError, match="needs contexts, and the data has none"):
        StreamedBatches(make_dataset(N, contexts=False), **options)
    weights = torch.full((N, 2), 0.5)
    with pytest.raises(ConfigError, match="weights of several"):
        DeviceBatches(pixels(N), labels, weights, **options)
    with pytest.raises(ConfigError, match="weights of several"):
        StreamedBatches(dataset(weights), **options)
    with pytest.raises(ConfigError, match=r"streaming=False.*interleave_datasets"):
        StreamedBatches(dataset().to_iterable_dataset(), **options)
    with pytest.raises(ConfigError, match="shuffle=True"):
        in_memory(shuffle=False)
    plain = dataset().cast_column("context_ids", Value("int32"))
    assert np.bincount(together(list(StreamedBatches(plain, **options)))["context_ids"]).tolist()[1] == 0
