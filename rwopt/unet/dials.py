"""A schedule's steps on a stock pipeline: what its call is given, and which timestep the U-Net is told.

Stock schedulers take a grid as whole training timesteps. Each gives a picture the same as the sampler of
`rwopt.schedule.samplers` only as some of its options are set, and nothing of a file is dropped without a word: what a
pipeline cannot take is refused, with the line of code that changes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rwopt.errors import UserError, one_of
from rwopt.schedule.noise import Array, sigma_at, timestep_of
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import Steps

SAME_LEVEL = 1e-2
"""In ln sigma, about three training timesteps: nearer levels are one."""

_OFF = 0.25  # of a training timestep: further off, the noise table is another
_FROM_NOISE = 0.9  # of the timesteps: a grid that starts lower is that of an edit
STEPS_LIKE = {"ddim": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 1})}
"""Other classes that are the same solver, and take a grid where the sampler's own takes none."""

OPTIONS: dict[str, Any] = {
    "final_sigmas_type": "zero", "interpolation_type": "linear", "solver_type": "midpoint", "thresholding": False,
    "use_karras_sigmas": False, "use_lu_lambdas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_flow_sigmas": False,
}  # fmt: skip
"""How a scheduler that takes a grid has to be set, where it has such an option: most of the others forbid one."""

Stock = tuple[str, Mapping[str, Any]]
"""A class of diffusers and options of its configuration."""


def stock_of(sampler: str) -> list[Stock]:
    """The schedulers that step like a sampler, first one that takes a grid if there is one. UserError if unknown."""
    one_of(tuple(SAMPLERS), "steps.sampler", sampler)
    own = (SAMPLERS[sampler].scheduler, SAMPLERS[sampler].options)
    return [STEPS_LIKE[sampler], own] if sampler in STEPS_LIKE else [own]


def same_grid(steps: Steps, sigmas: Array) -> bool:
    """Whether a picture's noise levels [N] are those of `steps`."""
    return len(sigmas) == len(steps) and bool(np.abs(np.log(sigmas) - np.log(steps.sigmas)).max() <= SAME_LEVEL)


def same_solver(steps: Steps, scheduler: Any) -> bool:
    """Whether a scheduler steps like the sampler of `steps`."""
    if steps.sampler not in SAMPLERS:
        return False
    return any(
        type(scheduler).__name__ == kind and all(scheduler.config.get(k) == v for k, v in options.items())
        for kind, options in stock_of(steps.sampler)
    )


def told_at(steps: Steps, sigmas: Array, table: Array) -> Array:
    """Training timesteps [...] that the U-Net is told at VE levels [...]; NaN at a level that is none of `steps`.

    table: the model's VE sigmas [T]; timesteps may be fractional.
    """
    apart = np.abs(np.log(sigmas)[..., None] - np.log(steps.sigmas))
    times = timestep_of(np.array(steps.told)[apart.argmin(-1)], table)
    return np.where(apart.min(-1) <= SAME_LEVEL, times, np.nan)


def call_arguments(target: Any, steps: Steps, table: Array | None) -> dict[str, Any]:
    """Keyword arguments that bring grid and guidance to a pipeline's call; what the U-Net is told goes another way.

    table: VE sigmas [T] of the pipeline's timesteps, None where it counts in something else. Raises UserError as
    `Handle.arguments` says.
    """
    name = type(target).__name__
    if not hasattr(target, "unet"):
        raise UserError(f"{name} is no pipeline, and the schedule's steps are a sampler's: apply it to the pipeline")
    takes = inspect.signature(type(target).__call__).parameters
    if "timesteps" not in takes:
        raise UserError(f"the call of {name} takes no timesteps, and the schedule has steps: {_WITHOUT}")
    _check_scheduler(steps, target.scheduler)
    if table is None:
        raise UserError(f"{name} does not count in training timesteps, and the schedule's steps do: {_WITHOUT}")
    grid = _grid(steps, table)
    given: dict[str, Any] = {"timesteps": grid}
    given |= {key: value for key, value in SAMPLERS[steps.sampler].call.items() if key in takes}
    if "strength" in takes:  # the grid starts at the level of the edit
        if "mask_image" in takes and grid[0] < _FROM_NOISE * (len(table) - 1):
            raise UserError(
                f"steps start at timestep {grid[0]}, and {name} starts from noise if given a grid: "
                "use an image-to-image pipeline, or steps from the top"
            )
        given["strength"] = 1.0
    if steps.guidance:
        given |= _guidance(target, steps.guidance, takes)
    return given


