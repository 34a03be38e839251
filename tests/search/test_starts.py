"""Starts: exact answers on small tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.probes import Importance
from rwopt.schedule.weights import WeightFunction
from rwopt.search import starts

SITES = ("a", "b", "c")
SIGMAS = np.array([8.0, 2.0])
TABLE = WeightFunction(SITES, SIGMAS, {s: [i] for i, s in enumerate(SITES)})  # one number a step and site
ONE = WeightFunction(SITES, np.array([4.0]), {"all": [0, 1, 2]})
LOW = WeightFunction(SITES, np.array([8.0, 3.0, 2.0]), {"ab": [0, 1], "c": [2]}, rank=2)
TWO = WeightFunction(SITES, np.array([8.0, 2.0]), {"ab": [0, 1], "c": [2]})
SLOPE = Importance(SITES, SIGMAS, np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]), method="reward_gradient")


def gram(seed: int = 0, student: bool = False) -> Importance:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2, 3, 9))
    g = a @ a.transpose(0, 2, 1)
    details: dict[str, object] = {"gram": g.tolist()}
    if student:
        b = rng.standard_normal((6, 18))
        details["table"] = (b @ b.T).tolist()
    return Importance(SITES, SIGMAS, g.diagonal(axis1=1, axis2=2), method="gram", details=details)


@pytest.mark.parametrize("function", [TABLE, ONE, TWO, LOW])
def test_basis_is_the_derivative_of_the_weights(function: WeightFunction) -> None:
    sigmas = np.array([16.0, 8.0, 4.0, 3.0, 1.0])  # also outside the knots
    b, h = starts.basis(function, sigmas), 1e-6
    for j in range(function.dimension):
        theta = np.eye(function.dimension)[j] * h
        up, down = (function.schedule(t).at(sigmas) for t in (theta, -theta))
        np.testing.assert_allclose(b[:, j].reshape(5, 3), (up - down) / (2 * h), atol=1e-4)


def test_gradient_step_points_uphill_and_is_as_long_as_asked() -> None:
    theta = starts.gradient_step(TABLE, SLOPE, 0.3)
    np.testing.assert_allclose(theta.reshape(2, 3), SLOPE.scores / 3 * 0.3)
    assert starts.gradient_step(ONE, SLOPE, 0.3) == pytest.approx([0.3])  # the sum of all, 1.5, is positive
    np.testing.assert_allclose(starts.gradient_step(TWO, SLOPE, 0.3), np.array([-1, 0.5, 3, -1]) / 3 * 0.3)
    still = replace(SLOPE, scores=np.zeros((2, 3)))
    assert (starts.gradient_step(TABLE, still) == 0).all()
    assert (starts.gauss_newton(TABLE, still, gram()) == 0).all()


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("function", [TABLE, TWO])
def test_gauss_newton_is_the_best_step_on_its_ellipsoid(function: WeightFunction, student: bool) -> None:
    probe = gram(1, student)
    theta = starts.gauss_newton(function, SLOPE, probe, radius=0.2, damping=0.0, limit=np.inf)
    b = starts.basis(function, SIGMAS)
    if student:
        metric = b.T @ np.array(probe.details["table"]) @ b
    else:
        block = np.zeros((6, 6))
        block[:3, :3], block[3:, 3:] = probe.details["gram"]
        metric = b.T @ block @ b / 2
    slope = b.T @ SLOPE.scores.reshape(-1)
    assert theta @ metric @ theta == pytest.approx(0.2**2)
    rng = np.random.default_rng(2)
    others = rng.standard_normal((2000, function.dimension))
    others *= 0.2 / np.sqrt(np.einsum("na,ab,nb->n", others, metric, others))[:, None]
    assert (others @ slope).max() <= theta @ slope
    assert (others @ slope).max() > 0.7 * (theta @ slope)


def test_gauss_newton_with_a_flat_metric_is_the_gradient_and_keeps_to_its_limit() -> None:
    flat = replace(gram(), details={"gram": [np.eye(3).tolist()] * 2})
    theta = starts.gauss_newton(TABLE, SLOPE, flat, radius=0.1)
    assert theta / np.linalg.norm(theta) == pytest.approx(SLOPE.scores.reshape(-1) / np.linalg.norm(SLOPE.scores))
    short = starts.gauss_newton(TABLE, SLOPE, flat, radius=100.0, limit=0.4)
    assert np.abs(short).max() == pytest.approx(0.4)
    np.testing.assert_allclose(short / 0.4, theta / np.abs(theta).max())
    # a weight that moves nothing and earns nothing stays where it is, although its metric is singular
    idle = replace(SLOPE, scores=SLOPE.scores * [1, 1, 0])
    dead = replace(gram(), details={"gram": [np.diag([1.0, 1, 0]).tolist()] * 2})
    assert (starts.gauss_newton(TABLE, idle, dead).reshape(2, 3)[:, 2] == 0).all()


def test_analytic_start_follows_the_order_of_the_scores() -> None:
    theta = starts.analytic(TABLE, gram(), 0.9, 1.2).reshape(2, 3)
    scores = gram().scores
    assert (theta.argsort(1) == scores.argsort(1)).all()
    np.testing.assert_allclose(np.exp(theta).min(1), 0.9)
    np.testing.assert_allclose(np.exp(theta).max(1), 1.2)
    votes = Importance(SITES, SIGMAS, np.array([[2.0, 4, 6], [6, 2, 4]]), method="voting",
                       details={"rounds": 2, "blocks": list(SITES)})  # fmt: skip
    np.testing.assert_allclose(np.exp(starts.analytic(TABLE, votes, 0.9, 1.2)).max(), 1.2)


def test_what_does_not_fit_is_refused() -> None:
    other = replace(gram(), sites=("x", "b", "c"))
    for call in (lambda: starts.analytic(TABLE, other), lambda: starts.gauss_newton(TABLE, SLOPE, other)):
        with pytest.raises(UserError, match="where the weights act"):
            call()
    with pytest.raises(UserError, match="use probe reward_gradient"):
        starts.gradient_step(TABLE, gram())
    with pytest.raises(UserError, match="use probe gram"):
        starts.gauss_newton(TABLE, SLOPE, SLOPE)
    with pytest.raises(UserError, match="same steps"):
        starts.gauss_newton(TABLE, SLOPE, replace(gram(), sigmas=np.array([9.0, 2.0])))
