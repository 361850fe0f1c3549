"""Mixture normalization in training as one differentiable function: by ``triton_mixture`` on CUDA, else by ``pieces``.

Shape legend: as in ``functional``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cn_hf.norm import kernels, pieces
from cn_hf.norm.combination import combine
from cn_hf.norm.em import Densities, full_precision

__all__ = ["fused_mixture_norm"]


def fused_mixture_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    densities: Densities,
    prior: Tensor,
    eps: float,
    feature_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``functional.mixture_norm`` computes from a batch's own statistics.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``, not empty.
        weight: affine scale ``(C,)``, or None.
        bias: affine offset ``(C,)``, or None.
        densities: of the mixture, with its priors, without gradient.
        prior: ``(K,)``, likewise.
        eps: added to the batch's variances under the root.
        feature_dim: 1 or -1.

    Returns:
        The output, and the mean and variance of each component over the batch, ``(K, C)``.
    """
    out: tuple[Tensor, Tensor, Tensor] = _MixtureNorm.apply(x, weight, bias, densities, prior, eps, feature_dim)
    return out


def _module_for(x: Tensor, weight: Tensor | None, prior: Tensor, feature_dim: int) -> Any:
    if kernels.on_gpu(x, weight, prior):
        from cn_hf.norm import triton_mixture

        if triton_mixture.handles_mixture_norm(x, len(prior), feature_dim):
            return triton_mixture
    return pieces


class _MixtureNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # torch's untyped protocol
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        densities: Densities,
        prior: Tensor,
        eps: float,
        feature_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.module = _module_for(x, weight, prior, feature_dim)
        out, *statistics, kept = ctx.module.mixture_norm(x, densities, prior, eps, feature_dim, weight, bias)
        ctx.save_for_backward(x, weight, bias, prior, statistics[1], *densities, *kept)
        ctx.eps, ctx.feature_dim = eps, feature_dim
        return out, *statistics

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]  # torch's untyped protocol
        with full_precision(grads[0].device):
            return *_gradients(ctx, grads), None, None, None, None


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """By ``x``, weight and bias."""
    x, weight, bias, prior, var, *others = ctx.saved_tensors
    number = len(Densities._fields)
    densities, kept = Densities(*others[:number]), pieces.MixtureKept(*others[number:])
    if torch.is_grad_enabled():  # the gradient itself is to be differentiated
        out, (center, var) = combine(
            x, densities, prior.rsqrt(), None, eps=ctx.eps, feature_dim=ctx.feature_dim, weight=weight, bias=bias
        )
        outputs = out, center + densities.shift, var
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        needed = [tensor for tensor, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
        of, along = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(of, needed, along, create_graph=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad[:3])
    by_x, by_weight, by_bias = ctx.module.mixture_norm_backward(
        grads[0], x, var, kept, densities, prior, ctx.feature_dim, weight, *grads[1:]
    )
    return by_x, None if weight is None else by_weight, None if bias is None else by_bias
