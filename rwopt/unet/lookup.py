"""A schedule looked up at the noise level of each U-Net call, without waiting for the device.

A pipeline's time step is a view into its scheduler's `timesteps`, so its place in that storage says which step it is:
one copy of the time steps serves all calls of a picture. Where it is no such view its value is copied. What a call
needs is kept for the step, so a picture asks the schedule once a step. Likewise the timestep that the U-Net is told,
where a schedule's steps say another than the solver's.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import (
    Array,
    edm_noise,
    edm_scheduler,
    edm_sigma,
    flow_scheduler,
    flow_sigma,
    noise_table,
    sigma_at,
    sigma_of,
)
from rwopt.unet.call import PLAIN, Columns, Numbers, Plain
from rwopt.unet.dials import call_arguments, same_grid, same_solver, told_at

_PAIRED = {
    f"{family}{task}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusionControlNet", "StableDiffusionXLControlNet")
    for task in ("", "Img2Img", "Inpaint")
} | {"AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "LatentConsistencyModelPipeline",
     "LatentConsistencyModelImg2ImgPipeline"}  # fmt: skip
"""Pipelines whose guided batch is [unconditional, conditional]. InstructPix2Pix, PAG and others have more parts."""

_EDM = {"StableDiffusionLatentUpscalePipeline"}
"""Pipelines that tell the U-Net 0.25 ln sigma, whatever their sampler counts in."""


_FEW = 200  # steps of a picture for which tensors are made beforehand


class Levels:
    """VE sigma of timesteps: by a table [T] of the training timesteps, or a rule where there is none."""

    def __init__(self, table: Array | None, flow: int = 0) -> None:
        """Without a table: `flow` is T of flow matching, or 0 for 0.25 ln sigma."""
        self.table, self.flow = table, flow

    def __call__(self, times: Array) -> Array:
        if self.flow:
            return flow_sigma(times, self.flow)
        if self.table is None:
            return edm_sigma(times)
        if times.ndim == 0 and float(times).is_integer() and 0 <= times < len(self.table):  # as most samplers ask
            return np.asarray(self.table[int(times)])
        return sigma_at(times, self.table)


def levels_of(target: Any, schedule: Schedule) -> Levels:
    """Those of the target's scheduler, or the schedule's own for a bare U-Net.

    UserError if there are none, or if the scheduler counts in something else than its time steps say: there the file's
    own noise would be another.
    """
    scheduler, noise = getattr(target, "scheduler", None), schedule.noise
    if type(target).__name__ in _EDM or edm_scheduler(scheduler) or (scheduler is None and edm_noise(noise)):
        return Levels(None)
    if scheduler is None:
        if not noise:
            raise UserError(
                f"{type(target).__name__} has no noise table: give the pipeline, or a schedule with a 'noise' entry"
            )
        flow = noise.get("timestep") == "flow"
        return Levels(None, int(noise.get("num_train_timesteps", 1000))) if flow else Levels(noise_table(noise))
    if flow_scheduler(scheduler):
        return Levels(None, int(scheduler.config["num_train_timesteps"]))
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise UserError(
            f"{type(scheduler).__name__} has no noise table that its time steps count in: use another sampler "
            "(DDIM, Euler, DPM++ 2M, UniPC, ...)"
        )
    return Levels(sigma_of(torch.as_tensor(abar).detach().cpu().numpy()))


class Timesteps:
    """The time steps of one picture [N], copied to the host once, and what was made of them for S `sites`."""

    def __init__(self, timesteps: Tensor, sites: int, times: Array | None = None) -> None:
        """times: the solver's own [N or more], where what it tells the U-Net is rounded."""
        self.timesteps, self.version = timesteps, _version(timesteps)
        self.times: Array = timesteps.detach().cpu().double().numpy() if times is None else times[: len(timesteps)]
        self.calls: dict[tuple[Any, ...], Plain] = {}
        self.told: Array | None = None
        """training timesteps [N] that the U-Net is told, None for its own"""
        self._told: dict[torch.device, tuple[Tensor, ...]] = {}
        few = len(self.times) if len(self.times) <= _FEW else 0  # a thousand steps are no picture's
        factors = torch.empty(few, sites, dtype=torch.float64)
        self._table = factors.numpy()
        self._factors = [row.unbind() for row in factors.unbind()]

    def numbers(self, place: int, weights: NDArray[np.floating[Any]]) -> Numbers:
        """The call at step `place` with weights [S] for all rows."""
        if not self._factors:
            return Numbers(weights.tolist())
        self._table[place] = weights
        return Numbers(weights.tolist(), self._factors[place])

    def told_on(self, place: int, device: torch.device) -> Tensor | None:
        """What the U-Net is told at step `place`: float32 of no dimension."""
        if self.told is None:
            return None
        if device not in self._told:  # once a picture
            self._told[device] = _times(self.told, device).unbind()
        return self._told[device][place]

    def fits(self, timesteps: Tensor) -> bool:
        return timesteps is self.timesteps and _version(timesteps) == self.version

    def place(self, t: Any) -> int | None:
        """Which step `t` is, if it is a view of one of them (or of one repeated for each row)."""
        steps = self.timesteps
        if not isinstance(t, Tensor) or t.dtype != steps.dtype or not same_storage(t, steps):
            return None
        if t.numel() != 1 and any(t.stride()):
            return None
        place, rest = divmod(int(t.storage_offset()) - int(steps.storage_offset()), steps.stride(0) or 1)
        return place if not rest and 0 <= place < len(self.times) else None


