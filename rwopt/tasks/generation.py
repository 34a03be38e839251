"""Text to picture. Identity is kept with respect to the plain model's picture from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rwopt.models import Model
from rwopt.sampling.denoise import Condition, condition
from rwopt.sampling.noise import timesteps
from rwopt.tasks.cases import Case
from rwopt.tasks.task import Dials, Task
from rwopt.unet.attachment import Attachment


class Generation(Task):
    """DDIM from noise in `steps` calls. References are made once, by the plain model with the `plain` dials."""

    name = "generation"

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        steps: int,
        draws: int = 1,
        batch: int = 64,
        seed: int = 0,
        plain: Dials = Dials(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, cases, steps, draws, batch, seed)
        self.references = self.images(plain)

    @property
    def calls(self) -> int:
        return self.steps

    def inputs(self, attachment: Attachment, dials: Dials, rows: slice) -> tuple[Tensor, Condition, list[int]]:
        cond = condition(self.model, [c.caption for c in self.cases[rows]], dials.guidance)
        return self.noise[rows], cond, timesteps(self.model, self.steps)
