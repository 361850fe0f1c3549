"""norm/baselines.py: MixtureNorm against tests/reference.py, on one process and two; FeatureBatchNorm against torch."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from processes import run_together
from torch import Tensor, nn

from cn_hf.errors import CnHfError, ConfigError, InputShapeError
from cn_hf.norm import FeatureBatchNorm, MixtureNorm, baselines, em
from cn_hf.norm.functional import mixture_norm

BUFFERS = ("theta_mean", "theta_var", "theta_prior", "running_mean", "running_var")


def modes(shape: tuple[int, ...] = (16, 3, 4, 4), *, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch whose vectors come from three clusters."""
    generator = torch.Generator().manual_seed(100 + step)
    centers = torch.tensor([[0.0, 2, 4], [5, -3, 0], [-4, 1, -5]], dtype=torch.float64)
    vectors = shape[0] * torch.tensor(shape[2:]).prod().item()
    which = torch.randint(3, (vectors,), generator=generator)
    x = centers[which] + torch.randn(vectors, 3, generator=generator, dtype=torch.float64)
    return x.reshape(shape[0], *shape[2:], 3).movedim(-1, 1).to(dtype).contiguous()


def vectors_of(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def buffers_of(layer: MixtureNorm) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in BUFFERS}


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("affine", [False, True])
def test_three_training_steps_by_hand(affine: bool) -> None:
    options = {"momentum": 0.25, "em_iterations": 2, "seed_iterations": 4, "reg_covar": 1e-4, "eps": 1e-3, "seed": 5}
    layer = MixtureNorm(3, 3, affine=affine, dtype=torch.float64, **options)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    running: dict[str, Tensor] = {}
    for step in range(3):
        x = modes((4, 3, 3, 2), step=step, dtype=torch.float64).requires_grad_()
        vectors = vectors_of(x.detach())
        if step == 0:
            theta = em.seed_mixture(vectors, 3, seed=5, reg_covar=1e-4)[:3]
        else:
            theta = tuple(running[name] for name in BUFFERS[:3])
        for _ in range(4 if step == 0 else 2):
            *theta, _ = reference.em_step(vectors, *theta, reg_covar=1e-4)
        affine_map = {"weight": layer.weight, "bias": layer.bias}
        expected, m, v = reference.mixture_norm(x, *theta, eps=1e-3, feature_dim=1, **affine_map)
        actual = layer(x)
        torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-7)
        wanted = [x, *layer.parameters()]
        direction = torch.randn_like(x)
        mine, slow = (torch.autograd.grad(out, wanted, direction) for out in (actual, expected))
        for a, b in zip(mine, slow, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        newest = dict(zip(BUFFERS, (*theta, m.detach(), v.detach()), strict=True))
        running = {name: value if step == 0 else 0.75 * running[name] + 0.25 * value for name, value in newest.items()}
        for name, value in buffers_of(layer).items():
            torch.testing.assert_close(
                value, running[name], atol=1e-7, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
        assert int(layer.num_batches_tracked) == step + 1
    layer.eval()
    x = modes((4, 3, 3, 2), step=9, dtype=torch.float64)
    with torch.no_grad():
        statistics = running["running_mean"], running["running_var"]
        expected, *_ = reference.mixture_norm(
            x, *(running[n] for n in BUFFERS[:3]), eps=1e-3, feature_dim=1, statistics=statistics, **affine_map
        )
    torch.testing.assert_close(layer(x), expected, atol=1e-7, rtol=1e-7)


def test_gradcheck_with_theta_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MixtureNorm(3, 3, affine=True, dtype=torch.float64, eps=1e-2)
    x = modes((3, 3, 2, 1), dtype=torch.float64).requires_grad_()
    layer(x)
    theta = em.Mixture(layer.theta_mean.clone(), layer.theta_var + 1, layer.theta_prior.clone(), torch.zeros(()), 0)
    monkeypatch.setattr(layer, "_fit", lambda *_: theta)
    weight, bias = (parameter.detach().requires_grad_() for parameter in (layer.weight, layer.bias))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_the_first_step_finds_the_clusters() -> None:
    layer = MixtureNorm(3)
    layer(modes((64, 3, 4, 4)))
    centers = torch.tensor([[0.0, 2, 4], [5, -3, 0], [-4, 1, -5]])
    distance = torch.cdist(layer.theta_mean, centers)
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2]
    assert distance.amin(1).max() < 0.3
    torch.testing.assert_close(layer.theta_var, torch.ones(3, 3), atol=0.3, rtol=0)
    torch.testing.assert_close(layer.theta_prior, torch.full((3,), 1 / 3), atol=0.1, rtol=0)


def test_later_steps_start_from_the_running_mixture() -> None:
    layer = MixtureNorm(3, momentum=1.0, em_iterations=1)
    layer(modes())
    order = layer.theta_mean[:, 0].argsort().tolist()
    for step in range(1, 6):
        layer(modes(step=step))
        assert layer.theta_mean[:, 0].argsort().tolist() == order, "reseeding would shuffle the components"


def test_evaluation_changes_no_state_and_needs_no_batch() -> None:
    layer = MixtureNorm(3)
    layer(modes())
    layer.eval()
    before, x = copy.deepcopy(layer.state_dict()), modes(step=1)
    whole = layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    torch.testing.assert_close(torch.cat([layer(x[i : i + 1]) for i in range(len(x))]), whole, atol=1e-5, rtol=1e-5)
    assert layer(x[:0]).shape == (0, 3, 4, 4)


def test_it_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = MixtureNorm(3)
        state = torch.random.get_rng_state()
        outs.append([layer(modes(step=step)) for step in range(3)])
        assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
    starts = [MixtureNorm(3, seed=seed, seed_iterations=1) for seed in range(4)]
    for layer in starts:
        layer(modes())
    assert any(not torch.equal(starts[0].theta_mean, layer.theta_mean) for layer in starts[1:])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "torch.save", "assign"])
