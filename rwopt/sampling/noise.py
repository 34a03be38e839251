"""Noise levels on the way of a sampler, by training timestep.

The forward process of a variance-preserving model (Ho et al., 2020, arXiv 2006.11239, equation 4):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e ,    e ~ N(0, I) .

What the same level is called elsewhere (VE sigma) is in `rwopt.schedule.noise`.
"""

from __future__ import annotations

import math

from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model


def timesteps(model: Model, steps: int, strength: float = 1.0) -> list[int]:
    """`steps` training timesteps from `strength` T down, in "trailing" spacing: any strength costs the same."""
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} is outside (0, 1]")
    total = len(model.alphas_cumprod)
    top = strength * total
    if not 1 <= steps <= top:
        raise UserError(f"steps={steps} is outside 1 .. {int(top)} (strength x training timesteps)")
    return [round(top - i * top / steps) - 1 for i in range(steps)]


def alpha_bar(model: Model, t: int | None) -> float:
    """abar_t, the share of signal; 1 at the clean end (None)."""
    return 1.0 if t is None else float(model.scheduler.alphas_cumprod[t])


def add_noise(model: Model, latents: Tensor, noise: Tensor, t: int) -> Tensor:
    """x_t of clean `latents` and `noise`, both [N, C, h, w]."""
    alpha = alpha_bar(model, t)
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise
