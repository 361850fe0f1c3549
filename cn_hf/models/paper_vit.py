"""The paper's vision transformer (IV-C, IV-D), as its authors built it: the Keras tutorial's ViT with eight blocks.

What sets it apart from a standard ViT: 72-pixel images in 6-pixel patches; no class token; attention wider than the
tokens (4 heads of width 64 on tokens of width 64); a GELU after *both* layers of each block's MLP; all tokens flattened
into a 2048-1024 MLP head. It is a timm ``VisionTransformer`` with those parts exchanged, so module names are timm's.

Shapes: N batch, L tokens (144), D token width (64), A inner width of attention (256).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["PaperVisionTransformer", "cn_paper_vit"]


class WideAttention(nn.Module):
    """Multi-head self-attention whose heads have a width of their own: D -> heads * head_dim -> D.

    Submodules are named as in timm's ``Attention``, which has this option only in later versions. Dropout is on the
    attention weights alone.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attn_dim = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.attn_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.attn_dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (N, L, D) to tokens (N, L, D)."""
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(n, length, self.attn_dim))
        return out


class TwiceActivatedMlp(Mlp):  # type: ignore[misc]  # timm is untyped
    """timm's ``Mlp`` with the activation also after the second layer, as the authors' ``mlp`` function has it."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, L, D) to tokens (N, L, D)."""
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        out: Tensor = self.drop2(self.act(self.fc2(x)))
        return out


class FlattenMlpHead(nn.Module):
    """All tokens flattened -> dropout -> (linear, GELU, dropout) for each of ``hidden_sizes`` -> ``fc``.

    Args:
        in_features: L * D.
        hidden_sizes: Widths of the hidden layers.
        num_classes: Outputs of ``fc``; 0 for the last hidden layer's.
        pool_type: "flatten", or "" to hand tokens through untouched (then ``num_classes`` must be 0).
        drop_rate: Dropout before the first and after every hidden layer.
    """

    def __init__(
        self, in_features: int, hidden_sizes: tuple[int, ...], num_classes: int, pool_type: str, drop_rate: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten(1), nn.Dropout(drop_rate)]
        width = in_features
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), nn.GELU(), nn.Dropout(drop_rate)]
            width = size
        self.num_features = width
        self.mlp = nn.Sequential(*layers)
        self.fc: nn.Module = nn.Identity()
        self.pool_type = pool_type
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """New ``fc`` of ``num_classes`` outputs, on the device and in the dtype of the hidden layers."""
        pool_type = self.pool_type if pool_type is None else pool_type
        if pool_type not in ("flatten", ""):
            raise ValueError(f"global_pool of the paper's ViT is 'flatten', or '' for tokens; got {pool_type!r}")
        if pool_type == "" and num_classes:
            raise ValueError(f"global_pool='' returns tokens and needs num_classes=0; got num_classes={num_classes}")
        self.pool_type = pool_type
        like = next(self.mlp.parameters(), None)
        factory: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.fc = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        _init_dense(self.fc)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (N, L, D) to logits (N, num_classes), to the last hidden layer where ``pre_logits``."""
        if self.pool_type == "":
            return x
        x = self.mlp(x)
        return x if pre_logits else self.fc(x)


class PaperVisionTransformer(VisionTransformer):  # type: ignore[misc]  # timm is untyped
    """The authors' ViT.

    Args:
        img_size: Image side (or height and width); fixed, since the head has one weight per token.
        patch_size: Patch side; must divide ``img_size``.
        in_chans: Channels of the input image.
        num_classes: Outputs of the classifier; 0 for the head's last hidden layer.
        global_pool: "flatten"; "" (with ``num_classes=0``) for the tokens.
        embed_dim: Token width D.
        depth: Number of blocks.
        num_heads: Attention heads.
        attn_head_dim: Width of one head.
        mlp_ratio: Hidden width of a block's MLP over D.
        head_sizes: Hidden widths of the head.
        drop_rate: Dropout in the head.
        proj_drop_rate: Dropout after both layers of a block's MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth.

    Raises:
        ValueError: ``img_size`` is no multiple of ``patch_size``, or ``global_pool`` is unknown.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 72,
        patch_size: int | tuple[int, int] = 6,
        in_chans: int = 3,
        num_classes: int = 100,
        global_pool: Literal["flatten", ""] = "flatten",
        embed_dim: int = 64,
        depth: int = 8,
        num_heads: int = 4,
        attn_head_dim: int = 64,
        mlp_ratio: float = 2.0,
        head_sizes: tuple[int, ...] = (2048, 1024),
        drop_rate: float = 0.5,
        proj_drop_rate: float = 0.1,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
    ) -> None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if any(side % p for side, p in zip(sides, patch, strict=True)):
            raise ValueError(f"img_size must be a multiple of patch_size; got {img_size=}, {patch_size=}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=False,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            mlp_layer=TwiceActivatedMlp,
            weight_init="skip",
        )
        for block in self.blocks:
            block.attn = WideAttention(embed_dim, num_heads, attn_head_dim, attn_drop_rate)
        self.num_classes = num_classes
        num_tokens = self.patch_embed.num_patches
        self.head = FlattenMlpHead(num_tokens * embed_dim, tuple(head_sizes), num_classes, global_pool, drop_rate)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Keras' defaults, as the authors had: Glorot-uniform dense layers, zero biases, positions uniform in ±0.05.

        Args:
            mode: Only "", the one scheme there is.
            needs_reset: Also return the LayerNorms to weight 1 and bias 0.
        """
        if mode:
            raise ValueError(f"the paper's ViT has one initialisation, mode ''; got {mode!r}")
        nn.init.uniform_(self.pos_embed, -0.05, 0.05)
        for module in self.modules():
            if needs_reset and isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            _init_dense(module)
        for block in self.blocks:
            for weight in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(weight)

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the final linear layer; 0 classes: none, and with ``global_pool=""`` the tokens come out."""
        self.head.reset(num_classes, global_pool)
        self.num_classes = num_classes

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Raise ValueError: the head has weights for each token, so the sizes are fixed when the model is made."""
        raise ValueError(
            "the paper's ViT flattens its tokens, so its input size is fixed; "
            "make another one: timm.create_model('cn_paper_vit', img_size=..., patch_size=...)"
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (N, L, D) to logits (N, num_classes), or to the head's last hidden layer where ``pre_logits``."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out


def _init_dense(module: nn.Module) -> None:
    """Glorot-uniform weight and zero bias of a linear layer or of the patch projection (a dense map of each patch)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        with torch.no_grad():
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        "cn_paper_vit": {
            "num_classes": 100,
            "input_size": (3, 72, 72),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5071, 0.4865, 0.4409),
            "std": (0.2673, 0.2564, 0.2762),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
            "license": "apache-2.0",
        }
    }
)


def cn_paper_vit(pretrained: bool = False, **kwargs: Any) -> PaperVisionTransformer:
    """The authors' ViT for CIFAR-100 at 72 pixels (paper IV-C)."""
    model: PaperVisionTransformer = build_model_with_cfg(
        PaperVisionTransformer,
        "cn_paper_vit",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
    return model


register_model(cn_paper_vit)
