"""Turns, calls, bytes kept for backward, sets of activations; and what context normalization is measured against."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Clock
from torch import nn

from scripts.benchmark import activations, timing
from scripts.benchmark.activations import Activations, Layout, layouts
from scripts.benchmark.races import Duel, race
from scripts.benchmark.rivals import LoopOverContexts, MatrixProducts, fit_gaussian_mixture
from scripts.benchmark.rows import Row
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import in_turn, saved_bytes, seconds_in_turn

CPU = torch.device("cpu")


def settings(**options: object) -> Settings:
    return Settings(**{"device": CPU, "size": "smoke", "rounds": 3, "progress": False, **options})


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that calls are timed by."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    return clock


# ---------------------------------------------------------------------------------------------------------------- turns


def test_all_have_their_turn_in_every_round_and_each_begins_one() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn({name: lambda name=name: turn(name) for name in "abc"}, settings(), title="")
    assert order == [*"abc", *"bca", *"cab"]
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_seconds_are_those_of_one_call(clock: Clock) -> None:
    runs = {"short": lambda: clock.sleep(0.002), "long": lambda: clock.sleep(0.008)}
    found = seconds_in_turn(runs, settings(), title="", calls=5)
    assert found == {"short": pytest.approx([0.002] * 3), "long": pytest.approx([0.008] * 3)}


@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, 200), (5e-4, 40), (0.5, 1)])
def test_short_calls_fill_a_turn(clock: Clock, seconds: float, calls: int) -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        clock.sleep(seconds)

    seconds_in_turn({"a": run}, settings(size="full", rounds=1), title="")
    assert count == 2 + 1 + 2 * calls  # until it is compiled, to see how long it takes, once as in a turn, the round
    count = 0
    seconds_in_turn({"a": run}, settings(rounds=2), title="", calls=5)
    assert count == 2 + 5 + 2 * 5


def test_a_race_compares_each_with_its_rival(clock: Clock) -> None:
    duels = [Duel("slow", Row(what="slow", rival="fast")), Duel("fast", Row(what="fast", rival="slow", at_least=True))]
    runs = {"slow": lambda: clock.sleep(0.006), "fast": lambda: clock.sleep(0.002)}
    trial = race("name", duels, lambda: runs, settings())
    assert [row.value for row in trial.rows] == [None, None]
    slow, fast = trial.measure()
    assert slow.value == pytest.approx(3)
    assert fast.value == pytest.approx(3)
    assert slow.rounds == 3


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_kept_for_backward() -> None:
    x, y = torch.randn(10, 100, requires_grad=True), torch.randn(10, 100, requires_grad=True)
    size = x.nbytes
    assert saved_bytes(lambda: x + y) == 0
    assert saved_bytes(lambda: x.exp()) == size  # its result
    assert saved_bytes(lambda: x * y) == 2 * size
    assert saved_bytes(lambda: x * x) == size  # one storage, kept twice
    assert saved_bytes(lambda: (x * y).exp()) == 3 * size
    assert saved_bytes(lambda: x * y, without=[y]) == size
    assert saved_bytes(lambda: x[:, :50] * 2.0) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x * y) == 0


def test_bytes_of_a_layer_are_without_its_parameters() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(8, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes + layer.weight.nbytes
    assert saved_bytes(lambda: layer(x), without=layer.parameters()) == x.nbytes


def test_bytes_are_counted_while_tensors_come_and_go() -> None:
    """Freed storages leave their addresses to the next ones."""
    x = torch.randn(1000, requires_grad=True)

    def chain() -> torch.Tensor:
        out = x
        for _ in range(10):
            out = (out + 1).sin()  # keeps the sum
        return out

    assert saved_bytes(chain) == 10 * x.nbytes


# ---------------------------------------------------------------------------------------------------------- activations


def test_sets_are_used_in_turn_and_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_CPU_CACHE", 10_000)
    data = Activations(Layout("small", (4, 8, 5, 5)), torch.float32, CPU)
    assert len(data.x) == 1 + 2 * 10_000 // (4 * 8 * 5 * 5 * 4)
    met = [data.next()[0] for _ in range(2 * len(data.x))]
    assert len({x.data_ptr() for x in met}) == len(data.x)
    assert met[0] is met[len(data.x)]
    assert all(x.requires_grad and x.is_leaf for x in met)
    assert data.context_ids.tolist() == [0, 1, 2, 3]
    assert Activations(Layout("tokens", (2, 3, 8)), torch.bfloat16, CPU, requires_grad=False).next()[1] is None


def test_layouts() -> None:
    maps, last, tokens, small = layouts(settings(size="full"))
    assert (maps.shape, maps.feature_dim, maps.num_features) == ((256, 64, 56, 56), 1, 64)
    assert (tokens.shape, tokens.feature_dim, tokens.num_features) == ((256, 197, 768), -1, 768)
    assert small.shape == (256, 128, 8, 8)
    x, grad = Activations(last._replace(shape=(2, 4, 3, 3)), torch.float32, CPU).next()
    assert grad is not None
    for tensor in (x, grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


# --------------------------------------------------------------------------------------------------------------- rivals


@pytest.mark.parametrize("shape", [(7, 4, 3, 5), (7, 5, 4), (1, 4, 3, 3)])
def test_the_loop_normalises_each_context_by_its_own_batch(shape: tuple[int, ...]) -> None:
    dim = 1 if len(shape) == 4 else -1
    loop = LoopOverContexts(4, 5, feature_dim=dim).train()
    ids = torch.tensor([0, 3, 0, 1, 3, 3, 0])[: shape[0]]
    x = torch.randn(shape, requires_grad=True)
    reference = torch.empty(shape)
    for context in ids.unique():
        own = x[ids == context].movedim(dim, -1)
        mean, var = own.flatten(0, -2).mean(0), own.flatten(0, -2).var(0, correction=0)
        reference[ids == context] = ((own - mean) / (var + 1e-5).sqrt()).movedim(-1, dim)
    out = loop(x, ids)
    torch.testing.assert_close(out, reference)
    grad = torch.randn(shape)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(reference, x, grad))
    assert [int(norm.num_batches_tracked) for norm in loop.norms][2] == 0


def test_the_products_are_those_of_the_formula() -> None:
    vectors = torch.randn(50, 6)
    products = MatrixProducts(vectors, 3, with_statistics=True)
    precision, shift, scale, offset = products.tables
    tau = (vectors.square() @ precision.T + vectors @ shift.T).softmax(1)
    for got, wanted in zip(products(), (tau @ scale, tau @ offset, tau.T @ vectors, tau.T @ vectors**2), strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(MatrixProducts(vectors, 3, with_statistics=False)()) == 2


def test_the_mixture_fitted_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(center, 0.1, (200, 2)) for center in (-3, 0, 3)])
    fitted = fit_gaussian_mixture(vectors, 3)
    assert sorted(fitted.means_[:, 0].round(1)) == pytest.approx([-3, 0, 3], abs=0.11)
    assert fitted.covariance_type == "diag"
