"""The sampling loop of a search: any sampler on any course, with per-row weights, gradient as an explicit switch.

Candidates are told apart by row: the weights of a call are [S] (one schedule) or [N, S] (one for each picture), so a
tuner evaluates many at once. Steps from one noise level to the next: `rwopt.sampling.solvers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.models import Model
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, Row, clean_in, guide, noise_in, predict, told_scale
from rwopt.sampling.solvers import Memory, Number
from rwopt.schedule.actions import Actions
from rwopt.unet.actions import Acts, Line, Past, Texts
from rwopt.unet.actions_patterns import Place
from rwopt.unet.attachment import Attachment

Weights = Callable[[float], Row | None]  # sigma -> [S], [N, S], two sides of guidance, or None (plain)


class Callback(Protocol):
    def __call__(self, i: int, x: Tensor) -> None: ...


class Plan(NamedTuple):
    """Of one run: what its calls compute, and the text's keys and values, made once; see `plan_of`."""

    acts: Acts | None
    texts: Texts

    def call(
        self, model: Model, attachment: Attachment, x: Tensor, t: Number, cond: Condition, row: Row | None,
        past: Past, sigma: float,
    ) -> tuple[Tensor, Past]:  # fmt: skip
        """`predict` at VE sigma with what is stored of earlier calls: raw output, and the past of the next call.

        A call whose whole output is stored asks no U-Net, and is none in `Model.calls`.
        """
        if self.acts is None:
            return predict(model, attachment, x, t, cond, row), past
        past, frame = self.acts.frame(past, sigma, cond.paired, self.texts)
        if "output" in frame.given:
            return frame.given["output"].value(0), self.acts.after(past, frame, sigma)
        out = predict(model, attachment.with_frame(frame), x, t, cond, row)
        if "output" in frame.keep:
            frame.taken[Place("output")] = out
        return out, self.acts.after(past, frame, sigma)

    def stored(self, past: Past, sigma: float, guided: bool) -> Line | None:
        """The whole output of a call at VE sigma, if it is one that asks no U-Net."""
        return None if self.acts is None else self.acts.frame(past, sigma, guided)[1].given.get("output")


def plan_of(attachment: Attachment, actions: Actions | None = None) -> Plan:
    """For one run of one condition. `actions`: None computes everything, but for keys and values of the text, which
    are made once a run (equal to the last bit). What only looks like an attachment has nothing to store."""
    acts = attachment.acts(actions, texts=True) if isinstance(attachment, Attachment) else None
    return Plan(acts, Texts(vouched=True))


def advance(
    model: Model, course: Course, i: int, out: Tensor, cond: Condition, x: Tensor, memory: Memory,
    rows: slice = slice(None),
) -> tuple[Tensor, Memory]:  # fmt: skip
    """From level `i` of a course to the next by the raw output of the U-Net (`predict`): latents [N, C, h, w], and what
    the solver remembers. rows: which of the course's pictures these are."""
    guided = guide(out, cond, course.scale_at(i))
    clean = clean_in(model, guided, x, course.levels.signal[i], course.levels.noise[i])
    return course.step(i, x, clean, memory, rows)


def sample(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    course: Course,
    weights: Weights | None = None,
    grad: bool = False,
    callback: Callback | None = None,
    actions: Actions | None = None,
) -> Tensor:
    """Run from `x` [N, C, h, w] at the course's first level to clean latents [N, C, h, w].

    `grad=True` keeps the gradient with respect to `x`, the text and the weights; each step is checkpointed and its
    weights, the solver's memory and what is stored of earlier calls are arguments of the re-run part. `callback` sees
    `x` before each step. actions: what each call computes; None: everything.
    """
    plan, past = plan_of(attachment, actions), Past()
    memory: Memory = ()
    with torch.set_grad_enabled(grad):
        for i, sigma in enumerate(course.sigmas):
            if callback is not None:
                callback(i=i, x=x)
            row = None if weights is None else weights(sigma)

            def step(
                x: Tensor, row: Row | None, memory: Memory, past: Past, i: int = i, sigma: float = sigma
            ) -> tuple[Tensor, Memory, Past]:
                own = told_scale(model, cond, course.scale_at(i))
                out, past = plan.call(model, attachment, x, course.told[i], own, row, past, sigma)
                return *advance(model, course, i, out, cond, x, memory), past

            given = x, row, memory, past
            x, memory, past = checkpoint(step, *given, use_reentrant=False) if grad else step(*given)
    return x


@torch.no_grad()
def invert(model: Model, attachment: Attachment, z: Tensor, cond: Condition, course: Course) -> Tensor:
    """DDIM inversion of clean latents `z` up to the course's first level with the plain model: [N, C, h, w]."""
    signal, noise = 1.0, 0.0
    for i in reversed(range(len(course))):
        # The output is asked for at the upper level (as in Song et al., 2021, section 4.3) and must be read there too:
        # read at the lower level, as in diffusers' inverse scheduler, a v-prediction ends up to 5 times further off.
        up = float(course.levels.signal[i]), float(course.levels.noise[i])
        out = guide(predict(model, attachment, z, course.told[i], cond), cond)
        e = noise_in(model, out, z, *up)
        z = up[0] * (z - noise * e) / signal + up[1] * e
        signal, noise = up
    return z
