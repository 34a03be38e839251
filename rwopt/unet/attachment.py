"""Hooks on one U-Net that weigh its sites, with the weights of each call given in that call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule.schedule import MODES
from rwopt.unet.checkpointing import Call, close_parts, guard_blocks, guard_resnets, position
from rwopt.unet.follow import Followed
from rwopt.unet.join import weigh_join
from rwopt.unet.scope import Scope, column_of, eager
from rwopt.unet.sites import BRANCHES, Site, branch_modules, find_sites, resnets_at, skip_channels


class Attachment:
    """Hooks on one U-Net for some sites in one mode; calling it calls the U-Net with weights.

    residual: a site's `y = x + f(x)` becomes `x + w f(x)`; output: it becomes `w (x + f(x))`; what joins the stream,
    such as a skip tensor, is multiplied by w in either. At w = 1 all are bit-identical to the plain model, at w = 0 a
    residual site is skipped exactly. Several attachments on one U-Net stack (their weights multiply). Threads may share
    one. Hooks rename no parameters, and with no weights in the call they do nothing.
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
        _refuse_compiled(unet, found)

        self.unet = unet
        self.sites = tuple(sites)
        self.mode = mode
        self.key = f"rwopt_weights_{uuid.uuid4().hex}"  # not id(self): hooks may outlive a dropped attachment
        self._takes_text = position(unet, "encoder_hidden_states") is not None
        self._scope = Scope(len(found))
        self._hooks: list[RemovableHandle] = []
        self._followed: list[Followed] = []
        self._watch_calls()
        # Guards come first and are closed last: a part that is re-run has its weights while its own hooks run.
        guards = [guard_resnets(module, self._scope) for module in _modules(unet, found, "resnets")]
        guards += [guard_blocks(module, self.key, self._scope) for module in _modules(unet, found, "blocks")]
        for hooks, _ in guards:
            self._hooks += hooks
        joins: dict[str, list[tuple[str, int]]] = {}
        for column, site in enumerate(found):
            module = unet.get_submodule(site.path)
            if site.kind in BRANCHES:
                for branch in branch_modules(module, site.kind):
                    self._weigh(branch, column, None)
            elif site.kind == "transformer":
                self._weigh(module, column, _attention_input if mode == "residual" else None)
            elif site.kind == "resnet" and mode == "residual":
                for part in resnets_at(module):
                    self._followed.append(Followed(part, "conv2", _scaling(self._scope, column)))
            elif site.kind == "resnet":
                self._weigh(module, column, None)
            else:
                joins.setdefault(site.path, []).append((site.kind, column))
        for path, columns in joins.items():
            self._weigh_join(unet.get_submodule(path), skip_channels(unet)[path][0], columns)
        for _, parts in guards:
            self._hooks += close_parts(parts, self._scope)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One U-Net call. x: [B, C, ...]; weights: [S] for all rows, [B, S] for each, None for no change.

        Differentiable with respect to `weights`, which keep their own precision. `kwargs` go to the U-Net.
        Returns the U-Net's raw output, of the shape of `x` (but for the channels).
        """
        if weights is not None:
            kwargs |= self.carry(weights, len(x))
        if self._takes_text:  # None is given on: Kandinsky's text comes with `added_cond_kwargs`
            kwargs["encoder_hidden_states"] = encoder_hidden_states
        output: Tensor = self.unet(x, t, **kwargs, return_dict=True).sample
        return output

    @eager
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

    def remove(self) -> None:
        """Take the hooks off. May be called again."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._followed:
            layer.remove()
        self._hooks.clear()
        self._followed.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # The hooks are closures, not bound methods, so that copy.deepcopy(unet) works while they are on.

    def _watch_calls(self) -> None:
        key, scope, followed = self.key, self._scope, self._followed

        @outside_graphs
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            weights = kwargs.get(key)
            for layer in followed:
                layer.check() if torch.compiler.is_compiling() else layer.follow()
            if torch.compiler.is_compiling():
                scope.traced = weights
            else:
                scope.enter(weights)
            return None if weights is None else (args, {name: value for name, value in kwargs.items() if name != key})

        @outside_graphs
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling():
                scope.traced = None
                return
            ignored = scope.ignored and output is not None
            scope.leave()
            if ignored:
                raise UserError("the U-Net was compiled before the weights came and ignores them: attach, then compile")

        self._hooks.append(self.unet.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(self.unet.register_forward_hook(leave, always_call=True))

    def _weigh(self, module: nn.Module, column: int, base: Callable[..., Tensor] | None) -> None:
        """`b + w (y - b)` with b = base(module, x), or `w y` without a base."""
        scope = self._scope

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            y: Tensor = output if isinstance(output, Tensor) else output[0]
            weights = scope.read(y)
            if weights is None:
                return None
            if base is None:
                y = y * column_of(weights, column, y)
            else:
                x = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_tensor"))
                # lerp switches its formula half-way, so it returns b at w = 0 and y at w = 1 themselves; b + w (y - b)
                # would not. From y to b, as the result takes the memory format of the first: another one would make
                # later layers round differently.
                y = torch.lerp(y, base(module, x).to(y.dtype), column_of(1 - weights, column, y))
            if isinstance(output, Tensor):
                return y
            return (y, *output[1:]) if type(output) is tuple else type(output)(sample=y)

        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _weigh_join(self, resnet: nn.Module, stream: int, columns: Sequence[tuple[str, int]]) -> None:
        scope = self._scope

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            name = next((name for name in ("input_tensor", "hidden_states") if name in kwargs), "")
            x: Tensor = args[0] if args else kwargs[name]
            weights = scope.read(x)
            if weights is None:
                return None
            x = weigh_join(x, stream, weights, columns)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})

        self._hooks.append(resnet.register_forward_pre_hook(hook, with_kwargs=True))


