"""A task: how a picture is made from a case, prepared once for many candidates.

A prepared task holds everything that candidates share (start noise, source latents, embeddings), so that two candidates
differ in weights and dials alone: common random numbers.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.course import Course, course_by_rule, course_of_steps
from rwopt.sampling.denoise import Condition, Row, Sided, condition
from rwopt.sampling.sample import Weights
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import Steps
from rwopt.tasks.cases import Case
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class Dials:
    """What one can turn without any schedule: guidance scale; edit strength in (0, 1] (ignored by generation and by
    instructions); for instructions the scale of guidance towards the source picture, from 1 (None: 1.5)."""

    guidance: float = 4.0
    strength: float = 1.0
    image_guidance: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Those that the task has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Task(ABC):
    """Cases made ready for one model. `draws` start noises a case; pictures are ordered case by case, draw by draw."""

    name: str

    def __init__(
        self, model: Model, cases: Sequence[Case], steps: int, draws: int = 1, batch: int = 64, seed: int = 0,
        sampler: str = "ddim", grid: str = "trailing",
    ) -> None:  # fmt: skip
        if not cases:
            raise UserError(f"task {self.name}: no cases were given")
        self.model, self.steps, self.draws, self.batch, self.seed = model, steps, draws, batch, seed
        self.sampler, self.grid = sampler, grid
        self.cases = [case for case in cases for _ in range(draws)]
        self.owner = np.repeat(np.arange(len(cases)), draws)  # which case a picture belongs to
        noises = [torch.randn(model.latent_shape, generator=g) for g in self.generators()]
        self.noise = torch.stack(noises).to(model.device)
        self.references: Tensor | None = None
        self.teacher: Tensor | None = None  # pictures [N, 3, H, W] of `rwopt.tasks.teacher`, and their latents
        self.teacher_latents: Tensor | None = None
        self.teacher_key = ""  # which teacher it is, for whoever keeps them
        self._fresh: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cases)

    def generators(self, purpose: str = "") -> list[torch.Generator]:
        """One a picture, a function of case and draw alone: any subset of cases sees the same noise."""
        keys = [f"{self.seed}/{case.id}/{i % self.draws}{purpose}" for i, case in enumerate(self.cases)]
        return [torch.Generator().manual_seed(zlib.crc32(key.encode())) for key in keys]

    def course(self, dials: Dials, steps: Steps | None = None) -> Course:
        """The task's own course at these dials, or that of a schedule's steps."""
        if steps is not None:
            return course_of_steps(self.model, steps)
        return course_by_rule(self.model, self.steps, self.sampler, self.grid, self.reach(dials))

    def reach(self, dials: Dials) -> float:
        """The noise level at which a picture starts, as a share of the training timesteps."""
        return 1.0

    def inputs(
        self, attachment: Attachment, dials: Dials, rows: slice, course: Course | None = None
    ) -> tuple[Tensor, Condition, Course]:
        """Where sampling starts for some of the pictures: x [n, C, h, w], their condition, the course (the task's own
        if none is given) with the noise of a noisy sampler."""
        course = self.course(dials) if course is None else course
        scale = dials.guidance if course.guidance is None else 2.0  # not 1: the course's own needs negative rows
        cond = self.beside(condition(self.model, [c.caption for c in self.cases[rows]], scale), dials, rows)
        if SAMPLERS[course.sampler].noisy:
            course = replace(course, noises=self.fresh(len(course))[:, rows])
        return self.start(attachment, dials, course, rows), cond, course

    def beside(self, cond: Condition, dials: Dials, rows: slice) -> Condition:
        """The condition of some pictures with what the U-Net takes beside their latents; as it is for most tasks."""
        return cond

    @abstractmethod
    def start(self, attachment: Attachment, dials: Dials, course: Course, rows: slice) -> Tensor:
        """Latents [n, C, h, w] at the first level of a course."""

    def fresh(self, count: int) -> Tensor:
        """Noise [count, N, C, h, w] that a noisy sampler adds on the way: the draws of each picture's own generator."""
        if self._fresh is None or len(self._fresh) < count:
            shape, generators = self.model.latent_shape, self.generators("/fresh")
            draws = [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(count)]
            self._fresh = torch.stack(draws).to(self.model.device)  # one draw a step, as pipelines make them
        return self._fresh[:count]

    @property
    @abstractmethod
    def calls(self) -> int:
        """U-Net calls that one picture costs (with guidance a call has two rows)."""

    def images(
        self, dials: Dials, schedule: Schedule | None = None, attachment: Attachment | None = None
    ) -> Tensor:
        """All pictures [N, 3, H, W] in [0, 1] with these dials and this schedule (None: the plain model).

        Raises ValueError if an `attachment` is given that has not the sites and the mode of the schedule.
        """
        return self.made(dials, schedule, attachment).images

    def made(
        self, dials: Dials, schedule: Schedule | None = None, attachment: Attachment | None = None
    ) -> Batch:
        """`images` with what is known of them."""
        return self.candidates([(dials, schedule)], attachment)[0]

    def candidates(
        self, candidates: Sequence[tuple[Dials, Schedule | None]], attachment: Attachment | None = None
    ) -> list[Batch]:
        """`made` of several candidates: what they share is computed once, and small sets of cases share batches.

        A schedule's steps take the place of the task's own course, and its actions say what each call computes.
        """
        room = self.batch if 2 * len(self) <= self.batch else 1  # parts of one candidate are as they are alone
        out: list[list[Tensor]] = [[] for _ in candidates]
        # whose U-Net calls can be one: the same timesteps, rows and sites
        batches: dict[tuple[Any, Any, Steps | None, Actions | None], list[int]] = {}
        for i, (dials, schedule) in enumerate(candidates):
            where = None if schedule is None or schedule.is_plain else (schedule.sites, schedule.mode)
            steps, actions = (None, None) if schedule is None else (schedule.steps, schedule.actions)
            if attachment and schedule and (attachment.sites, attachment.mode) != (schedule.sites, schedule.mode):
                raise ValueError("the attachment must have the sites and the mode of the schedule")
            shared = (replace(dials, guidance=float(dials.guidance == 1)), where, steps, actions)
            batches.setdefault(shared, []).append(i)
        for (_, _, steps, actions), members in batches.items():
            dials, schedule = candidates[members[0]]
            given = [(candidates[i][0].guidance, weights_of(candidates[i][1])) for i in members]
            course = self.course(dials, steps)
            own = None if attachment is not None else attach(self.model, schedule)
            hooks = own or attachment
            assert hooks is not None
            try:
                for start in range(0, len(self), self.batch):
                    x, cond, whole = self.inputs(hooks, dials, slice(start, start + self.batch), course)
                    ends = sample_batched(self.model, hooks, x, cond, whole, given, room, actions)
                    for i, latents in zip(members, ends, strict=True):
                        out[i].append(latents)
            finally:
                if own is not None:
                    own.remove()
        ends = [torch.cat(parts) for parts in out]
        return [self.describe(self.decoded(latents), latents) for latents in ends]

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] of clean latents, no more at once than share a U-Net call."""
        return self.model.decode(latents, self.batch)

    def describe(self, images: Tensor, latents: Tensor | None = None) -> Batch:
        """The pictures, and the latents that they were decoded from, with what is known of their cases."""
        before = [c.source_caption for c in self.cases]
        return Batch(
            images,
            latents=latents,
            teacher=self.teacher,
            teacher_latents=self.teacher_latents,
            reference=self.references,
            prompts=[c.caption for c in self.cases],
            source_prompts=before if all(before) else None,
            target=[c.target for c in self.cases] if self.cases[0].target else None,
            changed=[list(c.change) for c in self.cases],
            hidden=[c.hidden for c in self.cases],
        )


def weights_of(schedule: Schedule | None) -> Weights | None:
    """What a schedule gives the sampler at a noise level, on the sides of guidance that it is for; None: plain."""
    if schedule is None or schedule.is_plain:
        return None

    def at(sigma: float) -> Row:
        w = torch.from_numpy(schedule.at(sigma)).float()
        if schedule.cfg_branch == "both":
            return w
        plain = torch.ones_like(w)
        return Sided(plain, w) if schedule.cfg_branch == "cond" else Sided(w, plain)

    return at


def attach(model: Model, schedule: Schedule | None) -> Attachment:
    """Hooks for a schedule; none for the plain model."""
    if schedule is None or schedule.is_plain:
        return Attachment(model.unet, ())
    return Attachment(model.unet, schedule.sites, schedule.mode)
