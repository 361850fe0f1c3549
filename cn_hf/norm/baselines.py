"""The baselines: mixture normalization (Eqs. 5-7) and batch normalization (Eqs. 1-3) along any feature axis.

Shape legend: ``N`` samples, ``C`` features, ``K`` components.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.errors import InputShapeError
from cn_hf.norm.choices import check_flag, check_integer, check_number, check_place
from cn_hf.norm.em import (
    Mixture,
    data_shift,
    fit_mixture,
    full_precision,
    place_among_processes,
    seed_mixture,
    statistics_dtype,
)
from cn_hf.norm.functional import mixture_norm
from cn_hf.norm.layers import FeatureNorm, check_feature_dim, check_features
from cn_hf.norm.synchronized import recomputing, several_processes, synchronized_forward

__all__ = ["FeatureBatchNorm", "MixtureNorm"]


class MixtureNorm(FeatureNorm):
    """Mixture normalization (Eqs. 5-7; Kalayeh and Shah 2019), the paper's baseline MN.

    In training the mixture is refitted on the batch's activations by EM, warm-started from the running mixture (the
    first step seeds it by k-means++), and is a constant in backward. Running mixture and statistics serve evaluation.
    Where a process group is initialised, EM and statistics are those of all processes' batches together.

    Args:
        num_features: ``C``.
        num_components: ``K``.
        feature_dim: axis of the features: 1 for maps, -1 for tokens.
        momentum: weight of the newest batch in the running mixture and statistics.
        em_iterations: EM iterations a training step.
        seed_iterations: EM iterations after seeding, on the first training step.
        max_vectors: EM sees at most about this many of the batch's vectors, evenly spaced.
        reg_covar: added to every variance in EM.
        seed: of k-means++.
        eps: added to the variances under the root.
        affine: learn a scale and an offset after the normalization.
        device: of the parameters and buffers.
        dtype: of the parameters; buffers are float32 at least.
    """

    theta_mean: Tensor
    theta_var: Tensor
    theta_prior: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_components: int = 3,
        *,
        feature_dim: int = 1,
        momentum: float = 0.1,
        em_iterations: int = 2,
        seed_iterations: int = 20,
        max_vectors: int = 8192,
        reg_covar: float = 1e-6,
        seed: int = 0,
        eps: float = 1e-5,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, feature_dim, eps, affine, device, dtype)
        check_integer("num_components", num_components, 1)
        check_integer("em_iterations", em_iterations, 1)
        check_integer("seed_iterations", seed_iterations, 0)
        check_integer("max_vectors", max_vectors, 1)
        check_number("momentum", momentum, 1, inclusive=True)
        check_integer("seed", seed, 0)
        if reg_covar != 0:
            check_number("reg_covar", reg_covar, math.inf, inclusive=False)
        self.num_components = num_components
        self.momentum = momentum
        self.em_iterations = em_iterations
        self.seed_iterations = seed_iterations
        self.max_vectors = max_vectors
        self.reg_covar = reg_covar
        self.seed = seed
        self._fitted: deque[tuple[Tensor, Mixture]] = deque(maxlen=16)  # what the last forwards used, for recomputing
        self._places: tuple[Any, Tensor] | None = None  # of a batch's kept vectors: no step but the first copies them
        self._seeded = False  # num_batches_tracked > 0, once that is known here: then no step waits for the device
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (num_components, num_features)
        self.register_buffer("theta_mean", torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("theta_var", torch.ones(shape, device=device, dtype=wide))
        self.register_buffer("theta_prior", torch.full(shape[:1], 1 / num_components, device=device, dtype=wide))
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalise ``x``, ``(N, C, ...)`` or ``(N, ..., C)``; in training the running mixture moves.

        ``weight`` and ``bias``, ``(C,)``, are an affine map in the place of the layer's.

        Raises:
            InputShapeError: ``x`` does not have ``num_features`` features, or a training batch has no vectors.
        """
        check_features(self, x)
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        theta = self._running_theta()
        if not self.training:
            running = self.running_mean, self.running_var
            return mixture_norm(
                x, theta, statistics=running, eps=self.eps, feature_dim=self.feature_dim, weight=weight, bias=bias
            )[0]
        distributed = several_processes()
        theta = self._fit(x, theta, distributed)
        out, (mean, var) = mixture_norm(
            x, theta, eps=self.eps, feature_dim=self.feature_dim, weight=weight, bias=bias, distributed=distributed
        )
        self._track(theta, mean, var)
        return out

    def _running_theta(self) -> Mixture:
        nan = self.theta_mean.new_full((), math.nan)
        return Mixture(self.theta_mean, self.theta_var, self.theta_prior, nan, 0)

    @torch.no_grad()
    def _fit(self, x: Tensor, theta: Mixture, distributed: bool) -> Mixture:
        dtype = statistics_dtype(x, self.theta_mean)
        with full_precision(x.device):
            vectors = x.detach().movedim(self.feature_dim, -1).reshape(-1, self.num_features)
            first, total = place_among_processes(len(vectors), x.device) if distributed else (0, len(vectors))
            if total == 0:
                raise InputShapeError(f"MixtureNorm cannot train on an empty batch, received shape {tuple(x.shape)}.")
            vectors = self._thinned(vectors, first, total).to(dtype)
            shift = data_shift(vectors, distributed)
            if recomputing():  # the shift tells batches apart, in the same way on all processes
                known = [fitted for mark, fitted in self._fitted if torch.equal(mark, shift)]
                if known:
                    return known[-1]
            iterations = self.em_iterations
            options: dict[str, Any] = {"shift": shift, "reg_covar": self.reg_covar, "distributed": distributed}
            if not (self._seeded or self.is_on_meta()):
                self._seeded = bool(self.num_batches_tracked > 0)  # loaded, by whatever means
            if not self._seeded:
                iterations = self.seed_iterations
                theta = seed_mixture(vectors, self.num_components, seed=self.seed, **options)
            fitted = fit_mixture(vectors, *theta[:3], num_iterations=iterations, tol=None, **options)
            self._fitted.append((shift, fitted))
            return fitted

    def _thinned(self, vectors: Tensor, first: int, total: int) -> Tensor:
        """One vector of each few in a row, at fixed random places: equal spacing would follow a map's columns.

        Args:
            vectors: ``(M, C)``, this process's.
            first: place of its first vector among those of all processes.
            total: number of those.
        """
        if total <= self.max_vectors:
            return vectors
        batch = (len(vectors), first, total, vectors.device)
        if self._places is None or self._places[0] != batch:
            self._places = batch, _thinned_places(*batch, self.max_vectors, self.seed)
        return vectors[self._places[1]]

    @torch.no_grad()
    def _track(self, theta: Mixture, mean: Tensor, var: Tensor) -> None:
        if recomputing():
            return
        momentum = self.momentum if self._seeded else 1.0
        for buffer, value in (
            (self.theta_mean, theta.mean),
            (self.theta_var, theta.var),
            (self.theta_prior, theta.prior),
            (self.running_mean, mean),
            (self.running_var, var),
        ):
            buffer.lerp_(value.detach().to(buffer.dtype), momentum)
        self.num_batches_tracked.add_(1)
        self._seeded = True

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seeded = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureNorm:
        self._forget()  # what is kept beside the buffers would stay on the old device
        moved: MixtureNorm = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, know nothing of the batches before."""
        return self.__dict__ | {"_fitted": deque(maxlen=self._fitted.maxlen), "_places": None}

    def _forget(self) -> None:
        self._fitted.clear()
        self._places = None

    def extra_repr(self) -> str:
        """The options shown by ``print(model)``."""
        return f"{self.num_features}, num_components={self.num_components}, feature_dim={self.feature_dim}"


def _thinned_places(count: int, first: int, total: int, device: torch.device, max_vectors: int, seed: int) -> Tensor:
    """Return the kept ones of ``count`` vectors, whose first is the ``first`` of ``total``."""
    step = math.ceil(total / max_vectors)
    starts = torch.arange(0, total - step + 1, step)
    places = starts + torch.randint(step, starts.shape, generator=torch.Generator().manual_seed(seed)) - first
    return places[(places >= 0) & (places < count)].to(device)


class FeatureBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization (Eqs. 1-3) along any feature axis: the baseline BN for maps and for tokens.

    Where a process group is initialised, training statistics are those of all processes' batches together.

    Args:
        num_features: ``C``.
        feature_dim: axis of the features: 1 for maps, -1 for tokens.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        affine: learn a scale and an offset after the normalization.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
    """

    def __init__(
        self,
        num_features: int,
        *,
        feature_dim: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("num_features", num_features, 1)
        check_feature_dim(feature_dim)
        check_number("eps", eps, math.inf, inclusive=False)
        check_number("momentum", momentum, 1, inclusive=True)
        check_flag("affine", affine)
        check_place(device, dtype)
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.feature_dim = feature_dim

    def is_on_meta(self) -> bool:
        """True if a parameter or buffer has no storage yet."""
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))

    def _check_input_dim(self, input: Tensor) -> None:
        """Checked in ``forward``, where the feature axis is still where the caller has it."""

    def forward(self, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalise ``x``, ``(N, C, ...)`` or ``(N, ..., C)``; ``weight`` and ``bias``, ``(C,)``, come after it."""
        check_features(self, x)
        out = self._normalized(x)
        if weight is None and bias is None:
            return out
        out = out.movedim(self.feature_dim, -1)
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
        return out.movedim(-1, self.feature_dim).to(x.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        if self.training and several_processes():
            out: Tensor = synchronized_forward(self, x, feature_dim=self.feature_dim)
            return out
        moved = x.movedim(self.feature_dim, 1)
        if self.training and recomputing():  # the running statistics have moved in the first forward
            running = (cast(Tensor, self.running_mean).clone(), cast(Tensor, self.running_var).clone())
            out = F.batch_norm(moved, *running, self.weight, self.bias, True, 0.0, self.eps)
        else:
            out = super().forward(moved)
        return out.movedim(1, self.feature_dim)
