"""patching/routing.py: context ids from ``forward`` to the layers, and what evaluation without ids does."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from models_for_tests import (
    SmallTokenNet,
    difference,
    hf_vit,
    images,
    logits,
    refusal,
    seeded,
    small_convnet,
    tell_apart,
    text_net,
    vit,
    vit_with_every_slot,
)
from processes import run_together
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import cn_hf
from cn_hf import CnHfError, ConfigError, ContextIdError, PatchError

NAMES = ("day", "night", "dawn")


@seeded
def patched(make: Callable[[], nn.Module] = vit, **options: Any) -> nn.Module:
    return tell_apart(cn_hf.patch_model(make(), "cn", context_names=NAMES, **options))


def one_by_one(model: nn.Module, x: Tensor, ids: list[int]) -> Tensor:
    """Each sample alone, by an int: the slow obvious reference."""
    return torch.cat([logits(model(x[i : i + 1], context_ids=r)) for i, r in enumerate(ids)])


# ----------------------------------------------------------------------------------------------------- forms of the ids

IDS = [2, 0, 1, 2]
FORMS: dict[str, Any] = {
    "int64": torch.tensor(IDS),
    "int32": torch.tensor(IDS, dtype=torch.int32),
    "uint8": torch.tensor(IDS, dtype=torch.uint8),
    "list": IDS,
    "tuple": tuple(IDS),
    "numpy": np.array(IDS),
    "numpy-int16": np.array(IDS, dtype=np.int16),
    "names": [NAMES[r] for r in IDS],
    "names-tuple": tuple(NAMES[r] for r in IDS),
    "one-hot": torch.eye(3)[IDS],
    "one-hot-half": torch.eye(3)[IDS].half(),
    "one-hot-double": torch.eye(3)[IDS].double(),
    "one-hot-list": torch.eye(3)[IDS].tolist(),
    "strided": torch.tensor([2, 9, 0, 9, 1, 9, 2])[::2],
}
SINGLE: dict[str, Any] = {"int": 1, "name": "night", "0-dim": torch.tensor(1), "numpy": np.int64(1)}


@pytest.mark.parametrize("make", [vit_with_every_slot, hf_vit, small_convnet, text_net], ids=lambda f: f.__name__)
def test_every_form_of_ids_means_the_same(make: Callable[[], nn.Module]) -> None:
    model = patched(make)
    x = torch.arange(24).view(4, 6) if make is text_net else images()
    expected = one_by_one(model, x, IDS)
    for name, ids in FORMS.items():
        assert difference(logits(model(x, context_ids=ids)), expected) <= 1e-5, name
        with cn_hf.use_contexts(model, ids):
            assert difference(logits(model(x)), expected) <= 1e-5, name
    expected = one_by_one(model, x, [1, 1, 1, 1])
    for name, ids in SINGLE.items():
        assert difference(logits(model(x, context_ids=ids)), expected) <= 1e-5, name
        with cn_hf.use_contexts(model, ids):
            assert difference(logits(model(x)), expected) <= 1e-5, name


def test_soft_ids_mix_the_statistics() -> None:
    model = cn_hf.patch_model(SmallTokenNet(nn.LayerNorm(6)).eval(), parametrization="table")
    norm, x = model.norm.normalizer, torch.randn(2, 4, 5)
    mean, var = torch.randn(3, 6), torch.rand(3, 6) + 0.5
    norm.set_statistics(mean, var)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    inner = nn.functional.layer_norm(model.inner(x), (6,))
    mixed = (inner - (weights @ mean)[:, None]) / ((weights @ var)[:, None] + norm.eps).sqrt()
    torch.testing.assert_close(model(x, context_ids=weights), model.head(mixed), atol=1e-5, rtol=1e-5)


def test_soft_ids_get_gradients() -> None:
    model = patched()
    weights = torch.randn(4, 3).softmax(1).requires_grad_()
    model(images(), context_ids=weights).square().sum().backward()
    assert weights.grad is not None
    assert weights.grad.abs().sum() > 0


WRONG: dict[str, Any] = {
    "too few": [0, 1],
    "too many": torch.zeros(5, dtype=torch.int64),
    "too large": torch.tensor([0, 1, 2, 3]),
    "negative": torch.tensor([0, 1, 2, -1]),
    "int too large": 3,
    "int negative": -1,
    "bool": True,
    "bools": torch.tensor([True, False, True, False]),
    "hard as float": torch.tensor([0.0, 1.0, 2.0, 0.0]),
    "float": 1.5,
    "one-hot integers": torch.eye(3, dtype=torch.int64)[IDS],
    "column": torch.zeros(4, 1, dtype=torch.int64),
    "soft of another width": torch.full((4, 4), 0.25),
    "soft not summing to one": torch.full((4, 3), 0.5),
    "soft negative": torch.tensor([[1.5, -0.5, 0.0]] * 4),
    "soft nan": torch.full((4, 3), float("nan")),
    "soft infinite": torch.tensor([[float("inf"), 0.0, 0.0]] * 4),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "unknown name": "nihgt",
    "unknown among names": ["day", "night", "dawn", "dusk"],
    "mixed": ["day", 1, 2, 0],
    "empty": [],
    "object": object(),
    "bytes": b"day",
    "dictionary": {"day": 1},
    "ragged": [[0, 1], [2]],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ids", WRONG.values(), ids=WRONG.keys())
def test_wrong_ids_are_an_error_before_any_layer_runs(ids: Any, training: bool) -> None:
    model = patched().train(training)
    calls: list[str] = []
    model.patch_embed.proj.register_forward_pre_hook(lambda *_: calls.append("ran"))
    with pytest.raises(ContextIdError) as caught:
        model(images(), context_ids=ids)
    assert isinstance(caught.value, (CnHfError, ValueError))
    assert calls == []
    with pytest.raises(ContextIdError), cn_hf.use_contexts(model, ids):
        model(images())
    assert calls == []
    model.eval()
    assert torch.equal(model(images(), context_ids=1), patched()(images(), context_ids=1))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ContextIdError, match=r"'nihgt'.*did you mean 'night'"):
        patched()(images(), context_ids="nihgt")
    with pytest.raises(ContextIdError, match="have no names"):
        cn_hf.patch_model(vit())(images(), context_ids="day")


@pytest.mark.parametrize(
    "call", [lambda m, ids: m(images(), context_ids=ids), cn_hf.use_contexts], ids=["forward", "use"]
)
def test_none_for_use_contexts_is_an_error_or_means_none(call: Any) -> None:
    model = patched()
    expected = model(images())
    try:
        result = call(model, None)
        if not isinstance(result, Tensor):
            with result:
                result = model(images())
    except ContextIdError:
        return
    assert torch.equal(result, expected)


def test_missing_ids_are_an_error_in_training_and_where_the_config_says_so() -> None:
    for make in (vit, hf_vit, small_convnet):
        model = patched(make).train()
        with pytest.raises(ContextIdError, match="context_ids"):
            model(images())
        model.eval()(images())
        cn_hf.set_inference(model, "cn")
        with pytest.raises(ContextIdError, match=r"context_ids.*set_inference"):
            model(images())
        assert logits(model(images(), context_ids=1)).shape == (4, 5)


def test_baselines_take_ids_and_need_none() -> None:
    for mode in ("bn", "mn"):
        model = cn_hf.patch_model(small_convnet(), mode, where=["bn1"])
        for training in (False, True):
            model.train(training)
            model(images())
            model(images(), context_ids=torch.tensor(IDS))


def test_positional_and_keyword_inputs() -> None:
    model, x = patched(hf_vit), images()
    expected = one_by_one(model, x, IDS)
    ids = torch.tensor(IDS)
    labels = torch.tensor([0, 1, 2, 3])
    for output in (
        model(x, context_ids=ids),
        model(pixel_values=x, context_ids=ids),
        model(context_ids=ids, labels=labels, pixel_values=x),
    ):
        assert difference(output.logits, expected) <= 1e-5
    assert difference(model(x, context_ids=ids, return_dict=False)[0], expected) <= 1e-5
    text, tokens = patched(text_net), torch.arange(24).view(4, 6)
    mask = (tokens % 5 > 0).float()
    masked = torch.cat([text(tokens[i : i + 1], mask[i : i + 1], context_ids=r) for i, r in enumerate(IDS)])
    assert difference(text(tokens, mask=mask, context_ids=ids), masked) <= 1e-5


def test_a_forward_without_tensors_needs_no_ids() -> None:
    class Many(SmallTokenNet):
        def forward(self, batch: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
            return [super(Many, self).forward(x) for x in batch]

    model, xs = Many(nn.LayerNorm(6)).eval(), [torch.randn(2, 4, 5), torch.randn(3, 4, 5)]
    before = model(xs)
    cn_hf.patch_model(model)
    for a, b in zip(model(xs), before, strict=True):
        assert difference(a, b) <= 1e-5
    with pytest.raises(CnHfError, match="tensor"):
        model(xs, context_ids=[0, 1])


# ------------------------------------------------------------------------------------------ windows, tiles, batch-major


class WithinWindows(nn.Module):
    """A norm of the tokens of each window, ``(N * windows, L, C)``, before attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = attention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(self.norm(x), mask=mask)


