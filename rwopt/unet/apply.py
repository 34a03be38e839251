"""`apply`: a schedule on a pipeline or bare U-Net, looked up at the noise level of every U-Net call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.actions_runs import ActingLookup
from rwopt.unet.attachment import Attachment
from rwopt.unet.checkpointing import Call
from rwopt.unet.lookup import Lookup, same_storage
from rwopt.unet.scope import eager, outside_graphs
from rwopt.unet.sites import ALL_KINDS, brief, list_sites, short


class Handle:
    """A schedule on a U-Net; `remove()` takes this one off, and so does leaving a `with` block.

    `handle.schedule = other` puts another schedule of the same sites and mode in its place, also on a compiled U-Net,
    without compiling again. A copy of the pipeline or U-Net has a handle of its own: `apply(copy, None)` takes it off.
    """

    def __init__(
        self, attachment: Attachment | None = None, target: Any = None, lookup: Lookup | None = None
    ) -> None:
        self.attachment, self.target, self.lookup = attachment, target, lookup
        self.resting = False
        """taken off, but for hooks that a compiled graph holds"""
        self._hooks: list[RemovableHandle] = []

    @property
    def schedule(self) -> Schedule | None:
        """What weighs the calls; None for a handle of nothing."""
        return None if self.lookup is None else self.lookup.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if self.attachment is None or self.lookup is None or self.resting:
            raise UserError("this handle holds no schedule: apply one")
        if not self._fits(schedule):
            raise UserError(
                f"handle.schedule takes the same {len(self.attachment.sites)} sites in mode {self.attachment.mode}, "
                f"not {len(schedule.sites)} in mode {schedule.mode}: apply it instead"
            )
        _check_one_tells(self.attachment.unet, self.target, schedule, self)
        if schedule.actions is not None and not isinstance(self.lookup, ActingLookup):
            raise UserError("this handle's schedule has no actions and the new one has: apply it instead")
        if isinstance(self.lookup, ActingLookup):
            self.lookup.check(self.target, schedule)
            self.lookup.acts = self.attachment.acts(schedule.actions, self.lookup.texts)
        self.lookup.schedule = schedule

    @property
    def arguments(self) -> dict[str, Any]:
        """For the pipeline's call, `pipe(prompt, **handle.arguments)`: what its schedule's steps ask for.

        {} without steps. Else the grid as `timesteps`, and where they are part of the steps `guidance_scale` and a
        `callback_on_step_end` that sets it for each next call; for an edit also `strength` 1, since the grid starts at
        the level of the edit. What the U-Net is told needs no argument. Raises UserError, with the remedy, if the
        pipeline cannot take them: for its scheduler, its call's parameters, or its noise; and for a bare U-Net.
        """
        return {} if self.lookup is None or self.resting else self.lookup.arguments()

    def _fits(self, schedule: Schedule) -> bool:
        attachment = self.attachment
        return attachment is not None and (attachment.sites, attachment.mode) == (schedule.sites, schedule.mode)

    def remove(self) -> None:
        """Take the schedule off. May be called again.

        A compiled graph keeps the hooks that it was made with; there they rest, at weights of one, until `apply` puts a
        schedule of the same sites and mode on.
        """
        if self.attachment is None or self.lookup is None or self.resting:
            return
        if self.attachment.compiled:
            self.resting = True
            self.attachment.rest()
            return
        for hook in self._hooks:
            hook.remove()
        self.attachment.remove()
        self._hooks, self.attachment, self.lookup = [], None, None

    def _taken_over(self, target: Any, schedule: Schedule) -> Handle:
        """A new handle for the hooks of this one, which rests."""
        assert self.attachment is not None
        handle = Handle(self.attachment, target, Lookup(target, schedule))
        handle._hooks = self._hooks
        hook = next(hook for hook in _hooks(self.attachment.unet) if hook.handle is self)
        hook.handle = handle
        self._hooks, self.attachment, self.lookup = [], None, None
        return handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """Of a copied U-Net. It belongs to the copied pipeline, or where the U-Net alone is copied to the copy."""
        copied = memo[id(self)] = Handle()
        attachment = copied.attachment = copy.deepcopy(self.attachment, memo)
        copied._hooks, copied.resting = copy.deepcopy(self._hooks, memo), self.resting
        if self.lookup is not None and attachment is not None:
            whole = id(self.target) in memo  # the pipeline is being copied, or the target is the U-Net itself
            copied.target = memo[id(self.target)] if whole else attachment.unet
            copied.lookup = self.lookup.copied(copied.target, whole)
            if isinstance(self.lookup, ActingLookup) and isinstance(copied.lookup, ActingLookup):
                copied.lookup.acts = copy.deepcopy(self.lookup.acts, memo)
        return copied

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Weigh:
    """Before a U-Net call, in front of the attachment's own hook: give the call its weights."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle  # how apply(target, None) finds it, without a global registry

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        x: Tensor = args[0] if args else kwargs["sample"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        if text is None:  # Kandinsky's condition
            text = (kwargs.get("added_cond_kwargs") or {}).get("image_embeds")
        given = self._given(module, x, t, text)
        return (args, {**kwargs, **given}) if given else None

    @eager
    def _given(self, module: nn.Module, x: Tensor, t: Any, text: Tensor | None) -> dict[str, Any]:
        """For the hooks behind, by their keys: the weights, and where it is another the timestep to tell."""
        handle = self.handle
        lookup, attachment = handle.lookup, handle.attachment
        if lookup is None or attachment is None or handle.resting or not _mine(module, handle.target, t):
            return {}
        weights = lookup.frame(x, t, text) if isinstance(lookup, ActingLookup) else lookup(x, t)
        given: dict[str, Any] = {attachment.key: weights}
        told = lookup.told(x, t) if lookup.tells else None
        return given if told is None else {**given, _told_key(attachment): told}


class Tell:
    """Tell the U-Net another timestep than the solver's. Behind every `Weigh`: all look up at the solver's."""

    def __init__(self, key: str) -> None:
        self.key = key

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if self.key not in kwargs:
            return None
        told = kwargs[self.key]
        rest = {name: value for name, value in kwargs.items() if name != self.key}
        return ((args[0], told, *args[2:]), rest) if len(args) > 1 else (args, {**rest, "timestep": told})


def _told_key(attachment: Attachment) -> str:
    return f"{attachment.key}_told"


def apply(target: Any, schedule: Schedule | str | Path | None, text_once: bool = False) -> Handle:
    """Put a schedule (or its file) on a diffusers pipeline or bare U-Net; None takes off all that was put on.

    Each U-Net call is weighed by the schedule at the VE sigma of its timestep, so any sampler, number of steps,
    strength and guidance works. The noise table is that of `target.scheduler`, or the schedule's own `noise` for a
    bare U-Net. Applying twice stacks: the weights multiply. Apply first, compile afterwards; on a compiled U-Net a
    schedule can take the place of another one of the same sites and mode. Pipelines that share a U-Net, also in several
    threads, each see their own schedule; give each its own scheduler. The sampler's own dials that a schedule may have
    (`Schedule.steps`) are for the pipeline's call: `pipe(prompt, **handle.arguments)`.

    What a schedule with actions stores belongs to one picture of one thread (`rwopt.unet.actions_runs`). Such a one
    does not stack, and its U-Net cannot be compiled. text_once: make keys and values of the text once a picture, not in
    each call; what comes out is the same to the last bit.

    Raises UserError if the schedule names sites that the U-Net lacks or was made for another class of U-Net (map it
    with `rwopt.map_schedule`), if no noise table is known, for a second schedule with `steps.told`, and for weights of
    one side of guidance on a pipeline whose batch layout is not known.
    """
    unet: nn.Module = getattr(target, "unet", target)
    bare: nn.Module = getattr(unet, "_orig_mod", unet)
    if not isinstance(bare, nn.Module):
        raise UserError(f"{type(target).__name__} has no U-Net: give a pipeline of Stable Diffusion's kind, or a U-Net")
    if schedule is None:
        for handle in _handles(bare):
            handle.remove()
        return Handle()
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    kind = type(bare).__name__
    made_for = schedule.model.get("unet_class", kind)
    if made_for != kind:
        raise UserError(
            f"the schedule was made for a {made_for} ({short(schedule.sites)}), "
            f"this is a {kind} ({brief(list_sites(unet, ALL_KINDS))}): map it with rwopt.map_schedule first"
        )
    for other in _pipelines(bare).values():
        shared = getattr(other, "scheduler", None)
        if other is not target and shared is not None and shared is getattr(target, "scheduler", None):
            raise UserError("two pipelines share this U-Net and one scheduler: give each its own scheduler")
    _check_one_tells(bare, target, schedule)
    for handle in _handles(bare):
        if handle.resting and handle._fits(schedule):
            return handle._taken_over(target, schedule)
    acting = schedule.actions is not None or text_once
    ActingLookup.check(target, schedule)
    lookup = ActingLookup(target, schedule) if acting else Lookup(target, schedule)
    attachment = Attachment(unet, schedule.sites, schedule.mode)
    if isinstance(lookup, ActingLookup):
        try:
            lookup.acts, lookup.texts = attachment.acts(schedule.actions, text_once), text_once
        except UserError:
            attachment.remove()
            raise
    handle = Handle(attachment, target, lookup)
    # In front of the attachment's own hook, which takes the weights out of the call again.
    handle._hooks = [
        unet.register_forward_pre_hook(Weigh(handle), with_kwargs=True, prepend=True),
        unet.register_forward_pre_hook(Tell(_told_key(attachment)), with_kwargs=True),
    ]
    return handle


def _hooks(unet: nn.Module) -> list[Weigh]:
    return [hook for hook in list(unet._forward_pre_hooks.values()) if isinstance(hook, Weigh)]


def _handles(unet: nn.Module) -> list[Handle]:
    return [hook.handle for hook in _hooks(unet)]


def _check_one_tells(unet: nn.Module, target: Any, schedule: Schedule, but: Handle | None = None) -> None:
    """UserError if `schedule` and another one of the same target, or of a bare U-Net, both say what it is told."""
    if schedule.steps is None or not schedule.steps.told:
        return
    for handle in _handles(unet):
        apart = handle.target is not target and hasattr(handle.target, "unet") and hasattr(target, "unet")
        if handle is not but and not handle.resting and handle.lookup is not None and handle.lookup.tells and not apart:
            raise UserError(
                "steps.told of another schedule is on this U-Net, which can be told one level: take that schedule off, "
                "or apply this one without its steps, dataclasses.replace(schedule, steps=None)"
            )


def _pipelines(unet: nn.Module) -> dict[int, Any]:
    """Those that put a schedule on a U-Net, by identity."""
    handles = [handle for handle in _handles(unet) if not handle.resting]
    return {id(handle.target): handle.target for handle in handles if hasattr(handle.target, "unet")}


def _mine(unet: nn.Module, target: Any, t: Any) -> bool:
    """Whether a U-Net call with timestep `t` is one that `target`'s schedule weighs.

    A U-Net does not know who calls it. With schedules of one pipeline there is nothing to tell apart; with several,
    the timestep tells: each is a view into its own scheduler's `timesteps`, and a thread brings its own.
    """
    pipelines = _pipelines(unet)
    if len(pipelines) < 2 or not hasattr(target, "unet"):
        return True
    callers = [key for key, pipe in pipelines.items() if same_storage(t, getattr(pipe.scheduler, "timesteps", None))]
    if len(callers) != 1:
        raise UserError(
            f"{len(pipelines)} pipelines put a schedule on this U-Net, and none of them made this call: "
            "call it through a pipeline, or remove the other schedules"
        )
    return callers[0] == id(target)
