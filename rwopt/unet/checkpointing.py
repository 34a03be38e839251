"""How weights reach the parts of a U-Net that gradient checkpointing re-runs: as an argument of the part.

diffusers checkpoints resnets, called with `temb`, and transformer blocks, called with `cross_attention_kwargs`. While
checkpointing is on, the enclosing module's argument is given the weights on top, and the part takes them off again at
its start, at the first run and at any later one alike.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.unet.call import Plain
from rwopt.unet.scope import Scope
from rwopt.unet.sites import blocks_of

_CARRIER = "cross_attention_kwargs"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Packed(NamedTuple):
    """A `temb` with the weights of its call."""

    temb: Tensor | None
    weights: Plain


Hooks = tuple[list[RemovableHandle], list[nn.Module]]
"""What a guard put on, and the parts to close with `close_parts` once the sites' own hooks are on."""


def guard_blocks(transformer: nn.Module, key: str, scope: Scope) -> Hooks:
    """For the branches of the transformer blocks at one place."""
    blocks = [block for block in blocks_of(transformer) if block is not transformer]
    place = position(blocks[0], _CARRIER) if blocks else None
    pack = PackBlocks(scope, key, position(transformer, _CARRIER))
    hooks = [transformer.register_forward_pre_hook(pack, with_kwargs=True)]
    hooks += [block.register_forward_pre_hook(UnpackBlock(scope, key, place), with_kwargs=True) for block in blocks]
    return hooks, blocks


def guard_resnets(block: nn.Module, scope: Scope) -> Hooks:
    """For the resnets of one down, middle or up block."""
    hooks = [block.register_forward_pre_hook(PackResnets(scope, position(block, "temb")), with_kwargs=True)]
    # All that a block may hand its temb to: its direct parts.
    named = [(name, part) for name, part in block.named_modules() if not isinstance(part, nn.ModuleList)]
    parts = [part for name, part in named if name and name.count(".") <= 1]
    hooks += [part.register_forward_pre_hook(UnpackResnet(scope), with_kwargs=True) for part in parts]
    return hooks, parts


class PackBlocks:
    """Weights into a transformer's `cross_attention_kwargs`."""

    def __init__(self, scope: Scope, key: str, carrier: int | None) -> None:
        self.scope, self.key, self.carrier = scope, key, carrier

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not _checkpoints(module):
            return None
        if self.carrier is None:
            raise UserError(
                f"gradient checkpointing inside {type(module).__name__} would lose the weights of its branches: "
                "checkpoint whole U-Net calls, or weigh sites of kind transformer"
            )
        self.scope.packed = True
        carried = _argument(args, kwargs, self.carrier, _CARRIER) or {}
        anchor = args[0] if args else kwargs["hidden_states"]
        packed = {**carried, self.key: _Packed(None, self.scope.read(anchor))}
        return _replaced(args, kwargs, self.carrier, _CARRIER, packed)


class PackResnets:
    """Weights into a block's `temb`."""

    def __init__(self, scope: Scope, place: int | None) -> None:
        self.scope, self.place = scope, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not _checkpoints(module):
            return None
        self.scope.packed = True
        temb = _argument(args, kwargs, self.place, "temb")
        packed = _Packed(temb, self.scope.read(args[0] if args else temb))
        return _replaced(args, kwargs, self.place, "temb", packed)


class Unpack(ABC):
    """Open the scope while a part re-runs; at the first run, inside a call, it is open already."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    @abstractmethod
    def unpacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, _Packed] | None:
        """The part's own arguments, and what was packed on top of them; None if nothing was."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        found = self.unpacked(args, kwargs) if self.scope.packed else None
        if found is None:
            return None
        call, packed = found
        if not self.scope.open:
            self.scope.begin_rerun(module, packed.weights)
        return call


class UnpackBlock(Unpack):
    """Off a transformer block's `cross_attention_kwargs`."""

    def __init__(self, scope: Scope, key: str, place: int | None) -> None:
        super().__init__(scope)
        self.key, self.place = key, place

    def unpacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, _Packed] | None:
        carried = _argument(args, kwargs, self.place, _CARRIER)
        if not carried or self.key not in carried:
            return None
        # The attention processors get what is left: an unknown key would make them warn.
        rest = {name: value for name, value in carried.items() if name != self.key}
        return _replaced(args, kwargs, self.place, _CARRIER, rest), carried[self.key]


class UnpackResnet(Unpack):
    """Off a `temb`, wherever the part takes it."""

    def unpacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, _Packed] | None:
        packed = [value for value in (*args, *kwargs.values()) if isinstance(value, _Packed)]
        if not packed:
            return None
        bare = tuple(value.temb if isinstance(value, _Packed) else value for value in args)
        named = {name: value.temb if isinstance(value, _Packed) else value for name, value in kwargs.items()}
        return (bare, named), packed[0]


class ClosePart:
    """End the re-run of a part, after the hooks that weigh it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.scope.end_rerun(module)


def close_parts(parts: Iterable[nn.Module], scope: Scope) -> list[RemovableHandle]:
    """To be registered after the sites' own hooks."""
    return [part.register_forward_hook(ClosePart(scope), always_call=True) for part in parts]


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
