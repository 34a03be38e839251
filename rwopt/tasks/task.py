"""A task: how a picture is made from a case, prepared once for many candidates.

A prepared task holds everything that candidates share (start noise, source latents, embeddings), so that two candidates
differ in weights and dials alone: common random numbers.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.denoise import Condition, Row, Sided
from rwopt.sampling.sample import Weights
from rwopt.schedule import Schedule
from rwopt.tasks.cases import Case
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class Dials:
    """What one can turn without any schedule: guidance scale; edit strength in (0, 1] (ignored by generation)."""

    guidance: float = 4.0
    strength: float = 1.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Task(ABC):
    """Cases made ready for one model. `draws` start noises a case; pictures are ordered case by case, draw by draw."""

    name: str

    def __init__(
        self, model: Model, cases: Sequence[Case], steps: int, draws: int = 1, batch: int = 64, seed: int = 0
    ) -> None:
        if not cases:
            raise UserError(f"task {self.name}: no cases were given")
        self.model, self.steps, self.draws, self.batch = model, steps, draws, batch
        self.cases = [case for case in cases for _ in range(draws)]
        self.owner = np.repeat(np.arange(len(cases)), draws)  # which case a picture belongs to
        noises = []
        for i, case in enumerate(self.cases):  # a function of case and draw alone: any subset sees the same noise
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{case.id}/{i % draws}".encode()))
            noises.append(torch.randn(model.latent_shape, generator=generator))
        self.noise = torch.stack(noises).to(model.device)
        self.references: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cases)

    @abstractmethod
    def inputs(self, attachment: Attachment, dials: Dials, rows: slice) -> tuple[Tensor, Condition, list[int]]:
        """Where sampling starts for some of the pictures: x [n, C, h, w], their condition, the timesteps."""

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
        return self.candidates([(dials, schedule)], attachment)[0]

    def candidates(
        self, candidates: Sequence[tuple[Dials, Schedule | None]], attachment: Attachment | None = None
    ) -> list[Tensor]:
        """`images` of several candidates: what they share is computed once, and small sets of cases share batches."""
        room = self.batch if 2 * len(self) <= self.batch else 1  # parts of one candidate are as they are alone
        out: list[list[Tensor]] = [[] for _ in candidates]
        batches: dict[object, list[int]] = {}  # whose U-Net calls can be one: the same timesteps, rows and sites
        for i, (dials, schedule) in enumerate(candidates):
            where = None if schedule is None else (schedule.sites, schedule.mode)
            batches.setdefault((dials.strength, dials.guidance == 1, where), []).append(i)
        for members in batches.values():
            dials, schedule = candidates[members[0]]
            own = None if attachment is not None else attach(self.model, schedule)
            hooks = own or attachment
            assert hooks is not None
            if schedule is not None and (hooks.sites, hooks.mode) != (schedule.sites, schedule.mode):
                raise ValueError("the attachment must have the sites and the mode of the schedule")
            given = [(candidates[i][0].guidance, weights_of(candidates[i][1])) for i in members]
            try:
                for start in range(0, len(self), self.batch):
                    x, cond, ts = self.inputs(hooks, dials, slice(start, start + self.batch))
                    ends = sample_batched(self.model, hooks, x, cond, ts, given, room)
                    for i, latents in zip(members, ends, strict=True):
                        out[i].append(self.model.decode(latents))
            finally:
                if own is not None:
                    own.remove()
        return [torch.cat(parts) for parts in out]

    def describe(self, images: Tensor) -> Batch:
        """The pictures with what is known of their cases."""
        return Batch(
            images,
            reference=self.references,
            prompts=[c.caption for c in self.cases],
            target=[c.target for c in self.cases] if self.cases[0].target else None,
            changed=[list(c.change) for c in self.cases],
            hidden=[c.hidden for c in self.cases],
        )


def weights_of(schedule: Schedule | None) -> Weights | None:
    """What a schedule gives the sampler at a noise level, on the sides of guidance that it is for; None: plain."""
    if schedule is None:
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
    return Attachment(model.unet, ()) if schedule is None else Attachment(model.unet, schedule.sites, schedule.mode)
