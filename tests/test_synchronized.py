"""norm/synchronized.py and patching/synchronize.py: two real processes against one that holds the whole batch."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_together
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cn_hf
import cn_hf.models  # registers the ConvNet with timm
from cn_hf.norm import DomainBatchNorm, FeatureBatchNorm, MixtureNorm
from cn_hf.norm.synchronized import synchronized_batch_norm
from cn_hf.patching.synchronize import synchronize_batch_norms

CUTS = {"uneven": 6, "even": 5, "second empty": 10, "first empty": 0, "one vector apart": 9}  # of a batch of ten
LAYOUTS = {
    "maps": ((10, 3, 2, 3), 1),
    "tokens": ((10, 5, 3), -1),
    "vectors": ((10, 3), 1),
    "volumes": ((10, 3, 2, 1, 2), 1),
}


def part_of(whole: Tensor, cut: int, rank: int | None) -> Tensor:
    """The part of one of two processes; for None, of one process alone."""
    return whole if rank is None else whole[:cut] if rank == 0 else whole[cut:]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------- what a process computes


def call_the_function(rank: int | None, shape: tuple[int, ...], feature_dim: int, cut: int, dtype: torch.dtype) -> Any:
    """Outputs, gradients and running statistics of two steps; those of torch's own batch norm for one process."""
    weight, bias = (random(3, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    running_mean, running_var = random(3, seed=3, dtype=dtype), random(3, seed=4, dtype=dtype).square()
    steps = []
    for step in range(2):
        whole = random(*shape, seed=10 + step, dtype=dtype) * 3 + 5
        x = part_of(whole, cut, rank).clone().requires_grad_()
        direction = part_of(random(*shape, seed=20 + step, dtype=dtype), cut, rank)
        if rank is None:
            moved = x.movedim(feature_dim, 1)
            out = F.batch_norm(moved, running_mean, running_var, weight, bias, True, 0.3, 1e-3).movedim(1, feature_dim)
        else:
            out = synchronized_batch_norm(
                x, running_mean, running_var, weight, bias, momentum=0.3, eps=1e-3, feature_dim=feature_dim
            )
        grads = torch.autograd.grad((out.sin() * direction).sum(), (x, weight, bias))
        steps.append({"out": out.detach(), "grads": grads, "running": (running_mean.clone(), running_var.clone())})
    return steps


def misuse_and_edges(rank: int) -> dict[str, Any]:
    """What only processes that belong together can meet."""
    result: dict[str, Any] = {"one vector": []}
    for features, feature_dim in ((torch.ones(1, 3, 1, 1), 1), (torch.ones(1, 1, 3), -1)):
        running = torch.full((3,), 7.0)
        try:
            synchronized_batch_norm(part_of(features, 1, rank), running, None, feature_dim=feature_dim)
        except ValueError as error:
            result["one vector"].append((str(error), running))
    running = torch.full((3,), 7.0), torch.full((3,), 8.0)
    x = torch.zeros(0, 3, 4, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    out = synchronized_batch_norm(x, *running, weight)
    result["nothing"] = out.shape, running, torch.autograd.grad(out.sum(), (x, weight))
    two = synchronized_batch_norm(torch.full((1, 3), float(rank)), None, None, eps=1e-9)
    result["two vectors"] = two
    far = random(64, 3, seed=5) + torch.tensor([0.0, 1e4, -1e5], dtype=torch.float64)
    result["far"] = synchronized_batch_norm(part_of(far, 20, rank).float(), None, None)
    for dtype in (torch.float16, torch.bfloat16):
        half = part_of(random(64, 3, seed=6) * 2000 + 9000, 20, rank).to(dtype).requires_grad_()
        statistics = torch.zeros(3), torch.ones(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = synchronized_batch_norm(half, *statistics, torch.ones(3), torch.zeros(3))
        (grad,) = torch.autograd.grad(out.float().pow(3).sum(), half)
        result[str(dtype)] = out.detach(), grad, statistics
    result["layout"] = synchronized_batch_norm(
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), None, None
    ).is_contiguous(memory_format=torch.channels_last)
    return result


def count_collectives() -> dict[str, int]:
    """Collectives of one forward and one backward of a batch norm."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counted(name: str) -> Callable[..., Any]:
        return lambda *args, **options: (calls.append(name), originals[name](*args, **options))[1]

    x = torch.randn(4, 3, requires_grad=True)
    try:
        for name in originals:
            setattr(dist, name, counted(name))
        out = synchronized_batch_norm(x, torch.zeros(3), torch.ones(3))
        forward = len(calls)
        out.square().sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"forward": forward, "backward": len(calls) - forward}


class Norms(nn.Module):
    """One of each ordinary batch norm and option, all on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict(
            {
                "plain": nn.BatchNorm2d(3),
                "average": nn.BatchNorm2d(3, momentum=None),
                "still": nn.BatchNorm2d(3, momentum=0.0),
                "untracked": nn.BatchNorm2d(3, track_running_stats=False),
                "bare": nn.BatchNorm2d(3, affine=False),
                "fused": BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Identity),
                "without act": BatchNormAct2d(3, apply_act=False),
                "sync": nn.SyncBatchNorm(3),
                "frozen": nn.BatchNorm2d(3),
                "feature": FeatureBatchNorm(3, affine=True),
            }
        )
        self.flat, self.volume, self.tokens = nn.BatchNorm1d(3), nn.BatchNorm3d(3), FeatureBatchNorm(3, feature_dim=-1)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data.copy_(random(*parameter.shape, seed=seed))

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.norms["frozen"].eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outs = {name: norm(x) for name, norm in self.norms.items()}
        outs |= {"flat": self.flat(x.flatten(2)), "volume": self.volume(x[..., None])}
        return outs | {"tokens": self.tokens(x.movedim(1, -1))}


def run_norms(rank: int | None) -> dict[str, Any]:
    model = Norms().double()
    with synchronize_batch_norms(model) if rank is not None else contextlib.nullcontext():
        outs, grads = [], []
        for step, cut in enumerate((6, 10, 3)):
            x = part_of(random(10, 3, 4, 3, seed=40 + step) * 2 + 1, cut, rank).requires_grad_()
            out = model(x)
            outs.append({name: value.detach() for name, value in out.items()})
            grads.append(torch.autograd.grad(sum(value.sin().sum() for value in out.values()), x)[0])
        state = copy.deepcopy(model.state_dict())
        model.eval()
        evaluated = {name: value.detach() for name, value in model(part_of(random(10, 3, 4, 3), 6, rank)).items()}
        if rank is not None:
            evaluated.pop("untracked")  # in evaluation each process normalises by its own part, as torch's does
    return {"outs": outs, "grads": grads, "state": dict(state), "evaluated": evaluated}


def run_domain_norm(rank: int | None) -> dict[str, Any]:
    """Contexts that one process has none of, one vector of, or that neither has; a part without samples."""
    outs, ids = [], torch.tensor([0, 0, 2, 0, 2, 2, 1, 1, 1, 0])
    norm = DomainBatchNorm(3, 4, dtype=torch.float64)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed))
    for step, cut in enumerate((6, 10, 0, 7)):
        x = part_of(random(10, 3, 4, seed=60 + step) * 2 + 9, cut, rank).clone().requires_grad_()
        out = norm(x, part_of(ids, cut, rank))
        outs.append((out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *norm.parameters()])))
    return {"steps": outs, "state": {name: value.clone() for name, value in norm.state_dict().items()}}


