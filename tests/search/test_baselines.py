"""Closed-form schedules and their controls: formulas, ranges and what each control keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.probes import Importance
from rwopt.schedule import Schedule
from rwopt.search.baselines import (
    constant,
    gradient_norm_schedule,
    permuted_sites,
    permuted_steps,
    plain,
    ranked_schedule,
    reversed_schedule,
    uniform_mean,
    voted_schedule,
)

SIGMAS = np.array([14.0, 3.0, 0.5])


def importance(scores: Any, method: str = "ablation", **details: Any) -> Importance:
    scores = np.asarray(scores, dtype=float)
    sites = tuple(f"site.{s}" for s in range(scores.shape[1]))
    return Importance(sites, SIGMAS[: len(scores)], scores, calls=9, method=method, details=details)


def votes(blocks: int, rounds: int = 15) -> Importance:
    """Unanimous rounds: block b always gets b + 1 points."""
    names = [f"block.{b}" for b in range(blocks)]
    return importance([rounds * np.arange(1, blocks + 1)] * 3, "voting", rounds=rounds, blocks=names)


def table() -> Schedule:
    weights = np.array([[0.9, 1.0, 1.2, 1.1], [1.3, 0.8, 1.0, 0.7], [1.0, 1.1, 1.05, 0.95]])
    return Schedule(
        tuple(f"down_blocks.{i}.attentions.0" for i in range(4)),
        SIGMAS,
        weights,
        "output",
        interp="previous",
        model={"base_model": "m"},
    )


@pytest.mark.parametrize(("blocks", "least", "mean"), [(7, 0.9714, 1.0357), (5, 0.98, 1.04)])
def test_voted_schedule_has_the_published_range(blocks: int, least: float, mean: float) -> None:
    made = voted_schedule(votes(blocks))
    assert made.mode == "output"
    assert made.provenance["baseline"] == "voted"
    assert made.weights.min() == pytest.approx(least, abs=5e-5)
    assert made.weights.max() == pytest.approx(1.1)
    assert made.weights.mean() == pytest.approx(mean, abs=5e-5)
    turned = voted_schedule(votes(blocks), reverse=True)
    np.testing.assert_allclose(made.weights + turned.weights, 0.95 + 1.1)


def test_voted_schedule_takes_votes_only() -> None:
    with pytest.raises(UserError, match="use probe voting"):
        voted_schedule(importance([[1, 2]]))


def test_gradient_norm_schedule_is_the_published_formula() -> None:
    found = importance([[1, 2, 4], [0, 0, 0], [3, 0, 1]], "gradient_norm")
    made = gradient_norm_schedule(found, low=0.1, high=0.3)
    expected = [
        [1 + 0.15, 1 + 0.2, 1 + 0.3],
        [1 + 2 / 3 * 0.1] * 3,
        [1 + 0.3 / 3, 1 + 0.1 / 3, 1 + (0.1 + 0.2 / 3) / 3],
    ]
    np.testing.assert_allclose(made.weights, expected)
    decayed = gradient_norm_schedule(found, low=0.1, high=0.3, decay="exponential", mode="residual")
    assert decayed.weights[2, 0] == pytest.approx(1 + 0.3 * np.exp(-0.2))
    assert decayed.mode == "residual"
    with pytest.raises(UserError, match="linear or exponential"):
        gradient_norm_schedule(found, decay="cosine")


def test_ranked_schedule_gives_the_most_important_the_high_end() -> None:
    made = ranked_schedule(importance([[5, 1, 3], [2, 2, 7], [4, 4, 4]]), low=0.9, high=1.1)
    np.testing.assert_allclose(made.weights, [[1.1, 0.9, 1.0], [0.9, 0.9, 1.1], [1.0, 1.0, 1.0]])
    assert made.mode == "residual"
    turned = ranked_schedule(importance([[5, 1, 3]]), low=0.9, high=1.1, reverse=True)
    np.testing.assert_allclose(turned.weights, [[0.9, 1.1, 1.0]])


def test_constant() -> None:
    assert constant(["a", "b"], SIGMAS, 1.1).weights.tolist() == [[1.1, 1.1]] * 3
    assert constant(["a", "b"], SIGMAS, [1.1, 0.9], "output").weights.tolist() == [[1.1, 0.9]] * 3
    with pytest.raises(UserError, match="do not fit 2 sites"):
        constant(["a", "b"], SIGMAS, [1.0, 2.0, 3.0])


def test_controls_keep_what_they_should() -> None:
    like = table()
    shuffled = permuted_sites(like, 0), permuted_steps(like, 0)
    controls = [plain(like), uniform_mean(like), reversed_schedule(like), *shuffled]
    for made in controls:
        assert (made.sites, made.mode, made.interp, made.model) == (
            like.sites,
            like.mode,
            like.interp,
            like.model,
        )
        assert (made.sigmas == like.sigmas).all()
        assert made.provenance["of"] == like.digest()
        assert Schedule.from_dict(made.to_dict()) == made  # a valid file
    names = ["plain", "uniform_mean", "reversed", "permuted_sites", "permuted_steps"]
    assert [made.provenance["baseline"] for made in controls] == names
    flat, mean, mirror = (made.weights for made in controls[:3])
    assert controls[0].is_plain
    assert (flat == 1).all()
    assert mean.mean() == pytest.approx(like.weights.mean())
    assert np.ptp(mean) == 0
    np.testing.assert_allclose(mirror[0], [1.2, 1.1, 0.9, 1.0])
    np.testing.assert_allclose(reversed_schedule(controls[2]).weights, like.weights)


@pytest.mark.parametrize("seed", range(5))
def test_permutations_leave_nothing_in_place(seed: int) -> None:
    like = table()
    sites, steps = permuted_sites(like, seed), permuted_steps(like, seed)
    assert (
        not (sites.weights == like.weights).all(0).any()
    )
    assert (
        not (steps.weights == like.weights).all(1).any()
    )
    assert sorted(sites.weights.T.tolist()) == sorted(
        like.weights.T.tolist()
    )  # whole columns: the same for all steps
    assert sorted(steps.weights.tolist()) == sorted(like.weights.tolist())
    assert permuted_sites(like, seed) == sites


def test_blocks_are_permuted_whole() -> None:
    like = Schedule(tuple("abcde"), SIGMAS[:1], np.array([[1.1, 1.1, 0.9, 1.0, 1.0]]))
    groups = {"x": [0, 1], "y": [2], "z": [3, 4]}
    for seed in range(4):
        w = permuted_sites(like, seed, groups).weights[0]
        assert w[0] == w[1]
        assert w[3] == w[4]
        assert sorted({*w}) == [0.9, 1.0, 1.1]
        assert w[0] != 1.1
        assert w[2] != 0.9
        assert w[3] != 1.0
    with pytest.raises(UserError, match="different weights"):
        permuted_sites(like, 0, {"x": [0, 2], "y": [1, 3, 4]})
    with pytest.raises(UserError, match="once each"):
        permuted_sites(like, 0, {"x": [0, 1]})


def test_one_of_a_kind_stays() -> None:
    one = constant(["a"], [1.0], 1.2)
    assert (permuted_sites(one, 0).weights == 1.2).all()
    assert (permuted_steps(one, 0).weights == 1.2).all()
