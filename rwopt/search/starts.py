"""From probe scores to where a tuner starts: theta of a weight function.

Three maps, by what they know. `analytic`: the scores' order (the paper's idea). `gradient_step`: the slope of the
reward. `gauss_newton`: the slope, and by the Gram matrix how far each combination of weights moves the output; it
goes where a given movement of the output buys the most reward:

    maximise  g' d   subject to   d' (G + lambda I) d <= radius^2 ,   d = radius (G + lambda I)^-1 g / |.| .

All work on theta: with hat functions h_k of ln sigma and groups of sites, `dw[i, s] / dtheta[k, g] = h_k(sigma_i)` for
s in g at theta = 0, so a table's gradient g and Gram G become `B' g` and `B' G B`.
"""

from __future__ import annotations

import numpy as np

from rwopt.errors import UserError
from rwopt.probes import Importance
from rwopt.schedule.weights import WeightFunction, hat
from rwopt.search import baselines


def basis(function: WeightFunction, sigmas: np.ndarray) -> np.ndarray:
    """B [K S, d]: derivative of the weights at noise levels `sigmas` [K] with respect to theta [d], at theta = 0."""
    hats = np.array([hat(function.sigmas, float(sigma)) for sigma in sigmas])  # [K, knots]
    rows = len(sigmas) * len(function.sites)
    b: np.ndarray = np.einsum("ik,gs->iskg", hats @ function.waves if function.rank else hats, function.membership)
    idle = np.zeros((rows, len(function.sigmas) * function.rank))  # a of a low rank moves nothing while b is 0
    dials = np.zeros((rows, function.dimension - function.weight_count))  # these probes do not ask about them
    return np.hstack([idle, b.reshape(rows, -1), dials])


def analytic(function: WeightFunction, importance: Importance, low: float = 0.95, high: float = 1.1) -> np.ndarray:
    """Theta [d] nearest to weights in [low, high] by importance: the published map of votes, ranks of other scores."""
    _same_sites(function, importance)
    if importance.method == "voting":
        return function.fit(baselines.voted_schedule(importance, low, high))
    return function.fit(baselines.ranked_schedule(importance, low, high))


def gradient_step(function: WeightFunction, slope: Importance, radius: float = 0.3) -> np.ndarray:
    """Theta [d] along the reward's gradient, its largest log-gain `radius`; no gradient gives the plain model."""
    direction = _slope(function, slope)
    return direction * (radius / max(float(np.abs(direction).max()), 1e-30))


def gauss_newton(
    function: WeightFunction,
    slope: Importance,
    gram: Importance,
    radius: float = 0.1,
    damping: float = 1e-2,
    limit: float = 0.8,
) -> np.ndarray:
    """Theta [d] of most reward, to first order, among those that move the output by at most `radius`, to first order.

    radius: root mean over steps of the output's relative squared movement (the student's Gram: movement of the final
    latents). damping: lambda as a share of the mean diagonal, so that a weight that moves nothing stays where it is.
    limit: the step is shortened until no log-gain is larger. Raises `UserError` unless `gram` holds Gram matrices of
    the same sites and noise levels.
    """
    g, metric = _slope(function, slope), _metric(function, gram)
    if not np.allclose(gram.sigmas, slope.sigmas):
        raise UserError("starts: reward gradient and Gram have different noise levels: probe both on the same steps")
    metric = metric + damping * max(float(np.trace(metric)) / len(metric), 1e-30) * np.eye(len(metric))
    direction = np.linalg.solve(metric, g)
    size = float(np.sqrt(max(float(g @ direction), 0.0)))  # sqrt(d' metric d) of d = metric^-1 g
    theta = direction * (radius / max(size, 1e-30))
    return np.asarray(theta * min(1.0, limit / max(float(np.abs(theta).max()), 1e-30)))


def _slope(function: WeightFunction, slope: Importance) -> np.ndarray:
    if slope.method != "reward_gradient":
        raise UserError(f"starts: {slope.method} scores are no slope of a reward: use probe reward_gradient")
    _same_sites(function, slope)
    return np.asarray(basis(function, slope.sigmas).T @ slope.scores.reshape(-1))


def _metric(function: WeightFunction, gram: Importance) -> np.ndarray:
    _same_sites(function, gram)
    if "gram" not in gram.details:
        raise UserError(f"starts: {gram.method} scores hold no Gram matrices: use probe gram")
    b, steps = basis(function, gram.sigmas), len(gram.sigmas)
    if "table" in gram.details:  # the student's: steps share one output, and interact
        return np.asarray(b.T @ np.array(gram.details["table"]) @ b)
    rows = b.reshape(steps, len(function.sites), -1)
    return np.asarray(np.einsum("isa,ist,itb->ab", rows, np.array(gram.details["gram"]), rows) / steps)


def _same_sites(function: WeightFunction, importance: Importance) -> None:
    if importance.sites != function.sites:
        raise UserError(
            f"starts: the probe's {len(importance.sites)} sites are not the weight function's {len(function.sites)}: "
            "probe where the weights act"
        )
