"""Arms: what a comparison compares, each a way of making pictures.

`ARMS` says as data how each is made and what finding it may cost; a recipe chooses among them (`arms: [...]`). All
arms of budget `full` get the same number of evaluations, so that only their boxes differ. `Arm` is one that was
found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwopt.config import TunerSettings
from rwopt.errors import UserError, one_of
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.schedule.steps import DIALS
from rwopt.tasks import Dials

BUDGETS = ("none", "control", "full")
LEARNED = "learned"


@dataclass(frozen=True)
class ArmSpec:
    """One way of making pictures.

    published: its schedule is the closed form of that name in `rwopt.search.baselines.PUBLISHED`; learned: it is
    learned, with a knot for each noise level or, if `constant`, one for all; neither: there is none. weights, steps:
    what is learned, weights or none, and which of the sampler's dials (None: those of the recipe's `steps.learn`).
    solver: the best of the recipe's samplers and grids. planned: the plan of actions of a budget of compute, nothing
    learned. budget: what tuning may spend beyond the dials that all start
    from (`evaluations`).
    """

    name: str
    note: str
    budget: str = "full"
    published: str = ""
    learned: bool = False
    constant: bool = False
    weights: bool = True
    steps: tuple[str, ...] | None = None
    solver: bool = False
    planned: bool = False

    def evaluations(self, tuner: TunerSettings) -> int:
        """Candidates that may be scored on train cases: none, a control's, or those of weights and their dials.

        Where dials are not tuned (`tuner.dial_trials` 0), an arm of dials alone is a control.
        """
        control = not (tuner.dial_trials or self.learned or self.published) and self.budget != "none"
        full = tuner.trials + 2 * tuner.dial_trials
        return {"none": 0, "control": tuner.control_trials, "full": full}["control" if control else self.budget]


ARMS = {
    spec.name: spec
    for spec in (
        ArmSpec("plain", "no schedule, the recipe's own dials", "none"),
        ArmSpec("best solver", "no schedule, the best plain sampler and grid", "none", solver=True),
        ArmSpec("plan", "a plan of actions for the budget, no weights", "none", planned=True),
        ArmSpec("best guidance", "no schedule, tuned dials"),
        ArmSpec("analytic", "published voted schedule, tuned dials", published="voted"),
        ArmSpec("gradient norm", "published closed form from gradient norms, tuned dials", "control", "gradient norm"),
        ArmSpec("uniform mean", "one weight: the analytic schedule's mean", "control", "uniform mean"),
        ArmSpec("reversed", "the analytic schedule mirrored at each step", "control", "reversed"),
        ArmSpec("permuted sites", "the analytic schedule, blocks exchanged", "control", "permuted sites"),
        ArmSpec("permuted steps", "the analytic schedule, steps exchanged", "control", "permuted steps"),
        ArmSpec("constant", "learned weights that do not change with noise", learned=True, constant=True),
        ArmSpec("clock", "learned noise levels, no weights", learned=True, weights=False, steps=("clock",)),
        ArmSpec("clock and told", "learned noise levels, and what the U-Net is told", learned=True, weights=False,
                steps=("clock", "told")),
        ArmSpec("sampler dials", "all of the sampler's dials learned, no weights", learned=True, weights=False,
                steps=DIALS),
        ArmSpec("weights", "learned weights, the sampler's own steps", learned=True, steps=()),
        ArmSpec("weights and clock", "learned weights and noise levels", learned=True, steps=("clock",)),
        ArmSpec(LEARNED, "learned weights over noise and sites", learned=True),
    )
}
USUAL = ("plain", "best guidance", "analytic", "gradient norm", "uniform mean", "reversed", "permuted sites",
         "permuted steps", "constant", LEARNED)  # fmt: skip


def chosen(names: Sequence[str]) -> list[ArmSpec]:
    """The arms that a recipe names, the usual ones for none.

    Raises `UserError` for an unknown one, for a repeat, and where `learned` is left out.
    """
    for i, name in enumerate(names):
        one_of(tuple(ARMS), "arms", name)
        if name in names[:i]:
            raise UserError(f"arms={list(names)}: names {name} twice: give each once")
    if names and LEARNED not in names:
        raise UserError(f"arms={list(names)}: lacks {LEARNED}, which the schedule file is made of: add it")
    return [ARMS[name] for name in names or USUAL]


def dials_alone(spec: ArmSpec, arms: Sequence[ArmSpec], learn: Sequence[str]) -> ArmSpec | None:
    """Of `arms` the one that learns the same of the sampler's dials as `spec` without its weights, if there is one.

    learn: the recipe's `steps.learn`.
    """
    if not (spec.learned and spec.weights):
        return None
    wanted = set(learn if spec.steps is None else spec.steps)
    return next((arm for arm in arms if arm.learned and not arm.weights and set(arm.steps or ()) == wanted), None)


@dataclass
class Arm:
    """An arm that was found, and how. Scores are means of the objective over the split's cases."""

    name: str
    dials: Dials
    schedule: Schedule | None = None
    train: float | None = None
    validation: float | None = None
    evaluations: int = 0  # candidates scored on train cases to find it, with those of the arms it started from
    calls: int = 0  # U-Net calls (batches of pictures) spent likewise
    values: dict[str, float] = field(default_factory=dict)  # the chosen point of the box
    history: list[tuple[str, float]] = field(default_factory=list)  # (origin, score) of each trial
    note: str = ""
    choice: dict[str, Any] = field(default_factory=dict)  # rule, front, limits: see `rwopt.search.evaluator`

    def save(self, path: Path) -> None:
        data = {**asdict(self), "dials": self.dials.to_dict(), "schedule": None}
        if self.schedule is not None:
            data["schedule"] = self.schedule.exact()
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Arm:
        data = json.loads(path.read_text())
        data["dials"] = Dials(**data["dials"])
        data["schedule"] = None if data["schedule"] is None else Schedule.from_dict(data["schedule"])
        data["history"] = [(origin, value) for origin, value in data["history"]]
        return cls(**data)
