"""What a gain is worth: the plain calls that would reach the same score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Worth:
    """Plain calls with a 95 % interval. capped: more than the most that were run, which stands in the place."""

    calls: float
    low: float
    high: float
    capped: bool = False

    def __str__(self) -> str:
        more = "more than " if self.capped else ""
        return f"{more}{self.calls:.1f} plain calls [{self.low:.1f}, {self.high:.1f}]"


def worth(reached: np.ndarray, plain: Mapping[int, np.ndarray], resamples: int = 2000, seed: int = 0) -> Worth:
    """At how many calls the plain model has the mean score `reached`, higher is better, by linear interpolation.

    reached: [cases] or [cases, seeds]; plain: {calls: [cases]} on the same cases. The interval resamples cases, the
    same for both sides, and seeds. Below the least count of calls it is that count.
    """
    table = reached[:, None] if reached.ndim == 1 else reached
    counts = np.array(sorted(plain), dtype=float)
    steps = np.stack([plain[int(count)] for count in counts], 1)  # [cases, counts]
    rng = np.random.default_rng(seed)
    cases, seeds = table.shape
    by_case = rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples) / cases
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    goals, levels = ((by_case @ table) * by_seed).sum(1), by_case @ steps
    found = np.array([_calls(goal, level, counts) for goal, level in zip(goals, levels, strict=True)])
    low, high = np.quantile(found, [0.025, 0.975])
    goal, level = float(table.mean()), steps.mean(0)
    return Worth(_calls(goal, level, counts), float(low), float(high), bool(goal > np.maximum.accumulate(level)[-1]))


def _calls(goal: float, level: np.ndarray, counts: np.ndarray) -> float:
    best = np.maximum.accumulate(level)  # more calls may be worse; nobody is made to use them
    at = int(np.searchsorted(best, goal))
    if at == 0:
        return float(counts[0])
    if at == len(counts):
        return float(counts[-1])
    share = (goal - best[at - 1]) / max(best[at] - best[at - 1], 1e-12)
    return float(counts[at - 1] + share * (counts[at] - counts[at - 1]))