def smooth_net(*norms: nn.Module) -> nn.Module:
    """Without pools and kinks that would take either side of a tie for one rounding error."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2), *norms, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return nn.Sequential(*layers)


def timm_net(name: str, *, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=5)
    if checkpointing and dist.is_initialized():  # alone, torch's batch norms would move their statistics twice
        model.set_grad_checkpointing()
    return model


def contexts_net() -> nn.Module:
    model = timm_net("test_resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fresh network has no statistics to start from
        return cn_hf.patch_model(model, "cn-channels", where=["bn1"], num_contexts=2)


def baseline_net(mode: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("cn_digits_convnet", num_classes=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fresh network has no statistics to start from
        return cn_hf.patch_model(model, mode, where=["bn2"], **options)


def mixture_net() -> nn.Module:
    model = baseline_net("mn", num_contexts=3)
    for module in model.modules():
        if isinstance(module, MixtureNorm):
            module.max_vectors = 700  # of 12 * 16 * 16: one in five
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.dtype, int]] = {
    "resnet": (lambda: timm_net("test_resnet"), torch.float32, 3),
    "resnet, double": (lambda: timm_net("test_resnet"), torch.float64, 3),
    "resnet, checkpointing": (lambda: timm_net("test_resnet", checkpointing=True), torch.float64, 3),
    "fused activations": (lambda: timm_net("test_efficientnet"), torch.float64, 3),
    "fused activations, checkpointing": (lambda: timm_net("test_efficientnet", checkpointing=True), torch.float64, 3),
    "contexts": (contexts_net, torch.float64, 3),
    "bn": (lambda: baseline_net("bn"), torch.float64, 3),
    "mn": (mixture_net, torch.float64, 20),
    "mn, bn, single": (
        lambda: smooth_net(MixtureNorm(6, max_vectors=700, affine=True), nn.BatchNorm2d(6)),
        torch.float32,
        20,
    ),
}


def train(rank: int | None, make: Callable[[], nn.Module], dtype: torch.dtype, num_steps: int) -> dict[str, Any]:
    """Train under DDP as ``cn_hf.training`` does: loss sums weighted by processes / images of all processes."""
    model = make().to(dtype).train()
    with synchronize_batch_norms(model) if rank is not None else contextlib.nullcontext():
        wrapped = model if rank is None else DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        gradients = []
        for step in range(num_steps):
            cut = (12, 7, 0, 5)[step % 4]  # nothing for the second process at first, then for the first
            images = random(12, 3, 32, 32, seed=60 + step, dtype=dtype)
            images += torch.arange(12, dtype=dtype).view(-1, 1, 1, 1) % 3  # parts that are unlike each other
            labels = torch.randint(5, (12,), generator=torch.Generator().manual_seed(step))
            ids = (
                {"context_ids": part_of(labels % 2, cut, rank)}
                if getattr(make, "__name__", "") == "contexts_net"
                else {}
            )
            logits = wrapped(part_of(images, cut, rank), **ids)
            loss = F.cross_entropy(logits, part_of(labels, cut, rank), reduction="sum")
            (loss * ((1 if rank is None else 2) / 12)).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    return {"gradients": gradients, "state": dict(model.state_dict())}


def train_compiled(rank: int | None) -> list[Tensor]:
    model = smooth_net(nn.BatchNorm2d(6), FeatureBatchNorm(6)).double()
    with synchronize_batch_norms(model):
        run: Any = model if rank is None else torch.compile(DistributedDataParallel(model), backend="aot_eager")
        for step in range(2):
            run(part_of(random(10, 3, 8, 8, seed=step), 6, rank)).square().sum().backward()
    return [p.grad * (1 if rank is None else 2) for p in model.parameters() if p.grad is not None]


HOOKED: list[nn.Module] = []


def note_call(module: nn.Module, *_: Any) -> None:
    HOOKED.append(module)


class EndedEarlyError(Exception):
    pass


def look_inside(rank: int, model: nn.Sequential, classes: list[type[nn.Module]]) -> dict[str, Any]:
    norms = model[0].norms
    file = io.BytesIO()
    torch.save(norms, file)
    file.seek(0)
    copies = copy.deepcopy(norms), pickle.loads(pickle.dumps(norms)), torch.load(file, weights_only=False)
    result = {
        "is_instance": all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True)),
        "swapped": sorted(name for name, m in norms.items() if type(m).__name__.startswith("Synchronized")),
        "copies": [type(copied["fused"]) for copied in copies],
        "copied state": all(
            torch.equal(value, norms.state_dict()[name]) for c in copies for name, value in c.state_dict().items()
        ),
    }
    with synchronize_batch_norms(model[0]):
        norms["plain"](torch.ones(rank + 1, 3, 2, 2))
    return result | {"still swapped": type(norms["plain"]).__name__}


def handle_classes(rank: int) -> dict[str, Any]:
    """What the block does to the modules themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Norms(), SplitBatchNorm2d(3), FrozenBatchNormAct2d(3), SyncBatchNormAct(3), nn.LazyBatchNorm2d()
    )
    model[0].norms["plain"].register_forward_hook(note_call)
    wrapped_norm = nn.BatchNorm2d(3)
    wrapped_norm.forward = wrapped_norm.forward
    model.append(wrapped_norm)
    classes = [type(module) for module in model.modules()]
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    keys = list(model.state_dict())
    result: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(EndedEarlyError):
        warnings.simplefilter("always")
        with synchronize_batch_norms(model):
            result |= look_inside(rank, model, classes)
            result["same"] = (
                keys == list(model.state_dict()),
                identities == [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            )
            raise EndedEarlyError
    result["hooked"] = len(HOOKED)
    result["restored"] = classes == [type(module) for module in model.modules()]
    result["warnings"] = [str(warning.message) for warning in caught if "synchronised" in str(warning.message)]
    return result


def collect(rank: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {"function": {}, "networks": {}}
    for layout, (shape, feature_dim) in LAYOUTS.items():
        for name, cut in CUTS.items():
            for dtype in (torch.float32, torch.float64):
                result["function"][layout, name, dtype] = call_the_function(rank, shape, feature_dim, cut, dtype)
    result["norms"] = run_norms(rank)
    result["domain"] = run_domain_norm(rank)
    for name, network in NETWORKS.items():
        result["networks"][name] = train(rank, *network)
    result["compiled"] = train_compiled(rank)
    if rank is not None:
        result["edges"] = misuse_and_edges(rank)
        result["collectives"] = count_collectives()
        result["classes"] = handle_classes(rank)
    return result


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(collect(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


Results = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the first of two processes, the second, and one alone computed."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_together(work, str(folder))
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return first, second, collect(None)


def same(actual: Any, expected: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------------ function


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_normalise_as_torch_does_the_whole(
    results: Results, layout: str, cut: str, dtype: torch.dtype, tolerance: float
) -> None:
    for first, second, whole in zip(*(result["function"][layout, cut, dtype] for result in results), strict=True):
        same(torch.cat([first["out"], second["out"]]), whole["out"], tolerance)
        same(torch.cat([first["grads"][0], second["grads"][0]]), whole["grads"][0], tolerance)
        for a, b, expected in zip(first["grads"][1:], second["grads"][1:], whole["grads"][1:], strict=True):
            same(a + b, expected, 10 * tolerance)  # sums over up to sixty vectors
        assert all(torch.equal(a, b) for a, b in zip(first["running"], second["running"], strict=True))
        same(first["running"], whole["running"], tolerance)


def test_one_vector_in_all_is_the_error_of_torch(results: Results) -> None:
    for result in results[:2]:
        errors = result["edges"]["one vector"]
        assert len(errors) == 2
        for message, running in errors:
            assert message.startswith("Expected more than 1 value per channel when training, got input size")
            assert torch.equal(running, torch.full((3,), 7.0))
    both = torch.cat([result["edges"]["two vectors"] for result in results[:2]])
    same(both, torch.tensor([[-1.0] * 3, [1.0] * 3]), 1e-6)


def test_domain_batch_norm_takes_the_statistics_of_all(results: Results) -> None:
    first, second, whole = (result["domain"] for result in results)
    for mine, theirs, expected in zip(first["steps"], second["steps"], whole["steps"], strict=True):
        for part in range(2):  # output, gradient of the input
            same(torch.cat([mine[part], theirs[part]]), expected[part], 1e-10)
        for a, b, sums in zip(mine[2:], theirs[2:], expected[2:], strict=True):
            same(a + b, sums, 1e-10)
    for name, value in whole["state"].items():
        same(first["state"][name], value, 1e-10)
        assert torch.equal(first["state"][name], second["state"][name])
    assert whole["state"]["num_batches_tracked"].tolist() == [4, 4, 4, 0]


def test_nothing_in_all_changes_nothing(results: Results) -> None:
    for result in results[:2]:
        shape, (mean, var), grads = result["edges"]["nothing"]
        assert shape == (0, 3, 4)
        assert torch.equal(mean, torch.full((3,), 7.0))
        assert torch.equal(var, torch.full((3,), 8.0))
        assert grads[0].shape == (0, 3, 4)
        assert torch.equal(grads[1], torch.zeros(3))


def test_float32_far_from_zero(results: Results) -> None:
    far = (random(64, 3, seed=5) + torch.tensor([0.0, 1e4, -1e5], dtype=torch.float64)).float().double()
    expected = F.batch_norm(far, None, None, training=True)
    actual = torch.cat([result["edges"]["far"] for result in results[:2]])
    for feature, tolerance in enumerate((1e-6, 1e-3, 1e-2)):  # the last digit of 1e5 is worth 8e-3
        torch.testing.assert_close(actual[:, feature].double(), expected[:, feature], atol=2 * tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(results: Results, dtype: torch.dtype) -> None:
    half = (random(64, 3, seed=6) * 2000 + 9000).to(dtype).float().requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    expected = F.batch_norm(half, mean, var, training=True)
    (grad,) = torch.autograd.grad(expected.pow(3).sum(), half)
    out, grads = (torch.cat([result["edges"][str(dtype)][i] for result in results[:2]]) for i in range(2))
    assert out.dtype == grads.dtype == dtype
    torch.testing.assert_close(out.float(), expected.detach(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(grads.float(), grad, atol=2e-5, rtol=2e-2)
    same(results[0]["edges"][str(dtype)][2], (mean, var), 1e-5)


def test_one_collective_forward_and_one_backward_and_the_memory_format(results: Results) -> None:
    for result in results[:2]:
        assert result["collectives"] == {"forward": 1, "backward": 1}
        assert result["edges"]["layout"]


# ------------------------------------------------------------------------------------------------------------- modules


def test_every_kind_of_batch_norm(results: Results) -> None:
    first, second, one = (result["norms"] for result in results)
    for a, b, whole in zip(first["outs"], second["outs"], one["outs"], strict=True):
        for name, expected in whole.items():
            same(torch.cat([a[name], b[name]]), expected)
    for a, b, whole in zip(first["grads"], second["grads"], one["grads"], strict=True):
        same(torch.cat([a, b]), whole)
    assert first["state"].keys() == one["state"].keys()
    same(first["state"], one["state"])
    same(second["state"], one["state"])
    for name, value in first["evaluated"].items():
        same(torch.cat([value, second["evaluated"][name]]), one["evaluated"][name])


def test_the_block_changes_classes_alone_and_puts_them_back(results: Results) -> None:
    for rank, result in enumerate(results[:2]):
        classes = result["classes"]
        assert classes["is_instance"]
        assert classes["restored"]
        assert classes["same"] == (True, True)
        assert classes["swapped"] == sorted(set(Norms().norms) - {"feature"})
        assert classes["still swapped"] == "SynchronizedBatchNorm2d"
        assert classes["copies"] == [BatchNormAct2d] * 3
        assert classes["copied state"]
        assert classes["hooked"] == 1
        assert len(classes["warnings"]) == (1 if rank == 0 else 0)
    (message,) = results[0]["classes"]["warnings"]
    assert "1 (SplitBatchNorm2d), 4 (LazyBatchNorm2d), 5 (BatchNorm2d)." in message


def test_a_single_process_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), SplitBatchNorm2d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with synchronize_batch_norms(model):
            assert [type(module) for module in model] == [nn.BatchNorm2d, SplitBatchNorm2d]


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_a_network_as_one(results: Results, name: str) -> None:
    first, second, one = (result["networks"][name] for result in results)
    tolerance = 1e-5 if NETWORKS[name][1] is torch.float32 else 1e-9
    for step, (mine, whole) in enumerate(zip(first["gradients"], one["gradients"], strict=True)):
        assert mine.keys() == whole.keys()
        for parameter, gradient in whole.items():
            torch.testing.assert_close(
                mine[parameter],
                gradient,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, step=step, parameter=parameter: f"step {step}, {parameter}: {m}",
            )
    same(first["state"], second["state"], 0)
    same(first["state"], one["state"], tolerance)


def test_compiled_networks(results: Results) -> None:
    first, second, one = (result["compiled"] for result in results)
    same(first, one)
    same(second, one)
