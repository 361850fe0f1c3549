"""Shallow convolutional networks: the CIFAR ConvNet of the paper's Table IV and a smaller one for the digits demo.

Each layer is convolution, norm, activation, then (except after the last) a 3x3 max pool of stride 2. Two readings of
Table IV: its pools say "pad 0" but print sizes 32, 16, 8, 4, so they are padded by 1; and it does not say whether the
convolutions have biases, so they have none, since the norm that follows subtracts any constant.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import ClassifierHead, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["ConvNet", "cn_cifar_convnet", "cn_digits_convnet"]

Layer = str | Callable[..., nn.Module]


class ConvNet(nn.Module):
    """A stack of convolutions: ``conv1, bn1, act1, pool1, conv2, ...``, then ``head``, timm's ``ClassifierHead``.

    Args:
        widths: Output channels of each convolution.
        kernel_sizes: Odd kernel size of each convolution; stride 1, padded to keep H and W.
        num_classes: Outputs of the classifier; 0 for pooled features.
        in_chans: Channels of the input image.
        global_pool: timm's name of the final pooling over H and W; "" for none.
        drop_rate: Dropout before the classifier.
        norm_layer: Class (or timm name) of ``bn1, bn2, ...``; ``nn.Identity`` for a network without norms.
        act_layer: Class (or timm name) of the activations.
        conv_bias: Whether convolutions have biases; None: only where no norm follows.

    Raises:
        ValueError: ``widths`` and ``kernel_sizes`` differ in length, or a kernel size is even.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        kernel_sizes: tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = nn.ReLU,
        conv_bias: bool | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != len(kernel_sizes) or not widths:
            raise ValueError(f"one width and one kernel size per layer are needed; got {widths=}, {kernel_sizes=}")
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel sizes must be odd to keep the image size; got {kernel_sizes=}")
        norm, act = get_norm_layer(norm_layer), get_act_layer(act_layer)
        bias = norm is nn.Identity if conv_bias is None else conv_bias
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.depth = len(widths)
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = []
        channels = in_chans
        for i, (width, kernel_size) in enumerate(zip(widths, kernel_sizes, strict=True), start=1):
            conv = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=bias)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm(width))
            self.add_module(f"act{i}", act())
            if i < self.depth:
                self.add_module(f"pool{i}", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (i - 1), "module": f"act{i}"})
            channels = width
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """He-normal convolutions (fan out), zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^(conv|bn)1\.", "blocks": r"^(?:conv|bn)(\d+)\."}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raise ValueError where ``enable`` is true: a network this shallow has no blocks to recompute."""
        if enable:
            raise ValueError(f"{type(self).__name__} has no gradient checkpointing: it has no blocks to recompute")

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the final linear layer (0 classes: none), and the pooling where ``global_pool`` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        # Older timm makes the new layer on the CPU in float32.
        self.head.fc.to(next(self.parameters()))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to the last activation map (N, widths[-1], H', W')."""
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv{i}")(x)
            x = getattr(self, f"act{i}")(getattr(self, f"bn{i}")(x))
            if i < self.depth:
                x = getattr(self, f"pool{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Activation map to logits (N, num_classes), or to pooled features where ``pre_logits``."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _cfg(**overrides: Any) -> dict[str, Any]:
    """Return timm's record of a network's input and classifier; CIFAR-10's mean and std unless overridden."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **overrides,
    }


default_cfgs = generate_default_cfgs(
    {
        "cn_cifar_convnet": _cfg(),
        "cn_digits_convnet": _cfg(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    }
)


def _create_convnet(variant: str, pretrained: bool, **kwargs: Any) -> ConvNet:
    depth = len(kwargs["widths"])
    model: ConvNet = build_model_with_cfg(
        ConvNet, variant, pretrained, feature_cfg={"out_indices": tuple(range(depth))}, **kwargs
    )
    return model


def cn_cifar_convnet(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """CIFAR ConvNet (paper Table IV): 5x5x64, 5x5x128, 5x5x128, 3x3x256, each BN and ReLU; average pool; linear."""
    layers = {"widths": (64, 128, 128, 256), "kernel_sizes": (5, 5, 5, 3)}
    return _create_convnet("cn_cifar_convnet", pretrained, **{**layers, **kwargs})


def cn_digits_convnet(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Three 3x3 convolutions of 16, 32 and 64 channels for small RGB digits; trains in seconds on a CPU."""
    layers = {"widths": (16, 32, 64), "kernel_sizes": (3, 3, 3)}
    return _create_convnet("cn_digits_convnet", pretrained, **{**layers, **kwargs})


register_model(cn_cifar_convnet)
register_model(cn_digits_convnet)
