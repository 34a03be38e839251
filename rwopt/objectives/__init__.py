"""Objectives: per-image scores with a declared direction, range, differentiability, inputs and licence.

`make_objective("judge.kept")` gives one; `objective_names()` lists them; `composite.py` makes one of several. One
contract suite (`tests/objectives`) runs them all.
"""

from __future__ import annotations

import difflib
from typing import Any

from rwopt.errors import UserError
from rwopt.objectives import avatar, pixel, teacher
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec

__all__ = ["Batch", "Objective", "ObjectiveSpec", "make_objective", "objective_names"]


FAMILIES = (avatar, pixel, teacher)


def objective_names() -> list[str]:
    """Every name that `make_objective` takes."""
    return [name for family in FAMILIES for name in family.names()]


def make_objective(name: str, **options: Any) -> Objective:
    """The objective of that name; `UserError` with the nearest valid one otherwise."""
    for family in FAMILIES:
        if name in family.names():
            objective: Objective = family.make(name, **options)
            return objective
    near = difflib.get_close_matches(name, objective_names(), 1, 0)
    raise UserError(f"objective {name} is unknown: did you mean {near[0]}? (all: {', '.join(objective_names())})")