def test_windows_are_batch_major() -> None:
    model = SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=5
    ).eval()
    block = model.layers[0].blocks[0]
    block.attn = WithinWindows(block.attn)
    x = images()
    with torch.no_grad():
        before = model(x)
        cn_hf.patch_model(model, context_names=NAMES)
        assert difference(model(x, context_ids=1), before) <= 1e-5
        tell_apart(model)
        assert difference(model(x, context_ids=torch.tensor(IDS)), one_by_one(model, x, IDS)) <= 1e-5
        soft = torch.eye(3)[IDS]
        assert difference(model(x, context_ids=soft), one_by_one(model, x, IDS)) <= 1e-5


def test_a_leading_dimension_that_is_no_multiple_is_an_error() -> None:
    class Merge(SmallTokenNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)[:7])

    model = cn_hf.patch_model(Merge(nn.LayerNorm(6)).eval())
    x = torch.randn(3, 4, 5)
    model(x)
    with pytest.raises(ContextIdError, match=r"3 context_ids.*\(7, 6\)"):
        model(x, context_ids=[0, 1, 2])
    assert torch.equal(model(x), model(x))


# --------------------------------------------------------------------------------------------------------- use_contexts


def test_forward_features_and_intermediates_take_ids_from_use_contexts() -> None:
    for make in (vit_with_every_slot, lambda: timm.create_model("cn_wrn28_2").eval()):
        model, x = patched(make), images()
        full = model(x, context_ids=torch.tensor(IDS))
        with torch.no_grad(), cn_hf.use_contexts(model, IDS):
            features = model.forward_features(x)
            final, intermediates = model.forward_intermediates(x)
            assert difference(model.forward_head(features), full) <= 1e-5
        with torch.no_grad():
            each = [model.forward_features(x[i : i + 1]) for i in range(4)]
            assert difference(torch.cat(each), features) > 1e-3
            singles = []
            for i, r in enumerate(IDS):
                with cn_hf.use_contexts(model, r):
                    singles.append(model.forward_intermediates(x[i : i + 1])[1])
        for level, expected in enumerate(intermediates):
            assert difference(torch.cat([single[level] for single in singles]), expected) <= 1e-5
        assert difference(final, features) <= 1e-5


