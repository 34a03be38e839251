"""Actions: what a U-Net call computes and what it takes from earlier calls of the same picture.

An `Action` says it of one call, an `Actions` of every noise level:

    full        everything is computed
    cut         only the first k skip tensors and the up layers that take them; the stream in front of those is stored
                (DeepCache, Ma et al. 2024, arXiv 2312.00858: its branch k - 1)
    output      nothing is computed: the whole output is stored (FSampler, arXiv 2511.09180)
    guidance    only the conditional rows; their difference to the others is stored
    encoder     the down path's skip tensors are stored, middle and up path are computed (Faster Diffusion, Li et al.
                2024, arXiv 2312.09608)
    sites       everything but some sites, each by its own rule: reuse (its stored raw branch, weighed by the present
                weights), extrapolate (the branch by order 1), skip (its branch is 0), mean (below)

A call of kind `sites` may be of one side of guidance (`cfg_branch`): its rows alone are computed and stand for both
sides, so it is not guided. There a site reuses the stored branch of those rows, or by the rule `mean` the mean of the
two sides' (T-GATE, Liu et al. 2024, arXiv 2404.02747). Where calls have no two sides, it is a call of all rows.

Order 0 is the value of the last call that computed it (the last *fresh* one), order 1 the line through the last two
fresh ones, read at the present noise level. The line is straight in sqrt(sigma): of ten axes tried on the embedded
model it has the smallest error over a whole run (19 % of the change from one call to the next where every other call
is left out; training timesteps 19 %, ln sigma 20 %, sigma 21 %, the signal's share 25 %), needs no noise table, and is
finite at the clean end.

A stored value is used at most `max_gap` calls, and while the noise level has fallen by at most the level's `max_ratio`
since it was fresh; what is missing or too old is computed (`rwopt.unet.actions`). So a file is safe with another number
of steps. Only a `full` call makes the values of step actions fresh; a site's branch is fresh in every call of `full` or
`sites` in which the site is computed. A call of one side that lacks one of its values computes everything, both sides:
its picture would else be without the words, or of the words alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule.document import brief
from rwopt.schedule.noise import Array

STEP_KINDS = ("full", "cut", "output", "guidance", "encoder", "sites")
_READS = {"reuse": 1, "extrapolate": 2, "skip": 0, "mean": 1}
SITE_RULES = tuple(_READS)
CFG_BRANCHES = ("both", "cond", "uncond")
"""Rows of guidance, [unconditional, conditional], that something holds for."""
RULED_KINDS = ("transformer", "self", "cross", "ff", "resnet")
"""Site kinds with a branch of their own, which a rule may be for."""
_NAME = re.compile(
    rf"({'|'.join(RULED_KINDS)})|((down|up)_blocks\.\d{{1,4}}|mid_block)\."
    r"(attentions\.\d{1,4}(\.(self|cross|ff))?|resnets\.\d{1,4}\.resnet)"
)
MAX_GAP = 2
"""Calls that one stored value may serve: with three in a row order 1 explodes."""
SLACK = 1.1
"""How much further than on the grid that a plan was made for the noise level may fall."""


@dataclass(frozen=True)
class Action:
    """Of one call. Raises `UserError` for what does not exist.

    k: of a cut, at least 1; order: 0 or 1, of all but full and sites; sites: (site id or site kind, rule), of `sites`.
    A site's own id goes before its kind. cfg_branch: the rows that are computed, of `sites` alone.
    """

    kind: str = "full"
    k: int = 0
    order: int = 0
    sites: tuple[tuple[str, str], ...] = ()
    cfg_branch: str = "both"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple((str(name), str(rule)) for name, rule in self.sites))
        if self.kind not in STEP_KINDS:
            raise UserError(f"action is {brief(self.kind)}: choose from {', '.join(STEP_KINDS)}")
        if (self.kind == "cut") != (self.k > 0):
            raise UserError(f"k is {self.k} of action {self.kind}: give a cut the number of skips, others none")
        if self.order not in ((0,) if self.kind in ("full", "sites") else (0, 1)):
            raise UserError(f"order is {brief(self.order)} of action {self.kind}: give 0, or 1 where a value is stored")
        if (self.kind == "sites") != bool(self.sites):
            raise UserError(f"action {self.kind} has {len(self.sites)} sites: give 'sites' some, others none")
        for name, rule in self.sites:
            if not _NAME.fullmatch(name):
                raise UserError(f"sites names {brief(name)}: give a site or one of the kinds {', '.join(RULED_KINDS)}")
            if rule not in SITE_RULES:
                raise UserError(f"sites.{brief(name)} is {brief(rule)}: choose from {', '.join(SITE_RULES)}")
            if rule == "mean" and self.cfg_branch == "both":
                raise UserError(f"sites.{brief(name)} is mean, and the call has both sides: give a cfg_branch")
        if self.cfg_branch not in (CFG_BRANCHES if self.kind == "sites" else CFG_BRANCHES[:1]):
            sides = ", ".join(CFG_BRANCHES)
            raise UserError(f"cfg_branch is {brief(self.cfg_branch)} of action {self.kind}: give sites one of {sides}")

    @property
    def place(self) -> str:
        """The name of the stored value of a step action; "" for full and sites."""
        return "" if self.kind in ("full", "sites") else f"cut {self.k}" if self.kind == "cut" else self.kind

    @property
    def takes(self) -> int:
        """How many fresh values it reads: 0 of full and of sites that are skipped, 1 of order 0, 2 of order 1."""
        if self.place:
            return self.order + 1
        return max((_READS[rule] for _, rule in self.sites), default=0)

    @property
    def paired(self) -> bool:
        """Whether it is of calls with rows [unconditional, conditional] alone."""
        return self.kind == "guidance" or self.cfg_branch != "both"

    @property
    def unpaired(self) -> Action:
        """What a call does instead whose rows are not."""
        if self.kind == "guidance":
            return FULL
        sites = tuple((name, "reuse" if rule == "mean" else rule) for name, rule in self.sites)
        return replace(self, sites=sites, cfg_branch="both") if self.paired else self

    @property
    def letter(self) -> str:
        """For printing: F full; o and h the output by order 1 and held; 1 to 6 and a to f cuts of order 0 and 1; G, g
        guidance, N, n the encoder, and x, X cross-attention, likewise; others in brackets."""
        if self in _LETTER:
            return _LETTER[self]
        name = f"{self.place or self.kind}{''.join(f' {n} {rule}' for n, rule in self.sites)}"
        side = f" {self.cfg_branch}" if self.cfg_branch != "both" else ""
        return f"[{name}{' line' if self.order else ''}{side}]"


FULL = Action()
_NAMED = {"F": FULL, "o": Action("output", order=1), "h": Action("output"), "G": Action("guidance"),
          "g": Action("guidance", order=1), "N": Action("encoder"), "n": Action("encoder", order=1),
          "x": Action("sites", sites=(("cross", "reuse"),)),
          "X": Action("sites", sites=(("cross", "extrapolate"),)),
          **{str(k): Action("cut", k) for k in range(1, 7)},
          **{"_abcdef"[k]: Action("cut", k, 1) for k in range(1, 7)}}  # fmt: skip
_LETTER = {action: letter for letter, action in _NAMED.items()}


def by_letters(text: str) -> tuple[Action, ...]:
    """The actions that letters stand for, "FFo1"; see `Action.letter`."""
    for letter in text:
        if letter not in _NAMED:
            raise UserError(f"letter {letter!r} stands for no action: use {' '.join(_NAMED)}")
    return tuple(_NAMED[letter] for letter in text)


@dataclass(frozen=True)
class Level:
    """The action around a noise level (VE sigma, above 0). max_ratio: the largest allowed sigma of the last fresh value
    over the present sigma, at least 1; of no meaning for full."""

    sigma: float
    action: Action = FULL
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise UserError(f"actions.levels has the sigma {self.sigma:g}: give finite noise levels above 0")
        if not (self.max_ratio >= 1 and math.isfinite(self.max_ratio)):
            raise UserError(f"actions.levels has the max_ratio {self.max_ratio:g}: give a number of 1 or more")


@dataclass(frozen=True)
class Actions:
    """A plan: levels, strictly descending in sigma; a call follows the level that is nearest in ln sigma."""

    levels: tuple[Level, ...]
    max_gap: int = MAX_GAP

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels:
            raise UserError("actions.levels is empty: give at least one level, or no actions")
        for above, below in pairwise(self.levels):
            if below.sigma >= above.sigma:
                raise UserError(f"actions.levels has sigma {below.sigma:g} after {above.sigma:g}: give falling levels")
        if self.max_gap < 1:
            raise UserError(f"actions.max_gap is {self.max_gap}: give the calls that a value may serve, 1 or more")

    @classmethod
    def along(
        cls, sigmas: Sequence[float] | Array, actions: Iterable[Action] | str, max_gap: int = MAX_GAP,
        slack: float = SLACK,
    ) -> Actions:  # fmt: skip
        """For the calls at `sigmas` [N], an action (or letter) each; `max_ratio` is what this grid needs times `slack`.

        UserError if the numbers differ, or if a plan takes a value before it is computed or more than `max_gap` calls
        in a row: it would silently be computed there.
        """
        chosen = by_letters(actions) if isinstance(actions, str) else tuple(actions)
        if len(chosen) != len(sigmas):
            raise UserError(f"the plan has {len(chosen)} actions for {len(sigmas)} calls: give one a call")
        fresh: list[int] = []
        levels = []
        for i, (sigma, action) in enumerate(zip(sigmas, chosen, strict=True)):
            needs = action.takes if action.place else 0  # a site without its value runs
            if len(fresh) < needs or (needs and i - fresh[-1] > max_gap):
                raise UserError(
                    f"action {i} is {action.letter} after the full calls {fresh[-2:]}: give {needs} before it, "
                    f"the last at most {max_gap} calls back"
                )
            since = float(sigmas[fresh[-1] if action.place else max(0, i - max_gap)]) / float(sigma)
            levels.append(Level(float(sigma), action, 1.0 if action == FULL else max(1.0, since) * slack))
            if action == FULL:
                fresh.append(i)
        return cls(tuple(levels), max_gap)

    @property
    def text(self) -> str:
        """One letter a level, "FFFFoFoF"."""
        return "".join(level.action.letter for level in self.levels)

    @property
    def paired(self) -> bool:
        """Whether an action is of calls with rows [unconditional, conditional] alone."""
        return any(action.paired for action in self.patterns)

    @property
    def about(self) -> str:
        """Plain sentences on calls of one side; "" if there are none."""
        sides = [side for side in CFG_BRANCHES[1:] if any(action.cfg_branch == side for action in self.patterns)]
        means = [*dict.fromkeys(name for action in self.patterns for name, rule in action.sites if rule == "mean")]
        more = f" and {len(means) - 3} more" if len(means) > 3 else ""
        said = [f"Calls marked {side} compute the {side}itional rows alone and are not guided." for side in sides]
        if means:
            said.append(f"There {', '.join(means[:3])}{more} is the mean over both sides of an earlier, guided call.")
        return " ".join(said)

    @property
    def patterns(self) -> tuple[Action, ...]:
        """The distinct actions."""
        return tuple(dict.fromkeys(level.action for level in self.levels))

    def index(self, sigma: float) -> int:
        """Which level a call at VE sigma (above 0; infinity allowed) follows."""
        known = np.log([level.sigma for level in self.levels])
        return int(np.abs(known - np.log(np.clip(sigma, self.levels[-1].sigma, self.levels[0].sigma))).argmin())

    def at(self, sigma: float) -> Level:
        """The level that a call at VE sigma follows."""
        return self.levels[self.index(sigma)]

    def read_later(self, sigma: float) -> tuple[Action, ...]:
        """The actions that may read what a full call at `sigma` computes: nothing else of it is worth keeping.

        A line may read over one full call that lies between, a stored value over none. A grid may visit a level twice.
        """
        here = self.index(sigma)
        found, full = dict[Action, None](), 0
        for level in self.levels[here:]:
            action = level.action
            if action != FULL and full <= (1 if action.takes == 2 else 0):
                found[action] = None
            if level is not self.levels[here]:
                full += action == FULL
            if full > 1:
                break
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The file's part `actions`."""
        return {"max_gap": self.max_gap, "levels": [_level_dict(level) for level in self.levels]}


