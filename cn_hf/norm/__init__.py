"""The maths of context normalization. Knows torch, nothing else."""

from cn_hf.norm.baselines import FeatureBatchNorm, MixtureNorm
from cn_hf.norm.domain import DomainBatchNorm
from cn_hf.norm.layers import ContextNorm

__all__ = ["ContextNorm", "DomainBatchNorm", "FeatureBatchNorm", "MixtureNorm"]
