"""patching/calls.py: each thread and task has its own calls, and graphs keep theirs for backward."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models_for_tests import seeded, tell_apart
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cn_hf
from cn_hf import ContextIdError
from cn_hf.patching.routing import router_of

FIRST, SECOND = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 1])


class Net(nn.Module):
    """Blocks, each checkpointed where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.use_reentrant: bool | None = None

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            again = self.use_reentrant
            x = block(x) if again is None else checkpoint(block, x, use_reentrant=again)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(1)


@seeded
def net(use_reentrant: bool | None = None) -> Net:
    model = tell_apart(cn_hf.patch_model(Net(), num_contexts=3)).double().train()
    model.use_reentrant = use_reentrant
    return model


def inputs() -> Tensor:
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)  # reentrant checkpoints refuse autograd.grad
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


CHECKPOINTED = pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["plain", "not reentrant", "reentrant"]
)


# -------------------------------------------------------------------------------------------------- threads and tasks


def test_tasks_have_blocks_of_their_own() -> None:
    model, x = net().eval(), inputs()
    expected = [model(x, context_ids=context) for context in range(3)]

    async def work(context: int) -> float:
        await asyncio.sleep(0)
        with cn_hf.use_contexts(model, context):
            await asyncio.sleep(0.001 * (3 - context))
            error = (model(x) - expected[context]).abs().max()
            await asyncio.sleep(0.001 * context)
            return float(torch.maximum(error, (model(x) - expected[context]).abs().max()).detach())

    async def all_together() -> list[float]:
        return await asyncio.gather(*(work(context) for context in range(3)))

    plus = model(x)
    assert max(asyncio.run(all_together())) == 0
    assert torch.equal(model(x), plus)
    assert router_of(model).calls.block() is None


def test_a_task_that_is_made_in_a_block_stays_in_it() -> None:
    model, x = net().eval(), inputs()
    expected = model(x, context_ids=1)

    async def work(go: asyncio.Event) -> Tensor:
        await go.wait()
        return model(x)

    async def make() -> Tensor:
        go = asyncio.Event()
        with cn_hf.use_contexts(model, 1):
            task = asyncio.create_task(work(go))
        go.set()
        return await task

    assert torch.equal(asyncio.run(make()), expected)


def test_a_thread_starts_without_contexts_and_does_not_see_those_of_others() -> None:
    model, x = net().eval(), inputs()
    plus, expected = model(x), [model(x, context_ids=context) for context in range(3)]
    with cn_hf.use_contexts(model, 1):
        assert torch.equal(in_thread(lambda: model(x)), plus)
        model.train()
        with pytest.raises(ContextIdError, match="Training needs context_ids"):
            in_thread(lambda: model(x))
        model.eval()
        barrier = threading.Barrier(3)

        def work(context: int) -> bool:
            with cn_hf.use_contexts(model, context):
                barrier.wait()
                same = torch.equal(model(x), expected[context])
                barrier.wait()
                return same

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(3)))
        assert torch.equal(model(x), expected[1])


def test_blocks_that_end_in_another_order() -> None:
    model, x = net().eval(), inputs()
    plus, expected = model(x), [model(x, context_ids=context) for context in range(3)]
    blocks = [cn_hf.use_contexts(model, context) for context in range(3)]
    for context, block in enumerate(blocks):
        block.__enter__()
        assert torch.equal(model(x), expected[context])
    blocks[0].__exit__(None, None, None)
    assert torch.equal(model(x), expected[2])
    blocks[2].__exit__(None, None, None)
    assert torch.equal(model(x), expected[1])
    blocks[1].__exit__(None, None, None)
    assert torch.equal(model(x), plus)


def test_a_copy_made_in_a_block_has_no_part_in_it() -> None:
    model, x = net().eval(), inputs()
    plus = model(x)
    with cn_hf.use_contexts(model, 1):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), plus)
    assert not any(module._forward_pre_hooks for module in copied.modules())
    assert torch.equal(copied(x), plus)


def test_a_process_forked_during_a_forward_of_another_thread() -> None:
    model, x = net().eval(), inputs()
    expected = model(x, context_ids=1)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(30)

    handle = model.blocks[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: model(x, context_ids=0))
    thread.start()
    assert inside.wait(30)
    handle.remove()

    def work(equal: Any) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            equal.value = torch.equal(model(x, context_ids=1), expected)

    context = multiprocessing.get_context("fork")
    equal = context.Value("b", 0)
    child = context.Process(target=work, args=(equal,))
    child.start()
    child.join(30)
    hangs = child.exitcode is None
    child.kill()
    go_on.set()
    thread.join()
    assert not hangs
    assert equal.value


