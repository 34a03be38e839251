"""The course of a run: at which noise levels the U-Net is called, what it is told there, and what leads on.

A course is made by rule (`course_by_rule`: a grid's name, a number of calls), from a schedule's own steps
(`course_of_steps`), or from numbers that are being learned (`learned_course`: levels, told timesteps and guidance are
tensors with a gradient). Candidates with one course share their U-Net calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError, one_of
from rwopt.models import Model
from rwopt.sampling.grids import grid_sigmas, told_timesteps
from rwopt.sampling.solvers import SOLVERS, Levels, Memory, Number
from rwopt.schedule.noise import Array, timestep_of
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import StepFunction, Steps, whole_timesteps

_ON_TABLE = ("lcm", "tcd")  # stock knows no noise levels between timesteps, nor a floor under zero terminal SNR


@dataclass(frozen=True)
class Course:
    """N calls. sigmas: VE levels, at which weights are looked up; told: training timesteps for the U-Net; levels: for
    the solver; guidance: scales, or None for those of the condition; noises: a noisy sampler's, [N, n, C, h, w].
    unscaled: whether a picture starts from unit noise, whatever its sampler does on other grids.
    """

    sampler: str
    sigmas: tuple[float, ...]
    told: tuple[Number, ...]
    levels: Levels
    guidance: tuple[Number, ...] | None = None
    noises: Tensor | None = None
    unscaled: bool = False

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def scale(self) -> float:
        """What unit noise is multiplied by at the start: `Sampler.scaled`, unless `unscaled`."""
        top = self.sigmas[0]
        return top / math.sqrt(top * top + 1) if SAMPLERS[self.sampler].scaled and not self.unscaled else 1.0

    def scale_at(self, i: int) -> Number | None:
        """Guidance of call `i`; None: the condition's own."""
        return None if self.guidance is None else self.guidance[i]

    def noised(self, i: int, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents at level `i` with unit noise, both [N, C, h, w]: x_i = s_i x_0 + n_i e, the forward process (Ho
        et al., 2020, arXiv 2006.11239, equation 4)."""
        return float(self.levels.signal[i]) * clean + float(self.levels.noise[i]) * noise

    def step(
        self, i: int, x: Tensor, clean: Tensor, memory: Memory, rows: slice = slice(None)
    ) -> tuple[Tensor, Memory]:
        """From level `i` to the next: latents [n, C, h, w] and what the solver remembers. rows: of the noises."""
        fresh = None if self.noises is None else self.noises[i, rows]
        return SOLVERS[self.sampler](self.levels, i, x, clean, memory, fresh)


def course_by_rule(
    model: Model, steps: int, sampler: str = "ddim", grid: str = "trailing", strength: float = 1.0
) -> Course:
    """`steps` calls from noise level `strength` T down. Raises `UserError` for what is impossible or unknown.

    For lcm and tcd the levels are those of the nearest whole timesteps: their stock schedulers have no others.
    """
    one_of(tuple(SAMPLERS), "task.sampler", sampler)
    sigmas = _on_table(model, sampler, grid_sigmas(grid, steps, model.table, strength, model.family))
    told = told_timesteps(sampler, grid, sigmas, model.table)
    # stock DDIM has no grids but its own spacings; on others DPM-Solver of first order stands for it, and floors abar
    course = _made(model, sampler, sigmas, told, exact=sampler == "ddim" and grid == "trailing")
    return replace(course, unscaled=grid == "leading")  # so stock Euler: its scale hangs on its `timestep_spacing`


def course_at(model: Model, timesteps: Sequence[float], sampler: str = "ddim") -> Course:
    """Calls at training timesteps, descending."""
    return _made(model, sampler, model.table[np.asarray(timesteps, dtype=int)], np.asarray(timesteps, dtype=float))


def course_of_steps(model: Model, steps: Steps) -> Course:
    """What a schedule says of its steps; for lcm and tcd at the nearest whole timesteps, as files round their levels.

    Raises `UserError` for levels beyond the model's and for unknown samplers.
    """
    one_of(tuple(SAMPLERS), "steps.sampler", steps.sampler)
    sigmas, table = np.array(steps.sigmas), model.table
    if sigmas[0] > table[-1] * 1.01 or sigmas[-1] < table[0] * 0.99:
        raise UserError(
            f"steps.sigmas {sigmas[0]:.4g} .. {sigmas[-1]:.4g} reach beyond the noise of {model.name}, "
            f"{table[-1]:.4g} .. {table[0]:.4g}: the file is another model's"
        )
    sigmas = _on_table(model, steps.sampler, sigmas)
    told = timestep_of(steps.told, table) if steps.told else told_timesteps(steps.sampler, "", sigmas, table)
    course = _made(model, steps.sampler, sigmas, told)
    return replace(course, guidance=steps.guidance or None)


def _on_table(model: Model, sampler: str, sigmas: Array) -> Array:
    if sampler not in _ON_TABLE:
        return sigmas
    return np.asarray(model.table[whole_timesteps(timestep_of(sigmas, model.table)).astype(int)])


def _made(model: Model, sampler: str, sigmas: Array, told: Array, exact: bool = False) -> Course:
    whole = np.abs(told - np.round(told)) < 1e-6
    numbers = tuple(round(t) if w else t for t, w in zip(told.tolist(), whole, strict=True))
    levels = Levels.at(sigmas.tolist(), timestep_of(sigmas, model.table).tolist(), model.scheduler.alphas_cumprod)
    return Course(sampler, tuple(sigmas.tolist()), numbers, _from_noise(model, sampler, sigmas[0], levels, exact))


def _from_noise(model: Model, sampler: str, first: float, levels: Levels, exact: bool = False) -> Levels:
    """Levels whose first (a sigma) holds no signal at all, if it is the last timestep of zero terminal SNR.

    So it is for stock LCM and TCD, and for DDIM's own spacings (`exact`); the others floor abar at 2^-24, sigma 4096.
    Raises `UserError` for predictions of the noise, of which such a level holds no picture.
    """
    at_top = model.ends_in_noise and abs(first - model.table[-1]) < 1e-6 * first
    if not at_top or not (exact or sampler in _ON_TABLE):
        return levels
    if model.scheduler.config.prediction_type == "epsilon":
        raise UserError(
            f"task.sampler={sampler} finds no signal at the last timestep of {model.name} (zero terminal SNR, "
            "prediction_type=epsilon) to divide by: use dpmpp_2m, or a model of v_prediction"
        )
    return replace(levels, signal=(0.0, *levels.signal[1:]), noise=(1.0, *levels.noise[1:]))


def learned_course(model: Model, function: StepFunction, theta: Tensor) -> Course:
    """The course of numbers theta [d] that are being learned: as of the finished steps, without rounding."""
    t, told, guidance = function(theta)
    log_sigmas = torch.as_tensor(np.log(model.table), dtype=t.dtype, device=t.device)
    below = t.detach().floor().clamp(0, len(log_sigmas) - 2).long()
    sigma = torch.lerp(log_sigmas[below], log_sigmas[below + 1], t - below).exp()
    levels = Levels.at(sigma.unbind(), t.unbind(), model.scheduler.alphas_cumprod)
    sigmas = tuple(sigma.detach().tolist())
    return Course(
        function.sampler, sigmas, tuple(told.unbind()), _from_noise(model, function.sampler, sigmas[0], levels),
        tuple(guidance.unbind()) if "guidance" in function.learn else None,
    )  # fmt: skip
