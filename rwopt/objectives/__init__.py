"""Objectives: per-image scores with a declared direction, range, differentiability, inputs and licence.

`make_objective("judge.kept")` gives one; `objective_names()` lists them; `composite.py` makes one of several. One
contract suite (`tests/objectives`) runs them all.
"""

from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, SetObjective, SetScore
from rwopt.objectives.registry import Objectives, make_objective, make_set, objective_names, objective_spec

__all__ = ["Batch", "Objective", "ObjectiveSpec", "Objectives", "SetObjective", "SetScore", "make_objective",
           "make_set", "objective_names", "objective_spec"]  # fmt: skip
