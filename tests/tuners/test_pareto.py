"""Front, hypervolume and the rule, against definitions written out and against sampling."""

from __future__ import annotations

import numpy as np
import pytest

from rwopt.tuners import pareto


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_is_what_nothing_dominates(objectives: int) -> None:
    points = np.random.default_rng(objectives).integers(0, 5, (40, objectives)).astype(float)  # with ties and doubles
    found = pareto.front(points)
    for i, p in enumerate(points):
        dominated = any((q >= p).all() and (q > p).any() for q in points)
        double = any((q == p).all() for q in points[:i])
        assert (i in found) == (not dominated and not double)


def test_hypervolume_of_known_shapes() -> None:
    assert pareto.hypervolume(np.array([[3.0]]), np.array([1.0])) == 2
    assert pareto.hypervolume(np.array([[2.0, 3.0]]), np.zeros(2)) == 6
    assert pareto.hypervolume(np.array([[2.0, 1.0], [1.0, 2.0]]), np.zeros(2)) == 3
    assert pareto.hypervolume(np.array([[1.0, 1, 1], [2, 0.5, 0.5]]), np.zeros(3)) == 1 + 0.25
    assert pareto.hypervolume(np.array([[2.0, 0.0], [-1.0, 5.0]]), np.zeros(2)) == 0  # not above in every objective
    assert pareto.hypervolume(np.zeros((0, 2)), np.zeros(2)) == 0


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(objectives: int) -> None:
    rng = np.random.default_rng(0)
    points, sample = rng.random((12, objectives)), rng.random((200_000, objectives))
    share = (points[None] >= sample[:, None]).all(2).any(1).mean()
    assert pareto.hypervolume(points, np.zeros(objectives)) == pytest.approx(share, abs=0.005)


def test_the_rule_takes_the_best_first_objective_that_costs_nothing_else() -> None:
    points = np.array([[0.9, 0.4], [0.7, 0.6], [0.6, 0.8], [0.95, 0.1]])
    assert pareto.ranked(points, np.array([0.5, 0.5])) == [1, 2, 0, 3]  # those that fall short: the nearest first
    assert pareto.ranked(points, np.array([0.5, 0.5]), slack=0.1)[0] == 0
    assert pareto.ranked(points, np.array([0.5, 0.9]))[0] == 2
    over = np.array([0, 0.2, 0, 0])  # a broken limit weighs more than anything
    assert pareto.ranked(points, np.array([0.5, 0.5]), excess=over) == [2, 0, 3, 1]
    said = pareto.rule(["objective", "scorer.kept"], 0.01)
    assert "highest objective" in said
    assert "scorer.kept are no worse than the plain model's minus 0.01" in said
