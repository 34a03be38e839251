"""Tasks: how a picture is made from a case. `make_task` prepares cases once; a call of the task makes the pictures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.tasks.cases import Case
from rwopt.tasks.editing import Editing
from rwopt.tasks.generation import Generation
from rwopt.tasks.task import Dials, Task

__all__ = ["Dials", "Task", "make_task"]


def make_task(
    name: str,
    model: Model,
    cases: Sequence[Case],
    steps: int,
    draws: int = 1,
    batch: int = 64,
    method: str = "sdedit",
    plain: Dials | None = None,
    sampler: str = "ddim",
    grid: str = "trailing",
) -> Task:
    """`generation`, or `editing` by `method` sdedit or inversion. `plain`: dials of generation's reference pictures."""
    if name == "generation":
        return Generation(model, cases, steps, draws, batch, sampler=sampler, grid=grid, plain=plain)
    if name == "editing":
        return Editing(model, cases, steps, draws, batch, sampler=sampler, grid=grid, method=method)
    near = difflib.get_close_matches(name, ["generation", "editing"], 1, 0)
    raise UserError(f"task.name={name} is unknown: did you mean {near[0]}?")
