"""What users of other kinds of models meet: several towers, dicts of inputs, outputs that are no classes, sources."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models_for_tests import tell_apart
from torch import Tensor, nn

import cn_hf
from cn_hf.contexts import BrightnessContexts, ClusterContexts, ColumnContexts, OriginContexts, RuleContexts
from cn_hf.errors import ConfigError, ContextIdError, InputTypeError, PatchError


def vit(**options: Any) -> nn.Module:
    model = timm.create_model("test_vit", **{"num_classes": 5, **options})
    return tell_apart(cn_hf.patch_model(model, context_names=["night", "day"])).eval()


def test_a_mode_for_norms_of_another_kind_is_advised() -> None:
    for where in ("norms", "paper"):
        with pytest.raises(PatchError, match="mode='cn-channels'"):
            cn_hf.patch_model(timm.create_model("test_resnet"), "cn-patches", where=where, num_contexts=2)
    with pytest.raises(PatchError, match="Its norms are those of mode='cn-patches'"):
        cn_hf.patch_model(timm.create_model("test_vit"), mode="cn-channels", where="norms", num_contexts=2)


def test_layers_that_no_ids_reach_say_how() -> None:
    model = cn_hf.set_inference(vit(), "average")
    with pytest.raises(ContextIdError, match=r"use_contexts\(model, ids\) around calls past its forward"):
        model.forward_features(torch.randn(2, 3, 160, 160))


# ------------------------------------------------------------------------------------------ ids past the root's forward


def test_ids_of_another_number_than_images_are_an_error_also_past_the_roots_forward() -> None:
    model, images = vit(), torch.randn(8, 3, 160, 160)
    seen = []
    next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    for count in (4, 2, 16):
        with (
            cn_hf.use_contexts(model, [0, 1] * (count // 2)),
            pytest.raises(ContextIdError, match=f"{count} context_ids for a batch of 8 images"),
        ):
            model.forward_features(images)
    assert not seen, "no layer has run"
    ids = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    with cn_hf.use_contexts(model, ids):
        features = model.forward_features(images)
        with pytest.raises(ContextIdError, match="8 context_ids for a batch of 2"):
            model(images[:2])
        assert model(images[:2], context_ids=[0, 1]).shape == (2, 5), "the keyword's are this call's"
    assert torch.equal(model.forward_head(features), model(images, context_ids=ids))
    with cn_hf.use_contexts(model, "day"):
        assert torch.equal(model.forward_features(images[:3]), model.forward_features(images)[:3])
    assert not any(child._forward_pre_hooks for child in model.children())


def test_one_id_is_that_of_all_towers() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = tell_apart(cn_hf.patch_model(transformers.CLIPModel(config), context_names=["night", "day"])).eval()
    inputs = {"input_ids": torch.randint(0, 28, (3, 6)), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        by_name = model(**inputs, context_ids="day").logits_per_image
        assert by_name.shape == (2, 3)
        assert torch.equal(by_name, model(**inputs, context_ids=1).logits_per_image)
        assert not torch.allclose(by_name, model(**inputs, context_ids=0).logits_per_image)
        with cn_hf.use_contexts(model, "day"):
            assert torch.equal(by_name, model(**inputs).logits_per_image)


def test_inputs_in_a_dict() -> None:
    if not timm.is_model("naflexvit_base_patch16_gap"):
        pytest.skip("this timm has no NaFlexViT")
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model = tell_apart(cn_hf.patch_model(model, num_contexts=2)).eval()
    patches = torch.randn(2, 9, 16 * 16 * 3)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).view(1, 9, 2).expand(2, -1, -1)
    given = {"patches": patches, "patch_coord": places, "patch_valid": torch.ones(2, 9, dtype=torch.bool)}
    out = model(given, context_ids=[0, 1])
    assert torch.allclose(out[1], model(given, context_ids=1)[1], atol=1e-6)
    assert not torch.allclose(out[1], model(given, context_ids=0)[1])
    with pytest.raises(ContextIdError, match="3 context_ids for a batch of 2"):
        model(given, context_ids=[0, 1, 1])


def test_domain_batch_norm_asks_for_ids_before_any_layer() -> None:
    model = cn_hf.patch_model(timm.create_model("test_resnet", num_classes=5), mode="dsbn", num_contexts=2).eval()
    seen = []
    next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ContextIdError, match="needs the context of each sample"):
        model(torch.randn(2, 3, 160, 160))
    assert not seen
    cn_hf.set_inference(model, "average")
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 5)


# ---------------------------------------------------------------------------------------------- the mean over contexts


class Maps(nn.Module):
    """Scores of each pixel, (N, K, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleLogits(logits=self.norm(self.conv(pixel_values)))


class SimpleLogits(SimpleNamespace):
    pass


def test_the_mean_over_contexts_is_over_classes_of_maps_too() -> None:
    model = tell_apart(cn_hf.patch_model(Maps(), mode="cn-channels", num_contexts=2)).eval().double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    each = torch.stack([model(x, context_ids=context).logits.softmax(1) for context in (0, 1)])
    cn_hf.set_inference(model, "average")
    logits = model(x).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, each.mean(0).log(), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputTypeError, match=r"one label an image.*labels of shape \(2, 6, 5\)"):
        model(x, labels=torch.zeros(2, 6, 5, dtype=torch.int64))


