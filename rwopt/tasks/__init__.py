"""Tasks: how a picture is made from a case. `make_task` prepares cases once; a call of the task makes the pictures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rwopt.errors import UserError, one_of
from rwopt.models import Model
from rwopt.models.channels import check_channels
from rwopt.tasks.cases import Case
from rwopt.tasks.editing import Editing
from rwopt.tasks.generation import Generation
from rwopt.tasks.inpaint import Inpainting
from rwopt.tasks.instruct import Instructed
from rwopt.tasks.task import Dials, Task

__all__ = ["Dials", "Task", "make_task"]


EDITS: dict[str, type[Editing]] = {
    "sdedit": Editing, "inversion": Editing, "instruct": Instructed, "inpaint": Inpainting,
}  # fmt: skip
"""Methods of editing."""


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
    """`generation`, or `editing` by a `method` of `EDITS`. `plain`: dials of generation's reference pictures.

    Raises `UserError` for other names, and for a model whose U-Net takes other inputs than the task gives.
    """
    if name == "generation":
        _check(model, name)
        return Generation(model, cases, steps, draws, batch, sampler=sampler, grid=grid, plain=plain)
    if name == "editing":
        one_of(tuple(EDITS), "task.method", method)
        _check(model, method)
        return EDITS[method](model, cases, steps, draws, batch, sampler=sampler, grid=grid, method=method)
    near = difflib.get_close_matches(name, ["generation", "editing"], 1, 0)
    raise UserError(f"task.name={name} is unknown: did you mean {near[0]}?")


def _check(model: Model, method: str) -> None:
    config = model.unet.config
    check_channels(model.name, config.in_channels, config.out_channels, method)
