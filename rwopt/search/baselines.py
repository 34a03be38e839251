"""Closed-form schedules from probe scores, and the controls without which no gain means anything.

The first three read an `Importance`; the others rework a schedule. All are pure and say in `provenance` what
they are. Formulas: UNetReweighting (arXiv 2504.03471), restated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.probes import Importance
from rwopt.schedule import Schedule
from rwopt.unet.sites import Site, group_sites


def voted_schedule(
    importance: Importance, low: float = 0.95, high: float = 1.1, reverse: bool = False, mode: str = "output"
) -> Schedule:
    """The published schedule `w = low + (high - low) S / (R B)` of voting scores S in [R, R B].

    It therefore reaches `low + (high - low) / B` .. `high` only: with B = 7 and the defaults .9714 .. 1.1,
    mean 1.0357 over blocks, a net amplification whose control is `uniform_mean`.
    reverse: `low + (high - low) (R B - S) / (R B)`, as published.
    Raises `UserError` if the scores are not votes.
    """
    details = importance.details
    if importance.method != "voting" or not {"rounds", "blocks"} <= details.keys():
        raise UserError(
            f"baseline voted needs votes, not {importance.method or 'unnamed'} scores: use probe voting"
        )
    share = importance.scores / (details["rounds"] * len(details["blocks"]))
    weights = low + (high - low) * (1 - share if reverse else share)
    return _schedule(importance, weights, mode, "voted", low=low, high=high, reverse=reverse)


def gradient_norm_schedule(
    importance: Importance, low: float = 0.0, high: float = 0.1, decay: str = "linear", mode: str = "output"
) -> Schedule:
    """The published form `w = 1 + d(i) (low + (high - low) g / max_b g)` of gradient norms g.

    decay over steps i: "linear" `d(i) = (N - i) / N` or "exponential" `exp(-i / 10)`.
    A step whose norms are all zero says nothing of the sites' order: they all get the `low` end.
    """
    steps = np.arange(len(importance.sigmas))
    if decay == "linear":
        d = (len(steps) - steps) / len(steps)
    elif decay == "exponential":
        d = np.exp(-0.1 * steps)
    else:
        raise UserError(f"baseline.decay={decay} is unknown: use linear or exponential")
    top = importance.scores.max(1, keepdims=True)
    share = np.divide(importance.scores, top, out=np.zeros_like(importance.scores), where=top > 0)
    weights = 1 + d[:, None] * (low + (high - low) * share)
    return _schedule(importance, weights, mode, "gradient_norm", low=low, high=high, decay=decay)


def ranked_schedule(
    importance: Importance,
    low: float = 0.95,
    high: float = 1.1,
    reverse: bool = False,
    mode: str = "residual",
) -> Schedule:
    """Weights by rank of any probe's scores at each step, evenly spaced: `high` for the most important site.

    Equal scores get equal weights; a step at which all are equal gets the middle. reverse: the most important
    gets `low`.
    """
    share = np.full(importance.scores.shape, 0.5)
    for row, scores in zip(share, importance.scores, strict=True):
        levels, rank = np.unique(scores, return_inverse=True)
        if len(levels) > 1:
            row[:] = rank / (len(levels) - 1)
    weights = low + (high - low) * (1 - share if reverse else share)
    return _schedule(importance, weights, mode, "ranked", low=low, high=high, reverse=reverse)


def constant(
    sites: Sequence[str],
    sigmas: Sequence[float] | np.ndarray,
    values: float | Sequence[float],
    mode: str = "residual",
) -> Schedule:
    """Weights that do not change with noise: one value, or one a site [S]; a control of time dependence."""
    row = np.asarray(values, dtype=float)
    if row.ndim and row.shape != (len(sites),):
        raise UserError(
            f"{row.size} constant weights do not fit {len(sites)} sites: give one number, or one a site"
        )
    weights = np.broadcast_to(row, (len(sigmas), len(sites)))
    return Schedule(
        tuple(sites), np.asarray(sigmas, dtype=float), weights, mode, provenance={"baseline": "constant"}
    )


def plain(like: Schedule) -> Schedule:
    """All ones on the same sites and knots."""
    return _control(like, np.ones_like(like.weights), "plain")


def uniform_mean(schedule: Schedule) -> Schedule:
    """One weight everywhere, the mean of all of `schedule`'s: is it the pattern, or only more gain?"""
    return _control(schedule, np.full_like(schedule.weights, schedule.weights.mean()), "uniform_mean")


