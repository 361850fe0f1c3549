"""norm/ids.py: every form of context_ids that is meant to work, and every wrong one, which is a ContextIdError."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cn_hf.errors import CnHfError, ContextIdError
from cn_hf.norm.ids import resolve_context_ids

NAMES = ("day", "night", "dusk")


def resolve(ids: Any, batch_size: int = 3, *, names: Any = NAMES) -> Tensor:
    return resolve_context_ids(ids, num_contexts=3, batch_size=batch_size, device=torch.device("cpu"), names=names)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]
)
def test_every_integer_dtype(dtype: torch.dtype) -> None:
    out = resolve(torch.tensor([2, 0, 1]).to(dtype))
    assert out.dtype == torch.int64
    assert out.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (1, [1, 1, 1]),
        (np.int64(2), [2, 2, 2]),
        (torch.tensor(2), [2, 2, 2]),
        ("night", [1, 1, 1]),
        (["dusk", "day", "night"], [2, 0, 1]),
        (("dusk", "day", "night"), [2, 0, 1]),
        ([2, 0, 1], [2, 0, 1]),
        ((2, 0, 1), [2, 0, 1]),
        (range(3), [0, 1, 2]),
        (np.array([2, 0, 1]), [2, 0, 1]),
        (np.array([2, 0, 1], dtype=np.uint8), [2, 0, 1]),
        (torch.tensor([0, 9, 1, 9, 2])[::2], [0, 1, 2]),
    ],
)
def test_hard_ids(ids: Any, expected: list[int]) -> None:
    out = resolve(ids)
    assert out.dtype == torch.int64
    assert out.shape == (3,)
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.125, 0.375, 0.5]], dtype=dtype)
    out = resolve(weights)
    assert out.dtype == dtype
    assert torch.equal(out, weights)
    for rounded in torch.rand(20, 3, 3).softmax(-1).to(dtype):
        resolve(rounded)


def test_soft_weights_as_a_list_and_with_gradient() -> None:
    assert resolve([[0.5, 0.5, 0.0]] * 3).shape == (3, 3)
    weights = torch.rand(3, 3).softmax(1).requires_grad_()
    (grad,) = torch.autograd.grad(resolve(weights).sum(), weights)
    assert (grad == 1).all()


@pytest.mark.parametrize("ids", [[], (), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), 1, "day"])
def test_empty_batch(ids: Any) -> None:
    assert len(resolve(ids, 0)) == 0


WRONG: dict[str, tuple[Any, str]] = {
    "too short": (torch.tensor([0, 1]), "2.*3"),
    "too long": (torch.tensor([0, 1, 2, 0]), "4.*3"),
    "empty list for three samples": ([], "0.*3"),
    "empty tensor": (torch.zeros(0, dtype=torch.int64), "0.*3"),
    "negative": (torch.tensor([0, -1, 2]), r"0\.\.2.*sample 1 has -1"),
    "too large": (torch.tensor([0, 1, 3]), r"0\.\.2.*sample 2 has 3"),
    "negative int": (-1, r"0\.\.2"),
    "large int": (3, r"0\.\.2"),
    "huge int": (2**70, "context_ids"),
    "uint8 out of range": (torch.tensor([0, 1, 255], dtype=torch.uint8), r"0\.\.2"),
    "bool tensor": (torch.tensor([True, False, True]), "bool"),
    "bool": (True, "bool"),
    "list of bools": ([True, False, True], "bool"),
    "complex": (torch.zeros(3, dtype=torch.complex64), "complex"),
    "float ids": (torch.tensor([0.0, 1.0, 2.0]), r"\(N, 3\)"),
    "float": (1.0, r"\(N, 3\)"),
    "list of floats": ([0.0, 1.0, 2.0], r"\(N, 3\)"),
    "integer one-hot rows": (torch.eye(3, dtype=torch.int64), "float"),
    "weights of two contexts": (torch.full((3, 2), 0.5), r"\(N, 3\)"),
    "weights of one sample": (torch.tensor([0.5, 0.5, 0.0]), r"\(N, 3\)"),
    "weights too few": (torch.full((2, 3), 1 / 3), "2.*3"),
    "weights of three dimensions": (torch.full((3, 3, 1), 1 / 3), r"\(N, 3\)"),
    "weights sum to two": (torch.full((3, 3), 2 / 3), "sum to one"),
    "weights sum to 1.01": (torch.full((3, 3), 1.01 / 3), "sum to one"),
    "weights zero": (torch.zeros(3, 3), "sum to one"),
    "one row wrong": (torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0]]), "sample 2"),
    "weights nan": (torch.tensor([[1.0, 0, 0], [math.nan, 1, 0], [0, 1, 0]]), "finite"),
    "weights infinite": (torch.tensor([[1.0, 0, 0], [math.inf, -math.inf, 1], [0, 1, 0]]), "finite"),
    "weights negative": (torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0], [0, 1, 0]]), "negative"),
    "unknown name": ("nigth", "did you mean 'night'"),
    "unknown name in a list": (["day", "day", "moon"], "moon"),
    "too few names": (["day", "day"], "2.*3"),
    "names and ids": (["day", 1, 2], "all names or all integers"),
    "nested names": ([["day"], ["day"], ["day"]], "context_ids"),
    "dict": ({"day": 1}, "dict"),
    "set": ({0, 1, 2}, "set"),
    "object": (object(), "object"),
    "list with None": ([0, None, 1], "context_ids"),
    "ragged": ([[0.5, 0.5, 0], [1.0]], "context_ids"),
    "bytes": (b"abc", "context_ids"),
    "array of strings": (np.array(["day", "day", "day"]), "context_ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_ids(case: str) -> None:
    ids, words = WRONG[case]
    with pytest.raises(ContextIdError, match=words) as caught:
        resolve(ids)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CnHfError)


def test_a_name_where_contexts_have_none() -> None:
    for ids in ("day", ["day"] * 3):
        with pytest.raises(ContextIdError, match="no names"):
            resolve(ids, names=None)


def test_range_is_checked_for_an_empty_batch_of_names_too() -> None:
    with pytest.raises(ContextIdError, match="moon"):
        resolve("moon", 0)


def test_ids_on_the_meta_device_are_checked_by_shape() -> None:
    def on_meta(ids: Tensor) -> Tensor:
        return resolve_context_ids(ids, num_contexts=3, batch_size=3, device=torch.device("meta"))

    assert on_meta(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3,)
    with pytest.raises(ContextIdError):
        on_meta(torch.zeros(4, dtype=torch.int64, device="meta"))
    with pytest.raises(ContextIdError):
        on_meta(torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("bad", [[0, 1, 9], [0, 1]])
def test_the_input_is_not_changed(bad: list[int]) -> None:
    ids = torch.tensor(bad)
    with pytest.raises(ContextIdError):
        resolve(ids)
    assert ids.tolist() == bad
