"""The dynamic program finds what trying every plan finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.schedule.actions import FULL, Action, Actions, by_letters
from rwopt.tuners.plan import Errors, front, predicted, proposals, refreshes

OUTPUT, LINE, CUT, CROSS = by_letters("ho1x")
PRICES = {OUTPUT: 0.0, LINE: 0.0, CUT: 0.2, CROSS: 0.9}


def errors(calls: int, seed: int = 0) -> Errors:
    """Random, each call, action and pair of sources for itself."""
    rng = np.random.default_rng(seed)
    known = rng.exponential(size=(calls, len(PRICES), calls, calls + 1))
    return lambda i, action, last, before: float(known[i, list(PRICES).index(action), last, before + 1])


def every_plan(calls: int, max_gap: int) -> list[tuple[Action, ...]]:
    """All that `Actions.along` takes, which knows nothing of the dynamic program; the first and sites by hand."""
    sigmas = np.geomspace(10, 0.1, calls).tolist()
    found = []
    for plan in itertools.product((FULL, *PRICES), repeat=calls):
        try:
            Actions.along(sigmas, plan, max_gap)
        except UserError:
            continue
        fresh = [[j for j in range(i) if plan[j] == FULL] for i in range(calls)]
        if all(f and i - f[-1] <= max_gap for i, f in enumerate(fresh) if plan[i] == CROSS):
            found.append(plan)
    return found


def price(plan: tuple[Action, ...]) -> float:
    return sum(1.0 if action == FULL else PRICES[action] for action in plan)


@pytest.mark.parametrize("max_gap", [1, 2])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_front_is_that_of_every_plan(max_gap: int, power: float) -> None:
    calls, error = 5, errors(5)
    plans = every_plan(calls, max_gap)
    cost = np.array([price(plan) for plan in plans])
    total = np.array([predicted(plan, lambda *at: error(*at) ** power) for plan in plans])
    found = front(calls, PRICES, error, max_gap, power=power, resolution=0.0)
    assert found[0].actions[0] == FULL
    assert found[-1].actions == (FULL,) * calls
    assert found[-1].error == 0
    for most in np.arange(1, calls + 0.05, 0.1):
        there = total[cost <= most + 1e-9]
        ours = [p.error for p in found if p.price <= most + 1e-9]
        assert bool(len(there)) == bool(ours)
        if len(there):
            assert min(ours) == pytest.approx(there.min())
    for plan in found:
        assert plan.price == pytest.approx(price(plan.actions))
        assert plan.error == pytest.approx(predicted(plan.actions, lambda *at: error(*at) ** power))
        assert plan.actions in plans


def test_a_dear_early_error_is_avoided_without_a_rule() -> None:
    def error(i: int, action: Action, last: int, before: int) -> float:
        return 100.0 if i < 4 else 1.0

    best = front(10, {LINE: 0.0}, error, 1, most=7.0)[-1]
    assert best.text[:4] == "FFFF"
    assert best.price == 7
    assert best.error == 3


def test_plans_of_coarse_prices_are_near_the_exact_ones_and_never_dearer() -> None:
    calls, error = 14, errors(14, 1)
    exact = front(calls, PRICES, error, most=8.5, resolution=0.0)[-1]
    coarse = front(calls, PRICES, error, most=8.5, resolution=0.05)[-1]
    assert coarse.price <= 8.5
    assert exact.error <= coarse.error < 1.2 * exact.error


def test_proposals_are_different_affordable_and_hold_the_best_of_all() -> None:
    calls, error = 9, errors(9, 2)
    found = proposals(calls, PRICES, error, most=5.5, count=50)
    assert len({p.text for p in found}) == len(found) > 5
    assert max(p.price for p in found) <= 5.5
    assert [p.error for p in found] == sorted(p.error for p in found)
    best = front(calls, PRICES, error, most=5.5)[-1]
    assert found[0].error == pytest.approx(best.error)
    assert {"1"} in [set(p.text) - {"F"} for p in found]  # one place alone is among them
    assert [p.text for p in proposals(calls, PRICES, error, most=5.5, count=3)] == [p.text for p in found[:3]]
    assert proposals(calls, {CROSS: 0.9}, error, most=2.0) == []


def test_too_small_a_price_says_so() -> None:
    with pytest.raises(UserError, match=r"no plan of 4 calls costs at most 0\.5 full calls"):
        front(4, PRICES, errors(4), most=0.5)


@pytest.mark.parametrize(("letter", "takes"), [("F", 0), ("h", 1), ("o", 2), ("1", 1), ("a", 2), ("x", 1), ("X", 2)])
def test_how_many_full_calls_an_action_takes(letter: str, takes: int) -> None:
    (action,) = by_letters(letter)
    assert action.takes == takes


def test_a_skip_takes_none() -> None:
    assert Action("sites", sites=(("ff", "skip"),)).takes == 0


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_refreshes_are_the_best_of_all_sets(count: int) -> None:
    calls = 7
    table = np.random.default_rng(3).random((calls, calls))

    def value(chosen: tuple[int, ...]) -> float:
        return sum(float(table[max(i for i in chosen if i <= j), j]) for j in range(calls))

    found = refreshes(lambda i, j: float(table[i, j]), calls, count)
    every = [(0, *others) for others in itertools.combinations(range(1, calls), count - 1)]
    assert found in every
    assert value(found) == pytest.approx(max(map(value, every)))


def test_refreshes_of_no_call_are_refused() -> None:
    with pytest.raises(UserError, match=r"refreshes=0 is outside 1 \.\. 3"):
        refreshes(lambda i, j: 1.0, 3, 0)
