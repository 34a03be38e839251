"""Solvers: one step of a sampler, from a noise level to the next, as a pure function.

Latents are variance-preserving, `x_i = s_i x_0 + n_i e` with s = sqrt(abar), n = sqrt(1 - abar), and each step starts
from the clean picture that the U-Net's (guided) output at level i means. With sigma = n / s and lambda = ln(s / n),

    x_{i+1} = (n_{i+1} / n_i) x_i + (s_{i+1} - s_i n_{i+1} / n_i) D_i                                      (step)

is exact where the clean picture is D_i all the way (Lu et al. 2022, arXiv 2211.01095, proposition 4.1): the solvers
without fresh noise differ in D_i alone. What a solver remembers of a trajectory is an argument and a result, so that
trajectories can be parted, joined and run again for a gradient. Levels may be tensors with a gradient (a learned
clock): nothing here takes the logarithm of the clean end's noise, or divides by it. Each solver is tested against the
stock diffusers scheduler that `rwopt.schedule.samplers` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwopt.schedule.samplers import TCD_GAMMA

Number = float | Tensor
"""A number of a noise level; a tensor is 0-d, on the CPU or where the latents are."""

Memory = tuple[Tensor, ...]
"""What a multistep solver remembers of a trajectory, each [N, C, h, w]; () before the first step."""

Step = tuple[Tensor, Memory]
"""Latents at the next level [N, C, h, w], and what to remember."""

_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0  # of LCM's boundary condition


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels of N calls, and the clean end behind them.

    signal, noise: sqrt(abar), in (0, 1], and sqrt(1 - abar), in [0, 1); N + 1 each, the last being 1 and 0. timesteps:
    training timesteps [N] of the levels (not what the U-Net may be told instead), for lcm and tcd. abar: the model's
    cumulative signal shares [T], for tcd.
    """

    signal: Sequence[Number]
    noise: Sequence[Number]
    timesteps: Sequence[Number] = ()
    abar: Sequence[float] | Tensor = ()

    @classmethod
    def at(
        cls, sigmas: Sequence[Number], timesteps: Sequence[Number] = (), abar: Sequence[float] | Tensor = ()
    ) -> Levels:
        """From VE sigmas [N] above 0, descending, the clean end left out: s = 1 / sqrt(1 + sigma^2), n = sigma s."""
        signal = [(1 + sigma**2) ** -0.5 for sigma in sigmas]
        noise = [sigma * s for sigma, s in zip(sigmas, signal, strict=True)]
        return cls([*signal, 1.0], [*noise, 0.0], timesteps, abar)

    def __len__(self) -> int:
        """N, the number of calls."""
        return len(self.signal) - 1

    def __getitem__(self, i: int) -> tuple[Number, Number]:
        """Signal and noise of level i, tensors in double precision: coefficients are differences of near numbers."""
        s, n = self.signal[i], self.noise[i]
        return (s.double() if isinstance(s, Tensor) else float(s)), (n.double() if isinstance(n, Tensor) else float(n))

    def lam(self, i: int) -> Number:
        """lambda_i = ln(s_i / n_i), half the log signal-to-noise ratio; not of the clean end."""
        s, n = self[i]
        return _log(s / n)


Advance = Callable[[Levels, int, Tensor, Tensor, Memory, Tensor | None], Step]
"""solver(levels, i, x, clean, memory, fresh) -> (x at level i + 1, memory).

x, clean: latents at level i and the predicted clean ones, [N, C, h, w] in float32 or float64; memory: () at i = 0,
afterwards what the step before gave; fresh: a unit normal [N, C, h, w] for solvers of noisy samplers, which the last
step does not use; None for the others.
"""