def test_a_reloaded_layer_continues_identically(way: str) -> None:
    layer = MixtureNorm(3, affine=True)
    for step in range(2):
        layer(modes(step=step))
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = MixtureNorm(3, affine=True)
        twin.load_state_dict(copy.deepcopy(layer.state_dict()), assign=way == "assign")
    for step in range(2, 5):
        assert torch.equal(layer(modes(step=step)), twin(modes(step=step)))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.eval()(modes()), twin.eval()(modes()))


def test_a_layer_whose_buffers_were_filled_in_place_continues() -> None:
    """As loaders do that call no ``load_state_dict``."""
    trained, fresh = MixtureNorm(4), MixtureNorm(4)
    x = torch.randn(5, 4, 6, 6)
    for _ in range(3):
        trained(x)
    for name, buffer in trained.named_buffers():
        fresh.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(fresh(x), trained(x))
    torch.testing.assert_close(fresh.state_dict(), trained.state_dict())


def test_what_is_kept_of_past_batches_is_neither_copied_nor_moved() -> None:
    norm = MixtureNorm(4, max_vectors=50)
    norm(torch.randn(5, 4, 6, 6))
    kept = norm._fitted[-1]
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert not copied._fitted
        assert copied._places is None
        assert copied._fitted.maxlen == norm._fitted.maxlen
    assert norm._fitted[-1] is kept
    norm.double()
    assert not norm._fitted
    assert norm._places is None


