"""norm/convolution.py: normalization and convolution in one function, against the two one after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import cn_hf
import cn_hf.models
from cn_hf.errors import InputShapeError, InputTypeError
from cn_hf.norm import ContextNorm, convolution
from cn_hf.norm.convolution import normalized_conv2d

ONE_FUNCTION = "_NormalizedConv2dBackward"
EPS = 1e-3


def is_one_function(out: Tensor) -> bool:
    return out.grad_fn is not None and out.grad_fn.name() == ONE_FUNCTION


def slow(x: Tensor, mean: Tensor, var: Tensor, *args: Any, eps: float = EPS, **geometry: Any) -> Tensor:
    normalized = (x - mean[:, :, None, None]) / (var[:, :, None, None] + eps).sqrt()
    return F.conv2d(normalized, *args, **geometry)


def tensors(
    n: int = 3,
    channels: int = 3,
    out: int = 4,
    size: tuple[int, int] = (14, 13),
    kernel: tuple[int, int] = (3, 3),
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """x, mean, var, weight, bias; all but x want gradients."""
    generator = torch.Generator().manual_seed(n + 10 * channels + 100 * out)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(n, channels, *size) * 2 + 3
    mean = draw(n if rows is None else rows, channels) + 2
    leaves = mean, mean.abs() + 0.3, draw(out, channels, *kernel), draw(out)
    return (x, *(leaf.requires_grad_() for leaf in leaves))


GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3x3": ({}, {"padding": (1, 1)}),
    "unpadded": ({"size": (15, 14)}, {}),
    "1x1": ({"kernel": (1, 1)}, {}),
    "5x5 strided": ({"kernel": (5, 5), "size": (25, 26)}, {"stride": (2, 2), "padding": (2, 2)}),
    "uneven": (
        {"kernel": (4, 3), "size": (31, 29)},
        {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    ),
    "stride beyond the kernel": ({"kernel": (2, 1), "size": (37, 41)}, {"stride": (3, 3)}),
    "dilated": ({"size": (17, 18)}, {"dilation": (2, 3), "padding": (2, 4)}),
    "padded beyond the kernel": ({"size": (7, 9)}, {"padding": (5, 4)}),
    "a 1x1 image, padded": ({"size": (1, 1), "kernel": (1, 1)}, {"padding": (6, 6)}),
    "patches": ({"kernel": (4, 4), "size": (48, 49)}, {"stride": (4, 4)}),
    "one channel, one sample": ({"channels": 1, "n": 1}, {"padding": (1, 1)}),
    "four channels, one output": ({"channels": 4, "out": 1}, {"padding": (1, 1)}),
    "one row for all": ({"rows": 1, "n": 5}, {"padding": (1, 1)}),
}


@pytest.mark.parametrize("chunk", [1, 2 * 14 * 13 * 31 + 1, 2**21])  # a sample, about two samples, and all at once
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_equal_the_composition(
    name: str, channels_last: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_CHUNK", chunk)
    shapes, geometry = GEOMETRIES[name]
    x, *leaves = tensors(**shapes)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mine, theirs = normalized_conv2d(x, *leaves, eps=EPS, **geometry), slow(x, *leaves, **geometry)
    assert is_one_function(mine)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    direction = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(out, leaves, direction) for out in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), (1, 3), (0, 1)])
def test_frozen_tensors_get_no_gradient(wanted: tuple[int, ...]) -> None:
    x, *leaves = tensors()
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    mine, theirs = normalized_conv2d(x, *leaves, eps=EPS), slow(x, *leaves)
    assert is_one_function(mine)
    mine.sum().backward()
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        if leaf.grad is not None:
            (expected,) = torch.autograd.grad(theirs.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(leaf.grad, expected, atol=1e-10, rtol=1e-10)


def test_without_a_bias_and_in_float32() -> None:
    x, *leaves = tensors(n=9, out=7, size=(32, 31), kernel=(5, 5), dtype=torch.float32)
    leaves = leaves[:3]
    mine = normalized_conv2d(x, *leaves, eps=EPS, padding=(2, 2))
    assert is_one_function(mine)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = slow(x.double(), *wide, padding=(2, 2))
    direction = torch.randn_like(mine)
    got = torch.autograd.grad(mine, leaves, direction)
    for a, b in zip(got, torch.autograd.grad(theirs, wide, direction.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


# ------------------------------------------------------------------------------------------- derivatives of derivatives


def test_first_and_second_derivatives_equal_finite_differences() -> None:
    x, *leaves = tensors(n=2, channels=2, out=1, size=(3, 3), kernel=(2, 1))
    geometry = {"padding": (5, 6), "dilation": (2, 1)}

    def function(*values: Tensor) -> Tensor:
        return normalized_conv2d(x, *values, eps=EPS, **geometry)

    assert is_one_function(function(*leaves))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_of_many_directions_at_once() -> None:
    x, *leaves = tensors()
    mine, theirs = normalized_conv2d(x, *leaves, eps=EPS), slow(x, *leaves)
    directions = torch.randn(4, *mine.shape, dtype=torch.float64)
    pairs = (torch.autograd.grad(out, leaves, directions, is_grads_batched=True) for out in (mine, theirs))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


# --------------------------------------------------------------------------------------------- where it is not for it


def refused(name: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments with which the composition must be taken."""
    shapes: dict[str, Any] = {
        "five channels": {"channels": 5},
        "few positions": {"size": (10, 12)},
        "batch of none": {"n": 0, "rows": 1},
    }.get(name, {})
    x, mean, var, weight, bias = tensors(**shapes)
    geometry: dict[str, Any] = {}
    if name == "x wants a gradient":
        x.requires_grad_()
    elif name == "statistics want none":
        mean, var = mean.detach(), var.detach()
    elif name == "wider statistics":
        x, weight, bias = x.float(), weight.detach().float().requires_grad_(), bias.detach().float()
    elif name == "groups":
        geometry["groups"], weight = 3, torch.randn(6, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        bias = bias.new_zeros(6)
    elif name in ("same", "valid"):
        geometry["padding"] = name
    elif name == "subclass":
        weight = weight.detach().as_subclass(type("Quantized", (Tensor,), {})).requires_grad_()
    return (x, mean, var, weight, bias), geometry


@pytest.mark.parametrize(
    "name",
    [
        "five channels",
        "few positions",
        "batch of none",
        "x wants a gradient",
        "statistics want none",
        "wider statistics",
        "groups",
        "same",
        "valid",
        "subclass",
    ],
)
def test_elsewhere_it_is_the_composition(name: str) -> None:
    arguments, geometry = refused(name)
    mine = normalized_conv2d(*arguments, eps=EPS, **geometry)
    assert mine.dtype == arguments[0].dtype
    assert not is_one_function(mine)
    theirs = slow(*(tensor.double() for tensor in arguments), **geometry)
    tolerance = {"atol": 1e-3, "rtol": 1e-5} if name == "wider statistics" else {"atol": 1e-10, "rtol": 1e-10}
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    gradients = (torch.autograd.grad(out.sum(), leaves) for out in (mine, theirs))
    for a, b in ((mine, theirs), *zip(*gradients, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, check_dtype=False)


def test_without_gradients_it_is_the_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution._NormalizedConv2d, "apply", None)
    arguments = tensors()
    with torch.no_grad():
        mine = normalized_conv2d(*arguments, eps=EPS)
    torch.testing.assert_close(mine, slow(*arguments).detach())
    with torch.inference_mode():
        torch.testing.assert_close(normalized_conv2d(*arguments, eps=EPS), mine)


def test_under_autocast_it_is_the_composition() -> None:
    x, *leaves = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = normalized_conv2d(x, *leaves, eps=EPS)
    assert out.dtype == torch.bfloat16
    assert not is_one_function(out)


def test_backward_under_autocast_is_as_exact() -> None:
    x, *leaves = tensors(dtype=torch.float32)
    out = normalized_conv2d(x, *leaves, eps=EPS)
    assert is_one_function(out)
    outside = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_forward_mode_reaches_the_weight() -> None:
    x, mean, var, weight, bias = tensors()
    direction = torch.randn_like(weight)
    with forward_ad.dual_level():
        out = normalized_conv2d(x, mean, var, forward_ad.make_dual(weight, direction), bias, eps=EPS)
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, slow(x, mean, var, direction), atol=1e-10, rtol=1e-10)


