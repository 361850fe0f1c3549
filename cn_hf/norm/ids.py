"""The forms of ``context_ids``, and the checks that turn them into a tensor.

Shape legend: ``N`` samples, ``T`` contexts. Hard ids are int64 ``(N,)``; soft ones are float weights ``(N, T)`` whose
rows sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from cn_hf.errors import ContextIdError, nearest

__all__ = ["ContextIds", "as_tensor", "resolve_context_ids"]

_FEW = 128  # ids that Python looks through sooner than torch

ContextIds: TypeAlias = Tensor | int | str | Sequence[Any]
"""An integer tensor ``(N,)``, an int or name for all samples, a list of N ids or names, or float weights ``(N, T)``."""


def resolve_context_ids(
    context_ids: ContextIds,
    *,
    num_contexts: int,
    batch_size: int,
    device: torch.device,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Check ``context_ids`` and bring them to one form on ``device``.

    Values on an accelerator are checked by an asynchronous assertion, so nothing waits for the device; under
    ``torch.compile`` and ``torch.export`` only shape and dtype are checked.

    Args:
        context_ids: see ``ContextIds``.
        num_contexts: ``T``.
        batch_size: ``N``.
        device: where the result goes.
        names: names of the contexts, where they have any.

    Returns:
        int64 ``(N,)``, or float ``(N, T)`` as it was given.

    Raises:
        ContextIdError: wrong length, dtype, range, name, or weights that are not finite, not positive or do not sum to
            one.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _plain(context_ids, num_contexts, batch_size, device):
        return cast(Tensor, context_ids)
    ids = as_tensor(context_ids, names)
    if ids.layout is not torch.strided and not ids.is_nested:
        raise ContextIdError(f"context_ids must be a dense tensor, received one of {ids.layout}: pass ids.to_dense().")
    if ids.is_floating_point():
        if ids.dim() != 2 or ids.shape[1] != num_contexts:
            raise ContextIdError(
                f"Soft context_ids must have shape (N, {num_contexts}), one weight a context, received "
                f"{tuple(ids.shape)} of {ids.dtype}. Pass integer ids (N,) for hard contexts."
            )
    elif ids.dtype == torch.bool or ids.is_complex():
        raise ContextIdError(f"context_ids must be integers or float weights, received {ids.dtype}.")
    elif ids.dim() == 0:
        ids = ids.long().expand(batch_size)
    elif ids.dim() != 1:
        raise ContextIdError(
            f"Integer context_ids must have shape (N,), received {tuple(ids.shape)}; one-hot rows must be float."
        )
    else:
        ids = ids.long()
    if ids.shape[0] != batch_size:
        raise ContextIdError(f"Received {ids.shape[0]} context_ids for a batch of {batch_size} samples; give one each.")
    if ids.is_meta and device.type != "meta":
        raise ContextIdError(f"context_ids are on the meta device, without values, and the model is on {device}.")
    if not compiling:
        _check_values(ids, num_contexts)
    return ids if ids.device == device else ids.to(device, non_blocking=True)


def _plain(context_ids: ContextIds, num_contexts: int, batch_size: int, device: torch.device) -> bool:
    """True for what most callers give, and is found right with few calls: int64 ``(N,)`` on a CPU."""
    if type(context_ids) is not Tensor or context_ids.is_nested or context_ids.dtype != torch.int64:
        return False
    if device.type != "cpu" or context_ids.device != device or not 0 < batch_size <= _FEW:
        return False
    if context_ids.shape != (batch_size,):
        return False
    if torch._C._functorch.maybe_get_level(context_ids) != -1 or context_ids.layout != torch.strided:
        return False
    values = context_ids.tolist()
    return bool(min(values) >= 0 and max(values) < num_contexts)


def as_tensor(context_ids: ContextIds, names: Sequence[str] | None) -> Tensor:
    """``context_ids`` as a tensor, names looked up, nothing else checked.

    Raises:
        ContextIdError: a name is unknown, or there is no tensor in it.
    """
    if isinstance(context_ids, Tensor):
        return context_ids
    if isinstance(context_ids, bool):
        raise ContextIdError(f"context_ids must be an id, a name or a tensor, received the bool {context_ids}.")
    if isinstance(context_ids, str):
        return torch.tensor(_index_of(context_ids, names))
    if isinstance(context_ids, Sequence) and any(isinstance(item, str) for item in context_ids):
        if not all(isinstance(item, str) for item in context_ids):
            raise ContextIdError(f"A list of context_ids is all names or all integers, received {context_ids!r}.")
        return torch.tensor([_index_of(item, names) for item in context_ids], dtype=torch.int64)
    if isinstance(context_ids, Sequence) and len(context_ids) == 0:
        return torch.zeros(0, dtype=torch.int64)
    try:
        return torch.as_tensor(context_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ContextIdError(
            f"context_ids must be an integer tensor (N,), float weights (N, T), an int, a name or a list of these, "
            f"received {type(context_ids).__name__}: {error}"
        ) from error


def _index_of(name: str, names: Sequence[str] | None) -> int:
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    if names is None:
        raise ContextIdError(f"Received the context name {shown!r}, but these contexts have no names: give integers.")
    if name not in names:
        raise ContextIdError(f"Unknown context {shown!r}; {nearest(shown, names)}")
    return list(names).index(name)


def _check_values(ids: Tensor, num_contexts: int) -> None:
    if ids.is_meta or ids.numel() == 0 or torch._C._functorch.maybe_get_level(ids) != -1:
        return
    if ids.device.type == "cpu" and ids.numel() <= _FEW and not ids.is_floating_point():
        values = ids.tolist()  # the quickest way to tell
        if min(values) >= 0 and max(values) < num_contexts:
            return
    if ids.is_floating_point():
        tolerance = 1e-3 if ids.dtype in (torch.float32, torch.float64) else 2e-2
        rows = ((ids.sum(dim=1) - 1).abs() <= tolerance) & (ids >= 0).all(dim=1)
        valid, message = rows.all(), "Soft context_ids must be finite, not negative, and sum to one in each row"
    else:
        least, most = ids.aminmax()
        valid, message = (least >= 0) & (most < num_contexts), f"context_ids must lie in 0..{num_contexts - 1}"
    if ids.device.type != "cpu":
        torch._assert_async(valid)
    elif not bool(valid):
        rows = rows if ids.is_floating_point() else (ids >= 0) & (ids < num_contexts)
        row = int((~rows).nonzero()[0])
        raise ContextIdError(f"{message}; sample {row} has {ids[row].tolist()}.")
