"""Text to picture. Identity is kept with respect to the plain model's picture from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rwopt.models import Model
from rwopt.sampling.course import Course
from rwopt.tasks.cases import Case
from rwopt.tasks.task import Dials, Task
from rwopt.unet.attachment import Attachment


class Generation(Task):
    """From noise in `steps` calls. References are made once, by the plain model with the `plain` dials."""

    name = "generation"

    def __init__(
        self, model: Model, cases: Sequence[Case], steps: int, *args: Any, plain: Dials | None = None, **options: Any
    ) -> None:
        super().__init__(model, cases, steps, *args, **options)
        self.references = self.images(plain or Dials())

    @property
    def calls(self) -> int:
        return self.steps

    def start(self, attachment: Attachment, dials: Dials, course: Course, rows: slice) -> Tensor:
        return self.noise[rows] * course.scale
