"""The rivals of context normalization, beyond torch's own layers.

N samples, C features, T contexts, M feature vectors.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoopOverContexts", "MatrixProducts", "fit_gaussian_mixture"]


class LoopOverContexts(nn.Module):
    """The authors' design: a batch norm for each context, in a loop over them, on the samples of that context.

    In training each sample is normalised by the batch statistics of its context's samples.

    Args:
        num_features: C.
        num_contexts: T.
        feature_dim: 1 for maps (N, C, H, W), -1 for tokens (N, ..., C).
    """

    def __init__(self, num_features: int, num_contexts: int, *, feature_dim: int) -> None:
        super().__init__()
        self.on_maps = feature_dim == 1
        norm = nn.BatchNorm2d if self.on_maps else nn.BatchNorm1d
        self.norms = nn.ModuleList(norm(num_features) for _ in range(num_contexts))

    def forward(self, x: Tensor, context_ids: Tensor) -> Tensor:
        """Normalise ``x`` by contexts (N,)."""
        out = torch.empty_like(x)
        for context, norm in enumerate(self.norms):
            rows = (context_ids == context).nonzero().squeeze(1)
            if len(rows):
                own = x.index_select(0, rows)
                vectors = own if self.on_maps else own.flatten(0, -2)
                out = out.index_copy_(0, rows, norm(vectors).view_as(own))
        return out


class MatrixProducts:
    """The least that CN+ needs: four matrix products and a softmax over the contexts.

    Two products give the log-densities, two apply what the contexts make of a vector. Where the statistics are
    estimated anew on the batch, two more sum up vectors and squares.

    Args:
        vectors: (M, C).
        num_contexts: T.
        with_statistics: Do the further two, too.
    """

    def __init__(self, vectors: Tensor, num_contexts: int, *, with_statistics: bool) -> None:
        self.vectors, self.squares = vectors, vectors.square()
        self.with_statistics = with_statistics
        shape = (num_contexts, vectors.shape[1])
        self.tables = [torch.randn(shape, device=vectors.device, dtype=vectors.dtype) / shape[1] for _ in range(4)]

    def __call__(self) -> tuple[Tensor, ...]:
        """Run them once."""
        precision, shift, scale, offset = self.tables
        tau = torch.addmm(self.squares @ precision.T, self.vectors, shift.T).softmax(dim=1)
        products = (tau @ scale, tau @ offset)
        return (*products, tau.T @ self.vectors, tau.T @ self.squares) if self.with_statistics else products


def fit_gaussian_mixture(vectors: Any, num_components: int, *, reg_covar: float = 1e-6, seed: int = 0) -> Any:
    """Fit scikit-learn's mixture of diagonal Gaussians, its defaults otherwise, to (M, C) on the host."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(num_components, covariance_type="diag", reg_covar=reg_covar, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(vectors)
