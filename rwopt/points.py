"""What a point of a tuner's box means: dials, and the weights of a function or of one schedule.

As text it goes with a shared study, so that a worker on another machine makes the same pictures of the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwopt.schedule import Schedule
from rwopt.tasks import Dials
from rwopt.weights import WeightFunction

Point = Mapping[str, float]


def to_dials(point: Point, base: Dials) -> Dials:
    """The point's dials; those that it does not name are `base`'s."""
    return Dials(point.get("guidance", base.guidance), point.get("strength", base.strength))


@dataclass(frozen=True)
class Meaning:
    """`base`: dials that a point leaves out. `function`: its theta is in the point; else `schedule` (None: plain)."""

    base: Dials
    function: WeightFunction | None = None
    schedule: Schedule | None = None

    def __call__(self, point: Point) -> tuple[Dials, Schedule | None]:
        dials = to_dials(point, self.base)
        if self.function is None:
            return dials, self.schedule
        return dials, self.function.schedule(np.array([point[n] for n in self.function.names]))

    def to_dict(self) -> dict[str, Any]:
        f, schedule = self.function, self.schedule
        return {
            "base": self.base.to_dict(),
            "function": None if f is None else {
                "sites": list(f.sites), "sigmas": f.sigmas.tolist(), "groups": f.groups, "mode": f.mode,
                "rank": f.rank,
            },
            # all digits of the weights: a schedule file has fewer
            "schedule": None if schedule is None else {**schedule.to_dict(), "weights": schedule.weights.tolist()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Meaning:
        function, schedule = data["function"], data["schedule"]
        if function is not None:
            function = WeightFunction(**{
                **function, "sites": tuple(function["sites"]), "sigmas": np.array(function["sigmas"], dtype=float)
            })  # fmt: skip
        return cls(Dials(**data["base"]), function, None if schedule is None else Schedule.from_dict(schedule))

