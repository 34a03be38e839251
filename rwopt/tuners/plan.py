"""Which action each call of a run should take, under a price: a dynamic program over additive errors.

A cheap call makes an error that hangs on the action and on the full calls whose values it takes: the last one (order 0)
and the one before it (order 1). If errors of different calls add up, the best plan for every price follows from states
(last full call, the one before) alone, of which there are few since a value serves at most `max_gap` calls: BAC's
refresh times of one block (arXiv 2506.13456) are the case of a single action. First calls that must not be cheap need
no rule here: their errors weigh what they do to the end.

Errors of one kind add more than independently, and no error is measured behind another one, so a sum ranks plans only
roughly. `proposals` therefore gives many, from different sets of actions and two ways to add, for others to try out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rwopt.errors import UserError
from rwopt.schedule.actions import FULL, MAX_GAP, Action

Errors = Callable[[int, Action, int, int], float]
"""(call, cheap action, last full call before it, the full call before that or -1) -> error, 0 or more."""

POWERS = (1.0, 0.5)
"""Errors are squares: added as they are (independent), or as their roots (all in one direction)."""


@dataclass(frozen=True)
class Proposal:
    """A plan: the action of each call, its price in full calls, and the error that was predicted."""

    actions: tuple[Action, ...]
    price: float
    error: float

    @property
    def text(self) -> str:
        """One letter a call, "FFFoFoF"."""
        return "".join(action.letter for action in self.actions)


@dataclass(frozen=True)
class _Label:
    """A way to a state; `before` is the way to the state before it."""

    price: float
    error: float
    action: Action
    before: _Label | None

    def plan(self) -> tuple[Action, ...]:
        found, label = list[Action](), self
        while label.before is not None:
            found.append(label.action)
            label = label.before
        return tuple(reversed(found))


def front(
    calls: int, prices: Mapping[Action, float], error: Errors, max_gap: int = MAX_GAP, most: float = math.inf,
    power: float = 1.0, resolution: float = 0.01,
) -> list[Proposal]:  # fmt: skip
    """The plans of `calls` calls that no other beats in price and sum of error^power, cheapest first.

    prices: in full calls, of each cheap action that may be taken, 0 or more; a full call costs 1. most: the highest
    price. resolution: of plans whose prices differ by less only the better is followed, which bounds the work; with
    0 the front is exact. Raises `UserError` where no plan is cheap enough.
    """
    states: dict[tuple[int, int], list[_Label]] = {(-1, -1): [_Label(0.0, 0.0, FULL, None)]}
    for i in range(calls):
        reached: dict[tuple[int, int], list[_Label]] = {}
        for (last, before), labels in states.items():
            moves = [(FULL, 1.0, 0.0, (i, last))]
            for action, price in prices.items():
                takes = action.takes
                if action == FULL or (takes and (last < 0 or i - last > max_gap)) or (takes == 2 and before < 0):
                    continue
                moves.append((action, price, error(i, action, last, before) ** power, (last, before)))
            for action, price, more, state in moves:
                new = [_Label(a.price + price, a.error + more, action, a) for a in labels if a.price + price <= most]
                reached.setdefault(state, []).extend(new)
        states = {state: _undominated(labels, resolution) for state, labels in reached.items() if labels}
    ends = _undominated([label for labels in states.values() for label in labels], 0.0)
    if not ends:
        raise UserError(f"no plan of {calls} calls costs at most {most:.3g} full calls: raise task.budget")
    return [Proposal(label.plan(), label.price, label.error) for label in ends]


def _undominated(labels: Sequence[_Label], resolution: float) -> list[_Label]:
    """Rising in price, falling in error; one at most in each interval of prices of width `resolution`."""
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda a: (a.price, a.error)):
        if kept and label.error >= kept[-1].error:
            continue
        if kept and resolution and math.floor(label.price / resolution) == math.floor(kept[-1].price / resolution):
            kept[-1] = label
        else:
            kept.append(label)
    return kept


def proposals(
    calls: int, prices: Mapping[Action, float], error: Errors, most: float, max_gap: int = MAX_GAP, count: int = 12
) -> list[Proposal]:
    """Different plans that cost at most `most` full calls, of the smallest summed errors first, `count` at most.

    The best two of each place at which values are stored, of all actions but one place, and of all; of each gap up to
    `max_gap` and each of `POWERS`. Empty if none is cheap enough.
    """
    places = list(dict.fromkeys(_place(action) for action in prices))
    sets = [{place} for place in places] + [set(places) - {place} for place in places] + [set(places)]
    found: dict[tuple[Action, ...], Proposal] = {}
    tried = set[frozenset[str]]()
    for chosen in sets:
        if not chosen or frozenset(chosen) in tried:
            continue
        tried.add(frozenset(chosen))
        some = {action: price for action, price in prices.items() if _place(action) in chosen}
        for gap in range(1, max_gap + 1):
            for power in POWERS:
                try:
                    best = front(calls, some, error, gap, most, power)[-2:]
                except UserError:
                    continue
                for plan in best:
                    found.setdefault(plan.actions, Proposal(plan.actions, plan.price, predicted(plan.actions, error)))
    return sorted(found.values(), key=lambda p: p.error)[:count]


def predicted(plan: Sequence[Action], error: Errors) -> float:
    """The sum of a plan's errors."""
    total, last, before = 0.0, -1, -1
    for i, action in enumerate(plan):
        if action == FULL:
            last, before = i, last
        else:
            total += error(i, action, last, before)
    return total


def _place(action: Action) -> str:
    return action.place or " ".join(name for name, _ in action.sites)


def refreshes(gain: Callable[[int, int], float], calls: int, count: int) -> tuple[int, ...]:
    """The `count` calls, the first among them, at which a cache is refreshed so that summed gains are largest.

    gain(i, j): what call j is worth with the cache of call i <= j, such as the cosine similarity of their features
    (BAC, arXiv 2506.13456). Exact: O(calls^2 count) steps. Raises `UserError` for a count outside 1 .. calls.
    """
    if not 1 <= count <= calls:
        raise UserError(f"refreshes={count} is outside 1 .. {calls}: give as many as there are calls, or fewer")
    served = [[0.0] * (calls + 1) for _ in range(calls)]  # [i][j]: calls i .. j - 1 with the cache of i
    for i in range(calls):
        for j in range(i, calls):
            served[i][j + 1] = served[i][j] + gain(i, j)
    best: list[tuple[float, tuple[int, ...]]] = [(served[0][j], (0,)) for j in range(calls + 1)]  # calls before j
    for used in range(1, count):
        best = [
            max(
                ((best[i][0] + served[i][j], (*best[i][1], i)) for i in range(used, j)),
                default=(-math.inf, ()),
            ) if j > used else (-math.inf, ())
            for j in range(calls + 1)
        ]  # fmt: skip
    return best[calls][1]
