"""Processes that share a study and are killed at random; what they leave is checked against the table alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from rwopt.tuners import Candidate, Parameter
from rwopt.tuners.loop import Outcome, Report, work
from rwopt.tuners.optuna import OptunaTuner, Sharing
from rwopt.tuners.storage import open_storage

SHARING = Sharing(heartbeat=1, grace=5)
BOX = [Parameter(f"k{k}/all", -0.8, 0.8) for k in range(3)]
STARTS = {"plain": {p.name: 0.0 for p in BOX}, "probe": {p.name: 0.1 for p in BOX}}
SCRIPT = "import sys; from helpers.workers import main; main(*sys.argv[1:])"


def objective(values: Mapping[str, float]) -> float:
    return -sum((x - 0.3) ** 2 for x in values.values())


def open_tuner(
    storage: str | BaseStorage, trials: int, study: str = "run/learned", sampler: str = "tpe"
) -> OptunaTuner:
    """The study's maker, as a search is."""
    return OptunaTuner(study, BOX, storage, trials, 1, sampler, STARTS, "f", sharing=SHARING)


def main(url: str, log: str, seconds: str, lock: str) -> None:
    """A worker: the loop of `rwopt worker` with a function that costs nothing but time."""

    def evaluate(candidate: Candidate, report: Report) -> Outcome:
        time.sleep(float(seconds) * random.uniform(0.5, 1.5))
        with open(log, "a") as out:
            out.write(f"{os.getpid()} {candidate.number}\n")
        return Outcome((objective(candidate.values),), calls=7)

    tuner = OptunaTuner.join("run/learned", open_storage(url, 1, 5, int(lock)), "f", SHARING)
    work(tuner, int(tuner.asked), evaluate, pause=0.05)


def start(url: str, log: Path, seconds: float, lock: int = 30) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, url, str(log), str(seconds), str(lock)], text=True,
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def killed_workers(
    url: str, log: Path, workers: int = 4, seconds: float = 0.3, every: float = 1.0, seed: int = 0, within: float = 90,
    kills: int | None = None, lock: int = 30,
) -> int:  # fmt: skip
    """Keep `workers` processes on the study, kill one at random about `every` seconds; the kills, when all have ended.

    A worker ends by itself when the study is met. Raises AssertionError if one fails, or if it takes too long.
    """
    rng, done = random.Random(seed), 0
    crew = [start(url, log, seconds, lock) for _ in range(workers)]
    end, strike = time.monotonic() + within, time.monotonic() + 1.5  # the first have to come up
    while crew:
        assert time.monotonic() < end, f"{len(crew)} workers still at it after {within} s and {done} kills"
        time.sleep(0.02)
        for worker in list(crew):
            if worker.poll() is not None:
                assert worker.returncode == 0, worker.communicate()[1]
                crew.remove(worker)
        if crew and time.monotonic() > strike and (kills is None or done < kills):
            strike = time.monotonic() + every * rng.uniform(0.5, 1.5)
            victim = rng.choice(crew)
            victim.kill()
            victim.communicate()
            crew.remove(victim)
            if victim.returncode:
                done += 1
                crew.append(start(url, log, seconds, lock))
    return done


def check_table(
    storage: BaseStorage, asked: int, study: str = "run/learned", unique: bool = True
) -> list[optuna.trial.FrozenTrial]:
    """Raise unless the study has exactly the trials asked for: each proposal scored once, none lost, none left open.

    Told from Optuna's own table by other means than `rwopt.tuners.leases` has: by values. Returns the scored trials.
    unique: whether the sampler never proposes a point again (a child of NSGA may be its parent's twin).
    """
    trials = optuna.load_study(study_name=study, storage=storage).get_trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    assert all(t.state.is_finished() for t in trials), [t.state for t in trials]
    scored = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(scored) == asked
    assert all(t.value == objective(t.params) for t in scored)
    points = Counter(tuple(sorted(t.params.items())) for t in scored)
    if unique:
        assert set(points.values()) == {1}  # nothing counts twice
    for start_values in STARTS.values():
        assert points[tuple(sorted(start_values.items()))] >= 1
    for trial in trials:  # what was in a killed process's hands is among the scored, under a later number
        if trial.state == TrialState.FAIL and "reason" not in trial.user_attrs and len(trial.params) == len(BOX):
            assert points[tuple(sorted(trial.params.items()))] == 1, trial
    return scored
