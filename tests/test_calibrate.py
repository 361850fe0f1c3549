"""patching/calibrate.py: afterwards each layer's x-hat has mean 0 and variance 1 in each context of the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from models_for_tests import (
    Shared,
    SmallTokenNet,
    anatomy,
    hf_vit,
    images,
    logits,
    seeded,
    settle,
    small_convnet,
    tensors_of,
    text_net,
    vit,
    vit_with_every_slot,
)
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError, ContextIdError, PatchError

pytestmark = pytest.mark.filterwarnings("ignore:The second part of a batch")

FORMS = [(p, a) for p in ("embedder", "table") for a in ("softplus", "exp")]


def data(num_contexts: int, per_context: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images whose brightness, colour and contrast are their context's."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.arange(num_contexts).repeat(per_context)
    color = torch.randn(num_contexts, 3, 1, 1, generator=generator)
    contrast = torch.rand(num_contexts, 1, 1, 1, generator=generator) + 0.3
    return torch.randn(len(ids), 3, size, size, generator=generator) * contrast[ids] + color[ids], ids


def split(x: Tensor, ids: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), ids.split(sizes), strict=True))


@seeded
def plain_affine(model: nn.Module) -> nn.Module:
    """Affine maps and fused activations that can be undone, so that a slot's output tells its x-hat."""
    for module in model.modules():
        if hasattr(module, "act") and "Norm" in type(module).__name__:
            module.act = nn.Identity()
    return model