# ------------------------------------------------------------------------------------------------- backward elsewhere


@CHECKPOINTED
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model(x, context_ids=FIRST),
        lambda model, x: model.features(x, context_ids=FIRST),
        lambda model, x: in_block(model, lambda: model(x)),
        lambda model, x: in_block(model, lambda: model.features(x)),
        lambda model, x: in_thread(lambda: model(x, context_ids=FIRST)),
        lambda model, x: checkpoint(lambda x: model(x, context_ids=FIRST), x, use_reentrant=False),
        lambda model, x: in_block(model, lambda: checkpoint(model.features, x, use_reentrant=False)),
    ],
    ids=[
        "keyword",
        "method",
        "block",
        "method in block",
        "made in a thread",
        "whole checkpointed",
        "method checkpointed",
    ],
)
def test_graphs_keep_the_ids_of_their_call(call: Any, use_reentrant: bool | None) -> None:
    x, plain, model = inputs(), net(), net(use_reentrant)
    expected = gradients(plain, call(plain, x).square().sum())
    loss = call(model, x).square().sum()
    other = model(x, context_ids=SECOND)  # whose graph stays alive beside it
    assert_equal(gradients(model, loss), expected)
    assert_equal(in_thread(lambda: gradients(model, loss)), expected)
    with cn_hf.use_contexts(model, SECOND):
        assert_equal(gradients(model, loss), expected)
    assert other.requires_grad
    assert router_of(model).calls.innermost() is None


def in_block(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    with cn_hf.use_contexts(model, FIRST):
        return call()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the block", "in a thread"])
def test_graphs_keep_the_ids_of_a_block_in_which_parts_ran(elsewhere: bool) -> None:
    x, plain, model = inputs(), net(), net()
    with cn_hf.use_contexts(plain, FIRST):
        expected = gradients(plain, plain.blocks[0](plain.stem(x)).square().sum() + plain(x).sum())

    def loss() -> Tensor:
        return checkpoint(model.blocks[0], model.stem(x), use_reentrant=False).square().sum()

    with cn_hf.use_contexts(model, FIRST):
        value = loss() + model(x).sum()
        if not elsewhere:
            with cn_hf.use_contexts(model, SECOND):
                assert_equal(gradients(model, value), expected)
    if elsewhere:
        assert_equal(in_thread(lambda: gradients(model, value)), expected)


@CHECKPOINTED
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backward_of_one_model_in_several_threads(use_reentrant: bool | None) -> None:
    x, plain, model = inputs(), net(), net(use_reentrant)
    forms, scales, steps = [FIRST, SECOND, FIRST.flip(0)], (1, 100, 10000), 10
    losses = [scale * plain(x, context_ids=ids).square().sum() for ids, scale in zip(forms, scales, strict=True)]
    expected = gradients(plain, steps * sum(losses))
    barrier = threading.Barrier(3, timeout=60)

    def work(number: int) -> None:
        for _ in range(steps):
            barrier.wait()
            loss = scales[number] * model(x, context_ids=forms[number]).square().sum()
            barrier.wait()
            loss.backward()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(work, number) for number in range(3)]:
            future.result()
    assert_equal([p.grad for p in model.parameters()], expected)


def test_a_forward_waits_for_no_other_thread() -> None:
    model, x = net(), inputs()
    inside, go_on = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=lambda: model(x, context_ids=FIRST))
    model.blocks[1].register_forward_pre_hook(wait)
    thread.start()
    assert inside.wait(30)
    model(x, context_ids=SECOND).sum().backward()
    go_on.set()
    thread.join()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_in_checkpoints(use_reentrant: bool) -> None:
    x, plain, model = inputs(), net(), net(use_reentrant)
    expected = gradients(plain, plain(x, context_ids=FIRST).square().sum() + plain(x, context_ids=SECOND).sum())
    inner = model.features

    def features(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=use_reentrant)

    vars(model)["features"] = features
    x.requires_grad_()
    with cn_hf.use_contexts(model, FIRST):
        loss = model(x).square().sum() + model(x, context_ids=SECOND).sum()
        assert_equal(gradients(model, loss), expected)
    assert_equal(in_thread(lambda: gradients(model, loss)), expected)


