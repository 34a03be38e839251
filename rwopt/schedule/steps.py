"""Steps: the sampler's own dials for N calls, an optional part of a schedule, and how they are learned.

A sampler asks the U-Net N times. It may do so at other noise levels than a grid made by rule (the *clock*; compare
Align Your Steps, arXiv 2404.14507), tell the U-Net another level than the one it computes with (*told*; the timestep
tuner, arXiv 2310.09469, known to users as "Detail Daemon" or "lying sigma"), and guide each call by its own scale.

With shares p of the way from the first timestep t_0 down to -1, in N parts, and base values that carry a bar,

    p_i = bar p_i exp(c_i) / sum_j bar p_j exp(c_j) ,   t_i = t_0 - (t_0 + 1) sum_(j < i) p_j      (clock c [N])
    told_i = t_i + 100 d_i ,                                                                       (told d [N])
    guidance_i = bar g exp(m_i) .                                                                  (guidance m [N])

All zeros give the base grid. `t` is a training timestep, which may be fractional while it is learned; a finished
`Steps` is at whole ones, since most stock schedulers take nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule.document import brief
from rwopt.schedule.noise import Array, sigma_at, timestep_of

DIALS = ("clock", "told", "guidance")
"""What may be learned beside weights."""

REACH = {"clock": 2.0, "told": 3.0, "guidance": 1.5}
"""How far each number may go from its start."""

TOLD_UNIT = 100.0  # training timesteps: with it one rate fits log-gains and told levels
LEAST_GUIDANCE = 1.01  # a pipeline that sees 1 or less sends no negative rows, in the middle of a picture


@dataclass(frozen=True)
class Steps:
    """N calls of a sampler. Raises `UserError` for values that no sampler can use.

    sampler: a name of `rwopt.schedule.samplers.SAMPLERS`; sigmas: VE noise levels of the calls, descending; told:
    VE levels that the U-Net is told, () for `sigmas`; guidance: scales above 1, () for the pipeline's own.
    """

    sampler: str
    sigmas: tuple[float, ...]
    told: tuple[float, ...] = ()
    guidance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sigmas", "told", "guidance"):
            try:
                object.__setattr__(self, name, _numbers(getattr(self, name)))
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"steps.{name} is {brief(getattr(self, name))}: give a list of numbers") from None
        count = len(self.sigmas)
        falling = count and all(a > b for a, b in pairwise(self.sigmas))
        if not falling or not np.isfinite(self.sigmas).all() or self.sigmas[-1] <= 0:
            given = brief(list(self.sigmas))
            raise UserError(f"steps.sigmas is {given}: give strictly descending noise levels above 0")
        for name, least in (("told", 0.0), ("guidance", 1.0)):
            values = getattr(self, name)
            if values and len(values) != count:
                raise UserError(f"steps.{name} has {len(values)} numbers: give {count}, one a call, or none")
            for value in values:
                if not (np.isfinite(value) and value > least):
                    raise UserError(f"steps.{name} holds {value:g}: give finite numbers above {least:g}")

    def __len__(self) -> int:
        return len(self.sigmas)

    def to_dict(self) -> dict[str, Any]:
        """The file's entry: only what is set, in 6 significant digits, or in all if levels or scales would be lost."""
        lists = {name: _short(getattr(self, name)) for name in ("sigmas", "told", "guidance")}
        if any(a <= b for a, b in pairwise(lists["sigmas"])):
            lists["sigmas"] = list(self.sigmas)
        if any(scale <= 1 for scale in lists["guidance"]):
            lists["guidance"] = list(self.guidance)
        return {"sampler": self.sampler, **{name: values for name, values in lists.items() if values}}

    def resampled(self, count: int, table: Array) -> Steps:
        """The same dials for another number of calls: timesteps by share of the way, the others by noise level.

        table: the model's VE sigmas [T].
        """
        whole = np.append(timestep_of(self.sigmas, table), -1.0)
        ts = np.interp(np.linspace(0, 1, count + 1), np.linspace(0, 1, len(whole)), whole)[:-1]
        sigmas = sigma_at(whole_timesteps(ts), table)

        def carried(values: Sequence[float] | Array) -> Array:
            return np.interp(-np.log(sigmas), -np.log(self.sigmas), values)

        shift = np.log(self.told) - np.log(self.sigmas) if self.told else np.zeros(len(self))
        told = sigmas * np.exp(carried(shift)) if self.told else ()
        return Steps(self.sampler, tuple(sigmas), tuple(told), tuple(carried(self.guidance)) if self.guidance else ())