def test_a_fresh_state_loaded_into_a_trained_layer_seeds_again() -> None:
    layer, fresh = MixtureNorm(3), MixtureNorm(3)
    layer(modes())
    layer.load_state_dict(fresh.state_dict())
    assert torch.equal(layer(modes(step=1)), fresh(modes(step=1)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_activation_checkpointing_changes_nothing(steps_before: int, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        layer = MixtureNorm(3)
        for step in range(steps_before):
            layer(modes(step=step))
        x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(7)).requires_grad_()
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        out.mul(modes(step=8)).sum().backward()
        results.append((out.detach(), x.grad, buffers_of(layer), int(layer.num_batches_tracked)))
    (out, grad, buffers, count), (other_out, other_grad, other_buffers, other_count) = results
    assert torch.equal(out, other_out)
    assert count == other_count
    assert all(torch.equal(value, other_buffers[name]) for name, value in buffers.items())
    torch.testing.assert_close(other_grad, grad, atol=1e-6, rtol=1e-6)


def test_the_subsample_of_vectors_sees_every_place_of_a_map() -> None:
    layer = MixtureNorm(1, 2, max_vectors=256)
    x = torch.randn(32, 1, 8, 8)
    x[..., 0] += 100  # one column in eight, as a padded border might be
    layer(x)
    prior, order = layer.theta_prior, layer.theta_mean[:, 0].argsort()
    torch.testing.assert_close(layer.theta_mean[order, 0], torch.tensor([0.0, 100.0]), atol=1.0, rtol=0)
    torch.testing.assert_close(prior[order], torch.tensor([7 / 8, 1 / 8]), atol=0.06, rtol=0)


def test_the_subsample_is_no_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    layer = MixtureNorm(3, max_vectors=100, seed_iterations=1, em_iterations=1)

    def spy(x: Tensor, *args: Any, **options: Any) -> em.Mixture:
        seen.append(len(x))
        return em.fit_mixture(x, *args, **options)

    monkeypatch.setattr(baselines, "fit_mixture", spy)
    for shape in ((16, 3, 4, 4), (2, 3, 5, 5), (13, 3, 7, 3), (1, 3, 1, 1)):
        layer(modes(shape))
    assert seen[1] == 50
    assert seen[3] == 1
    assert all(50 <= count <= 100 for count in (seen[0], seen[2]))


def test_training_on_nothing_is_an_error_and_on_one_vector_is_not() -> None:
    layer = MixtureNorm(3)
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        with pytest.raises(InputShapeError, match="empty"):
            layer(torch.zeros(shape))
    assert int(layer.num_batches_tracked) == 0
    out = layer(torch.randn(1, 3, 1, 1))
    assert out.isfinite().all()
    assert all(value.isfinite().all() for value in buffers_of(layer).values())
    assert layer(torch.zeros(4, 3, 2, 2)).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, training: bool) -> None:
    layer = MixtureNorm(3, affine=True)
    layer(modes())
    layer.train(training)
    wide = copy.deepcopy(layer)
    x = (modes(step=1) * 100).to(dtype).requires_grad_()
    out, expected = layer(x), wide(x.detach().float())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-2)
    for name, value in buffers_of(layer).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, buffers_of(wide)[name], atol=1e-4, rtol=1e-4)
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert all(value.dtype == torch.float32 for value in buffers_of(MixtureNorm(3, dtype=dtype)).values())


def test_autocast_changes_nothing() -> None:
    layer = MixtureNorm(3)
    twin = copy.deepcopy(layer)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = layer(modes(step=step))
        assert torch.equal(inside, twin(modes(step=step)))
    assert torch.equal(layer.running_var, twin.running_var)


def test_layouts() -> None:
    x = modes()
    channels, tokens = MixtureNorm(3, feature_dim=1), MixtureNorm(3, feature_dim=-1)
    out = channels(x)
    assert out.is_contiguous()
    torch.testing.assert_close(tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), out)
    last = MixtureNorm(3)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out, rtol=0, atol=1e-4)  # logarithms of posteriors are in the hundreds
    flat = MixtureNorm(3, feature_dim=-1)(vectors_of(x))
    torch.testing.assert_close(flat, vectors_of(last))


