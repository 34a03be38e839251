"""The search space: the box of numbers that a tuner sees, and how a point of it is decoded to dials and a schedule.

A decoder goes as plain JSON with a shared study, so that a worker on another machine makes the same pictures of the
same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rwopt.config import DialSettings, TaskSettings
from rwopt.schedule import Schedule
from rwopt.schedule.actions import actions_of
from rwopt.schedule.steps import StepFunction
from rwopt.schedule.weights import WeightFunction
from rwopt.tasks import Dials
from rwopt.tuners import Parameter

Point = Mapping[str, float]


def dial_box(task: TaskSettings, dials: DialSettings) -> list[Parameter]:
    """The box of guidance scale, of strength where the task has it (on a grid of 0.05, so that inversions are shared),
    and for instructions of the scale of guidance towards the source."""
    low, high = dials.guidance_bounds
    box = [Parameter("guidance", low, high, step=0.25)]
    if task.has_strength:
        low, high = dials.strength_bounds
        box.append(Parameter("strength", low, high, step=0.05))
    if task.kind == "instruct":
        low, high = dials.image_guidance_bounds
        box.append(Parameter("image_guidance", low, high, step=0.05))
    return box


def near(parameter: Parameter, centre: float, share: float = 0.25) -> Parameter:
    """The part of a dial's range within `share` of its width around `centre`.

    Over the whole range, most candidates lose by their dials alone.
    """
    reach = share * (parameter.high - parameter.low)
    return replace(parameter, low=parameter.clip(centre - reach), high=parameter.clip(centre + reach))


def theta_box(names: Sequence[str], starts: Sequence[np.ndarray], reach: np.ndarray) -> list[Parameter]:
    """The box of a weight function's numbers: each from the lowest start - its `reach` to the highest + it."""
    span = np.array(starts)
    lows, highs = (span.min(0) - reach).tolist(), (span.max(0) + reach).tolist()
    return [Parameter(n, low, high) for n, low, high in zip(names, lows, highs, strict=True)]


def dials_of(point: Point, base: Dials) -> Dials:
    """The point's dials; those that it does not name are `base`'s."""
    return Dials(**{name: point.get(name, value) for name, value in base.to_dict().items()})


@dataclass(frozen=True)
class Decoder:
    """`base`: dials that a point leaves out. `function`: its theta is in the point; else `schedule` (None: plain)."""

    base: Dials
    function: WeightFunction | None = None
    schedule: Schedule | None = None

    def __call__(self, point: Point) -> tuple[Dials, Schedule | None]:
        dials = dials_of(point, self.base)
        if self.function is None:
            return dials, self.schedule
        return dials, self.function.schedule(np.array([point[n] for n in self.function.names]))

    def to_dict(self) -> dict[str, Any]:
        f, schedule = self.function, self.schedule
        return {
            "base": self.base.to_dict(),
            "function": None if f is None else {
                "sites": list(f.sites), "sigmas": f.sigmas.tolist(), "groups": f.groups, "mode": f.mode,
                "rank": f.rank, "steps": None if f.steps is None else f.steps.to_dict(),
                "actions": None if f.actions is None else f.actions.to_dict(),
            },
            "schedule": None if schedule is None else schedule.exact(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decoder:
        function, schedule = data["function"], data["schedule"]
        if function is not None and function.get("steps") is not None:
            function = {**function, "steps": StepFunction(**function["steps"])}
        if function is not None:
            function = {**function, "actions": actions_of(function.get("actions"))}
        return cls(
            Dials(**data["base"]),
            None if function is None else WeightFunction(**function),
            None if schedule is None else Schedule.from_dict(schedule),
        )
