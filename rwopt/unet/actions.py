"""What one U-Net call takes from earlier ones, decided by what there is: `Past` in, `Frame` of the call, `Past` out.

A `Past` belongs to one run of one picture (or batch) in one thread. It is never changed: a call makes a new one, so it
can be an argument and a result of a step that gradient checkpointing runs again. Stored values keep their graph, if
they have one. By construction a call computes everything (`full`) where

- the noise level has not fallen since the last call: a new picture, or a sampler's second call near a step;
- a value was never computed, or for order 1 not twice at different levels;
- it has served `max_gap` calls, or the level has fallen by more than `max_ratio` since it was computed.

Who keeps a `Past` starts a new one for another run, thread, shape, number format, device or text. In an action of kind
`sites` what is missing is missing site by site: such a site runs. A call of one side of guidance computes everything
then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rwopt.schedule.actions import FULL, Action, Actions, Level
from rwopt.unet.actions_patterns import Pattern, Patterns, Place
from rwopt.unet.call import PLAIN, Columns, Plain

Values = tuple[Tensor, ...]


class Known(NamedTuple):
    """A stored value, each tensor with the rows of its call first; the call's noise level, number and rows."""

    sigma: float
    call: int
    values: Values
    side: str = "both"

    def serves(self, side: str) -> bool:
        """Whether it has the rows of a call of `side`."""
        return self.side in ("both", side)

    def of(self, side: str) -> Values:
        """Those rows."""
        return self.values if self.side == side else tuple(rows_of(value, side) for value in self.values)


def rows_of(value: Tensor, side: str) -> Tensor:
    """Of a tensor with rows [unconditional, conditional] first those of cond or uncond."""
    half = len(value) // 2
    return value[half:] if side == "cond" else value[:half]


class Line(NamedTuple):
    """What a call takes of a stored value: `new + share (new - old)`; without `old` the last fresh one itself, or by
    `mean` the mean of its two sides of guidance."""

    new: Values
    old: Values = ()
    share: float = 0.0
    mean: bool = False

    def value(self, part: int) -> Tensor:
        """Tensor `part` of it, in its own number format."""
        new = self.new[part]
        if self.mean:
            negative, positive = new.chunk(2)
            return (negative + positive) / 2
        return torch.lerp(new, self.old[part], -self.share) if self.old else new


def axis(sigma: float) -> float:
    """Where a noise level lies on the axis in which order 1 is a straight line (see `rwopt.schedule.actions`)."""
    return math.sqrt(sigma)


