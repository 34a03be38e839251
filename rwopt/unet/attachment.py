"""Hooks on one U-Net that weigh its sites, with the weights of each call given in that call."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule.actions import Actions
from rwopt.schedule.schedule import MODES
from rwopt.unet.actions import Acts, Frame
from rwopt.unet.actions_hooks import Stage, check_alone
from rwopt.unet.actions_patterns import Patterns
from rwopt.unet.call import PLAIN, Plain, call_of, like
from rwopt.unet.checkpointing import Call, close_parts, guard_blocks, guard_resnets, position
from rwopt.unet.follow import Followed
from rwopt.unet.join import weigh_join
from rwopt.unet.scope import Scope, eager, outside_graphs
from rwopt.unet.sites import BRANCHES, Site, branch_modules, find_sites, resnets_at, skip_channels


class Attachment:
    """Hooks on one U-Net for some sites in one mode; calling it calls the U-Net with weights.

    residual: a site's `y = x + f(x)` becomes `x + w f(x)`; output: it becomes `w (x + f(x))`; what joins the stream,
    such as a skip tensor, is multiplied by w in either. At w = 1 all are bit-identical to the plain model, at w = 0 a
    residual site is skipped exactly. Several attachments on one U-Net stack (their weights multiply). Threads may share
    one; those that share a compiled U-Net take turns. Hooks rename no parameters, and with no weights in the call they
    do nothing. A copy of the U-Net has an attachment of its own.
    """

    def __init__(self, unet: nn.Module, sites: Sequence[str], mode: str = "residual") -> None:
        """`sites`: ids as in `rwopt.list_sites`, in the order of the weights' columns; `mode`: residual or output.

        Raises UserError for an absent or repeated site, an unknown mode, `output` at a branch site (a branch
        has no stream of its own to scale), and a compiled U-Net (it would ignore new hooks without a word).
        """
        if hasattr(unet, "_orig_mod"):
            raise UserError(_COMPILED)
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown: choose from {', '.join(MODES)}")
        for index, name in enumerate(sites):
            if name in sites[:index]:
                raise UserError(f"site {name} is given more than once: name each site once")
        found = find_sites(unet, sites)
        branches = [site.id for site in found if site.kind in BRANCHES]
        if mode == "output" and branches:
            raise UserError(f"mode 'output' does not exist for the branch site {branches[0]}: use 'residual'")
        around = _around(unet, found)
        if any(map(_is_compiled, around)):  # hooks in there would be ignored without a word
            raise UserError(_COMPILED)
        check_alone(unet, (), "", acting=False)

        # Graphs are shared by all U-Nets of a class that look alike, and torch would not look at their hooks: that of a
        # plain U-Net would be used for one with weights.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self.unet = unet
        self.sites = tuple(sites)
        self.mode = mode
        self.key = f"rwopt_weights_{uuid.uuid4().hex}"  # not id(self): hooks may outlive a dropped attachment
        self.frame: Frame | None = None
        """what the calls take from earlier ones, see `with_frame`"""
        self._stage: Stage | None = None
        self._takes_text = position(unet, "encoder_hidden_states") is not None
        self._scope = scope = Scope(len(found))
        self._followed: list[Followed] = []
        self._hooks: list[RemovableHandle] = [
            unet.register_forward_pre_hook(Enter(self.key, scope, self._followed), with_kwargs=True),
            unet.register_forward_hook(Leave(scope, around), always_call=True),
        ]
        # Guards come first and are closed last: a part that is re-run has its weights while its own hooks run.
        guards = [guard_resnets(module, scope) for module in _modules(unet, found, "resnets")]
        guards += [guard_blocks(module, self.key, scope) for module in _modules(unet, found, "blocks")]
        for hooks, _ in guards:
            self._hooks += hooks
        joins: dict[str, list[tuple[str, int]]] = {}
        for column, site in enumerate(found):
            module = unet.get_submodule(site.path)
            if site.kind in BRANCHES:
                for branch in branch_modules(module, site.kind):
                    self._hooks.append(branch.register_forward_hook(Scale(scope, column)))
            elif site.kind == "transformer" and mode == "residual":
                self._hooks.append(module.register_forward_hook(Blend(scope, column), with_kwargs=True))
            elif site.kind == "resnet" and mode == "residual":
                for part in resnets_at(module):
                    self._followed.append(Followed(part, "conv2", Scale(scope, column)))
            elif site.kind in ("transformer", "resnet"):
                self._hooks.append(module.register_forward_hook(Scale(scope, column)))
            else:
                joins.setdefault(site.path, []).append((site.kind, column))
        for path, columns in joins.items():
            join = Join(scope, skip_channels(unet)[path][0], columns)
            self._hooks.append(unet.get_submodule(path).register_forward_pre_hook(join, with_kwargs=True))
        for _, parts in guards:
            self._hooks += close_parts(parts, scope)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One U-Net call. x: [B, C, ...]; weights: [S] for all rows, [B, S] for each, None for no change.

        Differentiable with respect to `weights`, which keep their own precision. Weights [S] that need no gradient are
        best left on the CPU, whatever device the U-Net is on: they become numbers. `kwargs` go to the U-Net. Returns
        the U-Net's raw output, of the shape of `x` (but for the channels).
        """
        if weights is not None:
            kwargs |= self.carry(weights, len(x))
        if self.frame is not None:
            kwargs[self.key] = self.frame.weighed(PLAIN if weights is None else call_of(weights))
        if self._takes_text:  # None is given on: Kandinsky's text comes with `added_cond_kwargs`
            kwargs["encoder_hidden_states"] = encoder_hidden_states
        output: Tensor = self.unet(x, t, **kwargs, return_dict=True).sample
        return output

    def carry(self, weights: Tensor, rows: int) -> dict[str, Tensor]:
        """The keyword argument of a U-Net call that brings `weights` ([S], or [rows, S]) to the hooks."""
        if not self._hooks:
            raise UserError("this attachment was removed from its U-Net: make a new one")
        if tuple(weights.shape) not in {(len(self.sites),), (rows, len(self.sites))}:
            raise UserError(
                f"weights of shape {list(weights.shape)} do not fit: give [{len(self.sites)}] (sites) "
                f"or [{rows}, {len(self.sites)}] (rows of the batch, sites)"
            )
        return {self.key: weights}

    def acts(self, actions: Actions | None, texts: bool = False) -> Acts:
        """Make ready for a plan; `Acts.frame` gives the frame of each call, `with_frame` brings it there.

        texts: make also ready to keep what is made of the text. Actors and hooks stay until `remove`; calls without a
        frame do not see them. Raises UserError for what this U-Net has not, for a compiled one, and, with a plan, for
        another attachment on it, whose hooks would work on what a call leaves out.
        """
        if not self._hooks:
            raise UserError("this attachment was removed from its U-Net: make a new one")
        if actions is not None:
            enters = [hook for hook in self.unet._forward_pre_hooks.values() if isinstance(hook, Enter)]
            check_alone(self.unet, enters, self.key, acting=True)
            if any(map(_is_compiled, self.unet.modules())):
                raise UserError("actions and torch.compile do not go together: use the U-Net that is not compiled")
        if self._stage is None:
            self._stage = Stage(self.unet, self.key, self._scope, Patterns(self.unet, self.sites))
        acts = Acts(self._stage.patterns, actions)
        self._stage.prepare(actions, texts)
        return acts

    def with_frame(self, frame: Frame) -> Attachment:
        """This attachment for one call, which takes, leaves out and keeps what `frame` says."""
        view = copy.copy(self)
        view.frame = frame
        return view

    @property
    def compiled(self) -> bool:
        """Whether a compiled graph holds these hooks: they cannot be taken out of it, only be given ones."""
        return self._scope.compiled

    def rest(self) -> None:
        """Give compiled graphs the plain model's weights, until a call brings others."""
        self._scope.write(PLAIN)

    def remove(self) -> None:
        """Take the hooks off. May be called again."""
        self.rest()
        for hook in self._hooks:
            hook.remove()
        for layer in self._followed:
            layer.remove()
        if self._stage is not None:
            self._stage.remove()
            self._stage = None
        self._hooks.clear()
        self._followed.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_at_work = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
