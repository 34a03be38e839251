"""Grids: the noise levels at which a sampler calls the U-Net, by rule or by a list of one's own.

A grid has N levels, one a call, as VE sigmas (`rwopt.schedule.noise`); the clean end, sigma 0, comes behind the last
and is no part of it. `strength` S lowers the start to timestep round(S T) - 1 and keeps N: any strength costs the same.

    trailing     t_i = round(S T - i S T / N) - 1                  (Lin et al. 2023, arXiv 2305.08891, table 2)
    leading      t_i = (N - 1 - i) floor(S T / N) + 1
    linspace     the upper N of N + 1 points even in t, rounded, the lowest being t = 0
    karras       sigma^(1/7) even, both ends included              (Karras et al. 2022, arXiv 2206.00364, equation 5)
    exponential  ln sigma even, both ends included
    lnsigma      the upper N of N + 1 points even in ln sigma: its last step to the clean end starts higher
    ays          Align Your Steps (Sabour et al. 2024, arXiv 2404.14507): published levels, ln sigma linear between them

Stock diffusers schedulers mean different things by one word. These equal: trailing all of them; leading DDIM's and
Euler's with `steps_offset=1` (DPM-Solver's and UniPC's have N + 1 parts); linspace DPM-Solver's and UniPC's (DDIM's and
Euler's have N points and end at t = 0, which here no call does); karras and exponential DPM-Solver's and UniPC's, and
Euler's where its `timestep_spacing` is linspace (its ends are those of the spacing) and N > 1; exponential DPM-Solver's
`use_lu_lambdas` too.
"""

from __future__ import annotations

import math

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule.noise import Array, timestep_of
from rwopt.schedule.samplers import SAMPLERS

GRIDS = ("trailing", "leading", "linspace", "karras", "exponential", "lnsigma", "ays")
"""Grids by rule."""

