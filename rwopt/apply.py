"""Put weights on a live U-Net or pipeline, and take them off again.

`Attachment` is the mechanism: torch forward hooks that multiply each site by its weight of *this* call. The
weights travel as an argument of the U-Net, inside `cross_attention_kwargs` under a private key. They are
never kept between calls, because gradient checkpointing re-runs parts of an earlier call during the backward
pass and would silently read the weights of the latest one. Hooks rename no parameters, and with no weights in
the call they do nothing.

`apply` is the use: it looks a schedule up at the noise level of each U-Net call of any diffusers pipeline.
"""

from __future__ import annotations

import inspect
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule import MODES, Array, Schedule, noise_table, sigma_at, sigma_of
from rwopt.sites import branch_modules, find_sites, list_sites

_CARRIER = "cross_attention_kwargs"
_INNER_POSITION = 5  # of it in forward() of Transformer2DModel and of BasicTransformerBlock alike


class Attachment:
    """Hooks on one U-Net for some sites in one mode; calling it calls the U-Net with weights.

    residual: a site's `y = x + f(x)` becomes `x + w f(x)`; output: it becomes `w (x + f(x))`.
    At w = 1 both are bit-identical to the plain model, at w = 0 a residual site is skipped exactly.
    Several attachments on one U-Net stack (their weights multiply). Threads may share one.
    """

    def __init__(self, unet: nn.Module, sites: Sequence[str], mode: str = "residual") -> None:
        """`sites`: ids as in `rwopt.sites`, in the order of the weights' columns; `mode`: residual or output.

        Raises UserError for an absent or repeated site, an unknown mode, `output` at a branch site (a branch
        has no stream of its own to scale), and a compiled U-Net (it would ignore new hooks without a word).
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown: choose from {', '.join(MODES)}")
        if hasattr(unet, "_orig_mod") or any(m._compiled_call_impl is not None for m in unet.modules()):
            raise UserError("the U-Net is compiled and would ignore the weights: attach them, then compile")
        parameters = list(inspect.signature(type(unet).forward).parameters)
        if _CARRIER not in parameters:
            raise UserError(f"{type(unet).__name__} takes no {_CARRIER}: give a text-conditioned diffusers U-Net")
        for index, name in enumerate(sites):
            if name in sites[:index]:
                raise UserError(f"site {name} is given more than once: name each site once")
        found = find_sites(unet, sites)
        branches = [site.id for site in found if site.kind != "transformer"]
        if mode == "output" and branches:
            raise UserError(f"mode 'output' does not exist for the branch site {branches[0]}: use 'residual'")

        self.unet = unet
        self.sites = tuple(sites)
        self.mode = mode
        self.position = parameters.index(_CARRIER) - 1
        """of `cross_attention_kwargs` among the positional arguments of the U-Net"""
        self._key = f"rwopt_weights_{uuid.uuid4().hex}"  # not id(self): hooks may outlive a dropped attachment
        self._hooks: list[RemovableHandle] = []
        # What the branch hooks of a block read while that block runs. A block sets it at its own start, hence
        # also when checkpointing re-runs it. One value a thread, since threads may share the U-Net.
        self._block = threading.local()

        for site in list_sites(unet):
            for block in unet.get_submodule(site.path).transformer_blocks:  # type: ignore[union-attr]
                self._watch_block(block)
        for column, site in enumerate(found):
            transformer = unet.get_submodule(site.path)
            if site.kind == "transformer":
                self._weigh_transformer(transformer, column)
            else:
                for module in branch_modules(transformer, site.kind):
                    self._weigh_branch(module, column)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        encoder_hidden_states: Tensor,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One U-Net call. x: [B, C, h, w]; weights: [S] for all rows, [B, S] for each, None for no change.

        Differentiable with respect to `weights`, which keep their own precision. `kwargs` go to the U-Net.
        Returns the U-Net's raw output [B, C, h, w].
        """
        if weights is not None:
            kwargs[_CARRIER] = {**(kwargs.get(_CARRIER) or {}), **self.carry(weights, len(x))}
        kwargs["return_dict"] = True
        output: Tensor = self.unet(x, t, encoder_hidden_states=encoder_hidden_states, **kwargs).sample
        return output

    def carry(self, weights: Tensor, rows: int) -> dict[str, Tensor]:
        """The entry of `cross_attention_kwargs` that brings `weights` ([S], or [rows, S]) to the hooks."""
        if not self._hooks:
            raise UserError("this attachment was removed from its U-Net: make a new one")
        if tuple(weights.shape) not in {(len(self.sites),), (rows, len(self.sites))}:
            raise UserError(
                f"weights of shape {list(weights.shape)} do not fit: give [{len(self.sites)}] (sites) "
                f"or [{rows}, {len(self.sites)}] (rows of the batch, sites)"
            )
        return {self._key: weights}

    def remove(self) -> None:
        """Take the hooks off. May be called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # The hooks are closures, not bound methods, so that copy.deepcopy(unet) works while they are on.

    def _weigh_transformer(self, transformer: nn.Module, column: int) -> None:
        key, residual = self._key, self.mode == "residual"

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            weights = _carried(args, kwargs, _INNER_POSITION).get(key)
            if weights is None:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (_weigh(x, output[0], weights, column, residual), *output[1:])
            return type(output)(sample=_weigh(x, output.sample, weights, column, residual))

        self._hooks.append(transformer.register_forward_hook(hook, with_kwargs=True))

    def _watch_block(self, block: nn.Module) -> None:
        key, state = self._key, self._block

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            carried = _carried(args, kwargs, _INNER_POSITION)
            state.weights = carried.get(key)
            if state.weights is None:
                return None
            # The attention processors get what is left: an unknown key would make them warn at every call.
            rest = {name: value for name, value in carried.items() if name != key}
            return _with_carried(args, kwargs, _INNER_POSITION, rest)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            state.weights = None  # let go of the graph

        self._hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(block.register_forward_hook(leave, always_call=True))

    def _weigh_branch(self, branch: nn.Module, column: int) -> None:
        state = self._block

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            weights = getattr(state, "weights", None)
            return None if weights is None else _weigh(None, output, weights, column, residual=False)

        self._hooks.append(branch.register_forward_hook(hook))


class Handle:
    """A schedule on a U-Net; `remove()` takes this one off, and so does leaving a `with` block."""

    def __init__(self, schedule: Schedule | None = None, attachment: Attachment | None = None) -> None:
        self.schedule = schedule
        self.attachment = attachment
        self._hook: RemovableHandle | None = None

    def remove(self) -> None:
        """Take the schedule off. May be called again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.attachment is not None:
            self.attachment.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply(target: Any, schedule: Schedule | str | Path | None) -> Handle:
    """Put a schedule (or its file) on a diffusers pipeline or bare U-Net; None takes off all that was put on.

    Each U-Net call is weighed by the schedule at the VE sigma of its timestep, so any sampler, number of
    steps, strength and guidance works. The noise table is that of `target.scheduler`, or the schedule's own
    `noise` for a bare U-Net. Applying twice stacks: the weights multiply. Apply first, compile afterwards.

    Raises UserError if the schedule names sites that the U-Net lacks, or if no noise table is known.
    """
    unet: nn.Module = getattr(target, "unet", target)
    if schedule is None:
        for hook in list(getattr(unet, "_orig_mod", unet)._forward_pre_hooks.values()):
            if isinstance(getattr(hook, "handle", None), Handle):
                hook.handle.remove()
        return Handle()
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    levels = _noise_levels(target, schedule)
    attachment = Attachment(unet, schedule.sites, schedule.mode)
    plan, position = schedule, attachment.position

    def weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0] if args else kwargs["sample"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        times = torch.as_tensor(t).detach().cpu().double().numpy()
        sigma = sigma_at(times if times.size > 1 else times.reshape(()), levels())
        weights = torch.as_tensor(plan.at(sigma), dtype=torch.float32, device=x.device)
        carried = {**_carried(args, kwargs, position), **attachment.carry(weights, len(x))}
        return _with_carried(args, kwargs, position, carried)

    handle = Handle(schedule, attachment)
    # How apply(target, None) finds it, without a global registry.
    weigh.handle = handle  # type: ignore[attr-defined]
    handle._hook = unet.register_forward_pre_hook(weigh, with_kwargs=True)
    return handle


def _noise_levels(target: Any, schedule: Schedule) -> Callable[[], Array]:
    """Gives VE sigma [T] of the training timesteps; asked at each call, because schedulers get swapped."""
    cached: tuple[Any, Array] | None = None

    def levels() -> Array:
        nonlocal cached
        abar = getattr(getattr(target, "scheduler", None), "alphas_cumprod", None)
        if cached is None or cached[0] is not abar:
            if abar is not None:
                cached = abar, sigma_of(torch.as_tensor(abar).detach().cpu().numpy())
            elif schedule.noise:
                cached = abar, noise_table(schedule.noise)
            else:
                kind = type(getattr(target, "scheduler", target)).__name__
                raise UserError(f"{kind} has no noise table: give the pipeline, or a schedule with a 'noise' entry")
        return cached[1]

    levels()  # an error belongs to apply(), not to the first picture
    return levels


def _weigh(x: Tensor | None, y: Tensor, weights: Tensor, column: int, residual: bool) -> Tensor:
    """`x + w (y - x)` if residual, else `w y`; w: that column of [S] or [B, S]. Exact at w = 0 and w = 1."""
    w = weights[..., column].to(device=y.device, dtype=y.dtype)
    w = w.reshape(-1, *[1] * (y.ndim - 1)) if w.ndim else w
    if residual and x is not None:
        # lerp switches its formula at w = 0.5, so it returns x at 0 and y at 1 themselves; x + w (y - x)
        # would not.
        return torch.lerp(x.to(y.dtype), y, w)
    return y * w


def _carried(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> dict[str, Any]:
    """The call's `cross_attention_kwargs`, by keyword or at `position`; empty if it has none."""
    return (args[position] if len(args) > position else kwargs.get(_CARRIER)) or {}


def _with_carried(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, carried: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other `cross_attention_kwargs`."""
    if len(args) > position:
        return (*args[:position], carried, *args[position + 1 :]), kwargs
    return args, {**kwargs, _CARRIER: carried}