@pytest.mark.parametrize("classes", [0, 1])
def test_the_mean_over_contexts_needs_classes(classes: int) -> None:
    model = cn_hf.set_inference(vit(num_classes=classes), "average")
    with pytest.raises(PatchError, match=f"has num_classes {classes}. Pass context_ids"):
        model(torch.randn(2, 3, 160, 160))
    assert model(torch.randn(2, 3, 160, 160), context_ids=[0, 1]) is not None


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_mean_over_contexts_needs_classes_that_exclude_each_other(problem: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        num_labels=3, problem_type=problem,
    )  # fmt: skip
    model = cn_hf.patch_model(transformers.ViTForImageClassification(config), num_contexts=2).eval()
    cn_hf.set_inference(model, "average")
    with pytest.raises(PatchError, match=f"has problem_type '{problem}'"):
        model(torch.randn(2, 3, 16, 16))


# ------------------------------------------------------------------------------------------------------ context sources


def test_a_source_that_numbers_contexts_otherwise_is_refused(tmp_path: Any) -> None:
    model, source = vit(), BrightnessContexts(100)
    assert source.names == ("day", "night")
    with pytest.raises(ConfigError, match=r"numbers its contexts \['day', 'night'\] and the model \['night', 'day'\]"):
        cn_hf.set_inference(model, "predict", source=source)
    assert model.context_config.inference == "cn+"
    with pytest.raises(ConfigError, match=r"Patch the model with context_names=source\.names"):
        cn_hf.save_pretrained(model, tmp_path / "model", context_source=source)
    same = timm.create_model("test_vit", num_classes=5)
    cn_hf.set_inference(cn_hf.patch_model(same, context_names=source.names), "predict", source=source)
    other = timm.create_model("test_vit", num_classes=5)
    cn_hf.set_inference(cn_hf.patch_model(other, context_names=["bright", "dark"]), "predict", source=source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ClusterContexts(2), "ClusterContexts is not fitted"),
        (BrightnessContexts(), "BrightnessContexts is not fitted"),
        (RuleContexts(lambda row: "a", ["a", "b"], on="example"), "RuleContexts cannot tell a context from pixels"),
    ],
    ids=["clusters", "brightness", "rule"],
)
def test_a_source_that_cannot_predict_is_refused_at_once(source: Any, message: str) -> None:
    model = cn_hf.patch_model(timm.create_model("test_vit", num_classes=5), num_contexts=2)
    with pytest.raises(ConfigError, match=message):
        cn_hf.set_inference(model, "predict", source=source)
    assert model.context_config.inference == "cn+"