def test_a_single_soft_row_serves_any_batch() -> None:
    model, x = patched(), images()
    row = torch.tensor([[0.2, 0.3, 0.5]])
    expected = model(x, context_ids=row.expand(4, 3))
    with cn_hf.use_contexts(model, row):
        assert difference(model(x), expected) <= 1e-5
        assert difference(model.forward_head(model.forward_features(x)), expected) <= 1e-5


def test_blocks_nest_and_the_keyword_wins() -> None:
    model, x = patched(), images()
    plain, outputs = model(x), [model(x, context_ids=r) for r in range(3)]
    with cn_hf.use_contexts(model, 0):
        assert torch.equal(model(x), outputs[0])
        with cn_hf.use_contexts(model, "dawn"):
            assert torch.equal(model(x), outputs[2])
            assert torch.equal(model(x, context_ids=1), outputs[1])
            assert torch.equal(model(x), outputs[2])
        assert torch.equal(model(x), outputs[0])
        with pytest.raises(RuntimeError, match="stop"), cn_hf.use_contexts(model, 1):
            raise RuntimeError("stop")
        assert torch.equal(model(x), outputs[0])
    assert torch.equal(model(x), plain)


def test_use_contexts_serves_training() -> None:
    model, x = patched().train(), images()
    with cn_hf.use_contexts(model, IDS):
        model(x).sum().backward()
    assert all(p.grad is not None for p in cn_hf.context_parameters(model))
    with pytest.raises(ContextIdError):
        model(x)
    with pytest.raises(ContextIdError), cn_hf.use_contexts(model, IDS):
        model(images(5))


