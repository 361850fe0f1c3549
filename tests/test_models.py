"""The paper's networks: sizes counted by hand, forward passes against plain re-statements, timm's conventions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, PatchEmbed
from torch import Tensor, nn

import cn_hf.models
from cn_hf.models.paper_vit import PaperVisionTransformer, WideAttention
from cn_hf.models.wide_resnet import WideResNet, wide_resnet

NAMES = ["cn_cifar_convnet", "cn_digits_convnet", "cn_wrn28_2", "cn_paper_vit"]
# The ViT's head alone has 19 million parameters; a small one has the same parts.
SMALL = {"cn_paper_vit": {"img_size": 24, "depth": 2, "head_sizes": (32, 16)}}


def create(name: str, **kwargs: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL.get(name, {}), **kwargs})


def images_for(name: str, n: int = 2, channels: int = 3) -> Tensor:
    side = 24 if name == "cn_paper_vit" else 32
    return torch.randn(n, channels, side, side)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolution(c_in: int, c_out: int, k: int, bias: bool = False) -> int:
    return c_out * c_in * k * k + c_out * bias


def norm(c: int) -> int:
    return 2 * c


def linear(c_in: int, c_out: int) -> int:
    return c_in * c_out + c_out


# ---------------------------------------------------------------------------------------------------- sizes by hand


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_convnet_has_the_parameters_of_table_iv(classes: int) -> None:
    expected = (
        convolution(3, 64, 5)
        + norm(64)
        + convolution(64, 128, 5)
        + norm(128)
        + convolution(128, 128, 5)
        + norm(128)
        + convolution(128, 256, 3)
        + norm(256)
        + linear(256, classes)
    )
    assert num_parameters(create("cn_cifar_convnet", num_classes=classes)) == expected
    if classes == 10:
        assert expected == 917_834


def test_digits_convnet_parameters() -> None:
    expected = convolution(3, 16, 3) + convolution(16, 32, 3) + convolution(32, 64, 3)
    expected += norm(16) + norm(32) + norm(64) + linear(64, 10)
    assert num_parameters(create("cn_digits_convnet")) == expected == 24_346


def wide_resnet_parameters(depth: int, k: int, classes: int) -> int:
    total, channels = convolution(3, 16, 3), 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += norm(channels) + convolution(channels, width, 3) + norm(width) + convolution(width, width, 3)
            total += convolution(channels, width, 1) if channels != width else 0
            channels = width
    return total + norm(channels) + linear(channels, classes)


@pytest.mark.parametrize(("depth", "k", "classes"), [(28, 2, 10), (28, 10, 100), (16, 1, 10), (10, 3, 7)])
def test_wide_resnet_parameters(depth: int, k: int, classes: int) -> None:
    assert num_parameters(wide_resnet(depth, k, num_classes=classes)) == wide_resnet_parameters(depth, k, classes)


def test_registered_wide_resnets() -> None:
    assert num_parameters(create("cn_wrn28_2")) == wide_resnet_parameters(28, 2, 10) == 1_467_610
    assert num_parameters(create("cn_wrn28_10")) == wide_resnet_parameters(28, 10, 10) == 36_479_194


def test_paper_vit_parameters() -> None:
    tokens, dim, inner, hidden = 12 * 12, 64, 4 * 64, 128
    block = norm(dim) + linear(dim, 3 * inner) + linear(inner, dim) + norm(dim) + linear(dim, hidden)
    block += linear(hidden, dim)
    expected = linear(6 * 6 * 3, dim) + tokens * dim + 8 * block + norm(dim)
    expected += linear(tokens * dim, 2048) + linear(2048, 1024) + linear(1024, 100)
    assert num_parameters(timm.create_model("cn_paper_vit")) == expected == 21_759_012


# ----------------------------------------------------------------------------------------------- forward, re-stated


def test_cifar_convnet_forward_and_printed_sizes() -> None:
    model = create("cn_cifar_convnet").eval()
    x = torch.randn(2, 3, 32, 32)
    sizes, h = [], x
    for i in range(1, 5):
        h = F.relu(getattr(model, f"bn{i}")(getattr(model, f"conv{i}")(h)))
        sizes.append(tuple(h.shape[1:]))
        if i < 4:
            h = F.max_pool2d(h, 3, 2, padding=1)
            sizes.append(tuple(h.shape[1:]))
    assert sizes == [(64, 32, 32), (64, 16, 16), (128, 16, 16), (128, 8, 8), (128, 8, 8), (128, 4, 4), (256, 4, 4)]
    expected = model.head.fc(F.avg_pool2d(h, 4).flatten(1))
    torch.testing.assert_close(model(x), expected)
    assert [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)][2] == "bn3"


def test_wide_resnet_forward_strides_and_final_norm() -> None:
    model = create("cn_wrn28_2").eval()
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    x = torch.randn(2, 3, 32, 32)

    def norm_relu(bn: nn.Module, h: Tensor) -> Tensor:
        return F.relu(F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5))

    h = F.conv2d(x, model.stem.conv.weight, padding=1)
    assert list(model.stem.children()) == [model.stem.conv]
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            stride = 2 if i > 0 and j == 0 else 1
            pre = norm_relu(block.norm1, h)
            shortcut = h if j > 0 else F.conv2d(pre, block.downsample.conv.weight, stride=stride)
            h = norm_relu(block.norm2, F.conv2d(pre, block.conv1.weight, stride=stride, padding=1))
            h = F.conv2d(h, block.conv2.weight, padding=1) + shortcut
        assert h.shape[1:] == [(32, 32, 32), (64, 16, 16), (128, 8, 8)][i]
    h = norm_relu(model.norm, h)
    torch.testing.assert_close(model.forward_features(x), h)
    fc = model.get_classifier()
    expected = h.mean((2, 3)) @ fc.weight.flatten(1).T + fc.bias
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_paper_vit_forward() -> None:
    model = create("cn_paper_vit").eval()
    x = torch.randn(2, 3, 24, 24)
    # Patches (N, L, 108) by unfolding, each a row-major 6x6 square per channel, as the convolution sees it.
    tokens = F.unfold(x, 6, stride=6).transpose(1, 2)
    proj = model.patch_embed.proj
    h = tokens @ proj.weight.flatten(1).T + proj.bias + model.pos_embed
    for block in model.blocks:
        a = F.layer_norm(h, (64,), block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (a @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
        heads = []
        for i in range(4):
            part = slice(64 * i, 64 * (i + 1))
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / 64**0.5).softmax(-1)
            heads.append(weights @ v[..., part])
        h = h + torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        m = F.layer_norm(h, (64,), block.norm2.weight, block.norm2.bias, 1e-6)
        m = F.gelu(block.mlp.fc1(m))
        h = h + F.gelu(block.mlp.fc2(m))
    h = F.layer_norm(h, (64,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(x), h, atol=1e-4, rtol=1e-4)
    f = h.flatten(1)
    for layer in model.head.mlp:
        if isinstance(layer, nn.Linear):
            f = F.gelu(layer(f))
    torch.testing.assert_close(model(x), model.head.fc(f), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.forward_head(h, pre_logits=True), f, atol=1e-4, rtol=1e-4)


def test_paper_vit_parts_as_the_paper_says() -> None:
    model = timm.create_model("cn_paper_vit")
    assert type(model.patch_embed) is PatchEmbed
    assert model.patch_embed.grid_size == (12, 12)
    assert isinstance(model.patch_embed.norm, nn.Identity)
    assert len(model.blocks) == 8
    assert model.cls_token is None
    for block in model.blocks:
        assert isinstance(block.attn, WideAttention)
        assert (block.attn.num_heads, block.attn.head_dim) == (4, 64)
        assert block.mlp.fc1.out_features == 128
        assert [m.p for m in block.modules() if isinstance(m, nn.Dropout)] == [0.1, 0.1, 0.1]
        assert isinstance(block.norm1, nn.LayerNorm)
        assert block.norm1.eps == 1e-6
    assert [m.p for m in model.head.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5, 0.5]


def test_paper_vit_starts_as_keras_does() -> None:
    model = timm.create_model("cn_paper_vit")
    bound = (6 / (108 + 64)) ** 0.5
    weight = model.patch_embed.proj.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    assert 0.045 < model.pos_embed.abs().max() <= 0.05
    bound = (6 / (64 + 256)) ** 0.5
    for part in model.blocks[3].attn.qkv.weight.chunk(3):
        assert 0.98 * bound < part.abs().max() <= bound
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_dropout_is_off_in_eval_and_on_in_training() -> None:
    model, x = create("cn_paper_vit"), torch.randn(4, 3, 24, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ------------------------------------------------------------------------------------------------- timm's conventions


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_a_description_that_holds(name: str) -> None:
    assert timm.is_model(name)
    assert not timm.models.is_model_pretrained(name)
    model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    first_conv = model.get_submodule(cfg["first_conv"])
    assert isinstance(first_conv, nn.Conv2d)
    assert first_conv.in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert cfg["num_classes"] == model.num_classes
    logits = model.eval()(torch.randn(1, *cfg["input_size"]))
    assert logits.shape == (1, cfg["num_classes"])
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    assert len(data["mean"]) == len(data["std"]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_classes_and_channels(name: str) -> None:
    model = create(name, num_classes=7, in_chans=1).eval()
    x = images_for(name, channels=1)
    assert model(x).shape == (2, 7)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create(name)
    model(images_for(name, 4)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_files(name: str) -> None:
    model = create(name).eval()
    x = images_for(name)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = create(name).eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create(name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


OLD_TIMM = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 22)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name: str) -> None:
    if OLD_TIMM and name in ("cn_wrn28_2", "cn_paper_vit"):
        pytest.skip(f"timm {timm.__version__} calls .item() in the constructors of ResNetV2 and VisionTransformer")
    with torch.device("meta"):
        model = create(name)
    assert all(p.is_meta for p in model.parameters())
    assert model(images_for(name).to("meta")).shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str) -> None:
    model = create(name).eval().bfloat16()
    assert model(images_for(name).bfloat16()).dtype == torch.bfloat16
    if OLD_TIMM and name == "cn_wrn28_2":
        pytest.skip(f"timm {timm.__version__} resets ResNetV2's classifier in float32")
    model.reset_classifier(4)
    assert model(images_for(name).bfloat16()).shape == (2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_is_an_error(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        create(name, no_such_option=1)


@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("cn_cifar_convnet", [64, 128, 128, 256], [32, 16, 8, 4]),
        ("cn_digits_convnet", [16, 32, 64], [32, 16, 8]),
        ("cn_wrn28_2", [16, 32, 64, 128], [32, 32, 16, 8]),
        ("cn_paper_vit", [64, 64], [4, 4]),
    ],
)
def test_features_only(name: str, channels: list[int], sides: list[int]) -> None:
    options = {"out_indices": (0, 1)} if name == "cn_paper_vit" else {}
    model = create(name, features_only=True, **options).eval()
    maps = model(images_for(name))
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert model.feature_info.channels() == channels
    side = images_for(name).shape[-1]
    assert model.feature_info.reduction() == [side // s for s in sides]


def test_wide_resnet_intermediates_and_pruning() -> None:
    model = create("cn_wrn28_2").eval()
    x = torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [16, 32, 64, 128]
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.norm(maps[-1]), final)
    [last] = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert torch.equal(last, final)
    stopped, [stem, first] = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(stopped, first)
    assert torch.equal(stem, maps[0])
    with pytest.raises(ValueError, match="4 outputs"):
        model.forward_intermediates(x, [4])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    second = maps[2]
    assert model.prune_intermediate_layers([2]) == [2]
    assert torch.equal(model(x), second)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def test_paper_vit_intermediates_are_timms() -> None:
    model = create("cn_paper_vit").eval()
    x = torch.randn(1, 3, 24, 24)
    final, maps = model.forward_intermediates(x, norm=True)
    assert [tuple(m.shape) for m in maps] == [(1, 64, 4, 4)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final)
    assert torch.equal(final, model.forward_features(x))


@pytest.mark.parametrize("name", ["cn_wrn28_2", "cn_paper_vit"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    options = {} if name == "cn_wrn28_2" else {"attn_drop_rate": 0.0, "proj_drop_rate": 0.0, "drop_rate": 0.0}
    model = create(name, **options)
    x = images_for(name, 4)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_convnet_without_norms_has_biases_instead() -> None:
    model = create("cn_digits_convnet", norm_layer=nn.Identity)
    assert all(isinstance(getattr(model, f"bn{i}"), nn.Identity) for i in (1, 2, 3))
    assert all(getattr(model, f"conv{i}").bias is not None for i in (1, 2, 3))
    assert num_parameters(model) == 24_346 - norm(16 + 32 + 64) + 16 + 32 + 64
    assert all(getattr(create("cn_digits_convnet"), f"conv{i}").bias is None for i in (1, 2, 3))
    assert create("cn_digits_convnet", conv_bias=True).conv1.bias is not None


@pytest.mark.parametrize("norm_layer", ["layernorm2d", "groupnorm1"])
def test_convnet_with_other_norms(norm_layer: str) -> None:
    assert create("cn_digits_convnet", norm_layer=norm_layer)(torch.randn(2, 3, 9, 13)).shape == (2, 10)


def test_activation_of_the_wide_resnet_is_an_option() -> None:
    model = create("cn_wrn28_2", act_layer="leaky_relu")
    assert all(isinstance(m.act, nn.LeakyReLU) for m in model.modules() if isinstance(m, BatchNormAct2d))


@pytest.mark.parametrize("side", [8, 33])
def test_convolutional_networks_take_any_size(side: int) -> None:
    for name in ("cn_cifar_convnet", "cn_digits_convnet", "cn_wrn28_2"):
        assert create(name).eval()(torch.randn(1, 3, side, side)).shape == (1, 10)


def test_paper_vit_of_other_sizes() -> None:
    model = timm.create_model("cn_paper_vit", img_size=(16, 24), patch_size=8, depth=1, num_classes=5).eval()
    assert model.patch_embed.grid_size == (2, 3)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 5)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.randn(2, 3, 24, 24))


def test_wrong_sizes_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size"):
        PaperVisionTransformer(img_size=70, patch_size=6)
    with pytest.raises(ValueError, match="'flatten'"):
        PaperVisionTransformer(img_size=12, global_pool="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes=0"):
        PaperVisionTransformer(img_size=12, global_pool="")
    with pytest.raises(ValueError, match="img_size=\\.\\.\\."):
        create("cn_paper_vit").set_input_size(img_size=48)
    with pytest.raises(ValueError, match="one initialisation"):
        create("cn_paper_vit").init_weights("jax")
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(depth=27)
    with pytest.raises(ValueError, match="widen_factor"):
        WideResNet(widen_factor=0)
    with pytest.raises(ValueError, match="odd"):
        cn_hf.models.ConvNet((8,), (4,))
    with pytest.raises(ValueError, match="one kernel size per layer"):
        cn_hf.models.ConvNet((8, 8), (3,))
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        create("cn_digits_convnet").set_grad_checkpointing()


def test_a_failed_reset_leaves_the_classifier() -> None:
    model = create("cn_paper_vit")
    with pytest.raises(ValueError, match="'flatten'"):
        model.reset_classifier(5, "token")
    assert model.num_classes == 100
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 100)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name: str) -> None:
    model = create(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = images_for(name)
    torch.testing.assert_close(compiled(x), model(x))


def test_digits_convnet_learns_real_digits_in_seconds() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16)[:, None].repeat(1, 3, 1, 1)
    x = F.interpolate(x, size=(16, 16), mode="bilinear")
    y = torch.from_numpy(digits.target)
    model = create("cn_digits_convnet")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        rows = torch.arange(step * 64, step * 64 + 64) % 1500
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    accuracy = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
    assert accuracy > 0.9