def _numbers(values: Any) -> tuple[float, ...]:
    """TypeError for text, and for true and false, which are numbers to Python."""
    numbers = () if isinstance(values, str | bytes) else tuple(values)
    if isinstance(values, str | bytes) or any(isinstance(x, str | bytes | bool | np.bool_) for x in numbers):
        raise TypeError
    return tuple(float(x) for x in numbers)


def _short(values: tuple[float, ...]) -> list[float]:
    return [float(f"{x:.6g}") for x in values]


@dataclass(frozen=True)
class StepFunction:
    """From numbers to `Steps`: those dials of `learn` that there are, of `sampler` on the base grid `sigmas` [N].

    table: the model's VE sigmas [T]; guidance: the scale that log-gains start from.
    """

    sampler: str
    sigmas: Sequence[float]
    table: Sequence[float]
    guidance: float
    learn: Sequence[str] = DIALS

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        object.__setattr__(self, "table", tuple(float(s) for s in self.table))
        for name in self.learn:
            if name not in DIALS:
                raise UserError(f"steps.learn={name} is unknown: use {', '.join(DIALS)}")
        # the first level is fixed: a single call has no clock; without guidance there is no scale to learn
        idle = {"clock": len(self.sigmas) == 1, "guidance": self.guidance <= 1}
        kept = tuple(name for name in DIALS if name in self.learn and not idle.get(name))
        object.__setattr__(self, "learn", kept)

    @property
    def names(self) -> list[str]:
        """"clock0", ... in the order of the numbers."""
        return [f"{dial}{i}" for dial in self.learn for i in range(len(self.sigmas))]

    @property
    def reach(self) -> Array:
        """How far each number may go."""
        return np.repeat([REACH[dial] for dial in self.learn], len(self.sigmas))

    @property
    def base(self) -> Array:
        """Timesteps [N] of the base grid."""
        return timestep_of(self.sigmas, np.array(self.table))

    def __call__(self, theta: Any) -> tuple[Any, Any, Any]:
        """(timesteps, told timesteps, guidance), each [N], of theta [d]; NumPy, or torch and then differentiable."""
        count, numpy = len(self.sigmas), isinstance(theta, np.ndarray)
        like, exp = (np.asarray, np.exp) if numpy else (theta.new_tensor, lambda x: x.exp())
        part = {dial: theta[i * count : (i + 1) * count] for i, dial in enumerate(self.learn)}
        base = self.base
        t = like(base)
        if "clock" in part:
            gaps = like(base - np.append(base[1:], -1.0)) * exp(part["clock"])
            shares = gaps / gaps.sum()
            t = (base[0] - (base[0] + 1) * (shares.cumsum(0) - shares)).clip(0, None)
        told = t + TOLD_UNIT * part["told"] if "told" in part else t
        told = told.clip(0, len(self.table) - 1)
        scale = like(np.full(count, self.guidance))
        if "guidance" in part:
            scale = (scale * exp(part["guidance"])).clip(LEAST_GUIDANCE, None)
        return t, told, scale

    def steps(self, theta: np.ndarray) -> Steps:
        """The finished dials, at whole timesteps. What the U-Net is told and guidance are left out if not learned."""
        table = np.array(self.table)
        t, told, scale = self(np.asarray(theta, dtype=float))
        whole = whole_timesteps(t)
        shifted = tuple(sigma_at(np.clip(whole + told - t, 0, len(table) - 1), table))
        guidance = tuple(scale) if "guidance" in self.learn else ()
        return Steps(self.sampler, tuple(sigma_at(whole, table)), shifted if "told" in self.learn else (), guidance)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def whole_timesteps(t: Array) -> Array:
    """Nearest whole numbers, strictly descending and 0 at least."""
    whole = np.maximum(np.round(np.asarray(t, dtype=float)), 0)
    first = whole[0]
    for i in range(len(whole) - 2, -1, -1):  # two that meet are parted upwards ...
        whole[i] = max(whole[i], whole[i + 1] + 1)
    if first >= len(whole) - 1:  # ... but the first stays where it is: there may be no timestep above
        whole = np.minimum(whole, first - np.arange(len(whole)))
    return whole


def steps_of(document: Mapping[str, Any] | None) -> Steps | None:
    """The inverse of `Steps.to_dict`, private entries (x-...) left out; None of None."""
    if document is None:
        return None
    return Steps(**{name: value for name, value in document.items() if not name.startswith("x-")})