@pytest.mark.parametrize(
    "options",
    [
        {"num_components": 0},
        {"num_features": 0},
        {"momentum": 0.0},
        {"momentum": 1.5},
        {"em_iterations": 0},
        {"seed_iterations": -1},
        {"max_vectors": 0},
        {"reg_covar": -1.0},
        {"eps": 0.0},
        {"feature_dim": 0},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        MixtureNorm(**{"num_features": 3, **options})


def test_wrong_inputs() -> None:
    layer = MixtureNorm(3)
    for shape in ((3,), (2, 4), (2, 4, 3)):
        with pytest.raises(InputShapeError, match="3"):
            layer(torch.zeros(shape))
    with pytest.raises(CnHfError):
        layer(torch.zeros(2, 3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------- two processes


def collect(parts: list[Tensor]) -> dict[str, Any]:
    """What one process computes from its part of each batch; the parts of one process are the whole."""
    first, second, third = parts
    distributed = dist.is_initialized()
    result: dict[str, Any] = {"centers": em.kmeans_plusplus(vectors_of(first), 5, seed=3, distributed=distributed)}
    seeded = em.seed_mixture(vectors_of(first), 3, seed=3, distributed=distributed)
    result["seeded"] = seeded[:3]
    fitted = em.fit_mixture(vectors_of(first), *seeded[:3], num_iterations=50, tol=1e-4, distributed=distributed)
    result["fitted"] = fitted[:4]
    result["iterations"] = fitted.num_iterations
    x = first.clone().requires_grad_()
    out, statistics = mixture_norm(x, fitted, feature_dim=1, distributed=distributed)
    (result["gradient"],) = torch.autograd.grad(out.pow(3).sum(), x)
    result["statistics"] = tuple(statistic.detach() for statistic in statistics)
    layer = MixtureNorm(3, affine=True, dtype=torch.float64)
    result["outs"], result["grads"] = [], []
    for part in (first, second, third):
        x = part.clone().requires_grad_()
        out = layer(x)
        result["outs"].append(out.detach())
        result["grads"].append(torch.autograd.grad(out.pow(3).sum(), x)[0])
    result["state"] = layer.state_dict()
    result["eval"] = layer.eval()(first)
    result["thinned"] = train_thinned(parts)
    result["checkpointed"] = train_checkpointed(parts)
    far = MixtureNorm(3, dtype=torch.float32)
    result["far"] = far(third.float() * 0.01 + 100).double(), far.running_var.double()
    with pytest.raises(InputShapeError, match="empty"):
        MixtureNorm(3)(torch.zeros(0, 3, 4, 4))
    constant = torch.full((len(first) * 2, 2), 5.0) if len(first) < 6 else torch.zeros(0, 2)
    if not distributed:
        constant = torch.full((8, 2), 5.0)
    result["constant"] = em.kmeans_plusplus(constant, 3, distributed=distributed)
    return result


def train_thinned(parts: list[Tensor]) -> dict[str, Any]:
    """Three steps, each fitted on one in five of the vectors of all processes."""
    layer = MixtureNorm(3, max_vectors=13, dtype=torch.float64)
    outs = [layer(part) for part in parts]
    return {"outs": outs, "state": layer.state_dict()}


def train_checkpointed(parts: list[Tensor]) -> dict[str, Any]:
    """Several forwards before one backward, which runs them again: each must find the mixture it used."""
    layer, total, inputs = MixtureNorm(3, dtype=torch.float64, max_vectors=13), 0, []
    for part in reversed(parts):
        inputs.append(part.clone().requires_grad_())
        total = total + torch.utils.checkpoint.checkpoint(layer, inputs[-1], use_reentrant=False).pow(3).sum()
    total.backward()
    return {"grads": [x.grad for x in inputs], "state": layer.state_dict()}


def batches() -> list[Tensor]:
    return [modes((10, 3, 2, 3), step=step, dtype=torch.float64) for step in range(3)]


def part_of(batch: Tensor, step: int, rank: int) -> Tensor:
    cut = (6, 5, 10)[step]  # unequal, equal, and nothing at all for the second process
    return batch[:cut] if rank == 0 else batch[cut:]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        parts = [part_of(batch, step, rank) for step, batch in enumerate(batches())]
        torch.save(collect(parts), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the first of two processes, the second, and one alone computed."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_together(work, str(folder))
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return first, second, collect(batches())


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_two_processes_seed_and_fit_as_one(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = results
    for result in (first, second):
        assert torch.equal(result["centers"], one["centers"])
        assert result["iterations"] == one["iterations"]
        for name in ("seeded", "fitted"):
            same(result[name], one[name])


def test_two_processes_share_statistics_and_gradients_as_one(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = results
    same(first["statistics"], one["statistics"])
    same(second["statistics"], one["statistics"])
    same(torch.cat([first["gradient"], second["gradient"]]), one["gradient"])


def test_two_processes_train_a_layer_as_one(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = results
    for name in ("outs", "grads"):
        for a, b, whole in zip(first[name], second[name], one[name], strict=True):
            same(torch.cat([a, b]), whole)
    same(dict(first["state"]), dict(one["state"]))
    same(dict(second["state"]), dict(one["state"]))
    same(torch.cat([first["eval"], second["eval"]]), one["eval"])


def test_two_processes_thin_the_batch_as_one(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = (result["thinned"] for result in results)
    for a, b, whole in zip(first["outs"], second["outs"], one["outs"], strict=True):
        same(torch.cat([a, b]), whole)
    same(dict(first["state"]), dict(one["state"]))
    same(dict(second["state"]), dict(one["state"]))


def test_two_processes_recompute_as_one(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = (result["checkpointed"] for result in results)
    for a, b, whole in zip(first["grads"], second["grads"], one["grads"], strict=True):
        same(torch.cat([a, b]), whole)
    same(dict(first["state"]), dict(one["state"]))
    plain, total = MixtureNorm(3, dtype=torch.float64, max_vectors=13), 0
    inputs = [batch.requires_grad_() for batch in reversed(batches())]
    for x in inputs:
        total = total + plain(x).pow(3).sum()
    same(list(torch.autograd.grad(total, inputs)), one["grads"])


def test_an_empty_part_costs_no_digits_far_from_zero(results: tuple[dict[str, Any], ...]) -> None:
    (out, var), (nothing, _), (whole, expected_var) = (result["far"] for result in results)
    assert len(nothing) == 0
    torch.testing.assert_close(var, expected_var, atol=0, rtol=1e-4)
    torch.testing.assert_close(out, whole, atol=1e-4, rtol=0)


def test_equal_vectors_that_the_second_process_alone_holds(results: tuple[dict[str, Any], ...]) -> None:
    first, second, one = results
    assert torch.equal(first["constant"], one["constant"])
    assert torch.equal(second["constant"], one["constant"])


# --------------------------------------------------------------------------------------------------- FeatureBatchNorm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "feature_dim"), [((4, 3, 5, 5), 1), ((4, 6, 3), -1), ((4, 5, 5, 3), -1), ((8, 3), -1)]
)
def test_feature_batch_norm_is_batch_norm(shape: tuple[int, ...], feature_dim: int, affine: bool) -> None:
    layer = FeatureBatchNorm(3, feature_dim=feature_dim, affine=affine, momentum=0.3)
    plain = nn.BatchNorm1d(3, affine=affine, momentum=0.3)
    for step in range(4):
        layer.train(step < 3)
        plain.train(step < 3)
        x = torch.randn(shape, requires_grad=True)
        vectors = x.movedim(feature_dim, -1)
        expected = plain(vectors.reshape(-1, 3)).reshape(vectors.shape).movedim(-1, feature_dim)
        actual = layer(x)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        direction = torch.randn(shape)
        for a, b in zip(
            torch.autograd.grad(actual, [x, *layer.parameters()], direction),
            torch.autograd.grad(expected, [x, *plain.parameters()], direction),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm), "SyncBatchNorm conversion and others look for it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature_dim", [1, -1])
def test_feature_batch_norm_keeps_the_dtype(dtype: torch.dtype, feature_dim: int) -> None:
    layer = FeatureBatchNorm(3, feature_dim=feature_dim)
    x = torch.randn((64, 3, 5) if feature_dim == 1 else (64, 5, 3)).to(dtype)
    weight, bias = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    for training in (True, False):
        layer.train(training)
        assert layer(x).dtype == dtype
        out = layer(x, weight=weight, bias=bias)
        assert out.dtype == dtype
        shape = [1, 3, 1] if feature_dim == 1 else [1, 1, 3]
        expected = layer(x).float() * weight.view(shape) + bias.view(shape)
        torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=2e-2)
    assert layer.running_mean.dtype == torch.float32


def test_feature_batch_norm_layouts_and_bad_input() -> None:
    x = torch.randn(4, 3, 5, 6)
    assert FeatureBatchNorm(3)(x).is_contiguous()
    assert FeatureBatchNorm(3)(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        FeatureBatchNorm(3, feature_dim=-1)(x.movedim(1, -1)).movedim(-1, 1), FeatureBatchNorm(3)(x)
    )
    assert FeatureBatchNorm(3).eval()(x[:0]).shape == (0, 3, 5, 6)
    for shape in ((3,), (2, 4), (2, 4, 3)):
        with pytest.raises(InputShapeError, match="3"):
            FeatureBatchNorm(3)(torch.zeros(shape))
        with pytest.raises(InputShapeError, match="3"):
            FeatureBatchNorm(3, feature_dim=-1)(torch.zeros(shape[0], *shape[1:][::-1]))
    with pytest.raises(ConfigError):
        FeatureBatchNorm(3, feature_dim=0)


def test_an_empty_training_batch_does_not_spoil_running_statistics() -> None:
    layer = FeatureBatchNorm(3)
    layer(torch.randn(4, 3, 5))
    with contextlib.suppress(ValueError):
        layer(torch.zeros(0, 3, 5))
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_feature_batch_norm_copies(way: Any) -> None:
    layer = FeatureBatchNorm(3, feature_dim=-1, affine=True)
    layer(torch.randn(4, 5, 3))
    twin, x = way(layer), torch.randn(4, 5, 3)
    assert torch.equal(twin(x), layer(x))
    assert twin.running_mean.data_ptr() != layer.running_mean.data_ptr()