def test_use_contexts_of_a_plain_model_is_an_error() -> None:
    for model in (vit(), nn.Sequential(patched())):
        with pytest.raises(PatchError, match="not a patched model"), cn_hf.use_contexts(model, 0):
            pass


# ------------------------------------------------------------------------------------------------------ no state behind


class Stop(Exception):  # noqa: N818
    pass


def stop(*_: Any) -> None:
    raise Stop


@pytest.mark.parametrize("training", [False, True])
def test_an_exception_in_mid_forward_leaves_no_state(training: bool) -> None:
    model, x = patched(), images()
    plain, features = model(x), model.forward_features(x)
    handle = model.blocks[1].register_forward_hook(stop)
    model.train(training)
    for call in (lambda: model(x, context_ids=IDS), lambda: model(x[:3], context_ids=[0, 1, 2])):
        with pytest.raises(Stop):
            call()
    with pytest.raises(Stop), cn_hf.use_contexts(model, 2):
        model(x)
    handle.remove()
    model.eval()
    assert torch.equal(model.forward_features(x), features)
    assert torch.equal(model(x), plain)
    model.train()
    with pytest.raises(ContextIdError):
        model(x)
    with pytest.raises(ContextIdError):
        model.forward_features(x)


def test_an_exception_in_mid_backward_leaves_no_state() -> None:
    model, x = patched(), images()
    features = model.forward_features(x)
    handle = model.blocks[1].register_full_backward_hook(stop)
    with pytest.raises(Stop):
        model(x, context_ids=IDS).sum().backward()
    handle.remove()
    assert torch.equal(model.forward_features(x), features)
    model.train()
    with pytest.raises(ContextIdError):
        model.forward_features(x)
    model(x, context_ids=IDS).sum().backward()


def test_nothing_is_left_after_backward() -> None:
    model, x = patched(), images()
    features = model.forward_features(x)
    outputs = [model(x, context_ids=r).sum() for r in range(3)]
    sum(outputs).backward()
    assert torch.equal(model.forward_features(x), features)
    model.train()
    with pytest.raises(ContextIdError):
        model.forward_features(x)


def test_models_can_be_freed() -> None:
    import weakref

    model = patched()
    model(images(), context_ids=1).sum().backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_two_models_interleaved_do_not_meet() -> None:
    first, second, x = patched(), tell_apart(patched(hf_vit), 0.1), images()
    alone = [logits(first(x, context_ids=r)) for r in range(3)], [logits(second(x, context_ids=r)) for r in range(3)]
    seen: list[Tensor] = []
    first.blocks[0].register_forward_hook(lambda *_: seen.append(second(x, context_ids=2).logits))
    for r in range(3):
        assert torch.equal(logits(first(x, context_ids=r)), alone[0][r])
        assert torch.equal(seen.pop(), alone[1][2])
    twin = copy.deepcopy(patched())
    inner: list[Tensor] = []
    other = patched()
    other.blocks[0].register_forward_hook(lambda *_: inner.append(twin(x)))
    plain = twin(x)
    assert torch.equal(other(x, context_ids=1), alone[0][1])
    assert torch.equal(inner[0], plain)


def test_a_model_that_calls_itself_within_a_forward() -> None:
    model, x = patched(), images()
    outputs = [model(x, context_ids=r) for r in range(3)]
    inner: list[Tensor] = []

    def call_again(*_: Any) -> None:
        if len(inner) == 0:
            inner.append(torch.empty(0))
            inner[0] = model(x, context_ids=2)

    handle = model.blocks[0].register_forward_hook(call_again)
    assert torch.equal(model(x, context_ids=1), outputs[1])
    assert torch.equal(inner[0], outputs[2])
    handle.remove()