"""Not None where `torch.compile` is at work in this thread, but for what is `eager`."""


# The hooks are objects, not closures, so that a copy of the U-Net gets copies of them: its own, which can be taken off.


class Enter:
    """Before a U-Net call: take the weights out of its arguments and open the scope with them."""

    def __init__(self, key: str, scope: Scope, followed: Sequence[Followed]) -> None:
        self.key, self.scope, self.followed = key, scope, followed

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        weights = kwargs.get(self.key)
        self._open(weights, args[0] if args else kwargs["sample"])
        return None if weights is None else (args, {name: value for name, value in kwargs.items() if name != self.key})

    @eager
    def _open(self, weights: Tensor | Plain | None, x: Tensor) -> None:
        for layer in self.followed:
            layer.follow()
        call = weights if isinstance(weights, Plain) else PLAIN if weights is None else call_of(weights)
        self.scope.enter(call, x)


class Leave:
    """After it: close the scope."""

    def __init__(self, scope: Scope, around: Sequence[nn.Module]) -> None:
        self.scope, self.around = scope, around

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        compiled = _at_work() is not None
        if not self.scope.used and not compiled:
            compiled = any(part._compiled_call_impl is not None for part in self.around)
        why = self.scope.close(compiled)
        if why and output is not None:  # there is none after an error, which says more
            raise UserError(why)


