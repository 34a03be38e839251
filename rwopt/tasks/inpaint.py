"""Paint a part of a source picture anew: where its mask is white.

A U-Net made for it takes the mask and the latents of the rest as further channels (Rombach et al., 2022, arXiv
2112.10752). For any other one, what is to stay is put back after each step, at the next noise level and with the noise
that the picture started from (Avrahami et al., 2022, arXiv 2206.02779, algorithm 1, in one draw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.sampling.solvers import Memory
from rwopt.tasks.cases import Case
from rwopt.tasks.editing import Editing
from rwopt.tasks.task import Dials
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True, eq=False, kw_only=True)
class Blended(Course):
    """A course that keeps a part of each picture: after each step everything but `mask` [N, 1, h, w] is that of the
    `source` latents [N, C, h, w] at the next level, with `noise` [N, C, h, w]."""

    source: Tensor
    noise: Tensor
    mask: Tensor

    def step(
        self, i: int, x: Tensor, clean: Tensor, memory: Memory, rows: slice = slice(None)
    ) -> tuple[Tensor, Memory]:
        x, memory = super().step(i, x, clean, memory, rows)
        signal, noise = self.levels.signal[i + 1], self.levels.noise[i + 1]
        kept = (signal * self.source[rows] + noise * self.noise[rows]).to(x)
        mask = self.mask[rows].to(x)
        return (1 - mask) * kept + mask * x, memory


class Inpainting(Editing):
    """`method` "inpaint"; every case needs a mask. At strength 1 it starts from noise alone, as stock pipelines do."""

    def __init__(self, model: Model, cases: Sequence[Case], *args: Any, **options: Any) -> None:
        super().__init__(model, cases, *args, **options)
        if self.masks is None:
            missing = next(case.id for case in self.cases if case.mask is None)
            raise UserError(
                f"case {missing} has no mask, which task.method=inpaint needs: give a picture {missing}.mask.png, a "
                "column mask, or a source picture with transparency"
            )
        self.mask = F.interpolate(self.masks, model.latent_shape[1:])  # nearest, as in the stock pipelines
        self.rest = self.latents[:0]
        if model.extra_channels:
            assert self.references is not None
            grey = self.references * (1 - self.masks) + 0.5 * self.masks
            self.rest = self.in_parts(model.latents, grey)

    def start(self, attachment: Attachment, dials: Dials, course: Course, rows: slice) -> Tensor:
        if dials.strength == 1:
            return self.noise[rows] * course.scale
        return course.noised(0, self.latents[rows], self.noise[rows])

    def beside(self, cond: Condition, dials: Dials, rows: slice) -> Condition:
        if not self.model.extra_channels:
            return cond
        return replace(cond, extra=torch.cat([self.mask[rows], self.rest[rows]], 1))

    def inputs(
        self, attachment: Attachment, dials: Dials, rows: slice, course: Course | None = None
    ) -> tuple[Tensor, Condition, Course]:
        x, cond, course = super().inputs(attachment, dials, rows, course)
        if self.model.extra_channels:
            return x, cond, course
        own = {field.name: getattr(course, field.name) for field in fields(Course)}
        return x, cond, Blended(**own, source=self.latents[rows], noise=self.noise[rows], mask=self.mask[rows])
