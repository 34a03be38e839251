"""Simultaneous perturbation (Spall, 1992, 10.1109/9.119632): a gradient estimate from two evaluations in any dimension.

At each iteration all numbers move at once by +-c along random signs D, and the two scores give `(f+ - f-) / (2 c) D`.
Both candidates see the same cases and noise (a task's common random numbers), so what they share cancels. For rewards
without gradient and for more weights than a model-based sampler can handle.

All arithmetic is in units of the box, [0, 1] a parameter. The table of trials is the whole state: centre and moments
are replayed from it and the signs are a function of (study, seed, iteration), so a killed run goes on bit by bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwopt.errors import UserError
from rwopt.tuners import Candidate, Parameter, Trial
from rwopt.tuners.table import Row, Table

_STABILITY = 5  # A of Spall's gains: a tenth of the iterations that one can usually pay for


@dataclass(frozen=True)
class SpsaOptions:
    """gain: "adam", or "plain" (Spall's a / (k + 1 + A)^.602 with a set so that the first step has size `rate`).

    rate: step size in units of the box, under Adam decaying as (k + 1)^-.3. perturbation: c, as (k + 1)^-.101.
    pull: weight of an L2 pull to the start, in score per squared box width.
    """

    gain: str = "adam"
    rate: float = 0.06
    perturbation: float = 0.1
    pull: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)

    def __post_init__(self) -> None:
        if self.gain not in ("adam", "plain"):
            raise UserError(f"tuner.gain={self.gain} is unknown: adam or plain")
        for name in ("rate", "perturbation"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"tuner.{name}={getattr(self, name)} is outside (0, 1]: a share of the box")


class SpsaTuner:
    """One study in `folder/<study>.json`. Evaluates the named `starts`, then pairs around the best of them.

    Of `trials`, the last two go to the centre that was reached and to the mean of its last half (less noisy than any
    perturbed point). Raises `UserError` if the file belongs to another `fingerprint`.
    """

    def __init__(
        self,
        study: str,
        space: Sequence[Parameter],
        folder: Path,
        trials: int,
        seed: int = 0,
        starts: Mapping[str, Mapping[str, float]] | None = None,
        fingerprint: str = "",
        options: SpsaOptions = SpsaOptions(),
    ) -> None:
        self.study, self.space, self.budget, self.seed, self.options = study, list(space), trials, seed, options
        self.starts = dict(starts or {})
        if not self.starts:
            self.starts = {"middle": {p.name: _value(p, 0.5) for p in self.space}}
        self.table = Table(folder / f"{study}.json", f"{fingerprint}/{seed}/{options}")

    def propose(self) -> Candidate:
        """The next candidate; the two of a pair may be asked for before either is scored."""
        left = self.table.left_over()
        if left is not None:
            return left
        rows = self.table.rows
        tried = {r.origin for r in rows}
        for name, point in self.starts.items():
            if name not in tried:
                return self._add({p.name: point[p.name] for p in self.space}, name)
        pairs = self._pairs()
        if pairs and len(pairs[-1]) == 1 and pairs[-1][0].state != "failed":  # a failed first half ends its pair
            return self._perturbed(len(pairs) - 1, -1)
        if any(r.state == "open" for r in rows):
            raise UserError(f"study {self.study}: score the open candidates before asking for more")
        remaining = self.budget - len(self.table.trials())
        if remaining in (1, 2):
            path = self.path()
            if "centre" not in tried or remaining == 2:
                return self._add(self._values(path[-1]), "centre")
            return self._add(self._values(path[len(path) // 2 :].mean(0)), "mean")
        return self._perturbed(len(pairs), 1)

    def ready(self) -> bool:
        """The starts, and the second half of a pair."""
        rows, pairs = self.table.rows, self._pairs()
        if any(name not in {r.origin for r in rows} for name in self.starts):
            return True
        return bool(pairs) and len(pairs[-1]) == 1 and pairs[-1][0].state != "failed"

    def observe(self, candidate: Candidate, score: float, calls: int = 0) -> None:
        """A pair with a score that is not finite moves nothing."""
        self.table.close(candidate.number, score, calls)

    def trials(self) -> list[Trial]:
        return self.table.trials()

    def path(self) -> np.ndarray:
        """The centres so far [1 + iterations, d], in units of the box."""
        o, start = self.options, self._start()
        centre, path = start, [start]
        m, v = np.zeros(len(start)), np.zeros(len(start))
        size, steps = 0.0, 0
        for k, pair in enumerate(self._pairs()):
            if len(pair) == 2 and all(r.score is not None for r in pair):
                plus, minus = pair
                assert plus.score is not None
                assert minus.score is not None
                gap = self._units(plus.values) - self._units(minus.values)  # what clipping and grids left of 2 c D
                slope = np.divide(plus.score - minus.score, gap, out=np.zeros_like(gap), where=gap != 0)
                slope = slope - 2 * o.pull * (centre - start)
                steps += 1
                if o.gain == "adam":
                    m = o.betas[0] * m + (1 - o.betas[0]) * slope
                    v = o.betas[1] * v + (1 - o.betas[1]) * slope**2
                    unit = (m / (1 - o.betas[0] ** steps)) / (np.sqrt(v / (1 - o.betas[1] ** steps)) + 1e-12)
                    move = o.rate * (k + 1) ** -0.3 * unit
                else:
                    size = size or float(np.abs(slope).mean())
                    move = o.rate * ((1 + _STABILITY) / (k + 1 + _STABILITY)) ** 0.602 * slope / max(size, 1e-12)
                centre = np.clip(centre + move, 0, 1)
            path.append(centre)
        return np.array(path)

    def _start(self) -> np.ndarray:
        scored = [r for r in self.table.rows if r.origin in self.starts and r.score is not None]
        if not scored:
            raise UserError(f"study {self.study}: no start has a finite score; check objective.terms")
        return self._units(max(scored, key=lambda r: r.score or 0.0).values)

    def _pairs(self) -> list[list[Row]]:
        out: dict[int, list[Row]] = {}
        for row in self.table.rows:
            if "pair" in row.note:
                out.setdefault(row.note["pair"], []).append(row)
        return list(out.values())

    def _perturbed(self, k: int, sign: int) -> Candidate:
        key = zlib.crc32(f"{self.study}/{self.seed}/{k}".encode())
        direction = np.random.default_rng(key).choice([-1.0, 1.0], len(self.space))
        point = self.path()[k] + sign * self.options.perturbation * (k + 1) ** -0.101 * direction
        return self._add(self._values(point), "pair", pair=k)

    def _add(self, values: Mapping[str, float], origin: str, **note: int) -> Candidate:
        return self.table.add({p.name: p.clip(values[p.name]) for p in self.space}, origin, **note)

    def _units(self, values: Mapping[str, float]) -> np.ndarray:
        return np.array([_unit(p, values[p.name]) for p in self.space])

    def _values(self, units: np.ndarray) -> dict[str, float]:
        return {p.name: _value(p, float(u)) for p, u in zip(self.space, units, strict=True)}


def _unit(p: Parameter, value: float) -> float:
    if p.log:
        return float(np.log(value / p.low) / np.log(p.high / p.low))
    return (value - p.low) / (p.high - p.low)


def _value(p: Parameter, unit: float) -> float:
    unit = min(max(unit, 0.0), 1.0)
    return p.clip(float(p.low * (p.high / p.low) ** unit) if p.log else p.low + unit * (p.high - p.low))
