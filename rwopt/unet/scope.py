"""The weights of the U-Net call that a thread is in.

They live from the start of a call to its end, one value a thread, so pipelines in several threads may share a U-Net.
Gradient checkpointing re-runs parts of an earlier call during the backward pass, when no call is open: there the
weights come back as an argument of the re-run part (`rwopt.unet.checkpointing`), and a part that brings none is an
error, never a silent read of another call's weights.

A compiled graph cannot read a thread's state. There the weights enter through the operator `rwopt::current`, one opaque
node that asks at run time, so a new step means neither a new graph nor a recompilation.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rwopt.errors import UserError

F = TypeVar("F", bound=Callable[..., object])


def eager(function: F) -> F:
    """Never traced, not even as a small graph of its own when Python code outside of a graph calls it."""
    disabled: F = torch._dynamo.disable(function)  # type: ignore[no-untyped-call]
    return disabled


_tickets = itertools.count()
_scopes: WeakValueDictionary[int, Scope] = WeakValueDictionary()
"""How the operator finds a scope: a graph can hold a number, not an object."""


class Scope:
    """Of one attachment with `columns` sites."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.ticket = next(_tickets)
        self.traced: Tensor | None = None
        """while a graph is traced that holds the whole call (`unet.compile()`): its weights, plain data flow"""
        self._local = threading.local()
        _scopes[self.ticket] = self

    @eager
    def enter(self, weights: Tensor | None) -> None:
        """Start a U-Net call, or the re-run of a part of one."""
        self._local.weights, self._local.open, self._local.used = weights, True, False

    @eager
    def leave(self) -> None:
        """End it and let go of the graph."""
        self._local.weights, self._local.open = None, False

    @property
    def rerun(self) -> object:
        """The part that this thread re-runs."""
        return getattr(self._local, "rerun", None)

    @rerun.setter
    def rerun(self, part: object) -> None:
        self._local.rerun = part

    @property
    def open(self) -> bool:
        """Whether this thread is inside a U-Net call."""
        return getattr(self._local, "open", False)

    @property
    def ignored(self) -> bool:
        """Whether a call with weights is ending that no site has asked for."""
        return getattr(self._local, "weights", None) is not None and not self._local.used

    def read(self, y: Tensor) -> Tensor | None:
        """The weights at a site with activations `y`: [S], or a row for each row of the call; None: plain."""
        if torch.compiler.is_compiling():
            if self.traced is not None:
                return self.traced
            weights: Tensor = torch.ops.rwopt.current(y.detach(), self.ticket, self.columns)
            return weights
        return self.ask()

    @eager
    def ask(self) -> Tensor | None:
        """`read` at run time."""
        if not self.open and torch._C._current_graph_task_id() != -1:
            raise UserError(
                "a part of the U-Net is re-run by checkpointing without its weights: checkpoint whole U-Net calls, "
                "or use unet.enable_gradient_checkpointing()"
            )
        self._local.used = True
        return getattr(self._local, "weights", None)


@torch.library.custom_op("rwopt::current", mutates_args=())
def _current(y: Tensor, ticket: int, columns: int) -> Tensor:
    return _ask(y, ticket, columns)


@eager
def _ask(y: Tensor, ticket: int, columns: int) -> Tensor:
    scope = _scopes.get(ticket)
    weights = None if scope is None else scope.ask()
    if weights is None:
        return torch.ones(len(y), columns, device=y.device)
    if weights.requires_grad:
        raise UserError("a compiled U-Net passes no gradient to the weights: use the U-Net that is not compiled")
    return expand(weights.to(y.device, torch.float32), len(y)).clone()


@_current.register_fake
def _(y: Tensor, ticket: int, columns: int) -> Tensor:
    return y.new_empty((y.shape[0], columns), dtype=torch.float32)


def expand(weights: Tensor, rows: int) -> Tensor:
    """[S] or [B, S] as [rows, S]; a video's frames take the row of their video."""
    if weights.ndim == 1:
        return weights.expand(rows, -1)
    return weights if len(weights) == rows else weights.repeat_interleave(rows // len(weights), 0)


def column_of(weights: Tensor, column: int, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One site's weights in a shape that multiplies `y`: 0-d, or [rows, 1, ...]."""
    w = weights[..., column].to(device=y.device, dtype=dtype or y.dtype)
    if not w.ndim:
        return w
    if w.shape[0] != y.shape[0]:
        w = w.repeat_interleave(y.shape[0] // w.shape[0], 0)
    return w.reshape(-1, *[1] * (y.ndim - 1))
