"""The configuration of a patched model: exactly what is saved as JSON beside its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cn_hf.errors import ConfigError, ConfigTypeError, nearest
from cn_hf.norm.choices import CHOICES, check_choice, check_integer, check_number

__all__ = ["BASELINES", "CN_MODES", "MODES", "ContextNormConfig"]

BASELINES = ("bn", "mn")
CN_MODES = ("cn-patches", "cn-channels", "cn")
MODES = (*CN_MODES, "dsbn", *BASELINES)  # all but the baselines are told contexts
VIEW_ORDERS = ("batch", "view")
INFERENCE = (*CHOICES["inference"], "predict", "average")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextNormConfig:
    """The way a model is patched and runs without context ids. Validates itself; round-trips through JSON.

    Attributes:
        mode: ``"cn-patches"`` (norms over the last axis of tokens), ``"cn-channels"`` (norms over axis 1 of NCHW maps),
            ``"cn"`` (both), ``"dsbn"`` (a batch norm for each context), or a baseline: ``"bn"``, ``"mn"``.
        num_contexts: number of contexts T; number of components K for ``"mn"``.
        context_names: one name a context, or None.
        where: ``"norms"``, ``"paper"``, ``"input"``, ``"embed"``, module-name patterns, or None (see ``patch_model``).
        parametrization: ``"embedder"`` (the paper's) or ``"table"``.
        embedding_dim: width of the embedder; None for ``min(T, 64)``.
        variance_activation: ``"softplus"`` or ``"exp"``.
        init: ``"identity"`` or ``"random"``.
        eps: None for the swapped layer's own (1e-5 on inputs and embeddings); another value moves the variance so that
            variance + eps stays.
        affine: learn a scale and an offset after the normalization of inputs and embeddings. Swapped norms keep theirs.
        keep_statistics: keep the per-sample standardisation of a LayerNorm and its kind before CN.
        inference: evaluation without ids: ``"cn+"``, ``"cn"`` (an error), ``"predict"`` or ``"average"``.
        plus_stats: CN+ statistics, ``"learned"`` or the paper's ``"batch"``.
        plus_scale: CN+ factor, ``"none"`` or the paper's ``"sqrt_t"``.
        plus_posterior: CN+ posteriors, ``"sample"`` (one for all vectors of a sample) or the paper's ``"vector"``, as
            which a config without the field is read.
        view_order: how a forward that concatenates k views of its batch orders them: ``"batch"``, all views of a sample
            side by side, or ``"view"``, all samples of a view (``torch.cat([x1, x2])``).
        sparse: sparse gradients for what has a row a context (see ``ContextNorm``): for many contexts.
        momentum: of the running statistics of ``"bn"``, ``"mn"`` and ``"dsbn"``.
        em_iterations: EM iterations a training step of ``"mn"``.
        em_vectors: EM of ``"mn"`` sees at most about this many vectors of a batch.
    """

    mode: str = "cn-patches"
    num_contexts: int = 3
    context_names: tuple[str, ...] | None = None
    where: str | tuple[str, ...] | None = None
    parametrization: str = "embedder"
    embedding_dim: int | None = None
    variance_activation: str = "softplus"
    init: str = "identity"
    eps: float | None = None
    affine: bool = False
    keep_statistics: bool = True
    inference: str = "cn+"
    plus_stats: str = "learned"
    plus_scale: str = "none"
    plus_posterior: str = "sample"
    view_order: str = "batch"
    sparse: bool = False
    momentum: float = 0.1
    em_iterations: int = 2
    em_vectors: int = 8192

    def __post_init__(self) -> None:
        """Check every field, and bring lists from JSON to tuples.

        Raises:
            ConfigError: a field is out of range.
        """
        check_choice("mode", self.mode, MODES)
        check_choice("inference", self.inference, INFERENCE)
        check_choice("view_order", self.view_order, VIEW_ORDERS)
        for option in ("parametrization", "variance_activation", "init", "plus_stats", "plus_scale", "plus_posterior"):
            check_choice(option, getattr(self, option))
        for option, least in (("num_contexts", 1), ("em_iterations", 1), ("em_vectors", 1), ("embedding_dim", 1)):
            if getattr(self, option) is not None or option != "embedding_dim":
                check_integer(option, getattr(self, option), least)
                object.__setattr__(self, option, int(getattr(self, option)))  # numpy's are no JSON
        for option in ("affine", "keep_statistics", "sparse"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigTypeError(f"{option} must be true or false, received {getattr(self, option)!r}.")
        if self.context_names is not None:
            self._check_names()
        if self.where is not None and not isinstance(self.where, str):
            if not isinstance(self.where, (list, tuple)) or not _all_strings(self.where):
                raise ConfigTypeError(f"where must be a keyword or a list of module names, received {self.where!r}.")
            if not self.where:
                raise ConfigError("where must be a keyword or a list of module names, received an empty list.")
            object.__setattr__(self, "where", tuple(self.where))
        if self.eps is not None:
            check_number("eps", self.eps, 1, inclusive=False)
        check_number("momentum", self.momentum, 1, inclusive=True)

    def _check_names(self) -> None:
        names = self.context_names
        if not isinstance(names, (list, tuple)) or not _all_strings(names):
            raise ConfigTypeError(f"context_names must be a list of strings, received {names!r}.")
        if "" in names:
            raise ConfigError(f"context_names must not be empty, received {list(names)}.")
        object.__setattr__(self, "context_names", tuple(names))
        if len(set(names)) != len(names):
            raise ConfigError(f"context_names must differ from each other, received {list(names)}.")
        if len(names) != self.num_contexts:
            raise ConfigError(
                f"Received {len(names)} context_names for num_contexts={self.num_contexts}; give one name a context."
            )

    def replace(self, **options: Any) -> ContextNormConfig:
        """A copy with some options changed.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        return dataclasses.replace(self, **_known(options))

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContextNormConfig:
        """The inverse of ``to_dict``; a config without ``plus_posterior`` is older, and means ``"vector"``.

        Raises:
            ConfigError: a key is unknown or a value out of range.
        """
        return cls(**({"plus_posterior": "vector"} | _known(values)))


def _all_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(ContextNormConfig)]
    for option in options:
        if option not in fields:
            raise ConfigError(f"Unknown option {option!r}: {nearest(option, fields)}")
    return dict(options)
