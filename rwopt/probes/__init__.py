"""Probes: how important is every site at every noise level, and what did the answer cost?

One estimator a file, one contract: `probe(model, attachment, x, cond, course)` follows the plain model's own
trajectory and returns an `Importance`. Importing this package loads no torch; `make_probe` does.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rwopt.errors import UserError
from rwopt.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from rwopt.models import Model
    from rwopt.sampling.course import Course
    from rwopt.sampling.denoise import Condition
    from rwopt.unet.attachment import Attachment

FORMAT, VERSION = "rwopt.importance", "1.0"

PROBES: dict[str, str] = {
    "ablation": "rwopt.probes.ablation:Ablation",
    "gradient_norm": "rwopt.probes.gradient_norm:GradientNorm",
    "gram": "rwopt.probes.gram:Gram",
    "reward_gradient": "rwopt.probes.reward_gradient:RewardGradient",
    "shapley": "rwopt.probes.shapley:Shapley",
    "snr": "rwopt.probes.snr:Snr",
    "voting": "rwopt.probes.voting:Voting",
}  # name -> "module:class"; a class here is a dataclass whose fields are its options
SIGNED = ("gram", "reward_gradient", "shapley", "snr")


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """What a probe measured.

    sites: S ids in execution order; sigmas: VE noise level of each step, [K], strictly descending, > 0;
    scores: [K, S], larger means more important *in the probe's own opinion*, unit set by `method`; those of the
    `SIGNED` probes may be negative (a derivative, or a site whose absence helps);
    low, high: 95 % interval of the score over pictures, [K, S], or None where there is none;
    calls: U-Net calls spent, a backward pass counted as two; details: what else is worth keeping, JSON-able.
    Raises `UserError` for shapes that disagree and for values that are not finite.
    """

    sites: tuple[str, ...]
    sigmas: np.ndarray
    scores: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    calls: int = 0
    method: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        for name in ("sigmas", "scores", "low", "high"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=float))
        if self.sigmas.ndim != 1 or (self.sigmas <= 0).any() or (np.diff(self.sigmas) >= 0).any():
            raise UserError(
                f"importance.sigmas={self.sigmas.tolist()} must be positive and strictly descending"
            )
        shape = (len(self.sigmas), len(self.sites))
        for name in ("scores", "low", "high"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != shape:
                raise UserError(f"importance.{name} has shape {value.shape}, not (steps, sites) = {shape}")
            if not np.isfinite(value).all():
                raise UserError(f"importance.{name} has values that are not finite: probe with saner inputs")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as versioned JSON; numbers keep full precision."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in body.items()}
        return write_text(path, json.dumps({"format": FORMAT, "version": VERSION, **body}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read what `save` wrote. Raises `UserError` if `path` holds anything else."""
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"importance file {path} cannot be read ({error}): probe again") from None
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise UserError(f"file {path} is no {FORMAT} file: give one that a probe saved")
        if (version := str(body.pop("version", "none"))).split(".")[0] != VERSION.split(".")[0]:
            raise UserError(f"file {path} has version {version}, this program reads {VERSION}: probe again")
        known = {f.name for f in dataclasses.fields(cls)}
        if missing := {"sites", "sigmas", "scores"} - body.keys():
            raise UserError(f"importance file {path} lacks {', '.join(sorted(missing))}: probe again")
        return cls(**{k: v for k, v in body.items() if k in known})


class Probe(Protocol):
    """The contract of every probe: `mode` is the attachment mode that it wants."""

    @property
    def mode(self) -> str: ...

    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        """Measure along the plain trajectory from start noise `x` [N, C, h, w] over a `course`."""


def make_probe(name: str, **options: Any) -> Probe:
    """The probe `name` with its options set. Raises `UserError` naming the nearest valid name or option."""
    if name not in PROBES:
        raise UserError(f"probe={name} is unknown: {nearest(name, sorted(PROBES))}")
    probe = resolve_name(PROBES[name])
    known = [f.name for f in dataclasses.fields(probe) if f.init]
    for option in options:
        if option not in known:
            raise UserError(f"probe.{option} is no option of probe {name}: {nearest(option, known)}")
    made: Probe = probe(**options)
    return made


def nearest(word: str, known: Sequence[str]) -> str:
    """The remedy of an error line: "did you mean x? (x, y, z)"."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "use one of ") + f"({', '.join(known)})"


def choice(option: str, value: object, known: Sequence[str]) -> None:
    """Raise `UserError` unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"probe.{option}={value} is unknown: {nearest(str(value), known)}")


def mean_interval(
    values: np.ndarray, signed: bool = False
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean over pictures of `values` [..., N], and its 95 % interval (low, high), cut at 0 unless `signed`.

    Normal approximation; too narrow for few pictures. One picture has none: (mean, None, None).
    """
    mean, n = values.mean(-1), values.shape[-1]
    if n < 2:
        return mean, None, None
    half = 1.96 * values.std(-1, ddof=1) / np.sqrt(n)
    return mean, mean - half if signed else np.maximum(mean - half, 0), mean + half
