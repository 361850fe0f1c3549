"""Slow versions of the maths, written as loops over single numbers straight from the equations, in float64.

Every function takes and returns float64 tensors and is differentiable by autograd. Nothing here is imported by cn_hf,
and nothing here imports cn_hf: the two are written from the paper's equations apart from one another.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor


def rebuild(numbers: list[Tensor], shape: Any) -> Tensor:
    """Numbers in row-major order as a tensor."""
    return torch.stack(numbers).reshape(shape) if numbers else torch.zeros(shape, dtype=torch.float64)


def elements(shape: Any) -> itertools.product[tuple[int, ...]]:
    """All indices of a tensor, row-major."""
    return itertools.product(*(range(size) for size in shape))


# ---------------------------------------------------------------------------------------------------- CN, Eq. 8


def rho(raw: Tensor, variance_activation: str) -> Tensor:
    """The map that makes a variance positive."""
    if variance_activation == "exp":
        return torch.exp(raw)
    return torch.log(1 + torch.exp(raw))


def embedder_tables(
    w_r: Tensor, b_r: Tensor, w_mu: Tensor, b_mu: Tensor, w_sigma: Tensor, b_sigma: Tensor, variance_activation: str
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with the one-hot vector written out: ``w_r`` is (d, T), ``w_mu`` and ``w_sigma`` (C, d)."""
    d, num_contexts = w_r.shape
    mean_rows, var_rows = [], []
    for r in range(num_contexts):
        onehot = [1.0 if s == r else 0.0 for s in range(num_contexts)]
        alpha = [sum(w_r[j, s] * onehot[s] for s in range(num_contexts)) + b_r[j] for j in range(d)]
        for c in range(len(b_mu)):
            mean_rows.append(sum(w_mu[c, j] * alpha[j] for j in range(d)) + b_mu[c])
            raw = sum(w_sigma[c, j] * alpha[j] for j in range(d)) + b_sigma[c]
            var_rows.append(rho(raw, variance_activation))
    shape = (num_contexts, len(b_mu))
    return rebuild(mean_rows, shape), rebuild(var_rows, shape)


def table_tables(mean_table: Tensor, var_table: Tensor, variance_activation: str) -> tuple[Tensor, Tensor]:
    """The parametrization in which mean and rho's argument are parameters."""
    raws = [rho(var_table[index], variance_activation) for index in elements(var_table.shape)]
    return mean_table.clone(), rebuild(raws, var_table.shape)


def of_sample(table: Tensor, ids: Tensor | int, n: int, c: int) -> Tensor:
    """Entry ``c`` of the statistics of sample ``n``: its context's, or its contexts' mixed by their weights."""
    if isinstance(ids, int):
        return table[ids, c]
    if ids.is_floating_point():
        mixed = table.new_zeros(())
        for r in range(len(table)):
            mixed = mixed + ids[n, r] * table[r, c]
        return mixed
    return table[int(ids[n]), c]


def affine(value: Tensor, weight: Tensor | None, bias: Tensor | None, c: int) -> Tensor:
    """gamma x + beta of one number."""
    value = value if weight is None else value * weight[c]
    return value if bias is None else value + bias[c]


def context_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    ids: Tensor | int,
    *,
    eps: float,
    feature_dim: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Eq. 8, one number at a time."""
    out = []
    for index in elements(x.shape):
        n, c = index[0], index[feature_dim]
        mu, sigma2 = of_sample(mean, ids, n, c), of_sample(var, ids, n, c)
        out.append(affine((x[index] - mu) / torch.sqrt(sigma2 + eps), weight, bias, c))
    return rebuild(out, x.shape)


def context_norm_gradients(
    x: Tensor, mean: Tensor, var: Tensor, ids: Tensor, grad: Tensor, *, eps: float, feature_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, mu and sigma squared, derived by hand (``grad`` is that by x-hat); hard ids."""
    grad_x, grad_mean, grad_var = torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(var)
    for index in elements(x.shape):
        r, c = int(ids[index[0]]), index[feature_dim]
        rstd = 1 / torch.sqrt(var[r, c] + eps)
        grad_x[index] = grad[index] * rstd
        grad_mean[r, c] -= grad[index] * rstd
        grad_var[r, c] -= 0.5 * grad[index] * (x[index] - mean[r, c]) * rstd**3
    return grad_x, grad_mean, grad_var


# ------------------------------------------------------------------------------------------- mixtures, Eqs. 5 to 7, 9


def vector_indices(shape: Any, feature_dim: int) -> list[tuple[int, ...]]:
    """Index of each feature vector: every position of every sample, with a 0 on the feature axis."""
    axis = feature_dim % len(shape)
    return list(elements([1 if dim == axis else size for dim, size in enumerate(shape)]))


def vectors_of(x: Tensor, feature_dim: int) -> list[list[Tensor]]:
    """Every feature vector of ``x`` as a list of C numbers."""
    axis = feature_dim % x.dim()
    return [
        [x[(*index[:axis], c, *index[axis + 1 :])] for c in range(x.shape[axis])]
        for index in vector_indices(x.shape, feature_dim)
    ]


