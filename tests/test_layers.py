"""norm/layers.py: ContextNorm as a module, against tests/reference.py."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import cn_hf
from cn_hf.errors import CnHfError, ConfigError, ContextIdError, InputDeviceError, InputShapeError, InputTypeError
from cn_hf.norm import ContextNorm, DomainBatchNorm, FeatureBatchNorm, MixtureNorm, functional

PARAMETRIZATIONS = ("embedder", "table")
ACTIVATIONS = ("softplus", "exp")
FORMS = [(p, a) for p in PARAMETRIZATIONS for a in ACTIVATIONS]


def layer_of(num_features: int = 3, num_contexts: int = 4, **options: Any) -> ContextNorm:
    return ContextNorm(num_features, num_contexts, **{"feature_dim": -1, "init": "random", **options})


def slow_tables(layer: ContextNorm) -> tuple[Tensor, Tensor]:
    if layer.parametrization == "table":
        return reference.table_tables(layer.mean_table, layer.var_table, layer.variance_activation)
    return reference.embedder_tables(
        layer.embedding.T,
        layer.embedding_bias,
        layer.mean_weight,
        layer.mean_bias,
        layer.var_weight,
        layer.var_bias,
        layer.variance_activation,
    )


def randomise(layer: ContextNorm) -> ContextNorm:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return layer


# ---------------------------------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft", "int", "none"])
@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
@pytest.mark.parametrize(("shape", "feature_dim"), [((3, 2, 2, 2), 1), ((5, 3, 2), -1)])
def test_layer_equals_the_plain_formula(
    shape: tuple[int, ...], feature_dim: int, parametrization: str, activation: str, kind: str, affine: bool
) -> None:
    options = {"parametrization": parametrization, "variance_activation": activation, "affine": affine, "eps": 1e-3}
    layer = randomise(layer_of(2, 4, feature_dim=feature_dim, dtype=torch.float64, **options))
    layer.train(kind != "none")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(shape[0], 4, dtype=torch.float64).softmax(1).requires_grad_()
    ids = {"hard": torch.tensor([3, 0, 3, 1, 1])[: shape[0]], "soft": soft, "int": 2, "none": None}[kind]
    common = {"eps": 1e-3, "feature_dim": feature_dim, "weight": layer.weight, "bias": layer.bias}
    if ids is None:
        plus = {"plus_stats": "learned", "plus_scale": "none"}
        expected = reference.context_norm_plus(x, *slow_tables(layer), **common, **plus)
    else:
        expected = reference.context_norm(x, *slow_tables(layer), ids, **common)
    actual = layer(x, ids)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    direction = torch.randn_like(x)
    wanted = [x, *layer.parameters(), *([soft] if kind == "soft" else [])]
    mine = torch.autograd.grad(actual, wanted, direction)
    slow = torch.autograd.grad(expected, wanted, direction, allow_unused=True)
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("plus_stats", ["learned", "batch"])
@pytest.mark.parametrize("plus_scale", ["none", "sqrt_t"])
def test_evaluation_without_ids_uses_the_layers_switches(plus_stats: str, plus_scale: str) -> None:
    layer = randomise(layer_of(dtype=torch.float64, plus_stats=plus_stats, plus_scale=plus_scale, eps=0.01)).eval()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    switches = {"plus_stats": plus_stats, "plus_scale": plus_scale}
    with torch.no_grad():
        expected = reference.context_norm_plus(x, *slow_tables(layer), eps=0.01, feature_dim=-1, **switches)
        torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
def test_gradcheck_of_all_parameters(parametrization: str, activation: str, kind: str) -> None:
    options = {"parametrization": parametrization, "variance_activation": activation, "affine": True, "eps": 1e-2}
    layer = randomise(layer_of(2, 3, feature_dim=1, dtype=torch.float64, **options)).train(kind != "none")
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(3, 3, dtype=torch.float64).softmax(1)
    ids = {"hard": torch.tensor([2, 0, 2]), "soft": soft, "none": None}[kind]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, ids))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("num_contexts", [1, 2, 3, 7, 8, 64, 65, 1000, 10_000])
def test_more_and_fewer_contexts_than_samples(num_contexts: int, parametrization: str) -> None:
    options = {"parametrization": parametrization, "dtype": torch.float64}
    layer = layer_of(3, num_contexts, embedding_dim=5 if parametrization == "embedder" else None, **options)
    ids = torch.arange(7) * 12345 % num_contexts
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    mean, var = layer.statistics()
    assert mean.shape == var.shape == (num_contexts, 3)
    plain = (x - mean[ids][:, None]) / (var[ids][:, None] + layer.eps).sqrt()
    torch.testing.assert_close(layer(x, ids), plain, atol=1e-10, rtol=1e-10)
    wanted = [x, *layer.parameters()]
    mine, slow = (torch.autograd.grad(out.square().sum(), wanted) for out in (layer(x, ids), plain))
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    for row, id_ in enumerate(ids.tolist()):
        for got, table in zip(layer.statistics(id_), (mean, var), strict=True):
            torch.testing.assert_close(got, table[id_ : id_ + 1])
        for got, table in zip(layer.statistics(ids), (mean, var), strict=True):
            torch.testing.assert_close(got[row], table[id_])
    soft = torch.nn.functional.one_hot(ids, num_contexts).double()
    torch.testing.assert_close(layer(x, soft), plain, atol=1e-9, rtol=1e-9)
    assert layer.eval()(x).shape == x.shape


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("unknown", [-1, 3])
def test_statistics_of_an_unknown_context_are_refused(unknown: int, parametrization: str) -> None:
    with pytest.raises(ContextIdError, match=rf"must lie in 0..2, received {unknown}"):
        layer_of(2, 3, parametrization=parametrization).statistics(unknown)


class LargestMatrix(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor held, and the rows given to matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self.numbers = max(self.numbers, tensor.numel())
                if "mm" in func.__name__:
                    self.rows.append(len(tensor))
        return out


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_ten_thousand_contexts_cost_a_small_batch_nothing(parametrization: str) -> None:
    layer = layer_of(32, 10_000, parametrization=parametrization)
    with torch.no_grad(), LargestMatrix() as meter:
        layer(torch.randn(4, 2, 32), torch.tensor([0, 9_999, 17, 17]))
    assert meter.numbers <= 4 * 64


def test_many_samples_cost_one_table() -> None:
    layer = layer_of(32, 3)
    with torch.no_grad(), LargestMatrix() as meter:
        layer(torch.randn(5000, 32), torch.arange(5000) % 3)
    assert meter.rows
    assert set(meter.rows) == {3}, "the embedder runs once a context, not once a sample"


# ------------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
@pytest.mark.parametrize("num_contexts", [1, 2, 20, 100, 10_000])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.1])
def test_identity_initialisation(parametrization: str, activation: str, num_contexts: int, eps: float) -> None:
    options = {"parametrization": parametrization, "variance_activation": activation, "eps": eps}
    layer = ContextNorm(4, num_contexts, feature_dim=-1, **options)
    mean, var = layer.statistics()
    assert (mean == 0).all()
    torch.testing.assert_close(var + eps, torch.ones_like(var), atol=3e-7, rtol=0)
    x = torch.randn(5, 3, 4) * 100
    for ids in (0, num_contexts - 1, torch.arange(5) % num_contexts):
        torch.testing.assert_close(layer(x, ids), x, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(layer.eval()(x), x, atol=1e-3, rtol=3e-6)


@pytest.mark.parametrize("init", ["identity", "random"])
@pytest.mark.parametrize(
    ("num_contexts", "embedding_dim"),
    [(2, 1), (3, 1), (5, 2), (3, None), (20, None), (100, None)],
)
def test_initial_embeddings_tell_all_contexts_apart(num_contexts: int, embedding_dim: int | None, init: str) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        layer = ContextNorm(4, num_contexts, feature_dim=-1, embedding_dim=embedding_dim, init=init)
        alpha = layer.embedding + layer.embedding_bias
        gaps = torch.cdist(alpha, alpha, compute_mode="donot_use_mm_for_euclid_dist") + torch.eye(num_contexts) * 9
        assert gaps.min() > 1e-4, f"seed {seed}: two contexts share one embedding"


@pytest.mark.parametrize(("parametrization", "embedding_dim"), [("embedder", None), ("embedder", 2), ("table", None)])
def test_one_step_from_identity_tells_contexts_apart(parametrization: str, embedding_dim: int | None) -> None:
    layer = ContextNorm(4, 3, feature_dim=-1, parametrization=parametrization, embedding_dim=embedding_dim)
    weight = layer.mean_table if parametrization == "table" else layer.mean_weight
    offsets = torch.tensor([0.0, 3.0, -6.0])
    gradients = []
    for r in range(3):
        out = layer(torch.randn(32, 4) * (1 + r) + offsets[r], r)
        (gradient,) = torch.autograd.grad(out.square().mean(), weight)
        gradients.append(gradient)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (gradients[a] - gradients[b]).abs().max() > 0.1
    ids = torch.arange(96) % 3
    x = torch.randn(96, 4) * (1 + ids[:, None]) + offsets[ids][:, None]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    layer(x, ids).square().mean().backward()
    optimizer.step()
    mean, var = layer.statistics()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (mean[a] - mean[b]).abs().max() > 1e-3
        assert (var[a] - var[b]).abs().max() > 1e-3


def test_random_initialisation_is_a_linear_layers() -> None:
    layer = ContextNorm(500, 400, feature_dim=-1, embedding_dim=100, init="random")
    fan_ins = dict.fromkeys(("embedding", "embedding_bias"), 400)
    fan_ins |= dict.fromkeys(("mean_weight", "mean_bias", "var_weight", "var_bias"), 100)
    for name, fan_in in fan_ins.items():
        bound, values = 1 / math.sqrt(fan_in), getattr(layer, name).detach()
        assert 0.9 * bound < values.abs().max() <= bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize("init", ["identity", "random"])
def test_initialisation_follows_the_seed(init: str) -> None:
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(ContextNorm(4, 3, feature_dim=-1, init=init))
    assert torch.equal(layers[0].embedding, layers[1].embedding)
    assert not torch.equal(layers[0].embedding, layers[2].embedding)


def test_default_sizes() -> None:
    for num_contexts, d in ((1, 1), (3, 3), (64, 64), (65, 64), (1000, 64)):
        layer = ContextNorm(5, num_contexts, feature_dim=-1)
        assert layer.embedding_dim == d
        assert sum(p.numel() for p in layer.parameters()) == num_contexts * d + d + 2 * (5 * d + 5)
    table = ContextNorm(5, 7, feature_dim=-1, parametrization="table", affine=True)
    assert sum(p.numel() for p in table.parameters()) == 2 * 7 * 5 + 2 * 5


# ------------------------------------------------------------------------------------------------------- set_statistics


@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
@pytest.mark.parametrize(
    ("num_contexts", "embedding_dim"),
    [(1, None), (2, None), (2, 1), (20, None), (20, 19), (64, None), (65, None), (5, 9)],
)
def test_set_statistics_is_exact(
    parametrization: str, activation: str, num_contexts: int, embedding_dim: int | None
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        layer = ContextNorm(
            7,
            num_contexts,
            feature_dim=-1,
            parametrization=parametrization,
            variance_activation=activation,
            embedding_dim=embedding_dim if parametrization == "embedder" else None,
        )
        mean, var = torch.randn(num_contexts, 7) * 3, torch.rand(num_contexts, 7) * 4 + 0.01
        layer.set_statistics(mean, var)
        for actual, expected in zip(layer.statistics(), (mean, var), strict=True):
            torch.testing.assert_close(actual, expected, atol=3e-5, rtol=3e-4)
        layer.set_statistics(var[0], var[0])
        for actual in layer.statistics():
            torch.testing.assert_close(actual, var[:1].expand(num_contexts, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
def test_set_statistics_of_extreme_variances(parametrization: str, activation: str) -> None:
    layer = ContextNorm(6, 1, feature_dim=-1, parametrization=parametrization, variance_activation=activation)
    var = torch.tensor([1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e8])
    layer.set_statistics(torch.zeros(6), var)
    torch.testing.assert_close(layer.statistics()[1][0], var, rtol=1e-5, atol=0)
    layer.set_statistics(torch.zeros(6), torch.zeros(6))
    assert (layer.statistics()[1] <= 1e-20).all()
    assert layer(torch.randn(2, 6), 0).isfinite().all()


def test_set_statistics_after_embeddings_have_grown_alike() -> None:
    layer = ContextNorm(4, 3, feature_dim=-1)
    with torch.no_grad():
        layer.embedding.fill_(1.0)
    mean, var = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    layer.set_statistics(mean, var)
    for actual, expected in zip(layer.statistics(), (mean, var), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_set_statistics_where_the_embedder_is_too_narrow() -> None:
    layer = ContextNorm(4, 5, feature_dim=-1, embedding_dim=3)
    before = copy.deepcopy(layer.state_dict())
    mean, var = torch.randn(5, 4), torch.rand(5, 4) + 0.1
    with pytest.raises(ConfigError, match="approximate=True"):
        layer.set_statistics(mean, var)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.set_statistics(mean, var, approximate=True)
    fitted, _ = layer.statistics()
    assert 0 < (fitted - mean).abs().max() < 3 * mean.abs().max()
    assert (fitted - mean).square().sum() < (mean.mean(0) - mean).square().sum(), "better than one row for all"
    layer.set_statistics(mean[0], var[0])
    torch.testing.assert_close(layer.statistics()[0], mean[:1].expand(5, -1))
    table = ContextNorm(4, 5, feature_dim=-1, parametrization="table")
    table.set_statistics(mean, var)
    torch.testing.assert_close(table.statistics()[0], mean)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize(
    ("mean", "var"),
    [
        (torch.zeros(5), torch.ones(5)),
        (torch.zeros(2, 4), torch.ones(2, 4)),
        (torch.zeros(3, 4), torch.ones(4)),
        (torch.zeros(4), -torch.ones(4)),
        (torch.full((4,), math.nan), torch.ones(4)),
        (torch.zeros(4), torch.full((4,), math.inf)),
    ],
    ids=["features", "contexts", "shapes differ", "negative", "nan", "infinite"],
)
def test_set_statistics_of_wrong_values(mean: Tensor, var: Tensor, parametrization: str) -> None:
    layer = ContextNorm(4, 3, feature_dim=-1, parametrization=parametrization)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(CnHfError):
        layer.set_statistics(mean, var)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- errors


def test_training_without_ids_is_an_error() -> None:
    with pytest.raises(ContextIdError, match="context_ids"):
        layer_of().train()(torch.randn(2, 3))


def test_evaluation_without_ids_is_an_error_where_inference_is_cn() -> None:
    layer = layer_of(inference="cn").eval()
    with pytest.raises(ContextIdError, match=r"cn\+"):
        layer(torch.randn(2, 3))
    assert layer(torch.randn(2, 3), 1).shape == (2, 3)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 4]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.full((2, 4), 0.3),
        torch.full((2, 4), math.nan),
        torch.tensor([[2.0, -1, 0, 0], [1, 0, 0, 0]]),
        torch.full((2, 5), 0.2),
        [],
        4,
        -1,
        True,
        "day",
        ["day", "day"],
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_ids(ids: Any, training: bool) -> None:
    with pytest.raises(ContextIdError):
        layer_of().train(training)(torch.randn(2, 5, 3), ids)


@pytest.mark.parametrize("shape", [(3,), (), (2, 4), (2, 3, 5, 4)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputShapeError, match="3"):
        layer_of()(torch.randn(shape), 0)
    with pytest.raises(InputShapeError, match="3"):
        layer_of(feature_dim=1)(torch.randn((*shape[:1], *shape[1:][::-1])), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_contexts": 0}, "num_contexts"),
        ({"num_features": 0}, "num_features"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"eps": 0.0}, "eps"),
        ({"eps": -1e-5}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"eps": 2.0}, "eps"),
        ({"embedding_dim": 0}, "embedding_dim"),
        ({"parametrization": "table", "embedding_dim": 4}, "embedding_dim"),
        ({"parametrization": "tabel"}, "did you mean 'table'"),
        ({"variance_activation": "relu"}, "softplus"),
        ({"init": "zeros"}, "identity"),
        ({"inference": "average"}, "cn"),
        ({"plus_stats": "lerned"}, "did you mean 'learned'"),
        ({"plus_scale": "sqrt"}, "sqrt_t"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    arguments = {"num_features": 3, "num_contexts": 4, "feature_dim": -1, **options}
    with pytest.raises(ConfigError, match=words):
        ContextNorm(**arguments)


# ---------------------------------------------------------------------------------------- dtypes, layouts, odd batches


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ids", [None, 1, torch.arange(6) % 4])
def test_half_precision_layer_computes_in_float32(dtype: torch.dtype, parametrization: str, ids: Any) -> None:
    layer = randomise(layer_of(parametrization=parametrization, affine=True)).eval().to(dtype)
    wide = copy.deepcopy(layer).float()
    assert all(statistic.dtype == torch.float32 for statistic in layer.statistics())
    x = torch.randn(6, 5, 3).to(dtype)
    out = layer(x, ids)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x.float(), ids), rtol=torch.finfo(dtype).eps, atol=1e-2)
    out.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("num_contexts", [4, 100])
@pytest.mark.parametrize("kind", ["hard", "soft", "int", "none"])
def test_autocast_does_not_degrade_the_tables(kind: str, num_contexts: int) -> None:
    layer = randomise(layer_of(8, num_contexts)).eval()
    x = torch.randn(16, 5, 8)
    soft = torch.rand(16, num_contexts).softmax(1)
    ids = {"hard": torch.arange(16) % num_contexts, "soft": soft, "int": 1, "none": None}[kind]
    expected = layer(x, ids)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inside, outside in zip(layer.statistics(), layer.statistics(), strict=True):
            assert inside.dtype == torch.float32
            assert torch.equal(inside, outside)
        actual = layer(x, ids)
    grads = torch.autograd.grad(actual.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("ids", [None, 1, torch.arange(4) % 3, torch.full((4, 3), 1 / 3)])
@pytest.mark.parametrize("affine", [False, True])
def test_layouts(ids: Any, affine: bool) -> None:
    layer = randomise(ContextNorm(6, 3, feature_dim=1, affine=affine)).eval()
    tokens = copy.deepcopy(layer)
    tokens.feature_dim = -1
    x = torch.randn(4, 6, 5, 7)
    expected = layer(x, ids)
    assert expected.is_contiguous()
    last = layer(x.to(memory_format=torch.channels_last), ids)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(tokens(x.permute(0, 2, 3, 1).contiguous(), ids).permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(tokens(x.flatten(2).transpose(1, 2), ids).transpose(1, 2).reshape(x.shape), expected)
    torch.testing.assert_close(layer(x[:, :, 0, 0], ids), expected[:, :, 0, 0])
    torch.testing.assert_close(layer(x[..., ::2], ids), expected[..., ::2])
    torch.testing.assert_close(layer(x[..., None], ids), expected[..., None])


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_batches_of_none_and_of_one(parametrization: str) -> None:
    layer = layer_of(feature_dim=1, parametrization=parametrization)
    for ids in (torch.zeros(0, dtype=torch.int64), [], 2, torch.zeros(0, 4)):
        out = layer(torch.zeros(0, 3, 5, 5), ids)
        assert out.shape == (0, 3, 5, 5)
        out.sum().backward()
        assert all((p.grad is None) or (p.grad == 0).all() for p in layer.parameters())
    whole = torch.randn(4, 3, 5, 5)
    ids = torch.tensor([3, 1, 0, 1])
    torch.testing.assert_close(
        torch.cat([layer(whole[i : i + 1], ids[i : i + 1]) for i in range(4)]), layer(whole, ids)
    )
    layer.eval()
    assert layer(torch.zeros(0, 3, 5, 5)).shape == (0, 3, 5, 5)
    torch.testing.assert_close(torch.cat([layer(whole[i : i + 1]) for i in range(4)]), layer(whole))


def test_meta_device() -> None:
    layer = ContextNorm(3, 2, feature_dim=1, device="meta", affine=True)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer(x, 1), x)
    with torch.device("meta"):
        assert ContextNorm(3, 2, feature_dim=1).embedding.is_meta


def test_forward_on_the_meta_device_gives_shapes() -> None:
    layer = ContextNorm(3, 2, feature_dim=1, device="meta").eval()
    x = torch.zeros(4, 3, 2, 2, device="meta")
    for ids in (1, torch.zeros(4, dtype=torch.int64, device="meta"), None):
        assert layer(x, ids).shape == x.shape


# ------------------------------------------------------------------------------------------------- state, copies, tools


@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
def test_copies_compute_the_same_and_share_nothing(parametrization: str, activation: str) -> None:
    options = {"parametrization": parametrization, "variance_activation": activation, "affine": True}
    layer = randomise(layer_of(**options))
    fresh = layer_of(**options)
    assert fresh.load_state_dict(layer.state_dict()).missing_keys == []
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, torch.load(file, weights_only=False)]
    x, ids = torch.randn(5, 3), torch.tensor([0, 3, 1, 1, 2])
    expected = layer(x, ids).detach().clone()
    for twin in copies:
        assert torch.equal(twin(x, ids), expected)
        assert twin.extra_repr() == layer.extra_repr()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert torch.equal(layer(x, ids), expected)
    assert {name.split(".")[-1] for name in layer.state_dict()} == {name for name, _ in layer.named_parameters()}


def test_another_number_of_contexts_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="embedding"):
        layer_of(3, 4).load_state_dict(layer_of(3, 5).state_dict())


def test_per_sample_gradients_by_torch_func() -> None:
    layer = randomise(layer_of(3, 4, affine=True))
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x, ids = torch.randn(6, 5, 3), torch.tensor([0, 1, 2, 3, 1, 1])

    def loss(parameters: dict[str, Tensor], sample: Tensor, id_: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None], id_[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, ids)
    by_input = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0, 0))(parameters, x, ids)
    for i in range(6):
        leaf = x[i : i + 1].clone().requires_grad_()
        layer.zero_grad()
        layer(leaf, ids[i : i + 1]).square().sum().backward()
        torch.testing.assert_close(by_input[i], leaf.grad[0], atol=1e-4, rtol=1e-4)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("hard", "aot_eager"),
        ("soft", "aot_eager"),
        ("none", "aot_eager"),
        pytest.param("hard", "inductor", marks=pytest.mark.slow),
        pytest.param("none", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_without_graph_breaks(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = randomise(layer_of(3, 4, feature_dim=1, affine=True)).train(kind != "none")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch_size in (5, 3):
        x = torch.randn(batch_size, 3, 4, requires_grad=True)
        soft = torch.rand(batch_size, 4).softmax(1)
        ids = {"hard": torch.arange(batch_size) % 4, "soft": soft, "none": None}[kind]
        expected, actual = layer(x, ids), compiled(x, ids)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        wanted = [x, *layer.parameters()]
        for a, b in zip(
            torch.autograd.grad(actual.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    layer = randomise(layer_of())
    x, ids = torch.randn(6, 5, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, 1, 1])
    plain = torch.autograd.grad(layer(x, ids).square().sum(), [x])
    torch.utils.checkpoint.checkpoint(layer, x, ids, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, plain[0])


def test_it_learns_the_statistics_of_each_context() -> None:
    layer = ContextNorm(2, 3, feature_dim=-1)
    ids = torch.arange(300) % 3
    true_mean, true_std = torch.tensor([[0.0, 1.0], [4.0, -3.0], [-2.0, 5.0]]), torch.tensor([1.0, 2.0, 0.5])
    x = true_mean[ids] + torch.randn(300, 2) * true_std[ids][:, None]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(400):
        var = layer.statistics()[1][ids]
        loss = layer(x, ids).square().mean() + (var + layer.eps).log().mean()  # the Gaussian's negative log-likelihood
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = layer(x, ids)
    for r in range(3):
        assert out[ids == r].mean(0).abs().max() < 0.05
        torch.testing.assert_close(out[ids == r].std(0), torch.ones(2), atol=0.1, rtol=0)


def test_frozen_parameters_need_no_gradient() -> None:
    layer = layer_of(affine=True).requires_grad_(False)
    x = torch.randn(4, 5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, torch.tensor([0, 1, 2, 3])).sum(), x)
    assert grad.isfinite().all()
    assert not layer(x.detach(), 0).requires_grad


def test_inside_a_network_in_every_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), ContextNorm(6, 2, feature_dim=1)

        def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
            return self.norm(self.conv(x), ids)

    net, x = Net(), torch.randn(4, 3, 8, 8)
    assert net(x, torch.tensor([0, 1, 0, 1])).shape == (4, 6, 6, 6)
    torch.testing.assert_close(net.eval()(x), net.conv(x), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), net(x, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ContextNorm(4, "3", feature_dim=1), "num_contexts must be an integer of at least 1, received '3'"),
        (lambda: ContextNorm(4.0, 3, feature_dim=1), "num_features must be an integer"),
        (lambda: ContextNorm(True, 3, feature_dim=1), "num_features must be an integer"),
        (lambda: ContextNorm(4, 3, feature_dim="1"), "feature_dim must be 1"),
        (lambda: ContextNorm(4, 3, feature_dim=1, eps="a"), "eps must be a number"),
        (lambda: ContextNorm(4, 3, feature_dim=1, embedding_dim=1.5), "embedding_dim must be an integer"),
        (lambda: ContextNorm(4, 3, feature_dim=1, init=None), "init must be a string, received None"),
        (lambda: MixtureNorm(4, num_components=2.5), "num_components must be an integer"),
        (lambda: cn_hf.ContextNormConfig(num_contexts="3"), "num_contexts must be an integer"),
        (lambda: cn_hf.ContextNormConfig(context_names="day"), "context_names must be a list"),
        (lambda: cn_hf.ContextNormConfig(mode=3), "mode must be a string"),
        (lambda: cn_hf.ContextNormConfig(where=[3]), "where must be"),
        (lambda: ContextNorm(4, 3, feature_dim=1)(None, 0), "ContextNorm takes a tensor, received NoneType"),
    ],
)
def test_wrong_types_are_type_errors(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        build()
    assert isinstance(caught.value, cn_hf.CnHfError)


def test_numbers_of_numpy_are_numbers() -> None:
    config = cn_hf.ContextNormConfig(num_contexts=np.int64(3))
    assert json.dumps(config.to_dict())
    layer = ContextNorm(np.int64(4), np.int64(2), feature_dim=1, eps=np.float32(1e-3))
    assert layer(torch.randn(2, 4), 1).shape == (2, 4)


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
def test_a_mix_of_devices_is_an_error(parametrization: str) -> None:
    """As of torch's own norms: a layer without storage, an input without, or one parameter of either."""

    def layer() -> ContextNorm:
        return ContextNorm(8, 2, feature_dim=1, parametrization=parametrization, affine=True).eval()

    x, ids = torch.ones(4, 8, 5, 5), torch.tensor([0, 1, 1, 0])
    mixes = [(layer().to("meta"), x), (layer(), x.to("meta"))]
    for name, value in layer().named_parameters():
        mixes.append((layer(), x))
        setattr(mixes[-1][0], name, nn.Parameter(value.to("meta")))
    for mixed, given in mixes:
        for context_ids in (ids, torch.full((4, 2), 0.5), None):
            with pytest.raises(InputDeviceError, match=r"received one on (meta|cpu)\. Move"):
                mixed(given, context_ids)
        with pytest.raises(InputDeviceError):
            mixed.train()(given, ids)
    whole = layer().to("meta")
    assert whole(x.to("meta"), ids).is_meta
    assert whole(x.to("meta")).is_meta


