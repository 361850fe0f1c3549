"""The exponential moving average of a network's weights during training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cn_hf.training.tensors import as_part_of, local_copy

__all__ = ["WeightAverage"]


class WeightAverage:
    """Averages of all parameters and floating-point buffers of a network: ``a <- decay a + (1 - decay) w`` per step.

    Other buffers are taken as they are.

    Args:
        network: Whose weights; must not change its structure afterwards.
        decay: In [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._network = network
        self._averages = {name: tensor.detach().clone() for name, tensor in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._network.state_dict().items() if isinstance(tensor, Tensor)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights of now into the averages."""
        for name, weight in self._weights().items():
            if weight.is_floating_point():
                self._averages[name].lerp_(weight.detach(), 1 - self.decay)
            else:
                self._averages[name].copy_(weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averages within the block, and its own weights again afterwards."""
        own = {name: tensor.detach().clone() for name, tensor in self._weights().items()}
        self.copy_to_network()
        try:
            yield
        finally:
            self._network.load_state_dict(own, strict=False)

    def copy_to_network(self) -> None:
        """The network gets the averages for good."""
        self._network.load_state_dict(self._averages, strict=False)

    def state(self) -> dict[str, Tensor]:
        """A copy of this process's part of the averages on the CPU."""
        copied: dict[str, Tensor] = local_copy(self._averages)
        return copied

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave."""
        for name, average in self._averages.items():
            average.copy_(as_part_of(average, state[name]))
