"""Normalization layers: state, and a call into ``functional``.

``ContextNorm`` is CN (paper III-B, Algorithms 1 to 3, Eq. 8) with CN+ (Eq. 9) for inputs of unknown context.

Shape legend: ``N`` samples, ``C`` features, ``T`` contexts, ``d`` embedding width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.errors import ConfigError, ConfigTypeError, ContextIdError, InputShapeError, InputTypeError
from cn_hf.norm.choices import check_choice, check_flag, check_integer, check_number, check_place
from cn_hf.norm.em import statistics_dtype
from cn_hf.norm.functional import Standardization, context_norm_plus, context_rows, normalize_rows, scale_rows
from cn_hf.norm.fused.layout import check_devices
from cn_hf.norm.ids import ContextIds, resolve_context_ids

__all__ = ["ContextNorm", "FeatureNorm", "check_feature_dim", "check_features", "checked_ids"]


_PARTS = {
    "embedder": ("embedding", "embedding_bias", "mean_weight", "mean_bias", "var_weight", "var_bias"),
    "table": ("mean_table", "var_table"),
}


def check_feature_dim(feature_dim: int) -> None:
    """Raise ``ConfigError`` if the feature axis is the batch axis."""
    if isinstance(feature_dim, bool) or not isinstance(feature_dim, int):
        raise ConfigTypeError(f"feature_dim must be 1 for NCHW maps or -1 for tokens, received {feature_dim!r}.")
    if feature_dim == 0:
        raise ConfigError("feature_dim=0 is the batch axis; use 1 for NCHW maps or -1 for tokens.")


def check_features(norm: Any, x: Tensor) -> None:
    """Raise ``InputShapeError`` unless ``x`` is a batch with the features of ``norm`` along its feature axis."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{type(norm).__name__} takes a tensor, received {type(x).__name__}.")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise InputTypeError(f"{type(norm).__name__} takes a dense tensor, received a {kind} one. Pass x.to_dense().")
    dims, axis = x.dim(), norm.feature_dim
    if dims < 2 or not -dims < axis < dims or x.shape[axis] != norm.num_features:
        raise InputShapeError(
            f"{type(norm).__name__} expects {norm.num_features} features along axis {norm.feature_dim} of a batch, "
            f"received shape {tuple(x.shape)}."
        )


def checked_ids(norm: Any, x: Tensor, context_ids: ContextIds | None) -> Tensor | None:
    """The ids of a batch for ``norm``, once they and the batch are known to be right; None where there are none."""
    check_features(norm, x)
    if context_ids is None:
        return None
    return resolve_context_ids(context_ids, num_contexts=norm.num_contexts, batch_size=x.shape[0], device=x.device)


