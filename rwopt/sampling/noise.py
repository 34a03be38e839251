"""The forward process: a clean picture and noise, mixed.

A variance-preserving model (Ho et al., 2020, arXiv 2006.11239, equation 4) is trained on

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e ,    e ~ N(0, I) .

What the same level is called elsewhere (VE sigma) is in `rwopt.schedule.noise`.
"""

from __future__ import annotations

import math

from torch import Tensor

from rwopt.models import Model


def add_noise(model: Model, latents: Tensor, noise: Tensor, t: int) -> Tensor:
    """x_t of clean `latents` and `noise`, both [N, C, h, w], at training timestep `t`."""
    alpha = float(model.scheduler.alphas_cumprod[t])
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise
