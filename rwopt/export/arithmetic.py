"""Operations on schedules. Each gives a new one, exact at identity, with a line in `provenance["edits"]`.

Weights are gains, so 1 is "nothing changes": strength scales towards it, windows hold it outside, and means are taken
of log-gains. The sampler's steps stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import Array

_EDGE = 1e-6  # in ln sigma: over which a window's edge goes from one weight to another


def scale(schedule: Schedule, strength: float) -> Schedule:
    """`1 + strength (w - 1)`: 0 is the plain model, 1 the same schedule, 2 twice as far."""
    if not math.isfinite(strength):
        raise UserError(f"scale={strength}: give a finite number (1 changes nothing)")
    weights = schedule.weights if strength == 1 else 1 + strength * (schedule.weights - 1)
    return _edited(schedule, f"scale {strength:g}", weights=weights)


def clamp(schedule: Schedule, low: float = -math.inf, high: float = math.inf) -> Schedule:
    """Weights between `low` and `high`."""
    if not low <= high:
        raise UserError(f"clamp={low:g},{high:g}: give the lower bound first")
    return _edited(schedule, f"clamp {low:g} {high:g}", weights=np.clip(schedule.weights, low, high))


def resample(schedule: Schedule, sigmas: Sequence[float]) -> Schedule:
    """The weights found at other VE levels, strictly descending; between them the schedule's own rule counts."""
    grid = np.asarray(sigmas, dtype=np.float64)
    sound = grid.ndim == 1 and grid.size and np.isfinite(grid).all() and (grid > 0).all() and (np.diff(grid) < 0).all()
    if not sound:
        raise UserError("resample: give strictly descending noise levels above 0")
    return _edited(schedule, f"resample {grid.size} levels", sigmas=grid, weights=schedule.at(grid))


def window(schedule: Schedule, start: float = math.inf, end: float = 0.0) -> Schedule:
    """Weights of 1 outside of `end < sigma <= start`; unchanged inside, exactly.

    An edge is a pair of knots 1e-6 apart in ln sigma; interp nearest becomes the same in the form of previous.
    """
    if not start > end * math.exp(2 * _EDGE) or end < 0:
        raise UserError(f"window={start:g},{end:g}: give VE sigmas, the higher one first")
    made = _held(schedule) if math.isfinite(start) or end > 0 else schedule
    ones = np.ones(len(schedule.sites))
    linear = made.interp == "linear"
    rows = [(s, row) for s, row in zip(made.sigmas.tolist(), made.weights, strict=True) if end < s <= start]
    if math.isfinite(start):
        rows = [(s, row) for s, row in rows if s < start]
        rows = [(start * math.exp(_EDGE) if linear else 2 * start, ones), (start, made.at(start)), *rows]
    if end > 0:
        above = end * math.exp(_EDGE)
        rows = [(s, row) for s, row in rows if s > above]
        if linear or not rows:
            rows.append((above, made.at(above)))
        rows.append((end, ones))
    sigmas, weights = np.array([s for s, _ in rows]), np.array([row for _, row in rows])
    return _edited(made, f"window {start:g} {end:g}", sigmas=sigmas, weights=weights)


def merge(a: Schedule, b: Schedule, share: float = 0.5) -> Schedule:
    """Mean of log-gains, `a^(1 - share) b^share`, at the knots of both; a site that one lacks counts as 1 there.

    share: 0 is `a`, 1 has the weights of `b`. Weights must be above 0 (or 0 in both). Notes are those of `a`. Raises
    UserError if mode, guidance side, noise or steps differ.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share={share:g}: give a number from 0 (the first) to 1 (the second)")
    for name, one, other in (
        ("op.mode", a.mode, b.mode),
        ("op.cfg_branch", a.cfg_branch, b.cfg_branch),
        ("grid.interp", a.interp, b.interp),
        ("steps", a.steps, b.steps),
        ("actions", a.actions, b.actions),
        ("noise.timestep", a.noise.get("timestep", "index"), b.noise.get("timestep", "index")),
    ):
        if one != other:
            raise UserError(f"merge: {name} differs between the two ({str(one)[:60]} and {str(other)[:60]})")
    line = f"merge {share:g} of {b.digest()[:12]}"
    if share == 0:
        return _edited(a, line)
    sites = tuple(dict.fromkeys((*a.sites, *b.sites)))
    same = np.array_equal(a.sigmas, b.sigmas)
    first, second = (a, b) if same else (_held(a), _held(b))
    sigmas = a.sigmas if same else np.unique(np.concatenate([first.sigmas, second.sigmas]))[::-1]
    x, y = _table(first, sites, sigmas), _table(second, sites, sigmas)
    for k, s in np.argwhere((x != y) & (np.minimum(x, y) <= 0))[:1]:
        raise UserError(f"merge: site {sites[s]} has weights {x[k, s]:g} and {y[k, s]:g}: log-gains need them above 0")
    safe_x, safe_y = (np.where(table > 0, table, 1.0) for table in (x, y))
    mean = np.exp((1 - share) * np.log(safe_x) + share * np.log(safe_y))
    weights = np.where(x == y, x, y if share == 1 else mean)
    return _edited(first, line, sites=sites, sigmas=sigmas, weights=weights)


def without_steps(schedule: Schedule) -> Schedule:
    """The weights without the sampler's dials."""
    return _edited(schedule, "steps removed", steps=None)


def _held(schedule: Schedule) -> Schedule:
    """interp nearest in the form of previous, whose knots are where nearest changes: the middles in ln sigma."""
    if schedule.interp != "nearest":
        return schedule
    sigmas = np.append(schedule.sigmas[0], np.sqrt(schedule.sigmas[:-1] * schedule.sigmas[1:]))
    return replace(schedule, sigmas=sigmas, interp="previous")


def _table(schedule: Schedule, sites: Sequence[str], sigmas: Array) -> Array:
    """Weights [K, S] at `sigmas` for `sites`; 1 where the schedule has none."""
    table = np.ones((len(sigmas), len(sites)))
    values = schedule.at(sigmas)
    for j, site in enumerate(schedule.sites):
        table[:, sites.index(site)] = values[:, j]
    return table


def _edited(schedule: Schedule, line: str, **changes: Any) -> Schedule:
    edits = schedule.provenance.get("edits", [])
    edits = [*edits, line] if isinstance(edits, list) else [line]
    return replace(schedule, **changes, provenance={**schedule.provenance, "edits": edits})
