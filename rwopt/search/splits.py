"""The cases of a recipe, train, validation and test, prepared for one model when first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from rwopt.config import TaskSettings
from rwopt.embedded import DEFAULT
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import objective_spec
from rwopt.sampling.course import course_by_rule
from rwopt.search.identity import weights_digest
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import Case, digest, load_cases
from rwopt.tasks.teacher import teach

GIVEN = {"truth": "truth", "mask": "mask", "source_prompts": "source_caption", "target": "target"}
"""What a batch has if all cases have it: field of the batch -> field of a case."""


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
        return any({"teacher", "teacher_latents"} & objective_spec(name).needs for name in self.objectives)

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
        about: tuple[object, ...]
        about = wanted.teacher, self.base, wanted.method, task.name, task.seed, task.draws, digest(task.cases)
        if self.model.name != DEFAULT:  # whose teachers were kept before there was another embedded model
            about += (weights_digest(self.model),)
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
                for need in sorted(objective_spec(name).needs):
                    if getattr(given, need) is None:
                        raise UserError(self._lacks(name, need, split))
            self._tasks[split] = task
        return self._tasks[split]

    def lacking(self, split: str) -> list[str]:
        """What objectives need and the cases of a split do not give, a line each; no task is made for it."""
        cases = self.cases(split)
        given = {need for need, field in GIVEN.items() if all(_has(getattr(case, field)) for case in cases)}
        return [
            self._lacks(name, need, split)
            for name in self.objectives
            for need in sorted((objective_spec(name).needs & GIVEN.keys()) - given)
        ]

    def _lacks(self, name: str, need: str, split: str) -> str:
        return f"objective {name} needs {need}, which {self.settings.name} cases ({split}) do not give"


def _has(value: object) -> bool:
    return value is not None and (not isinstance(value, str | dict) or bool(value))
