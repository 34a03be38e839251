"""Simultaneous perturbation: exact resume, one row a trial, and progress where a gradient is not to be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.tuners import Candidate, Parameter
from rwopt.tuners.spsa import SpsaOptions, SpsaTuner

SPACE = [Parameter(f"w{i}", -0.8, 0.8) for i in range(6)] + [
    Parameter("guidance", 1.0, 12.0, step=0.25),
    Parameter("scale", 0.01, 1.0, log=True),
]
GOAL = np.array([0.5, -0.4, 0.3, 0.1, -0.2, 0.6, 7.0, 0.2])
PLAIN = {**{f"w{i}": 0.0 for i in range(6)}, "guidance": 4.0, "scale": 0.1}
FAR = {**PLAIN, "w0": -0.8, "guidance": 1.0}


def score(candidate: Candidate) -> float:
    x = np.array([candidate.values[p.name] for p in SPACE])
    width = np.array([1.6] * 6 + [11.0, 1.0])
    return float(-np.square((x - GOAL) / width).sum())


def tuner(folder: Path, trials: int = 40, **options: object) -> SpsaTuner:
    kept = SpsaOptions(**options)  # type: ignore[arg-type]
    return SpsaTuner("a", SPACE, folder, trials, 1, {"plain": PLAIN, "far": FAR}, "recipe", kept)


def run(t: SpsaTuner, trials: int) -> None:
    while len(t.trials()) < trials:
        candidate = t.propose()
        t.observe(candidate, score(candidate), 6)


@pytest.mark.parametrize("gain", ["adam", "plain"])
def test_reaches_an_optimum_that_it_cannot_differentiate(gain: str, tmp_path: Path) -> None:
    t = tuner(tmp_path, 80, gain=gain)
    run(t, 80)
    trials = t.trials()
    assert [x.candidate.origin for x in trials[:3]] == ["plain", "far", "pair"]
    assert [x.candidate.origin for x in trials[-2:]] == ["centre", "mean"]
    gain_share = 1 - max(x.score for x in trials[-2:]) / trials[0].score
    assert gain_share > 0.6
    assert sum(x.calls for x in trials) == 80 * 6


def test_pairs_mirror_around_the_centre_of_the_best_start(tmp_path: Path) -> None:
    t = tuner(tmp_path)
    for _ in range(2):
        candidate = t.propose()
        t.observe(candidate, score(candidate))
    plus, minus = t.propose(), t.propose()  # both before either is scored: they can be one batch
    for p in SPACE[:6]:
        assert plus.values[p.name] == -minus.values[p.name]
        assert abs(plus.values[p.name]) == pytest.approx(0.1 * 1.6)
    with pytest.raises(UserError, match="score the open candidates"):
        t.propose()
    for c in (minus, plus):  # any order of answers
        t.observe(c, score(c))
    assert t.propose().number == 4


def test_all_candidates_lie_in_the_box(tmp_path: Path) -> None:
    t = tuner(tmp_path, perturbation=0.9, rate=0.5)
    run(t, 40)
    for trial in t.trials():
        for p in SPACE:
            value = trial.candidate.values[p.name]
            assert p.low <= value <= p.high
            assert value == p.clip(value)


def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole = tuner(tmp_path / "whole")
    run(whole, 40)
    rng = np.random.default_rng(0)
    while len(tuner(tmp_path / "parts").trials()) < 40:  # a new process each time, often killed with open candidates
        part = tuner(tmp_path / "parts")
        for _ in range(int(rng.integers(1, 4))):
            if len(part.trials()) == 40:
                break
            candidate = part.propose()
            if rng.random() < 0.5:
                break
            part.observe(candidate, score(candidate), 6)
    assert tuner(tmp_path / "parts").trials() == whole.trials()
    rows = json.loads((tmp_path / "parts" / "a.json").read_text())["rows"]
    assert [r["number"] for r in rows] == list(range(40))  # every trial once


def test_a_score_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    t = tuner(tmp_path)
    for _ in range(2):
        candidate = t.propose()
        t.observe(candidate, score(candidate))
    before = t.path()[-1]
    t.observe(t.propose(), float("nan"))
    assert (t.path()[-1] == before).all()
    assert t.propose().number == 3  # the failed half has no partner; a new pair begins
    assert len(t.trials()) == 2


def test_pull_draws_back_to_the_start(tmp_path: Path) -> None:
    ends = {}
    for pull in (0.0, 50.0):
        t = tuner(tmp_path / str(pull), pull=pull)
        run(t, 40)
        path = t.path()
        ends[pull] = float(np.abs(path[-1] - path[0]).sum())
    assert ends[50.0] < 0.6 * ends[0.0]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run(tuner(tmp_path), 3)
    with pytest.raises(UserError, match="another recipe"):
        SpsaTuner("a", SPACE, tmp_path, 40, 1, {"plain": PLAIN}, "other")
    with pytest.raises(UserError, match="another recipe"):
        tuner(tmp_path, gain="plain")
    with pytest.raises(UserError, match="adam or plain"):
        SpsaOptions(gain="newton")
    with pytest.raises(UserError, match="share of the box"):
        SpsaOptions(rate=0)
    t = tuner(tmp_path)
    with pytest.raises(UserError, match="observe each candidate once"):
        t.observe(t.trials()[0].candidate, 0.0)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="no table of trials"):
        tuner(tmp_path)