AYS = {"sd": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas"}
"""Whose published levels `ays` may take, and what diffusers calls them."""

_RHO = 7.0
_AYS_END = 0.029  # the authors' eleventh level, for which diffusers has 0
_SLACK = 1e-3  # relative: published and rounded levels may lie so far above the model's own
_TRUNCATES = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def trailing(total: int, steps: int, strength: float = 1.0) -> list[int]:
    """`steps` of `total` training timesteps from `strength` x total down, descending: the "trailing" spacing.

    Raises `UserError` for a strength outside (0, 1], and for more steps than timesteps.
    """
    top = _top(total, steps, strength)
    return [round(top - i * top / steps) - 1 for i in range(steps)]


def grid_sigmas(grid: str, steps: int, table: Array, strength: float = 1.0, ays: str = "sd") -> Array:
    """VE noise levels [N] of `steps` calls, strictly descending, from noise level `strength` T down.

    grid: one of `GRIDS`, or a list of one's own, "14.6,2.9,0.3" (VE sigmas, N of them, within the model's and not above
    the start; what is above by up to 0.1 % counts as the start). table: the model's VE sigmas [T], ascending. ays:
    whose published levels, a key of `AYS`. One call is at the start, save that of leading, which is at t = 1.
    Raises `UserError` for unknown names, for steps and strengths that there are not, and if levels coincide.
    """
    total = len(table)
    top = _top(total, steps, strength)
    first = round(top) - 1
    start, low = float(table[first]), float(table[0])
    if grid == "trailing":
        sigmas = table[trailing(total, steps, strength)]
    elif grid == "leading":
        ts = np.arange(steps - 1, -1, -1) * (int(top) // steps) + 1
        if ts[0] > first:
            raise _too_many(grid, steps)
        sigmas = table[ts]
    elif grid == "linspace":
        sigmas = table[np.linspace(0, first, steps + 1).round().astype(int)[:0:-1]]
    elif grid == "karras":
        sigmas = np.linspace(start ** (1 / _RHO), low ** (1 / _RHO), steps) ** _RHO
    elif grid == "exponential":
        sigmas = np.exp(np.linspace(math.log(start), math.log(low), steps))
    elif grid == "lnsigma":
        sigmas = np.exp(np.linspace(math.log(start), math.log(low), steps + 1)[:-1])
    elif grid == "ays":
        sigmas = _ays(ays, steps, start, low)
    else:
        sigmas = _own(grid, steps, start, low)
    if (np.diff(sigmas) >= 0).any():
        raise _too_many(grid, steps)
    return np.asarray(sigmas, dtype=np.float64)


def told_timesteps(sampler: str, grid: str, sigmas: Array, table: Array) -> Array:
    """Training timesteps [N], 0 to T-1, that the stock scheduler of `sampler` tells the U-Net at levels `sigmas` [N].

    Fractional (linear in ln sigma of `table` [T]) for Euler and Euler ancestral, else whole. Neighbours may be equal.
    """
    ts = timestep_of(sigmas, table)
    if not SAMPLERS[sampler].whole:
        return ts
    if grid == "exponential" and SAMPLERS[sampler].scheduler in _TRUNCATES:
        return _truncated(ts, table)
    return np.round(ts)


def _truncated(ts: Array, table: Array) -> Array:
    """Fractional timesteps without their fraction, as diffusers has it with `use_exponential_sigmas`.

    With `use_karras_sigmas` it rounds, so this is surely no plan, but it is the picture that people get. It also makes
    an accident of single precision visible: where ln sigma of the first level was rounded up, that level counts as just
    below its timestep, and the U-Net is told 998 and not 999 (so Stable Diffusion's). Hence the same arithmetic here.
    """
    abar = (1 / (1 + table**2)).astype(np.float32)
    single = np.sqrt((1 - abar) / abar)
    index = np.arange(len(table))
    exact = np.interp(ts, index, np.log(single.astype(np.float64)))
    return np.asarray(np.floor(np.interp(exact, np.log(single).astype(np.float64), index)))


def _top(total: int, steps: int, strength: float) -> float:
    """How many training timesteps lie below the start, which need not be whole."""
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} is outside (0, 1]")
    top = strength * total
    if not 1 <= steps <= top:
        raise UserError(f"steps={steps} is outside 1 .. {int(top)} (strength x training timesteps)")
    return top


def _too_many(grid: str, steps: int) -> UserError:
    return UserError(f"steps={steps} is too many for grid={grid}, its noise levels coincide: use fewer, or trailing")


def _ays(whose: str, steps: int, start: float, low: float) -> Array:
    """Even in the index of the published levels, from where they pass `start` (a sigma) to where they pass `low`."""
    if whose not in AYS:
        raise UserError(f"ays={whose} is unknown: use {' or '.join(AYS)}")
    from diffusers.schedulers import AysSchedules  # here, since diffusers loads torch

    logs = np.log([*AysSchedules[AYS[whose]][:-1], _AYS_END])
    index = np.arange(len(logs))
    high, end = np.interp([-math.log(start), -math.log(low)], -logs, index)
    return np.asarray(np.exp(np.interp(np.linspace(high, end, steps + 1)[:-1], index, logs)))


def levels_of_text(grid: str) -> Array:
    """Noise levels [N] of a list in text, "14.6,2.9,0.3". Raises `UserError` unless they are descending and above 0."""
    try:
        sigmas = np.array([float(part) for part in grid.split(",")])
    except ValueError:
        raise UserError(f"grid={grid} is unknown: one of {', '.join(GRIDS)}, or noise levels as 14.6,2.9,0.3") from None
    if not (np.diff(sigmas) < 0).all():
        raise UserError(f"grid={grid} is not strictly descending: give the highest noise level first")
    if not (np.isfinite(sigmas).all() and sigmas[-1] > 0):
        raise UserError(f"grid={grid} holds what is no noise level: give finite numbers above 0")
    return sigmas


def _own(grid: str, steps: int, start: float, low: float) -> Array:
    """A list in text as levels; `start` and `low` bound them."""
    sigmas = levels_of_text(grid)
    if len(sigmas) != steps:
        raise UserError(f"grid={grid} has {len(sigmas)} noise levels: give {steps}, as many as steps")
    if not (low * (1 - _SLACK) <= sigmas[-1] and sigmas[0] <= start * (1 + _SLACK)):
        raise UserError(f"grid={grid} leaves the noise levels that there are: stay within {low:.6g} .. {start:.6g}")
    return np.asarray(np.clip(sigmas, low, start))