# --------------------------------------------------------------------------------------------- activation checkpointing


class Checkpointed(SmallTokenNet):
    """Any module that checkpoints by itself, its output in a dictionary."""

    use_reentrant = False
    on = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.inner(x)
        y = checkpoint(self.norm, x, use_reentrant=self.use_reentrant) if self.on else self.norm(x)
        return {"logits": self.head(y)}


def switch_checkpointing(model: nn.Module, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(model, Checkpointed):
        model.on, model.use_reentrant = True, use_reentrant
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.set_grad_checkpointing(True)
        manipulate = __import__("timm.models._manipulate", fromlist=["checkpoint"])
        if hasattr(manipulate, "use_reentrant_ckpt"):
            monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: use_reentrant)


def make_checkpointed() -> nn.Module:
    torch.manual_seed(0)
    return Checkpointed(nn.LayerNorm(6))


def gradients(model: nn.Module, x: Tensor, use: str) -> dict[str, Tensor]:
    """Two forwards with different contexts, then backward in one of several ways."""
    model.zero_grad()
    first, second = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])
    weights = torch.linspace(-1, 1, 4)

    def value(ids: Any, scale: float) -> Tensor:
        output = model(x, context_ids=ids)
        output = output["logits"] if isinstance(output, dict) and "logits" in output else logits(output)
        return (output.flatten(1).square().mean(1) * weights * scale).sum()

    if use == "one backward":
        (value(first, 1.0) + value(second, 2.0)).backward()
    elif use == "soft and hard":
        (value(torch.tensor([[0.2, 0.3, 0.5]] * 4), 1.0) * value(second, 2.0)).backward()
    elif use == "in reverse":
        a, b = value(first, 1.0), value(second, 2.0)
        a.backward()
        b.backward()
    elif use == "forward between":
        loss = value(first, 1.0)
        with torch.no_grad():
            value(second, 1.0)
        loss.backward()
    elif use == "under use_contexts":
        with cn_hf.use_contexts(model, first):
            (value(None, 1.0) + value(second, 2.0)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


USES = ["one backward", "soft and hard", "in reverse", "forward between", "under use_contexts"]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("make", [vit_with_every_slot, hf_vit, make_checkpointed], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_under_activation_checkpointing(
    make: Callable[[], nn.Module], use_reentrant: bool, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched(make).double().train()
    x = torch.randn(4, 3, 5).double() if make is make_checkpointed else images().double()
    expected = gradients(model, x, use)
    recomputed: list[int] = []
    norm = model.norm if make is make_checkpointed else model.get_submodule(cn_hf.patch_report(model)[3].name)
    norm.register_forward_pre_hook(lambda *_: recomputed.append(1))
    gradients(model, x, use)
    calls = len(recomputed)
    switch_checkpointing(model, use_reentrant, monkeypatch)
    recomputed.clear()
    actual = gradients(model, x, use)
    assert len(recomputed) > calls, "nothing was recomputed: the test tests nothing"
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        scale = grad.abs().max().clamp_min(1e-12)
        assert ((actual[name] - grad).abs().max() / scale) <= 1e-6, name
    model.eval()
    plain = copy.deepcopy(model)
    assert torch.equal(logits_of(model(x)), logits_of(plain(x)))


def logits_of(output: Any) -> Tensor:
    return output["logits"] if not isinstance(output, Tensor) else output


def test_running_statistics_move_once_under_checkpointing() -> None:
    for mode, layer in (("bn", "running_mean"), ("mn", "running_mean")):
        outcomes = []
        for on in (False, True):
            torch.manual_seed(0)
            model = Checkpointed(nn.LayerNorm(6))
            cn_hf.patch_model(model, mode, where=["norm"], num_contexts=2).train()
            model.on = on
            x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(2))
            model(x)["logits"].square().sum().backward()
            outcomes.append(getattr(model.norm.normalizer, layer).clone())
            assert int(model.norm.normalizer.num_batches_tracked) == 1
        torch.testing.assert_close(*outcomes)


# -------------------------------------------------------------------------------------------------------- set_inference


class Brightness:
    """A context source that remembers what it was shown."""

    num_contexts = 3
    names = NAMES

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def predict(self, pixels: Tensor) -> Tensor:
        self.shown.append(pixels)
        return (pixels.float().mean((1, 2, 3)) / 86).long().clamp(0, 2)


def pixels() -> Tensor:
    base = torch.randint(0, 86, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return (base + torch.tensor([0, 85, 170, 170, 0, 85])[:, None, None, None]).to(torch.uint8)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [vit, hf_vit], ids=lambda f: f.__name__)
def test_predict_hands_the_source_the_pixels_back(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, source, raw = patched(make).to(dtype), Brightness(), pixels()
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    x = (raw.to(dtype) / 255 - mean) / std
    ids = [0, 1, 2, 2, 0, 1]
    assert cn_hf.set_inference(model, "predict", source=source, mean=MEAN, std=STD) is model
    assert difference(logits(model(x)), one_by_one(model, x, ids)) <= 1e-5
    assert source.shown[0].dtype == torch.uint8
    assert torch.equal(source.shown[0], raw)
    count = len(source.shown)
    given = logits(model(x, context_ids=1))
    assert len(source.shown) == count
    assert difference(given, one_by_one(model, x, [1] * 6)) <= 1e-5
    with pytest.raises(ContextIdError):
        model.train()(x)


def test_predict_without_normalization_and_with_another_source_later() -> None:
    model, source, raw = patched(), Brightness(), pixels()
    x = raw.float() / 255
    cn_hf.set_inference(model, "predict", source=source)
    model(x)
    assert torch.equal(source.shown[0], raw)
    cn_hf.set_inference(model, "cn+")
    plus = model(x)
    assert len(source.shown) == 1
    cn_hf.set_inference(model, "predict")  # the source stays attached
    assert not torch.equal(model(x), plus)
    other = Brightness()
    cn_hf.set_inference(model, "predict", source=other)
    model(x)
    assert len(other.shown) == 1


@pytest.mark.parametrize("order", [("labels", "pixel_values"), ("pixel_values", "labels")])
def test_predict_looks_at_the_images_wherever_they_are_among_the_arguments(order: tuple[str, str]) -> None:
    model, source, raw = patched(hf_vit), Brightness(), pixels()
    cn_hf.set_inference(model, "predict", source=source)
    given = {"labels": torch.zeros(6, dtype=torch.int64), "pixel_values": raw.float() / 255}
    model(**{name: given[name] for name in order})
    assert torch.equal(source.shown[0], raw)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_predict_with_statistics_of_other_channels_is_an_error(name: str) -> None:
    model = patched()
    before = model.router.config, model.router.source, model.router.pixel_mean, model.router.pixel_std
    with pytest.raises(ConfigError, match=rf"Expected 1 or 3 values of {name}, received 2"):
        cn_hf.set_inference(model, "predict", source=Brightness(), **{name: (0.5, 0.5)})
    assert (model.router.config, model.router.source, model.router.pixel_mean, model.router.pixel_std) == before


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_of_other_channels_than_the_images_are_an_error(name: str) -> None:
    model = cn_hf.patch_model(nn.Sequential(nn.BatchNorm2d(3)), "cn-channels")  # nothing says how many it takes
    cn_hf.set_inference(model, "predict", source=Brightness(), **{name: (0.5, 0.5)})
    with pytest.raises(ConfigError, match=rf"pixel {name} has 2 values for images of 3 channels"):
        model.eval()(images())


def test_a_predict_that_names_no_context_is_an_error() -> None:
    class Wrong(Brightness):
        def predict(self, pixels: Tensor) -> Tensor:
            return torch.full((len(pixels),), 3)

    model = cn_hf.set_inference(patched(), "predict", source=Wrong())
    with pytest.raises(ContextIdError, match=r"0\.\.2"):
        model(images())


def test_average_is_the_log_of_the_mean_softmax() -> None:
    for make in (vit, hf_vit, small_convnet):
        model, x = patched(make), images()
        each = torch.stack([logits(model(x, context_ids=r)) for r in range(3)])
        expected = each.softmax(-1).mean(0).log()
        cn_hf.set_inference(model, "average")
        actual = logits(model(x))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.exp().sum(-1), torch.ones(4))
        assert torch.equal(logits(model(x, context_ids=1)), each[1])
    hf = cn_hf.set_inference(patched(hf_vit), "average")
    labels = torch.tensor([0, 1, 2, 3])
    output = hf(x, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.nll_loss(output.logits, labels))
    with pytest.raises(ContextIdError):
        hf.train()(x)


def test_average_where_one_context_is_sure() -> None:
    model = SmallTokenNet(nn.LayerNorm(6)).eval()
    model.head.weight.data.mul_(1e4)
    cn_hf.set_inference(tell_apart(cn_hf.patch_model(model)), "average")
    assert torch.isfinite(model(torch.randn(3, 4, 5))).all()


def test_average_of_a_model_without_logits_is_an_error() -> None:
    model = cn_hf.set_inference(cn_hf.patch_model(make_checkpointed().eval()), "average")
    outputs: list[Any] = []
    error = refusal(lambda: outputs.append(model(torch.randn(4, 3, 5))))
    if error is None:
        assert outputs[0]["logits"].exp().sum(-1).allclose(torch.ones(4, 3))
    else:
        assert isinstance(error, CnHfError)
        assert "logits" in str(error)


@pytest.mark.parametrize("stats", ["learned", "batch"])
@pytest.mark.parametrize("scale", ["none", "sqrt_t"])
def test_plus_settings_reach_every_layer(stats: str, scale: str) -> None:
    model, x = patched(), images()
    asked = patched(plus_stats=stats, plus_scale=scale)
    assert cn_hf.set_inference(model, "cn+", plus_stats=stats, plus_scale=scale) is model
    assert model.context_config == asked.context_config
    assert torch.equal(model(x), asked(x))
    if (stats, scale) != ("learned", "none"):
        assert difference(model(x), patched()(x)) > 1e-3
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert (difference(alone, model(x)) <= 1e-5) == (stats == "learned")


def test_plus_of_one_layer_by_hand() -> None:
    model = SmallTokenNet(nn.LayerNorm(6)).eval()
    cn_hf.patch_model(model, parametrization="table", num_contexts=2, plus_posterior="vector")
    mean, var = torch.randn(2, 6), torch.rand(2, 6) + 0.5
    model.norm.normalizer.set_statistics(mean, var)
    x = torch.randn(2, 3, 5)
    y = nn.functional.layer_norm(model.inner(x), (6,)).reshape(-1, 6).double()
    density = torch.stack(
        [
            torch.distributions.Normal(m.double(), v.double().sqrt()).log_prob(y).sum(1)
            for m, v in zip(mean, var + 1e-5, strict=True)
        ],
        dim=1,
    )
    tau = density.softmax(1)
    normed = sum(tau[:, r, None] * (y - mean[r]) / (var[r] + 1e-5).sqrt() for r in range(2))
    torch.testing.assert_close(model(x), model.head(normed.float().view(2, 3, 6)), atol=1e-5, rtol=1e-5)


def test_set_inference_refuses_what_it_cannot_do_and_changes_nothing() -> None:
    model, x = patched(), images()
    before, config = model(x), model.context_config

    class TwoContexts(Brightness):
        num_contexts = 2

    bad: list[tuple[str, dict[str, Any], str]] = [
        ("cn++", {}, r"cn\+"),
        ("avrage", {}, "did you mean 'average'"),
        ("predict", {}, "source"),
        ("predict", {"source": object()}, "predict"),
        ("predict", {"source": TwoContexts()}, "2 contexts"),
        ("predict", {"source": Brightness(), "mean": "grey"}, "mean"),
        ("predict", {"source": Brightness(), "std": (0.0, 1.0, 1.0)}, "std"),
        ("cn+", {"plus_stats": "all"}, "learned"),
        ("cn+", {"plus_scale": 2}, "sqrt_t"),
        (None, {}, "inference"),
    ]
    for inference, options, message in bad:
        error = refusal(lambda inference=inference, options=options: cn_hf.set_inference(model, inference, **options))
        assert isinstance(error, (ConfigError, TypeError)), (inference, options)
        assert re.search(message, str(error))
        assert model.context_config == config
        assert torch.equal(model(x), before)
    with pytest.raises(PatchError):
        cn_hf.set_inference(vit(), "cn")


# ------------------------------------------------------------------------------------------------ signature and Trainer


@pytest.mark.parametrize("make", [vit, hf_vit, small_convnet, text_net], ids=lambda f: f.__name__)
def test_the_signature_names_context_ids_after_the_original_parameters(make: Callable[[], nn.Module]) -> None:
    model = make()
    original = list(inspect.signature(model.forward).parameters)
    base = type(model)
    cn_hf.patch_model(model, "cn")
    names = list(inspect.signature(model.forward).parameters)
    assert isinstance(model, base)
    assert type(model).__name__ == base.__name__
    assert "context_ids" in names
    assert [name for name in names if name != "context_ids"] == original
    positional = [
        n for n in original if inspect.signature(base.forward).parameters[n].kind != inspect.Parameter.VAR_KEYWORD
    ]
    assert names.index("context_ids") >= len(positional)
    assert inspect.signature(model.forward).parameters["context_ids"].default is None
    cn_hf.unpatch_model(model)
    assert list(inspect.signature(model.forward).parameters) == original


@pytest.mark.slow
def test_trainer_keeps_the_column_and_trains(tmp_path: Path) -> None:
    import datasets

    model = cn_hf.patch_model(hf_vit(), context_names=NAMES)
    columns = {
        "pixel_values": images(8).tolist(),
        "labels": [0, 1, 2, 3] * 2,
        "context_ids": [0, 1, 2, 0] * 2,
        "noise": [1] * 8,
    }
    data = datasets.Dataset.from_dict(columns).with_format("torch")
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=4, **options)
    before = [p.clone() for p in cn_hf.context_parameters(model)]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    assert np.isfinite(trainer.train().training_loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, cn_hf.context_parameters(model), strict=True))
    given = trainer.predict(data).predictions
    model.eval()
    expected = model(images(8), context_ids=torch.tensor([0, 1, 2, 0] * 2)).logits.detach().numpy()
    np.testing.assert_allclose(given, expected, atol=1e-4)


