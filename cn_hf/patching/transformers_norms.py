"""Norm classes of transformers, grouped by their formula: rows of the table in ``convert``, as text.

transformers repeats a norm class in each model's file. The names below are those of vision models and vision towers,
and of the text models whose blocks others reuse; nothing is imported to look one up.
"""

from __future__ import annotations

__all__ = [
    "FROZEN_BATCH_NORMS",
    "GROUP_NORMS",
    "GROUP_NORMS_WITH_ACTIVATION",
    "LAYER_NORMS_OF_FORMAT",
    "LAYER_NORMS_OF_MAPS",
    "ROOT_MEAN_SQUARE_NORMS",
]


def _qualified(names: str) -> tuple[str, ...]:
    """``"vit:ViTNorm"`` to ``"transformers.models.vit.modeling_vit.ViTNorm"``, word by word."""
    pairs = (name.split(":") for name in names.split())
    return tuple(f"transformers.models.{folder}.modeling_{folder}.{norm}" for folder, norm in pairs)


LAYER_NORMS_OF_FORMAT = _qualified(
    "convnext:ConvNextLayerNorm convnextv2:ConvNextV2LayerNorm dinov3_convnext:DINOv3ConvNextLayerNorm "
    "deepseek_ocr2:DeepseekOcr2SamLayerNorm deepseek_vl_hybrid:DeepseekVLHybridLayerNorm edgetam:EdgeTamLayerNorm "
    "edgetam_video:EdgeTamVideoLayerNorm got_ocr2:GotOcr2LayerNorm lw_detr:LwDetrLayerNorm "
    "pp_formulanet:PPFormulaNetLayerNorm rf_detr:RfDetrLayerNorm sam:SamLayerNorm sam2:Sam2LayerNorm "
    "sam2_video:Sam2VideoLayerNorm sam3_tracker:Sam3TrackerLayerNorm sam3_tracker_video:Sam3TrackerVideoLayerNorm "
    "sam_hq:SamHQLayerNorm seggpt:SegGptLayerNorm slanext:SLANeXtLayerNorm unlimited_ocr:UnlimitedOcrSamLayerNorm"
)
"""Layer norms of maps or of tokens, as their ``data_format`` says."""

LAYER_NORMS_OF_MAPS = _qualified(
    "eomt:EomtLayerNorm2d eomt_dinov3:EomtDinov3LayerNorm2d videomt:VideomtLayerNorm2d vitdet:VitDetLayerNorm"
)

ROOT_MEAN_SQUARE_NORMS = _qualified(
    "aimv2:Aimv2RMSNorm deepseek_ocr2:DeepseekOcr2VisionRMSNorm deimv2:Deimv2RMSNorm glm4v:Glm4vRMSNorm "
    "glm_image:GlmImageRMSNorm glm_ocr:GlmOcrRMSNorm idefics2:Idefics2RMSNorm idefics3:Idefics3RMSNorm "
    "internvl:InternVLVisionRMSNorm lighton_ocr:LightOnOcrRMSNorm llama:LlamaRMSNorm mistral:MistralRMSNorm "
    "ovis2:Ovis2RMSNorm pix2struct:Pix2StructLayerNorm pixtral:PixtralRMSNorm qwen2:Qwen2RMSNorm "
    "qwen2_5_vl:Qwen2_5_VLRMSNorm qwen2_vl:Qwen2VLRMSNorm qwen3:Qwen3RMSNorm qwen3_vl:Qwen3VLTextRMSNorm t5:T5LayerNorm"
)
"""RMS norms that name their eps ``variance_epsilon``."""

FROZEN_BATCH_NORMS = _qualified(
    "conditional_detr:ConditionalDetrFrozenBatchNorm2d d_fine:DFineFrozenBatchNorm2d "
    "dab_detr:DabDetrFrozenBatchNorm2d deformable_detr:DeformableDetrFrozenBatchNorm2d "
    "deimv2:Deimv2FrozenBatchNorm2d detr:DetrFrozenBatchNorm2d grounding_dino:GroundingDinoFrozenBatchNorm2d "
    "mm_grounding_dino:MMGroundingDinoFrozenBatchNorm2d pp_doclayout_v2:PPDocLayoutV2FrozenBatchNorm2d "
    "pp_doclayout_v3:PPDocLayoutV3FrozenBatchNorm2d pp_doclayout_v4:PPDocLayoutV4FrozenBatchNorm2d "
    "rt_detr:RTDetrFrozenBatchNorm2d rt_detr_v2:RTDetrV2FrozenBatchNorm2d "
    "table_transformer:TableTransformerFrozenBatchNorm2d"
)
"""Batch norms of buffers alone, with an eps of 1e-5 written into their ``forward``."""

GROUP_NORMS = _qualified("poolformer:PoolFormerGroupNorm")

GROUP_NORMS_WITH_ACTIVATION = _qualified("bit:BitGroupNormActivation")
