"""Tools of timm on patched models: what its train.py and validate.py use keeps the contexts, or refuses clearly."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
from pathlib import Path

import pytest
import timm
import timm.layers
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from models_for_tests import difference, settle, tell_apart, tensors_of
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, FeatureListNet
from torch import Tensor, nn

import cn_hf
from cn_hf.errors import CnHfError, ConfigError, ContextIdError, PatchError

IDS = torch.tensor([0, 2, 1])


def patched(name: str, mode: str = "cn", where: str | None = None, **arguments) -> nn.Module:
    """A timm model whose three contexts differ, with running statistics as after training."""
    model = settle(timm.create_model(name, **arguments))
    cn_hf.patch_model(model, mode, num_contexts=3, where=where)
    return tell_apart(model).eval() if mode not in ("bn", "mn") else model.eval()


def images(size: int = 64) -> Tensor:
    return torch.randn(3, 3, size, size)


def with_contexts(model: nn.Module, inner: nn.Module, x: Tensor):
    with cn_hf.use_contexts(model, IDS):
        return inner(x)


def depends_on_contexts(model: nn.Module, x: Tensor) -> bool:
    return difference(model(x, context_ids=IDS), model(x, context_ids=0)) > 1e-3


# ------------------------------------------------------------------------------------------------ averages, checkpoints

AVERAGES = {
    "v1": functools.partial(timm.utils.ModelEma, decay=0.5),
    "v2": functools.partial(timm.utils.ModelEmaV2, decay=0.5),
    "v3": functools.partial(timm.utils.ModelEmaV3, decay=0.5),
    "v3, tensor by tensor": functools.partial(timm.utils.ModelEmaV3, decay=0.5, foreach=False),
}


@pytest.mark.parametrize("version", AVERAGES)
def test_moving_averages_average_the_contexts_too(version):
    model = patched("test_resnet")
    average = AVERAGES[version](model)
    start = tensors_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    average.update(model)
    averaged = average.ema if version == "v1" else average.module
    end = model.state_dict()
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, (start[name] + end[name]) / 2, atol=1e-6), name
    x = images()
    assert depends_on_contexts(averaged, x)
    reference = copy.deepcopy(model)
    reference.load_state_dict(averaged.state_dict())
    assert torch.equal(averaged(x, context_ids=IDS), reference(x, context_ids=IDS))
    assert timm.utils.unwrap_model(average) is averaged
    if version.startswith("v3"):
        assert torch.equal(average(x, context_ids=IDS), averaged(x, context_ids=IDS))
    with torch.no_grad(), cn_hf.use_contexts(model, IDS):  # the average has a router of its own
        assert torch.equal(averaged(x), reference(x))


def test_an_average_in_bfloat16_keeps_the_contexts():
    model = patched("test_vit").to(torch.bfloat16)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    average.update(model)
    x = images(160).to(torch.bfloat16)
    assert torch.equal(average(x, context_ids=IDS), model(x, context_ids=IDS))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    loss = F.cross_entropy(model.train()(x, context_ids=IDS), torch.tensor([0, 1, 2]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval()
    return float(loss)


def test_a_run_saved_by_the_checkpoint_saver_resumes(tmp_path):
    x = images()
    model = patched("test_resnet", num_classes=5)
    optimizer, average = optimizer_of(model), timm.utils.ModelEmaV3(model, decay=0.5)
    step(model, optimizer, x)
    average.update(model)
    saver = timm.utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_resnet"),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    expected = [
        model(x, context_ids=IDS),
        average(x, context_ids=IDS),
        step(model, optimizer, x),
        step(model, optimizer, x),
    ]

    again = patched("test_resnet", num_classes=5)
    resumed = optimizer_of(again)
    last = str(tmp_path / "last.pth.tar")
    assert timm.models.resume_checkpoint(again, last, resumed) == 1
    assert torch.equal(again(x, context_ids=IDS), expected[0])
    assert [step(again, resumed, x), step(again, resumed, x)] == expected[2:]
    timm.models.load_checkpoint(again, last, use_ema=True)
    assert torch.equal(again(x, context_ids=IDS), expected[1])
    with pytest.raises(RuntimeError, match="normalizer"):
        timm.models.load_checkpoint(timm.create_model("test_resnet", num_classes=5), last)


def test_a_plain_checkpoint_loads_into_a_patched_model(tmp_path):
    plain = settle(timm.create_model("test_resnet"))
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in plain.state_dict().items()}}, path)
    model = patched("test_resnet")
    timm.models.load_checkpoint(model, str(path))
    x = images()
    assert difference(model(x, context_ids=IDS), plain(x)) < 1e-5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_lose_the_prefixes_of_wrappers(prefix):
    state = patched("test_resnet").state_dict()
    cleaned = timm.models.clean_state_dict({f"{prefix}{name}": value for name, value in state.items()})
    assert cleaned.keys() == state.keys()


# ------------------------------------------------------------------------------------------------- changes to the model


@pytest.mark.parametrize("where", ["norms", "input"])
@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "mobileone_s0"])
@pytest.mark.parametrize("inplace", [False, True])
def test_fusing_is_refused_where_it_would_drop_contexts(name, where, inplace):
    model = patched(name, "cn-channels", where)
    before = tensors_of(model)
    with pytest.raises(PatchError, match="fold_context"):
        timm.utils.reparameterize_model(model, inplace=inplace)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fused = timm.utils.reparameterize_model(cn_hf.unpatch_model(model))
    x = torch.randn(1, 3, 224, 224)
    assert difference(fused(x), model(x)) < 1e-3


def test_fusing_elsewhere_keeps_the_contexts():
    model, x = patched("repghostnet_050", "cn-channels", "input"), torch.randn(1, 3, 224, 224)
    fused = timm.utils.reparameterize_model(model)
    assert len(list(fused.modules())) < len(list(model.modules()))
    assert not torch.equal(fused(x, context_ids=2), fused(x, context_ids=0))
    assert difference(fused(x, context_ids=2), model(x, context_ids=2)) < 1e-4


@pytest.mark.parametrize("name", ["repvit_m0_9", "mobileone_s0"])
def test_a_folded_model_is_fused_as_any_other(name):
    model = patched(name, "cn-channels", "norms")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        fused = timm.utils.reparameterize_model(cn_hf.fold_context(model, 2))
        assert difference(fused(x), model(x, context_ids=2)) < 1e-5


def test_a_model_without_anything_to_fuse_passes_through():
    model = patched("test_convnext")
    x = images()
    assert torch.equal(timm.utils.reparameterize_model(model)(x, context_ids=IDS), model(x, context_ids=IDS))


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 160), ("test_convnext", 64)])
def test_a_new_classifier_leaves_the_contexts(name, size, tmp_path):
    model, x = patched(name), images(size)
    with cn_hf.use_contexts(model, IDS):
        features = model.forward_features(x)
    model.reset_classifier(7)
    assert model(x, context_ids=IDS).shape == (3, 7)
    with cn_hf.use_contexts(model, IDS):
        assert torch.equal(model.forward_features(x), features)
    assert depends_on_contexts(model, x)
    cn_hf.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x, context_ids=IDS), model(x, context_ids=IDS))


def test_a_head_with_a_norm_of_its_own_is_named_when_saved(tmp_path):
    model = patched("levit_128s", "cn-channels")
    model.head = nn.Sequential(nn.BatchNorm1d(384), nn.Linear(384, 5))
    with pytest.raises(ConfigError, match=r"builds another model: .*model_args"):
        cn_hf.save_pretrained(model, tmp_path)


def test_another_input_size_leaves_the_contexts():
    model = patched("test_vit", dynamic_img_size=False)
    contexts = [parameter.clone() for parameter in cn_hf.context_parameters(model)]
    model.set_input_size(img_size=96)
    assert depends_on_contexts(model, images(96))
    assert all(map(torch.equal, cn_hf.context_parameters(model), contexts))


@pytest.mark.parametrize("mode", ["cn", "bn", "mn"])
def test_freezing_stops_every_tensor_and_unfreezing_starts_every_parameter(mode):
    model, x = patched("test_resnet", mode, "norms"), images()
    before = tensors_of(model)
    timm.utils.freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if mode == "cn":  # baselines have running statistics of a kind timm does not know
        model.train()(x, context_ids=IDS)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    timm.utils.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(cn_hf.patch_report(model)) == 15


def test_freezing_a_part_and_batch_norms_without_contexts():
    model, x = patched("test_resnet", "cn-channels", "input"), images()
    expected = model(x, context_ids=IDS)
    timm.utils.freeze(model, ["conv1"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("conv1.")}
    timm.layers.freeze_batch_norm_2d(model)
    assert not [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    assert difference(model(x, context_ids=IDS), expected) < 1e-6


CONVERSIONS = {
    "timm's SyncBatchNorm": timm.layers.convert_sync_batchnorm,
    "torch's SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "SplitBatchNorm": functools.partial(timm.layers.convert_splitbn_model, num_splits=2),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_of_batch_norms_leave_the_slots(conversion):
    x = images()
    for where in ("norms", "input"):
        model = patched("test_resnet", "cn-channels", where)
        expected, slots = model(x, context_ids=IDS), len(cn_hf.patch_report(model))
        converted = CONVERSIONS[conversion](model)
        assert converted.eval() is model
        assert len(cn_hf.patch_report(converted)) == slots
        assert difference(converted(x, context_ids=IDS), expected) < 1e-6
        kinds = {type(module).__name__ for module in converted.modules()}
        assert bool(kinds & {"SyncBatchNorm", "SplitBatchNorm2d"}) == (where == "input")  # those that are no slots


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_that_would_replace_a_baselines_norm_are_refused(conversion):
    model = patched("test_resnet", "bn", "norms")
    with pytest.raises(CnHfError, match="normalizer"):
        CONVERSIONS[conversion](model)


# ------------------------------------------------------------------------------------------------------------- features

EXTRACTORS = {"list": FeatureListNet, "dict": FeatureDictNet, "hook": FeatureHookNet, "graph": FeatureGraphNet}


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_an_extractor_that_is_patched_takes_context_ids(kind):
    model = EXTRACTORS[kind](settle(timm.create_model("test_resnet")), out_indices=(1, 3))
    x = images()
    plain = _listed(model(x))
    cn_hf.patch_model(model, "cn", num_contexts=3)
    unchanged = zip(_listed(model.eval()(x, context_ids=IDS)), plain, strict=True)
    assert all(difference(output, expected) < 1e-5 for output, expected in unchanged)
    tell_apart(model)
    mixed = _listed(model(x, context_ids=IDS))
    for row, context in enumerate(IDS.tolist()):
        alone = _listed(model(x[row : row + 1], context_ids=context))
        assert all(difference(output[row : row + 1], other) < 1e-5 for output, other in zip(mixed, alone, strict=True))
    assert difference(mixed[0], _listed(model(x, context_ids=0))[0]) > 1e-3


def _listed(features) -> list[Tensor]:
    return list(features.values()) if isinstance(features, dict) else list(features)


@pytest.mark.parametrize("kind", ["list", "dict", "hook"])
def test_an_extractor_around_a_patched_model_takes_its_contexts(kind):
    model, x = patched("test_resnet"), images()
    with cn_hf.use_contexts(model, IDS):
        expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    extractor = EXTRACTORS[kind](model, out_indices=(1, 3))
    assert all(map(torch.equal, _listed(with_contexts(model, extractor, x)), expected))
    with pytest.raises(TypeError, match="context_ids"):
        extractor(x, context_ids=IDS)


def test_graphs_of_a_patched_model_are_refused_in_clear_words():
    for call in (
        lambda: FeatureGraphNet(patched("test_resnet"), out_indices=(1,)),
        lambda: timm.utils.AttentionExtract(patched("test_vit"), method="fx"),
    ):
        with pytest.raises(CnHfError, match=r"torch\.fx"):
            call()


def test_features_only_models_checkpoint_their_activations():
    x = images()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = patched("test_convnext", features_only=True)
        model.set_grad_checkpointing(checkpointing)
        sum(output.square().mean() for output in model.train()(x, context_ids=IDS)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys()
    assert any("normalizer" in name for name in first)
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_resnet", 64)])
def test_checkpointing_of_activations_gives_the_same_gradients(name, size):
    x = images(size)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = patched(name)
        model.set_grad_checkpointing(checkpointing)
        first, second = model.train()(x, context_ids=IDS), model(x, context_ids=IDS.flip(0))
        (first.square().mean() + second.mean()).backward()  # two forwards before one backward
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5) for name in gradients[0])


def test_attention_maps_are_those_of_the_contexts():
    timm.layers.set_fused_attn(False)
    try:
        model = patched("test_vit")
    finally:
        timm.layers.set_fused_attn(True)
    x = images(160)
    extractor = timm.utils.AttentionExtract(model, method="hook")
    maps = with_contexts(model, extractor, x)
    assert len(maps) == 6
    for name, attention in maps.items():
        assert torch.allclose(attention.sum(-1), torch.ones(attention.shape[:-1]), atol=1e-5), name
    last = [*maps.values()][-1]
    with cn_hf.use_contexts(model, 0):
        assert difference([*extractor(x).values()][-1], last) > 1e-3


def test_pooling_at_test_time_takes_contexts():
    pooled, applied = timm.layers.apply_test_time_pool(patched("test_resnet"), {"input_size": (3, 288, 288)})
    x = images(288)
    if not applied:  # the model has no pool_size of its own that 288 pixels would exceed
        pooled = timm.layers.TestTimePoolHead(pooled, original_pool=4)
    with cn_hf.use_contexts(pooled.base, 0):
        first = pooled(x)
    assert difference(with_contexts(pooled.base, pooled, x), first) > 1e-3


@pytest.mark.parametrize("inference", ["predict", "average"])
def test_ways_past_forward_do_not_fall_back_on_another_inference(inference):
    class First:
        num_contexts = 3

        def predict(self, pixels: Tensor) -> Tensor:
            return torch.zeros(len(pixels), dtype=torch.int64)

    model, x = patched("test_resnet"), images()
    cn_hf.set_inference(model, inference, source=First())
    model(x)
    with pytest.raises(ContextIdError):
        model.forward_features(x)
    with pytest.raises(ContextIdError):
        model.forward_intermediates(x)


# ----------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("parametrization", ["embedder", "table"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "cn_wrn28_2"])
def test_layer_decay_puts_contexts_into_the_layer_they_sit_in(name, parametrization):
    model = timm.create_model(name)
    cn_hf.patch_model(settle(model), "cn", num_contexts=4, parametrization=parametrization)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for slot in cn_hf.patch_report(model):
        module = model.get_submodule(slot.name)
        scales = {group_of[id(parameter)]["lr_scale"] for parameter in module.normalizer.parameters()}
        assert scales == {group_of[id(module.weight)]["lr_scale"]}, slot.name
    assert {group_of[id(parameter)]["weight_decay"] for parameter in cn_hf.context_parameters(model)} == {0.0}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 3


@pytest.mark.parametrize("where", ["norms", "paper"])
def test_contexts_have_no_weight_decay(where):
    model = patched("test_vit", "cn", where)
    plain = timm.create_model("test_vit")
    groups = {
        "factory": timm.optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups,
        "groups": timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay()),
    }
    for group in groups.values():
        decayed = {id(parameter) for part in group if part["weight_decay"] for parameter in part["params"]}
        assert not decayed & {id(parameter) for parameter in cn_hf.context_parameters(model)}
        assert len(decayed) == sum(
            parameter.ndim > 1 and name not in plain.no_weight_decay() for name, parameter in plain.named_parameters()
        )


@pytest.mark.skipif(
    "fallback_no_weight_decay" not in inspect.signature(timm.optim.create_optimizer_v2).parameters,
    reason="timm has no hybrid optimizers before 1.0.21",
)
def test_muon_leaves_contexts_to_its_fallback():
    model = patched("test_vit")
    optimizer = timm.optim.create_optimizer_v2(model, opt="muon", lr=0.01, fallback_no_weight_decay=True)
    fallback = {id(p) for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]}
    assert {id(parameter) for parameter in cn_hf.context_parameters(model)} <= fallback


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_reaches_contexts_and_spares_the_head(mode):
    model, x = patched("test_resnet", num_classes=5), images()
    (100 * F.cross_entropy(model.train()(x, context_ids=IDS), torch.tensor([0, 1, 2]))).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    parameters = list(timm.models.model_parameters(model, exclude_head=mode == "agc"))
    timm.utils.dispatch_clip_grad(parameters, value=0.01, mode=mode)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter.grad, before[name])}
    assert any("normalizer" in name for name in changed)
    left = {name for name, parameter in model.named_parameters() if not any(parameter is p for p in parameters)}
    assert left == ({"fc.weight", "fc.bias"} if mode == "agc" else set())


def test_a_training_loop_as_in_train_py(tmp_path):
    model = patched("test_convnext", num_classes=3, drop_path_rate=0.1)
    optimizer = optimizer_of(model)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=1)
    average = timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=True)
    scaler = timm.utils.NativeScaler(device="cpu")
    x, target = images(), torch.tensor([0, 1, 2])
    losses = []
    for update in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model.train()(x, context_ids=IDS), target)
        optimizer.zero_grad()
        parameters = timm.models.model_parameters(model)
        scaler(loss, optimizer, clip_grad=1.0, parameters=parameters, need_update=True)
        average.update(model, step=update)
        scheduler.step_update(update)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    state = timm.utils.get_state_dict(average)
    model.load_state_dict(state)
    assert torch.equal(model(x, context_ids=IDS), average(x, context_ids=IDS))
    path = Path(cn_hf.save_pretrained(model, tmp_path))
    again = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert torch.equal(again(x, context_ids=IDS), model(x, context_ids=IDS))
