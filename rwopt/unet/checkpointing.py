"""How weights reach the parts of a U-Net that gradient checkpointing re-runs: as an argument of the part.

diffusers checkpoints resnets, called with `temb`, and transformer blocks, called with `cross_attention_kwargs`. While
checkpointing is on, the enclosing module's argument is given the weights on top, and the part takes them off again at
its start, at the first run and at any later one alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.unet.scope import Scope
from rwopt.unet.sites import blocks_of

_CARRIER = "cross_attention_kwargs"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Packed(NamedTuple):
    """A `temb` with the weights of its call."""

    temb: Tensor | None
    weights: Tensor | None


Hooks = tuple[list[RemovableHandle], list[nn.Module]]
"""What a guard put on, and the parts to close with `close_parts` once the sites' own hooks are on."""


def guard_blocks(transformer: nn.Module, key: str, scope: Scope) -> Hooks:
    """For the branches of the transformer blocks at one place."""
    carrier = position(transformer, _CARRIER)

    def pack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not _checkpoints(module):
            return None
        if carrier is None:
            raise UserError(
                f"gradient checkpointing inside {type(module).__name__} would lose the weights of its branches: "
                "checkpoint whole U-Net calls, or weigh sites of kind transformer"
            )
        carried = _argument(args, kwargs, carrier, _CARRIER) or {}
        anchor = args[0] if args else kwargs["hidden_states"]
        return _replaced(args, kwargs, carrier, _CARRIER, {**carried, key: _Packed(None, scope.read(anchor))})

    blocks = [block for block in blocks_of(transformer) if block is not transformer]
    place = position(blocks[0], _CARRIER) if blocks else None

    def unpack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any] | None:
        carried = _argument(args, kwargs, place, _CARRIER)
        if not carried or key not in carried:
            return None
        # The attention processors get what is left: an unknown key would make them warn.
        rest = {name: value for name, value in carried.items() if name != key}
        return _replaced(args, kwargs, place, _CARRIER, rest), carried[key]

    hooks = [transformer.register_forward_pre_hook(pack, with_kwargs=True)]
    hooks += [_opened(block, scope, unpack) for block in blocks]
    return hooks, blocks


def guard_resnets(block: nn.Module, scope: Scope) -> Hooks:
    """For the resnets of one down, middle or up block."""
    place = position(block, "temb")

    def pack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not _checkpoints(module):
            return None
        temb = _argument(args, kwargs, place, "temb")
        return _replaced(args, kwargs, place, "temb", _Packed(temb, scope.read(args[0] if args else temb)))

    def unpack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any] | None:
        packn = [value for value in (*args, *kwargs.values()) if isinstance(value, _Packed)]
        if not packn:
            return None
        bare = tuple(value.temb if isinstance(value, _Packed) else value for value in args)
        named = {name: value.temb if isinstance(value, _Packed) else value for name, value in kwargs.items()}
        return (bare, named), packn[0]

    hooks = [block.register_forward_pre_hook(pack, with_kwargs=True)]
    # All that a block may hand its temb to: its direct parts.
    named = [(name, part) for name, part in block.named_modules() if not isinstance(part, nn.ModuleList)]
    parts = [part for name, part in named if name and name.count(".") <= 1]
    hooks += [_opened(part, scope, unpack) for part in parts]
    return hooks, parts


def _opened(part: nn.Module, scope: Scope, unpack: Callable[..., tuple[Call, Any] | None]) -> RemovableHandle:
    """Open the scope while a part re-runs; at the first run, inside a call, it is open already."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        found = unpack(module, args, kwargs)
        if found is None:
            return None
        call, packn = found
        if not scope.open:
            scope.enter(packn.weights)
            scope.rerun = module
        return call

    return part.register_forward_pre_hook(enter, with_kwargs=True)


def close_parts(parts: Iterable[nn.Module], scope: Scope) -> list[RemovableHandle]:
    """End the re-run of a part, after the hooks that weigh it."""

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and scope.rerun is module:
            scope.rerun = None
            scope.leave()

    return [part.register_forward_hook(leave, always_call=True) for part in parts]


def _checkpoints(module: nn.Module) -> bool:
    on = torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
    if on and torch.compiler.is_compiling():
        raise UserError("weights, torch.compile and gradient checkpointing do not go together: leave one out")
    return bool(on)


def position(module: nn.Module, name: str) -> int | None:
    """Of a parameter among the positional arguments of `module`; None if it has no such parameter."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names.index(name) - 1 if name in names else None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | None, name: str) -> Any:
    return args[place] if place is not None and len(args) > place else kwargs.get(name)


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | None, name: str, value: Any) -> Call:
    if place is not None and len(args) > place:
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
