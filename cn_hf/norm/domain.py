"""Domain-specific batch normalization: one set of batch statistics and one affine map for each context.

The strongest simple rival of context normalization where contexts are domains (Chang et al. 2019, "Domain-Specific
Batch Normalization for Unsupervised Domain Adaptation"): statistics are not learned but measured, context by context.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.errors import ContextIdError, InputShapeError
from cn_hf.norm.choices import check_integer, check_number
from cn_hf.norm.em import statistics_dtype
from cn_hf.norm.formulas import along
from cn_hf.norm.functional import context_rows
from cn_hf.norm.ids import ContextIds
from cn_hf.norm.layers import FeatureNorm, checked_ids
from cn_hf.norm.synchronized import recomputing, several_processes, synchronized_batch_norm

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
        own_weight, own_bias = self._affine(weight, bias)
        if self.training:
            return self._by_batch(x, ids.expand(x.shape[0]) if len(ids) == 1 else ids, own_weight, own_bias)
        wide = statistics_dtype(x, self.running_mean)
        scale = torch.rsqrt(self.running_var.to(wide) + self.eps)
        scale = scale if own_weight is None else scale * own_weight
        offset = -self.running_mean.to(wide) * scale
        offset = offset if own_bias is None else offset + own_bias
        offset, scale = (along(context_rows(table, ids), x, self.feature_dim) for table in (offset, scale))
        return torch.addcmul(offset, x.to(wide), scale).to(x.dtype)

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

    def _by_batch(self, x: Tensor, ids: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """By the statistics of each context's samples; contexts without any are passed over."""
        together = several_processes()  # then every process takes part in every context's statistics
        positions = x.numel() // max(1, len(x) * self.num_features)
        rows = [(ids == context).nonzero().flatten() for context in range(self.num_contexts)]
        if not together and (alone := [context for context, mine in enumerate(rows) if len(mine) * positions == 1]):
            raise InputShapeError(
                f"Expected more than one vector of a context in a training batch, received one of {alone} "
                f"(shape {tuple(x.shape)}): it has no variance. Use larger or balanced batches."
            )
        # ``index_select`` makes its result contiguous: for the layout to stay, features stand where they do in memory.
        stored = next((dim for dim in (1, -1) if x.movedim(self.feature_dim, dim).is_contiguous()), self.feature_dim)
        x = x.movedim(self.feature_dim, stored)
        parts = []
        for context, mine in enumerate(rows):
            if len(mine) == 0 and not together:
                continue
            running = self._running(context)
            affine = (None if weight is None else weight[context], None if bias is None else bias[context])
            options: dict[str, Any] = {"momentum": self.momentum, "eps": self.eps}
            part = x.index_select(0, mine)
            if together:
                parts.append(synchronized_batch_norm(part, *running, *affine, feature_dim=stored, **options))
            else:
                moved = part.movedim(stored, 1)
                done = F.batch_norm(moved, *running, *affine, training=True, **options)
                parts.append(done.movedim(1, stored))
        out = torch.cat(parts).index_select(0, torch.cat(rows).argsort()) if parts else x
        return out.movedim(stored, self.feature_dim)

    def _running(self, context: int) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics that this forward is to move; None where it is to move none."""
        if not self.track_running_stats or recomputing():
            return None, None
        self.num_batches_tracked[context] += 1
        return self.running_mean[context], self.running_var[context]

    def extra_repr(self) -> str:
        """The options shown by ``print(model)``."""
        return f"{self.num_features}, num_contexts={self.num_contexts}, feature_dim={self.feature_dim}"
