"""The schedule: a table of weights over noise levels and sites, and its file.

The noise axis is the VE-equivalent sigma, `sqrt((1 - abar) / abar)`, because every tool knows it, whatever
the sampler, the number of steps or the start of an edit. Values between two knots are interpolated in ln
sigma; outside the knots the nearest one holds. A schedule whose weights are all 1 is the plain model,
exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rwopt.errors import UserError
from rwopt.files import write_text
from rwopt.schedule.actions import CFG_BRANCHES, Actions, actions_of
from rwopt.schedule.document import (
    FORMAT,
    LARGEST,
    LIMIT,
    VERSION,
    brief,
    check,
    private_entries,
    put_private,
    read_document,
    schema,
)
from rwopt.schedule.hub import Hub
from rwopt.schedule.noise import Array, noise_table, timestep_of
from rwopt.schedule.steps import Steps, steps_of

INTERPOLATIONS = ("linear", "nearest", "previous")
MODES = ("residual", "output")

_KNOT_TOLERANCE = 1e-3  # in ln sigma, a third of one training timestep: files made by hand round their sigmas



@dataclass(frozen=True, eq=False)
class Schedule(Hub):
    """Weights [K, S]: K noise levels x S sites. Raises UserError naming the field, the value and the remedy.

    sites: S ids as in `rwopt.list_sites`, each once.
    sigmas: [K] VE sigma, finite, > 0, strictly descending.
    weights: [K, S], finite, smaller than 1e30; 1 is the plain model.
    mode: residual, `x + w f(x)`, or output, `w (x + f(x))`.
    interp: linear, nearest, or previous (hold the last knot that sampling has passed), in ln sigma.
    model, calibrated, provenance: notes on the origin; noise: the training noise, see `rwopt.schedule.noise`.
    extra: the file's own `x-...` entries, kept: see `rwopt.schedule.document.private_entries`.
    cfg_branch: the rows of guidance that it holds for, both, cond or uncond.
    steps: dials of the sampler that belong to the weights, or None: `rwopt.schedule.steps`.
    actions: what each call computes and what it takes from earlier ones, or None: `rwopt.schedule.actions`.
    """

    sites: tuple[str, ...]
    sigmas: Array
    weights: Array
    mode: str = "residual"
    interp: str = "linear"
    model: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    calibrated: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    cfg_branch: str = "both"
    steps: Steps | None = None
    actions: Actions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "sigmas", _frozen(self.sigmas, "grid.sigma"))
        object.__setattr__(self, "weights", _frozen(self.weights, "weights"))
        if self.mode not in MODES:
            raise UserError(f"op.mode is {self.mode!r}: choose from {', '.join(MODES)}")
        if self.cfg_branch not in CFG_BRANCHES:
            raise UserError(f"op.cfg_branch is {self.cfg_branch!r}: choose from {', '.join(CFG_BRANCHES)}")
        if self.interp not in INTERPOLATIONS:
            raise UserError(f"grid.interp is {self.interp!r}: choose from {', '.join(INTERPOLATIONS)}")
        if not self.sites:
            raise UserError("sites is empty: name at least one site")
        seen: set[str] = set()
        for index, site in enumerate(self.sites):
            if site in seen:
                raise UserError(f"sites[{index}] repeats {site!r}: name each site once")
            seen.add(site)
        if self.sigmas.ndim != 1 or not len(self.sigmas):
            raise UserError(f"grid.sigma has shape {list(self.sigmas.shape)}: give a list of noise levels")
        for index, sigma in enumerate(self.sigmas):
            if not (np.isfinite(sigma) and sigma > 0):
                raise UserError(f"grid.sigma[{index}] is {sigma:g}: give finite noise levels above 0")
            if index and sigma >= self.sigmas[index - 1]:
                above = self.sigmas[index - 1]
                raise UserError(f"grid.sigma[{index}] is {sigma:g} after {above:g}: give strictly descending values")
        expected = (len(self.sigmas), len(self.sites))
        if self.weights.shape != expected:
            shape = list(self.weights.shape)
            raise UserError(f"weights has shape {shape}: give {list(expected)}, a row per sigma, a column per site")
        for k, s in np.argwhere(~(np.abs(self.weights) < LARGEST))[:1]:
            raise UserError(f"weights[{k}][{s}] is {self.weights[k, s]:g}: give finite numbers (1 changes nothing)")

    @classmethod
    def constant(cls, sites: Sequence[str], sigmas: ArrayLike, value: float = 1.0, **fields: Any) -> Schedule:
        """The same weight everywhere; 1 is the plain model."""
        grid = np.asarray(sigmas, dtype=np.float64)
        return cls(tuple(sites), grid, np.full((grid.size, len(sites)), float(value)), **fields)

    @property
    def is_plain(self) -> bool:
        """Whether every weight is 1, so that no block changes."""
        return bool((self.weights == 1).all())

    def at(self, sigma: float | Array) -> Array:
        """Weights at VE sigma (>= 0, infinity allowed): [S] for a number, [..., S] for an array."""
        value = np.asarray(sigma, dtype=np.float64)
        if np.isnan(value).any():
            raise UserError("sigma is NaN: look the schedule up at a noise level of 0 or more")
        # Position on the ascending axis -ln sigma, with the ends held.
        x = -np.log(np.clip(value, self.sigmas[-1], self.sigmas[0]))
        knots = -np.log(self.sigmas)
        if self.interp == "nearest":
            rows = np.abs(x[..., None] - knots).argmin(axis=-1)
            return np.asarray(self.weights[rows])
        slack = _KNOT_TOLERANCE if self.interp == "previous" else 0.0
        left = np.clip(np.searchsorted(knots, x + slack, side="right") - 1, 0, len(knots) - 1)
        if self.interp == "previous":
            return self.weights[left]
        right = np.minimum(left + 1, len(knots) - 1)
        gap = np.where(right > left, knots[right] - knots[left], 1.0)
        share = np.clip((x - knots[left]) / gap, 0.0, 1.0)[..., None]
        # a + share (b - a), not a mean of a and b: it returns equal neighbours exactly, hence 1 stays 1.
        result: Array = self.weights[left] + share * (self.weights[right] - self.weights[left])
        return result

    def digest(self) -> str:
        """SHA-256 (hex) of what it does, as saved: op, sites, noise, grid, weights, steps, actions; no notes."""
        document = self._document()
        core = {name: document.get(name) for name in ("op", "sites", "noise", "grid", "weights")}
        # left out if absent, so that older files keep their digest
        core |= {name: document[name] for name in ("steps", "actions") if name in document}
        return hashlib.sha256(json.dumps(core, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Equal as saved: the same digest and the same notes on the origin."""
        return isinstance(other, Schedule) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest())

    def to_dict(self) -> dict[str, Any]:
        """The file's content. Weights are rounded to 6 significant digits, finer than half precision."""
        return put_private(self._document(), self.extra)

    def _document(self) -> dict[str, Any]:
        """`to_dict` without private entries."""
        grid: dict[str, Any] = {"sigma": self.sigmas.tolist()}
        indexed = self.noise.get("timestep", "index") == "index"
        if indexed and {"beta_schedule", "train_sigma"} & self.noise.keys():  # for people who read the file
            steps = timestep_of(self.sigmas, noise_table(self.noise))
            grid["train_timestep"] = [round(float(step), 2) for step in steps]
        grid |= {"interp": self.interp, "extrapolate": "clamp"}
        return {
            "$schema": schema()["$id"],
            "format": FORMAT,
            "version": VERSION,
            "model": dict(self.model),
            "op": {"mode": self.mode, "cfg_branch": self.cfg_branch},
            "sites": [{"id": site} for site in self.sites],
            "noise": {"axis": "sigma", **self.noise},
            "grid": grid,
            "weights": [[float(f"{w:.6g}") for w in row] for row in self.weights.tolist()],
            **({} if self.steps is None else {"steps": self.steps.to_dict()}),
            **({} if self.actions is None else {"actions": self.actions.to_dict()}),
            "calibrated": dict(self.calibrated),
            "provenance": dict(self.provenance),
        }

    def exact(self) -> dict[str, Any]:
        """`to_dict` with all digits, for what a search keeps for itself: a schedule file has fewer."""
        document = {**self.to_dict(), "weights": self.weights.tolist()}
        if self.steps is not None:
            document["steps"] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.steps).items() if v}
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_dict`. Raises UserError for anything that the schema or the class refuses."""
        check(document)
        return cls._made(document)

    @classmethod
    def _made(cls, document: Mapping[str, Any]) -> Schedule:
        op, grid = document.get("op", {}), document["grid"]
        lengths = {len(row) for row in document["weights"]}
        if len(lengths) > 1:
            given = brief(sorted(lengths))
            raise UserError(f"weights has rows of {given} numbers: give {len(document['sites'])} in each")
        noise = {name: value for name, value in document.get("noise", {}).items() if name != "axis"}
        return cls(
            sites=tuple(site["id"] for site in document["sites"]),
            sigmas=np.asarray(grid["sigma"], dtype=np.float64),
            weights=np.asarray(document["weights"], dtype=np.float64),
            mode=op.get("mode", "residual"),
            interp=grid.get("interp", "linear"),
            model=document.get("model", {}),
            noise=noise,
            calibrated=document.get("calibrated", {}),
            provenance=document.get("provenance", {}),
            extra=private_entries(document),
            cfg_branch=op.get("cfg_branch", "both"),
            steps=steps_of(document.get("steps")),
            actions=actions_of(document.get("actions")),
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the JSON file. Raises UserError if a note in it is not plain JSON, and for more than 2 MB."""
        document = self.to_dict()
        try:
            text = json.dumps(document, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: a note is not plain JSON ({error}): use text, numbers, lists") from None
        try:
            check(json.loads(text))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        # A row of numbers on one line, so that a diff shows noise levels. (No JSON string holds a raw line
        # break.)
        text = re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda row: f"[{' '.join(row[1].split())}]", text)
        if len(text) >= LIMIT:  # ASCII; deep notes indent into megabytes
            text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        if len(text) >= LIMIT:
            raise UserError(f"{path}: would be longer than {LIMIT // 1_000_000} MB: use fewer sites or levels")
        return write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a file of at most 2 MB. Raises UserError that names the file, the field, the value and the remedy."""
        document = read_document(path)
        try:
            check(document, notes=True)
            return cls._made(document)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _frozen(values: ArrayLike, name: str) -> Array:
    """An own float64 copy that cannot be written to."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is not a regular table of numbers: give rows of equal length") from None
    array.flags.writeable = False
    return array
