"""The paper's own networks, plain (no context normalization inside), registered with timm on import of this package.

| name | paper | input | parameters |
|---|---|---|---|
| ``cn_cifar_convnet`` | IV-B, Table IV | 3 x 32 x 32 | 917,834 at 10 classes |
| ``cn_wrn28_2``, ``cn_wrn28_10`` | IV-F | 3 x 32 x 32 | 1,467,610 and 36,479,194 at 10 classes |
| ``cn_paper_vit`` | IV-C, IV-D | 3 x 72 x 72 | 21,759,012 at 100 classes |
| ``cn_digits_convnet`` | none; for ``cn-hf demo`` | 3 x 32 x 32 | 24,346 at 10 classes |

After ``import cn_hf.models``, ``timm.create_model(name)`` makes them.
"""

from __future__ import annotations

from cn_hf.models.convnet import ConvNet, cn_cifar_convnet, cn_digits_convnet
from cn_hf.models.paper_vit import PaperVisionTransformer, cn_paper_vit
from cn_hf.models.wide_resnet import WideResNet, cn_wrn28_2, cn_wrn28_10, wide_resnet

__all__ = [
    "ConvNet",
    "PaperVisionTransformer",
    "WideResNet",
    "cn_cifar_convnet",
    "cn_digits_convnet",
    "cn_paper_vit",
    "cn_wrn28_2",
    "cn_wrn28_10",
    "wide_resnet",
]