def reversed_schedule(schedule: Schedule) -> Schedule:
    """Every step mirrored within its own range, `min + max - w`: the strongest site becomes the weakest."""
    w = schedule.weights
    return _control(schedule, w.min(1, keepdims=True) + w.max(1, keepdims=True) - w, "reversed")


def permuted_sites(
    schedule: Schedule, seed: int, groups: Mapping[str, Sequence[int]] | None = None
) -> Schedule:
    """Weights dealt to other sites, the same way at every step; nobody keeps its own (unless it is alone).

    groups: site indices by name (`rwopt.unet.sites.group_sites`) whose members share a weight, such as the blocks
    of a voted schedule: then whole groups trade weights, and the mean over sites may move where their sizes
    differ. Raises `UserError` if groups do not cover the sites once each or members' weights differ.
    """
    w = schedule.weights
    members = [list(m) for m in groups.values()] if groups is not None else [[s] for s in range(w.shape[1])]
    if sorted(s for m in members for s in m) != list(range(w.shape[1])):
        raise UserError(
            f"the {len(members)} groups do not cover the {w.shape[1]} sites once each: group all the sites"
        )
    if any(np.ptp(w[:, m], axis=1).any() for m in members):
        raise UserError("a group's sites have different weights: permute single sites instead (no groups)")
    out = np.empty_like(w)
    for to, source in zip(members, _cycle(len(members), seed), strict=True):
        out[:, to] = w[:, [members[source][0]]]
    return _control(schedule, out, "permuted_sites", seed=seed)


def permuted_steps(schedule: Schedule, seed: int) -> Schedule:
    """Whole rows dealt to other knots, none to its own (unless it is alone): does it matter *when*?"""
    return _control(
        schedule, schedule.weights[_cycle(len(schedule.sigmas), seed)], "permuted_steps", seed=seed
    )


Form = Callable[[Importance, Sequence[Site], float, float], Schedule]  # (scores, their sites, low, high)


def _of_votes(rework: Callable[[Schedule, Sequence[Site]], Schedule]) -> tuple[str, Form]:
    return "voting", lambda votes, sites, low, high: rework(voted_schedule(votes, low, high), sites)


PUBLISHED: dict[str, tuple[str, Form]] = {
    "voted": _of_votes(lambda voted, sites: voted),
    "gradient norm": ("gradient_norm", lambda norms, sites, low, high: gradient_norm_schedule(norms)),
    "uniform mean": _of_votes(lambda voted, sites: uniform_mean(voted)),
    "reversed": _of_votes(lambda voted, sites: reversed_schedule(voted)),
    "permuted sites": _of_votes(lambda voted, sites: permuted_sites(voted, 0, group_sites(sites, "block"))),
    "permuted steps": _of_votes(lambda voted, sites: permuted_steps(voted, 0)),
}
"""The paper's closed forms and their controls: name -> (probe, what makes the schedule of its scores)."""


def _cycle(n: int, seed: int) -> np.ndarray:
    """A random cyclic permutation of n (Sattolo's algorithm): no fixed point for n >= 2."""
    rng = np.random.default_rng(seed)
    order = np.arange(n)
    for i in range(n - 1, 0, -1):
        j = int(rng.integers(i))
        order[[i, j]] = order[[j, i]]
    return order


def _schedule(importance: Importance, weights: np.ndarray, mode: str, name: str, **options: Any) -> Schedule:
    """A schedule on the probe's own sites and noise levels."""
    about = {"baseline": name, "probe": importance.method, "probe_calls": importance.calls, **options}
    about["probe_details"] = dict(importance.details)
    return Schedule(importance.sites, importance.sigmas, weights, mode, provenance=about)


def _control(schedule: Schedule, weights: np.ndarray, name: str, **options: Any) -> Schedule:
    """`schedule` with other weights, told apart by its provenance."""
    return replace(
        schedule, weights=weights, provenance={"baseline": name, "of": schedule.digest(), **options}
    )
