"""The one sampling loop of search: deterministic DDIM with per-row weights, gradient as an explicit switch.

DDIM (Song et al., 2021, arXiv 2010.02502, equation 12 with eta = 0) on `eps` or `v` predictions. Candidates are told
apart by row: the weights of a call are [S] (one schedule) or [N, S] (one for each picture), so a tuner evaluates many
at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.apply import Attachment
from rwopt.errors import UserError
from rwopt.models import Model

Weights = Callable[[float], Tensor | None]  # sigma -> [S], [N, S] or None (plain)


class Callback(Protocol):
    def __call__(self, i: int, t: int, x: Tensor) -> None: ...


@dataclass(frozen=True)
class Condition:
    """Text for N pictures: `positive` [N, L, D]; `negative` of the same shape, or None for no guidance.

    `guidance` is one scale or one a picture [N]. With `negative`, a U-Net call has 2N rows: negative, then positive.
    """

    positive: Tensor
    negative: Tensor | None = None
    guidance: float | Tensor = 1.0

    def rows(self, index: slice) -> Condition:
        """The condition of some of the pictures."""
        return Condition(
            self.positive[index],
            None if self.negative is None else self.negative[index],
            self.guidance[index] if isinstance(self.guidance, Tensor) else self.guidance,
        )


def condition(model: Model, prompts: list[str], guidance: float | Tensor, negative: str = "") -> Condition:
    """Prompts and a guidance scale as a `Condition`; scale 1 everywhere needs no negative rows."""
    positive = model.encode(prompts)
    if not isinstance(guidance, Tensor) and guidance == 1:
        return Condition(positive)
    return Condition(positive, model.encode([negative] * len(prompts)), guidance)


def timesteps(model: Model, steps: int, strength: float = 1.0) -> list[int]:
    """`steps` training timesteps from `strength` T down, in "trailing" spacing: any strength costs the same."""
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} is outside (0, 1]")
    total = len(model.alphas_cumprod)
    top = strength * total
    if not 1 <= steps <= top:
        raise UserError(f"steps={steps} is outside 1 .. {int(top)} (strength x training timesteps)")
    return [round(top - i * top / steps) - 1 for i in range(steps)]


def predict(
    model: Model, attachment: Attachment, x: Tensor, t: int, cond: Condition, weights: Tensor | None = None
) -> Tensor:
    """One U-Net call at timestep `t`: raw output [2N, C, h, w] (negative, positive) if guided, else [N, ...].

    Float32, or float64 from a float64 U-Net.
    `weights`: [S], [N, S] (a picture's row serves both its halves), [2N, S], or None for the plain model.
    """
    model.calls += 1
    text = cond.positive
    if cond.negative is not None:
        x, text = torch.cat([x, x]), torch.cat([cond.negative, cond.positive])
        if weights is not None and weights.ndim == 2 and 2 * len(weights) == len(x):
            weights = torch.cat([weights, weights])
    out: Tensor = attachment(x.to(model.dtype), t, text.to(model.dtype), weights)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def guide(out: Tensor, cond: Condition) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) of `predict`'s rows: [N, C, h, w]."""
    if cond.negative is None:
        return out
    negative, positive = out.chunk(2)
    scale = cond.guidance
    if isinstance(scale, Tensor):
        scale = scale.to(out).view(-1, 1, 1, 1)
    return negative + scale * (positive - negative)


def _alpha(model: Model, t: int | None) -> float:
    return 1.0 if t is None else float(model.scheduler.alphas_cumprod[t])


def _noise(model: Model, out: Tensor, x: Tensor, t: int | None) -> Tensor:
    """The noise in `x` according to the U-Net's output at level `t`."""
    kind = model.scheduler.config.prediction_type
    if kind == "epsilon":
        return out
    if kind == "v_prediction":
        alpha = _alpha(model, t)
        return math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x
    raise UserError(f"prediction_type={kind} is not supported: epsilon or v_prediction")


def ddim_step(model: Model, out: Tensor, x: Tensor, t: int | None, t_next: int | None) -> Tensor:
    """From noise level `t` to `t_next` (None: the clean end)."""
    noise = _noise(model, out, x, t)
    alpha, alpha_next = _alpha(model, t), _alpha(model, t_next)
    if model.scheduler.config.prediction_type == "v_prediction":  # no division: sound at zero terminal SNR too
        clean = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * out
    else:
        clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    return math.sqrt(alpha_next) * clean + math.sqrt(1 - alpha_next) * noise


def add_noise(model: Model, latents: Tensor, noise: Tensor, t: int) -> Tensor:
    """sqrt(abar_t) z + sqrt(1 - abar_t) noise."""
    alpha = _alpha(model, t)
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise


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

            def step(x: Tensor, row: Tensor | None, t: int = t, t_next: int | None = t_next) -> Tensor:
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
        noise = _noise(model, guide(predict(model, attachment, z, t_next, cond), cond), z, t_next)
        alpha = _alpha(model, t)
        z = add_noise(model, (z - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha), noise, t_next)
        t = t_next
    return z