# -------------------------------------------------------------------------------------------------- copies of one layer


def test_a_copied_slot_still_receives_ids() -> None:
    # peft's modules_to_save: a deep copy of the norm takes the original's place.
    model, x = patched(), images()
    outputs = [model(x, context_ids=r) for r in range(3)]
    model.norm = copy.deepcopy(model.norm)
    for r in range(3):
        assert torch.equal(model(x, context_ids=r), outputs[r])
    whole = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    with cn_hf.use_contexts(model, 0):
        for again in (whole, pickled):
            for r in range(3):
                assert torch.equal(again(x, context_ids=r), outputs[r])


def test_a_copied_slot_of_a_copied_model_follows_the_copy() -> None:
    model, x = patched(), images()
    again = copy.deepcopy(model)
    again.norm = copy.deepcopy(again.norm)
    expected = model(x, context_ids=2)
    with cn_hf.use_contexts(model, 0):
        assert torch.equal(again(x, context_ids=2), expected)
    del model
    gc.collect()
    assert torch.equal(again(x, context_ids=2), expected)


# ------------------------------------------------------------------------------------------------------------- parallel


def test_data_parallel_works_or_says_what_to_use() -> None:
    model, x = patched(), images()
    wrapped = nn.DataParallel(model)
    assert torch.equal(wrapped(x, context_ids=torch.tensor(IDS)), model(x, context_ids=torch.tensor(IDS)))
    with pytest.raises(CnHfError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()  # what torch calls for each device


def train(rank: int, world: int, folder: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    model = nn.Sequential(*layers)
    cn_hf.patch_model(model).train()
    ids = torch.tensor([0, 0, 1, 0, 2, 2, 2, 2])  # contexts that the other process never sees
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    wrapped = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        wrapped(x[part], context_ids=ids[part]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}-of-{world}.pt")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    train(rank, 2, folder)
    dist.destroy_process_group()
    if rank == 0:
        train(0, 1, folder)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_together(work, str(tmp_path))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    moved = 0
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], atol=0, rtol=0)
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-5)
        moved += "normalizer" in name and bool(value.abs().sum() > 0)
    assert moved > 4
