"""Tasks: how a picture is made from a case. `make_task("editing", ...)` prepares cases once; a call makes the pictures.

A prepared task holds everything that candidates share (start noise, source latents, embeddings), so that two candidates
differ in weights and dials alone: common random numbers.
"""

from __future__ import annotations

import difflib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from rwopt.apply import Attachment
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling import Condition, Weights, sample
from rwopt.schedule import Schedule
from rwopt.tasks.cases import Case


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
        """All pictures [N, 3, H, W] in [0, 1] with these dials and this schedule (None: the plain model)."""
        own = attachment is None
        if attachment is None:
            attachment = (
                Attachment(self.model.unet, ())
                if schedule is None
                else Attachment(self.model.unet, schedule.sites, schedule.mode)
            )
        elif schedule is not None and (attachment.sites, attachment.mode) != (schedule.sites, schedule.mode):
            raise ValueError("the attachment must have the sites and the mode of the schedule")
        weights: Weights | None = None
        if schedule is not None:
            table = schedule

            def weights(sigma: float) -> Tensor:
                return torch.from_numpy(table.at(sigma)).float().to(self.model.device)

        try:
            parts = []
            for i in range(0, len(self), self.batch):
                x, cond, ts = self.inputs(attachment, dials, slice(i, i + self.batch))
                parts.append(self.model.decode(sample(self.model, attachment, x, cond, ts, weights)))
            return torch.cat(parts)
        finally:
            if own:
                attachment.remove()

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


def make_task(
    name: str,
    model: Model,
    cases: Sequence[Case],
    steps: int,
    draws: int = 1,
    batch: int = 64,
    method: str = "sdedit",
    plain: Dials | None = None,
) -> Task:
    """`generation`, or `editing` by `method` sdedit or inversion. `plain`: dials of generation's reference pictures."""
    from rwopt.tasks.editing import Editing
    from rwopt.tasks.generation import Generation

    if name == "generation":
        return Generation(model, cases, steps, draws, batch, plain=plain or Dials())
    if name == "editing":
        return Editing(model, cases, steps, draws, batch, method=method)
    near = difflib.get_close_matches(name, ["generation", "editing"], 1, 0)
    raise UserError(f"task.name={name} is unknown: did you mean {near[0]}?")
