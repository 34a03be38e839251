"""Several objectives: the Pareto front, its hypervolume, and the rule by which one point is chosen.

Points are rows, objectives columns, higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(points: np.ndarray) -> list[int]:
    """Rows of `points` [N, m] that no other row dominates (is nowhere worse and somewhere better); first of equals."""
    out = []
    for i, point in enumerate(points):
        worse = (points >= point).all(1) & (points > point).any(1)
        same = (points[:i] == point).all(1)
        if not worse.any() and not same.any():
            out.append(i)
    return out


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume between `reference` [m] and the front of `points` [N, m]; points that do not exceed it add nothing.

    Exact, by slices along the last objective (Zitzler's HSO): fast enough for the hundreds of points of a search.
    """
    above = points[(points > reference).all(1)]
    if not len(above):
        return 0.0
    above = above[front(above)]
    if above.shape[1] == 1:
        return float(above[:, 0].max() - reference[0])
    levels = np.unique(above[:, -1])[::-1]  # from the best downwards: all points that reach a level share its slice
    floors = np.append(levels[1:], reference[-1])
    return float(sum(
        (level - floor) * hypervolume(above[above[:, -1] >= level, :-1], reference[:-1])
        for level, floor in zip(levels, floors, strict=True)
    ))  # fmt: skip


def rule(names: Sequence[str], slack: float) -> str:
    """The rule of `ranked` in words, as it is kept with the result."""
    less = f" minus {slack:g}" if slack else ""
    others = ", ".join(names[1:])
    return f"highest {names[0]} among points whose {others} are no worse than the plain model's{less}; else the nearest"


def ranked(points: np.ndarray, plain: np.ndarray, slack: float = 0.0, excess: np.ndarray | None = None) -> list[int]:
    """Rows of `points` [N, m], best first: by the first objective, those last that break a limit or fall short.

    plain: what the others must reach [m]. excess [N]: by how much a point breaks its limits (0: it keeps them).
    Those that break or fall short are ordered by how much, so that there is always a first one.
    """
    short = np.maximum(plain[1:] - slack - points[:, 1:], 0).max(1, initial=0)
    over = np.zeros(len(points)) if excess is None else np.maximum(excess, 0)
    return [int(i) for i in np.lexsort((-points[:, 0], short, over))]