def ddim(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """DDIM with eta 0 (Song et al. 2021, arXiv 2010.02502, equation 12): D_i is the clean picture of level i.

    It is Euler's method too (Karras et al. 2022, arXiv 2206.00364): there y = x / s goes from sigma_i to sigma_{i+1} by
    y + (sigma_{i+1} - sigma_i) (y - x_0) / sigma_i = x_0 + sigma_{i+1} (y - x_0) / sigma_i, which times s_{i+1} is
    s_{i+1} x_0 + n_{i+1} e, with the noise e = (x - s_i x_0) / n_i. Also DPM-Solver++ of first order.
    """
    return _step(levels, i, x, clean), ()


def dpmpp_2m(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), its first and last step of first order.

    D_i = x_0^i + (x_0^i - x_0^{i-1}) h_i / (2 h_{i-1}), with h_i = lambda_{i+1} - lambda_i: the clean picture on a line
    through the last two, at half the step. The last step ends at an infinite lambda, where no such line leads.
    Remembers the clean picture of the step before.
    """
    return _step(levels, i, x, _forward(levels, i, clean, memory)), (clean,)


def uni_pc(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """UniPC of order 2 with B_2(h) (Zhao et al. 2023, arXiv 2302.04867), data prediction, lower order at both ends.

    Each call serves twice: its clean picture first corrects the step that led to it (UniC), then predicts the next
    (UniP, whose order 2 is `dpmpp_2m`); with both it converges with order 3. Remembers the corrected latents of the
    step before, its clean picture, and that of the step before it.
    """
    if memory:
        x = _corrected(levels, i, clean, memory)
    ahead = _step(levels, i, x, _forward(levels, i, clean, memory[1:2]))
    return ahead, (x, clean, *memory[1:2])


def euler_ancestral(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """Ancestral sampling: DDIM with eta 1, which is the posterior of DDPM (Ho et al. 2020, arXiv 2006.11239).

    With q = sigma_{i+1} / sigma_i: x_{i+1} = s_{i+1} x_0 + n_{i+1} (q e + sqrt(1 - q^2) fresh). The last is the clean
    picture. In k-diffusion's words, times s_{i+1}: sigma_down = q sigma_{i+1}, sigma_up = sqrt(1 - q^2) sigma_{i+1}.
    """
    if i == len(levels) - 1:
        return clean, ()
    (s, n), (s_next, n_next) = levels[i], levels[i + 1]
    q = n_next * s / (s_next * n)
    e = (x - s * clean) / n
    return s_next * clean + n_next * (q * e + (1 - q**2) ** 0.5 * _drawn(fresh)), ()


def lcm(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378): x_{i+1} = s_{i+1} f + n_{i+1} fresh.

    f = T x_0 / sqrt(T^2 + c^2) + c^2 x / (T^2 + c^2), with T = 10 t_i and c = 0.5, is the consistency function with its
    boundary condition; it is x_0 but for t near 0. Uses `levels.timesteps`.
    """
    scaled = _TIMESTEP_SCALING * levels.timesteps[i]
    size = scaled**2 + _SIGMA_DATA**2
    f = scaled / size**0.5 * clean + _SIGMA_DATA**2 / size * x
    if i == len(levels) - 1:
        return f, ()
    s_next, n_next = levels[i + 1]
    return s_next * f + n_next * _drawn(fresh), ()


def tcd(levels: Levels, i: int, x: Tensor, clean: Tensor, memory: Memory, fresh: Tensor | None) -> Step:
    """Strategic stochastic sampling of TCD (Zheng et al. 2024, arXiv 2402.19159), gamma 0.3.

    By DDIM down to timestep m = floor((1 - gamma) t_{i+1}), then up by fresh noise to level i + 1:
    x_{i+1} = r x_m + sqrt(1 - r^2) fresh, with r^2 = abar_{i+1} / abar_m. As in stock, the last step ends at timestep 0
    and not at the clean end, and a learned clock has no gradient through m. Uses `levels.timesteps` and `levels.abar`.
    """
    last = i == len(levels) - 1
    following = 0.0 if last else levels.timesteps[i + 1]
    t_next = float(following.detach() if isinstance(following, Tensor) else following)
    # in single precision, as stock does: 0.7 t ends below a whole number for some t in double, and not in single
    share = float(levels.abar[math.floor(np.float32(1 - TCD_GAMMA) * np.float32(t_next))])
    s, n = levels[i]
    middle = share**0.5 * clean + (1 - share) ** 0.5 * ((x - s * clean) / n)
    if last:
        return middle, ()
    r = levels[i + 1][0] / share**0.5
    if r >= 1:  # level i + 1 is timestep 0, or within rounding of it; the root has no slope there
        return middle, ()
    return r * middle + (1 - r**2) ** 0.5 * _drawn(fresh), ()


SOLVERS: dict[str, Advance] = {
    "ddim": ddim,
    "euler": ddim,
    "dpmpp_2m": dpmpp_2m,
    "uni_pc": uni_pc,
    "euler_ancestral": euler_ancestral,
    "lcm": lcm,
    "tcd": tcd,
}
"""The solver of each of `rwopt.schedule.samplers.SAMPLERS`."""


def _step(levels: Levels, i: int, x: Tensor, clean: Tensor) -> Tensor:
    """(step) of the module's text, [N, C, h, w]; to the clean end it is `clean`."""
    if i == len(levels) - 1:
        return clean
    (s, n), (s_next, n_next) = levels[i], levels[i + 1]
    ratio = n_next / n
    return ratio * x + (s_next - s * ratio) * clean


def _forward(levels: Levels, i: int, clean: Tensor, before: Memory) -> Tensor:
    """D_i of `dpmpp_2m`, [N, C, h, w]; `before`: the clean picture of the step before, or ()."""
    if not before or i == len(levels) - 1:
        return clean
    here = levels.lam(i)
    weight = (levels.lam(i + 1) - here) / (here - levels.lam(i - 1)) / 2
    return clean + weight * (clean - before[0])


def _corrected(levels: Levels, i: int, clean: Tensor, memory: Memory) -> Tensor:
    """UniC: latents at level i, as the step from i - 1 would have led to, had it known the clean picture at its end.

    D = x_0^{i-1} + rho_1 (x_0^{i-2} - x_0^{i-1}) / r + rho_2 (x_0^i - x_0^{i-1}), with h = lambda_i - lambda_{i-1} and
    r = (lambda_{i-2} - lambda_{i-1}) / h. Of first order (i = 1) rho is (0, 1/2), else it makes D right for a clean
    picture that is a square in lambda: rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, with B = e^-h - 1,
    b_1 = -1 / h - 1 / B and b_2 = -2 b_1 / h - 1 / B.
    """
    x_before, before, *earlier = memory
    if not earlier:
        target = before + 0.5 * (clean - before)
    else:
        here = levels.lam(i - 1)
        h = levels.lam(i) - here
        r = (levels.lam(i - 2) - here) / h
        over = 1 / _expm1(-h)
        b_1 = -1 / h - over
        b_2 = -2 * b_1 / h - over
        rho = (b_1 - b_2) / (1 - r)
        target = before + rho / r * (earlier[0] - before) + (b_1 - rho) * (clean - before)
    return _step(levels, i - 1, x_before, target)


def _drawn(fresh: Tensor | None) -> Tensor:
    if fresh is None:
        raise ValueError("a noisy sampler needs fresh noise before its last step")
    return fresh


def _log(value: Number) -> Number:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _expm1(value: Number) -> Number:
    return torch.expm1(value) if isinstance(value, Tensor) else math.expm1(value)