@pytest.mark.parametrize(
    "build",
    [
        lambda: ContextNorm(8, 2, feature_dim=1, dtype=torch.int32),
        lambda: ContextNorm(8, 2, feature_dim=1, dtype="float32"),
        lambda: ContextNorm(8, 2, feature_dim=1, dtype=torch.complex64),
        lambda: ContextNorm(8, 2, feature_dim=1, device="nowhere"),
        lambda: ContextNorm(8, 2, feature_dim=1, affine="no"),
        lambda: ContextNorm(8, 2, feature_dim=1, sparse=3),
        lambda: DomainBatchNorm(8, 2, dtype=torch.int64),
        lambda: DomainBatchNorm(8, 2, affine=1),
        lambda: DomainBatchNorm(8, 2, device="x"),
        lambda: MixtureNorm(8, 2, reg_covar="x"),
        lambda: MixtureNorm(8, 2, seed="x"),
        lambda: MixtureNorm(8, 2, dtype=torch.int32),
        lambda: FeatureBatchNorm("8"),
        lambda: FeatureBatchNorm(0),
        lambda: FeatureBatchNorm(8, eps=-1.0),
        lambda: FeatureBatchNorm(8, momentum=7.0),
        lambda: FeatureBatchNorm(8, dtype=torch.int32),
    ],
)
def test_constructors_refuse_what_torch_would(build: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be .*received"):
        build()


@pytest.mark.parametrize("layer", [ContextNorm(8, 2, feature_dim=7), ContextNorm(3, 2, feature_dim=-4)], ids=repr)
def test_a_feature_axis_that_the_input_lacks(layer: ContextNorm) -> None:
    with pytest.raises(InputShapeError, match="features along axis"):
        layer(torch.randn(3, 8, 4, 4), 0)
    with pytest.raises(InputShapeError, match="features along axis"):
        MixtureNorm(8, 2, feature_dim=9)(torch.randn(2, 8, 3))


@pytest.mark.parametrize("ids", [torch.tensor([0, 1]).to_sparse(), torch.eye(2).to_sparse(), "x" * 5000])
def test_ids_of_a_kind_that_no_layer_takes(ids: Any) -> None:
    with pytest.raises(ContextIdError) as caught:
        ContextNorm(8, 2, feature_dim=1).eval()(torch.randn(2, 8, 3), ids)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("side", [3, 8, 40])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_takes_few_calls(side: int, training: bool) -> None:
    """Of Python functions, torch's included: they cost as much as a small map."""
    layer, x = ContextNorm(64, 4, feature_dim=1).train(training), torch.randn(8, 64, side, side)
    ids, called = torch.arange(8) % 4, []
    layer(x, ids)
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        layer(x, ids)
    finally:
        sys.setprofile(None)
    assert len(called) <= 60, called


def test_a_tiny_map_is_computed_by_torch_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = ContextNorm(8, 3, feature_dim=1, init="random", affine=True), torch.randn(4, 8, 5, 5, requires_grad=True)
    ids = torch.tensor([0, 2, 1, 2])
    out = layer(x, ids)
    found = [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]
    monkeypatch.setattr(functional, "_SMALL", 0)
    out = layer(x, ids)
    expected = [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputShapeError, match="one row a sample"):
        functional.shift_scale(x[:2], torch.zeros(3, 8), torch.ones(3, 8), feature_dim=1)


@pytest.mark.parametrize("layer", [ContextNorm, MixtureNorm])
@pytest.mark.parametrize(
    "other", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn, lambda x: torch.nested.nested_tensor(list(x))]
)
def test_input_that_is_not_dense_is_refused(layer, other):
    ids = (torch.tensor([0, 1]),) if layer is ContextNorm else ()
    with pytest.raises(InputTypeError, match="dense"):
        layer(4, 2, feature_dim=1)(other(torch.randn(2, 4, 3, 3)), *ids)


@pytest.mark.parametrize("size", [2**31, 2**62, 2**70])
@pytest.mark.parametrize("layer", [ContextNorm, MixtureNorm])
def test_sizes_beyond_reason_are_refused_before_memory_is_asked_for(layer, size):
    for sizes in ((size, 2), (4, size)):
        with pytest.raises(ConfigError, match="at most"):
            layer(*sizes, feature_dim=1)


@pytest.mark.parametrize("layer", [ContextNorm, MixtureNorm])
def test_dtypes_without_arithmetic_are_refused(layer):
    with pytest.raises(ConfigError, match="16 bits"):
        layer(4, 2, feature_dim=1, dtype=torch.float8_e4m3fn)
