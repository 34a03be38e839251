"""What one call of the U-Net says of a noisy picture.

A call gives eps(x_t, text), or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho, 2022, arXiv 2202.00512).
Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) mixes two of them,

    out = out(x_t, negative) + scale (out(x_t, positive) - out(x_t, negative)) ,

and from the mix come the clean picture and the noise that it takes `x_t` to be made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.noise import alpha_bar
from rwopt.unet.attachment import Attachment


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


class Sided(NamedTuple):
    """Weights of one call that differ between the two sides of guidance, each [S] or [N, S]."""

    negative: Tensor
    positive: Tensor

    def rows(self, pictures: int, guided: bool) -> Tensor:
        """Of a call with `pictures` pictures: [2N, S], negative first, or the positive side alone [S] or [N, S]."""
        if not guided:
            return self.positive
        return torch.cat([self.negative.expand(pictures, -1), self.positive.expand(pictures, -1)])


Row = Tensor | Sided
"""The weights of one call."""


def predict(
    model: Model, attachment: Attachment, x: Tensor, t: int, cond: Condition, weights: Row | None = None
) -> Tensor:
    """One U-Net call at timestep `t`: raw output [2N, C, h, w] (negative, positive) if guided, else [N, ...].

    Float32, or float64 from a float64 U-Net.
    `weights`: [S], [N, S] (a picture's row serves both its halves), [2N, S], `Sided`, or None for the plain model; best
    on the CPU where they need no gradient (`Attachment`).
    """
    model.calls += 1
    if isinstance(weights, Sided):
        weights = weights.rows(len(x), cond.negative is not None)
    text = cond.positive
    if cond.negative is not None:
        x, text = torch.cat([x, x]), torch.cat([cond.negative, cond.positive])
        if weights is not None and weights.ndim == 2 and 2 * len(weights) == len(x):
            weights = torch.cat([weights, weights])
    out: Tensor = attachment(x.to(model.dtype), t, text.to(model.dtype), weights)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def guide(out: Tensor, cond: Condition) -> Tensor:
    """Classifier-free guidance of `predict`'s rows: [N, C, h, w]."""
    if cond.negative is None:
        return out
    negative, positive = out.chunk(2)
    scale = cond.guidance
    if isinstance(scale, Tensor):
        scale = scale.to(out).view(-1, 1, 1, 1)
    return negative + scale * (positive - negative)


def noise_in(model: Model, out: Tensor, x: Tensor, t: int | None) -> Tensor:
    """The noise in `x` according to a (guided) output at level `t`; all [N, C, h, w]."""
    kind = model.scheduler.config.prediction_type
    if kind == "epsilon":
        return out
    if kind == "v_prediction":
        alpha = alpha_bar(model, t)
        return math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x
    raise UserError(f"prediction_type={kind} is not supported: epsilon or v_prediction")


def clean_in(model: Model, out: Tensor, x: Tensor, t: int | None) -> Tensor:
    """The clean picture in `x` likewise."""
    alpha = alpha_bar(model, t)
    if model.scheduler.config.prediction_type == "v_prediction":  # no division: sound at zero terminal SNR too
        return math.sqrt(alpha) * x - math.sqrt(1 - alpha) * out
    return (x - math.sqrt(1 - alpha) * noise_in(model, out, x, t)) / math.sqrt(alpha)