def check_moments(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Run the batches and measure every slot's x-hat at its output, context by context."""
    seen: dict[str, list[Tensor]] = {}
    slots = [(row.name, model.get_submodule(row.name)) for row in cn_hf.patch_report(model)]

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen.setdefault(name, []).append(output.detach())

        return record

    handles = [slot.register_forward_hook(hook(name)) for name, slot in slots]
    with torch.no_grad():
        for x, ids in batches:
            model(x, context_ids=ids)
    for handle in handles:
        handle.remove()
    ids = torch.cat([ids for _, ids in batches])
    for name, slot in slots:
        y = torch.cat(seen[name]).movedim(slot.normalizer.feature_dim, -1).double()
        y = y.reshape(len(y), -1, y.shape[-1])
        weight, bias = (getattr(slot, n, None) for n in ("weight", "bias"))
        if isinstance(weight, Tensor) and weight.shape == y.shape[-1:]:
            y = (y - (0 if bias is None else bias.double())) / weight.double()
        for context in ids.unique().tolist():
            values = y[ids == context].flatten(0, -2)
            assert values.mean(0).abs().max() <= 1e-3, (name, context)
            assert (values.var(0, unbiased=False) - 1).abs().max() <= 1e-2, (name, context)


@pytest.mark.parametrize("sizes", [[24], [5, 11, 8]], ids=["one batch", "three batches"])
@pytest.mark.parametrize(("parametrization", "activation"), FORMS)
@pytest.mark.parametrize("make", [vit_with_every_slot, small_convnet], ids=lambda f: f.__name__)
def test_each_layers_output_is_standardised(
    make: Callable[[], nn.Module], parametrization: str, activation: str, sizes: list[int]
) -> None:
    model = plain_affine(make())
    options = {"parametrization": parametrization, "variance_activation": activation}
    cn_hf.patch_model(model, "cn", **options)
    batches = split(*data(3), sizes)
    assert cn_hf.calibrate(model, batches) is model
    check_moments(model, batches)


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("num_contexts", [1, 2, 20])
def test_from_one_context_to_twenty(num_contexts: int, parametrization: str) -> None:
    for make, mode in ((vit, "cn-patches"), (small_convnet, "cn-channels")):
        model = plain_affine(make())
        cn_hf.patch_model(model, mode, num_contexts=num_contexts, parametrization=parametrization)
        x, ids = data(num_contexts)
        batches = split(x, ids, [len(x) // 2, len(x) - len(x) // 2])
        cn_hf.calibrate(model, batches)
        check_moments(model, batches)


@pytest.mark.parametrize(
    "make", [lambda: settle(timm.create_model("cn_wrn28_2")), lambda: vit(global_pool="avg")], ids=["wrn", "vit"]
)
def test_deep_models(make: Callable[[], nn.Module]) -> None:
    model = plain_affine(make())
    cn_hf.patch_model(model, "cn")
    batches = split(*data(3, 4), [12])
    cn_hf.calibrate(model, batches)
    check_moments(model, batches)


def test_an_embedding_of_patches_is_standardised() -> None:
    for make in (vit, hf_vit):
        model = cn_hf.patch_model(make(), where="embed")
        batches = split(*data(3), [24])
        cn_hf.calibrate(model, batches)
        check_moments(model, batches)


def test_the_input_is_standardised() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Flatten())
    model[0].weight.data.copy_(torch.eye(3)[:, :, None, None])
    cn_hf.patch_model(model.eval(), "cn-channels", where="input", num_contexts=4)
    x, ids = data(4)
    cn_hf.calibrate(model, [(x, ids)])
    y = model(x, context_ids=ids).view_as(x)
    for r in range(4):
        torch.testing.assert_close(y[ids == r].mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(y[ids == r].var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_the_statistics_are_those_of_the_inputs() -> None:
    x, ids = torch.randn(40, 6) * torch.linspace(0.1, 30, 6) + torch.linspace(-100, 100, 6), torch.arange(40) % 3
    for parametrization, activation in FORMS:
        model = settle(nn.Sequential(nn.Identity(), nn.BatchNorm1d(6, eps=1e-3)))
        cn_hf.patch_model(model, "cn", where=["1"], parametrization=parametrization, variance_activation=activation)
        cn_hf.calibrate(model, split(x, ids, [13, 20, 7]))
        mean, var = model[1].normalizer.statistics()
        for r in range(3):
            torch.testing.assert_close(mean[r], x[ids == r].mean(0), atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(var[r] + 1e-3, x[ids == r].var(0, unbiased=False), atol=1e-4, rtol=1e-4)


def test_training_has_moved_the_contexts_before() -> None:
    for parametrization in ("embedder", "table"):
        model = plain_affine(vit())
        cn_hf.patch_model(model, parametrization=parametrization, num_contexts=4)
        with torch.no_grad():
            for parameter in cn_hf.context_parameters(model):
                parameter.add_(torch.randn(parameter.shape))
        batches = split(*data(4), [32])
        cn_hf.calibrate(model, batches)
        check_moments(model, batches)


def test_embeddings_that_have_grown_alike_are_drawn_anew() -> None:
    model = plain_affine(vit())
    cn_hf.patch_model(model, num_contexts=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("normalizer.embedding"):
                parameter.copy_(torch.ones_like(parameter))
    batches = split(*data(4), [32])
    cn_hf.calibrate(model, batches)
    check_moments(model, batches)


# ---------------------------------------------------------------------------------------------------- forms of the data


class Batches:
    """Re-iterable, counts how often it is read, and never holds more than one batch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.epochs = 0

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


def test_every_form_of_batches_gives_the_same() -> None:
    x, ids = data(3)
    names = ("a", "b", "c")
    pairs = split(x, ids, [10, 14])
    forms: dict[str, Any] = {
        "list": pairs,
        "iterator": iter(pairs),
        "generator": (pair for pair in pairs),
        "re-iterable": Batches(pairs),
        "lists": [list(pair) for pair in pairs],
        "dictionaries": [{"pixel_values": a, "context_ids": b, "labels": b, "index": b} for a, b in pairs],
        "names": [(a, [names[r] for r in b]) for a, b in pairs],
        "one-hot": [(a, torch.eye(3)[b]) for a, b in pairs],
        "ints": [(x[ids == r], r) for r in range(3)],
        "an empty batch among them": [pairs[0], (x[:0], ids[:0]), pairs[1]],
    }
    expected = None
    for name, batches in forms.items():
        model = cn_hf.patch_model(vit(), parametrization="table", context_names=names)
        cn_hf.calibrate(model, batches)
        output = model(x, context_ids=ids)
        expected = output if expected is None else expected
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4, msg=name)


def test_keywords_of_forward() -> None:
    tokens = torch.arange(48).view(8, 6) % 30
    ids = torch.tensor([0, 1] * 4)
    model = cn_hf.patch_model(text_net(), num_contexts=2)
    cn_hf.calibrate(model, [{"tokens": tokens, "mask": torch.ones(8, 6), "context_ids": ids, "labels": ids}])
    check_moments(model, [(tokens, ids)])


def test_soft_ids_weigh_the_data() -> None:
    x = torch.randn(12, 4, 6) * 2 + 1
    weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    for sizes in ([12], [5, 7]):
        model = settle(nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, affine=False)))
        cn_hf.patch_model(model, "cn", where=["1"])
        cn_hf.calibrate(model, split(x, weights, sizes))
        mean, var = model[1].normalizer.statistics()
        for r in range(3):
            share = (weights[:, r] / weights[:, r].sum())[:, None, None].double()
            m = (x * share).sum(0).mean(-1)
            v = ((x - m[:, None]).square() * share).sum(0).mean(-1)
            torch.testing.assert_close(mean[r].double(), m, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(var[r].double() + 1e-5, v, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------- absent, constant, too few rows


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("names", [None, ("day", "night", "dawn", "dusk")])
def test_absent_contexts_are_left_alone_and_named(parametrization: str, names: Any) -> None:
    model = cn_hf.patch_model(vit(), num_contexts=4, context_names=names, parametrization=parametrization)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    slots = [model.get_submodule(row.name).normalizer for row in cn_hf.patch_report(model)]
    before = [[t.detach().clone() for t in norm.statistics()] for norm in slots]
    x, ids = data(4)
    present = (ids == 0) | (ids == 2)
    batches = split(x[present], ids[present], [9, 7])
    with pytest.warns(UserWarning, match="'night', 'dusk'" if names else "1, 3"):
        cn_hf.calibrate(model, batches)
    for norm, (mean, var) in zip(slots, before, strict=True):
        now_mean, now_var = norm.statistics()
        for absent in (1, 3):
            torch.testing.assert_close(now_mean[absent], mean[absent], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(now_var[absent], var[absent], atol=1e-4, rtol=1e-4)
    check_moments(model, batches)


def test_no_warning_where_every_context_is_there() -> None:
    model = cn_hf.patch_model(vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cn_hf.calibrate(model, split(*data(3), [10, 14]), contexts="pair")


@pytest.mark.parametrize("level", [0.0, 0.3, -1e4])
@pytest.mark.parametrize("sizes", [[24], [7, 17]])
def test_constant_features_keep_variance_one(level: float, sizes: list[int]) -> None:
    x = torch.randn(24, 4, 5)
    x[:, 2] = level
    ids = torch.arange(24) % 3
    x[ids == 1, 3] = 7.0  # constant in one context only
    model = settle(nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, affine=False)))
    cn_hf.patch_model(model, "cn", where=["1"])
    cn_hf.calibrate(model, split(x, ids, sizes))
    mean, var = model[1].normalizer.statistics()
    torch.testing.assert_close(var[:, 2] + 1e-5, torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean[:, 2], torch.full((3,), level), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(var[1, 3] + 1e-5, torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(var[0, 3] + 1e-5, x[ids == 0][:, 3].var(unbiased=False), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(model(x, context_ids=ids)).all()


def test_small_variances_and_large_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator) * torch.tensor([0.02, 1.0, 50.0]) + torch.tensor([0.5, 1000.0, -3e4])
    ids = torch.arange(64) % 2
    model = settle(nn.Sequential(nn.Identity(), nn.BatchNorm1d(3, affine=False)))
    cn_hf.patch_model(model, "cn", where=["1"], num_contexts=2)
    cn_hf.calibrate(model, split(x, ids, [30, 34]))
    y = model(x, context_ids=ids)
    for r in range(2):
        assert y[ids == r].mean(0).abs().max() <= 1e-3
        assert (y[ids == r].var(0, unbiased=False) - 1).abs().max() <= 1e-2


def test_an_embedder_too_narrow_is_an_error_and_nothing_changes() -> None:
    for sizes in ([48], [20, 28]):
        model = cn_hf.patch_model(vit(), num_contexts=6, embedding_dim=2)
        before, parts = tensors_of(model), anatomy(model)
        model.blocks[0].train()
        with pytest.raises(CnHfError, match=r"embedding_dim=2.*6 contexts.*approximate=True") as caught:
            cn_hf.calibrate(model, split(*data(6), sizes))
        assert isinstance(caught.value, ValueError)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
        assert anatomy(model) == parts
        assert model.blocks[0].training
        assert not model.blocks[1].training
        cn_hf.calibrate(model, split(*data(6), sizes), approximate=True)
        assert torch.isfinite(model(images(), context_ids=[0, 1, 2, 5])).all()
        assert not torch.equal(model.state_dict()["norm.normalizer.mean_weight"], before["norm.normalizer.mean_weight"])


def test_an_embedder_just_wide_enough() -> None:
    model = plain_affine(vit())
    cn_hf.patch_model(model, num_contexts=6, embedding_dim=5)
    batches = split(*data(6), [48])
    cn_hf.calibrate(model, batches)
    check_moments(model, batches)


# ------------------------------------------------------------------------------------------------------------ bad input


class Boom(Exception):  # noqa: N818
    pass


def interrupted(batches: list[Any]) -> Iterator[Any]:
    yield batches[0]
    raise Boom


@pytest.mark.parametrize(
    ("make_batches", "error"),
    [
        (lambda x, ids: [], PatchError),
        (lambda x, ids: [(x, None)], ContextIdError),
        (lambda x, ids: [{"pixel_values": x}], ContextIdError),
        (lambda x, ids: [(x, ids + 1)], ContextIdError),
        (lambda x, ids: [(x, ids), (x, ids[:-1])], ContextIdError),
        (lambda x, ids: [x], (TypeError, ValueError)),
        (lambda x, ids: [5], TypeError),
        (lambda x, ids: 5, TypeError),
        (lambda x, ids: [(x[:0], ids[:0])], PatchError),
        (lambda x, ids: interrupted([(x, ids)]), Boom),
        (lambda x, ids: [(x, ids), (x[:, :2], ids)], Exception),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(make_batches: Any, error: Any) -> None:
    model = cn_hf.patch_model(small_convnet(), "cn-channels")
    model.bn1.train()
    x, ids = data(3)
    before, output = tensors_of(model), model(images(), context_ids=1)
    flags = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(error):
        cn_hf.calibrate(model, make_batches(x, ids))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(model(images(), context_ids=1), output)


@pytest.mark.parametrize("sizes", [[24], [10, 14]])
def test_a_failure_after_some_layers_were_set_undoes_them(sizes: list[int]) -> None:
    model = cn_hf.patch_model(small_convnet(), "cn-channels")
    x, ids = data(3)
    before = tensors_of(model)

    def stop(*_: Any) -> None:
        raise Boom

    handle = model.gn.register_forward_pre_hook(stop)
    with pytest.raises(Boom):
        cn_hf.calibrate(model, split(x, ids, sizes))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cn_hf.calibrate(model, split(x, ids, sizes))
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_cannot_be_calibrated() -> None:
    batch = [data(3)]
    with pytest.raises(PatchError, match="not a patched model"):
        cn_hf.calibrate(vit(), batch)
    for mode in ("bn", "mn"):
        with pytest.raises(PatchError, match=mode):
            cn_hf.calibrate(cn_hf.patch_model(small_convnet(), mode, where=["bn1"]), batch)


def test_calibration_leaves_no_trace() -> None:
    model = cn_hf.patch_model(small_convnet(), "cn-channels", inference="average").train()
    parts, buffers = anatomy(model), {name: b.clone() for name, b in model.named_buffers()}
    grads = [p.grad for p in model.parameters()]
    x, ids = data(3)
    cn_hf.calibrate(model, [(x, ids)])
    assert anatomy(model) == parts
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [p.grad for p in model.parameters()] == grads
    assert all(p.requires_grad for p in cn_hf.context_parameters(model))
    model(x, context_ids=ids).sum().backward()
    with pytest.raises(ContextIdError):
        model(x)


def test_images_are_read_once_and_no_more_than_needed() -> None:
    reads = 0

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            nonlocal reads
            for step in range(10):
                reads += 1
                x, ids = data(3, 2)
                yield x + step, ids

    model = cn_hf.patch_model(vit(), "cn-patches")
    cn_hf.calibrate(model, Loader(), max_images=7)
    assert reads == 4
    first = [(data(3, 2)[0] + step, data(3, 2)[1]) for step in range(4)]
    x, ids = torch.cat([x for x, _ in first]), torch.cat([ids for _, ids in first])
    kept = torch.cat([(ids == context).nonzero().flatten()[:7] for context in range(3)])
    other = cn_hf.calibrate(cn_hf.patch_model(vit(), "cn-patches"), [(x[kept], ids[kept])])
    torch.testing.assert_close(model(x, context_ids=ids), other(x, context_ids=ids), atol=1e-4, rtol=1e-4)


def test_a_norm_in_two_places_is_calibrated_on_both() -> None:
    model = settle(Shared(nn.LayerNorm(6)))
    cn_hf.patch_model(model, num_contexts=2)
    x, ids = torch.randn(64, 6), torch.arange(64) % 2
    inputs: list[Tensor] = []
    model.first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        cn_hf.calibrate(model, [(x, ids)])
    except CnHfError:
        return
    assert torch.isfinite(model(x, context_ids=ids)).all()


def test_half_precision_models() -> None:
    model = plain_affine(vit()).bfloat16()
    cn_hf.patch_model(model)
    x, ids = data(3)
    cn_hf.calibrate(model, [(x.bfloat16(), ids)])
    assert torch.isfinite(logits(model(x.bfloat16(), context_ids=ids))).all()
    mean, _ = model.norm.normalizer.statistics()
    assert mean.std(0).max() > 1e-3


def test_a_token_net_with_rms_norm() -> None:
    model = settle(SmallTokenNet(nn.RMSNorm(6)))
    cn_hf.patch_model(model)
    batches = split(torch.randn(24, 7, 5) + 1, torch.arange(24) % 3, [24])
    cn_hf.calibrate(model, batches)
    check_moments(model, batches)
