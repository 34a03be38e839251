"""The weight function: theta -> table of log-gains on a small basis.

`log w[k, s] = sum over groups g containing s of theta[k, g]`: K hat functions on ln sigma times G groups of sites.
`theta = 0` is the plain model. Few knots and groups give the 8 to 30 numbers that black-box search can handle; one
group a site and one knot a step is the full table. In between, of low rank R: `theta = (a, b)` and the log-gains of
groups are `(e + a) b`, a [K, R], b [R, G], where e [K, R] holds the first R cosines over knots (constant, slope, ...):
at theta = 0 the groups can move at once, each by a wave, which a product that starts from zeros could not.

Beside the weights theta may hold the sampler's dials (`rwopt.schedule.steps`). A knot keeps its place among the calls:
where the clock moves, knots move with it, so that a knot for each call stays a row of weights for each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule.actions import Actions
from rwopt.schedule.schedule import Schedule
from rwopt.schedule.steps import StepFunction


@dataclass(frozen=True)
class WeightFunction:
    """Log-gains on `knots` x `groups`.

    sites: ids in execution order, S of them; sigmas: the knots, [K], positive, descending; groups: {name: site
    indices} (`rwopt.unet.sites.group_sites` makes the usual ones). `theta` is a flat vector of K * G numbers, knot by
    knot from the noisiest, or with a rank R > 0 of R (K + G); its coefficient names are `names`. No groups: weights of
    one. steps: the sampler's dials, whose numbers follow those of the weights. actions: a plan with a level for each
    call, which goes with the calls where the clock moves; it is not learned. Raises `UserError` for knots that are no
    descending noise levels and for a rank above K or G.
    """

    sites: Sequence[str]
    sigmas: np.ndarray
    groups: Mapping[str, Sequence[int]]
    mode: str = "residual"
    rank: int = 0
    steps: StepFunction | None = None
    actions: Actions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        knots = np.asarray(self.sigmas, dtype=float)
        object.__setattr__(self, "sigmas", knots)
        sound = knots.ndim == 1 and len(knots) and np.isfinite(knots).all()  # NaN passes every comparison below
        if not sound or (knots <= 0).any() or (np.diff(knots) >= 0).any():
            raise UserError(f"knots={knots.tolist()} must be positive noise levels in descending order")
        most = min(len(self.sigmas), len(self.groups))
        if not 0 <= self.rank <= most:
            raise UserError(
                f"weights.rank={self.rank} is outside 0 (full) .. {most}: "
                f"{len(self.sigmas)} knots, {len(self.groups)} groups"
            )

    @property
    def weight_count(self) -> int:
        """How many numbers of theta, the first ones, make the weights."""
        knots, groups = len(self.sigmas), len(self.groups)
        return self.rank * (knots + groups) if self.rank else knots * groups

    @property
    def dimension(self) -> int:
        return self.weight_count + (0 if self.steps is None else len(self.steps.names))

    @property
    def names(self) -> list[str]:
        """Coefficient names, "k0/up.cross" and so on ("k0/wave0", "wave0/up.cross"), "clock0" and so on."""
        return self._weight_names + ([] if self.steps is None else self.steps.names)

    def reach(self, radius: float) -> np.ndarray:
        """How far each number may go from its start [d]: `radius` for log-gains."""
        dials = np.zeros(0) if self.steps is None else self.steps.reach
        return np.concatenate([np.full(self.weight_count, radius), dials])

    def actions_at(self, levels: Any) -> Actions | None:
        """The plan when the calls are made at `levels` [N] (VE sigmas)."""
        if self.actions is None or self.steps is None:
            return self.actions
        return Actions.along(list(levels), [level.action for level in self.actions.levels], self.actions.max_gap)

    def knots(self, levels: Any) -> np.ndarray:
        """The knots [K] as VE sigmas when the calls are made at `levels` [N]: each keeps its place among the calls,
        those outside keep their distance in ln sigma."""
        if self.steps is None:
            return self.sigmas
        places, logs, base = np.arange(len(levels)), np.log(self.sigmas), np.log(self.steps.sigmas)
        moved = np.interp(np.interp(-logs, -base, places), places, np.log(np.asarray(levels, dtype=float)))
        return np.asarray(np.exp(moved + logs - np.clip(logs, base[-1], base[0])))

    @property
    def _weight_names(self) -> list[str]:
        if self.rank:
            waves = [f"wave{r}" for r in range(self.rank)]
            knots = [f"k{k}/{wave}" for k in range(len(self.sigmas)) for wave in waves]
            return knots + [f"{wave}/{g}" for wave in waves for g in self.groups]
        return [f"k{k}/{g}" for k in range(len(self.sigmas)) for g in self.groups]

    @property
    def membership(self) -> np.ndarray:
        """0/1 matrix [G, S]: which sites a group moves."""
        out = np.zeros((len(self.groups), len(self.sites)))
        for g, members in enumerate(self.groups.values()):
            out[g, list(members)] = 1
        return out

    @property
    def waves(self) -> np.ndarray:
        """e [K, R]: cosines over knots."""
        k, r = np.arange(len(self.sigmas))[:, None] + 0.5, np.arange(self.rank)
        return np.asarray(np.cos(np.pi * k * r / len(self.sigmas)))

    def table(self, theta: Any) -> Any:
        """Weights [..., K, S] of theta [..., d]; NumPy in, NumPy out; torch in, torch out (differentiable)."""
        if theta.shape[-1] != self.dimension:
            raise UserError(f"theta has {theta.shape[-1]} numbers, this weight function takes {self.dimension}")
        numpy = isinstance(theta, np.ndarray)
        theta = theta[..., : self.weight_count]
        like = np.asarray if numpy else theta.new_tensor
        lead, knots, cut = theta.shape[:-1], len(self.sigmas), len(self.sigmas) * self.rank
        if self.rank:
            knot = like(self.waves) + theta[..., :cut].reshape((*lead, knots, self.rank))
            gains = knot @ theta[..., cut:].reshape((*lead, self.rank, len(self.groups)))
        else:
            gains = theta.reshape((*lead, knots, len(self.groups)))
        gains = gains @ like(self.membership)
        return np.exp(gains) if numpy else gains.exp()

    def fit(self, schedule: Schedule, floor: float = 0.05) -> np.ndarray:
        """Theta [d] whose table is nearest to `schedule` in mean squared log-gain (weights are cut at `floor`).

        Sites that the schedule does not name count as 1. Groups must not overlap for this to be the mean over members.
        Of low rank: nearest among the log-gains of groups.
        """
        column = {s: i for i, s in enumerate(schedule.sites)}
        values = schedule.at(self.sigmas)
        logs = np.zeros((len(self.sigmas), len(self.sites)))
        for j, site in enumerate(self.sites):
            if site in column:
                logs[:, j] = np.log(np.maximum(values[:, column[site]], floor))
        solution, *_ = np.linalg.lstsq(self.membership.T, logs.T, rcond=None)
        numbers = self._factors(solution.T) if self.rank else np.asarray(solution.T.reshape(-1))
        return np.concatenate([numbers, np.zeros(self.dimension - self.weight_count)])

    def _factors(self, gains: np.ndarray) -> np.ndarray:
        """(a, b) of the nearest log-gains of this rank; of the ways to write them one with small a."""
        left, sizes, right = np.linalg.svd(gains, full_matrices=False)
        if sizes[0] < 1e-12:
            return np.zeros(self.weight_count)
        turn = left[:, : self.rank].T @ self.waves
        if np.linalg.cond(turn) > 1e3:
            turn = np.eye(self.rank)
        b = np.linalg.solve(turn, sizes[: self.rank, None] * right[: self.rank])
        return np.concatenate([(left[:, : self.rank] @ turn - self.waves).ravel(), b.ravel()])

    def schedule(self, theta: np.ndarray, **about: Any) -> Schedule:
        """The table of `theta` as a `Schedule`; `about` is its model, noise, calibrated, provenance."""
        theta = np.asarray(theta, dtype=float)
        knots = self.sigmas
        if self.steps is not None:
            about["steps"] = self.steps.steps(theta[self.weight_count :])
            knots = self.knots(about["steps"].sigmas)
        if self.actions is not None:
            about["actions"] = self.actions_at(about["steps"].sigmas if self.steps is not None else ())
        return Schedule(tuple(self.sites), knots, self.table(theta), self.mode, **about)


def hat(sigmas: np.ndarray, sigma: float) -> np.ndarray:
    """Values [K] at `sigma` of the hat functions on ln sigma with knots `sigmas` [K] (descending), constant outside."""
    x, knots = np.log(sigma), np.log(sigmas)[::-1]
    unit = np.eye(len(sigmas))
    return np.array([np.interp(x, knots, row[::-1]) for row in unit])
