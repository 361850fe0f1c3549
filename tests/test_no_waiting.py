"""Forward, backward and the mixture's EM never wait for the device.

There need be no GPU to see it: on fake CUDA tensors every read of a value raises, and on a CPU the operators that read
values can be listed as they run.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import cn_hf
from cn_hf import MixtureNorm
from cn_hf.norm import DomainBatchNorm

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item", "aten::equal"}


class Devices(TorchDispatchMode):
    """Names of the operators that run, and of those among them that meet a CPU tensor of one dimension or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.on_cpu: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_iter((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.names.append(func.name())
        if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
            self.on_cpu.append(func.name())
        return out


def vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    return cn_hf.patch_model(model, mode="cn-patches", where="norms")


def resnet() -> nn.Module:
    model = timm.create_model("resnet10t", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 1  # as trained
    return cn_hf.patch_model(model, mode="cn-channels")


def with_input() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    return cn_hf.patch_model(model, mode="cn-channels", where="input")


def to_fake_gpu(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mode:
            return module._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_a_fake_gpu_tells_of_every_value_read(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.randn(3, device="cuda")
        for read in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: int(x.argmax())):
            with pytest.raises(DataDependentOutputException):
                read()


@pytest.mark.parametrize("build", [vit, resnet, with_input])
@pytest.mark.parametrize("kind", ["hard", "soft", "one for all"])
def test_a_forward_with_ids_on_the_gpu(build: Any, kind: str, fake: FakeTensorMode) -> None:
    model = to_fake_gpu(build().train(), fake)
    with fake:
        x = torch.randn(4, 3, 32, 32, device="cuda")
        ids: Any = {
            "hard": lambda: torch.zeros(4, dtype=torch.int64, device="cuda"),
            "soft": lambda: torch.full((4, 3), 1 / 3, device="cuda"),
            "one for all": lambda: torch.zeros((), dtype=torch.int64, device="cuda"),
        }[kind]()
        for training in (True, False):
            with Devices() as seen:
                out = model.train(training)(x, context_ids=ids)
            assert out.device.type == "cuda"
            assert "aten::_assert_async" in seen.names  # the ids are checked all the same
            assert not seen.on_cpu


@pytest.mark.parametrize("plus", [{}, {"plus_stats": "batch", "plus_scale": "sqrt_t"}])
def test_cn_plus_on_the_gpu(plus: dict[str, str], fake: FakeTensorMode) -> None:
    model = to_fake_gpu(cn_hf.set_inference(vit(), "cn+", **plus).eval(), fake)
    with fake, Devices() as seen:
        model(torch.randn(4, 3, 32, 32, device="cuda"))
    assert not seen.on_cpu


def test_a_training_step_of_mn_on_the_gpu_after_the_first(fake: FakeTensorMode) -> None:
    """As many vectors as are thinned out; a graph of the step can be captured: nothing comes from the CPU."""
    norm = MixtureNorm(4, max_vectors=100)
    norm(torch.randn(2, 4, 10, 10))
    assert norm._places is not None
    (*batch, _), places = norm._places
    to_fake_gpu(norm, fake)
    with fake:
        x = torch.randn(2, 4, 10, 10, device="cuda")  # what a first step on that device would have left:
        norm._places = (*batch, x.device), places.to("cuda")
        with Devices() as seen:
            norm(x)
    assert not seen.on_cpu


@pytest.mark.parametrize("build", [vit, resnet, with_input])
def test_backward_reads_no_value(build: Any) -> None:
    model = build().train()
    out = model(torch.randn(4, 3, 32, 32), context_ids=torch.tensor([0, 1, 2, 1]))
    with Devices() as seen:
        out.sum().backward()
    assert any(name.startswith("cn_hf::") for name in seen.names)
    assert not WAITING & set(seen.names)


def test_mn_trains_without_reading_a_value() -> None:
    norm = MixtureNorm(4, max_vectors=100)
    x = torch.randn(2, 4, 10, 10, requires_grad=True)
    norm(x)
    with Devices() as seen:
        norm(x).sum().backward()
    assert len(seen.names) > 20
    assert not WAITING & set(seen.names)


def test_domain_batch_norm_trains_without_reading_a_value(fake: FakeTensorMode) -> None:
    norm = DomainBatchNorm(4, 3)
    ids = torch.tensor([0, 2, 2, 0])
    with Devices() as seen:
        norm.normalize(torch.randn(4, 4, 5, 5, requires_grad=True), ids).sum().backward()
    assert not WAITING & set(seen.names)
    to_fake_gpu(norm, fake)
    with fake, Devices() as seen:
        norm(torch.randn(4, 4, 5, 5, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda"))
    assert not seen.on_cpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [vit, resnet, with_input])
def test_a_real_gpu_is_not_waited_for(build: Any) -> None:
    model = build().train().cuda()
    x, ids = torch.randn(4, 3, 32, 32, device="cuda"), torch.tensor([0, 1, 2, 1], device="cuda")
    model(x, context_ids=ids).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, context_ids=ids).sum().backward()
        norm = MixtureNorm(3).cuda()
        torch.cuda.set_sync_debug_mode("default")
        norm(x)
        torch.cuda.set_sync_debug_mode("error")
        norm(x).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_of_mn_as_a_cuda_graph() -> None:
    norm = MixtureNorm(8).cuda()
    x = torch.randn(16, 8, 8, 8, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            norm(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        out = norm(x)
        out.sum().backward()
    before = norm.running_mean.clone()
    graph.replay()
    assert not torch.equal(norm.running_mean, before)
    assert out.isfinite().all()
