"""What one call of the U-Net says of a noisy picture.

A call gives eps(x_t, text), or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho, 2022, arXiv 2202.00512).
Classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) mixes two of them,

    out = out(x_t, negative) + scale (out(x_t, positive) - out(x_t, negative)) ,

and from the mix come the clean picture and the noise that it takes `x_t` to be made of. A U-Net that is shown a picture
beside x_t, c_I, is guided towards it as well (Brooks et al., 2023, arXiv 2211.09800, equation 3):

    out = out(x_t, 0, negative) + scale_I (out(x_t, c_I, negative) - out(x_t, 0, negative))
                                + scale   (out(x_t, c_I, positive) - out(x_t, c_I, negative)) .
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.solvers import Number
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class Condition:
    """Text for N pictures: `positive` [N, L, D]; `negative` of the same shape, or None for no guidance.

    `guidance` is one scale or one a picture [N]. With `negative`, a U-Net call has 2N rows: negative, then positive.
    A U-Net that is told the scale (`Model.guidance_width`) has no negative rows, and is told this one.
    added, added_negative: what the U-Net takes beside the embeddings (`Model.added`), each [N, ...], of the two sides.
    extra: what it takes beside the latents [N, E, h, w], as further channels of each row. image_guidance: the scale by
    which guidance follows `extra`; a call then has a third row for a picture, with zeros in its place. None: no third.
    """

    positive: Tensor
    negative: Tensor | None = None
    guidance: float | Tensor = 1.0
    added: Mapping[str, Tensor] = field(default_factory=dict)
    added_negative: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Tensor | None = None
    image_guidance: float | None = None

    @property
    def each(self) -> int:
        """Rows of a U-Net call for a picture: 1; 2 with guidance; 3 with that towards a picture, too."""
        return 1 if self.negative is None else 2 if self.image_guidance is None else 3

    @property
    def paired(self) -> bool:
        """Whether a call's rows are [unconditional, conditional]."""
        return self.each == 2

    def rows(self, index: slice) -> Condition:
        """The condition of some of the pictures."""
        return self._each(lambda x: x[index])

    def times(self, n: int) -> Condition:
        """Of all pictures, `n` times over."""
        return self._each(lambda x: torch.cat([x] * n))

    def unguided(self) -> Condition:
        """Without negative rows; the scale stays, for a U-Net that is told it."""
        return replace(self, negative=None, added_negative={})

    def _each(self, part: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(
            part(self.positive),
            None if self.negative is None else part(self.negative),
            part(self.guidance) if isinstance(self.guidance, Tensor) and self.guidance.ndim else self.guidance,
            {name: part(x) for name, x in self.added.items()},
            {name: part(x) for name, x in self.added_negative.items()},
            None if self.extra is None else part(self.extra),
            self.image_guidance,
        )


def condition(model: Model, prompts: list[str], guidance: float | Tensor, negative: str | None = None) -> Condition:
    """Prompts and a guidance scale as a `Condition`; scale 1 everywhere needs no negative rows.

    negative: negative prompt of all pictures, "" for none; None: the model's own.
    """
    text = model.texts.positive(prompts)
    added = model.added(text)
    if model.guidance_width is not None:
        return Condition(text.tokens, None, guidance, added)
    if not isinstance(guidance, Tensor) and guidance == 1:
        return Condition(text.tokens, added=added)
    other = model.texts.negative([model.negative if negative is None else negative] * len(prompts))
    return Condition(text.tokens, other.tokens, guidance, added, model.added(other))


def told_scale(model: Model, cond: Condition, scale: float | Tensor | None) -> Condition:
    """`cond` for a call whose guidance scale is `scale`, if the U-Net is told it; None: the condition's own."""
    return cond if scale is None or model.guidance_width is None else replace(cond, guidance=scale)


def guidance_embedding(scale: float | Tensor, rows: int, width: int) -> Tensor:
    """What a U-Net is told of guidance scales, one or one a row: [rows, width], float32.

    Sines and cosines of 1000 (scale - 1) at falling frequencies (Luo et al., 2023, arXiv 2310.04378, section 4.2; their
    scale counts from 0, that of pipelines from 1).
    """
    scales = torch.as_tensor(scale, dtype=torch.float32).expand(rows)
    frequencies = torch.logspace(0, -4, width // 2, dtype=torch.float64).to(scales)
    angles = 1000 * (scales - 1)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


class Sided(NamedTuple):
    """Weights of one call that differ between the two sides of guidance, each [S] or [N, S].

    A row without the words is on the negative side, also where it has the picture.
    """

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
    model: Model, attachment: Attachment, x: Tensor, t: Number, cond: Condition, weights: Row | None = None
) -> Tensor:
    """One U-Net call that is told timestep `t`: raw output [2N, C, h, w] (negative, positive) if guided, else [N, ...].

    Of three rows for a picture two are made, whose mix by the scale of the words (`guide`) is that of all three.
    Float32, or float64 from a float64 U-Net.
    `weights`: [S], [N, S] (a picture's row serves both its halves), [2N, S], `Sided`, or None for the plain model; best
    on the CPU where they need no gradient (`Attachment`).
    """
    model.calls += 1
    if isinstance(weights, Sided):
        weights = weights.rows(len(x), cond.negative is not None)
    text, added, n = cond.positive, dict(cond.added), len(x)
    if cond.negative is not None:
        others = cond.each - 1  # negative rows, before the positive one
        x, text = torch.cat([x] * cond.each), torch.cat([cond.negative] * others + [cond.positive])
        added = {name: torch.cat([cond.added_negative[name]] * others + [own]) for name, own in added.items()}
        if weights is not None and weights.ndim == 2:
            if len(weights) == n:
                weights = torch.cat([weights, weights])
            weights = torch.cat([weights[:n]] * others + [weights[n:]])
    if cond.extra is not None:
        extra = torch.cat([cond.extra] * cond.each)
        if cond.each == 3:
            extra[:n] = 0
        x = torch.cat([x, extra.to(x)], 1)
    more: dict[str, Any] = {}
    if added:  # sizes keep their precision: half would round them
        pooled = {"text_embeds": added["text_embeds"].to(model.dtype)} if "text_embeds" in added else {}
        more["added_cond_kwargs"] = added | pooled
    if (width := model.guidance_width) is not None:
        more["timestep_cond"] = guidance_embedding(cond.guidance, len(x), width).to(x.device, model.dtype)
    out: Tensor = attachment(x.to(model.dtype), t, text.to(model.dtype), weights, **more)
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    if cond.each < 3 or cond.image_guidance is None:
        return out
    blank, shown, asked = out.chunk(3)
    negative = blank + cond.image_guidance * (shown - blank)
    return torch.cat([negative, negative + (asked - shown)])


def guide(out: Tensor, cond: Condition, scale: float | Tensor | None = None) -> Tensor:
    """Classifier-free guidance of `predict`'s rows: [N, C, h, w]. `scale`: None for the condition's own."""
    if cond.negative is None:
        return out
    negative, positive = out.chunk(2)
    scale = cond.guidance if scale is None else scale
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale.to(out).view(-1, 1, 1, 1)
    return negative + scale * (positive - negative)


def clean_in(model: Model, out: Tensor, x: Tensor, signal: Number, noise: Number) -> Tensor:
    """The clean picture in `x` according to a (guided) output at the level `x = signal x_0 + noise e`; [N, C, h, w]."""
    kind = model.scheduler.config.prediction_type
    if kind == "v_prediction":  # no division: sound at zero terminal SNR too
        return signal * x - noise * out
    if kind == "epsilon":
        return (x - noise * out) / signal
    raise UserError(f"prediction_type={kind} is not supported: epsilon or v_prediction")


def noise_in(model: Model, out: Tensor, x: Tensor, signal: Number, noise: Number) -> Tensor:
    """The noise in `x` likewise."""
    if model.scheduler.config.prediction_type == "v_prediction":
        return signal * out + noise * x
    return out