class Texts:
    """Keys and values of the text, by number of rows and layer: what a layer was given, and what it made of it.

    vouched: the owner says that a run's text does not change, though it may come as a new tensor in each call.
    """

    _MOST = 3  # numbers of rows: memory must not grow with those of a batched search

    def __init__(self, vouched: bool = False) -> None:
        self.vouched = vouched
        self._known: dict[tuple[int, str], dict[str, tuple[Tensor, Tensor]]] = {}

    def get(self, path: str, text: Tensor, side: str = "both") -> Tensor | None:
        """What layer `path` made of `text` in a call of `side` of guidance, if it is known."""
        found = self._known.get((len(text), side), {}).get(path)
        if found is None or text.shape != found[0].shape or text.dtype != found[0].dtype:
            return None
        return found[1] if self.vouched or same_tensor(text, found[0]) else None

    def put(self, path: str, text: Tensor, made: Tensor, side: str = "both") -> None:
        key = len(text), side
        if key not in self._known and len(self._known) >= self._MOST:
            del self._known[next(iter(self._known))]
        self._known.setdefault(key, {})[path] = text, made


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same piece of memory, unchanged."""
    if a is b:
        return True
    there = a.data_ptr(), a.shape, a.stride(), a.dtype, a.device
    if there != (b.data_ptr(), b.shape, b.stride(), b.dtype, b.device) or a.is_inference() or b.is_inference():
        return False
    return a._version == b._version


@dataclass(eq=False)
class Frame(Plain):
    """One call's weights with what the call takes, gives up and keeps; what hooks on the U-Net read in it.

    given: stored values by name; keep: those to be read off in this call, into `taken` (the first time: a part that
    checkpointing runs again changes nothing); finish: called with the frame after the call.
    """

    pattern: Pattern
    weights: Plain = PLAIN
    given: Mapping[str, Line] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    texts: Texts | None = None
    finish: Callable[[Frame], None] | None = None
    taken: dict[Place, Tensor] = field(default_factory=dict)

    def scaled(self, y: Tensor, column: int) -> Tensor | None:
        return None if column in self.pattern.idle else self.weights.scaled(y, column)

    def blended(self, y: Tensor, base: Tensor, column: int) -> Tensor | None:
        return None if column in self.pattern.idle else self.weights.blended(y, base, column)

    def within(self, column: int) -> Plain:
        return PLAIN if column in self.pattern.idle else self.weights

    def table(self) -> Tensor | None:
        return self.weights.table()

    def weighed(self, weights: Plain) -> Frame:
        """The same with the weights of the call: those of the one side where only that runs."""
        if self.pattern.side != "both" and isinstance(weights, Columns) and weights.weights.ndim == 2:
            weights = Columns(rows_of(weights.weights, self.pattern.side))
        return replace(self, weights=weights, taken=self.taken)

    def take(self, place: Place, value: Tensor) -> None:
        """Keep a tensor, if it is asked for and not there yet."""
        if place.name in self.keep:
            self.taken.setdefault(place, value)

    def values(self) -> dict[str, Values]:
        """What was taken, whole: the tensors of each value in their order."""
        names = dict.fromkeys(place.name for place in self.taken)
        found = {name: sorted(p for p in self.taken if p.name == name) for name in names}
        return {name: tuple(self.taken[place] for place in places) for name, places in found.items()}


@dataclass(frozen=True, eq=False)
class Past:
    """What a run has computed so far: its calls, the last one's noise level, and the last two fresh values by name."""

    calls: int = 0
    sigma: float = math.inf
    known: Mapping[str, tuple[Known, ...]] = field(default_factory=dict)

    def line(
        self, name: str, order: int, sigma: float, level: Level, gap: int, side: str = "both", mean: bool = False
    ) -> Line | None:
        """A stored value for a call at `sigma`; None if it is missing or too old, or is of the other side's rows.

        mean: over the two sides; of a value of one side that value.
        """
        known = self.known.get(name, ())[-1 - order :]
        if len(known) <= order:
            return None
        last = known[-1]
        if self.calls - last.call > gap or last.sigma > level.max_ratio * sigma:
            return None
        if mean and last.side == "both":
            return Line(last.values, mean=True)
        if not all(each.serves(side) for each in known):
            return None
        if order == 0:
            return Line(last.of(side))
        before = known[0]
        here, there = axis(before.sigma), axis(last.sigma)
        return Line(last.of(side), before.of(side), (axis(sigma) - there) / (there - here))

    def detached(self) -> Past:
        """Without the gradient of what is stored, but of whole outputs: those enter behind the U-Net."""
        free = {name: found for name, found in self.known.items() if name == "output"}
        return replace(self, known={**self.mapped(lambda *of: of[-1].detach()).known, **free})

    def mapped(self, part: Callable[[str, Known, Tensor], Tensor]) -> Past:
        """With every stored tensor changed: `part(name of the value, the value, tensor)`."""
        known = {
            name: tuple(each._replace(values=tuple(part(name, each, v) for v in each.values)) for each in found)
            for name, found in self.known.items()
        }
        return replace(self, known=known)


