"""Several processes on one study: each trial ends once, none is lost, the number asked for is met."""

from __future__ import annotations

import importlib.util
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from helpers.postgres import binaries, server
from helpers.workers import BOX, SHARING, STARTS, check_table, killed_workers, objective, open_tuner
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.weights import WeightFunction
from rwopt.tuners import Candidate
from rwopt.tuners.leases import RETRIES, Ledger, gone, new_lease, process_start
from rwopt.tuners.loop import Outcome, Report, work
from rwopt.tuners.optuna import OptunaTuner
from rwopt.tuners.storage import open_storage

pytestmark = pytest.mark.filterwarnings("ignore")
STUDY = "run/learned"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A server of this module's own."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("its driver is not installed: pip install 'rwopt[postgres]'")
    with server() as url:
        yield url


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "journal"])
def test_workers_killed_at_random_lose_nothing(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Four processes, one of which is killed about every second; what they leave is a whole study and a schedule."""
    urls = {"sqlite": f"sqlite:///{tmp_path / 'shared.db'}", "journal": f"journal:{tmp_path / 'shared.log'}"}
    url, asked = urls.get(backend) or request.getfixturevalue("postgres"), 20
    tuner = open_tuner(url, asked)
    # in a journal a killed writer leaves its lock, which the others break after some seconds
    kills = killed_workers(url, tmp_path / "log", seconds=0.5, every=0.8, kills=6, lock=3)
    assert kills >= 3
    scored = check_table(open_storage(url), asked)
    assert len((tmp_path / "log").read_text().split("\n")) - 1 >= asked
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) > 2  # many took part
    assert [t.candidate.number for t in tuner.trials()] == [t.number for t in scored]
    best = max(tuner.trials(), key=lambda t: t.score)
    function = WeightFunction(("mid_block.attentions.0",), np.array([10.0, 1.0, 0.1]), {"all": [0]})
    function.schedule(np.array([best.candidate.values[n] for n in function.names])).save(tmp_path / "schedule.json")
    np.testing.assert_allclose(Schedule.load(tmp_path / "schedule.json").weights[:, 0],
                               np.exp([best.candidate.values[p.name] for p in BOX]), rtol=1e-5)  # fmt: skip


def crew(count: int, asked: int, storage: InMemoryStorage | None = None) -> list[OptunaTuner]:
    """Tuners of one study, as many processes would have them."""
    storage = storage or InMemoryStorage()
    return [open_tuner(storage, asked, sampler="random"),
            *(OptunaTuner.join(STUDY, storage, "f", SHARING) for _ in range(count - 1))]  # fmt: skip


def observe(tuner: OptunaTuner, candidates: Sequence[Candidate | None]) -> None:
    for candidate in candidates:
        assert candidate is not None
        tuner.observe(candidate, objective(candidate.values))


def test_no_more_is_handed_out_than_was_asked_for() -> None:
    a, b = crew(2, 3)
    held = [a.claim(), b.claim(), a.claim()]
    assert [c.origin for c in held if c] == ["plain", "probe", "sampler"]
    assert b.claim() is None
    assert not b.look().met
    observe(a, [held[0], held[2]])
    assert b.claim() is None  # the last one is in b's own hands
    observe(b, [held[1]])
    assert a.look().met
    assert b.claim() is None
    with pytest.raises(UserError, match="has its 3 trials"):
        a.propose()
    assert len(check_table(a.storage, 3)) == len(a.study.get_trials()) == 3  # nobody tried and was turned away


def test_of_two_that_look_at_once_one_gets_the_last_place() -> None:
    a, b = crew(2, 3)
    held = [a.claim(), a.claim()]
    seen_by_a, seen_by_b = a.look(), b.look()
    last = a.claim(seen_by_a)
    assert last is not None
    assert b.claim(seen_by_b) is None
    assert [t.user_attrs.get("reason") for t in a.study.get_trials()] == [None, None, None, "surplus"]
    observe(a, [*held, last])
    assert len(check_table(a.storage, 3)) == 3


def test_a_failed_candidate_makes_room_for_another() -> None:
    a, b = crew(2, 2)
    first, second = a.claim(), a.claim()
    assert first is not None
    assert b.claim() is None
    a.observe(first, math.nan)
    again = b.claim()
    assert again is not None
    assert again.origin == "sampler"  # it is not tried again: it was no accident
    observe(b, [again])
    observe(a, [second])
    assert a.look().met
    assert len(a.trials()) == 2


def test_who_asks_for_more_gets_more() -> None:
    a, b = crew(2, 2)
    observe(b, [b.claim(), b.claim()])
    assert a.look().met
    more = open_tuner(a.storage, 4)
    assert not b.look().met
    observe(b, [b.claim(), b.claim()])
    assert more.look().met
    assert open_tuner(a.storage, 3).asked == 4  # and nobody less


def test_workers_differ_in_what_they_propose() -> None:
    tuners = crew(3, 9)
    observe(tuners[0], [tuners[0].claim(), tuners[0].claim()])
    proposed = [tuple(c.values.values()) for t in tuners if (c := t.claim()) is not None]
    assert len(set(proposed)) == 3


def test_what_was_taken_for_lost_is_done_by_another_and_counts_once() -> None:
    a, b = crew(2, 3)
    slow = a.claim()
    assert slow is not None
    a._reaper.fail(slow.number)  # as when its lease has run out
    again = next(c for c in (b.claim(), b.claim(), b.claim()) if c and c.values == slow.values)
    assert (again.origin, again.number > slow.number) == ("plain", True)
    observe(b, [again])
    a.observe(slow, 99.0)  # too late: dropped without a word
    assert [t.score for t in a.trials()] == [objective(slow.values)]


def test_a_candidate_that_kills_whoever_takes_it_is_given_up() -> None:
    (a,) = crew(1, 2)
    for _ in range(RETRIES + 1):
        candidate = a.claim()
        assert candidate is not None
        assert candidate.origin == "plain" or _ > 0
        while candidate.values != STARTS["plain"]:
            observe(a, [candidate])
            candidate = a.claim()
            assert candidate is not None
        a.release()
    last = a.claim()
    assert last is not None
    assert last.values != STARTS["plain"]
    observe(a, [last])
    assert a.look().met


def test_two_that_queue_the_same_at_once_make_one_trial_of_it() -> None:
    """As when both saw the study without its starts, or both saw the same trial fail."""
    a, b = crew(2, 6)
    for name, values in STARTS.items():
        a.study.enqueue_trial(values, user_attrs={"origin": name})
    lost = a.claim()
    assert lost is not None
    a.release()
    for _ in range(2):
        a.study.enqueue_trial(dict(lost.values), user_attrs={"origin": lost.origin, "retry_of": lost.number})
    work(b, 6, lambda candidate, report: Outcome((objective(candidate.values),)))
    assert b.look().met
    trials = [t for t in a.study.get_trials() if t.state == TrialState.COMPLETE]
    assert len(trials) == 6
    assert len({tuple(t.params.items()) for t in trials}) == 6


@pytest.mark.parametrize("moves", [True, False])
def test_a_lease_of_another_machine_counts_while_it_moves(tmp_path: Path, moves: bool) -> None:
    """Of a machine that cannot be asked only the lease tells: it moves, or it has been seen still for the grace."""
    storage = open_storage(f"journal:{tmp_path / 'log'}")
    make = OptunaTuner(STUDY, BOX, storage, 2, 1, "random", STARTS, "f", sharing=replace(SHARING, grace=0.4))
    theirs = make.claim()
    assert theirs is not None
    make._hearts.pop(theirs.number).stop()
    make._open.clear()  # from here on another machine's
    number = storage.get_trial_id_from_study_id_trial_number(make._id, theirs.number)
    beats = 0
    end = time.monotonic() + 1.2
    while time.monotonic() < end and make.study.get_trials()[theirs.number].state == TrialState.RUNNING:
        beats += moves
        storage.set_trial_user_attr(number, "lease", {**new_lease(), "place": "elsewhere", "key": "k", "beat": beats})
        make.look()
        time.sleep(0.1)
    state = make.study.get_trials()[theirs.number].state
    assert state == (TrialState.RUNNING if moves else TrialState.FAIL)


def test_a_storage_that_fails_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    tuner = open_tuner(f"sqlite:///{path}", 3)

    def evaluate(candidate: Candidate, report: Report) -> Outcome:
        with sqlite3.connect(path) as database:
            database.execute("drop table trial_values")
        return Outcome((1.0,))

    with pytest.raises(UserError, match=r"run: the study's storage failed .*trial_values.*start again") as caught:
        work(tuner, 3, evaluate, name="run")
    assert "\n" not in str(caught.value)


def test_a_process_is_known_by_more_than_its_number() -> None:
    lease = new_lease()
    assert not gone(lease)
    assert gone({**lease, "start": lease["start"] + 1})  # the number was given to another process
    assert gone({**lease, "pid": 2**22 + 1})
    assert not gone({**lease, "pid": 2**22 + 1, "place": "elsewhere"})
    assert process_start(2**22 + 1) is None


def test_a_worker_does_not_join_what_is_not_its_own() -> None:
    storage = InMemoryStorage()
    with pytest.raises(UserError, match="is not in the storage: it has none"):
        OptunaTuner.join(STUDY, storage, "f", SHARING)
    OptunaTuner("alone", BOX, storage, 3, starts=STARTS, fingerprint="f")
    with pytest.raises(UserError, match=r"alone is not shared.*tuner\.storage=URL"):
        OptunaTuner.join("alone", storage, "f", SHARING)
    maker = open_tuner(storage, 3)
    before = [t.user_attrs for t in maker.study.get_trials()]
    with pytest.raises(UserError, match="another recipe or model"):
        OptunaTuner.join(STUDY, storage, "g", SHARING)
    assert [t.user_attrs for t in maker.study.get_trials()] == before


def test_the_ledger_of_an_empty_and_of_a_foreign_table() -> None:
    assert (Ledger([], 2).met, Ledger([], 2).full, Ledger([], 0).met) == (False, False, True)
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    study.tell(study.ask(), state=TrialState.FAIL)  # failed for reasons of its own: nothing is owed
    table = Ledger(study.get_trials(), 3)
    assert (table.met, table.owed, len(table.scored)) == (True, [], 3)
