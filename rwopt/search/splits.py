"""The cases of a recipe, train, validation and test, prepared for one model when first asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rwopt.config import TaskSettings
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import make_objective
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import Case, load_cases


class Splits:
    """A recipe's `task` settings on one model. `base`: the plain model's dials; `objectives`: what will be measured."""

    def __init__(self, settings: TaskSettings, model: Model, base: Dials, objectives: Sequence[str] = ()) -> None:
        self.settings, self.model, self.base, self.objectives = settings, model, base, tuple(objectives)
        self._tasks: dict[str, Task] = {}

    def cases(self, split: str) -> list[Case]:
        """The recipe's cases of one split."""
        wanted = self.settings
        return load_cases(wanted.cases, split, wanted.name, getattr(wanted, split))

    def prepare(self, cases: Sequence[Case], draws: int | None = None) -> Task:
        """The recipe's task on some cases; each has the same start noises in whatever company."""
        wanted = self.settings
        draws = wanted.draws if draws is None else draws
        return make_task(wanted.name, self.model, cases, wanted.steps, draws, wanted.batch, wanted.method, self.base)

    def task(self, split: str) -> Task:
        """The prepared task of one split, made once.

        Raises `UserError` if its cases lack what an objective needs: a long search would fail at its last step.
        """
        if split not in self._tasks:
            task = self.prepare(self.cases(split))
            given = task.describe(torch.zeros(len(task), 3, 1, 1))
            for name in self.objectives:
                for need in sorted(make_objective(name).spec.needs):
                    if getattr(given, need) is None:
                        raise UserError(f"objective {name} needs {need}, which {task.name} cases ({split}) do not give")
            self._tasks[split] = task
        return self._tasks[split]