def log_normal(vector: list[Tensor], mean: Tensor, var: Tensor) -> Tensor:
    """Log-density of one vector under one diagonal Gaussian."""
    total = torch.zeros((), dtype=torch.float64)
    for c, value in enumerate(vector):
        total = total - 0.5 * (math.log(2 * math.pi) + torch.log(var[c]) + (value - mean[c]) ** 2 / var[c])
    return total


def log_tau(vectors: list[list[Tensor]], mean: Tensor, var: Tensor, prior: Tensor) -> list[list[Tensor]]:
    """Logarithm of tau_k(x_i), by i then k."""
    rows = []
    for vector in vectors:
        joint = [torch.log(prior[k]) + log_normal(vector, mean[k], var[k]) for k in range(len(mean))]
        largest = max(float(value.detach()) for value in joint)
        evidence = largest + torch.log(sum(torch.exp(value - largest) for value in joint))
        rows.append([value - evidence for value in joint])
    return rows


def weighted_statistics(vectors: list[list[Tensor]], logs: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """m_k and v_k of Eqs. 7 and 9: tau-hat is tau over its sum, scaled by its largest so that nothing underflows."""
    num_components, num_features = len(logs[0]), len(vectors[0])
    means, variances = [], []
    for k in range(num_components):
        largest = max(float(row[k].detach()) for row in logs)
        scaled = [torch.exp(row[k] - largest) for row in logs]
        tau_hat = [value / sum(scaled) for value in scaled]
        for c in range(num_features):
            m = sum(weight * vector[c] for weight, vector in zip(tau_hat, vectors, strict=True))
            means.append(m)
            variances.append(
                sum(weight * (vector[c] - m) ** 2 for weight, vector in zip(tau_hat, vectors, strict=True))
            )
    return rebuild(means, (num_components, num_features)), rebuild(variances, (num_components, num_features))


def _back_to_layout(rows: list[list[Tensor]], shape: Any, feature_dim: int) -> Tensor:
    axis = feature_dim % len(shape)
    place = dict(zip(vector_indices(shape, feature_dim), rows, strict=True))
    return rebuild([place[(*index[:axis], 0, *index[axis + 1 :])][index[axis]] for index in elements(shape)], shape)


def context_norm_plus(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    feature_dim: int,
    plus_stats: str,
    plus_scale: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Eq. 9 with both switches."""
    num_contexts, num_features = mean.shape
    vectors = vectors_of(x, feature_dim)
    logs = log_tau(vectors, mean, var + eps, torch.full((num_contexts,), 1 / num_contexts, dtype=torch.float64))
    m, v = weighted_statistics(vectors, logs) if plus_stats == "batch" else (mean, var)
    factor = math.sqrt(num_contexts) if plus_scale == "sqrt_t" else 1.0
    rows = []
    for vector, row in zip(vectors, logs, strict=True):
        out = []
        for c in range(num_features):
            parts = (torch.exp(row[r]) * (vector[c] - m[r, c]) / torch.sqrt(v[r, c] + eps) for r in range(num_contexts))
            out.append(affine(factor * sum(parts), weight, bias, c))
        rows.append(out)
    return _back_to_layout(rows, x.shape, feature_dim)


def mixture_norm(
    x: Tensor,
    theta_mean: Tensor,
    theta_var: Tensor,
    theta_prior: Tensor,
    *,
    eps: float,
    feature_dim: int,
    statistics: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 5 to 7 for given theta: the output, m and v."""
    vectors = vectors_of(x, feature_dim)
    logs = log_tau(vectors, theta_mean, theta_var, theta_prior)
    m, v = weighted_statistics(vectors, logs) if statistics is None else statistics
    rows = []
    for vector, row in zip(vectors, logs, strict=True):
        out = []
        for c in range(theta_mean.shape[1]):
            parts = (
                torch.exp(row[k]) / torch.sqrt(theta_prior[k]) * (vector[c] - m[k, c]) / torch.sqrt(v[k, c] + eps)
                for k in range(len(theta_mean))
            )
            out.append(affine(sum(parts), weight, bias, c))
        rows.append(out)
    return _back_to_layout(rows, x.shape, feature_dim), m, v


def em_step(
    x: Tensor, mean: Tensor, var: Tensor, prior: Tensor, *, reg_covar: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One E-step and one M-step on vectors (M, C): mean, var, prior, and the old mean log-likelihood."""
    num_components, num_features = mean.shape
    vectors = vectors_of(x, -1)
    logs = log_tau(vectors, mean, var, prior)
    likelihood = sum(
        log_normal(vector, mean[0], var[0]) + torch.log(prior[0]) - row[0]
        for vector, row in zip(vectors, logs, strict=True)
    ) / len(vectors)
    counts, means, variances = [], [], []
    for k in range(num_components):
        responsibility = [torch.exp(row[k]) for row in logs]
        count = sum(responsibility)
        counts.append(count)
        for c in range(num_features):
            m = sum(r * vector[c] for r, vector in zip(responsibility, vectors, strict=True)) / count
            means.append(m)
            spread = sum(r * (vector[c] - m) ** 2 for r, vector in zip(responsibility, vectors, strict=True))
            variances.append(spread / count + reg_covar)
    shape = (num_components, num_features)
    return rebuild(means, shape), rebuild(variances, shape), rebuild(counts, (-1,)) / len(vectors), likelihood
