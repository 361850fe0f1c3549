"""Patched models under torch.compile (inductor, fullgraph) and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from models_for_tests import SmallTokenNet, difference, images, seeded, settle, small_convnet, tell_apart, vit
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError


@seeded
def patched(make: Callable[[], nn.Module], mode: str = "cn", **options: Any) -> nn.Module:
    return tell_apart(cn_hf.patch_model(make(), mode, **options))


def small_vit() -> nn.Module:
    return vit(depth=1)


def tiny_convnet() -> nn.Module:
    return settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4)))


def token_net() -> nn.Module:
    return settle(SmallTokenNet(nn.LayerNorm(6)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_vit, tiny_convnet], ids=lambda f: f.__name__)
@torch.no_grad()
def test_inductor_in_one_graph_with_and_without_ids(make: Callable[[], nn.Module]) -> None:
    model, x = patched(make), images()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.tensor([0, 1, 2, 1])
    assert difference(compiled(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-5
    assert difference(compiled(x), model(x)) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for other in (torch.tensor([2, 2, 0, 0]), torch.tensor([1, 0, 1, 0])):
            assert difference(compiled(x, context_ids=other), model(x, context_ids=other)) <= 1e-5
        assert difference(compiled(x), model(x)) <= 1e-5


@pytest.mark.slow
def test_inductor_trains_as_eager_does() -> None:
    model, x = patched(token_net).train(), torch.randn(4, 3, 5)
    compiled = torch.compile(model, fullgraph=True)
    for ids in (torch.tensor([0, 1, 2, 1]), torch.tensor([2, 2, 0, 0])):
        grads = []
        for network in (model, compiled):
            model.zero_grad()
            network(x, context_ids=ids).square().sum().backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, atol=1e-4 * float(grad.abs().max() + 1), rtol=1e-3)


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@torch.no_grad()
def test_every_way_to_give_ids_traces_into_one_graph(parametrization: str) -> None:
    model, x = patched(token_net, parametrization=parametrization, context_names=("a", "b", "c")), torch.randn(4, 3, 5)
    soft = torch.rand(4, 3).softmax(1)
    for ids in (torch.tensor([0, 1, 2, 1]), soft, 1, "b", None):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert difference(compiled(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for r in (2, 0):
        with cn_hf.use_contexts(model, r):
            assert difference(compiled(x), model(x)) <= 1e-6
    assert difference(compiled(x), model(x)) <= 1e-6


@pytest.mark.parametrize("inference", ["cn+", "average"])
@torch.no_grad()
def test_ways_to_run_without_ids_trace(inference: str) -> None:
    model, x = patched(token_net), torch.randn(4, 3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cn_hf.set_inference(model, inference)
    assert difference(compiled(x), model(x)) <= 1e-5
    cn_hf.set_inference(model, "cn+", plus_stats="batch", plus_scale="sqrt_t")
    assert difference(compiled(x), model(x)) <= 1e-5


@torch.no_grad()
def test_changing_ids_do_not_recompile_and_a_changing_batch_does_once() -> None:
    model = patched(token_net)
    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 3, (4,), generator=generator)
        x = torch.randn(4, 3, 5, generator=generator)
        assert difference(compiled(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-6
    assert frames.frame_count == 1
    for n in (6, 7, 9):
        x, ids = torch.randn(n, 3, 5), torch.arange(n) % 3
        assert difference(compiled(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-6
    assert frames.frame_count == 2


@torch.no_grad()
def test_compiled_before_it_was_patched() -> None:
    model, x = token_net(), torch.randn(4, 3, 5)
    model.compile(fullgraph=True, backend="eager")
    before = model(x)
    cn_hf.patch_model(model)
    assert difference(model(x, context_ids=1), before) <= 1e-5
    tell_apart(model)
    assert difference(model(x, context_ids=1), before) > 1e-3


def test_wrong_ids_are_refused_under_compile_by_shape_and_dtype() -> None:
    model, x = patched(token_net), torch.randn(4, 3, 5)
    compiled = torch.compile(model, backend="eager")
    for ids in (torch.zeros(3, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises((CnHfError, torch._dynamo.exc.TorchDynamoException)):
            compiled(x, context_ids=ids)
    with pytest.raises((CnHfError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(model.train(), backend="eager")(x)
    model.eval()
    assert model(x, context_ids=1).shape == (4, 3, 3)


@torch.no_grad()
def test_two_compiled_models_do_not_meet() -> None:
    first, second, x = patched(token_net), tell_apart(patched(token_net)), torch.randn(4, 3, 5)
    a, b = (torch.compile(model, fullgraph=True, backend="eager") for model in (first, second))
    for r, s in ((0, 1), (2, 0)):
        ids, others = torch.full((4,), r), torch.full((4,), s)
        assert difference(a(x, context_ids=ids), first(x, context_ids=ids)) <= 1e-6
        assert difference(b(x, context_ids=others), second(x, context_ids=others)) <= 1e-6
        assert difference(a(x), first(x)) <= 1e-6


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("make", [small_vit, small_convnet], ids=lambda f: f.__name__)
@torch.no_grad()
def test_export_with_ids_as_an_input_and_a_dynamic_batch(make: Callable[[], nn.Module]) -> None:
    model = patched(make)
    batch = torch.export.Dim("batch", min=1, max=64)
    ids = torch.tensor([0, 1, 2, 1])
    dynamic = {"x": {0: batch}, "context_ids": {0: batch}}
    program = torch.export.export(model, (images(),), {"context_ids": ids}, dynamic_shapes=dynamic)
    graph = program.module()
    for n in (1, 2, 4, 9):
        x, others = images(n), (torch.arange(n) * 2 + 1) % 3
        assert difference(graph(x, context_ids=others), model(x, context_ids=others)) <= 1e-5
    assert difference(model(images(), context_ids=ids), graph(images(), context_ids=ids)) <= 1e-5
    assert all(type(p.data) is Tensor for p in model.parameters())


@torch.no_grad()
def test_export_with_soft_ids_and_without_ids() -> None:
    model, x = patched(token_net), torch.randn(4, 3, 5)
    soft = torch.rand(4, 3).softmax(1)
    graph = torch.export.export(model, (x,), {"context_ids": soft}).module()
    other = torch.rand(4, 3).softmax(1)
    assert difference(graph(x, context_ids=other), model(x, context_ids=other)) <= 1e-6
    graph = torch.export.export(model, (x,)).module()
    assert difference(graph(x), model(x)) <= 1e-6
    assert difference(model(x, context_ids=2), model(x, context_ids=torch.full((4,), 2))) <= 1e-6


@torch.no_grad()
def test_export_of_more_contexts_than_samples() -> None:
    model, x = patched(token_net, num_contexts=300), torch.randn(4, 3, 5)
    batch = torch.export.Dim("batch", min=1, max=512)
    ids = torch.tensor([0, 299, 150, 7])
    dynamic = {"x": {0: batch}, "context_ids": {0: batch}}
    graph = torch.export.export(model, (x,), {"context_ids": ids}, dynamic_shapes=dynamic).module()
    for n in (4, 400):
        x, ids = torch.randn(n, 3, 5), (torch.arange(n) * 7) % 300
        assert difference(graph(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-6
