"""Rivals of contexts at test time: batch statistics in several streams, TENT, UnMix-TNS, AdaBN, image standardisation.

Each is written from its published formulas. A stream is all test images in all domains, in some order, in batches.

Shape legend: ``N`` images of a batch, ``C`` channels, ``K`` components, ``D`` domains, ``n`` test images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.errors import ConfigError
from cn_hf.evaluation.domains import DomainRow, Domains, Predict

__all__ = [
    "UnmixingNorm",
    "adaptive_batch_norm",
    "instance_network",
    "standardised",
    "stream_row",
    "tent",
    "tuned_tent_rate",
    "unmixing_network",
]

Order = Literal["mixed", "one domain", "sorted"]
BATCH = 200
TENT_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@torch.no_grad()
def stream_row(
    start: Callable[[], Predict],
    domains: Domains,
    name: str,
    *,
    order: Order,
    batch_size: int = BATCH,
    seed: int = 0,
    needs: str = "",
) -> DomainRow:
    """Return the row of a method that sees a stream of batches and may adapt to it.

    Args:
        start: makes the method anew: once for a mixed stream, else for each domain.
        domains: test images.
        name: of the row.
        order: ``"mixed"``: images of all domains in random order; ``"one domain"``: one domain after the other, each in
            random order; ``"sorted"``: likewise, each sorted by class.
        batch_size: images of a batch.
        seed: of the order.
        needs: see ``DomainRow``.
    """
    if order not in ("mixed", "one domain", "sorted"):
        raise ConfigError(f"Expected an order 'mixed', 'one domain' or 'sorted', received {order!r}.")
    count, names = len(domains.labels), list(domains.test)
    generator = torch.Generator().manual_seed(seed)
    correct = torch.zeros(len(names), count, dtype=torch.bool)
    if order == "mixed":
        streams = [torch.randperm(len(names) * count, generator=generator)]
    else:
        orders = [torch.randperm(count, generator=generator) for _ in names]
        if order == "sorted":
            orders = [rows[domains.labels[rows].argsort(stable=True)] for rows in orders]
        streams = [number * count + rows for number, rows in enumerate(orders)]
    for stream in streams:
        predict = start()
        for batch in torch.split(stream, batch_size):
            places = [(int(place) // count, int(place) % count) for place in batch]
            images = torch.stack([domains.test[names[domain]][image] for domain, image in places])
            found = predict(images).float().argmax(-1)
            at = batch // count, batch % count
            correct[at] = found == domains.labels[at[1]]
    return DomainRow(name, dict(zip(names, correct, strict=True)), needs)


def _with_norms(network: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Return a copy of a network with another module for each batch norm."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _Kept(child, make(child)) if hasattr(child, "act") else make(child))
    return network.eval()


class _Kept(nn.Module):
    """A norm in the place of timm's norm with activation: its dropout and activation follow."""

    def __init__(self, before: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = getattr(before, "drop", nn.Identity())
        self.act = before.act

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm's output, activated."""
        activated: Tensor = self.act(self.drop(self.norm(x)))  # type: ignore[operator]
        return activated


def instance_network(network: nn.Module) -> nn.Module:
    """Return a copy whose batch norms take the statistics of each image alone: batch statistics of batches of one."""

    def make(norm: nn.BatchNorm2d) -> nn.Module:
        alone = nn.InstanceNorm2d(norm.num_features, eps=norm.eps, affine=norm.affine)
        if norm.affine:
            alone.load_state_dict({"weight": norm.weight.detach(), "bias": norm.bias.detach()})
        return alone

    return _with_norms(network, make)


@torch.no_grad()
def adaptive_batch_norm(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose batch norms have the statistics of these images (AdaBN, Li et al. 2016)."""
    network = copy.deepcopy(network)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    network(images)
    return network.eval()


def standardised(images: Tensor) -> Tensor:
    """Return images whose channels have mean 0 and standard deviation 1, each by itself."""
    deviation, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return (images - mean) / deviation.clamp_min(1e-6)


# ----------------------------------------------------------------------------------------------------------------- TENT


def tent(network: nn.Module, learning_rate: float) -> Predict:
    """Return a way to predict that minimises the entropy of each batch (TENT, Wang et al. 2021).

    Batch norms take the batch's statistics, and their affine maps make one Adam step a batch.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    weights: list[Tensor] = []
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.train()
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
            weights += [weight.requires_grad_(True) for weight in (norm.weight, norm.bias)]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)

    def predict(images: Tensor) -> Tensor:
        with torch.enable_grad():
            logits: Tensor = network(images)
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            entropy.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return logits.detach()

    return predict


def tuned_tent_rate(network: nn.Module, tuning: Domains, *, seed: int = 0) -> float:
    """Return TENT's best learning rate in the mixed stream of domains that no result is computed on."""
    accuracies = {
        rate: stream_row(lambda rate=rate: tent(network, rate), tuning, "", order="mixed", seed=seed).accuracy(  # type: ignore[misc]
            list(tuning.test)
        )
        for rate in TENT_RATES
    }
    return max(accuracies, key=lambda rate: accuracies[rate])


# ------------------------------------------------------------------------------------------------------------ UnMix-TNS


class UnmixingNorm(nn.Module):
    """A batch norm with UnMix-TNS (Tomar et al., ICLR 2024): each image's statistics mixed with those of K components.

    An image belongs to components by the cosine similarity of its channel means with theirs, as probabilities p. The
    statistics that normalise it are those of the equal mixture of ``(1 - p) component + p image`` over components; each
    component then moves towards the images that belong to it. Components start around the stored statistics, so that
    their mixture has the stored mean and variance.

    Args:
        norm: of the trained network.
        components: ``K``; the paper's 16, or 128 for long mixed streams.
        temperature: of the probabilities.
        rate: of the components' moves.
        spread: part of the stored variance that lies between components at the start.
        seed: of the start.
    """

    means: Tensor
    variances: Tensor

    def __init__(
        self,
        norm: nn.BatchNorm2d,
        *,
        components: int = 16,
        temperature: float = 0.07,
        rate: float = 0.01,
        spread: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ConfigError("Expected a batch norm with running statistics, received one without.")
        self.eps, self.temperature, self.rate = norm.eps, temperature, rate
        self.weight, self.bias = norm.weight, norm.bias
        drawn = torch.randn(components, norm.num_features, generator=torch.Generator().manual_seed(seed))
        drawn = (drawn - drawn.mean(0)) / drawn.std(0, correction=0).clamp_min(1e-6)
        self.register_buffer("means", mean + (spread * variance).sqrt() * drawn)
        self.register_buffer("variances", ((1 - spread) * variance).expand(components, -1).clone())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``."""
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        similarity = F.normalize(mean, dim=1) @ F.normalize(self.means, dim=1).T
        belongs = (similarity / self.temperature).softmax(1)[:, :, None]  # (N, K, 1)
        means = torch.lerp(self.means[None], mean[:, None], belongs)
        variances = torch.lerp(self.variances[None], variance[:, None], belongs)
        mixed = means.mean(1)
        mixed_variance = variances.mean(1) + means.square().mean(1) - mixed.square()
        self.means += self.rate * (means - self.means).mean(0)
        self.variances += self.rate * (variances - self.variances).mean(0)
        normalised = (x - mixed[:, :, None, None]) / (mixed_variance[:, :, None, None] + self.eps).sqrt()
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


def unmixing_network(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a copy whose batch norms are UnMix-TNS's."""
    return _with_norms(network, lambda norm: UnmixingNorm(norm, seed=seed))
