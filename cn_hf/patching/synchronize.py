"""Synchronised batch norms for the time of a training run with several processes.

Within ``synchronize_batch_norms`` the batch norms of a model take their statistics over the batches of all processes,
by a class swapped in place: parameters, buffers, hooks, flags and names stay where they are, and afterwards the modules
have their own classes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from cn_hf.norm import DomainBatchNorm, FeatureBatchNorm, MixtureNorm
from cn_hf.norm.synchronized import several_processes, synchronized_forward
from cn_hf.patching.convert import StoredNormSlot, qualified_name
from cn_hf.patching.swapped import swap_class

__all__ = ["synchronize_batch_norms"]

FORWARDS: dict[str, bool] = {
    "torch.nn.modules.batchnorm._BatchNorm": False,
    "torch.nn.modules.batchnorm.SyncBatchNorm": False,
    "timm.layers.norm_act.BatchNormAct2d": True,
    "timm.layers.norm_act.SyncBatchNormAct": True,
}
"""Classes whose ``forward`` is known, and whether a dropout ``drop`` and an activation ``act`` come after the norm.

A subclass that inherits its ``forward`` from one of them is as good as it.
"""


@contextmanager
def synchronize_batch_norms(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's batch norms normalise over the batches of all processes while they train.

    In evaluation mode, and for a single process, nothing changes. Wrap the model (DDP, ``accelerator.prepare``,
    ``torch.compile``) and train it inside the block; every process must run the same forwards and backwards. Copies and
    pickles of the modules made inside the block are of the original classes, not synchronised. Slots of contexts and
    baselines are left as they are.

    Args:
        model: a network, patched or plain.

    Warns:
        UserWarning: batch norms of kinds that cannot be synchronised, by name; each process keeps its own statistics
            there.
    """
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    refused: list[str] = []
    try:
        for name, module in model.named_modules() if several_processes() else ():
            if _is_foreign_or_done(module):
                continue
            if _can_synchronize(module):
                swapped.append((module, type(module)))
                swap_class(module, _synchronized_class(type(module)))
            else:
                refused.append(f"{name or 'the model'} ({type(module).__name__})")
        if refused and dist.get_rank() == 0:
            warnings.warn(
                f"These batch norms cannot be synchronised: {', '.join(refused)}. Each process normalises by its own "
                "part of the batch there, so results depend on the number of processes.",
                stacklevel=3,
            )
        yield
    finally:
        for module, original in swapped:
            if type(module) is _synchronized_class(original):
                swap_class(module, original)


class Synchronized:
    """A batch norm whose class was swapped; in training its statistics are those of all processes."""

    original_class: ClassVar[type[nn.Module]]
    fused: ClassVar[bool]

    def forward(self: Any, x: Tensor) -> Tensor:
        """Do what the original class does, over the batches of all processes where it trains."""
        if not self.training:
            return super().forward(x)  # type: ignore[misc, no-any-return]  # the swapped class's own
        self._check_input_dim(x)
        y: Tensor = synchronized_forward(self, x)
        for name in ("drop", "act") if self.fused else ():  # a norm that was built directly may lack them
            y = self._modules[name](y) if self._modules.get(name) is not None else y
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the original class: nothing would give it back to them after the block."""
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (object.__new__, (self.original_class,), *reduced[2:])


def _synchronized_class(base: Any) -> type[nn.Module]:
    return _make_synchronized_class(base)


@cache
def _make_synchronized_class(base: Any) -> type[nn.Module]:
    namespace = {"__module__": base.__module__, "original_class": base, "fused": FORWARDS[_definer_of_forward(base)]}
    return type(f"Synchronized{base.__name__}", (Synchronized, base), namespace)


def _definer_of_forward(base: type) -> str:
    return next(qualified_name(parent) for parent in base.__mro__ if "forward" in vars(parent))


def _is_foreign_or_done(module: nn.Module) -> bool:
    """True if the module is no batch norm, has fixed statistics, or is synchronised already."""
    if isinstance(module, (Synchronized, DomainBatchNorm, FeatureBatchNorm, MixtureNorm, StoredNormSlot)):
        return True
    if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
        return True  # synchronised within the group its maker chose
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    is_instance_norm = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return "running_var" not in module._buffers or is_instance_norm or "Frozen" in type(module).__name__


def _can_synchronize(module: nn.Module) -> bool:
    """True if the module's class is known to do what ``Synchronized`` would do in its place."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or "forward" in vars(module):
        return False  # the class is about to change, or its forward is not what runs
    return _definer_of_forward(type(module)) in FORWARDS
