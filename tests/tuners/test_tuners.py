"""The contract of every tuner, and what is particular to Optuna's."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from rwopt.errors import UserError
from rwopt.tuners import SAMPLERS, Candidate, Parameter, Trial, top
from rwopt.tuners.optuna import OptunaTuner, choose_sampler

pytestmark = pytest.mark.filterwarnings("ignore")
BOX = [Parameter("guidance", 1.0, 12.0, step=0.25), Parameter("strength", 0.3, 1.0, step=0.05),
       Parameter("k0/self", -0.8, 0.9), Parameter("rate", 1e-3, 1.0, log=True)]  # fmt: skip
STARTS = {"recipe": {"guidance": 4.1, "strength": 0.7, "k0/self": 0.0, "rate": 0.1},
          "far": {"guidance": 99.0, "strength": 0.0, "k0/self": -5.0, "rate": 5.0}}  # fmt: skip
Make = Callable[..., OptunaTuner]


def opener(storage: Any) -> Make:
    def open_study(sampler: str = "random", **changes: Any) -> OptunaTuner:
        options = {"study": "s", "space": BOX, "trials": 10, "seed": 3, "starts": STARTS, "fingerprint": "f", **changes}
        return OptunaTuner(storage=storage, sampler=sampler, **options)

    return open_study


@pytest.fixture
def make() -> Make:
    """Open (again) the study of this test, which outlives its tuners in memory: a hundred times faster than a file."""
    return opener(InMemoryStorage())


@pytest.fixture
def make_file(tmp_path: Path) -> Make:
    """The same in `study.db`, as a search has it."""
    return opener(f"sqlite:///{tmp_path / 'study.db'}")


def objective(values: Mapping[str, float]) -> float:
    return -((values["k0/self"] - 0.5) ** 2) - (values["strength"] - 0.5) ** 2


def turn(tuner: OptunaTuner, count: int) -> list[Candidate]:
    out = []
    for _ in range(count):
        out.append(tuner.propose())
        tuner.observe(out[-1], objective(out[-1].values))
    return out


def values(trials: Sequence[Trial]) -> list[dict[str, float]]:
    return [dict(t.candidate.values) for t in trials]


def inside(candidate: Candidate, box: Sequence[Parameter] = tuple(BOX)) -> bool:
    """In the bounds and on the grid, to the last digit."""
    assert candidate.values.keys() == {p.name for p in box}
    return all(
        p.low <= candidate.values[p.name] <= p.high and p.clip(candidate.values[p.name]) == candidate.values[p.name]
        for p in box
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
class TestContract:
    """What holds for every sampler."""

    def test_starts_come_first_clipped_then_the_box_is_searched(self, make: Make, sampler: str) -> None:
        tuner = make(sampler)
        made = turn(tuner, 5)
        assert [c.origin for c in made] == ["recipe", "far", "sampler", "sampler", "sampler"]
        assert made[0].values == {"guidance": 4.0, "strength": 0.7, "k0/self": 0.0, "rate": 0.1}
        assert made[1].values == {"guidance": 12.0, "strength": 0.3, "k0/self": -0.8, "rate": 1.0}
        assert all(inside(c) for c in made)
        assert values(tuner.trials()) == [dict(c.values) for c in made]
        assert [t.score for t in tuner.trials()] == [objective(c.values) for c in made]

    def test_reopening_keeps_all_trials_and_goes_on(self, make: Make, sampler: str) -> None:
        first = turn(make(sampler), 4)
        again = make(sampler)
        assert values(again.trials()) == [dict(c.values) for c in first]
        assert [t.candidate.origin for t in again.trials()] == [c.origin for c in first]
        new = turn(again, 1)[0]
        assert new.origin == "sampler"  # the starts are not tried twice
        assert dict(new.values) not in [dict(c.values) for c in first]
        assert len(make(sampler).trials()) == 5

    @pytest.mark.parametrize("done", [0, 1, 3])
    def test_a_killed_proposal_comes_again_once(self, make: Make, sampler: str, done: int) -> None:
        before = turn(make(sampler), done)
        lost = make(sampler).propose()
        killed_again = make(sampler)
        ahead = sum(o not in [c.origin for c in [*before, lost]] for o in STARTS)  # starts that still wait
        turn(killed_again, ahead)
        assert dict(killed_again.propose().values) == dict(lost.values)
        tuner = make(sampler)
        retry = tuner.propose()
        assert (dict(retry.values), retry.origin) == (dict(lost.values), lost.origin)
        tuner.observe(retry, 1.0)
        rest = turn(tuner, 2)
        final = make(sampler)
        assert values(final.trials()).count(dict(lost.values)) == 1
        assert len(final.trials()) == done + ahead + 1 + 2
        assert dict(lost.values) not in [dict(c.values) for c in rest]

    def test_a_score_that_is_not_finite_fails(self, make: Make, sampler: str) -> None:
        tuner = make(sampler)
        for bad in (math.nan, math.inf, -math.inf):
            tuner.observe(tuner.propose(), bad)
        turn(tuner, 1)
        assert len(tuner.trials()) == len(make(sampler).trials()) == 1
        assert all(math.isfinite(t.score) for t in tuner.trials())

    def test_another_fingerprint_is_refused(self, make: Make, sampler: str) -> None:
        turn(make(sampler), 1)
        with pytest.raises(UserError, match="another recipe"):
            make(sampler, fingerprint="g")
        assert len(make(sampler).trials()) == 1

    def test_the_same_state_and_seed_propose_the_same(self, sampler: str) -> None:
        proposals = []
        for seed in (3, 3, 4):
            make = opener(InMemoryStorage())
            turn(make(sampler), 3)
            proposals.append(dict(make(sampler, seed=seed).propose().values))
        assert proposals[0] == proposals[1]
        assert proposals[0] != proposals[2]

    def test_prices_are_kept(self, make: Make, sampler: str) -> None:
        tuner = make(sampler)
        tuner.observe(tuner.propose(), 0.5, calls=7)
        tuner.observe(tuner.propose(), 0.6)
        assert [t.calls for t in make(sampler).trials()] == [7, 0]


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_models_beat_random_search_on_a_quadratic(make: Make, sampler: str) -> None:
    box = [Parameter(f"x{i}", -1.0, 1.0) for i in range(3)]

    def best(kind: str, seed: int) -> float:
        tuner = make(kind, study=f"{kind} {seed}", space=box, starts={"zero": {p.name: 0.0 for p in box}}, seed=seed)
        for _ in range(16):
            candidate = tuner.propose()
            tuner.observe(candidate, -sum((x - 0.45) ** 2 for x in candidate.values.values()))
        return max(t.score for t in tuner.trials())

    ours, chance = (sum(best(kind, seed) for seed in range(2)) / 2 for kind in (sampler, "random"))
    assert ours > chance
    assert ours > -0.3  # the start scores -0.61


def test_a_study_in_a_file_outlives_its_process(make_file: Make) -> None:
    made = turn(make_file(), 3)
    lost = make_file().propose()
    again = make_file()
    assert values(again.trials()) == [dict(c.values) for c in made]
    assert dict(again.propose().values) == dict(lost.values)
    assert make_file(study="other", starts={}).propose().origin == "sampler"


def test_a_kill_before_the_parameters_are_known_keeps_the_start(make_file: Make, tmp_path: Path) -> None:
    make_file().propose()
    with sqlite3.connect(tmp_path / "study.db") as database:  # as between Optuna's two transactions
        database.execute("delete from trial_params")
    tuner = make_file()
    assert sorted(c.origin for c in turn(tuner, 3)) == ["far", "recipe", "sampler"]


def test_a_kill_between_queueing_and_failing_does_not_queue_twice(make_file: Make, tmp_path: Path) -> None:
    lost = make_file().propose()
    make_file()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update trials set state = 'RUNNING' where number = ?", (lost.number,))
    tuner = make_file()
    turn(tuner, 4)
    assert values(tuner.trials()).count(dict(lost.values)) == 1


@pytest.mark.parametrize(
    ("name", "dimension", "trials", "kind"),
    [("auto", 2, 40, "gp"), ("auto", 30, 250, "gp"), ("auto", 31, 250, "tpe"), ("auto", 30, 251, "tpe"),
     ("auto", 500, 40, "tpe"), ("auto", 2, 999, "tpe"), ("auto", 2, 1000, "cmaes"), ("auto", 200, 5000, "cmaes"),
     ("tpe", 2, 40, "tpe"), ("gp", 200, 5000, "gp"), ("random", 2, 5000, "random"), ("cmaes", 2, 3, "cmaes")],
)  # fmt: skip
def test_the_rule_of_auto(name: str, dimension: int, trials: int, kind: str) -> None:
    assert choose_sampler(name, dimension, trials) == kind


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuner\.sampler=gpp.*tpe"):
        choose_sampler("gpp", 2, 40)


@pytest.mark.parametrize(
    ("parameter", "value", "clipped"),
    [
        (Parameter("x", 0, 1), 0.123, 0.123),
        (Parameter("x", 0, 1), -3, 0),
        (Parameter("x", 0.3, 1.0, step=0.05), 0.6 + 1e-12, 0.6),
        (Parameter("x", 0.3, 1.0, step=0.05), 2, 1.0),
        (Parameter("x", 0.3, 1.0, step=0.05), 0.624, 0.6),
        (Parameter("x", 1, 12.1, step=0.25), 12.1, 12.0),
        (Parameter("x", 1, 12.2, step=0.25), 99, 12.0),
        (Parameter("x", 1, 1.1, step=0.25), 1.1, 1.0),
    ],
)
def test_clipping_goes_to_the_nearest_point_of_the_box(parameter: Parameter, value: float, clipped: float) -> None:
    assert parameter.clip(value) == clipped
    assert parameter.clip(parameter.clip(value)) == clipped


def test_top_wants_different_values_and_says_when_there_are_none() -> None:
    scores = [(1, 0.1), (2, 0.9), (2, 0.9), (3, 0.5)]
    trials = [Trial(Candidate(i, {"x": x}), score) for i, (x, score) in enumerate(scores)]
    assert [t.candidate.values["x"] for t in top(trials, 2)] == [2, 3]
    assert [t.candidate.values["x"] for t in top(trials, 9)] == [2, 3, 1]
    with pytest.raises(UserError, match="no trial has a score"):
        top([], 3)
