"""Verdicts: ties are called ties, and "better" heeds a metric's direction."""

from __future__ import annotations

from rwopt.results import Paired
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE
from rwopt.search.verdict import verdict


def pair(b: str, metric: str, low: float, high: float, optimised: bool = False) -> Paired:
    return Paired(metric, optimised, "test", "learned", b, (low + high) / 2, low, high, 0.7, 0.0004, 20, 1)


def test_the_verdict_calls_ties_ties_and_heeds_directions() -> None:
    others = ("analytic", "best guidance", "constant")
    bounds = {"analytic": (0.01, 0.03), "best guidance": (-0.02, 0.01), "constant": (-0.03, -0.01)}
    paired = [pair(b, OBJECTIVE, *bounds[b], optimised=True) for b in others]
    paired += [pair(b, metric, *bounds[b]) for b in others for metric in (HELD_OUT, "judge.distance")]
    better, tie, worse = verdict(paired)
    assert "better on the objective, +0.0200 (95 % interval +0.0100 to +0.0300; " in better
    assert "wins 70% of 20 cases, p < 0.001)" in better
    assert better.endswith("Held out: better on judge.objective; worse on judge.distance.")  # lower is better
    assert "no clear difference on the objective" in tie
    assert tie.endswith("Held out: no clear difference on any of 2.")
    assert "worse on the objective" in worse
    assert worse.endswith("Held out: better on judge.distance; worse on judge.objective.")
