"""Mixture normalization in training by the kernels of ``triton_mixture``, as one differentiable function, on CUDA.

Shape legend: as in ``functional``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cn_hf.norm import kernels
from cn_hf.norm.em import Densities

__all__ = ["fused_mixture_norm", "has_mixture_kernels"]


def has_mixture_kernels(x: Tensor, num_components: int, feature_dim: int) -> bool:
    """Whether ``fused_mixture_norm`` knows such an input."""
    if torch.compiler.is_compiling() or not kernels.on_gpu(x):
        return False
    from cn_hf.norm import triton_mixture

    return triton_mixture.handles_mixture_norm(x, num_components, feature_dim)


def fused_mixture_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    prior: Tensor,
    eps: float,
    feature_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``functional.mixture_norm`` computes from a batch's own statistics; cannot be differentiated twice.

    Args:
        x: ``(N, C, ...)`` or ``(N, ..., C)``.
        weight: affine scale ``(C,)``, or None.
        bias: affine offset ``(C,)``, or None.
        mean: of the mixture, ``(K, C)``, without gradient, as the next two.
        var: ``(K, C)``.
        prior: ``(K,)``.
        eps: added to the batch's variances under the root.
        feature_dim: 1 or -1.

    Returns:
        The output, and the mean and variance of each component over the batch, ``(K, C)``.
    """
    out: tuple[Tensor, Tensor, Tensor] = _MixtureNorm.apply(
        x, weight, bias, Densities.of(mean, var, prior), prior, eps, feature_dim
    )
    return out


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
        from cn_hf.norm import triton_mixture

        out, mean, var, kept = triton_mixture.mixture_norm(x, *densities, prior, eps, feature_dim, weight, bias)
        ctx.save_for_backward(x, weight, var, prior, *kept, *densities)
        ctx.feature_dim, ctx.has_bias = feature_dim, bias is not None
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_mean, grad_var):  # type: ignore[no-untyped-def]  # torch's untyped protocol
        from cn_hf.norm import triton_mixture

        x, weight, var, prior, *others = ctx.saved_tensors
        number = len(triton_mixture.MixtureKept._fields)
        kept, (shift, squared, linear, _, reach) = triton_mixture.MixtureKept(*others[:number]), others[number:]
        by_x, by_weight, by_bias = triton_mixture.mixture_norm_backward(
            torch.zeros_like(x) if grad is None else grad, x, var, kept, shift, squared, linear, reach, prior,
            ctx.feature_dim, weight, grad_mean, grad_var,
        )  # fmt: skip
        return by_x, None if weight is None else by_weight, by_bias if ctx.has_bias else None, None, None, None, None