def test_gradients_of_single_samples_by_vmap() -> None:
    x, *leaves = tensors()
    leaves = [leaf.detach() for leaf in leaves]
    axes = (0, 0, 0, None, None)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda sample, mean, var, weight, bias: (
            function(sample[None], mean[None], var[None], weight, bias).square().sum()
        )

    mine = loss(lambda *arguments: normalized_conv2d(*arguments, eps=EPS))
    gradients = (torch.func.vmap(torch.func.grad(f, (1, 2, 3, 4)), axes)(x, *leaves) for f in (mine, loss(slow)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_integer_images_are_refused() -> None:
    x, *leaves = tensors()
    with pytest.raises(InputTypeError, match="float"):
        normalized_conv2d(x.to(torch.uint8), *leaves, eps=EPS)


# ------------------------------------------------------------------------------------------------------ in a model


class Network(nn.Module):
    """A convolution that receives the image, then a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, **{"padding": 1, **options})
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.conv(x)).mean((2, 3)))


def patched(num_contexts: int = 3, conv: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    model = Network(**(conv or {})).double()
    cn_hf.patch_model(model, "cn-channels", where="input", num_contexts=num_contexts, **options)
    for parameter in cn_hf.context_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 12, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1


def first_node(model: Any, x: Tensor, ids: Any) -> str:
    """Name of what made the convolution's output."""
    names: list[str] = []
    handle = model.conv.register_forward_hook(lambda _, __, out: names.append(out.grad_fn.name()))
    model(x, context_ids=ids)
    handle.remove()
    return names[-1]


def gradients(model: nn.Module, *calls: tuple[Tensor, Any]) -> list[Tensor]:
    """Of all parameters, of a loss over several calls."""
    loss = sum(model(x, context_ids=ids).square().sum() * (1 + i) for i, (x, ids) in enumerate(calls))
    return [torch.zeros_like(p) if g is None else g for p, g in _pairs(model, loss)]


def _pairs(model: nn.Module, loss: Any) -> list[tuple[Tensor, Tensor | None]]:
    parameters = list(model.parameters())
    return list(zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """``gradients`` by the composition."""

    def run(*arguments: Any) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(convolution, "_MOST_CHANNELS", 0)
            return gradients(*arguments)

    return run


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(1)


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize(
    ("num_contexts", "ids"),
    [
        (3, torch.tensor([2, 0, 0, 1, 2, 0])),
        (3, torch.tensor([1, 1, 1, 1, 1, 1])),
        (3, SOFT),
        (3, 2),
        (1, 0),
        (50, torch.tensor([49, 0, 7, 7, 30, 12])),
    ],
    ids=["hard", "one context", "soft", "int", "T=1", "T>N"],
)
def test_a_model_gets_the_gradients_of_the_composition(
    num_contexts: int, ids: Any, parametrization: str, composed: Callable[..., list[Tensor]]
) -> None:
    model = patched(num_contexts, parametrization=parametrization)
    assert first_node(model, images(), ids) == ONE_FUNCTION
    mine = gradients(model, (images(), ids))
    assert_equal(mine, composed(model, (images(), ids)))
    assert all(bool(gradient.any()) for gradient in mine)


def test_the_geometry_is_the_convolution_s_own(composed: Callable[..., list[Tensor]]) -> None:
    model, ids = patched(conv={"stride": (1, 2), "padding": (5, 9), "dilation": (2, 3)}), torch.arange(6) % 3
    assert first_node(model, images(), ids) == ONE_FUNCTION
    plain = F.conv2d(
        model.conv.normalizer(images(), ids), model.conv.weight, model.conv.bias, (1, 2), (5, 9), dilation=(2, 3)
    )
    with cn_hf.use_contexts(model, ids):
        torch.testing.assert_close(model.conv(images()), plain, atol=1e-10, rtol=1e-10)
    assert_equal(gradients(model, (images(), ids)), composed(model, (images(), ids)))


def test_soft_ids_get_their_gradient(composed: Callable[..., list[Tensor]]) -> None:
    model, wanted = patched(), []
    for channels in (4, 0):
        ids = SOFT.clone().requires_grad_()
        convolution._MOST_CHANNELS, before = channels, convolution._MOST_CHANNELS
        try:
            wanted.append(torch.autograd.grad(model(images(), context_ids=ids).square().sum(), ids)[0])
        finally:
            convolution._MOST_CHANNELS = before
    assert_equal(wanted[:1], wanted[1:])


def test_two_forwards_before_one_backward(composed: Callable[..., list[Tensor]]) -> None:
    model = patched()
    calls = (images(), torch.tensor([0, 1, 2, 0, 1, 2])), (images(4) + 1, torch.tensor([2, 2, 0, 1]))
    assert_equal(gradients(model, *calls), composed(model, *calls))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, composed: Callable[..., list[Tensor]]) -> None:
    model, ids = patched(), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = composed(model, (images(), ids))
    inside, used = model.conv, []

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            anchor = torch.ones((), dtype=x.dtype, requires_grad=True)  # what reentrant checkpoints need
            return checkpoint(lambda image, _: inside(image), x, anchor, use_reentrant=use_reentrant)

    handle = inside.register_forward_hook(lambda _, __, out: used.append(is_one_function(out)))
    model.conv = Checkpointed()
    model.conv.inside = inside
    out = model(images(), context_ids=ids).square().sum()
    out.backward()
    handle.remove()
    assert used == ([False, True] if use_reentrant else [True])  # the one that is differentiated
    by_name = dict(zip([n for n, _ in patched().named_parameters()], expected, strict=True))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, by_name[name.replace(".inside", "")], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_the_same_way(copied: Callable[[Any], Any]) -> None:
    model, ids = patched(), torch.tensor([0, 1, 2, 0, 1, 2])
    twin = copied(model)
    assert type(twin.conv) is type(model.conv)
    assert first_node(twin, images(), ids) == ONE_FUNCTION
    assert_equal(gradients(twin, (images(), ids)), gradients(model, (images(), ids)))


@pytest.mark.parametrize(
    ("mode", "conv", "options"),
    [
        ("cn-channels", {}, {"affine": True}),
        ("bn", {}, {}),
        ("cn-channels", {"padding_mode": "reflect"}, {}),
        ("cn-channels", {"padding": "same"}, {}),
        ("cn-channels", {"groups": 3}, {}),
    ],
    ids=["affine", "bn", "reflect", "same", "groups"],
)
def test_other_slots_stay_the_composition(mode: str, conv: dict[str, Any], options: dict[str, Any]) -> None:
    model = Network(**conv).double()
    plain, ids = copy.deepcopy(model), torch.tensor([0, 1, 2, 0, 1, 2])
    cn_hf.patch_model(model, mode, where="input", num_contexts=3, **options)
    assert first_node(model, images(), ids) != ONE_FUNCTION
    if mode != "bn":  # which normalises by the batch
        torch.testing.assert_close(model(images(), context_ids=ids), plain(images()), atol=1e-6, rtol=1e-6)


def test_a_subclass_of_conv2d_keeps_its_own_forward() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Network().double()
    model.conv = Doubled(3, 6, 3, padding=1).double()
    plain = copy.deepcopy(model)
    cn_hf.patch_model(model, "cn-channels", where="input", num_contexts=3)
    out = model(images(), context_ids=1)
    torch.testing.assert_close(out, plain(images()), atol=1e-6, rtol=1e-6)


def test_a_normalizer_of_another_kind_is_asked_itself() -> None:
    class Shifted(ContextNorm):
        def normalize(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().normalize(x, *args, **kwargs) + 1

    model, ids = patched(), torch.arange(6) % 3
    model.conv.normalizer.__class__ = Shifted
    expected = F.conv2d(model.conv.normalizer(images(), ids), model.conv.weight, model.conv.bias, padding=1)
    with cn_hf.use_contexts(model, ids):
        torch.testing.assert_close(model.conv(images()), expected)


def test_a_replaced_padding_stays() -> None:
    model, ids = patched(), torch.tensor([0, 1, 2, 0, 1, 2])
    model.conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)
    normalized = model.conv.normalizer(images(), ids)
    expected = F.conv2d(F.pad(normalized, (1, 1, 1, 1), "circular"), model.conv.weight, model.conv.bias)
    with cn_hf.use_contexts(model, ids):
        torch.testing.assert_close(model.conv(images()), expected)


def test_evaluation_without_ids_and_hooks() -> None:
    model, seen = patched(), []
    model.conv.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.conv.register_forward_hook(lambda _, __, out: seen.append(out))
    model(images(), context_ids=1)
    assert is_one_function(seen[0])
    conv = model.conv
    expected = slow(images() * 2, *conv.normalizer.statistics(1), conv.weight, conv.bias, eps=1e-5, padding=1)
    torch.testing.assert_close(seen[0], expected)
    model.eval()(images())
    assert not is_one_function(seen[1])


def test_calibrate_reaches_the_convolution() -> None:
    model = patched()
    x, ids = images(40), torch.arange(40) % 3
    cn_hf.calibrate(model, [(x, ids)])
    mean, _ = model.conv.normalizer.statistics()
    expected = torch.stack([x[ids == context].mean((0, 2, 3)) for context in range(3)])
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


def test_compile_and_export_take_the_composition(
    composed: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = patched(), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = composed(model, (images(), ids))
    monkeypatch.setattr(convolution, "_NormalizedConv2d", None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled, (images(), ids)), expected)
    program = torch.export.export(model.eval(), (images(),), {"context_ids": ids})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(), context_ids=ids), model(images(), context_ids=ids))


def test_images_of_other_channels_are_refused():
    model = cn_hf.patch_model(timm.create_model("cn_cifar_convnet", num_classes=3), mode="cn-channels", where="input")
    for training in (True, False):
        with pytest.raises(InputShapeError, match="expects 3 features along axis 1"):
            model.train(training)(torch.randn(2, 1, 32, 32), context_ids=0)