def _scaling(scope: Scope, column: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        weights = scope.read(y)
        return None if weights is None else y * column_of(weights, column, y)

    return hook


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of the U-Net itself: `torch.compile(unet)` runs it in Python, and `unet.compile()` traces it.

    Without the mark the first would make a graph of its own for each such hook.
    """
    marked: Callable[..., Any] = torch._dynamo.decorators.skip(hook)
    return marked


def _attention_input(module: nn.Module, x: Tensor) -> Tensor:
    """What the site gives if its branch gives 0: an `Attention` may divide the sum."""
    divisor = getattr(module, "rescale_output_factor", 1.0)
    return x if divisor == 1.0 else x / divisor


def _modules(unet: nn.Module, sites: Sequence[Site], of: str) -> list[nn.Module]:
    """resnets: the blocks around resnet sites; blocks: the transformers around branch sites. Each once."""
    if of == "resnets":
        paths = [site.path.split(".resnets.")[0] for site in sites if ".resnets." in site.path]
    else:
        paths = [site.path for site in sites if site.kind in BRANCHES]
    return [unet.get_submodule(path) for path in dict.fromkeys(paths)]


_COMPILED = "the U-Net is compiled and would ignore the weights: attach them, then compile"


def _refuse_compiled(unet: nn.Module, sites: Sequence[Site]) -> None:
    """Hooks inside of a module that is compiled already would be ignored without a word."""
    compiled = [name for name, module in unet.named_modules() if _is_compiled(module)]
    for site in sites:
        hooked = [site.path]
        if site.kind in BRANCHES:
            blocks = unet.get_submodule(site.path).named_modules()
            hooked += [f"{site.path}.{name}" for name, _ in blocks if name.endswith(BRANCHES[site.kind])]
        if site.kind == "resnet":
            layers = unet.get_submodule(site.path).named_modules()
            hooked += [f"{site.path}.{name}" for name, _ in layers if name.endswith("conv2")]
        if any(not name or f"{place}.".startswith(f"{name}.") for name in compiled for place in hooked):
            raise UserError(_COMPILED)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