_WITHOUT = "use its weights without its steps, dataclasses.replace(schedule, steps=None)"


def _check_scheduler(steps: Steps, scheduler: Any) -> None:
    """UserError unless the scheduler takes the grid of `steps` and steps as it was made for."""
    import diffusers

    kind, options = stock_of(steps.sampler)[0]
    if not SAMPLERS[steps.sampler].takes_grid and steps.sampler not in STEPS_LIKE:
        raise UserError(f"steps.sampler is {steps.sampler}, and {kind} takes no grid from a pipeline: {_WITHOUT}")
    has = type(scheduler).__name__
    config = scheduler.config
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    wanted = {**options, **{name: value for name, value in OPTIONS.items() if name in config and name in known}}
    # None stands for False; a scheduler of another class may have options that the right one would take over
    wrong = [name for name, value in wanted.items() if (config.get(name) or False) != (value or False)]
    leading = kind == "EulerDiscreteScheduler" and config.get("timestep_spacing") == "leading"
    if has == kind and not wrong and not leading:
        return
    changes = {"timestep_spacing": "trailing", **options, **{name: wanted[name] for name in wrong}}
    written = ", ".join(f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}"
                        for name, value in changes.items())  # fmt: skip
    if has != kind:
        why = f"a grid for {steps.sampler} needs {kind}, not {has}"
    elif wrong:
        name, value = wrong[0], wanted[wrong[0]]
        why = f"{has} has {name}={config.get(name)!r}, and a grid for {steps.sampler} needs {value!r}"
    else:  # it would start from sqrt(sigma^2 + 1) times noise, not from sigma times noise
        why = f"{has} has timestep_spacing='leading', which starts a picture from other noise than the file is for"
    raise UserError(f"{why}: write pipe.scheduler = {kind}.from_config(pipe.scheduler.config, {written})")


def _grid(steps: Steps, table: Array) -> list[int]:
    """The levels of `steps` as whole timesteps of a noise table [T]."""
    sigmas = np.array(steps.sigmas)
    times = timestep_of(sigmas, table)
    whole = np.round(times)
    beyond = np.abs(np.log(sigma_at(times, table) / sigmas)) > SAME_LEVEL
    off = (np.abs(times - whole) > _OFF) | beyond | np.append(False, whole[1:] >= whole[:-1])
    for i in np.flatnonzero(off)[:1]:
        raise UserError(
            f"steps.sigmas[{i}] is {sigmas[i]:.6g}, at no whole timestep of this pipeline's noise "
            f"({table[-1]:.6g} to {table[0]:.6g}): use the model that the file was made for"
        )
    return [int(t) for t in whole]


def _guidance(target: Any, scales: tuple[float, ...], takes: Mapping[str, Any]) -> dict[str, Any]:
    name = type(target).__name__
    if "guidance_scale" not in takes:
        raise UserError(f"the call of {name} takes no guidance_scale, and the schedule has steps.guidance: {_WITHOUT}")
    given: dict[str, Any] = {"guidance_scale": scales[0]}
    if len(set(scales)) == 1:
        return given
    embedded = getattr(getattr(target.unet, "config", None), "time_cond_proj_dim", None) is not None
    if embedded or "callback_on_step_end" not in takes or not _asks_at_each_call(type(target)):
        raise UserError(f"{name} guides all calls by one scale, and steps.guidance has {len(set(scales))}: {_WITHOUT}")
    given["callback_on_step_end"] = _next_scale(scales)
    if "callback_on_step_end_tensor_inputs" in takes:
        given["callback_on_step_end_tensor_inputs"] = []
    return given


def _asks_at_each_call(pipeline: type) -> bool:
    """Whether a pipeline's loop reads its own `guidance_scale`, which a callback can set, and not an argument's copy.

    Nothing else tells the two apart: there are some of both kinds with the same parameters.
    """
    try:
        source = inspect.getsource(pipeline.__call__)
    except (OSError, TypeError):
        return False
    return re.search(r"self\.guidance_scale \*", source) is not None


def _next_scale(scales: tuple[float, ...]) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that sets the scale of the call to come."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(scales):
            pipe._guidance_scale = scales[step + 1]
        return tensors

    return callback
