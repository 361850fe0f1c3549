"""What the tests of mixtures share: CN+ and MN term for term, and what two functions that compute MN must find."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from kernel_cases import HALF_ULP, INTERPRETED, Case, draw
from torch import Tensor

from cn_hf.norm.em import Densities

EPS = 1e-3
LAYOUTS = [
    "map",
    "map-7x7",
    "map-one-channel",
    "map-one-pixel",
    "sequence",
    "vectors",
    "channels_last",
    "channels_last-3",
    "channels_last-197",
    "map-transposed",
    "map-strided",
    "tokens",
    "tokens-channels-first",
    "tokens-strided",
    "tokens-one-feature",
]


def statistics(case: Case, components: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    features = case.shape[case.feature_dim]
    mean, var = torch.randn(2, components, features, device=device, dtype=torch.float64)
    return (mean * 2 / math.sqrt(features) + 0.5).to(dtype), (var.square() + 1).to(dtype)


def affine(case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, case.shape[case.feature_dim], device=device, dtype=dtype)
    return weight, bias


def vectors_of(x: Tensor, case: Case) -> Tensor:
    return x.movedim(case.feature_dim, -1).reshape(-1, x.shape[case.feature_dim])


def log_posteriors(vectors: Tensor, mean: Tensor, var: Tensor, prior: Tensor) -> Tensor:
    """Term for term: no shift, no expanded square."""
    logs = ((vectors[:, None] - mean).square() / var + var.log()).sum(dim=-1)
    return (prior.log() - logs / 2).log_softmax(dim=1)


def combined(vectors: Tensor, coefficients: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (coefficients[..., None] * (vectors[:, None] - mean) / (var + eps).sqrt()).sum(dim=1)


def laid_out(vectors: Tensor, like: Tensor, case: Case) -> Tensor:
    return vectors.reshape(like.movedim(case.feature_dim, -1).shape).movedim(-1, case.feature_dim)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Of the largest result, and a rounding to the dtype, which the interpreter cuts off where a GPU rounds."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), "values that no program wrote"
    ulps = HALF_ULP[actual.dtype] * (2 if INTERPRETED and actual.dtype == torch.bfloat16 else 1)
    error = (actual.double() - expected).abs()
    allowed = tolerance * expected.abs().amax() + ulps * expected.abs()
    assert (error <= allowed).all(), f"off by {float((error / allowed).max()):.3g} times the tolerance"


def mixture_of(case: Case, components: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    prior = torch.rand(components, device=device, dtype=dtype) + 0.2
    return *statistics(case, components, device, dtype), prior / prior.sum()


def mixture_reference(
    x: Tensor, theta: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    vectors, (mean, var, prior) = vectors_of(x, case), theta
    log_tau = log_posteriors(vectors, mean, var, prior)
    share = log_tau.softmax(dim=0)[..., None]
    mean = (share * vectors[:, None]).sum(dim=0)
    var = (share * (vectors[:, None] - mean).square()).sum(dim=0)
    out = combined(vectors, log_tau.exp() / prior.sqrt(), mean, var, EPS)
    return laid_out(out * weight + bias, x, case), mean, var


def mixture(
    module: ModuleType,
    x: Tensor,
    theta: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor | None, Tensor | None],
    case: Case,
    grads: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """Output, mean, variance, and gradients by the input, weight and bias, as a module's two functions find them."""
    densities, grad = Densities.of(*theta), grads[0]
    y, mean, var, kept = module.mixture_norm(x, densities, theta[2], EPS, case.feature_dim, *rows)
    backward = module.mixture_norm_backward(
        grad, x, var, kept, densities, theta[2], case.feature_dim, rows[0], *grads[1:]
    )
    return y, mean, var, *backward


def check_mixture(
    module: ModuleType,
    case: Case,
    components: int,
    dtype: torch.dtype,
    device: str,
    tolerance: float,
    mean: float = 0.5,
) -> None:
    x, grad = draw(case, dtype, device, mean)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    moved, var, prior = mixture_of(case, components, device, wide)
    theta, rows = (moved + (mean - 0.5), var, prior), affine(case, device, wide)
    others = torch.randn(2, *var.shape, device=device, dtype=wide)
    actual = mixture(module, x, theta, rows, case, (grad, *others))
    assert actual[0].dtype == actual[3].dtype == dtype
    inputs = [tensor.double().requires_grad_() for tensor in (x, *rows)]
    known = tuple(tensor.double() for tensor in theta)
    outputs = mixture_reference(inputs[0], known, *inputs[1:], case)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(outputs, inputs, (grad.double(), *(other.double() for other in others)))
    for mine, expected in zip(actual, (*outputs, *gradients), strict=True):
        close(mine, expected.detach(), tolerance)
