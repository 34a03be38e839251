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


SEVERAL = ("objective", "-judge.distance")


def two(values: Mapping[str, float]) -> tuple[float, float]:
    """A trade-off in one number: k0/self up is good for the first and bad for the second."""
    return values["k0/self"], -(values["k0/self"] ** 2)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "cmaes"])
def test_several_objectives_are_kept_with_their_limits(make: Make, sampler: str) -> None:
    tuner = make(sampler, objectives=SEVERAL, limited=True)
    for i in range(12):
        candidate = tuner.propose()
        tuner.observe(candidate, two(candidate.values), 2, {"scorer.kept": 0.25 if i == 3 else -0.5})
    tuner.observe(tuner.propose(), (1.0, math.nan), 2, {"scorer.kept": 0.0})
    trials = make(sampler, objectives=SEVERAL, limited=True).trials()
    assert len(trials) == 12
    assert [t.scores for t in trials] == [two(t.candidate.values) for t in trials]
    assert [t.score for t in trials] == [t.scores[0] for t in trials]
    assert [t.excess for t in trials] == [0.25 if i == 3 else 0.0 for i in range(12)]
    assert trials[3] == top(trials, 12)[-1]  # whatever its score, it breaks a limit
    assert tuner.study.metric_names == list(SEVERAL)
    feasible = {t.number for t in tuner.study.best_trials}
    assert feasible
    assert trials[3].candidate.number not in feasible


def test_a_limit_keeps_the_search_off_what_breaks_it(make: Make) -> None:
    """The score rises with x, and x may not exceed 0.3."""
    box = [Parameter("x", 0.0, 1.0), Parameter("y", 0.0, 1.0)]
    tried = []
    for limited in (False, True):
        tuner = make("tpe", study=str(limited), space=box, starts={"zero": {"x": 0.0, "y": 0.0}}, limited=limited)
        for _ in range(30):
            c = tuner.propose()
            tuner.observe(c, c.values["x"], 0, {"budget": c.values["x"] - 0.3} if limited else None)
        tried.append([t.candidate.values["x"] for t in tuner.trials()[-15:]])
    assert max(tried[0]) > 0.9
    assert sum(x <= 0.3 for x in tried[1]) > sum(x <= 0.3 for x in tried[0])


def test_losers_are_given_up_case_by_case_and_count(make: Make) -> None:
    """Cases differ far more than candidates do: only a paired test can tell them apart."""
    cases = {i: 10.0 * math.sin(7 * i) for i in range(40)}
    tuner = make("random", prune=0.05, starts={"good": {"guidance": 4, "strength": 0.5, "k0/self": 0.5, "rate": 0.1}})

    def run(shift: float) -> tuple[Candidate, int]:
        candidate, seen = tuner.propose(), 0
        for case, level in cases.items():
            seen += 1
            noise = 0.3 * math.cos(5 * case + candidate.number)
            if tuner.report(candidate, {case: level + shift + noise}):
                tuner.prune(candidate, seen)
                return candidate, seen
        tuner.observe(candidate, shift, seen)
        return candidate, seen

    best, seen = run(0.0)
    assert seen == 40  # nothing to lose against
    losers = [run(-1.0) for _ in range(4)]
    assert all(8 <= n < 20 for _, n in losers)
    better, seen = run(+1.0)
    assert seen == 40
    assert [t.candidate.number for t in tuner.trials()] == [best.number, better.number]
    ended = make("random", prune=0.05, starts={}).ended()
    assert [t.calls for t in ended if math.isnan(t.score)] == [n for _, n in losers]
    assert len(ended) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [({"sampler": "cmaes", "objectives": SEVERAL}, "cmaes takes one objective, not 2"),
     ({"prune": 0.1, "objectives": SEVERAL}, "compares by one objective"),
     ({"sampler": "nsga"}, "did you mean nsga")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(make: Make, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**options)


@pytest.mark.parametrize(
    ("dimension", "trials", "objectives", "limited", "kind"),
    [(9, 100, 2, False, "gp"), (9, 100, 4, False, "tpe"), (40, 100, 2, False, "tpe"), (9, 2000, 2, False, "nsga2"),
     (9, 2000, 4, False, "nsga3"), (9, 2000, 1, True, "tpe"), (9, 2000, 2, True, "tpe"), (9, 100, 1, True, "gp")],
)  # fmt: skip
def test_the_rule_of_auto_with_several_objectives_and_limits(
    dimension: int, trials: int, objectives: int, limited: bool, kind: str
) -> None:
    assert choose_sampler("auto", dimension, trials, objectives, limited) == kind
