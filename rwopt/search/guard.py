"""A guard: what may not get worse while something else is optimised, on validation cases (`tuner.guard`).

A search finds what its objective rewards, also where that is no longer what a person meant. A guarded metric is one
that the search does not raise: a candidate whose mean is worse than the plain model's by more than the slack breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.objectives import Objectives
from rwopt.schedule import Schedule
from rwopt.search.evaluation import score
from rwopt.search.splits import Splits
from rwopt.tasks import Dials
from rwopt.tuners import Trial

Means = Mapping[str, float]


class Broken(Exception):
    """Enough candidates in a row broke the guard: tuning has found a way to score without being good."""


class Guard:
    """slack: {metric: how much worse than the plain model's a mean on validation cases may be}; empty: no guard.

    base: the plain model's dials, the recipe's own.
    """

    def __init__(self, slack: Mapping[str, float], splits: Splits, objectives: Objectives, base: Dials) -> None:
        self.slack, self.splits, self.objectives, self.base = dict(slack), splits, objectives, base
        self._plain: Means | None = None

    def __bool__(self) -> bool:
        return bool(self.slack)

    @property
    def plain(self) -> Means:
        """The plain model's means. Raises `UserError` if it has none."""
        if self._plain is None:
            before = self.splits.model.calls
            self._plain = self.measure(self.base, None)
            self.splits.model.calls = before  # nobody's: it is what all are held against
            for name, mean in self._plain.items():
                if np.isnan(mean):
                    raise UserError(f"tuner.guard: {name} has no score for any validation picture of the plain model: "
                                    "leave it out")  # fmt: skip
        return self._plain

    def measure(self, dials: Dials, schedule: Schedule | None) -> Means:
        """The guarded metrics' means on validation cases."""
        if not self.slack:
            return {}
        task = self.splits.task("validation")
        return score(task, task.made(dials, schedule), {}, list(self.slack), self.objectives).means()

    def excess(self, means: Means) -> dict[str, float]:
        """For each metric by how much it is worse than the guard allows: 0 or less if kept, inf without a mean."""
        out = {}
        for name, slack in self.slack.items():
            fall = self.plain[name] - means[name]
            fall = fall if self.objectives.spec(name).higher_is_better else -fall
            out[name] = np.inf if np.isnan(fall) else fall - slack
        return out

    def over(self, means: Means) -> float:
        """By how much the guard is broken at worst; 0 if it is kept."""
        return max((0.0, *self.excess(means).values()))


@dataclass
class Watch:
    """Watches one study's trials in the order of their end.

    A trial is measured if it scores better than all before that kept the guard, as no other could be chosen in its
    place. Raises `Broken` at the `patience`-th in a row that breaks it.

    means: of the trials that were measured, by number; looked: how many trials were watched.
    """

    guard: Guard
    patience: int
    decode: Callable[[Mapping[str, float]], tuple[Dials, Schedule | None]]
    means: dict[int, Means] = field(default_factory=dict)
    best: float = -np.inf
    broken: list[int] = field(default_factory=list)
    looked: int = 0
    stopped: bool = False

    def see(self, trial: Trial) -> None:
        """Take one scored trial."""
        self.looked += 1
        if not self.guard or not trial.score > self.best or trial.excess > 0:
            return
        if self.over(trial) > 0:
            self.broken.append(trial.candidate.number)
            if len(self.broken) >= self.patience:
                self.stopped = True
                raise Broken
        else:
            self.best, self.broken = trial.score, []

    def over(self, trial: Trial) -> float:
        """`Guard.over` of a trial; its pictures are made once."""
        number = trial.candidate.number
        if number not in self.means:
            self.means[number] = self.guard.measure(*self.decode(trial.candidate.values))
        return self.guard.over(self.means[number])

    def first(self, trials: Sequence[Trial], k: int) -> list[Trial]:
        """The first k of trials, best first, that keep the guard; if none does, the k that break it least."""
        if not self.guard:
            return list(trials[:k])
        keeping: list[Trial] = []
        for trial in trials:
            if self.over(trial) <= 0:
                keeping.append(trial)
            if len(keeping) == k:
                break
        return keeping or sorted(trials, key=self.over)[:k]

    def about(self, chosen: Trial) -> dict[str, Any]:
        """What the arm keeps of it: the guard, means of the plain model and of the chosen, whether and why it stopped.

        worst: of the trials that stopped it {metric: by how much more than the slack, at most}.
        """
        self.over(chosen)  # measures it, if nobody did
        worst: dict[str, float] = {}
        for number in self.broken:
            for name, excess in self.guard.excess(self.means[number]).items():
                if excess > 0:
                    worst[name] = max(excess, worst.get(name, 0.0))
        number = chosen.candidate.number
        return {
            "slack": self.guard.slack, "plain": dict(self.guard.plain), "means": dict(self.means[number]),
            "kept": self.over(chosen) <= 0, "stopped": self.looked if self.stopped else None,
            "broken": len(self.broken) if self.stopped else 0, "worst": worst if self.stopped else {},
        }  # fmt: skip


def sentence(name: str, about: Mapping[str, Any]) -> str:
    """What the report says of a guarded arm."""
    parts = []
    for metric, slack in about["slack"].items():
        mean, plain = about["means"][metric], about["plain"][metric]
        parts.append(f"{metric} {mean:.4g}, plain {plain:.4g}, slack {slack:g}")
    line = f"Guard of {name}: {'kept' if about['kept'] else 'BROKEN, no candidate keeps it'} ({'; '.join(parts)})."
    if about["stopped"]:
        worst = ", ".join(f"{metric} by {excess:.3g} more than its slack" for metric, excess in about["worst"].items())
        line += (f" Tuning was stopped after {about['stopped']} trials: {about['broken']} in a row scored better and "
                 f"broke it, {worst}.")  # fmt: skip
    return line