class Acts:
    """A plan for one U-Net: which frame each call gets.

    actions: None where only the text's keys and values are kept.
    """

    def __init__(self, patterns: Patterns, actions: Actions | None) -> None:
        """Raises UserError if the plan needs what this U-Net has not."""
        self.patterns, self.actions = patterns, actions
        for action in actions.patterns if actions is not None else ():
            patterns[action]

    def frame(self, past: Past, sigma: float, guided: bool, texts: Texts | None = None) -> tuple[Past, Frame]:
        """Of a call at VE sigma: the past that holds for it (empty if a new picture starts), and the frame.

        guided: whether the rows are [unconditional, conditional]; else an action on guidance means full, and one of
        one side all rows.
        """
        if self.actions is None:
            return past, Frame(self.patterns[FULL], texts=texts)
        if not sigma <= past.sigma:
            past = Past()
        level = self.actions.at(sigma)
        action, given = level.action if guided else level.action.unpaired, dict[str, Line]()
        if action != FULL:
            found = None if sigma == past.sigma else self._given(past, sigma, level, action)
            action, given = (FULL, {}) if found is None else (action, found)
        keep = frozenset[str]()
        if action == FULL or action.kind == "sites":
            later = self.actions.read_later(sigma)
            keep = frozenset(
                name for act in later if action == FULL or act.kind == "sites" for name in self.names(act)
                if name != "guidance" or guided
            )  # fmt: skip
        return past, Frame(self.patterns[action], PLAIN, given, keep - given.keys(), texts)

    def _given(self, past: Past, sigma: float, level: Level, action: Action) -> dict[str, Line] | None:
        """What a cheap call takes; None if that is not there."""
        assert self.actions is not None
        gap, side = self.actions.max_gap, action.cfg_branch
        if action.kind != "sites":
            line = past.line(action.place, action.order, sigma, level, gap)
            return None if line is None else {action.place: line}
        rules = {site.id: rule for site, rule in self.patterns.ruled(action).items() if rule != "skip"}
        lines = {
            name: past.line(name, rule == "extrapolate", sigma, level, gap, side, rule == "mean")
            for name, rule in rules.items()
        }
        if side != "both" and None in lines.values():
            return None
        return {name: line for name, line in lines.items() if line is not None}

    def names(self, action: Action) -> tuple[str, ...]:
        """Names of the stored values that an action may read."""
        if action.kind != "sites":
            return (action.place,) if action.place else ()
        return tuple(site.id for site, rule in self.patterns.ruled(action).items() if rule != "skip")

    def after(self, past: Past, frame: Frame, sigma: float) -> Past:
        """The past after a call, with what no later call reads dropped."""
        if self.actions is None:
            return Past(past.calls + 1, sigma)
        readable = {name for action in self.actions.read_later(sigma) for name in self.names(action)}
        known = {name: found for name, found in past.known.items() if name in readable}
        for name, values in frame.values().items():
            before = [each for each in known.get(name, ()) if each.sigma > sigma]
            known[name] = (*before[-1:], Known(sigma, past.calls, values, frame.pattern.side))
        return Past(past.calls + 1, sigma, known)


def joined(pasts: Sequence[Past], sides: int) -> Past:
    """Of branches that go through the U-Net together; their calls were at the same levels.

    Rows of a value: [side, branch, row]. sides: of a call, 1 without guidance, 2 with it, 3 where the source picture
    has guidance of its own; a whole output has 2 at most, the difference of the sides, and what a call of one side
    computes, but one.
    """
    first = pasts[0]
    known = {
        name: tuple(
            each._replace(values=tuple(
                _stacked([past.known[name][i].values[j] for past in pasts], _sides(name, each, sides))
                for j in range(len(each.values))
            ))
            for i, each in enumerate(found)
        )
        for name, found in first.known.items()
    }  # fmt: skip
    return replace(first, known=known)


def _sides(name: str, known: Known, sides: int) -> int:
    if name == "guidance" or known.side != "both":
        return 1
    return min(sides, 2) if name == "output" else sides


def _stacked(values: Sequence[Tensor], sides: int) -> Tensor:
    pieces = [value.chunk(sides) for value in values]
    return torch.cat([piece for side in zip(*pieces, strict=True) for piece in side])


def parted(past: Past, count: int, sides: int) -> list[Past]:
    """The inverse of `joined` for `count` branches."""

    def part(i: int) -> Past:
        def own(name: str, known: Known, value: Tensor) -> Tensor:
            return torch.cat(value.chunk(_sides(name, known, sides) * count)[i::count])

        return past.mapped(own)

    return [part(i) for i in range(count)]