class Scale:
    """`w y` of what a module gives."""

    def __init__(self, scope: Scope, column: int) -> None:
        self.scope, self.column = scope, column

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        y_new = self.scope.read(y).scaled(y, self.column)
        return None if y_new is None else like(output, y_new)


class Blend:
    """`b + w (y - b)` of what a module gives, b being its input."""

    def __init__(self, scope: Scope, column: int) -> None:
        self.scope, self.column = scope, column

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        base: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "input_tensor"]
        divisor = getattr(module, "rescale_output_factor", 1.0)
        if divisor != 1.0:  # an `Attention` may divide the sum: that is what the site gives if its branch gives 0
            base = base / divisor
        y_new = self.scope.read(y).blended(y, base, self.column)
        return None if y_new is None else like(output, y_new)


class Join:
    """Skip tensors, and FreeU's sites, where they join the stream in front of a resnet."""

    def __init__(self, scope: Scope, stream: int, columns: Sequence[tuple[str, int]]) -> None:
        self.scope, self.stream, self.columns = scope, stream, columns

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        name = next((name for name in ("input_tensor", "hidden_states") if name in kwargs), "")
        x: Tensor = args[0] if args else kwargs[name]
        call = self.scope.read(x)
        if isinstance(call, Frame):
            call = call.within(self.columns[0][1])  # the sites of a join are computed together
        x_new = weigh_join(x, self.stream, call, self.columns)
        if x_new is None:
            return None
        return ((x_new, *args[1:]), kwargs) if args else (args, {**kwargs, name: x_new})


def _modules(unet: nn.Module, sites: Sequence[Site], of: str) -> list[nn.Module]:
    """resnets: the blocks around resnet sites; blocks: the transformers around branch sites. Each once."""
    if of == "resnets":
        paths = [site.path.split(".resnets.")[0] for site in sites if ".resnets." in site.path]
    else:
        paths = [site.path for site in sites if site.kind in BRANCHES]
    return [unet.get_submodule(path) for path in dict.fromkeys(paths)]


_COMPILED = "the U-Net is compiled and would ignore the weights: attach them, then compile"


def _around(unet: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The modules that have a hook of a site, or that hold one: if such a module is compiled, so is the hook."""
    paths: dict[str, None] = {}
    for site in sites:
        hooked = [site.path]
        if site.kind in BRANCHES:
            blocks = unet.get_submodule(site.path).named_modules()
            hooked += [f"{site.path}.{name}" for name, _ in blocks if name.endswith(BRANCHES[site.kind])]
        if site.kind == "resnet":
            layers = unet.get_submodule(site.path).named_modules()
            hooked += [f"{site.path}.{name}" for name, _ in layers if name.endswith("conv2")]
        for path in hooked:
            parts = path.split(".")
            paths.update((".".join(parts[:n]), None) for n in range(len(parts) + 1))
    return [unet.get_submodule(path) for path in paths]


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
