"""Whole networks: steps, memory and folded inference of patched models against plain ones, and what routing adds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_hf.patching import fold_context, patch_model
from cn_hf.patching.calls import Call
from cn_hf.patching.routing import router_of
from scripts.benchmark.activations import NUM_CONTEXTS, dtype_name
from scripts.benchmark.races import Duel, race
from scripts.benchmark.rows import MEMORY, MICROSECONDS, SPEED, WAITS, Row, Trial, differing, single
from scripts.benchmark.settings import Settings
from scripts.benchmark.timing import Run, peak_bytes, saved_bytes, seconds_in_turn

__all__ = ["trials"]

PLAIN, PATCHED, FOLDED = "plain model", "patched model", "folded model"
CLASSES = 1000
WAITING_CALLS = ("cudaStreamSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


class Network(NamedTuple):
    """A timm model, how it is patched, what it is trained on, and the speed it must keep."""

    name: str
    mode: str
    batch: int
    side: int
    limit: float


def networks(settings: Settings) -> list[Network]:
    """The ViT and the ResNet, with batches that a CPU can take; the ResNet takes too long there for a quick run."""
    vit, resnet = settings.of(full=(8, 16), quick=(2, 2), smoke=(2, 2), gpu=(128, 128))
    side = settings.of(full=224, quick=64, smoke=32, gpu=224)
    found = [Network("vit_small_patch16_224", "cn-patches", vit, side, 0.97)]
    if settings.size != "quick" or settings.on_gpu:
        found.append(Network("wide_resnet50_2", "cn-channels", resnet, side, 1.03))
    return found


def trials(settings: Settings) -> list[Trial]:
    """Steps, memory and folded inference of each network, then routing."""
    dtypes = [torch.float32, torch.bfloat16] if settings.on_gpu else [torch.float32]
    found = []
    for network in networks(settings):
        for dtype in dtypes:
            found += [make(network, dtype, settings) for make in (_step, _memory)]
        found.append(_inference(network, settings.headline_dtype, settings))
    return [*found, _routing(settings), _waits(settings)]


# ------------------------------------------------------------------------------------------------------ whole networks


def _step(network: Network, dtype: torch.dtype, settings: Settings) -> Trial:
    row = _row(network, dtype, "training step", unit=SPEED, at_least=True, limit=network.limit,
               headline=dtype == settings.headline_dtype)  # fmt: skip

    def contestants() -> Mapping[str, Run]:
        images, ids, labels = _batch(network, settings.device)
        runs: dict[str, Run] = {}
        for name, model in _pair(network, settings.device).items():
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
            arguments = {"context_ids": ids} if name == PATCHED else {}
            runs[name] = partial(_train, model, optimizer, images, labels, arguments, dtype)
        return runs

    duel = Duel(PATCHED, row, (network.batch, "images/s"))
    return race(f"steps of {network.name}, {dtype_name(dtype)}", [duel], contestants, settings)


def _memory(network: Network, dtype: torch.dtype, settings: Settings) -> Trial:
    what = "peak memory of a step" if settings.on_gpu else "memory kept for backward"
    row = _row(network, dtype, what, unit=MEMORY, limit=1.0, headline=dtype == settings.headline_dtype)

    def measure() -> list[Row]:
        images, ids, labels = _batch(network, settings.device)
        sizes = {}
        for name, model in _pair(network, settings.device).items():
            arguments = {"context_ids": ids} if name == PATCHED else {}
            if settings.on_gpu:
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
                step = partial(_train, model, optimizer, images, labels, arguments, dtype)
                sizes[name] = peak_bytes(step, settings.device)
            else:
                forward = partial(_forward, model, images, arguments, dtype)
                sizes[name] = saved_bytes(forward, without=model.parameters())
        note = f"{sizes[PATCHED] / 1e6:,.0f} against {sizes[PLAIN] / 1e6:,.0f} MB"
        return [single(row, sizes[PATCHED] / sizes[PLAIN], note=note)]

    return Trial(f"memory of {network.name}, {dtype_name(dtype)}", (row,), measure)


def _inference(network: Network, dtype: torch.dtype, settings: Settings) -> Trial:
    """A folded model has the modules of the plain one; what the plain one differs from itself shows the noise."""
    again = f"{PLAIN} again"
    folded = _row(network, dtype, "inference after fold_context", limit=1.02, headline=True)
    itself = _row(network, dtype, "inference, plain model against itself")

    def contestants() -> Mapping[str, Run]:
        images, _, _ = _batch(network, settings.device)
        models = _pair(network, settings.device)
        models = {PLAIN: models[PLAIN], FOLDED: fold_context(models[PATCHED], 0), again: copy.deepcopy(models[PLAIN])}
        return {name: partial(_infer, model.eval(), images, dtype) for name, model in models.items()}

    duels = [Duel(FOLDED, folded, (network.batch, "images/s")), Duel(again, itself)]
    return race(f"inference of {network.name}, {dtype_name(dtype)}", duels, contestants, settings)


def _row(network: Network, dtype: torch.dtype, what: str, **options: Any) -> Row:
    shape = f"({network.batch}, 3, {network.side}, {network.side})"
    return Row(what=f"{network.name}, {what}", rival=PLAIN, shape=shape, dtype=dtype_name(dtype), **options)


def _pair(network: Network, device: torch.device) -> dict[str, nn.Module]:
    """The plain model and a patched one of the same weights, in training."""
    import timm

    options = {"img_size": network.side} if network.name.startswith("vit") else {}
    plain = timm.create_model(network.name, num_classes=CLASSES, **options)
    patched = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never saw data")  # time does not depend on it
        patch_model(patched, mode=network.mode, where="norms", num_contexts=NUM_CONTEXTS)
    return {PLAIN: plain.to(device).train(), PATCHED: patched.to(device).train()}


def _batch(network: Network, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(network.batch, 3, network.side, network.side, device=device)
    ids = torch.arange(network.batch, device=device) % NUM_CONTEXTS
    return images, ids, torch.randint(CLASSES, (network.batch,), device=device)


def _forward(model: nn.Module, images: Tensor, arguments: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    half = torch.autocast(images.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    with half:
        out: Tensor = model(images, **arguments)
    return out


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    arguments: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    loss = F.cross_entropy(_forward(model, images, arguments, dtype).float(), labels)
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _infer(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    return _forward(model, images, {}, dtype)


# ------------------------------------------------------------------------------------------------------------- routing


def _routing(settings: Settings) -> Trial:
    """The check of the ids and their way to the layers: a forward with both, less one that finds them there."""
    row = Row(what="routing of context_ids, per forward", rival="the same layers without", shape="(8, 4, 16)",
              unit=MICROSECONDS, limit=50.0, headline=True)  # fmt: skip

    def measure() -> list[Row]:
        model, x, ids = _tiny_model(settings.device)
        router = router_of(model)
        call = Call(router.resolve(ids, len(x), x.device))
        unrouted = cast(Any, type(model)).original_class.forward

        def without() -> None:
            token = router.calls.running.set(call)
            unrouted(model, x)
            router.calls.running.reset(token)

        runs: dict[str, Run] = {"routed": lambda: model(x, context_ids=ids), "unrouted": without}
        calls = settings.of(full=200, quick=100, smoke=5)
        seconds = seconds_in_turn(runs, settings, title="routing", host_clock=True, calls=calls)
        return [differing(row, seconds["routed"], seconds["unrouted"])]

    return Trial("routing", (row,), measure)


def _waits(settings: Settings) -> Trial:
    """Count the host's waits for the device in a patched forward whose ids are on the device."""
    row = Row(
        what="waits for the device, per patched forward", shape="(8, 4, 16)", unit=WAITS, limit=0.0, headline=True
    )

    def measure() -> list[Row]:
        if not settings.on_gpu:
            return [row]
        model, x, ids = _tiny_model(settings.device)
        model(x, context_ids=ids)  # compiles, and looks at the device's properties
        torch.cuda.synchronize(settings.device)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            model(x, context_ids=ids)
        names = [event.name for event in profile.events()]  # the profiler itself ends by cudaDeviceSynchronize
        return [single(row, float(sum(name.startswith(WAITING_CALLS) for name in names)))]

    return Trial("waits for the device", (row,), measure)


def _tiny_model(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    patch_model(model, mode="cn-patches", where="norms", num_contexts=NUM_CONTEXTS)
    x, ids = torch.randn(8, 4, 16, device=device), torch.arange(8, device=device)
    return model.to(device).train(), x, ids