def test_which_sources_can_predict() -> None:
    assert not ColumnContexts("label").can_predict
    assert RuleContexts(lambda picture: 0, ["a", "b"], on="image").can_predict
    assert ClusterContexts(2).can_predict
    assert BrightnessContexts().can_predict
    assert not OriginContexts.can_predict.fget(object.__new__(OriginContexts))  # type: ignore[attr-defined]


def test_features_by_a_model_are_given_as_that_model() -> None:
    with pytest.raises(ConfigError, match=r"Unknown features 'model'.* or give a model that embeds images"):
        ClusterContexts(2, features="model")
    assert ClusterContexts(2, features=lambda x: F.avg_pool2d(x, 4).flatten(1)).options.features == "model"


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("inference", ["cn", "cn+"])
def test_threads_that_share_a_model_keep_their_contexts(inference: str) -> None:
    model = cn_hf.patch_model(timm.create_model("test_vit", num_classes=5).eval(), inference=inference)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 3, 160, 160)
    expected = [model(x, context_ids=context).detach() for context in range(3)]
    errors: list[float] = []

    def work(context: int) -> None:
        for _ in range(15):
            errors.append(float((model(x, context_ids=context).detach() - expected[context]).abs().max()))

    threads = [threading.Thread(target=work, args=(context,)) for context in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 45
    assert max(errors) <= 1e-5


# ------------------------------------------------------------------------------------------------ several inputs, names


def test_ids_are_of_the_images_whatever_stands_before_them() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8})
    model = cn_hf.patch_model(transformers.CLIPModel(config).eval(), where=[r"vision_model\..*norm\d?"])
    texts, images, ids = torch.randint(2, 20, (2, 6)), torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1])
    out = model(input_ids=texts, pixel_values=images, context_ids=ids)
    assert out.logits_per_image.shape == (5, 2)
    with pytest.raises(ContextIdError, match="2 context_ids for a batch of 5"):
        model(input_ids=texts, pixel_values=images, context_ids=ids[:2])
    whole = cn_hf.patch_model(transformers.CLIPModel(config).eval())
    texts = torch.randint(2, 20, (10, 6))
    with pytest.raises(ContextIdError, match="5 context_ids, one an image, met 10 texts"):
        whole(input_ids=texts, pixel_values=images, context_ids=ids)
    assert whole(input_ids=texts, pixel_values=images, context_ids=1).logits_per_image.shape == (5, 10)
    assert whole(input_ids=texts[:5], pixel_values=images, context_ids=ids).logits_per_image.shape == (5, 5)


