"""Domain-specific batch normalization: one set of batch statistics and one affine map for each context.

The strongest simple rival of context normalization where contexts are domains (Chang et al. 2019, "Domain-Specific
Batch Normalization for Unsupervised Domain Adaptation"): statistics are not learned but measured, context by context.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cn_hf.errors import ContextIdError, InputShapeError
from cn_hf.norm.choices import check_flag, check_integer, check_number
from cn_hf.norm.em import SumOverProcesses, full_precision, statistics_dtype
from cn_hf.norm.functional import context_rows, normalize_rows
from cn_hf.norm.ids import ContextIds
from cn_hf.norm.layers import FeatureNorm, checked_ids
from cn_hf.norm.synchronized import recomputing, several_processes

__all__ = ["DomainBatchNorm"]


class DomainBatchNorm(FeatureNorm):
    """A batch norm for each context: in training each sample is normalised by its context's part of the batch.

    Where a process group is initialised, training statistics are those of all processes' batches together.

    Args:
        num_features: ``C``.
        num_contexts: ``T``.
        feature_dim: axis of the features: 1 for maps, -1 for tokens.
        eps: added to the variances.
        momentum: weight of the newest batch in the running statistics.
        affine: learn a scale and an offset for each context.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.

    Raises:
        ConfigError: an option is out of range.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        *,
        feature_dim: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, feature_dim, eps, False, device, dtype)
        check_integer("num_contexts", num_contexts, 1)
        check_number("momentum", momentum, 1, inclusive=True)
        check_flag("affine", affine)
        self.num_contexts = num_contexts
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = True  # as of torch's batch norms: off for a forward that must move no statistics
        shape = (num_contexts, num_features)
        if affine:
            self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros(num_contexts, device=device, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Affine maps that change nothing, mean 0 and variance 1, no batch seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()
        if self.weight is not None and self.bias is not None:
            self.weight.fill_(1)
            self.bias.zero_()

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Let every context's running statistics be these, ``(C,)`` or ``(T, C)``."""
        self.running_mean.copy_(mean.expand_as(self.running_mean))
        self.running_var.copy_(var.expand_as(self.running_var))

    def forward(
        self, x: Tensor, context_ids: ContextIds | None = None, *, checked: bool = False, **options: Any
    ) -> Tensor:
        """Normalise ``x``, ``(N, C, ...)`` or ``(N, ..., C)``, each sample by its context.

        Args:
            x: floating point.
            context_ids: as of ``ContextNorm``.
            checked: a patched model has checked the ids, once for all its layers.
            **options: of ``normalize``.

        Raises:
            ContextIdError: the ids are missing, or not one context a sample.
            InputShapeError: ``x`` does not have ``num_features`` features.
        """
        ids = cast("Tensor | None", context_ids) if checked else checked_ids(self, x, context_ids)
        return self.normalize(x, ids, **options)

    def normalize(
        self, x: Tensor, ids: Tensor | None = None, *, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """``forward`` with checked ids; an affine map ``(C,)`` of the caller's comes after that of the contexts."""
        if ids is None or ids.is_floating_point():
            received = "none" if ids is None else "weights of several"
            raise ContextIdError(
                f"Domain-specific batch norm needs the context of each sample, received {received}: pass "
                'context_ids, or set_inference(model, "average") to try all contexts.'
            )
        mean, var = self._batch_statistics(x, ids) if self.training else (self.running_mean, self.running_var)
        dtype = statistics_dtype(x, mean)
        center, spread = (context_rows(table.to(dtype), ids) for table in (mean, var))
        scale, offset = (
            None if table is None else context_rows(table.to(dtype), ids) for table in self._affine(weight, bias)
        )
        return normalize_rows(x, center, spread, eps=self.eps, feature_dim=self.feature_dim, weight=scale, bias=offset)

    def _affine(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Scale and offset ``(T, C)`` of both maps, one after the other."""
        if self.weight is None or self.bias is None:
            rows = (self.num_contexts, self.num_features)
            return (
                None if weight is None else weight.expand(rows),
                None if bias is None else bias.expand(rows),
            )
        own_weight: Tensor = self.weight
        own_bias: Tensor = self.bias
        if weight is not None:
            own_weight, own_bias = own_weight * weight, own_bias * weight
        return own_weight, own_bias if bias is None else own_bias + bias

    def _batch_statistics(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``(T, C)`` of each context's part of the batch; the running ones move.

        Nothing depends on which contexts are there, or on their counts, but values: no size, and no tensor that is
        saved for backward. A context that is absent gets mean and variance 0, which no sample asks for.
        """
        ids = ids.expand(x.shape[0])  # one id for all samples, or one each
        with full_precision(x.device):
            wide = x.to(statistics_dtype(x))
            positions = [dim for dim in range(1, x.dim()) if dim != self.feature_dim % x.dim()]
            if x.numel() == 0:  # takes part all the same: other processes wait for its part of the sums
                sample_mean = sample_var = wide.sum(positions)
            elif positions:
                sample_var, sample_mean = torch.var_mean(wide, positions, correction=0)
            else:
                sample_var, sample_mean = torch.zeros_like(wide), wide
            of_context = ids[:, None] == torch.arange(self.num_contexts, device=ids.device)
            weight = of_context.to(wide.dtype) * (x.numel() / max(1, x.shape[0] * self.num_features))
            together = several_processes()
            count, total = _summed(together, weight.sum(dim=0), weight.T @ sample_mean)
            self._check_counts(x, count)
            divisor = count.clamp_min(1)[:, None]
            mean = total / divisor
            deviation = sample_var + (sample_mean - context_rows(mean, ids)).square()
            (squares,) = _summed(together, weight.T @ deviation)
            var = squares / divisor
            self._track(count, mean, var)
            return mean, var

    def _check_counts(self, x: Tensor, count: Tensor) -> None:
        """Raise ``InputShapeError`` for a context with one vector; compiled graphs do not check values."""
        if torch.compiler.is_compiling() or x.is_meta or x.numel() > len(x) * self.num_features:
            return  # each sample has several
        valid = (count != 1).all()
        if x.device.type != "cpu":
            torch._assert_async(valid)
        elif not valid:
            raise InputShapeError(
                f"Expected more than one vector of a context in a training batch, received one of "
                f"{(count == 1).nonzero().flatten().tolist()} (shape {tuple(x.shape)}): it has no variance. Use larger "
                "or balanced batches."
            )

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or (not torch.compiler.is_compiling() and recomputing()):
            return
        present = count > 0
        unbiased = var * (count / (count - 1).clamp_min(1))[:, None]
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            moved = running.to(value.dtype).lerp(value, self.momentum)
            running.copy_(torch.where(present[:, None], moved, running))
        self.num_batches_tracked.add_(present)

    def extra_repr(self) -> str:
        """The options shown by ``print(model)``."""
        return f"{self.num_features}, num_contexts={self.num_contexts}, feature_dim={self.feature_dim}"


def _summed(together: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, summed over all processes if asked, also in backward."""
    if not together:
        return tensors
    summed: tuple[Tensor, ...] = SumOverProcesses.apply(*tensors)
    return summed
