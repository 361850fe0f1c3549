"""What people do to models with torch: compile, autocast, checkpoint, differentiate by sample, distribute, quantise."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import transformers
from models_for_tests import (
    SmallTokenNet,
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
from processes import free_port, run_together
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

import cn_hf
from cn_hf.models.wide_resnet import WideResNet


@seeded
def swin() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4}
    return settle(SwinTransformer(**sizes, num_classes=5))


@seeded
def convnext() -> nn.Module:
    return settle(ConvNeXt(depths=(1,) * 4, dims=(4, 8, 8, 8), patch_size=1, num_classes=5, ls_init_value=0.5))


@seeded
def wide_resnet() -> nn.Module:
    return settle(WideResNet(depth=10, widen_factor=1, num_classes=5))


@seeded
def hf_swin() -> nn.Module:
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    return settle(transformers.SwinForImageClassification(transformers.SwinConfig(image_size=16, **sizes)))


@seeded
def patched(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return tell_apart(cn_hf.patch_model(make(), **{"mode": "cn", **options}), 0.1)


def ids_of(num: int) -> Tensor:
    return (torch.arange(num) * 2 + 1) % 3


def loss_of(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return logits(model(x, context_ids=ids)).float().square().mean()


def gradients(model: nn.Module, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, x, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * scale, name


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
@pytest.mark.parametrize("make", [wide_resnet, convnext, swin], ids=lambda f: f.__name__)
@torch.no_grad()
def test_compiled_once_for_all_ids_and_batches(make: Callable[[], nn.Module]) -> None:
    """One graph, a symbolic batch, nothing compiled again; inductor itself is in ``test_compile``."""
    torch._dynamo.reset()
    model = patched(make)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    compiled(images(4), context_ids=ids_of(4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num in (3, 5, 8):
            x, ids = images(num), ids_of(num + 1)[1:]
            assert difference(compiled(x, context_ids=ids), model(x, context_ids=ids)) <= 1e-4


# ------------------------------------------------------------------------------------------- dtypes and memory formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [vit, small_convnet, convnext, swin, hf_vit], ids=lambda f: f.__name__)
def test_autocast(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    plain, model = make(), patched(make)
    x, ids = images(), ids_of(4)
    with torch.no_grad():
        exact, exact_plain = logits(model(x, context_ids=ids)), logits(plain(x))
        with torch.autocast("cpu", dtype):
            out, out_plain = logits(model(x, context_ids=ids)), logits(plain(x))
    assert out.dtype == out_plain.dtype
    assert difference(out, exact) <= 3 * difference(out_plain, exact_plain) + 20 * torch.finfo(dtype).eps
    model.train()
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, x, ids)
    loss.backward()
    for parameter in cn_hf.context_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("where", ["norms", "input"])
@pytest.mark.parametrize("make", [small_convnet, convnext, wide_resnet], ids=lambda f: f.__name__)
def test_channels_last(make: Callable[[], nn.Module], where: str) -> None:
    model = patched(make, mode="cn-channels", where=where)
    x, ids = images(), ids_of(4)
    expected, grads = logits(model(x, context_ids=ids)), gradients(model, x, ids)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert difference(logits(model(x, context_ids=ids)), expected) <= 1e-5
    assert_close(gradients(model, x, ids), grads)
    formats: list[bool] = []
    for row in cn_hf.patch_report(model):
        model.get_submodule(row.name).register_forward_hook(
            lambda _, __, y: formats.append(y.dim() != 4 or y.is_contiguous(memory_format=torch.channels_last))
        )
    model(x, context_ids=ids)
    assert formats
    assert all(formats)


@pytest.mark.parametrize("make", [vit, convnext, swin, wide_resnet, hf_vit, hf_swin], ids=lambda f: f.__name__)
def test_activation_checkpointing_in_both_libraries(make: Callable[[], nn.Module]) -> None:
    model = patched(make).train()
    batches = [(images(4), ids_of(4)), (images(4) + 1, torch.tensor([2, 2, 0, 1]))]

    def both() -> dict[str, Tensor]:
        """Two forwards with different contexts before one backward, running statistics as they were."""
        model.zero_grad()
        torch.manual_seed(0)
        sum(loss_of(model, x, ids) for x, ids in batches).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = both()
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing(True)
    assert_close(both(), expected, 1e-5)


# ---------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("options", [{}, {"parametrization": "table"}], ids=str)
@pytest.mark.parametrize("make", [vit, hf_vit], ids=lambda f: f.__name__)
def test_functional_call(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model, other = patched(make, **options), tell_apart(patched(make, **options), 0.2)
    x, ids = images(), ids_of(4)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    out = functional_call(model, state, (x,), {"context_ids": ids})
    assert torch.equal(logits(out), logits(other(x, context_ids=ids)))
    assert difference(logits(model(x, context_ids=ids)), logits(out)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"parametrization": "table"}, {"num_contexts": 40}], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)], ids=lambda n: type(n).__name__)
def test_gradients_sample_by_sample(norm: nn.Module, options: dict[str, Any]) -> None:
    model = patched(lambda: settle(SmallTokenNet(copy.deepcopy(norm))), **options)
    x, ids = torch.randn(5, 4, 5), torch.tensor([0, 2, 1, 2, 0])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor, context: Tensor) -> Tensor:
        out = functional_call(model, parameters, (sample[None],), {"context_ids": context[None]})
        return out.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, ids)
    for index in range(5):
        expected = gradients(model, x[index : index + 1], ids[index : index + 1])
        assert_close({name: value[index] for name, value in found.items()}, expected)


# ---------------------------------------------------------------------------------------------------- several processes


def _network() -> nn.Module:
    return patched(vit).train()


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> list[float]:
    losses = []
    for step in range(3):
        x, ids = images(8) + step, torch.arange(8).roll(step) % 3
        optimizer.zero_grad()
        loss = loss_of(model, x[part], ids[part])
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    try:
        results = {}
        model = DistributedDataParallel(_network())
        results["ddp"] = _losses(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), part)
        results["fsdp"] = _fully_sharded(part)
        if rank == 0:
            torch.save(results, Path(folder) / "losses.pt")
    finally:
        dist.destroy_process_group()


def _fully_sharded(part: slice) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = _network()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _losses(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), part)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    model = _network()
    expected = _losses(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), slice(None))
    run_together(_process, free_port(), str(tmp_path))
    results = torch.load(tmp_path / "losses.pt")
    assert expected[2] != expected[0]
    for name in ("ddp", "fsdp"):
        assert results[name] == pytest.approx(expected, rel=1e-5), name


# -------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize("make", [vit, hf_vit], ids=lambda f: f.__name__)
@torch.no_grad()
def test_dynamic_quantisation_of_a_folded_model(make: Callable[[], nn.Module]) -> None:
    model = patched(make)
    folded = cn_hf.fold_context(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(module).__module__ for module in quantised.modules()}
    assert any("quantized" in kind for kind in kinds)
    x = images()
    error = difference(logits(quantised(x)), logits(model(x, context_ids=1)))
    assert 0 < error <= 0.1