class FeatureNorm(nn.Module):
    """The base of the layers: a feature axis, eps, and an optional affine map after the normalization."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        feature_dim: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_integer("num_features", num_features, 1)
        check_feature_dim(feature_dim)
        check_number("eps", eps, math.inf, inclusive=False)
        check_flag("affine", affine)
        check_place(device, dtype)
        self.num_features = num_features
        self.feature_dim = feature_dim
        self.eps = eps
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def is_on_meta(self) -> bool:
        """True if a parameter or buffer has no storage yet."""
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))


class ContextNorm(FeatureNorm):
    r"""Context normalization: each sample by the learned mean and variance of its context (Eq. 8).

    With ``parametrization="embedder"`` (the paper's) the statistics come from an embedding of the context id,
    :math:`\alpha_r = W_r\,\mathrm{onehot}(r) + b_r`, :math:`\mu_r = W_\mu \alpha_r + b_\mu`,
    :math:`\sigma^2_r = \rho(W_\sigma \alpha_r + b_\sigma)`; with ``"table"`` they are parameters themselves.

    Args:
        num_features: ``C``.
        num_contexts: ``T``.
        feature_dim: axis of the features: 1 for NCHW maps (CN-Channels), -1 for tokens (CN-Patches).
        parametrization: ``"embedder"`` or ``"table"``.
        embedding_dim: ``d``; default ``min(T, 64)``. Embedder only.
        variance_activation: rho, ``"softplus"`` or ``"exp"``.
        init: ``"identity"``, mean 0 and variance + eps 1 for every context, or ``"random"``, linear layers' own start.
        eps: added to the variance.
        affine: learn a scale and an offset after the normalization.
        inference: what evaluation without ids does: ``"cn+"`` combines all contexts (Eq. 9), ``"cn"`` is an error.
        plus_stats: CN+ statistics, ``"learned"`` or the paper's ``"batch"``.
        plus_scale: CN+ factor, ``"none"`` or the paper's ``"sqrt_t"``.
        plus_posterior: CN+ posteriors, the paper's ``"vector"`` or ``"sample"``, one for all vectors of a sample.
        sparse: as of ``nn.Embedding``: the gradient of what has a row a context (``sparse_parameters``) is sparse, so
            that a training step costs what the batch's contexts cost, however large ``T`` is. For ``SGD``, ``Adagrad``
            and ``SparseAdam``; ``AdamW`` refuses sparse gradients. Weights ``(N, T)`` and compiled graphs give dense
            ones.
        device: of the parameters.
        dtype: of the parameters; arithmetic is float32 at least whatever it is.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        *,
        feature_dim: int,
        parametrization: str = "embedder",
        embedding_dim: int | None = None,
        variance_activation: str = "softplus",
        init: str = "identity",
        eps: float = 1e-5,
        affine: bool = False,
        inference: str = "cn+",
        plus_stats: str = "learned",
        plus_scale: str = "none",
        plus_posterior: str = "vector",
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, feature_dim, eps, affine, device, dtype)
        options = {
            "parametrization": parametrization,
            "variance_activation": variance_activation,
            "init": init,
            "inference": inference,
            "plus_stats": plus_stats,
            "plus_scale": plus_scale,
            "plus_posterior": plus_posterior,
        }
        for option, value in options.items():
            check_choice(option, value)
        check_integer("num_contexts", num_contexts, 1)
        check_flag("sparse", sparse)
        if init == "identity" and eps >= 1:
            raise ConfigError(f"init='identity' needs variance + eps = 1 with a positive variance; eps is {eps}.")
        self.num_contexts = num_contexts
        self.parametrization = parametrization
        self.variance_activation = variance_activation
        self.init = init
        self.inference = inference
        self.plus_stats = plus_stats
        self.plus_scale = plus_scale
        self.plus_posterior = plus_posterior
        self.sparse = sparse

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if parametrization == "embedder":
            d = min(num_contexts, 64) if embedding_dim is None else embedding_dim
            check_integer("embedding_dim", d, 1)
            self.embedding_dim: int | None = d
            self.embedding = new(num_contexts, d)  # W_r, one row a context
            self.embedding_bias = new(d)
            self.mean_weight, self.mean_bias = new(num_features, d), new(num_features)
            self.var_weight, self.var_bias = new(num_features, d), new(num_features)
        else:
            if embedding_dim is not None:
                raise ConfigError("embedding_dim belongs to parametrization='embedder'; a table has none.")
            self.embedding_dim = None
            self.mean_table = new(num_contexts, num_features)
            self.var_table = new(num_contexts, num_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as ``init`` says."""
        if self.affine:
            nn.init.ones_(cast(Tensor, self.weight))
            nn.init.zeros_(cast(Tensor, self.bias))
        if self.init == "random":
            self._draw_linear()
            return
        if self.parametrization == "embedder":
            self._draw_embedding()
        one = torch.ones(self.num_features, dtype=torch.float64)
        self.set_statistics(torch.zeros_like(one), one - self.eps)

    def _draw_linear(self) -> None:
        if self.parametrization == "table":
            bounds = dict.fromkeys((self.mean_table, self.var_table), self.num_contexts)
        else:
            d = cast(int, self.embedding_dim)
            bounds = dict.fromkeys((self.embedding, self.embedding_bias), self.num_contexts)
            bounds |= dict.fromkeys((self.mean_weight, self.mean_bias, self.var_weight, self.var_bias), d)
        for parameter, fan_in in bounds.items():
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _draw_embedding(self) -> None:
        # Rows of length one, orthogonal or the corners of a simplex as far as there is room: contexts are told apart
        # at once, a step on W_mu moves mu_r as a step on a table would, and exact statistics can be solved for.
        if self.embedding.is_meta:
            return
        rows, d = self.embedding.shape
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # nothing decomposes half precision
        with torch.no_grad():
            if d >= rows:
                drawn = nn.init.orthogonal_(torch.empty(rows, d, dtype=wide))
            elif d == rows - 1:
                square = torch.randn(rows, rows, dtype=wide)
                square[:, 0] = 1
                corners = torch.linalg.qr(square).Q[:, 1:]
                drawn = corners / corners.norm(dim=1, keepdim=True)
            else:
                drawn = torch.randn(rows, d, dtype=wide) / math.sqrt(d)
            self.embedding.copy_(drawn)
            self.embedding_bias.zero_()

    # ----------------------------------------------------------------------------------------------------- statistics

    def _storage(self) -> Tensor:
        return self.mean_table if self.parametrization == "table" else self.mean_weight

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters with a row a context: those whose gradient is sparse with ``sparse=True``."""
        return [self.embedding] if self.parametrization == "embedder" else [self.mean_table, self.var_table]

    def statistics(self, context_ids: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance (without eps) of all contexts, or of the given hard ids.

        Args:
            context_ids: int64 ``(N,)``, a Python int, or None for all contexts in order.

        Returns:
            mean and var, ``(T, C)``, ``(1, C)`` or ``(N, C)``, float32 at least, differentiable.

        Raises:
            ContextIdError: the int is no context.
        """
        compiling = torch.compiler.is_compiling()
        parts = self._parts(compiling)
        device = parts[0].device
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return self._statistics(parts, context_ids, compiling)
        return self._statistics(parts, context_ids, compiling)

    def _statistics(
        self, parts: list[Tensor], context_ids: Tensor | int | None, compiling: bool
    ) -> tuple[Tensor, Tensor]:
        check_devices(*parts)  # torch multiplies by a matrix without storage
        result = statistics_dtype(parts[0])
        # In evaluation they are computed in float64. BLAS and vectorised functions round by the shape of a table; so a
        # row's bits do not depend on how many others there are, or which.
        exact = not self.training and not compiling and parts[0].device.type != "mps"
        dtype = torch.float64 if exact else result
        if context_ids is not None:
            rows = len(self.sparse_parameters())
            parts = [context_rows(part, context_ids, sparse=self.sparse) for part in parts[:rows]] + parts[rows:]
        parts = [part.to(dtype) for part in parts]
        if self.parametrization == "table":
            mean, raw = parts
        else:
            embedding, shift, mean_weight, mean_bias, var_weight, var_bias = parts
            alpha = embedding + shift
            mean, raw = F.linear(alpha, mean_weight, mean_bias), F.linear(alpha, var_weight, var_bias)
        var = F.softplus(raw) if self.variance_activation == "softplus" else raw.exp()
        return mean.to(result), var.to(result)

    def _parts(self, compiling: bool) -> list[Tensor]:
        """The parameters, those with a row a context first, or what stands for them (parametrizations, replicas).

        ``nn.Module`` finds an attribute by a call of Python; a compiler has to see it.
        """
        found: Any = {} if compiling else self._parameters
        parts = []
        for name in _PARTS[self.parametrization]:
            parts.append(found[name] if name in found else getattr(self, name))
        return parts

    def inverse_activation(self, var: Tensor) -> Tensor:
        """Return what the variance activation turns into ``var``."""
        var = var.clamp_min(1e-30)
        if self.variance_activation == "exp":
            return var.log()
        return var + torch.log(-torch.expm1(-var))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor, *, approximate: bool = False) -> None:
        """Give contexts exact statistics.

        Args:
            mean: ``(C,)`` for all contexts, or ``(T, C)``.
            var: variance without eps, same shape as ``mean``; not negative.
            approximate: accept a least-squares fit where the embedder cannot hold ``T`` different rows.

        Raises:
            ConfigError: ``T`` different rows asked of an embedder with ``d < T - 1``, without ``approximate``; or
                statistics that are not finite, or a negative variance. The layer is unchanged.
            InputShapeError: wrong shapes.
        """
        if self._storage().is_meta:
            return
        shapes = (self.num_features,), (self.num_contexts, self.num_features)
        if mean.shape != var.shape or mean.shape not in shapes:
            raise InputShapeError(
                f"mean and var must both be {shapes[0]} or {shapes[1]}, received {tuple(mean.shape)} and "
                f"{tuple(var.shape)}."
            )
        mean, var = mean.double().cpu(), var.double().cpu()
        if not bool((mean.isfinite() & var.isfinite() & (var >= 0)).all()):
            raise ConfigError("Statistics must be finite and variances not negative; received some that are not.")
        raw = self.inverse_activation(var)
        if self.parametrization == "table":
            self.mean_table.copy_(mean.expand(self.mean_table.shape))
            self.var_table.copy_(raw.expand(self.var_table.shape))
        elif mean.dim() == 1:
            self.mean_weight.zero_()
            self.var_weight.zero_()
            self.mean_bias.copy_(mean)
            self.var_bias.copy_(raw)
        else:
            self._solve_embedder(mean, raw, approximate)

    def _solve_embedder(self, mean: Tensor, raw: Tensor, approximate: bool) -> None:
        d = cast(int, self.embedding_dim)
        if d < self.num_contexts - 1 and not approximate:
            raise ConfigError(
                f"An embedder of embedding_dim={d} cannot hold different statistics for {self.num_contexts} contexts "
                f"exactly: use embedding_dim>={self.num_contexts - 1}, parametrization='table', or approximate=True."
            )
        target = torch.cat([mean, raw], dim=1)
        for attempt in range(2):
            alpha = (self.embedding + self.embedding_bias).double().cpu()
            center = alpha.mean(dim=0)
            weight = torch.linalg.lstsq(alpha - center, target - target.mean(dim=0), driver="gelsd").solution
            offset = target.mean(dim=0) - center @ weight
            error = (alpha @ weight + offset - target).abs().amax()
            steep = weight.abs().amax() > 1e3 * (1 + target.abs().amax())
            if attempt == 0 and d >= self.num_contexts - 1 and (steep or error > 1e-6 * (1 + target.abs().amax())):
                self._draw_embedding()  # trained embeddings that have grown alike cannot carry different rows
            else:
                break
        (mean_weight, raw_weight), (mean_bias, raw_bias) = weight.T.chunk(2), offset.chunk(2)
        for parameter, value in (
            (self.mean_weight, mean_weight),
            (self.var_weight, raw_weight),
            (self.mean_bias, mean_bias),
            (self.var_bias, raw_bias),
        ):
            parameter.copy_(value)

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(
        self, x: Tensor, context_ids: ContextIds | None = None, *, checked: bool = False, **options: Any
    ) -> Tensor:
        """Normalise ``x``.

        Args:
            x: ``(N, C, ...)`` or ``(N, ..., C)`` as ``feature_dim`` says, floating point.
            context_ids: integers ``(N,)``, an int, float weights ``(N, T)``, or None (evaluation only).
            checked: a patched model has checked the ids, once for all its layers.
            **options: of ``normalize``.

        Returns:
            Tensor of the shape and dtype of ``x``.

        Raises:
            ContextIdError: ids are invalid, or missing where they are needed.
            InputShapeError: ``x`` does not have ``num_features`` features.
        """
        ids = cast("Tensor | None", context_ids) if checked else checked_ids(self, x, context_ids)
        return self.normalize(x, ids, **options)

    def normalize(
        self,
        x: Tensor,
        ids: Tensor | None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        standardize: Standardization | None = None,
        combined: bool = False,
    ) -> Tensor:
        """``forward`` for ids checked already, and with an affine map ``(C,)`` of the caller's where one is given.

        With ids, ``standardize`` does what a layer norm before this layer would, in the same pass over ``x``. Without,
        ``combined`` asks for CN+ whatever ``inference`` is.
        """
        if self.affine:
            weight = self.weight if weight is None else weight
            bias = self.bias if bias is None else bias
        if ids is None:
            if self.training:
                raise ContextIdError("Training needs context_ids: which context does each sample belong to?")
            if self.inference == "cn" and not combined:
                raise ContextIdError(
                    "No context_ids reached this layer, and inference is not 'cn+': pass them to the model, or use "
                    "use_contexts(model, ids) around calls past its forward."
                )
            mean, var = self.statistics()
            return context_norm_plus(
                x,
                mean,
                var,
                eps=self.eps,
                feature_dim=self.feature_dim,
                plus_stats=self.plus_stats,
                plus_scale=self.plus_scale,
                plus_posterior=self.plus_posterior,
                weight=weight,
                bias=bias,
            )
        compiling = torch.compiler.is_compiling()
        if ids.is_floating_point() or self._looks_up_first(ids, compiling):
            mean, var = self.rows(ids)
            dtype = statistics_dtype(x, mean)
            options: Any = {"weight": weight, "bias": bias, "standardize": standardize}
            return normalize_rows(
                x, mean.to(dtype), var.to(dtype), eps=self.eps, feature_dim=self.feature_dim, **options
            )
        mean, var = self.statistics()
        check_devices(mean, ids, weight, bias)
        dtype = statistics_dtype(x, mean)
        scale = torch.rsqrt(var.to(dtype) + self.eps)
        if weight is not None:
            scale = scale * weight
        mean = mean.to(dtype)
        if compiling or torch._C._is_tracing():
            rows = context_rows(mean, ids), context_rows(scale, ids)
        else:  # the same, without its questions
            rows = torch.embedding(mean, ids), torch.embedding(scale, ids)
        return scale_rows(x, *rows, bias, self.feature_dim, standardize)

    def _looks_up_first(self, ids: Tensor, compiling: bool) -> bool:
        """True if only the samples' rows are to be computed: sparse gradients, or more contexts than samples."""
        # A symbolic batch size must not be compared: the graph would be specialised to one side.
        return self.sparse or self.num_contexts > (256 if compiling else ids.shape[0])

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (without eps) of each sample, ``(N, C)``, from checked hard or soft ids.

        The tables of all contexts are computed once; with more contexts than samples, or sparse gradients, the
        samples' rows only.
        """
        check_devices(self._storage(), ids)
        if not ids.is_floating_point() and self._looks_up_first(ids, torch.compiler.is_compiling()):
            return self.statistics(ids)
        mean, var = self.statistics()
        return context_rows(mean, ids), context_rows(var, ids)

    def extra_repr(self) -> str:
        """The options shown by ``print(model)``."""
        width = "" if self.embedding_dim is None else f", embedding_dim={self.embedding_dim}"
        return (
            f"{self.num_features}, num_contexts={self.num_contexts}, feature_dim={self.feature_dim}, "
            f"parametrization={self.parametrization!r}{width}, eps={self.eps}, affine={self.affine}"
        )
