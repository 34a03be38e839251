"""The weight function: theta -> table of log-gains on a small basis.

`log w[k, s] = sum over groups g containing s of theta[k, g]`: K hat functions on ln sigma times G groups of sites.
`theta = 0` is the plain model. Few knots and groups give the 8 to 30 numbers that black-box search can handle; one
group a site and one knot a step is the full table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.sites import Site, group_sites


@dataclass(frozen=True)
class WeightFunction:
    """Log-gains on `knots` x `groups`.

    sites: ids in execution order, S of them; sigmas: the knots, [K], descending; groups: {name: site indices}.
    `theta` is a flat vector of K * G numbers, knot by knot from the noisiest; its coefficient names are `names`.
    """

    sites: tuple[str, ...]
    sigmas: np.ndarray
    groups: dict[str, list[int]]
    mode: str = "residual"

    @classmethod
    def build(
        cls, sites: Sequence[Site], sigmas: Sequence[float], group_by: str = "stage_kind", mode: str = "residual"
    ) -> WeightFunction:
        knots = np.asarray(sigmas, dtype=float)
        sound = knots.ndim == 1 and len(knots) and np.isfinite(knots).all()  # NaN passes every comparison below
        if not sound or (knots <= 0).any() or (np.diff(knots) >= 0).any():
            raise UserError(f"knots={list(sigmas)} must be positive noise levels in descending order")
        return cls(tuple(s.id for s in sites), knots, group_sites(sites, group_by), mode)

    @property
    def dimension(self) -> int:
        return len(self.sigmas) * len(self.groups)

    @property
    def names(self) -> list[str]:
        """Coefficient names, "k0/up.cross" and so on, in the order of theta."""
        return [f"k{k}/{g}" for k in range(len(self.sigmas)) for g in self.groups]

    @property
    def membership(self) -> np.ndarray:
        """0/1 matrix [G, S]: which sites a group moves."""
        out = np.zeros((len(self.groups), len(self.sites)))
        for g, members in enumerate(self.groups.values()):
            out[g, members] = 1
        return out

    def table(self, theta: Any) -> Any:
        """Weights [..., K, S] of theta [..., K * G]; NumPy in, NumPy out; torch in, torch out (differentiable)."""
        shape = (*theta.shape[:-1], len(self.sigmas), len(self.groups))
        if theta.shape[-1] != self.dimension:
            raise UserError(f"theta has {theta.shape[-1]} numbers, this weight function takes {self.dimension}")
        if isinstance(theta, np.ndarray):
            return np.exp(theta.reshape(shape) @ self.membership)
        member = theta.new_tensor(self.membership)
        return (theta.reshape(shape) @ member).exp()

    def fit(self, schedule: Schedule, floor: float = 0.05) -> np.ndarray:
        """Theta [K * G] whose table is nearest to `schedule` in mean squared log-gain (weights are cut at `floor`).

        Sites that the schedule does not name count as 1. Groups must not overlap for this to be the mean over members.
        """
        column = {s: i for i, s in enumerate(schedule.sites)}
        values = schedule.at(self.sigmas)
        logs = np.zeros((len(self.sigmas), len(self.sites)))
        for j, site in enumerate(self.sites):
            if site in column:
                logs[:, j] = np.log(np.maximum(values[:, column[site]], floor))
        solution, *_ = np.linalg.lstsq(self.membership.T, logs.T, rcond=None)
        return np.asarray(solution.T.reshape(-1))

    def schedule(self, theta: np.ndarray, **about: Any) -> Schedule:
        """The table of `theta` as a `Schedule`; `about` is its model, noise, calibrated, provenance."""
        return Schedule(self.sites, self.sigmas, self.table(np.asarray(theta, dtype=float)), self.mode, **about)


def hat(sigmas: np.ndarray, sigma: float) -> np.ndarray:
    """Values [K] at `sigma` of the hat functions on ln sigma with knots `sigmas` [K] (descending), constant outside."""
    x, knots = np.log(sigma), np.log(sigmas)[::-1]
    unit = np.eye(len(sigmas))
    return np.array([np.interp(x, knots, row[::-1]) for row in unit])
