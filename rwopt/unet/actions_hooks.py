"""How actions save compute: stand-ins for the forward of single modules, which follow the frame of their call.

A hook can neither skip a forward nor make one cheaper, so a module that has a move in some pattern of the plan gets an
*actor* as its instance attribute `forward` (as DeepCache and accelerate do). Without a frame, or without a move in it,
an actor calls what was there before. Its module's hooks run in any case, so weights of the present call multiply a
stored branch. The U-Net's own forward, class and state dict stay as they are.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule.actions import FULL, Actions
from rwopt.unet.actions import Frame, rows_of
from rwopt.unet.actions_patterns import Move, Patterns, Place, Take
from rwopt.unet.call import like
from rwopt.unet.checkpointing import Call, close_parts, guard_blocks, guard_resnets
from rwopt.unet.scope import Scope, outside_graphs
from rwopt.unet.sites import BRANCHES, branch_modules, list_sites

_RESIDUALS = "down_intrablock_additional_residuals"
_MOVES = threading.Lock()
COMPILED = "actions and torch.compile do not go together: use the U-Net that is not compiled, or a plan without actions"


class Actor:
    """The forward of the module `owner.name`, in block `around`. takes: what of its own work it keeps if asked to."""

    def __init__(self, owner: nn.Module, name: str, path: str, around: nn.Module, scope: Scope) -> None:
        self.owner, self.name, self.path, self.around, self.scope = owner, name, path, around, scope
        self.module = module = owner.get_submodule(name)
        self.takes: list[Take] = []
        self.text = False
        """whether it makes keys or values of the text"""
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        self._tupled = "return_dict" in inspect.signature(type(module).forward).parameters
        module.forward = self

    @property
    def away(self) -> bool:
        """Whether another layer is there now: LoRA wraps layers at any time, and unwraps them. Keys and values of the
        text are what the model's own layer makes, so that one stays."""
        return not self.text and self.owner._modules[self.name] is not self.module

    def moved(self) -> Actor:
        """The actor of the layer that is there now."""
        self.remove()
        other = Actor(self.owner, self.name, self.path, self.around, self.scope)
        other.takes, self.path, self.takes = self.takes, "", []  # this one may stay in somebody's forward
        return other

    def remove(self) -> None:
        """Out of the module, or where somebody put another forward over it out of the way: no call has a frame then."""
        if self.module.__dict__.get("forward") is not self:
            return
        del self.module.__dict__["forward"]
        if self.before is not None:
            self.module.forward = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise UserError(COMPILED)
        if self.text and not self.scope.open:  # checkpointing runs its block again: nothing there has a gradient
            return self._run(args, kwargs)
        frame = self.scope.read(_input(args, kwargs))
        if not isinstance(frame, Frame):
            return self._run(args, kwargs)
        if self.text:
            return self._of_text(frame, args, kwargs)
        move = frame.pattern.moves.get(self.path)
        if move is not None and (move.place is None or move.place.name in frame.given):
            return self._act(move, frame, args, kwargs)
        for take in self.takes:
            if take.how == "stream" and take.place.name in frame.keep:
                frame.take(take.place, own(_input(args, kwargs), self.around))
        output = self._run(args, kwargs)
        for take in self.takes:
            if take.how in ("output", "branch", "skips") and take.place.name in frame.keep:
                self._take(take, frame, output, args, kwargs)
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _act(self, move: Move, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _input(args, kwargs)
        if move.does == "resume":
            return self._run(*self._resumed(move, frame, args, kwargs))
        if move.does == "hollow":
            return self._hollow(hollow(x), move.count, kwargs)
        if move.does == "inside":  # of a resnet; two by two, so that its sampler may halve it
            return x.new_zeros(len(x), 2, *[2] * (x.ndim - 2))
        if move.does == "zero":
            return torch.zeros_like(x)
        if move.does == "base":
            return self._contained(self._base(x), kwargs)
        assert move.place is not None
        line, part = frame.given[move.place.name], move.place.part
        if move.count:
            skips = tuple(line.value(part + i) for i in range(move.count))
            return skips[-1], skips
        value = own(line.value(part), self.around)
        return self._contained(self._base(x) + value if move.does == "add" else value, kwargs)

    def _hollow(self, nothing: Tensor, count: int, kwargs: dict[str, Any]) -> Any:
        if hasattr(self.module, "skip_conv"):  # it hands on a picture, which may be None
            return (nothing, (nothing,) * count, None) if count else (nothing, None)
        return (nothing, (nothing,) * count) if count else self._contained(nothing, kwargs)

    def _resumed(self, move: Move, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """An up block's arguments without what its first `count` layers would use."""
        x = _input(args, kwargs)
        stream = hollow(x) if move.place is None else own(frame.given[move.place.name].value(0), self.around)
        skips = args[1] if len(args) > 1 else kwargs["res_hidden_states_tuple"]
        skips = (*skips[: len(skips) - move.count], *(hollow(x),) * move.count)  # layers take them from the end
        if args:
            return (stream, skips, *args[2:]), kwargs
        return args, {**kwargs, "hidden_states": stream, "res_hidden_states_tuple": skips}

    def _take(self, take: Take, frame: Frame, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if take.how == "skips":
            for i, skip in enumerate(output[1]):
                frame.take(Place(take.place.name, take.place.part + i), skip)
            return
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        frame.take(take.place, y - self._base(_input(args, kwargs)) if take.how == "branch" else y)

    def _base(self, x: Tensor) -> Tensor:
        """What the module gives if its branch gives 0."""
        divisor = getattr(self.module, "rescale_output_factor", 1.0)
        return x if divisor == 1.0 else x / divisor

    def _contained(self, y: Tensor, kwargs: dict[str, Any]) -> Any:
        if not self._tupled:
            return y
        if kwargs.get("return_dict", True):
            raise UserError(f"{self.path} was asked for an object, which actions do not make: use return_dict=False")
        return (y,)

    def _of_text(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text: Tensor = _input(args, kwargs)
        if frame.texts is None or (torch.is_grad_enabled() and (text.requires_grad or _learns(self.module))):
            return self._run(args, kwargs)
        side = frame.pattern.side
        made = frame.texts.get(self.path, text, side)
        if made is None:
            made = self._run(args, kwargs)
            frame.texts.put(self.path, text, made, side)
        return made


class Weighed:
    """After a module and its weights: keep the stream that it gives."""

    def __init__(self, take: Take, around: nn.Module, scope: Scope) -> None:
        self.take, self.around, self.scope = take, around, scope

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.scope.open:  # a part that checkpointing runs again, when all is taken
            return
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        frame = self.scope.read(y)
        if isinstance(frame, Frame) and self.take.place.name in frame.keep:
            frame.take(self.take.place, own(y, self.around))


class Halve:
    """Before a U-Net call with a frame: follow layers that were replaced, and where one side of guidance runs alone,
    give its half of every argument that has rows."""

    def __init__(self, key: str, actors: dict[str, Actor]) -> None:
        self.key, self.actors = key, actors
        self.acting = False
        """whether a plan may leave something hollow"""

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        frame = kwargs.get(self.key)
        if not isinstance(frame, Frame):
            return None
        kind = frame.pattern.action.kind
        if module._compiled_call_impl is not None:
            raise UserError(COMPILED)
        if kind in ("cut", "output", "encoder") and kwargs.get(_RESIDUALS):
            raise UserError(f"action {kind} leaves out what a T2I adapter is added to: use a plan without it")
        self._follow()
        side = frame.pattern.side
        if side == "both":
            return None
        x = _input(args, kwargs)
        if len(x) % 2:
            raise UserError(f"action {kind} needs [unconditional, conditional] rows, and this call has {len(x)}")
        rows = (len(x), len(x) * x.shape[2]) if x.ndim == 5 else (len(x),)  # AnimateDiff's text has a row a frame
        rest = {name: value if name == self.key else _half(value, rows, side) for name, value in kwargs.items()}
        return tuple(_half(value, rows, side) for value in args), rest

    def _follow(self) -> None:
        if any(actor.away for actor in self.actors.values()):
            with _MOVES:  # another thread may be as far
                self.actors.update({path: actor.moved() for path, actor in self.actors.items() if actor.away})


def _half(value: Any, rows: Sequence[int], side: str) -> Any:
    if isinstance(value, Tensor):
        return rows_of(value, side) if value.ndim and len(value) in rows else value
    if isinstance(value, dict):
        return {name: _half(inner, rows, side) for name, inner in value.items()}
    return type(value)(_half(inner, rows, side) for inner in value) if isinstance(value, list | tuple) else value


class Finish:
    """After a U-Net call, with its scope still open: the whole output or the other half of guidance, given or kept, and
    what the call's owner does. One side that runs alone stands for both: however it is guided, it comes out."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        frame = self.scope.read(y)
        if not isinstance(frame, Frame):
            return None
        made = None
        if "output" in frame.given:
            made = frame.given["output"].value(0)
        elif frame.pattern.side != "both":
            made = torch.cat([y - frame.given["guidance"].value(0) if "guidance" in frame.given else y, y])
        elif "guidance" in frame.keep:
            negative, positive = y.chunk(2)
            frame.take(Place("guidance"), positive - negative)
        frame.take(Place("output"), y)
        if frame.finish is not None:
            frame.finish(frame)
        return None if made is None else like(output, made)


class Stage:
    """Actors and hooks on one U-Net, put on as plans need them."""

    def __init__(self, unet: nn.Module, key: str, scope: Scope, patterns: Patterns) -> None:
        self.unet, self.key, self.scope, self.patterns = unet, key, scope, patterns
        self._actors: dict[str, Actor] = {}
        self._guarded: set[str] = set()
        self._halve = Halve(key, self._actors)
        self._hooks: list[RemovableHandle] = [
            unet.register_forward_pre_hook(self._halve, with_kwargs=True, prepend=True),
            unet.register_forward_hook(Finish(scope), prepend=True),
        ]
        self._ready: set[Any] = {FULL}

    def prepare(self, actions: Actions | None, texts: bool) -> None:
        """For a plan, and for keeping what is made of the text. UserError for what this U-Net has not."""
        if texts and "texts" not in self._ready:
            for path in text_layers(self.unet):
                self._actor(path, guarded=False).text = True
            self._ready.add("texts")
        self._halve.acting |= actions is not None
        for action in actions.patterns if actions is not None else ():
            if action not in self._ready:
                for path in self.patterns[action].moves:
                    self._actor(path)
                for take in self.patterns.takes(action):
                    self._listen(take)
                self._ready.add(action)

    def _listen(self, take: Take) -> None:
        if take.how == "weighed":
            module = self.unet.get_submodule(take.path)
            self._hooks.append(module.register_forward_hook(Weighed(take, self._around(take.path), self.scope)))
        elif take not in (actor := self._actor(take.path)).takes:
            actor.takes.append(take)

    def _actor(self, path: str, guarded: bool = True) -> Actor:
        if path not in self._actors:
            _check_loading(self.unet.get_submodule(path), path)
            owner, _, name = path.rpartition(".")
            around = self._around(path)
            self._actors[path] = Actor(self.unet.get_submodule(owner), name, path, around, self.scope)
            if guarded:
                self._guard(path)
        return self._actors[path]

    def _around(self, path: str) -> nn.Module:
        """The block that a path is in, or the module itself."""
        parts = path.split(".")
        return self.unet.get_submodule(".".join(parts[:2])) if "_blocks" in parts[0] else self.unet.get_submodule(path)

    def _guard(self, path: str) -> None:
        """So that what checkpointing runs again finds its frame: as weights do."""
        block, _, resnet = path.partition(".resnets.")
        place, _, inside = path.partition(".transformer_blocks.")
        around = block if resnet else place if inside else ""
        if not around or around in self._guarded:
            return
        self._guarded.add(around)
        module = self.unet.get_submodule(around)
        hooks, parts = guard_resnets(module, self.scope) if resnet else guard_blocks(module, self.key, self.scope)
        self._hooks += [*hooks, *close_parts(parts, self.scope)]

    def remove(self) -> None:
        """Take all off. May be called again."""
        for hook in self._hooks:
            hook.remove()
        for actor in reversed(self._actors.values()):
            actor.remove()
        self._hooks.clear()
        self._actors.clear()
        self._ready.clear()


def text_layers(unet: nn.Module) -> list[str]:
    """Paths of the layers that make keys and values of the text; under a LoRA the model's own layer."""
    found = []
    for site in list_sites(unet, ("transformer", *BRANCHES, "resnet")):
        if site.kind != "cross":
            continue
        transformer = unet.get_submodule(site.path)
        names = {id(module): name for name, module in transformer.named_modules()}
        for attention in branch_modules(transformer, "cross"):
            if not getattr(attention, "is_cross_attention", False):
                continue
            for layer in (getattr(attention, name, None) for name in ("to_k", "to_v")):
                own_layer = getattr(layer, "base_layer", layer)
                if own_layer is not None:
                    found.append(f"{site.path}.{names[id(own_layer)]}")
    return found


def hollow(x: Tensor) -> Tensor:
    """What stands for a feature map that is not needed: one number a row."""
    return x.new_zeros(len(x), *[1] * (x.ndim - 1))


def own(stream: Tensor, block: nn.Module) -> Tensor:
    """A copy where FreeU, as diffusers has it, would write into it."""
    return stream.clone() if getattr(block, "b1", None) else stream


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument, by name or not: the sample, a stream, a text."""
    x: Tensor = args[0] if args else next(kwargs[name] for name in _INPUTS if name in kwargs)
    return x


_INPUTS = ("hidden_states", "sample", "input_tensor", "input", "x")


def _check_loading(module: nn.Module, path: str) -> None:
    """UserError where the start of a module that actions may leave out loads others too (diffusers' group offload)."""
    hooks: Any = getattr(module, "_diffusers_hook", None)
    hook = hooks.get_hook("group_offloading") if hooks is not None else None
    count = len(hook.group.modules) if hook is not None else 1
    if count > 1:
        raise UserError(
            f"{path} is offloaded in a group of {count}, which it may load, and actions may leave it out: "
            "offload after the schedule is on, or use num_blocks_per_group=1"
        )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def check_alone(unet: nn.Module, enters: Iterable[Any], own_key: str, acting: bool) -> None:
    """UserError if hooks of other attachments would work on what a call with actions leaves hollow."""
    others = [hook for hook in enters if hook.key != own_key]
    halves = [hook for hook in unet._forward_pre_hooks.values() if isinstance(hook, Halve) and hook.key != own_key]
    if (others and acting) or any(hook.acting for hook in halves):
        raise UserError("a schedule with actions does not stack with another one on this U-Net: remove the other first")
