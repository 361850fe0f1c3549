"""Small vision models of transformers, made from configurations: what the sweep checks besides timm.

Each entry builds a model in evaluation mode and a batch for it, as keywords of ``forward`` with the images first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TRANSFORMERS"]

BATCH_SIZE = 3
ENCODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT: dict[str, Any] = {**ENCODER, "image_size": 32, "patch_size": 8, "num_labels": 5}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 5,
}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 5}
HEADS = [1, 2, 2, 4]
HIERA: dict[str, Any] = {
    "image_size": [64, 64],
    "embed_dim": 12,
    "depths": [1, 1, 1, 1],
    "num_heads": HEADS,
    "num_labels": 5,
}
VITDET: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 3,
    "window_block_indices": [0],
    "residual_block_indices": [1],
}

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]


def _model(model_class: str, config_class: str, size: int = 32, **options: Any) -> Build:
    """A builder for ``model_class(config_class(**options))`` and square images.

    The weights are drawn ten times as wide as by default, so that the signal reaches the end of a small model.
    """

    def build() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, config_class)(initializer_range=0.2, **options)
        model = getattr(transformers, model_class)(config)
        return model.eval(), {"pixel_values": _images(size)}

    return build


def _images(size: int) -> Tensor:
    return torch.randn(BATCH_SIZE, 3, size, size, generator=torch.Generator().manual_seed(1))


def _masked_autoencoder() -> tuple[nn.Module, dict[str, Any]]:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes = {name: value for name, value in VIT.items() if name != "num_labels"}
    build = _model("ViTMAEForPreTraining", "ViTMAEConfig", **sizes, **decoder, decoder_intermediate_size=32)
    model, inputs = build()
    patches = (32 // 8) ** 2
    noise = torch.rand(BATCH_SIZE, patches, generator=torch.Generator().manual_seed(2))  # which patches are masked
    return model, {**inputs, "noise": noise}


def _text_encoder() -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODER, vocab_size=50, max_position_embeddings=16, num_labels=5)
    tokens = torch.randint(0, 50, (BATCH_SIZE, 7), generator=torch.Generator().manual_seed(1))
    return transformers.BertForSequenceClassification(config).eval(), {"input_ids": tokens}


TRANSFORMERS: dict[str, Build] = {
    "vit": _model("ViTForImageClassification", "ViTConfig", **VIT),
    "deit": _model("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT),
    "beit": _model("BeitForImageClassification", "BeitConfig", **VIT),
    "swin": _model("SwinForImageClassification", "SwinConfig", **SWIN),
    "swinv2": _model("Swinv2ForImageClassification", "Swinv2Config", **SWIN),
    "convnext": _model("ConvNextForImageClassification", "ConvNextConfig", 64, **STAGES),
    "convnextv2": _model("ConvNextV2ForImageClassification", "ConvNextV2Config", 64, **STAGES),
    "dinov2": _model("Dinov2ForImageClassification", "Dinov2Config", **VIT),
    "dinov2_with_registers": _model("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **VIT),
    "dinov3_vit": _model("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=2),
    "dinov3_convnext": _model("DINOv3ConvNextModel", "DINOv3ConvNextConfig", 64, **STAGES),
    "resnet": _model("ResNetForImageClassification", "ResNetConfig", 64, **STAGES, embedding_size=8),
    "regnet": _model("RegNetForImageClassification", "RegNetConfig", 64, **STAGES, embedding_size=8, groups_width=4),
    "bit": _model(
        "BitForImageClassification",
        "BitConfig",
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_groups=4,
        num_labels=5,
    ),
    "poolformer": _model("PoolFormerForImageClassification", "PoolFormerConfig", 64, **STAGES),
    "mobilenet_v2": _model("MobileNetV2ForImageClassification", "MobileNetV2Config", 64, depth_multiplier=0.25),
    "vit_mae": _masked_autoencoder,
    "vit_msn": _model("ViTMSNForImageClassification", "ViTMSNConfig", **VIT),
    "pvt": _model("PvtForImageClassification", "PvtConfig", 64, **STAGES, image_size=64, num_attention_heads=HEADS),
    "pvt_v2": _model(
        "PvtV2ForImageClassification", "PvtV2Config", 64, **STAGES, image_size=64, num_attention_heads=HEADS
    ),
    "segformer": _model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        64,
        **STAGES,
        num_attention_heads=HEADS,
        decoder_hidden_size=16,
    ),
    "mobilevit": _model(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=2,
        num_labels=5,
    ),
    "mobilevitv2": _model("MobileViTV2ForImageClassification", "MobileViTV2Config", 64, width_multiplier=0.25),
    "levit": _model(
        "LevitForImageClassificationWithTeacher",
        "LevitConfig",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        num_labels=5,
    ),
    "cvt": _model(
        "CvtForImageClassification",
        "CvtConfig",
        64,
        embed_dim=[8, 16, 24],
        depth=[1, 2, 3],
        num_heads=[1, 2, 2],
        num_labels=5,
    ),
    "dpt": _model(
        "DPTForDepthEstimation",
        "DPTConfig",
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
    "hiera": _model("HieraForImageClassification", "HieraConfig", 64, **HIERA),
    "clip_vision": _model("CLIPVisionModel", "CLIPVisionConfig", **VIT),
    "siglip_vision": _model("SiglipVisionModel", "SiglipVisionConfig", **VIT),
    "vitdet": _model("VitDetBackbone", "VitDetConfig", **VITDET),
    "rt_detr_backbone": _model("RTDetrResNetBackbone", "RTDetrResNetConfig", 64, **STAGES, embedding_size=8),
    "timm_wrapper": _model("TimmWrapperForImageClassification", "TimmWrapperConfig", 160, architecture="test_vit"),
    "bert": _text_encoder,
}
"""Name -> builder."""
