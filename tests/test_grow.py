"""patching/grow.py: contexts come and go; what the others compute stays, bit for bit."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import (
    anatomy,
    difference,
    hf_vit,
    images,
    logits,
    seeded,
    small_convnet,
    tell_apart,
    tensors_of,
    vit,
)
from torch import Tensor, nn

import cn_hf
from cn_hf import ConfigError, ContextIdError, PatchError
from cn_hf.errors import CnHfError, InputTypeError
from cn_hf.patching.grow import add_contexts, remove_contexts, train_only_contexts

pytestmark = pytest.mark.filterwarnings("ignore:The second part of a batch")

NAMES = ("day", "night", "dawn")
FORMS = [
    {"parametrization": "table"},
    {"parametrization": "embedder"},
    {"parametrization": "embedder", "embedding_dim": 1},
    {"parametrization": "embedder", "embedding_dim": 7, "variance_activation": "exp"},
]


@seeded
def patched(make: Callable[[], nn.Module] = vit, mode: str = "cn", **options: Any) -> nn.Module:
    options = {"context_names": NAMES} | options
    return tell_apart(cn_hf.patch_model(make(), mode, **options))


def outputs(model: nn.Module, names: tuple[Any, ...] = NAMES, num: int = 4) -> dict[Any, Tensor]:
    """Evaluation output of a batch of images for each context."""
    with torch.no_grad():
        return {name: logits(model(images(num), context_ids=name)) for name in names}


def assert_same(before: dict[Any, Tensor], after: dict[Any, Tensor]) -> None:
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name


class Source:
    """A context source as far as a model looks at it."""

    num_contexts = 3

    def predict(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------------- adding


@pytest.mark.parametrize("make", [vit, small_convnet, hf_vit], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("added", [["dusk"], [f"new {i}" for i in range(14)]], ids=len)
def test_other_contexts_stay_bit_equal_and_new_ones_start_as_told(
    make: Callable[[], nn.Module], options: dict[str, Any], added: list[str]
) -> None:
    model = patched(make, **options)
    for num in (4, 13):  # fewer and more samples than contexts: per-sample rows and whole tables
        before = outputs(model, num=num)
        grown = copy.deepcopy(model)
        assert add_contexts(grown, added, start="night") is grown
        assert_same(before, outputs(grown, num=num))
        assert torch.equal(outputs(grown, (added[-1],), num)[added[-1]], before["night"])
        assert (grown.context_config.num_contexts, grown.context_config.context_names) == (
            3 + len(added),
            (*NAMES, *added),
        )
        ids = torch.arange(num) % 3
        assert torch.equal(logits(grown(images(num), context_ids=ids)), logits(model(images(num), context_ids=ids)))
    assert model.context_config.num_contexts == 3


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_new_context_starts_from_the_mean_of_all(options: dict[str, Any]) -> None:
    model = cn_hf.patch_model(vit(), "cn", context_names=NAMES, **options)
    plain = outputs(model)["day"]
    add_contexts(model, "dusk")
    assert difference(outputs(model, ("dusk",))["dusk"], plain) <= 1e-5  # all contexts are alike, so their mean is
    weighted = patched(**options)
    norm = weighted.norm.normalizer
    names = ("mean_table",) if norm.parametrization == "table" else ("embedding",)
    expected = [0.25 * getattr(norm, name)[0] + 0.75 * getattr(norm, name)[2] for name in names]
    add_contexts(weighted, ["dusk"], start=torch.tensor([0.25, 0.0, 0.75]))
    for name, row in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(norm, name)[3], row)


@pytest.mark.parametrize("make", [vit, small_convnet], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("batches", [1, 2])
def test_starting_from_data_is_exact_and_moves_no_other_context(
    make: Callable[[], nn.Module], options: dict[str, Any], batches: int
) -> None:
    model = patched(make, **options)
    before = outputs(model)
    x = images(12) * 3 + 1
    ids = torch.tensor([3, 4, 0] * 4)
    data = list(zip(x.chunk(batches), ids.chunk(batches), strict=True))
    add_contexts(model, ["dusk", "noon"], start=iter(data))
    assert_same(before, outputs(model))
    expected = cn_hf.patch_model(
        cn_hf.unpatch_model(copy.deepcopy(model)), "cn", num_contexts=5, parametrization="table"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # contexts without samples
        cn_hf.calibrate(expected, [(x, ids)])
    with torch.no_grad():
        for r in (3, 4):
            assert difference(model(x, context_ids=r), expected(x, context_ids=r)) <= 1e-4
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_data_with_names_and_without_a_sample_of_a_new_context() -> None:
    model = patched()
    parts, before = anatomy(model), tensors_of(model)
    with pytest.raises(PatchError, match=r"no sample of the new contexts noon"):
        add_contexts(model, ["dusk", "noon"], start=[(images(), ["dusk"] * 4)])
    with pytest.raises(CnHfError):
        add_contexts(model, ["dusk"], start=[])
    with pytest.raises(ContextIdError):
        add_contexts(model, ["dusk"], start=[(images(), torch.tensor([3, 3, 3, 4]))])
    with pytest.raises(InputTypeError):
        add_contexts(model, ["dusk"], start=[images()])
    assert anatomy(model) == parts
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    add_contexts(model, ["dusk"], start=[(images(), ["dusk"] * 4)])
    assert model.context_config.context_names == (*NAMES, "dusk")


def test_contexts_without_names() -> None:
    model = patched(context_names=None, num_contexts=3)
    before = outputs(model, (0, 1, 2))
    add_contexts(model, 2, start=1)
    assert_same(before, outputs(model, (0, 1, 2)))
    assert torch.equal(outputs(model, (4,))[4], before[1])
    remove_contexts(model, [0, 3])
    assert torch.equal(outputs(model, (0,))[0], before[1])
    assert (model.context_config.num_contexts, model.context_config.context_names) == (3, None)
    with pytest.raises(ConfigError, match="no names"):
        add_contexts(model, ["dusk"])


# ------------------------------------------------------------------------------------------------------------ removing


@pytest.mark.parametrize("make", [vit, small_convnet], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_removing(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = patched(make, **options)
    before = outputs(model)
    remove_contexts(model, "night")
    assert_same({name: before[name] for name in ("day", "dawn")}, outputs(model, ("day", "dawn")))
    assert torch.equal(outputs(model, (1,))[1], before["dawn"])  # ids move down
    with pytest.raises(ContextIdError):
        model(images(), context_ids="night")
    with pytest.raises(ContextIdError):
        model(images(), context_ids=2)
    add_contexts(model, ["night"], start="day")
    assert_same({name: before[name] for name in ("day", "dawn")}, outputs(model, ("day", "dawn")))


def test_domain_specific_batch_norms_grow_too() -> None:
    model = patched(small_convnet, "dsbn")
    with torch.no_grad():
        model.train()(images(9), context_ids=torch.arange(9) % 3)
    model.eval()
    before = outputs(model)
    add_contexts(model, ["dusk"], start="dawn")
    assert_same(before, outputs(model))
    assert torch.equal(outputs(model, ("dusk",))["dusk"], before["dawn"])
    assert model.bn1.normalizer.num_batches_tracked.tolist() == [1, 1, 1, 1]
    remove_contexts(model, ["day", "night"])
    assert_same({"dawn": before["dawn"]}, outputs(model, ("dawn",)))
    add_contexts(model, ["mean"])
    x = images()
    seen: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    add_contexts(model, ["measured"], start=[(x, 3)])
    mean = model.bn1.normalizer.running_mean[3]
    torch.testing.assert_close(mean, seen[-1].mean((0, 2, 3)))
    assert torch.isfinite(model(x, context_ids="measured")).all()


# --------------------------------------------------------------------------------------------- what surrounds the model


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_saving_copying_and_unpatching_after_growing(options: dict[str, Any], calibrated: bool, tmp_path: Path) -> None:
    model = patched(hf_vit, **options)
    plain = {name: value for name, value in tensors_of(model).items() if ".normalizer." not in name}
    add_contexts(model, ["dusk"], start=[(images(), 3)] if calibrated else "night")
    remove_contexts(model, ["day"])
    names = ("night", "dawn", "dusk")
    expected = outputs(model, names)
    cn_hf.save_pretrained(model, tmp_path / "grown")
    loaded = cn_hf.from_pretrained(tmp_path / "grown")
    assert loaded.context_config == model.context_config
    assert_same(expected, outputs(loaded, names))
    add_contexts(loaded, ["noon"])
    copied = copy.deepcopy(model)
    assert_same(expected, outputs(copied, names))
    add_contexts(copied, ["noon"])
    assert model.context_config.num_contexts == 3
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(expected, outputs(torch.load(buffer, weights_only=False), names))
    folded = cn_hf.fold_context(model, "dusk")
    assert difference(logits(folded(images())), expected["dusk"]) <= 1e-5
    cn_hf.unpatch_model(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.items())


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_parameters_stay_the_same_objects_and_train_on(options: dict[str, Any]) -> None:
    model = patched(**options).train()
    model.norm.normalizer.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        model(images(), context_ids=ids).square().sum().backward()
        optimizer.step()

    step(torch.tensor([0, 1, 2, 1]))
    add_contexts(model, ["dusk"], start="day")
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert not any(p.requires_grad for p in model.norm.normalizer.parameters())
    with pytest.raises(RuntimeError):  # never a silent one
        step(torch.tensor([0, 1, 2, 3]))
    for parameter in cn_hf.context_parameters(model):
        optimizer.state.pop(parameter, None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(torch.tensor([0, 1, 2, 3]))
    rows = [name for name in before if name.endswith(("embedding", "mean_table")) and not name.startswith("norm.")]
    assert rows
    for name in rows:
        assert not torch.equal(parameters[name][3], before[name][3]), name
    remove_contexts(model, ["night"])
    model(images(), context_ids=["dusk"] * 4).sum().backward()


def test_two_forwards_of_a_compiled_model() -> None:
    model = patched()
    compiled = torch.compile(model, backend="eager")
    x = images()
    with torch.no_grad():
        before = compiled(x, context_ids=torch.tensor([0, 1, 2, 1]))
        add_contexts(model, ["dusk"], start="day")
        ids = torch.tensor([3, 1, 2, 1])
        assert difference(compiled(x, context_ids=ids), before) <= 1e-6


@pytest.mark.parametrize("change", [lambda m: add_contexts(m, ["x"]), lambda m: remove_contexts(m, [0])])
def test_a_source_that_no_longer_fits_is_detached(change: Callable[[nn.Module], nn.Module]) -> None:
    model = patched()
    cn_hf.set_inference(model, "predict", source=Source())
    with pytest.warns(UserWarning, match="detached"):
        change(model)
    assert model.router.source is None
    with pytest.raises(ContextIdError, match="source"):
        model(images())
    assert torch.isfinite(cn_hf.set_inference(model, "cn+")(images())).all()


def test_a_model_in_double_and_on_meta() -> None:
    model = patched(small_convnet).double()
    add_contexts(model, ["dusk"], start=[(images().double(), 3)])
    assert {p.dtype for p in cn_hf.context_parameters(model)} == {torch.float64}
    empty = cn_hf.patch_model(vit().to("meta"), context_names=NAMES)
    add_contexts(empty, ["dusk"])
    assert empty.norm.normalizer.embedding.shape == (4, 3)


# ----------------------------------------------------------------------------------------------------- training, errors


@pytest.mark.parametrize("options", [*FORMS[:2], {"affine": True, "where": "embed"}], ids=str)
def test_training_the_contexts_alone(options: dict[str, Any]) -> None:
    model = patched(**options)
    assert train_only_contexts(model) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".normalizer." in name}
    before = tensors_of(model)
    model.train()(images(), context_ids=torch.tensor([0, 1, 2, 1])).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".normalizer." in name for name in changed)
    bn = cn_hf.patch_model(small_convnet(), "bn", where=["bn1"])
    with pytest.raises(PatchError, match="Nothing would be left to train"):
        train_only_contexts(bn)
    assert all(p.requires_grad for p in bn.parameters())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: add_contexts(m, ["day"]), ConfigError),
        (lambda m: add_contexts(m, ["x", "x"]), ConfigError),
        (lambda m: add_contexts(m, []), ConfigError),
        (lambda m: add_contexts(m, 2), ConfigError),
        (lambda m: add_contexts(m, True), InputTypeError),
        (lambda m: add_contexts(m, [1]), InputTypeError),
        (lambda m: add_contexts(m, 1.5), InputTypeError),
        (lambda m: add_contexts(m, "x", start="nigth"), ContextIdError),
        (lambda m: add_contexts(m, "x", start=3), ContextIdError),
        (lambda m: add_contexts(m, "x", start=-1), ContextIdError),
        (lambda m: add_contexts(m, "x", start=True), ContextIdError),
        (lambda m: add_contexts(m, "x", start=torch.tensor([0, 1])), ContextIdError),
        (lambda m: add_contexts(m, "x", start=torch.tensor([0.5, 0.4, 0.0])), ContextIdError),
        (lambda m: add_contexts(m, "x", start=torch.tensor([0.5, 0.5])), ContextIdError),
        (lambda m: add_contexts(m, "x", start=torch.full((3,), torch.nan)), ContextIdError),
        (lambda m: add_contexts(m, "x", start=1.5), InputTypeError),
        (lambda m: remove_contexts(m, NAMES), ConfigError),
        (lambda m: remove_contexts(m, ["day", 0]), ConfigError),
        (lambda m: remove_contexts(m, []), ConfigError),
        (lambda m: remove_contexts(m, "noon"), ContextIdError),
        (lambda m: remove_contexts(m, 3), ContextIdError),
        (lambda m: remove_contexts(m, 1.5), InputTypeError),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(call: Callable[[nn.Module], Any], error: type[Exception]) -> None:
    model = patched()
    config, before = model.context_config, tensors_of(model)
    with pytest.raises(error):
        call(model)
    assert model.context_config == config
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_models_without_contexts_are_refused() -> None:
    for model in (vit(), cn_hf.patch_model(small_convnet(), "mn", where=["bn1"])):
        for call in (lambda m: add_contexts(m, 1), lambda m: remove_contexts(m, 0)):
            with pytest.raises(PatchError):
                call(model)
    with pytest.raises(PatchError, match="not a patched model"):
        train_only_contexts(vit())
