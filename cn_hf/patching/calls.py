"""The call of a patched model that runs here, and the call that made the part of a graph that runs backward.

Calls nest: a method of the root within another, a forward within a ``use_contexts`` block. Every thread and task has
its own (``contextvars``). Activation checkpointing runs layers once more during backward, in whatever thread that runs;
they need the ids of the call that made this part of the graph. Autograd numbers a thread's nodes in the order in which
they are made, so a call's nodes are those between two numbers. Where calls of several threads have the same numbers,
hooks on their outputs tell which of them a backward pass has reached.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cn_hf.errors import ContextIdError

__all__ = ["Call", "Calls"]

V = TypeVar("V")
_next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr  # of the node that this thread makes next


class Call:
    """A running call of the root, or a ``use_contexts`` block.

    Attributes:
        ids: checked ids ``(N,)`` or ``(N, T)``, or None for a call without.
        num_texts: number of texts, of a call of a model that takes images and texts, or None.
        batch_size: number of samples, where there are other numbers of ids, or None.
        leading: first dimension that the first slot has met, where it matters, or None.
        named: ids ``(N,)`` as a source named them, -1 where it knows none, if there is such a sample; else None.
            ``ids`` are then None where these samples run by CN+.
        is_block: True for a ``use_contexts`` block.
        open: True while the call of a root runs.
        outer: the call or block that this one stands in.
        start: number of the first node of a graph that is made in this call.
        stop: number of the first one after it, or None while it runs.
        tasks: the backward passes that have reached an output of this call, and run.
    """

    __slots__ = (
        "__weakref__",
        "batch_size",
        "ids",
        "is_block",
        "leading",
        "named",
        "num_texts",
        "open",
        "outer",
        "start",
        "stop",
        "tasks",
    )

    def __init__(self, ids: Tensor | None, *, is_block: bool = False) -> None:
        self.ids = ids
        self.num_texts: int | None = None
        self.batch_size: int | None = None
        self.leading: int | None = None
        self.named: Tensor | None = None
        self.is_block = is_block
        self.open = not is_block
        self.outer: Call | None = None
        self.start = 0
        self.stop: int | None = None
        self.tasks: set[int] = set()

    def made(self, number: int) -> bool:
        """True if the node of a graph of this number may be of this call."""
        return self.start <= number and (self.stop is None or number < self.stop)

    def stands_in(self, other: Call) -> bool:
        """True if ``other`` is this call or one around it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.outer
        return call is other


class _PerThread(threading.local):
    value: Any

    def __init__(self, value: Any) -> None:
        self.value = value


class _TracedVariable(Generic[V]):
    """A ContextVar for torch < 2.14, whose compiler cannot read one: its graphs read the thread's value."""

    def __init__(self, name: str, *, default: V) -> None:
        self.variable = ContextVar(name, default=default)
        self.local = _PerThread(default)

    def get(self) -> V:
        return cast(V, self.local.value) if torch.compiler.is_compiling() else self.variable.get()

    def set(self, value: V) -> Token[V]:
        self.local.value = value
        return self.variable.set(value)

    def reset(self, token: Token[V]) -> None:
        self.variable.reset(token)
        self.local.value = self.variable.get()


_VARIABLE: Any = ContextVar if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else _TracedVariable


class Calls:
    """The calls of one model.

    Attributes:
        traced: the call of a root that is being compiled or exported, or None.
        running: the call of the root that runs in this thread or task, or whose part of a graph runs backward here.
        blocks: the ``use_contexts`` blocks around, the innermost last.
        tracking: held while contexts follow the images of a forward.
        graphs: calls that a graph may have been made in, as long as the graph is there.
    """

    def __init__(self) -> None:
        self.traced: Call | None = None
        self.running: ContextVar[Call | None] = _VARIABLE("cn_hf_running", default=None)
        self.blocks: ContextVar[tuple[Call, ...]] = _VARIABLE("cn_hf_blocks", default=())
        self.tracking = threading.RLock()
        self.graphs: list[weakref.ref[Call]] = []

    def innermost(self) -> Call | None:
        """Return the call or block around, or during backward that of the part of the graph that runs."""
        if torch.compiler.is_compiling():
            call = self.running.get() if self.traced is None else self.traced
            return self.block() if call is None else call
        call = self.running.get()
        if call is not None and call.open:
            return call
        task = torch._C._current_graph_task_id()
        if task != -1:
            return self._recomputed(task, call)
        if call is not None:  # left by a backward that failed
            self.running.set(None)
        return self.block()

    def block(self) -> Call | None:
        """Return the innermost ``use_contexts`` block around."""
        blocks = self.blocks.get()
        return blocks[-1] if blocks else None

    def run(self, call: Call, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``method(*args, **kwargs)``, run in ``call``."""
        if torch.compiler.is_compiling():
            outer, self.traced = self.traced, call
            try:
                return method(*args, **kwargs)
            finally:
                self.traced = outer
        token = self.running.set(call)
        call.start = _next_number()
        try:
            output = method(*args, **kwargs)
        finally:
            self.running.reset(token)
            call.open = False
            call.stop = _next_number()
        if torch.is_grad_enabled():
            self._keep_with_graph(call, output)
        return output

    @contextmanager
    def run_block(self, call: Call) -> Iterator[None]:
        """Make ``call`` the innermost block of this thread or task."""
        call.outer = self.block()
        call.start = _next_number()
        self.graphs.append(weakref.ref(call, self.graphs.remove))
        self.blocks.set((*self.blocks.get(), call))
        try:
            yield
        finally:
            self.blocks.set(tuple(block for block in self.blocks.get() if block is not call))  # in any order
            call.stop = _next_number()

    def _keep_with_graph(self, call: Call, output: Any) -> None:
        leaves = (output,) if isinstance(output, Tensor) else pytree.tree_leaves(output)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outputs:
            self.graphs.append(weakref.ref(call, self.graphs.remove))
        for leaf in outputs:
            leaf.register_hook(lambda grad: self._reach(call))  # type: ignore[no-untyped-call]  # torch leaves it so

    def _reach(self, call: Call) -> None:
        """The part of the graph that ``call`` made runs next."""
        task, thread, before = torch._C._current_graph_task_id(), threading.get_ident(), self.running.get()
        is_first = before is None or before.open or task not in before.tasks
        call.tasks.add(task)
        self.running.set(call)  # compiled layers find it there

        def leave() -> None:
            call.tasks.discard(task)
            if is_first and thread == threading.get_ident():
                self.running.set(before)

        torch.autograd.Variable._execution_engine.queue_callback(leave)

    def _recomputed(self, task: int, reached: Call | None) -> Call | None:
        node: Any = torch._C._current_autograd_node()
        number = node._sequence_nr()
        alive = [call for graph in tuple(self.graphs) if (call := graph()) is not None]
        made = [call for call in alive if call.made(number)]
        in_task = [call for call in alive if task in call.tasks]
        found = [call for call in made if task in call.tasks] or in_task
        if not found and reached is not None and reached.tasks:  # a backward within that of another graph
            found = [reached]
        found = found or made
        if not found:
            return None
        innermost = max(found, key=lambda call: call.start)
        if not all(innermost.stands_in(call) or call.ids is innermost.ids for call in found):
            raise ContextIdError(
                "Activation checkpointing met graphs of several threads or tasks in one backward pass, and cannot tell "
                "whose context_ids a layer needs. Call backward for each of them, or switch checkpointing off."
            )
        if not innermost.is_block:
            self.running.set(innermost)
        return innermost