def _level_dict(level: Level) -> dict[str, Any]:
    action = level.action
    entry: dict[str, Any] = {"sigma": level.sigma, "action": action.kind}
    if action.kind == "cut":
        entry["k"] = action.k
    if action.place:
        entry["order"] = action.order
    if action.sites:
        entry["sites"] = dict(action.sites)
    if action.cfg_branch != "both":
        entry["cfg_branch"] = action.cfg_branch
    if action != FULL:
        entry["max_ratio"] = float(f"{level.max_ratio:.6g}") if level.max_ratio >= 1.000001 else 1.0
    return entry


def actions_of(document: Mapping[str, Any] | None) -> Actions | None:
    """The inverse of `Actions.to_dict`, private entries (x-...) left out; None of None."""
    if document is None:
        return None
    levels = []
    for i, entry in enumerate(document["levels"]):
        try:
            action = Action(
                entry["action"], entry.get("k", 0), entry.get("order", 0), tuple(entry.get("sites", {}).items()),
                entry.get("cfg_branch", "both"),
            )  # fmt: skip
            if action != FULL and "max_ratio" not in entry:
                raise UserError(f"action {action.kind} lacks 'max_ratio': say how far the noise level may have fallen")
            levels.append(Level(float(entry["sigma"]), action, float(entry.get("max_ratio", 1.0))))
        except UserError as error:
            raise UserError(f"actions.levels[{i}]: {error}") from None
    return Actions(tuple(levels), document.get("max_gap", MAX_GAP))
