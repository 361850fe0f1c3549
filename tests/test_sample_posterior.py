"""norm/sample_posterior.py: CN+ where all vectors of a sample share one posterior, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from models_for_tests import images, small_convnet, vit
from torch import Tensor

import cn_hf
from cn_hf.norm.functional import context_norm_plus


def reference(x: Tensor, mean: Tensor, var: Tensor, eps: float, feature_dim: int, batch: bool, sqrt_t: bool) -> Tensor:
    """Sum the log-densities of each sample's vectors, context by context, in float64."""
    vectors = x.double().movedim(feature_dim, -1)
    shape = vectors.shape
    vectors = vectors.reshape(len(x), -1, shape[-1])
    mean, variance = mean.double(), var.double() + eps
    densities = [torch.distributions.Normal(m, v.sqrt()) for m, v in zip(mean, variance, strict=True)]
    logs = torch.stack([density.log_prob(vectors).sum((1, 2)) for density in densities], dim=1)
    logs = logs - logs.logsumexp(dim=1, keepdim=True)
    posterior = logs.exp()
    result = torch.zeros_like(vectors)
    for context in range(len(mean)):
        m, v = mean[context], variance[context]
        if batch:
            share = (logs[:, context].softmax(0) / vectors.shape[1])[:, None, None]
            m = (share * vectors).sum((0, 1))
            v = (share * (vectors - m).square()).sum((0, 1)) + eps
        result += posterior[:, context, None, None] * (vectors - m) / v.sqrt()
    return (result * (math.sqrt(len(mean)) if sqrt_t else 1)).reshape(shape).movedim(-1, feature_dim)


@pytest.mark.parametrize(("stats", "scale"), [("learned", "none"), ("batch", "sqrt_t"), ("batch", "none")])
@pytest.mark.parametrize("num_contexts", [1, 2, 7])
@pytest.mark.parametrize(
    ("shape", "feature_dim"), [((5, 4, 3, 2), 1), ((5, 6, 4), -1), ((3, 4), 1), ((2, 3, 2, 4), -1), ((4, 4, 1), 1)]
)
def test_it_is_the_definition(
    shape: tuple[int, ...], feature_dim: int, num_contexts: int, stats: str, scale: str
) -> None:
    generator = torch.Generator().manual_seed(len(shape) + num_contexts)
    x = torch.randn(shape, generator=generator)
    mean = torch.randn(num_contexts, 4, generator=generator) * 0.2
    var = torch.rand(num_contexts, 4, generator=generator) + 0.5
    found = context_norm_plus(
        x, mean, var, eps=1e-3, feature_dim=feature_dim, plus_stats=stats, plus_scale=scale, plus_posterior="sample"
    )
    expected = reference(x, mean, var, 1e-3, feature_dim, stats == "batch", scale == "sqrt_t")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_half_precision_and_nothing() -> None:
    mean, var = torch.randn(3, 4, requires_grad=True), torch.rand(3, 4) + 0.5
    x = torch.randn(3, 5, 4, requires_grad=True)
    context_norm_plus(x, mean, var, plus_posterior="sample").square().sum().backward()
    assert x.grad is not None
    assert mean.grad is not None
    assert bool(x.grad.isfinite().all() & mean.grad.isfinite().all())
    half = context_norm_plus(x.detach().half(), mean.detach(), var, plus_posterior="sample")
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.float(), context_norm_plus(x, mean, var, plus_posterior="sample"), rtol=2e-2, atol=2e-2
    )
    assert context_norm_plus(x[:0], mean, var, plus_posterior="sample").shape == (0, 5, 4)


def test_far_means_keep_their_digits() -> None:
    """Contexts at +-1e4 of standard deviation 1, told apart by less than a deviation of their mean."""
    mean = torch.tensor([[1e4, -1e4], [1e4 + 0.5, -1e4]])
    var = torch.ones(2, 2)
    x = mean[[0, 1]][:, None] + 0.01 * torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(0))
    found = context_norm_plus(x, mean, var, eps=0.0, plus_posterior="sample")
    assert found.abs().max() < 0.1


@pytest.mark.parametrize("make", [vit, small_convnet])
def test_patched_models(make: object) -> None:
    model = cn_hf.patch_model(make(), context_names=["a", "b"])  # type: ignore[operator]
    x = images()
    before = model(x, context_ids="a")
    cn_hf.set_inference(model, "cn+", plus_posterior="sample")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in cn_hf.context_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    together = model(x)
    alone = torch.cat([model(x[[row]]) for row in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    config = model.context_config.to_dict()
    assert config["plus_posterior"] == "sample"
    del config["plus_posterior"]
    assert cn_hf.ContextNormConfig.from_dict(config).plus_posterior == "vector"
    with pytest.raises(cn_hf.ConfigError, match="plus_posterior"):
        cn_hf.set_inference(model, "cn+", plus_posterior="pixel")
