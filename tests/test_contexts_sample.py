"""Samples drawn in one pass: the same rows of streams and datasets, within a budget, each row as likely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cn_hf.contexts.sample import Sample


def streamed(x, size, *, seed=0, budget=2**30, batch=7):
    sample = Sample(size, seed, budget)
    for start in range(0, len(x), batch):
        rows = [row for row in range(start, min(start + batch, len(x))) if sample.wants(row)]
        if rows:
            sample.take(rows, x[rows])
    return sample


def chosen(x, size, *, seed=0, budget=2**30):
    sample = Sample(size, seed, budget)
    rows = sample.choose(len(x))
    for start in range(0, len(rows), 5):
        part = [row for row in rows[start : start + 5] if sample.holds(row)]
        sample.take(part, x[part])
    return sample


@pytest.mark.parametrize("size", [1, 9, 99, 100, 101, None])
@pytest.mark.parametrize("budget", [2**30, 4 * 3 * 20])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_streams_and_datasets_give_the_same_rows_in_their_order(size, budget, dtype):
    x = torch.arange(300).view(100, 3) % 256
    x = x.to(dtype)
    one, other = streamed(x, size, budget=budget), chosen(x, size, budget=budget)
    expected = min(size or 100, 100, budget // 12)
    assert len(one) == len(other) == expected
    assert one.cut == other.cut == (expected < min(size or 100, 100))
    found = one.vectors()
    assert torch.equal(found, other.vectors())
    assert found.dtype == torch.float32
    scale = 255 if dtype == torch.uint8 else 1
    rows = [next(row for row in range(100) if torch.equal(x[row].float() / scale, vector)) for vector in found]
    assert rows == sorted(set(rows))


def test_the_seed_decides_and_every_row_is_as_likely():
    x = torch.arange(40).view(-1, 1).float()
    counts = np.zeros(40)
    for seed in range(500):
        counts[streamed(x, 10, seed=seed).vectors().flatten().long()] += 1
    assert abs(counts - 125).max() < 5 * np.sqrt(125)
    assert torch.equal(streamed(x, 10, seed=3).vectors(), streamed(x, 10, seed=3, batch=11).vectors())


def test_a_long_stream_is_seldom_wanted_and_never_held():
    sample, wanted = Sample(50, 0, 2**30), 0
    for row in range(20_000):
        if sample.wants(row):
            wanted += 1
            sample.take([row], torch.full((1, 4), row % 256, dtype=torch.uint8))
    assert 50 * np.log(20_000 / 50) * 0.7 < wanted < 50 * (1 + np.log(20_000 / 50)) * 1.4
    assert len(sample._vectors) == len(sample) == 50
