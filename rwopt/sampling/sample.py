"""The sampling loop of a search: deterministic DDIM with per-row weights, gradient as an explicit switch.

DDIM (Song et al., 2021, arXiv 2010.02502, equation 12 with eta = 0) goes from x_t to the next level s by

    x_s = sqrt(abar_s) x_0(x_t) + sqrt(1 - abar_s) eps(x_t) .

Candidates are told apart by row: the weights of a call are [S] (one schedule) or [N, S] (one for each picture), so a
tuner evaluates many at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.models import Model
from rwopt.sampling.denoise import Condition, Row, clean_in, guide, noise_in, predict
from rwopt.sampling.noise import add_noise, alpha_bar
from rwopt.unet.attachment import Attachment

Weights = Callable[[float], Row | None]  # sigma -> [S], [N, S], two sides of guidance, or None (plain)


class Callback(Protocol):
    def __call__(self, i: int, t: int, x: Tensor) -> None: ...


def ddim_step(model: Model, out: Tensor, x: Tensor, t: int | None, t_next: int | None) -> Tensor:
    """From noise level `t` to `t_next` (None: the clean end), by the guided output `out`; all [N, C, h, w]."""
    clean, noise = clean_in(model, out, x, t), noise_in(model, out, x, t)
    alpha = alpha_bar(model, t_next)
    return math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise


def sample(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    ts: list[int],
    weights: Weights | None = None,
    grad: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Run DDIM from `x` [N, C, h, w] at noise level `ts[0]` to clean latents [N, C, h, w].

    `grad=True` keeps the gradient with respect to `x`, the text and the weights; each step is checkpointed and its
    weights are an argument of the re-run part. `callback` sees `x` before each step.
    """
    with torch.set_grad_enabled(grad):
        for i, t in enumerate(ts):
            if callback is not None:
                callback(i=i, t=t, x=x)
            t_next = ts[i + 1] if i + 1 < len(ts) else None
            row = None if weights is None else weights(model.sigma(t))

            def step(x: Tensor, row: Row | None, t: int = t, t_next: int | None = t_next) -> Tensor:
                return ddim_step(model, guide(predict(model, attachment, x, t, cond, row), cond), x, t, t_next)

            x = checkpoint(step, x, row, use_reentrant=False) if grad else step(x, row)
    return x


@torch.no_grad()
def invert(model: Model, attachment: Attachment, z: Tensor, cond: Condition, ts: list[int]) -> Tensor:
    """DDIM inversion of clean latents `z` up to noise level `ts[0]` with the plain model: [N, C, h, w]."""
    t: int | None = None
    for t_next in reversed(ts):
        # The output is asked for at the upper level (as in Song et al., 2021, section 4.3) and must be read there too:
        # read at the lower level, as in diffusers' inverse scheduler, a v-prediction ends up to 5 times further off.
        noise = noise_in(model, guide(predict(model, attachment, z, t_next, cond), cond), z, t_next)
        alpha = alpha_bar(model, t)
        z = add_noise(model, (z - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha), noise, t_next)
        t = t_next
    return z
