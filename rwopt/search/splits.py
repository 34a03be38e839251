"""The cases of a recipe, train, validation and test, prepared for one model when first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from rwopt.config import TaskSettings
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import make_objective
from rwopt.sampling.course import course_by_rule
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import Case, digest, load_cases
from rwopt.tasks.teacher import teach


class Splits:
    """A recipe's `task` settings on one model. `base`: the plain model's dials; `objectives`: what will be measured;
    `keep`: a folder for teachers, which are made where an objective needs one.

    teacher_calls: U-Net calls that the teachers in use took, {what they are for: calls}; teaching: those made now.
    """

    def __init__(
        self, settings: TaskSettings, model: Model, base: Dials, objectives: Sequence[str] = (),
        keep: Path | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.model, self.base, self.objectives = settings, model, base, tuple(objectives)
        self.keep = keep
        self.teacher_calls: dict[str, int] = {}
        self.teaching = 0
        self._tasks: dict[str, Task] = {}
        self._cases: dict[str, list[Case]] = {}

    @property
    def taught(self) -> bool:
        """Whether an objective needs a teacher."""
        return any({"teacher", "teacher_latents"} & make_objective(name).spec.needs for name in self.objectives)

    def cases(self, split: str) -> list[Case]:
        """The recipe's cases of one split."""
        if split not in self._cases:
            wanted, size = self.settings, self.model.picture_size
            self._cases[split] = load_cases(
                wanted.cases, split, wanted.name, getattr(wanted, split), wanted.instruction, size, wanted.fit
            )
        return self._cases[split]

    def prepare(self, cases: Sequence[Case], draws: int | None = None, taught: bool = True) -> Task:
        """The recipe's task on some cases; each has the same start noises in whatever company.

        taught: with a teacher, where an objective needs one.
        """
        wanted = self.settings
        draws = wanted.draws if draws is None else draws
        task = make_task(
            wanted.name, self.model, cases, wanted.steps, draws, wanted.batch, wanted.method, self.base, wanted.sampler,
            wanted.grid,
        )  # fmt: skip
        if taught and self.taught:
            self._teach(task)
        return task

    def price(self, *tasks: Task) -> int:
        """U-Net calls that the teachers of some tasks took, now or in an earlier run, each teacher once."""
        return sum(self.teacher_calls.get(key, 0) for key in {task.teacher_key for task in tasks})

    def _key(self, task: Task) -> str:
        """Of a task's teacher: what it depends on."""
        wanted = self.settings
        about = wanted.teacher, self.base, wanted.method, task.name, task.seed, task.draws, digest(task.cases)
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def _teach(self, task: Task) -> None:
        """Give a task its teacher, from `keep` if it was made before for the same cases, dials and settings."""
        wanted, dials, before = self.settings.teacher, self.base, self.model.calls
        key = task.teacher_key = self._key(task)
        file = None if self.keep is None else self.keep / f"{key}.safetensors"
        course = course_by_rule(self.model, wanted.steps, wanted.sampler, wanted.grid, task.reach(dials))
        self.teacher_calls[key] = teach(task, dials, course, file)
        self.teaching += self.model.calls - before

    def task(self, split: str) -> Task:
        """The prepared task of one split, made once.

        Raises `UserError` if its cases lack what an objective needs: a long search would fail at its last step.
        """
        if split not in self._tasks:
            task = self.prepare(self.cases(split))
            blank = torch.zeros(len(task), 3, 1, 1)
            given = task.describe(blank, blank)
            for name in self.objectives:
                for need in sorted(make_objective(name).spec.needs):
                    if getattr(given, need) is None:
                        raise UserError(f"objective {name} needs {need}, which {task.name} cases ({split}) do not give")
            self._tasks[split] = task
        return self._tasks[split]
