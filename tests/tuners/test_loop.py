"""The loop over tuners of either kind, and over several of one study: what it does is the same for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.workers import BOX, SHARING, STARTS, check_table, objective, open_tuner
from optuna.storages import InMemoryStorage

from rwopt.errors import UserError
from rwopt.tuners import SAMPLERS, Candidate, Trial, Tuner
from rwopt.tuners.loop import Batched, Outcome, Report, _go_on, ended, work
from rwopt.tuners.optuna import OptunaTuner
from rwopt.tuners.spsa import SpsaTuner

pytestmark = pytest.mark.filterwarnings("ignore")
Open = Callable[[], Tuner]


@pytest.fixture(params=["optuna", "spsa"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    if request.param == "spsa":
        return lambda: SpsaTuner("s", BOX, tmp_path, 8, 0, STARTS, "f")
    storage = InMemoryStorage()
    return lambda: OptunaTuner("s", BOX, storage, 8, 0, "random", STARTS, "f")


def good(candidate: Candidate, report: Report) -> Outcome:
    return Outcome((objective(candidate.values),), 3)


def test_every_trial_is_told_once_also_those_of_before(reopen: Open) -> None:
    told: list[Trial] = []
    assert work(reopen(), 5, good, told.append) == 5
    again: list[Trial] = []
    assert work(reopen(), 8, good, again.append) == 3
    assert again[:5] == told
    assert [t.candidate.number for t in again] == sorted({t.candidate.number for t in again})
    assert ended(reopen()) == again
    assert all(t.score == objective(t.candidate.values) and t.calls == 3 for t in again)
    assert work(reopen(), 8, good) == 0


def test_what_fails_is_replaced_until_it_is_too_much(reopen: Open) -> None:
    count = 0

    def sometimes(candidate: Candidate, report: Report) -> Outcome:
        nonlocal count
        count += 1
        return Outcome((math.nan if count % 3 == 0 else 0.5,))

    assert work(reopen(), 8, sometimes) == 8
    assert count == 8 + 3
    with pytest.raises(UserError, match="arm x: 13 candidates had no finite objective"):
        work(reopen(), 12, lambda candidate, report: Outcome((math.inf,)), name="arm x")
    assert len(ended(reopen())) == 8


def test_a_crash_gives_back_what_was_in_hand(reopen: Open) -> None:
    held: list[Candidate] = []

    def crash(candidate: Candidate, report: Report) -> Outcome:
        held.append(candidate)
        raise MemoryError

    with pytest.raises(MemoryError):
        work(reopen(), 4, crash)
    told: list[Trial] = []
    work(reopen(), 4, good, told.append)
    assert [t.candidate.values for t in told].count(held[0].values) == 1


@pytest.mark.parametrize("size", [2, 3, 20])
def test_several_at_once_are_the_trials_of_one_by_one(reopen: Open, tmp_path: Path, size: int) -> None:
    """SPSA proposes its starts and each pair; random search whatever is missing. A kill between scores loses none."""
    sizes: list[int] = []

    def score(candidates: Sequence[Candidate]) -> list[Outcome]:
        sizes.append(len(candidates))
        return [good(candidate, _go_on) for candidate in candidates]

    told: list[Trial] = []
    assert work(reopen(), 8, good, told.append, batched=Batched(size, score)) == 8
    most = 2 if isinstance(reopen(), SpsaTuner) else min(size, 8)
    assert max(sizes) == most
    assert [t.candidate.number for t in told] == list(range(8))
    assert all(t.score == objective(t.candidate.values) for t in told)
    if isinstance(reopen(), SpsaTuner):
        alone: list[Trial] = []
        work(SpsaTuner("s", BOX, tmp_path / "alone", 8, 0, STARTS, "f"), 8, good, alone.append)
        assert told == alone  # what a pair is does not depend on who of it is scored first


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_share_a_study_with_every_sampler(sampler: str) -> None:
    storage = InMemoryStorage()
    first = open_tuner(storage, 13, sampler=sampler)
    second = OptunaTuner.join("run/learned", storage, "f", SHARING)

    def both(candidate: Candidate, report: Report) -> Outcome:
        """While one has a candidate in hand the other takes, and does, another."""
        other = second.claim()
        if other is not None:
            second.observe(other, objective(other.values))
        return good(candidate, report)

    assert work(first, 13, both) == 7
    assert len(check_table(storage, 13, unique=not sampler.startswith("nsga"))) == 13
    assert second.look().met
