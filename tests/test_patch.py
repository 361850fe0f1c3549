"""patching/patch.py: a model after patching, after unpatching, and after everything else that is done to models."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import timm
import torch
from models_for_tests import (
    CASES,
    LARGE_CASES,
    VIT_SLOTS,
    Case,
    Shared,
    SmallTokenNet,
    anatomy,
    convnet,
    difference,
    hf_vit,
    images,
    logits,
    refusal,
    settle,
    small_convnet,
    tell_apart,
    tensors_of,
    vit,
    vit_with_every_slot,
)
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError, ConfigError, PatchError

FORMS = [(p, a) for p in ("embedder", "table") for a in ("softplus", "exp")]


def patched(case: Case, **options: Any) -> tuple[nn.Module, Tensor]:
    return cn_hf.patch_model(case.make(), **{**case.options, **options}), case.sample()


# ------------------------------------------------------------------------------------------------ equality at the start


def check_equality_at_the_start(case: Case, **options: Any) -> None:
    model, x = case.make(), case.sample()
    plain = tensors_of(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = logits(model(x))
    assert cn_hf.patch_model(model, **{**case.options, **options}) is model
    num = model.context_config.num_contexts
    soft = torch.rand(len(x), num, generator=torch.Generator().manual_seed(1)).softmax(1)
    for ids in (*range(num), torch.arange(len(x)) % num, soft, None):
        assert difference(logits(model(x, context_ids=ids)), before) <= 1e-5
    assert identities.items() <= {name: id(parameter) for name, parameter in model.named_parameters()}.items()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items())


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_every_context_and_none_give_the_original_output(case: Case) -> None:
    check_equality_at_the_start(case)


@pytest.mark.parametrize(("parametrization", "activation"), FORMS[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_they_do_in_each_parametrization(case: Case, parametrization: str, activation: str) -> None:
    check_equality_at_the_start(case, parametrization=parametrization, variance_activation=activation, num_contexts=5)


@pytest.mark.parametrize("num_contexts", [1, 2, 10_000])
@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("make", [vit, small_convnet], ids=["vit", "convnet"])
def test_from_one_context_to_ten_thousand(make: Any, num_contexts: int, parametrization: str) -> None:
    model, x = make(), images()
    before = model(x)
    cn_hf.patch_model(model, "cn", num_contexts=num_contexts, parametrization=parametrization)
    for ids in (0, num_contexts - 1, torch.tensor([0, num_contexts - 1, num_contexts // 2, 0])):
        assert difference(model(x, context_ids=ids), before) <= 1e-5
    if num_contexts < 3:
        assert difference(model(x), before) <= 1e-5
    model.train()
    model(x, context_ids=torch.tensor([0, num_contexts - 1, 0, 0])).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in cn_hf.context_parameters(model))


def test_gradients_at_the_start_are_the_originals_too() -> None:
    for make in (vit_with_every_slot, small_convnet):
        model, x = make(), images()
        twin = copy.deepcopy(model)
        cn_hf.patch_model(twin, "cn")
        for network, ids in ((model, {}), (twin, {"context_ids": torch.tensor([0, 1, 2, 0])})):
            network(x, **ids).square().sum().backward()
        grads = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name].grad, parameter.grad, atol=2e-4, rtol=2e-4)


def test_gradients_tell_contexts_apart_at_once() -> None:
    model = cn_hf.patch_model(vit()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = images(6)
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, context_ids=ids), ids).backward()
        optimizer.step()
    model.eval()
    outputs = [model(x, context_ids=r) for r in range(3)]
    assert difference(outputs[0], outputs[1]) > 1e-3
    assert difference(outputs[1], outputs[2]) > 1e-3


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES[-3:-1]], ids=str)
def test_a_sample_depends_on_its_own_pixels_and_id_alone(case: Case) -> None:
    model, x = patched(case)
    tell_apart(model)
    ids = torch.tensor([1, 0, 2, 1])[: len(x)]
    before = logits(model(x, context_ids=ids))
    others = x.clone()
    others[1:] = x[1:].flip(0) if x.dtype == torch.int64 else x[1:] * 3 + 1
    changed = ids.clone()
    changed[1:] = (ids[1:] + 1) % 3
    after = logits(model(others, context_ids=changed))
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=1e-6)
    assert difference(after[1:], before[1:]) > 1e-3
    alone = logits(model(x[:1], context_ids=ids[:1]))
    torch.testing.assert_close(alone[0], before[0], atol=1e-4 * before.abs().max().item(), rtol=1e-4)
    other = logits(model(x, context_ids=(ids + 1) % 3))
    assert difference(other[0], before[0]) > 1e-3


# ----------------------------------------------------------------------------------------------------------- unpatching


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_unpatching_is_bit_equal(case: Case) -> None:
    model, x = case.make(), case.sample()
    before, plain, parts = logits(model(x)), tensors_of(model), anatomy(model)
    cn_hf.patch_model(model, **case.options)
    tell_apart(model)
    logits(model(x, context_ids=1))
    assert cn_hf.unpatch_model(model) is model
    assert torch.equal(logits(model(x)), before)
    assert anatomy(model) == parts
    state = model.state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[name], value) for name, value in plain.items())


@pytest.mark.parametrize("mode", ["bn", "mn"])
@pytest.mark.parametrize("where", ["norms", "paper"])
def test_unpatching_a_baseline_is_bit_equal(mode: str, where: str) -> None:
    model, x = convnet(), images()
    before, parts = model(x), anatomy(model)
    cn_hf.patch_model(model, mode, where=where).train(where == "norms")  # else the batch norms that stay would learn
    model(x).sum().backward()
    cn_hf.unpatch_model(model.eval())
    assert torch.equal(model(x), before)
    assert anatomy(model) == parts


def journey(model: nn.Module, through: str) -> nn.Module:
    if through == "load":
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    elif through == "deepcopy":
        model = copy.deepcopy(model)
    elif through == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif through == "double":
        model = model.double()
    elif through == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model


@pytest.mark.parametrize("through", ["load", "deepcopy", "pickle", "double", "channels_last"])
@pytest.mark.parametrize("make", [vit_with_every_slot, hf_vit, small_convnet], ids=["vit", "hf", "net"])
def test_unpatching_after_a_journey_is_bit_equal_to_the_original_after_it(make: Any, through: str) -> None:
    x = images().double() if through == "double" else images()
    expected = logits(journey(make(), through)(x))
    model = journey(cn_hf.patch_model(make(), "cn"), through)
    assert difference(logits(model(x, context_ids=1)), expected) <= 1e-5
    assert torch.equal(logits(cn_hf.unpatch_model(model)(x)), expected)


@pytest.mark.parametrize("make", [vit_with_every_slot, small_convnet], ids=["vit", "net"])
def test_unpatching_keeps_affine_weights_as_trained(make: Any) -> None:
    model, x = make(), images()
    names = [name for name, _ in model.named_parameters()]
    cn_hf.patch_model(model, "cn").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, context_ids=torch.tensor([0, 1, 2, 0])).square().mean().backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    trained = {name: p.clone() for name, p in model.named_parameters()}
    cn_hf.unpatch_model(model)
    assert [name for name, _ in model.named_parameters()] == names
    moved = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])
        moved += not torch.equal(parameter, before[name])
    assert moved > 5


def test_patching_again_after_unpatching_works() -> None:
    model, x = vit(), images()
    before = model(x)
    for mode in ("cn-patches", "cn-channels", "cn-patches"):
        cn_hf.patch_model(model, mode)
        assert difference(model(x, context_ids=1), before) <= 1e-5
        cn_hf.unpatch_model(model)
    with pytest.raises(PatchError, match="not a patched model"):
        cn_hf.unpatch_model(model)


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_lists_slots() -> None:
    model = cn_hf.patch_model(vit_with_every_slot())
    report = cn_hf.patch_report(model)
    assert {row.name for row in report} == VIT_SLOTS
    by_name = {row.name: row for row in report}
    assert by_name["blocks.0.attn.q_norm"].num_features == 12
    assert by_name["blocks.0.norm1"].num_features == 24
    assert by_name["norm"].old_class == "LayerNorm"
    assert by_name["norm"].new_class != "LayerNorm"
    lines = str(report).splitlines()
    assert len(lines) == len(VIT_SLOTS) + 1
    assert all(word in lines[0] for word in ("slot", "was", "is", "features"))
    assert any(re.search(r"blocks\.1\.mlp\.norm +LayerNorm +\w+ +96", line) for line in lines)


def test_the_report_of_a_plain_model_is_an_error() -> None:
    for call in (cn_hf.patch_report, cn_hf.context_parameters, cn_hf.unpatch_model):
        with pytest.raises(PatchError, match="patch_model"):
            call(vit())


def test_context_parameters_are_those_that_were_added() -> None:
    model = vit_with_every_slot()
    before = {id(p) for p in model.parameters()}
    cn_hf.patch_model(model)
    added = cn_hf.context_parameters(model)
    assert {id(p) for p in added} == {id(p) for p in model.parameters()} - before
    assert len(added) == len({id(p) for p in added}) > 0
    table = cn_hf.patch_model(vit(), parametrization="table", num_contexts=4)
    assert sum(p.numel() for p in cn_hf.context_parameters(table)) == 5 * 2 * 4 * 24


@pytest.mark.parametrize("mode", ["cn-patches", "dsbn"])
def test_added_parameters_get_no_weight_decay_from_timms_optimizers(mode: str) -> None:
    model = cn_hf.patch_model(vit() if mode == "cn-patches" else timm.create_model("test_resnet"), mode, where="norms")
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed
    assert cn_hf.context_parameters(model)
    assert not decayed & {id(p) for p in cn_hf.context_parameters(model)}


# ------------------------------------------------------------------------------------------------------------ bad input

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "cn-chanels"}, ConfigError, "did you mean 'cn-channels'"),
    ({"mode": 3}, ValueError, "mode"),
    ({"num_contexts": 0}, ValueError, "num_contexts"),
    ({"num_contexts": -2}, ValueError, "num_contexts"),
    ({"num_contexts": 2.5}, CnHfError, "num_contexts"),
    ({"num_contexts": True}, CnHfError, "num_contexts"),
    ({"context_names": ["a", "a"]}, ValueError, "context_names"),
    ({"context_names": "abc"}, ConfigError, "context_names"),
    ({"context_names": ["a", "b"], "num_contexts": 4}, ConfigError, "context_names"),
    ({"context_names": []}, ConfigError, "context_names|num_contexts"),
    ({"where": ["norm1", "missing"]}, ValueError, "missing"),
    ({"where": "nroms"}, ValueError, "nroms"),
    ({"where": 5}, CnHfError, "where"),
    ({"parametrisation": "table"}, ConfigError, "did you mean 'parametrization'"),
    ({"parametrization": "tabel"}, ConfigError, "did you mean 'table'"),
    ({"variance_activation": "relu"}, ConfigError, "softplus"),
    ({"init": "zero"}, ConfigError, "identity"),
    ({"inference": "cn++"}, ConfigError, "cn\\+"),
    ({"plus_stats": "all"}, ConfigError, "learned"),
    ({"eps": -1.0}, ConfigError, "eps"),
    ({"eps": "small"}, CnHfError, "eps"),
    ({"embedding_dim": 0}, ConfigError, "embedding_dim"),
    ({"config": {"mode": "cn"}}, TypeError, "ContextNormConfig"),
    ({"mode": "cn-channels", "where": "norms"}, PatchError, "norm"),
    ({"mode": "mn"}, PatchError, "ConvNet"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_leaves_the_model_unchanged(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, x = vit(), images()
    before, plain, parts = model(x), tensors_of(model), anatomy(model)
    with pytest.raises(error, match=message) as caught:
        cn_hf.patch_model(model, **options)
    assert isinstance(caught.value, CnHfError)
    assert anatomy(model) == parts
    assert torch.equal(model(x), before)
    state = model.state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[name], value) for name, value in plain.items())


@pytest.mark.parametrize("thing", [None, "vit", torch.zeros(2), vit, nn.LayerNorm])
def test_only_modules_are_patched(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module") as caught:
        cn_hf.patch_model(thing)
    assert isinstance(caught.value, CnHfError)


def test_wrapped_compiled_and_scripted_models_are_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    for model in (nn.DataParallel(vit()), torch.compile(vit()), scripted):
        with pytest.raises((TypeError, ValueError), match=r"patch first|itself"):
            cn_hf.patch_model(model)


def test_a_model_patched_already_is_refused() -> None:
    model, x = cn_hf.patch_model(vit()), images()
    tell_apart(model)
    before, parts = model(x, context_ids=1), anatomy(model)
    for thing in (model, nn.Sequential(model), model.blocks):
        with pytest.raises(PatchError, match="already patched"):
            cn_hf.patch_model(thing)
    assert anatomy(model) == parts
    assert torch.equal(model(x, context_ids=1), before)


def test_a_forward_that_takes_context_ids_already_is_refused() -> None:
    class Taken(SmallTokenNet):
        def forward(self, x: Tensor, context_ids: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = Taken(nn.LayerNorm(6))
    parts = anatomy(model)
    with pytest.raises(PatchError, match="context_ids"):
        cn_hf.patch_model(model)
    assert anatomy(model) == parts


@pytest.mark.parametrize("attribute", ["router", "normalizer"])
def test_an_attribute_that_a_slot_needs_is_not_overwritten(attribute: str) -> None:
    for owner in ("root", "norm"):
        model = SmallTokenNet(nn.LayerNorm(6))
        setattr(model if owner == "root" else model.norm, attribute, nn.Linear(2, 2))
        parts, x = anatomy(model), torch.randn(2, 4, 5)
        if (owner, attribute) == ("root", "normalizer"):
            before = model(x)
            assert difference(cn_hf.patch_model(model).eval()(x, context_ids=1), before) <= 1e-5
            continue
        with pytest.raises(PatchError, match=attribute):
            cn_hf.patch_model(model)
        assert anatomy(model) == parts


def test_a_failure_half_way_undoes_the_first_half() -> None:
    class Stubborn(nn.Conv2d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "router":
                raise RuntimeError("no routers here")
            super().__setattr__(name, value)

    model, x = vit(), images()
    projection = Stubborn(3, 24, 4, stride=4)
    projection.load_state_dict(model.patch_embed.proj.state_dict())
    model.patch_embed.proj = projection
    before, parts, state = model(x), anatomy(model), tensors_of(model)
    with pytest.raises(RuntimeError, match="no routers here"):
        cn_hf.patch_model(model, "cn", where="paper")  # patch_embed first, then its projection
    assert anatomy(model) == parts
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), before)
    assert difference(cn_hf.patch_model(model, "cn")(x, context_ids=1), before) <= 1e-5


@pytest.mark.parametrize("owner", ["root", "norm"])
def test_a_forward_replaced_on_the_object_is_not_bypassed(owner: str) -> None:
    # accelerate's hooks and mixed precision set `forward` on the object, which hides the one of its class.
    model, x = SmallTokenNet(nn.LayerNorm(6)).eval(), torch.randn(2, 4, 5)
    module = model if owner == "root" else model.norm
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    parts = anatomy(model)
    error = refusal(lambda: cn_hf.patch_model(model))
    if error is not None:
        assert isinstance(error, PatchError)
        assert "forward" in str(error)
        assert anatomy(model) == parts
        return
    before = model(x, context_ids=0)
    tell_apart(model)
    assert difference(model(x, context_ids=0), before) > 1e-3


def test_arguments_beside_a_config_replace_its_fields() -> None:
    config = cn_hf.ContextNormConfig(mode="cn-channels", num_contexts=5, parametrization="table")
    model = cn_hf.patch_model(vit(), config=config)
    assert model.context_config == config
    assert cn_hf.patch_model(vit(), config=config, num_contexts=4).context_config.num_contexts == 4
    assert cn_hf.patch_model(vit(), config=config, num_contexts=3).context_config.num_contexts == 3
    both = cn_hf.patch_model(vit(), "cn-patches", config=config, context_names=["a", "b"]).context_config
    assert (both.mode, both.num_contexts, both.context_names) == ("cn-patches", 2, ("a", "b"))
    assert both.parametrization == "table"


def test_names_set_the_number_of_contexts() -> None:
    model = cn_hf.patch_model(vit(), context_names=["day", "night", "dawn", "dusk"])
    assert model.context_config.num_contexts == 4
    assert model.context_config.context_names == ("day", "night", "dawn", "dusk")


# ----------------------------------------------------------------------------------------------- state dicts and copies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dicts_round_trip_strictly(case: Case) -> None:
    model, x = patched(case)
    tell_apart(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again, _ = patched(case)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(again(x, context_ids=2)), logits(model(x, context_ids=2)))


@pytest.mark.parametrize("case", [*CASES, LARGE_CASES[4]], ids=str)
def test_a_plain_checkpoint_loads_strictly_and_resets_the_contexts(case: Case) -> None:
    other = case.make()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    checkpoint, expected = tensors_of(other), logits(other(case.sample()))
    given = dict(checkpoint)
    model, x = patched(case)
    tell_apart(model)
    result = model.load_state_dict(checkpoint)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for ids in (0, 2, None):
        assert difference(logits(model(x, context_ids=ids)), expected) <= 1e-5
    assert checkpoint.keys() == given.keys()
    tell_apart(model)
    assert not model.load_state_dict(checkpoint, strict=False).missing_keys
    assert difference(logits(model(x, context_ids=1)), expected) <= 1e-5


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6, elementwise_affine=False),
        nn.RMSNorm(6, elementwise_affine=False),
        nn.LayerNorm(6, bias=False),
        nn.BatchNorm1d(6, affine=False),
        nn.GroupNorm(2, 6, affine=False),
        nn.InstanceNorm1d(6),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_plain_checkpoint_loads_where_norms_have_no_weights(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Identity(), norm)
    x = torch.randn(8, 5)
    if isinstance(norm, (nn.InstanceNorm1d, nn.GroupNorm)):
        model, x = nn.Sequential(nn.Conv1d(5, 6, 1), nn.Identity(), norm), torch.randn(8, 5, 4)
    settle(model)
    plain, before = tensors_of(model), model(x)
    cn_hf.patch_model(model, "cn", where=["2"])
    for strict in (True, False):
        tell_apart(model)
        assert difference(model(x, context_ids=1), before) > 1e-3
        model.load_state_dict(plain, strict=strict)
        assert difference(model(x, context_ids=1), before) <= 1e-5


def test_old_batch_norm_checkpoints_without_a_counter_load() -> None:
    plain, x = small_convnet(), images()
    checkpoint = {name: value.clone() for name, value in plain.state_dict().items() if "num_batches" not in name}
    small_convnet().load_state_dict(checkpoint)
    model = cn_hf.patch_model(small_convnet(), "cn-channels")
    tell_apart(model)
    model.load_state_dict(checkpoint)
    assert difference(model(x, context_ids=1), plain(x)) <= 1e-5


@pytest.mark.parametrize("make", [vit, small_convnet], ids=["vit", "net"])
def test_a_partial_load_resets_nothing(make: Any) -> None:
    model, x = tell_apart(cn_hf.patch_model(make(), "cn")), images()
    before = model(x, context_ids=1)
    head = {name: value for name, value in tensors_of(model).items() if name.startswith("head.")}
    assert head
    model.load_state_dict(head, strict=False)
    assert torch.equal(model(x, context_ids=1), before)
    model.load_state_dict({}, strict=False)
    assert torch.equal(model(x, context_ids=1), before)


def test_a_checkpoint_of_contexts_alone_leaves_the_rest() -> None:
    model, x = tell_apart(cn_hf.patch_model(vit())), images()
    plain = vit().state_dict()
    contexts = {name: value for name, value in model.state_dict().items() if name not in plain}
    again = cn_hf.patch_model(vit())
    assert not again.load_state_dict(contexts, strict=False).unexpected_keys
    again.load_state_dict({**again.state_dict(), **{name: model.state_dict()[name] for name in plain}})
    assert torch.equal(again(x, context_ids=2), model(x, context_ids=2))


def test_a_checkpoint_of_another_number_of_contexts_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        cn_hf.patch_model(vit()).load_state_dict(cn_hf.patch_model(vit(), num_contexts=4).state_dict())


def test_part_of_the_contexts_keys_missing_is_an_error_when_strict() -> None:
    model = cn_hf.patch_model(vit())
    state = model.state_dict()
    del state[next(name for name in state if "normalizer" in name)]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle-2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "torch.save": through_torch_save,
    "deepcopy of pickle": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
    "deepcopy in a wrapper": lambda m: copy.deepcopy(nn.Sequential(nn.Identity(), m))[1],
    "ema": lambda m: ModelEmaV3(m, decay=0.9).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5], CASES[6], CASES[9], CASES[14]], ids=str)
def test_copies_are_whole_and_independent(case: Case, how: str) -> None:
    model, x = patched(case, inference="cn+", context_names=["a", "b", "c"])
    tell_apart(model)
    again = COPIES[how](model)
    base = type(case.make())
    assert isinstance(again, base)
    assert type(again) is type(model)
    assert again.context_config == model.context_config
    outputs = [logits(model(x, context_ids=r)) for r in range(3)]
    for r in range(3):
        assert torch.equal(logits(again(x, context_ids=r)), outputs[r])
    assert torch.equal(logits(again(x)), logits(model(x)))
    # Two models, two states: what is set for one is not seen by the other.
    with cn_hf.use_contexts(again, "c"):
        assert torch.equal(logits(model(x)), logits(model(x, context_ids=None)))
        assert torch.equal(logits(again(x)), outputs[2])
    cn_hf.set_inference(again, "cn")
    assert model.context_config.inference == "cn+"
    tell_apart(again)
    assert torch.equal(logits(model(x, context_ids=1)), outputs[1])
    cn_hf.unpatch_model(again)
    assert torch.equal(logits(model(x, context_ids=1)), outputs[1])


def test_copies_survive_their_original() -> None:
    model, x = tell_apart(cn_hf.patch_model(vit())), images()
    expected = model(x, context_ids=2)
    again = copy.deepcopy(model)
    del model
    third = copy.deepcopy(again)
    with cn_hf.use_contexts(again, 0):
        assert torch.equal(third(x, context_ids=2), expected)
        assert not torch.equal(again(x), expected)


def test_a_shallow_copy_does_not_tie_deep_copies_together() -> None:
    model, x = tell_apart(cn_hf.patch_model(vit())), images()
    shallow = copy.copy(model)
    deep = copy.deepcopy(model)
    expected = model(x)
    with cn_hf.use_contexts(deep, 1):
        assert torch.equal(model(x), expected)
    assert torch.equal(shallow(x), expected)


def test_ema_follows_the_model() -> None:
    model, x = cn_hf.patch_model(vit()), images()
    ema = ModelEmaV3(model, decay=0.0)
    tell_apart(model)
    ema.update(model)
    assert difference(ema.module(x, context_ids=1), model(x, context_ids=1)) <= 1e-6


# ------------------------------------------------------------------------------------ hooks, sharing, freezing, nesting


def test_hooks_that_users_registered_survive() -> None:
    model, x = vit(), images()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    model.norm.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.norm.register_full_backward_hook(lambda *_: calls.append("backward"))
    for change in (lambda m: m, cn_hf.patch_model, cn_hf.unpatch_model):
        change(model)
        calls.clear()
        model(x).sum().backward()
        assert calls == ["pre", "norm", "root", "backward"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)], ids=lambda n: type(n).__name__)
def test_a_norm_in_two_places_is_one_slot(norm: nn.Module) -> None:
    model, x = settle(Shared(copy.deepcopy(norm))), torch.randn(3, 6)
    before, plain = model(x), tensors_of(model)
    cn_hf.patch_model(model)
    assert model.first is model.second
    assert len(cn_hf.patch_report(model)) == 1
    assert difference(model(x, context_ids=1), before) <= 1e-5
    tell_apart(model)
    state = tensors_of(model)
    model.load_state_dict(plain)
    assert difference(model(x, context_ids=1), before) <= 1e-5
    model.load_state_dict(state)
    cn_hf.unpatch_model(model)
    assert torch.equal(model(x), before)


def test_frozen_models_stay_frozen_and_their_contexts_learn() -> None:
    model = vit().requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    cn_hf.patch_model(model).train()
    assert flags.items() <= {name: p.requires_grad for name, p in model.named_parameters()}.items()
    assert all(p.requires_grad for p in cn_hf.context_parameters(model))
    model(images(), context_ids=torch.tensor([0, 1, 2, 0])).square().sum().backward()
    assert all(p.grad is not None for p in cn_hf.context_parameters(model))
    assert model.head.weight.grad is None
    cn_hf.unpatch_model(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_and_modes_stay(training: bool) -> None:
    model = vit().train(training)
    model.blocks[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    cn_hf.patch_model(model)
    after = {name: module.training for name, module in model.named_modules()}
    assert flags.items() <= after.items()
    assert all(after[f"{name}.normalizer"] == flags[name] for name in ("norm", "blocks.0.norm1"))


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit(num_classes=0)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor, context_ids: Any = None) -> Tensor:
        return self.head(self.norm(self.backbone(x, context_ids=context_ids)))


def test_a_patched_backbone_inside_a_bigger_model() -> None:
    model, x = Detector().eval(), images()
    before = model.head(model.norm(model.backbone(x)))
    cn_hf.patch_model(model.backbone)
    for ids in (0, torch.tensor([0, 1, 2, 1]), None):
        assert difference(model(x, context_ids=ids), before) <= 1e-5
    tell_apart(model.backbone)
    again = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    with cn_hf.use_contexts(model.backbone, 2):
        expected = model(x)
    assert torch.equal(model(x, context_ids=2), expected)
    assert torch.equal(again(x, context_ids=2), expected)
    assert torch.equal(pickled(x, context_ids=2), expected)
    assert not torch.equal(model(x), expected)
    cn_hf.unpatch_model(model.backbone)
    assert difference(model.head(model.norm(model.backbone(x))), before) == 0


def test_slices_of_a_patched_sequential_run() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    x = torch.randn(3, 5)
    before = model[:2](x)
    cn_hf.patch_model(model)
    assert difference(model[:2](x), before) <= 1e-5


def test_the_encoders_fast_path_does_not_bypass_the_contexts() -> None:
    for make in (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)),
    ):
        model, x = settle(make()), torch.randn(3, 5, 8)
        with torch.no_grad():
            before = model(x)
            cn_hf.patch_model(model)
            assert difference(model(x, context_ids=1), before) <= 1e-5
            tell_apart(model)
            assert difference(model(x, context_ids=1), before) > 1e-3
            fast = model(x, context_ids=1)
        slow = model(x, context_ids=1)
        assert difference(fast, slow) <= 1e-5
        cn_hf.unpatch_model(model)
        with torch.no_grad():
            assert torch.equal(model(x), before)


# --------------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [vit_with_every_slot, hf_vit, small_convnet], ids=["vit", "hf", "net"])
def test_half_precision_models(make: Any, dtype: torch.dtype) -> None:
    model, x = make().to(dtype), images().to(dtype)
    before = logits(model(x))
    exact = logits(copy.deepcopy(model).float()(x.float()))
    rounding = max(difference(before, exact), torch.finfo(dtype).eps)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    cn_hf.patch_model(model, "cn")
    assert dtypes.items() <= {name: p.dtype for name, p in model.named_parameters()}.items()
    for ids in (torch.tensor([0, 1, 2, 0]), None):
        after = logits(model(x, context_ids=ids))
        assert after.dtype == dtype
        assert difference(after, exact) <= 4 * rounding
    later = cn_hf.patch_model(make(), "cn").to(dtype)
    after = logits(later(x, context_ids=1))
    assert after.dtype == dtype
    assert difference(after, exact) <= 30 * torch.finfo(dtype).eps
    model.train()
    logits(model(x, context_ids=1)).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in cn_hf.context_parameters(model))


@pytest.mark.parametrize("make", [vit, hf_vit, small_convnet], ids=["vit", "hf", "net"])
def test_autocast(make: Any) -> None:
    model, x = make(), images()
    exact = logits(model(x))
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model(x))
        cn_hf.patch_model(model, "cn")
        for ids in (1, torch.full((4, 3), 1 / 3), None):
            after = logits(model(x, context_ids=ids))
            assert after.dtype == before.dtype
            assert difference(after, exact) <= 4 * max(difference(before, exact), torch.finfo(torch.bfloat16).eps)
        model.train()
        logits(model(x, context_ids=torch.tensor([0, 1, 2, 0]))).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in cn_hf.context_parameters(model))


def test_double_models_are_exact() -> None:
    model, x = vit_with_every_slot().double(), images().double()
    before = model(x)
    cn_hf.patch_model(model)
    assert difference(model(x, context_ids=1), before) <= 1e-12


META = [
    (vit_with_every_slot, {}),
    (hf_vit, {}),
    (small_convnet, {"mode": "cn-channels"}),
    (vit, {"mode": "cn-channels", "where": "input", "affine": True}),
    (lambda: SmallTokenNet(nn.LayerNorm(6, elementwise_affine=False)), {}),
]


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize(("make", "options"), META, ids=["vit", "hf", "net", "input", "no-weights"])
@pytest.mark.parametrize("parametrization", ["embedder", "table"])
def test_patched_on_the_meta_device_then_filled(
    make: Any, options: dict[str, Any], parametrization: str, assign: bool
) -> None:
    plain = make().eval()
    x = torch.randn(2, 4, 5) if isinstance(plain, SmallTokenNet) else images()
    model = make().eval().to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cn_hf.patch_model(model, **options, parametrization=parametrization)
    assert all(p.is_meta for p in model.parameters())
    if assign:
        error = refusal(lambda: model.load_state_dict(tensors_of(plain), assign=True))
        if error is not None:
            assert re.search("meta|normalizer", str(error))
            return
        assert not any(buffer.is_meta for buffer in model.buffers())
    else:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 99)  # what empty memory may hold
            for name, buffer in plain.named_buffers():  # some are in no state_dict
                dict(model.named_buffers())[name].copy_(buffer)
        model.load_state_dict(tensors_of(plain))
    assert not any(p.is_meta for p in model.parameters())
    for ids in (0, 2):
        assert difference(logits(model(x, context_ids=ids)), logits(plain(x))) <= 1e-5


def test_a_meta_model_filled_by_a_patched_checkpoint() -> None:
    source, x = tell_apart(cn_hf.patch_model(vit())), images()
    model = cn_hf.patch_model(vit().to("meta"))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model.eval()(x, context_ids=2), source(x, context_ids=2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_of_none_and_one(case: Case) -> None:
    model, x = case.make(), case.sample()
    sizes = (1,) if case.name.startswith(("encoder", "hf")) else (0, 1)  # those fail on empty batches by themselves
    expected = {n: logits(model(x[:n])).shape for n in sizes}
    cn_hf.patch_model(model, **case.options)
    for n, shape in expected.items():
        for ids in (1, torch.zeros(n, dtype=torch.int64), torch.full((n, 3), 1 / 3), None):
            assert logits(model(x[:n], context_ids=ids)).shape == shape
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            model.train()
            logits(model(x[:n], context_ids=[0] * n)).sum().backward()
            model.eval()


def test_channels_last_is_kept() -> None:
    model, x = small_convnet().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
    cn_hf.patch_model(model, "cn-channels")
    formats: list[bool] = []
    for name in ("bn1", "bn2", "gn"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out: formats.append(
                not args[0].is_contiguous(memory_format=torch.channels_last)
                or out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    for ids in (1, torch.tensor([0, 1, 2, 0]), None):
        model(x, context_ids=ids)
    assert len(formats) == 9
    assert all(formats)


# ------------------------------------------------------------------------------------------------------- options, modes


def test_init_random_and_batch_statistics_do_change_the_output() -> None:
    x, before = images(), vit()(images())
    assert difference(cn_hf.patch_model(vit(), init="random")(x, context_ids=1), before) > 1e-2
    paper = cn_hf.patch_model(vit(), plus_stats="batch", plus_scale="sqrt_t")
    assert difference(paper(x), before) > 1e-2
    assert difference(paper(x, context_ids=1), before) <= 1e-5


def test_an_input_layer_with_affine_weights() -> None:
    model, x = vit(), images()
    before = model(x)
    cn_hf.patch_model(model, "cn-channels", affine=True)
    assert {p.shape for p in cn_hf.context_parameters(model)} >= {torch.Size([3])}
    assert difference(model(x, context_ids=1), before) <= 1e-5
    norms = cn_hf.patch_model(vit(), affine=True)
    assert all(norms.get_submodule(row.name).normalizer.weight is None for row in cn_hf.patch_report(norms))


def test_a_batch_norm_that_never_saw_data_is_warned_about() -> None:
    model = timm.create_model("cn_cifar_convnet").eval()
    with pytest.warns(UserWarning, match=r"bn1.*never saw data.*calibrate"):
        cn_hf.patch_model(model, "cn-channels", where="norms")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cn_hf.patch_model(convnet(), "cn-channels", where="norms")
        cn_hf.patch_model(timm.create_model("cn_cifar_convnet"), "bn", where="norms")


@pytest.mark.parametrize(("make", "where"), [(convnet, None), (convnet, "norms"), (vit, "input"), (vit, ["norm"])])
def test_the_bn_baseline_trains_and_tracks(make: Any, where: Any) -> None:
    model, x = make(), images(6) * 2 + 1
    cn_hf.patch_model(model, "bn", where=where, momentum=0.5).train()
    slot = model.get_submodule(cn_hf.patch_report(model)[0].name)
    seen: list[Tensor] = []
    slot.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    start = slot.normalizer.running_mean.clone()
    model(x, context_ids=torch.zeros(6, dtype=torch.int64)).sum().backward()
    axis = slot.normalizer.feature_dim
    mean = seen[0].movedim(axis, -1).flatten(0, -2).mean(0)
    if where != ["norm"]:  # there batch norm follows the layer norm's place, not its standardisation
        torch.testing.assert_close(slot.normalizer.running_mean, 0.5 * start + 0.5 * mean, atol=1e-5, rtol=1e-5)
    moved = slot.normalizer.running_mean.clone()
    out = model.eval()(x)
    assert torch.equal(slot.normalizer.running_mean, moved)
    assert torch.equal(model(x[:1], context_ids=2), model(x[:1]))
    torch.testing.assert_close(model(x[:2]), out[:2], atol=1e-4, rtol=1e-4)


def test_a_bn_input_layer_normalises_the_batch() -> None:
    model = cn_hf.patch_model(vit(), "bn", where="input").train()
    seen: list[Tensor] = []
    proj = model.patch_embed.proj
    x = images(8) * 3 + 5
    expected = nn.functional.batch_norm(x, None, None, training=True)
    proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(x)
    torch.testing.assert_close(seen[0], nn.functional.conv2d(expected, proj.weight, proj.bias, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", [None, "norms", ["bn1", "bn4"]])
def test_the_mn_baseline_trains_and_tracks(where: Any) -> None:
    model, x = convnet(), images(6)
    cn_hf.patch_model(model, "mn", where=where, num_contexts=3).train()
    normalizers = [model.get_submodule(row.name).normalizer for row in cn_hf.patch_report(model)]
    before = [n.running_mean.clone() for n in normalizers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for normalizer, start in zip(normalizers, before, strict=True):
        assert int(normalizer.num_batches_tracked) == 2
        assert not torch.equal(normalizer.running_mean, start)
    model.eval()
    torch.testing.assert_close(model(x)[:2], model(x[:2]), atol=1e-4, rtol=1e-4)
    again = cn_hf.patch_model(convnet(), "mn", where=where)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_cn_does_not_touch_running_statistics_in_training() -> None:
    model = cn_hf.patch_model(small_convnet(), "cn-channels")
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    model(images(), context_ids=torch.tensor([0, 1, 2, 0])).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


# ------------------------------------------------------------------------------------------------------ tools of others


@torch.no_grad()
def test_timms_reparameterization_refuses_or_is_harmless() -> None:
    from timm.utils import reparameterize_model

    for name, options in (("repvgg_a0", {"num_classes": 5}), ("levit_128s", {"num_classes": 5, "img_size": 64})):
        model = settle(timm.create_model(name, **options))
        x = images(2, 64)
        with torch.no_grad():
            before = model(x)
        cn_hf.patch_model(model.requires_grad_(False), "cn-channels")
        assert difference(model(x, context_ids=1), before) <= 1e-4
        tell_apart(model, 0.05)
        expected = model(x, context_ids=1)
        done: list[nn.Module] = []
        error = refusal(lambda model=model, done=done: done.append(reparameterize_model(model)))
        if error is None:
            assert difference(done[0](x, context_ids=1), expected) <= 1e-4
        else:
            assert isinstance(error, CnHfError)
            assert "fold_context" in str(error)
        assert torch.equal(model(x, context_ids=1), expected)


def test_functional_call_and_per_sample_gradients() -> None:
    model = cn_hf.patch_model(small_convnet(), "cn-channels")
    x, ids = images(), torch.tensor([0, 1, 2, 0])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(parameters: Any, x: Tensor, ids: Tensor) -> Tensor:
        call = {"context_ids": ids[None]}
        return torch.func.functional_call(model, {**parameters, **buffers}, (x[None],), call).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, ids)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1], context_ids=ids[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------- half precision by default


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_contexts": 4, "embedding_dim": 3}, {"embedding_dim": 1}], ids=str)
@pytest.mark.parametrize("mode", ["cn", "cn-channels", "dsbn", "bn", "mn"])
def test_a_model_built_in_half_precision(mode: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8))
        cn_hf.patch_model(settle(model), mode, where="norms", **options)
        layer = cn_hf.ContextNorm(8, 3, feature_dim=1)
        x = torch.randn(4, 3, 6, 6)
        out = model(x) if mode in ("bn", "mn") else model(x, context_ids=torch.tensor([0, 2, 1, 1]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == dtype
    assert {p.dtype for p in cn_hf.context_parameters(model)} <= {torch.float32}
    assert layer.embedding.dtype == dtype
    rows = layer.embedding.float()
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=2e-2, rtol=0)


@pytest.mark.parametrize("model", [None, 3, "model", [nn.Linear(1, 1)]])
def test_what_is_no_module_cannot_be_unpatched(model):
    with pytest.raises(CnHfError, match=r"expects a torch\.nn\.Module") as raised:
        cn_hf.unpatch_model(model)
    assert isinstance(raised.value, TypeError)


def test_errors_shorten_endless_words():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for options in ({"mode": "a" * 10**6}, {"where": "a" * 10**6}, {"num_contexts": "a" * 10**6}):
        with pytest.raises(CnHfError) as raised:
            cn_hf.patch_model(plain, **{"mode": "cn-channels", **options})
        assert len(str(raised.value)) < 2_000


@pytest.mark.parametrize("option", ["mean", "std"])
@pytest.mark.parametrize("values", [b"abc", {0.1, 0.2, 0.3}, {0.1: 1, 0.2: 2, 0.3: 3}, bytearray(b"abc")])
def test_pixel_statistics_are_a_list_of_numbers(option, values):
    model = cn_hf.patch_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), "cn-channels")
    with pytest.raises(ConfigError, match=option):
        cn_hf.set_inference(model, "cn", **{option: values})
    assert (model.router.pixel_mean, model.router.pixel_std) == ((0.0,), (1.0,))


@pytest.mark.parametrize("ids", [{}, set(), object(), nn.Linear(1, 1)])
def test_calibration_refuses_pairs_with_what_is_no_ids(ids):
    model = cn_hf.patch_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), "cn-channels")
    with pytest.raises(cn_hf.ContextIdError):
        cn_hf.calibrate(model, [(torch.randn(2, 3, 6, 6), ids)])