def test_a_call_within_a_call() -> None:
    class Twice(Net):
        def forward(self, x: Tensor, inner: Tensor | None = None) -> Tensor:
            x = self.features(x)
            if inner is not None:
                x = x + self(inner, context_ids=SECOND).mean()
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.use_reentrant is not None else block(x)
            return x

    values = []
    for use_reentrant in (None, False):
        torch.manual_seed(0)
        model = tell_apart(cn_hf.patch_model(Twice(), num_contexts=3)).double().train()
        model.use_reentrant = use_reentrant
        values.append(gradients(model, model(inputs(), inputs() + 1, context_ids=FIRST).square().sum()))
    assert_equal(values[1], values[0])


def test_graphs_that_cannot_be_told_apart_are_an_error() -> None:
    x, model = inputs(), net(use_reentrant=False)
    losses = [in_thread(lambda ids=ids: model(x, context_ids=ids).sum()) for ids in (FIRST, SECOND)]
    with pytest.raises(ContextIdError, match="several threads"):
        sum(losses).backward()
    for loss in losses:
        loss.backward()


def test_a_backward_that_failed_leaves_no_ids() -> None:
    x, model = inputs(), net(use_reentrant=False)

    def stop(grad: Tensor) -> None:
        raise RuntimeError("stop")

    with cn_hf.use_contexts(model, SECOND):
        loss = model(x, context_ids=FIRST).square().sum()
        model.stem.weight.register_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            loss.backward()
        model.eval()
        assert torch.equal(model.features(x), model.features(x, context_ids=SECOND))
        assert torch.equal(model.blocks[0](model.stem(x)), model.blocks[0](model.stem(x)))
    with ExitStack() as stack:
        stack.enter_context(cn_hf.use_contexts(model, SECOND))
        inside = model.blocks[0](model.stem(x))
    assert not torch.equal(model.blocks[0](model.stem(x)), inside)


# --------------------------------------------------------------------------------------------------------- the compiler


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_blocks_with_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = tell_apart(cn_hf.patch_model(timm.create_model("test_vit", num_classes=5), num_contexts=3)).train()
    model, x, ids = copy.deepcopy(plain), torch.randn(3, 3, 160, 160), FIRST
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    model.set_grad_checkpointing(True)
    manipulate = __import__("timm.models._manipulate", fromlist=["checkpoint"])
    if hasattr(manipulate, "use_reentrant_ckpt"):
        monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: reentrant)
    for step in range(2):
        losses = [m(x + step, context_ids=ids).square().sum() for m in (plain, model)]
        expected, actual = (gradients(m, loss) for m, loss in zip((plain, model), losses, strict=True))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6))


def test_compiled_whole_in_a_block() -> None:
    torch._dynamo.reset()
    model, x = net().eval(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = {context: model(x, context_ids=context) for context in (0, 1, 2)}
    plus = model(x)
    assert torch.equal(compiled(x), plus)
    for context in (1, 2):
        with cn_hf.use_contexts(model, context):
            torch.testing.assert_close(compiled(x), expected[context])
            torch.testing.assert_close(compiled(x, context_ids=0), expected[0])
            torch.testing.assert_close(in_thread(lambda: compiled(x)), plus)
    torch.testing.assert_close(compiled(x), plus)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_in_a_block(strict: bool) -> None:
    model, x = net().eval(), inputs()
    expected = model(x, context_ids=FIRST)
    with cn_hf.use_contexts(model, FIRST):
        exported = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), expected)
    assert router_of(model).calls.innermost() is None


def test_each_class_has_the_compilers_limit_for_itself() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3):
        for width in (6, 7, 8, 9):

            class Small(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.norm = nn.LayerNorm(width)  # noqa: B023

                def forward(self, x: Tensor) -> Tensor:
                    return self.norm(x)

            model = cn_hf.patch_model(Small().eval(), num_contexts=2)
            compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
            for batch in (2, 3, 4):
                x = torch.randn(batch, 3, width)
                torch.testing.assert_close(compiled(x, context_ids=1), model(x, context_ids=1))


# ---------------------------------------------------------------------------------------------------------------- costs


def test_the_way_of_ids_to_the_layers_is_short() -> None:
    """Python calls of ``cn_hf.patching`` in a forward of 13 slots, and those of torch that it makes to route."""
    model = timm.create_model("test_vit").eval()
    x, ids, folder = torch.randn(8, 3, 160, 160), torch.arange(8) % 3, str(Path(cn_hf.patching.__file__).parent)
    cn_hf.patch_model(model)
    made: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            made[frame.f_code.co_name] += 1

    for _ in range(2):
        made.clear()
        sys.setprofile(count)
        model(x, context_ids=ids)
        sys.setprofile(None)
    assert len(cn_hf.patch_report(model)) == 13
    assert made.total() <= 13 * 10 + 30, made
