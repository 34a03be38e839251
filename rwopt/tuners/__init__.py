"""Tuners: propose candidates, take their scores, keep their state on disk. Higher scores are better.

A tuner sees a box of named numbers (`Parameter`) and nothing else; `rwopt.search` says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rwopt.errors import UserError

TUNERS = ("auto", "gradient", "optuna", "spsa")
SAMPLERS = ("auto", "gp", "tpe", "cmaes", "nsga2", "nsga3", "random")


@dataclass(frozen=True)
class Parameter:
    """One number of the box: inclusive bounds, an optional grid `step`, optionally searched on a log axis."""

    name: str
    low: float
    high: float
    step: float | None = None
    log: bool = False

    def clip(self, value: float) -> float:
        """The nearest value inside the bounds and on the grid."""
        value = min(max(value, self.low), self.high)
        if self.step is not None:
            last = math.floor((self.high - self.low) / self.step + 1e-9)  # `high` itself need not be on the grid
            value = self.low + min(round((value - self.low) / self.step), last) * self.step
            value = round(value, 12)  # one number for one point of the grid, whatever it was computed from
        return value


@dataclass(frozen=True)
class Candidate:
    """A proposal: `values` by parameter name; `origin` says where it came from (a start's name, or the sampler)."""

    number: int
    values: Mapping[str, float]
    origin: str = "sampler"


@dataclass(frozen=True)
class Trial:
    """A scored candidate, and what the score cost in U-Net calls.

    scores: with several objectives all of them, `score` being the first. excess: by how much it breaks its limits.
    """

    candidate: Candidate
    score: float
    calls: int = 0
    scores: tuple[float, ...] = ()
    excess: float = 0.0


class Tuner(Protocol):
    """The contract that every tuner fulfils (`tests/tuners`): state is on disk after each call."""

    def propose(self) -> Candidate: ...

    def ready(self) -> bool:
        """Whether it can propose another candidate before those in hand are scored."""
        ...

    def observe(self, candidate: Candidate, score: float, calls: int = 0) -> None: ...

    def trials(self) -> list[Trial]: ...


def top(trials: Sequence[Trial], k: int) -> list[Trial]:
    """The k best trials with different values, best first; those that break a limit last, the least first."""
    out: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.excess, -t.score)):
        if all(dict(trial.candidate.values) != dict(o.candidate.values) for o in out):
            out.append(trial)
        if len(out) == k:
            break
    if not out:
        raise UserError("no trial has a score: every candidate failed (non-finite objective); check objective.terms")
    return out
