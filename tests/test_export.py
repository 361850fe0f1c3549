"""Patched and folded models leave torch: torch.export and ONNX, a dynamic batch, context_ids an input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import (
    convnet,
    difference,
    hf_vit,
    images,
    logits,
    seeded,
    settle,
    small_convnet,
    tell_apart,
    vit,
)
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import cn_hf


@seeded
def swin() -> nn.Module:
    sizes = {
        "img_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2,),
        "num_classes": 5,
        "num_heads": (2,),
        "window_size": 4,
    }
    return settle(SwinTransformer(**sizes))


@seeded
def convnext() -> nn.Module:
    return settle(ConvNeXt(depths=(1,) * 4, dims=(4, 8, 8, 8), patch_size=1, num_classes=5, ls_init_value=0.5))


def small_vit() -> nn.Module:
    return vit(depth=1)


MODELS: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (small_vit, {}),
    (small_convnet, {}),
    (convnet, {"where": "input", "mode": "cn-channels"}),
    (swin, {}),
    (convnext, {"parametrization": "table"}),
    (hf_vit, {}),
]
NAMED = [pytest.param(make, options, id=make.__name__) for make, options in MODELS]


def patched(make: Callable[[], nn.Module], options: dict[str, Any]) -> nn.Module:
    return tell_apart(cn_hf.patch_model(make(), **{"mode": "cn", **options}))


def ids_of(num: int) -> Tensor:
    return (torch.arange(num) * 2 + 1) % 3


def shapes(model: nn.Module, *others: str) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1, max=64)
    first = "pixel_values" if hasattr(model, "config") else "input" if isinstance(model, nn.Sequential) else "x"
    return {name: {0: batch} for name in (first, *others)}


# -------------------------------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize(("make", "options"), NAMED)
@torch.no_grad()
def test_torch_export(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = patched(make, options)
    dynamic = shapes(model, "context_ids")
    graph = torch.export.export(model, (images(),), {"context_ids": ids_of(4)}, dynamic_shapes=dynamic).module()
    folded = cn_hf.fold_context(model, 1)
    plain = torch.export.export(folded, (images(),), dynamic_shapes=shapes(folded)).module()
    for num in (1, 3, 9):
        x, ids = images(num), ids_of(num)
        assert difference(logits(graph(x, context_ids=ids)), logits(model(x, context_ids=ids))) <= 1e-5
        assert difference(logits(plain(x)), logits(model(x, context_ids=1))) <= 1e-5


def is_nan_where_no_context(run: Callable[..., Tensor], model: nn.Module) -> None:
    ids = torch.tensor([1, -1, 2, 3, 0, -3, 2**40])
    valid = (ids >= 0) & (ids < 3)
    out, expected = run(images(7), ids), logits(model(images(7), context_ids=ids.where(valid, 0)))
    assert difference(out[valid], expected[valid]) <= 1e-5
    assert bool(out[~valid].isnan().all())


GUARDED = [*(NAMED[index] for index in (0, 1, 2, 5)), pytest.param(small_convnet, {"mode": "dsbn"}, id="dsbn")]


@pytest.mark.parametrize(("make", "options"), GUARDED)
@torch.no_grad()
def test_an_id_that_is_no_context_gives_nan(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = patched(make, options)
    dynamic = shapes(model, "context_ids")
    graph = torch.export.export(model, (images(),), {"context_ids": ids_of(4)}, dynamic_shapes=dynamic).module()
    is_nan_where_no_context(lambda x, ids: logits(graph(x, context_ids=ids)), model)


@torch.no_grad()
def test_an_id_that_is_none_of_many_contexts_gives_nan() -> None:
    model = patched(small_convnet, {"num_contexts": 300, "embedding_dim": 3})
    graph = torch.export.export(model, (images(),), {"context_ids": ids_of(4)}).module()
    ids = torch.tensor([299, -1, 300, 0])
    out = graph(images(), context_ids=ids)
    assert difference(out[[0, 3]], model(images()[[0, 3]], context_ids=ids[[0, 3]])) <= 1e-5
    assert bool(out[[1, 2]].isnan().all())


# ---------------------------------------------------------------------------------------------------------------- ONNX


def run_onnx(path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    """Write a model as ONNX with torch's exporter, and return what runs it in ONNX Runtime."""
    pytest.importorskip("onnx", reason="ONNX export needs pip install onnx onnxscript")
    pytest.importorskip("onnxscript", reason="ONNX export needs pip install onnx onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="checking an ONNX file needs pip install onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, args, str(path), kwargs=kwargs, dynamic_shapes=shapes(model, *kwargs), dynamo=True, verbose=False
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor, *others: Tensor) -> Tensor:
        names = [value.name for value in session.get_inputs()]
        assert len(names) == 1 + len(others)
        feeds = {name: tensor.numpy() for name, tensor in zip(names, (x, *others), strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options"), [NAMED[0], *NAMED[2:4], NAMED[5]])
@torch.no_grad()
def test_onnx(make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    model = patched(make, options)
    run = run_onnx(tmp_path / "patched.onnx", model, images(), context_ids=ids_of(4))
    for num in (1, 3, 9):
        x, ids = images(num), ids_of(num)
        expected = logits(model(x, context_ids=ids))
        assert difference(run(x, ids), expected) <= 1e-5
        assert difference(run(x, (ids + 1) % 3), expected) > 1e-3
    is_nan_where_no_context(run, model)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_folded_model(tmp_path: Path) -> None:
    model = patched(small_convnet, {})
    run = run_onnx(tmp_path / "folded.onnx", cn_hf.fold_context(model, 1), images())
    for num in (1, 3, 9):
        assert difference(run(images(num)), model(images(num), context_ids=1)) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_weights_and_of_no_ids(tmp_path: Path) -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten()))
    tell_apart(cn_hf.patch_model(model, "cn"))
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    run = run_onnx(tmp_path / "soft.onnx", model, images(), context_ids=weights[:4])
    assert difference(run(images(5), weights), model(images(5), context_ids=weights)) <= 1e-5
    run = run_onnx(tmp_path / "plus.onnx", model, images())
    assert difference(run(images(5)), model(images(5))) <= 1e-5