def same_storage(a: Any, b: Any) -> bool:
    """Whether two tensors are views of one piece of memory, on whatever device."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _times(times: Array, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and then read in any mode
        return torch.tensor(times, dtype=torch.float32).to(device, non_blocking=True)


class Lookup:
    """The weights of each U-Net call by one schedule, for one pipeline or bare U-Net (`target`)."""

    def __init__(self, target: Any, schedule: Schedule) -> None:
        """Raises UserError as `rwopt.apply` says."""
        self._start(target, None)
        self.schedule = schedule

    def _start(self, target: Any, levels: Levels | None) -> None:
        self.target, self._own = target, levels
        self._known: tuple[Any, Any, Levels] | None = None
        self._picture: Timesteps | None = None
        self._warned = False

    def copied(self, target: Any, whole: bool) -> Lookup:
        """For a copied target, which may be half made as yet. A U-Net copied without its pipeline (not `whole`) keeps
        the pipeline's noise levels."""
        other = object.__new__(type(self))
        other._start(target, None if whole else self.levels())
        other._schedule = self._schedule
        return other

    @property
    def schedule(self) -> Schedule:
        """What weighs the calls."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if schedule.cfg_branch != "both" and type(self.target).__name__ not in _PAIRED:
            raise UserError(
                f"op.cfg_branch is {schedule.cfg_branch!r}, and the order of guidance in the batch of a "
                f"{type(self.target).__name__} is not known: use 'both', or one of "
                f"{', '.join(sorted(_PAIRED)[:3])} and kin"
            )
        self._schedule, self._picture, self._known, self._warned = schedule, None, None, False
        self.levels()

    def levels(self) -> Levels:
        """Asked for at each call, because schedulers get swapped."""
        if self._own is not None:
            return self._own
        scheduler = getattr(self.target, "scheduler", None)
        abar = getattr(scheduler, "alphas_cumprod", None)
        if self._known is None or self._known[0] is not scheduler or self._known[1] is not abar:
            self._known = scheduler, abar, levels_of(self.target, self._schedule)
            self._picture = None
        return self._known[2]

    @property
    def tells(self) -> bool:
        """Whether the U-Net is told other levels than the solver's."""
        return self._schedule.steps is not None and bool(self._schedule.steps.told)

    def arguments(self) -> dict[str, Any]:
        """See `rwopt.unet.apply.Handle.arguments`."""
        steps = self._schedule.steps
        return {} if steps is None else call_arguments(self.target, steps, self.levels().table)

    def told(self, x: Tensor, t: Any) -> Tensor | None:
        """What the U-Net is told in place of timestep `t` in a call with sample `x`, of the shape of `t`.

        None where it is `t`: without told levels, on a grid that is not the file's, and by a solver that is not.
        """
        steps, levels = self._schedule.steps, self.levels()
        if steps is None or not steps.told or levels.table is None:
            return None
        place = self._place(t, levels)
        if place is not None and self._picture is not None:
            told = self._picture.told_on(place, x.device)
            return told if told is None or not t.ndim else told.expand(t.shape)
        times = torch.as_tensor(t).detach().cpu().double().numpy()
        instead = told_at(steps, levels(times), levels.table)
        return None if np.isnan(instead).all() else _times(np.where(np.isnan(instead), times, instead), x.device)

    def __call__(self, x: Tensor, t: Any) -> Plain:
        """Of a U-Net call with sample `x` [B, ...] at timestep `t`."""
        levels = self.levels()
        side, guided = self._schedule.cfg_branch, False
        if side != "both":
            guided = is_guided()
            if not guided:  # all rows are conditional
                side = "both" if side == "cond" else "none"
        rows = len(x)
        if guided and rows % 2:
            raise UserError(f"a guided call has {rows} rows: cfg_branch {side!r} needs [unconditional, conditional]")
        if side == "none":
            return PLAIN
        place = self._place(t, levels)
        if place is None or self._picture is None:
            times = torch.as_tensor(t).detach().cpu().double().numpy()
            return self._made(levels, times, side, x, None)
        key = (place, side) if side == "both" else (place, side, rows, x.device)
        calls = self._picture.calls
        if key not in calls:
            calls[key] = self._made(levels, self._picture.times[place], side, x, place)
        return calls[key]

    def _place(self, t: Any, levels: Levels) -> int | None:
        """Which step of the picture under way `t` is; None if that takes its value."""
        timesteps = getattr(getattr(self.target, "scheduler", None), "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or not isinstance(t, Tensor):
            return None
        if self._picture is None or not self._picture.fits(timesteps):
            self._picture = self._picture_of(timesteps, levels) if same_storage(t, timesteps) else None
        return None if self._picture is None else self._picture.place(t)

    def _picture_of(self, timesteps: Tensor, levels: Levels) -> Timesteps:
        scheduler, steps = self.target.scheduler, self._schedule.steps
        sigmas = getattr(scheduler, "sigmas", None) if levels.flow else None
        times = None
        if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):  # s itself: what the U-Net is told is rounded
            times = sigmas.detach().cpu().double().numpy() * levels.flow
        picture = Timesteps(timesteps, len(self._schedule.sites), times)
        if steps is not None:
            sigmas = levels(picture.times)
            if levels.table is None or not same_solver(steps, scheduler) or not same_grid(steps, sigmas):
                self._warn(type(scheduler).__name__, len(timesteps))
            elif steps.told:
                picture.told = told_at(steps, sigmas, levels.table)
        return picture

    def _warn(self, scheduler: str, count: int) -> None:
        steps = self._schedule.steps
        if steps is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the schedule has steps for {len(steps)} calls of {steps.sampler}, this picture has others ({count} of "
            f"{scheduler}): weights are used, its steps are not: pass **handle.arguments to the pipeline's call",
            stacklevel=2,
        )

    def _made(self, levels: Levels, times: Array, side: str, x: Tensor, place: int | None) -> Plain:
        """The call at one time, which is that of step `place`, or at one for each row."""
        alike = times.size == 1 or bool((times == times.flat[0]).all())
        weights = self._schedule.at(levels(np.asarray(times.flat[0]) if alike else times)).astype(np.float32)
        if side == "both" and alike:
            if place is None or self._picture is None:
                return Numbers(weights.tolist())
            return self._picture.numbers(place, weights)
        rows = len(x)
        table = weights[None].repeat(rows, 0) if alike else weights.repeat(rows // len(weights), 0)
        if side != "both":
            table[slice(0, rows // 2) if side == "cond" else slice(rows // 2, rows)] = 1
        return Columns(torch.tensor(table).to(x.device, non_blocking=True))


def is_guided() -> bool:
    """Whether the batch of the U-Net call that is being made is [unconditional, conditional].

    A U-Net is not told, and pipelines that share it (`from_pipe`) differ, so it is asked of the pipeline that makes
    the call, which is found on the stack. UserError if there is none whose order is known.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DiffusionPipeline):
            guided = getattr(owner, "do_classifier_free_guidance", frame.f_locals.get("do_classifier_free_guidance"))
            if type(owner).__name__ in _PAIRED and guided is not None:
                return bool(guided)
            raise UserError(
                f"a {type(owner).__name__} makes this call, and the order of guidance in its batch is not known: "
                "use a schedule with cfg_branch 'both' there"
            )
        frame = frame.f_back  # type: ignore[assignment]
    raise UserError(
        "weights of one side of guidance, and no pipeline makes this call: call the pipeline, or use cfg_branch 'both'"
    )