class Named(nn.Module):
    """A user's network whose own modules have the name of those that patching adds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"normalizer": nn.LayerNorm(8), "linear": nn.Linear(8, 8)})
        self.normalizer = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.normalizer(self.block["linear"](self.block["normalizer"](x)))
        return out


def test_modules_called_as_those_that_are_added() -> None:
    plain = Named().eval()
    state, x = {name: tensor.clone() for name, tensor in plain.state_dict().items()}, torch.randn(4, 8)
    expected = plain(x)
    model = cn_hf.patch_model(plain, num_contexts=2)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.normal_()
    assert model.load_state_dict(state).missing_keys == []
    torch.testing.assert_close(model(x, context_ids=1), expected)
    own = {id(parameter) for name, parameter in model.named_parameters() if name in state}
    assert {name for name, p in model.named_parameters() if id(p) not in own} <= model.no_weight_decay()
    assert not state.keys() & model.no_weight_decay()


# -------------------------------------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize(("mode", "where"), [("cn-channels", "input"), ("dsbn", "norms")])
def test_trainer_gives_the_parameters_of_contexts_no_weight_decay(tmp_path: Any, mode: str, where: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    decayed = []
    for patched in (False, True):
        model = transformers.ResNetForImageClassification(config)
        names = {name for name, _ in model.named_parameters()}
        if patched:
            cn_hf.patch_model(model, mode=mode, where=where, num_contexts=2)
        optimizer = transformers.Trainer(model, arguments).create_optimizer()
        with_decay = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        added = cn_hf.context_parameters(model) if patched else []
        assert not any(id(parameter) in with_decay for parameter in added)
        decayed.append({name for name, p in model.named_parameters() if id(p) in with_decay})
        assert bool(added) == patched
    assert decayed[0] == decayed[1]
    assert decayed[0] < names


# --------------------------------------------------------------------------------------- methods and parts of the root


def clip(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8})
    model = cn_hf.patch_model(transformers.CLIPModel(config).eval(), context_names=["night", "day"], **options)
    return tell_apart(model)


def pooled(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "name", "keyword", "value"),
    [
        (clip, "get_image_features", "pixel_values", torch.randn(3, 3, 16, 16)),
        (clip, "get_text_features", "input_ids", torch.randint(2, 20, (3, 6))),
        (lambda: tell_apart(vit()), "forward_features", "x", torch.randn(3, 3, 160, 160)),
        (lambda: tell_apart(vit()), "forward_intermediates", "x", torch.randn(3, 3, 160, 160)),
    ],
    ids=["image features", "text features", "forward_features", "forward_intermediates"],
)
def test_methods_of_the_root_take_ids(make: Any, name: str, keyword: str, value: torch.Tensor) -> None:
    model = make()
    method = getattr(model, name)
    assert "context_ids" in inspect.signature(method).parameters
    first = (lambda output: output[0]) if name == "forward_intermediates" else pooled
    out = first(method(**{keyword: value}, context_ids=[0, 1, 0]))
    for sample, context in enumerate((0, 1, 0)):
        alone = first(method(**{keyword: value[sample : sample + 1]}, context_ids=context))
        torch.testing.assert_close(out[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, first(method(**{keyword: value}, context_ids=1)), atol=1e-4)
    with cn_hf.use_contexts(model, [0, 1, 0]):
        assert torch.equal(first(method(**{keyword: value})), out)
        assert torch.equal(first(method(value)), out)
    for wrong in ([0, 2, 0], [0, 1], "nihgt"):
        with pytest.raises(ContextIdError):
            method(**{keyword: value}, context_ids=wrong)


def test_methods_without_tensors_are_as_they_were() -> None:
    model = vit()
    with cn_hf.use_contexts(model, 1):
        model.set_grad_checkpointing(True)
        model.reset_classifier(3)
        assert model.get_classifier() is model.head
    with pytest.raises(TypeError):
        model.reset_classifier(3, context_ids=1)


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generated_texts_take_names(given: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.ViTConfig(**small, image_size=16, patch_size=8)
    decoder = transformers.BertConfig(
        **small, vocab_size=20, max_position_embeddings=16, is_decoder=True, add_cross_attention=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    model.generation_config.update(decoder_start_token_id=2, pad_token_id=0, eos_token_id=1)
    tell_apart(cn_hf.patch_model(model, context_names=["night", "day"]), 1.0)
    x, names = torch.randn(3, 3, 16, 16), ["day", "night", "day"]
    options = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True, **given}
    out = model.generate(x, context_ids=names, **options)
    for other in (torch.tensor([1, 0, 1]), [1, 0, 1]):
        assert torch.equal(model.generate(pixel_values=x, context_ids=other, **options).sequences, out.sequences)
    several = given.get("num_beams", 1)
    for sample, name in enumerate(names):
        alone = model.generate(x[sample : sample + 1], context_ids=name, **options)
        part = out.scores[0][sample * several : (sample + 1) * several]
        torch.testing.assert_close(part, alone.scores[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.generate(x, context_ids="day", **options).scores[0], out.scores[0], atol=1e-3)
    with pytest.raises(ContextIdError, match="2 context_ids for a batch of 3"):
        model.generate(x, context_ids=names[:2], **options)


class Holder(nn.Module):
    """A user's module around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


