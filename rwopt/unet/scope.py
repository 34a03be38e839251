"""Which call of a U-Net its sites are in, so that each finds the weights of its own call.

A call's weights live from its start to its end. While one call is under way, which is nearly always, a site reads
them off one attribute; only while several threads are inside of the same U-Net does it ask whose thread it is.
Gradient checkpointing re-runs parts of an earlier call during the backward pass, when no call is open: there the
weights come back as an argument of the re-run part (`rwopt.unet.checkpointing`), and a part that brings none is an
error, never a silent read of another call's weights.

A compiled graph cannot read Python's state, and a CUDA graph replays kernels alone. There the weights are a tensor at
a fixed place that is written before the call, outside of the graph, which takes it as an input like any other: a new
step means neither a new graph nor a recompilation. One place serves one call, so threads that share a compiled U-Net
take turns.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.unet.call import PLAIN, Plain, Traced

F = TypeVar("F", bound=Callable[..., object])


def eager(function: F) -> F:
    """Never traced, not even as a small graph of its own when Python code outside of a graph calls it."""
    disabled: F = torch._dynamo.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def outside_graphs(hook: Any) -> Any:
    """For a hook of the U-Net itself, which compiled code runs in Python: else it would get a graph of its own."""
    return torch._dynamo.decorators.skip(hook)


_tickets = itertools.count()
_scopes: WeakValueDictionary[int, Scope] = WeakValueDictionary()
"""How a trace finds a scope: what it calls at once may be given numbers only."""


_SEVERAL = Plain()
"""Stands for "ask whose thread it is"."""


class Scope:
    """Of one attachment with `columns` sites."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.current: Plain | None = None
        """the call under way; None: there is none"""
        self.compiled = False
        """whether a graph reads `place`"""
        self.used = False
        """whether a site has asked for weights since a call began, or a graph that reads `place` has run"""
        self.place: Tensor | None = None
        self.packed = False
        """whether weights were ever packed for a part to be re-run"""
        self.reruns = 0
        """parts that threads are re-running"""
        self.ticket = next(_tickets)
        _scopes[self.ticket] = self
        self._inside = 0
        self._lock, self._turn, self._local = threading.Lock(), threading.RLock(), threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        """A copied U-Net starts with no call under way and with no graph."""
        copied = memo[id(self)] = Scope(self.columns)
        return copied

    def enter(self, call: Plain, x: Tensor | None = None) -> None:
        """Start a U-Net call with sample `x`, or the re-run of a part of one."""
        turn = self.compiled and x is not None
        if turn:
            self._turn.acquire()
            try:
                self._write(call, x)
            except BaseException:
                self._turn.release()
                raise
        local = self._local
        local.call, local.x, local.turn, local.written = call, x, turn, turn
        with self._lock:
            self._inside += 1
            self.current, self.used = (call, False) if self._inside == 1 else (_SEVERAL, self.used)

    def leave(self) -> None:
        """End it and let go of the graph. May be called again."""
        local = self._local
        if getattr(local, "call", None) is None:
            return
        turn, local.call, local.x, local.turn = local.turn, None, None, False
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.current = None
        if turn:
            self._turn.release()

    def begin_rerun(self, part: object, call: Plain) -> None:
        """Open the scope for a part that checkpointing re-runs."""
        self.enter(call)
        self._local.rerun = part
        with self._lock:
            self.reruns += 1

    def end_rerun(self, part: object) -> None:
        """Close it, if it is this part that this thread re-runs."""
        if self.reruns and getattr(self._local, "rerun", None) is part:
            self._local.rerun = None
            with self._lock:
                self.reruns -= 1
            self.leave()

    @property
    def open(self) -> bool:
        """Whether this thread is inside a U-Net call."""
        return getattr(self._local, "call", None) is not None

    def read(self, y: Tensor) -> Plain:
        """The weights at a site with activations `y`."""
        if torch.compiler.is_compiling():
            return self._input()
        call = self.current
        if call is _SEVERAL or call is None:
            call = getattr(self._local, "call", None)
            if call is None:
                return self._closed()
        self.used = True
        return call

    def _closed(self) -> Plain:
        if torch._C._current_graph_task_id() != -1:
            raise UserError(
                "a part of the U-Net is re-run by checkpointing without its weights: checkpoint whole U-Net calls, "
                "or use unet.enable_gradient_checkpointing()"
            )
        return PLAIN  # a part of the U-Net was called by itself

    def _input(self) -> Traced:
        """The fixed place, as an input of the graph that is being traced."""
        _prepare(self.ticket)
        self.used = True  # done again each time that the graph runs: it is one with weights
        assert self.place is not None
        return Traced(self.place)

    @eager
    def close(self, compiled: bool) -> str:
        """`leave` at the end of a U-Net call; what `_unseen` says of it."""
        why = self._unseen(compiled)
        self.leave()
        return why

    def _unseen(self, compiled: bool) -> str:
        """Why the weights of the call that ends had no effect; "" if they had one, or if no weighed site was to run.

        compiled: whether `torch.compile` is at work in this thread, or in a part of the U-Net that holds a site.
        """
        local = self._local
        if getattr(local, "call", PLAIN) is PLAIN:
            return ""
        if self.compiled and not local.written:
            return "two threads made the first call of a compiled U-Net at once: make one call before the others start"
        if self.used:
            return ""
        if compiled:
            return (
                "a graph that was compiled without the weights was used: attach them, call torch._dynamo.reset() if a "
                "U-Net of this kind was compiled before, then compile"
            )
        return ""

    def write(self, call: Plain) -> None:
        """Put weights where compiled graphs read them, between calls."""
        if self.place is not None:
            with self._turn:
                self._write(call, self.place)

    def _write(self, call: Plain, x: Tensor | None) -> None:
        """`x` says the device. The place stays where it is as long as its shape and device fit."""
        table = call.table()
        if table is None:
            table = torch.ones(self.columns if self.place is None else self.place.shape)
        if table.requires_grad:
            raise UserError("a compiled U-Net passes no gradient to the weights: use the U-Net that is not compiled")
        device = table.device if x is None else x.device
        with torch.inference_mode(False), torch.no_grad():
            if self.place is None or self.place.shape != table.shape or self.place.device != device:
                self.place = torch.empty(table.shape, device=device)
                torch._dynamo.mark_static_address(self.place)  # a CUDA graph reads it where it is
            self.place.copy_(table, non_blocking=True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(ticket: int) -> bool:
    """Runs while a graph is traced, not when it is used: from now on the weights are written before each call."""
    scope = _scopes[ticket]
    local = scope._local
    call, x = getattr(local, "call", None), getattr(local, "x", None)
    if not getattr(local, "written", False):
        if call is not None:  # its turn, until it leaves
            scope._turn.acquire()
            local.turn = local.written = True
        scope._write(PLAIN if call is None else call, x)
    scope.compiled = True
    return True


