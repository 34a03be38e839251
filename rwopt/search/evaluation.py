"""Paired evaluation on common random numbers: scores a picture, means a case, intervals that resample cases.

Units matter: pictures of one case (draws, search seeds) are averaged inside the case before anything is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rwopt.objectives import Batch, Objectives
from rwopt.objectives.objective import settle
from rwopt.results import Paired
from rwopt.tasks import Task

OBJECTIVE = "objective"  # the name under which the optimised composite is reported
HELD_OUT = "judge.objective"  # the same composite, by the judge that no search sees
VALID = ".valid"  # behind a metric's name: the share of a case's pictures that have a score


@dataclass
class Scores:
    """{metric: one number a case [C]} of one arm; NaN where a metric is not defined for a case.

    A metric that not every picture has a score for has a second entry, `<name>.valid`, the share of those that have.
    """

    values: dict[str, np.ndarray]

    def mean(self, metric: str) -> float:
        """Over the cases that have a value; NaN if none has."""
        values = self.values[metric]
        return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else np.nan

    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self.values}

    def valid(self, metric: str) -> float:
        """Share of pictures that have a score; NaN if the metric was not measured."""
        if metric not in self.values:
            return np.nan
        return self.mean(metric + VALID) if metric + VALID in self.values else 1.0

    def to_json(self) -> dict[str, list[float | None]]:
        return {k: [None if np.isnan(x) else round(float(x), 6) for x in v] for k, v in self.values.items()}

    @classmethod
    def from_json(cls, data: dict[str, list[float | None]]) -> Scores:
        return cls({k: np.array([np.nan if x is None else x for x in v], dtype=float) for k, v in data.items()})


@torch.no_grad()
def score(
    task: Task, batch: Batch, composites: Mapping[str, Callable[[Batch], Tensor]], metrics: Sequence[str] = (),
    objectives: Objectives | None = None,
) -> Scores:  # fmt: skip
    """Scores of all pictures of a task, averaged inside each case: named composites, then single `objectives`.

    Pictures without a score leave the mean, or count as the worst, as `objectives` say. A picture that is not finite is
    no picture: its scores are infinitely bad, so that a candidate that makes one has no finite mean.
    """
    objectives = objectives or Objectives(model=task.model.name)
    broken = ~batch.images.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        batch = replace(batch, images=batch.images.nan_to_num(0.0, 1.0, 0.0))
    raw = {name: composite(batch) for name, composite in composites.items()}
    for name in metrics:
        single = objectives[name](batch)
        raw[name] = settle(single, objectives.spec(name), objectives.invalid)
        if bool(single.isnan().any()):
            raw[name + VALID] = (~single.isnan()).float()
    for name in (*composites, *metrics):
        up = name in composites or objectives.spec(name).higher_is_better
        raw[name] = raw[name].masked_fill(broken, -np.inf if up else np.inf)
    cases = int(task.owner.max()) + 1
    values = {}
    for name, tensor in raw.items():
        rows = tensor.double().cpu().numpy()
        seen = ~np.isnan(rows)
        total = np.bincount(task.owner[seen], rows[seen], minlength=cases)
        count = np.bincount(task.owner[seen], minlength=cases)
        values[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Scores(values)


def interval(
    differences: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `differences` [cases] or [cases, seeds].

    Cases are resampled, and seeds (search repeats) too where there are several: both are samples of what could have
    been. (nan, nan) without any case.
    """
    table = differences[:, None] if differences.ndim == 1 else differences
    if not table.size:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    cases, seeds = table.shape
    # counts, not indices: the mean of a resample is a bilinear form, so 10,000 of them are two matrix products
    by_case = rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples) / cases
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    means = ((by_case @ table) * by_seed).sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(
    a: Sequence[Scores],
    b: Sequence[Scores],
    metric: str,
    names: tuple[str, str],
    optimised: bool,
    split: str,
    higher_is_better: bool = True,
) -> Paired:
    """Arm a minus arm b on the same cases; several `Scores` are repeats (search seeds) of an arm.

    Win rate: share of cases in which a is better (ties count half); p: exact two-sided sign test without the ties.
    Cases that are NaN in any repeat of either arm are left out.
    """
    from scipy.stats import binomtest

    first = np.stack([s.values[metric] for s in a], 1)
    second = np.stack([s.values[metric] for s in b], 1)
    if second.shape[1] != first.shape[1]:
        second = np.repeat(second.mean(1, keepdims=True), first.shape[1], 1)
    table = first - second
    table = table[~np.isnan(table).any(1)]
    per_case = table.mean(1)
    signed = per_case if higher_is_better else -per_case
    wins, losses = int((signed > 1e-9).sum()), int((signed < -1e-9).sum())
    low, high = interval(table)
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    mean, rate = np.nan, 0.5
    if len(signed):
        mean, rate = per_case.mean(), (wins + 0.5 * (len(signed) - wins - losses)) / len(signed)
    return Paired(
        metric=metric, optimised=optimised, split=split, a=names[0], b=names[1], mean=float(mean),
        low=low, high=high, win_rate=float(rate), p=float(p), cases=len(signed), seeds=len(a),
    )  # fmt: skip