def test_parts_refuse_ids() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = cn_hf.patch_model(transformers_vit(), num_contexts=2)
    holder = cn_hf.patch_model(Holder(transformers_vit()), num_contexts=2)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    hidden = torch.randn(2, 5, 16)
    for part, given in (
        (model.base_model, x),
        (model.vit, x),
        (clip().vision_model, x),
        (layer, hidden),
        (holder.net, x),
    ):
        expected = part(given)
        for ids in ([0, 1], [9, 9]):
            with pytest.raises(ContextIdError, match=f"received them for its part {type(part).__name__}"):
                part(given, context_ids=ids)
        torch.testing.assert_close(part(given, context_ids=None)[0], expected[0])
    with pytest.raises(TypeError):
        cn_hf.patch_model(Holder(timm.create_model("test_vit"))).net(torch.randn(1, 3, 160, 160), context_ids=0)
    assert pickle.loads(pickle.dumps(model)).vit._forward_pre_hooks
    plain = cn_hf.fold_context(copy.deepcopy(model), 0)
    for each in (plain, cn_hf.unpatch_model(model)):
        assert not any(module._forward_pre_hooks for module in each.modules())


def test_a_model_with_adapters_is_refused_with_the_way_that_works() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["qkv"])
    adapted = peft.get_peft_model(timm.create_model("test_vit"), lora)
    for model in (adapted, adapted.base_model, Holder(adapted)):
        with pytest.raises(InputTypeError, match=r"get_peft_model\(patch_model\(model, \.\.\.\), peft_config\)"):
            cn_hf.patch_model(model)
    model = peft.get_peft_model(tell_apart(cn_hf.patch_model(timm.create_model("test_vit"))).eval(), lora)
    x = torch.randn(2, 3, 160, 160)
    expected = model(x, context_ids=[0, 1])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x, context_ids=[0, 1]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(x, context_ids=0), expected, atol=1e-4)
    cn_hf.unpatch_model(merged)


def test_there_is_a_way_back_from_a_part() -> None:
    x = torch.randn(1, 3, 160, 160)
    net = timm.create_model("test_vit").eval()
    expected = net(x)
    holder = cn_hf.patch_model(Holder(net))
    with pytest.raises(PatchError, match="the model that was patched, a Holder, received a VisionTransformer"):
        cn_hf.unpatch_model(net)
    assert len(cn_hf.patch_report(holder)) == 13
    copied = copy.deepcopy(net)
    assert torch.equal(cn_hf.unpatch_model(copied)(x), expected)
    assert len(cn_hf.patch_report(holder)) == 13
    del holder
    gc.collect()
    with pytest.raises(PatchError, match="already patched; call unpatch_model"):
        cn_hf.patch_model(net)
    assert cn_hf.unpatch_model(net) is net
    assert torch.equal(net(x), expected)
    cn_hf.patch_model(net)(x, context_ids=1)
    with pytest.raises(PatchError, match="not a patched model"):
        cn_hf.unpatch_model(timm.create_model("test_vit"))


def test_scripting_says_why_it_is_refused() -> None:
    for model in (vit(), nn.Sequential(vit()), nn.Sequential(vit().norm)):
        with pytest.raises(PatchError, match=r"torch\.jit\.script cannot compile a patched model"):
            torch.jit.script(model)


