"""Wide residual networks WRN-d-k for small images (Zagoruyko & Komodakis 2016), the network of the paper's IV-F.

timm's pre-activation ``ResNetV2`` with three stages of basic blocks is a WRN once its stem is a 3x3 convolution without
pooling: stage strides (1, 2, 2), a 1x1 shortcut where the width changes, a final norm and activation, average pooling.

Shapes: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

__all__ = ["WideResNet", "cn_wrn28_2", "cn_wrn28_10", "wide_resnet"]

STEM_WIDTH = 16


class WideResNet(ResNetV2):  # type: ignore[misc]  # timm is untyped
    """WRN-d-k: a 3x3 stem of 16 channels, then three stages of (d - 4) / 6 basic blocks, of widths 16k, 32k, 64k.

    Module names are ``ResNetV2``'s: ``stem.conv``, ``stages.i.blocks.j.{norm1,conv1,norm2,conv2,downsample.conv}``,
    ``norm``, ``head``; norms are ``BatchNormAct2d`` with the activation fused.

    Args:
        depth: d, the number of layers; 6n + 4.
        widen_factor: k.
        num_classes: Outputs of the classifier; 0 for pooled features.
        in_chans: Channels of the input image.
        global_pool: timm's name of the final pooling; "" for none.
        act_layer: Class (or timm name) of the activations.
        norm_layer: Class of the norms, with activation (timm's ``*NormAct*``).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.

    Raises:
        ValueError: ``depth`` is not 6n + 4, or ``widen_factor`` is less than 1.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 2,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        act_layer: str | Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth of a wide ResNet must be 6n + 4 (10, 16, 22, 28, 40, ...); got {depth}")
        if widen_factor < 1:
            raise ValueError(f"widen_factor must be at least 1; got {widen_factor}")
        widths = tuple(STEM_WIDTH * widen_factor * 2**stage for stage in range(3))
        super().__init__(
            layers=[(depth - 4) // 6] * 3,
            channels=widths,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            stem_chs=STEM_WIDTH,
            basic=True,
            bottle_ratio=1.0,
            act_layer=act_layer,
            conv_layer=create_conv2d,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        conv = create_conv2d(in_chans, STEM_WIDTH, kernel_size=3)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(OrderedDict(conv=conv))
        self.feature_info = [{"num_chs": STEM_WIDTH, "reduction": 1, "module": "stem.conv"}] + [
            {"num_chs": width, "reduction": 2**stage, "module": f"stages.{stage}"} for stage, width in enumerate(widths)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs on the way: index 0 is the stem, 1 to 3 the stages. Written anew since ResNetV2 counts five.

        Args:
            x: Images (N, C, H, W).
            indices: Which outputs to collect: the last n where an int, all where None.
            norm: Apply the final norm and activation to the last stage's output.
            stop_early: Do not run stages behind the last one asked for.
            output_fmt: Only "NCHW".
            intermediates_only: Return the list alone.

        Returns:
            (final features, intermediates), or the intermediates alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}")
        take, last = _take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        intermediates = [x] if 0 in take else []
        for i, stage in enumerate(self.stages, start=1):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                intermediates.append(self.norm(x) if norm and i == len(self.stages) else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and last < len(self.stages) else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of ``indices``, the final norm with them, and the head where asked.

        Returns:
            The indices kept.
        """
        take, last = _take_indices(len(self.stages) + 1, indices)
        shortened = last < len(self.stages)
        self.stages: nn.Sequential = self.stages[:last]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head.in_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take


def _take_indices(num_outputs: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """None takes all outputs, an int the last so many, a list those (negative from the end); returned with the last."""
    if isinstance(indices, int):
        indices = list(range(num_outputs))[-indices:] if 0 < indices <= num_outputs else []
    take = [i + num_outputs if i < 0 else i for i in (range(num_outputs) if indices is None else indices)]
    if not take or min(take) < 0 or max(take) >= num_outputs:
        raise ValueError(f"indices must name some of the {num_outputs} outputs; got {indices!r}")
    return take, max(take)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({"cn_wrn28_2": _cfg(), "cn_wrn28_10": _cfg()})


def wide_resnet(depth: int = 28, widen_factor: int = 2, **kwargs: Any) -> WideResNet:
    """A WRN-``depth``-``widen_factor`` of any size; ``kwargs`` are those of :class:`WideResNet`.

    Its ``pretrained_cfg`` is ``cn_wrn28_2``'s but for the class count and the input channels.
    """
    return _create_wide_resnet("cn_wrn28_2", False, depth=depth, widen_factor=widen_factor, **kwargs)


def _create_wide_resnet(variant: str, pretrained: bool, **kwargs: Any) -> WideResNet:
    model: WideResNet = build_model_with_cfg(
        WideResNet,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **kwargs,
    )
    return model


def cn_wrn28_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-2, the paper's AdaMatch network (IV-F)."""
    return _create_wide_resnet("cn_wrn28_2", pretrained, **{"widen_factor": 2, **kwargs})


def cn_wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10."""
    return _create_wide_resnet("cn_wrn28_10", pretrained, **{"widen_factor": 10, **kwargs})


register_model(cn_wrn28_2)
register_model(cn_wrn28_10)
