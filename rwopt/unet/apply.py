"""`apply`: a schedule on a pipeline or bare U-Net, looked up at the noise level of every U-Net call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import Array, edm_noise, edm_scheduler, edm_sigma, noise_table, sigma_at, sigma_of
from rwopt.unet.attachment import Attachment, outside_graphs
from rwopt.unet.checkpointing import Call
from rwopt.unet.scope import eager, expand
from rwopt.unet.sites import ALL_KINDS, brief, list_sites, short

_PAIRED = {
    f"{family}{task}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusionControlNet", "StableDiffusionXLControlNet")
    for task in ("", "Img2Img", "Inpaint")
} | {"AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "LatentConsistencyModelPipeline"}
"""Pipelines whose guided batch is [unconditional, conditional]. InstructPix2Pix, PAG and others have more parts."""

_EDM = {"StableDiffusionLatentUpscalePipeline"}
"""Pipelines that tell the U-Net 0.25 ln sigma, whatever their sampler counts in."""

_tickets = itertools.count()
_lookups: WeakValueDictionary[int, _Lookup] = WeakValueDictionary()
"""How the operator finds a look-up: a graph can hold a number, not an object."""


class Handle:
    """A schedule on a U-Net; `remove()` takes this one off, and so does leaving a `with` block."""

    def __init__(
        self, schedule: Schedule | None = None, attachment: Attachment | None = None, target: Any = None
    ) -> None:
        self.schedule = schedule
        self.attachment = attachment
        self.target = target
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

    Each U-Net call is weighed by the schedule at the VE sigma of its timestep, so any sampler, number of steps,
    strength and guidance works. The noise table is that of `target.scheduler`, or the schedule's own `noise` for a
    bare U-Net. Applying twice stacks: the weights multiply. Apply first, compile afterwards. Pipelines that share a
    U-Net, also in several threads, each see their own schedule; give each its own scheduler.

    Raises UserError if the schedule names sites that the U-Net lacks or was made for another class of U-Net (map it
    with `rwopt.map_schedule`), if no noise table is known, and for weights of one side of guidance on a pipeline whose
    batch layout is not known.
    """
    unet: nn.Module = getattr(target, "unet", target)
    if schedule is None:
        for handle in _handles(getattr(unet, "_orig_mod", unet)):
            handle.remove()
        return Handle()
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    kind = getattr(unet, "_orig_mod", unet).__class__.__name__
    made_for = schedule.model.get("unet_class", kind)
    if made_for != kind:
        raise UserError(
            f"the schedule was made for a {made_for} ({short(schedule.sites)}), "
            f"this is a {kind} ({brief(list_sites(unet, ALL_KINDS))}): map it with rwopt.map_schedule first"
        )
    for other in _handles(unet):
        shared = getattr(other.target, "scheduler", None)
        if other.target is not target and shared is not None and shared is getattr(target, "scheduler", None):
            raise UserError("two pipelines share this U-Net and one scheduler: give each its own scheduler")
    lookup = _Lookup(target, schedule)  # lives as long as the hook that holds it
    attachment = Attachment(unet, schedule.sites, schedule.mode)
    handle = Handle(schedule, attachment, target)
    columns = len(schedule.sites)

    @outside_graphs
    def weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        x: Tensor = args[0] if args else kwargs["sample"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        if torch.compiler.is_compiling():
            time = torch.as_tensor(t, device=None if isinstance(t, Tensor) else x.device)
            weights = torch.ops.rwopt.weights_at(x.detach(), time.detach(), lookup.ticket, columns)
            return args, {**kwargs, attachment.key: weights}
        if not _mine(module, target, t):
            return None
        return args, {**kwargs, **attachment.carry(lookup(x, t), len(x))}

    # How apply(target, None) finds it, without a global registry.
    weigh.handle = handle  # type: ignore[attr-defined]
    # In front of the attachment's own hook, which takes the weights out of the call again.
    handle._hook = unet.register_forward_pre_hook(weigh, with_kwargs=True, prepend=True)
    return handle


def _handles(unet: nn.Module) -> list[Handle]:
    hooks = getattr(unet, "_orig_mod", unet)._forward_pre_hooks.values()
    return [hook.handle for hook in list(hooks) if isinstance(getattr(hook, "handle", None), Handle)]


@eager
def _mine(unet: nn.Module, target: Any, t: Any) -> bool:
    """Whether a U-Net call with timestep `t` is one that `target`'s schedule weighs.

    A U-Net does not know who calls it. With schedules of one pipeline there is nothing to tell apart; with several,
    the timestep tells: each is a view into its own scheduler's `timesteps`, and a thread brings its own.
    """
    pipelines = {id(handle.target): handle.target for handle in _handles(unet) if hasattr(handle.target, "unet")}
    if not hasattr(target, "unet") or len(pipelines) < 2:
        return True
    callers = [key for key, pipe in pipelines.items() if _same_storage(t, getattr(pipe.scheduler, "timesteps", None))]
    if len(callers) != 1:
        raise UserError(
            f"{len(pipelines)} pipelines put a schedule on this U-Net, and none of them made this call: "
            "call it through a pipeline, or remove the other schedules"
        )
    return callers[0] == id(target)


def _same_storage(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _Lookup:
    """Weights of a U-Net call: float32 [S], or [B, S] if its rows differ."""

    def __init__(self, target: Any, schedule: Schedule) -> None:
        self.target, self.schedule = target, schedule
        self._sigma_of = _noise_levels(target, schedule)
        self._sigma_of(np.zeros(()))  # an error belongs to apply(), not to the first picture
        if schedule.cfg_branch != "both" and type(target).__name__ not in _PAIRED:
            raise UserError(
                f"op.cfg_branch is {schedule.cfg_branch!r}, and the order of guidance in the batch of a "
                f"{type(target).__name__} is not known: use 'both', or one of {', '.join(sorted(_PAIRED)[:3])} and kin"
            )
        self.ticket = next(_tickets)
        _lookups[self.ticket] = self

    @eager
    def __call__(self, x: Tensor, t: Any) -> Tensor:
        times = torch.as_tensor(t).detach().cpu().double().numpy()
        sigma = self._sigma_of(times if times.size > 1 else times.reshape(()))
        weights = torch.tensor(self.schedule.at(sigma), dtype=torch.float32, device=x.device)
        branch, rows = self.schedule.cfg_branch, len(x)
        if branch == "both":
            return weights
        guided = self.target.do_classifier_free_guidance
        if guided and rows % 2:
            raise UserError(f"a guided call has {rows} rows: cfg_branch {branch!r} needs [unconditional, conditional]")
        weights = expand(weights, rows).clone()
        negative = slice(0, rows // 2 if guided else 0)
        if branch == "cond":
            weights[negative] = 1
        else:
            weights[negative.stop :] = 1
        return weights


def _noise_levels(target: Any, schedule: Schedule) -> Callable[[Array], Array]:
    """Gives VE sigma of timesteps; the scheduler is asked for at each call, because schedulers get swapped."""
    cached: tuple[Any, Any, Callable[[Array], Array]] | None = None

    def sigma(times: Array) -> Array:
        nonlocal cached
        scheduler = getattr(target, "scheduler", None)
        abar = getattr(scheduler, "alphas_cumprod", None)
        if cached is None or cached[0] is not scheduler or cached[1] is not abar:
            cached = scheduler, abar, _levels(target, schedule, scheduler, abar)
        return cached[2](times)

    return sigma


def _levels(target: Any, schedule: Schedule, scheduler: Any, abar: Any) -> Callable[[Array], Array]:
    if type(target).__name__ in _EDM or edm_scheduler(scheduler) or (scheduler is None and edm_noise(schedule.noise)):
        return edm_sigma
    if abar is not None:
        table = sigma_of(torch.as_tensor(abar).detach().cpu().numpy())
    elif schedule.noise and not edm_noise(schedule.noise):
        table = noise_table(schedule.noise)
    else:
        kind = type(target if scheduler is None else scheduler).__name__
        raise UserError(f"{kind} has no noise table: give the pipeline, or a schedule with a 'noise' entry")
    return lambda times: sigma_at(times, table)


@torch.library.custom_op("rwopt::weights_at", mutates_args=())
def _weights_at(x: Tensor, t: Tensor, ticket: int, columns: int) -> Tensor:
    """The look-up as one node of a graph that holds a whole U-Net call (`unet.compile()`): [B, S]."""
    return _ask(x, t, ticket, columns)


@eager
def _ask(x: Tensor, t: Tensor, ticket: int, columns: int) -> Tensor:
    lookup = _lookups.get(ticket)
    if lookup is None or not _mine(getattr(lookup.target, "unet", lookup.target), lookup.target, t):
        return torch.ones(len(x), columns, device=x.device)
    return expand(lookup(x, t), len(x)).clone()


@_weights_at.register_fake
def _(x: Tensor, t: Tensor, ticket: int, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns), dtype=torch.float32)