def test_a_wrapped_forward_has_the_signature_of_the_bound_one() -> None:
    model = transformers_vit()
    names = [*inspect.signature(model.forward).parameters]
    cn_hf.patch_model(model)

    @functools.wraps(model.forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    partial = functools.update_wrapper(functools.partial(wrapped), model.forward)
    for forward in (model.forward, wrapped, partial):
        assert [name for name in inspect.signature(forward).parameters if name != "context_ids"] == names
        assert "context_ids" in inspect.signature(forward).parameters
    assert next(iter(inspect.signature(type(model).forward).parameters)) == "self"
    model.forward = wrapped
    assert [*inspect.signature(model.forward).parameters][:1] == names[:1]


def test_a_list_of_images_is_told_where_contexts_belong() -> None:
    class Detector(Holder):
        def forward(self, images: list[torch.Tensor]) -> Any:  # type: ignore[override]
            return super().forward(torch.stack([image * 2 for image in images]))

    images = [torch.randn(3, 160, 160) for _ in range(2)]
    model = tell_apart(cn_hf.patch_model(Detector(timm.create_model("test_vit")).eval()))
    with pytest.raises(InputTypeError, match=r"received a list of 2 tensors.*patch_model\(model\.backbone\)"):
        model(images, context_ids=[0, 1])
    with pytest.raises(InputTypeError, match="a list of 2 tensors"), cn_hf.use_contexts(model, [0, 1]):
        model(images)
    cn_hf.unpatch_model(model)
    tell_apart(cn_hf.patch_model(model.net))
    with cn_hf.use_contexts(model.net, [0, 1]):
        out = model(images)
    torch.testing.assert_close(out, model.net(torch.stack(images) * 2, context_ids=[0, 1]))


# ------------------------------------------------------------------------------------------------------ several views


class TwoViews(nn.Module):
    """Two views of a batch, one after another, as SimCLR has them, or side by side."""

    def __init__(self, order: str = "view") -> None:
        super().__init__()
        self.order, self.stem = order, nn.Linear(5, 6)
        self.norm, self.windows, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        views = torch.cat([x1, x2]) if self.order == "view" else torch.stack([x1, x2], dim=1).flatten(0, 1)
        x = self.norm(self.stem(views))
        x = self.windows(x.unflatten(1, (2, 2)).flatten(0, 1)).unflatten(0, (len(views), 2)).flatten(1, 2)
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("order", ["view", "batch"])
@pytest.mark.parametrize("soft", [False, True])
def test_views_of_a_batch(order: str, soft: bool) -> None:
    model = tell_apart(cn_hf.patch_model(TwoViews(order).eval(), num_contexts=3, view_order=order))
    x1, x2, ids = torch.randn(3, 4, 5), torch.randn(3, 4, 5), [2, 0, 1]
    alone = [model(x1[i : i + 1], x2[i : i + 1], context_ids=context) for i, context in enumerate(ids)]
    expected = torch.stack(alone, dim=1 if order == "view" else 0).flatten(0, 1)
    of_views = ids * 2 if order == "view" else [context for context in ids for _ in range(2)]
    given, given_views = (torch.eye(3)[form] if soft else form for form in (ids, of_views))
    out = model(x1, x2, context_ids=given)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x1, x2, context_ids=given_views), expected, atol=1e-5, rtol=1e-5)
    with cn_hf.use_contexts(model, given_views):
        torch.testing.assert_close(model(x1, x2), expected, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x1, x2, context_ids=torch.as_tensor(given)), expected, atol=1e-5, rtol=1e-5)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(copied(x1, x2, context_ids=given), expected, atol=1e-5, rtol=1e-5)


def test_ids_of_views_that_the_layers_do_not_meet() -> None:
    model, x = cn_hf.patch_model(TwoViews().eval(), num_contexts=3), torch.randn(3, 4, 5)
    with pytest.raises(ContextIdError, match=r"12 context_ids for a batch of 3 samples.* met 6, which"):
        model(x, x, context_ids=[0, 1, 2] * 4)
    with pytest.raises(ContextIdError, match="7 context_ids for a batch of 3 samples"):
        model(x, x, context_ids=[0, 1, 2, 0, 1, 2, 0])
    assert torch.equal(model(x, x, context_ids=[0, 1, 2]), model(x, x, context_ids=torch.tensor([0, 1, 2])))


def test_the_order_of_views_is_saved(tmp_path: Any) -> None:
    assert cn_hf.ContextNormConfig.from_dict({}).view_order == "batch"
    with pytest.raises(ConfigError, match="view_order='views' is unknown; did you mean 'view'"):
        cn_hf.patch_model(TwoViews(), view_order="views")
    model = cn_hf.patch_model(timm.create_model("test_vit"), view_order="view")
    cn_hf.save_pretrained(model, tmp_path / "model")
    assert cn_hf.from_pretrained(tmp_path / "model").context_config.view_order == "view"
