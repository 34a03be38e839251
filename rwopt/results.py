"""Plain results of an evaluation: what was measured, the arms' means, and paired differences between arms."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ArmMeans", "Metric", "Paired"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity. `optimised` says that the search saw it; all others are held-out evidence."""

    name: str
    optimised: bool
    higher_is_better: bool = True
    format: str = ".3f"  # Python format specification of its values


@dataclass(frozen=True)
class Paired:
    """The difference of one metric between arms `a` and `b` (a minus b) on the same cases and seeds.

    `low` and `high` bound the mean difference at 95 %; `win_rate` in [0, 1] is the share of cases that `a` wins (with
    regard to the metric's direction); `p` in [0, 1] is that of a two-sided sign test; `cases` were resampled, each
    with `seeds` pictures.
    """

    metric: str
    optimised: bool
    split: str
    a: str
    b: str
    mean: float
    low: float
    high: float
    win_rate: float
    p: float
    cases: int
    seeds: int


@dataclass(frozen=True)
class ArmMeans:
    """What one way of making the pictures scored: plain, analytic, a control, or learned.

    `means` holds a value per metric name (a missing one is shown as a dash); `calls` counts the U-Net calls that it
    took to find this arm (0 for the plain model); `note` is one plain phrase.
    """

    name: str
    means: dict[str, float]
    calls: int
    note: str = ""
