"""The published voting probe: its rules, its walk, and what its score says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.probes import K, Quadratic, S, attach, inputs, spearman

from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.voting import Voting, _skip, follow, points
from rwopt.sampling.denoise import predict
from rwopt.sampling.sample import sample
from rwopt.unet.sites import find_sites, group_sites, list_sites


def test_voting_scores_blocks(model: Model) -> None:
    x, cond, course = inputs(model)
    with attach(model, "output") as attachment:
        a = make_probe("voting", rounds=2, epochs=3)(model, attachment, x, cond, course)
        b = make_probe("voting", teacher="cached", rounds=2, epochs=3)(model, attachment, x, cond, course)
    assert a.details["blocks"] == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.1",
        "up_blocks.2",
    ]
    assert (a.scores[:, 3] == a.scores[:, 4]).all()
    assert (a.scores[:, 5] == a.scores[:, 6]).all()
    assert a.scores.min() >= 2
    assert a.scores.max() <= 2 * 5
    assert (a.scores == b.scores).all()
    assert b.calls == K + K * 2 * 3


def test_voting_along_the_student_judges_the_final_latents(model: Model) -> None:
    """The walk sees the end of a run in which one step is weighed, skips and all, and the others are plain."""
    x, cond, course = inputs(model)
    weights, off = np.array([0.9, 1.0, 0.8, 0.7, 0.95]), np.array([False, True, False, False, False])
    seen: list[torch.Tensor] = []

    class Once(Voting):
        def vote(self, run: Any, student: Any, steps: int, blocks: int) -> tuple[np.ndarray, dict[str, Any]]:
            seen.extend([*run(), *(student(i, weights, off) for i in range(steps))])
            return np.ones((steps, blocks)), {}

    blocks = group_sites(list_sites(model.unet), "block")
    table = np.ones(S)
    for weight, skip, members in zip(weights, off, blocks.values(), strict=True):
        table[members] = 0.0 if skip else weight
    with attach(model, "residual") as attachment:
        Once(trajectory="student")(model, attachment, x, cond, course)
        plain, at = sample(model, attachment, x, cond, course), list(course.sigmas)
        rows = [{s: torch.as_tensor(table if s == at[i] else np.ones(S)).float() for s in at} for i in range(K)]
        ends = [sample(model, attachment, x, cond, course, row.get) for row in rows]
    for found, expected in zip(seen, [plain] * K + ends, strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(ends[0], plain)


def test_a_skip_in_output_mode_is_the_residual_skip(model: Model) -> None:
    x, cond, course = inputs(model)
    off = list_sites(model.unet)[2]
    weights = torch.ones(S)
    with torch.no_grad():
        with attach(model, "output") as attachment, _skip(model.unet, [off]):
            weights[2] = 0.9  # must not matter: the published skip is not scaled
            skipped = predict(model, attachment, x, course.told[0], cond, weights)
        with attach(model, "residual") as attachment:
            weights[2] = 0.0
            assert torch.equal(skipped, predict(model, attachment, x, course.told[0], cond, weights))
    assert find_sites(model.unet, [off.id])[0].kind == "transformer"


@pytest.mark.parametrize("update", ["probability", "hard", "soft"])
def test_the_published_score_runs_against_sensitivity(update: str) -> None:
    """A fact of the published rule, not a wish.

    Where the error limit binds, blocks that cannot shrink keep high thresholds, and those get few points.
    """
    diagonal = np.logspace(-1.5, 0.5, 7)[np.random.default_rng(3).permutation(7)]
    hessians = np.array([np.diag(diagonal)] * 3) * 0.02
    corr = {}
    for turned in (False, True):
        net, probe = Quadratic(hessians), Voting(update=update, seed=5, reversed=turned)
        scores, details = probe.vote(net.run, net.predict, 3, 7)
        assert net.calls == 2 * 3 * 15 * 20
        assert scores.min() >= 15
        assert scores.max() <= 15 * 7
        assert (scores.sum(1) == 15 * 28).all()
        corr[turned] = np.mean([spearman(s, diagonal) for s in scores])
    assert all(0.05 < a < 0.5 for a in details["acceptance"])
    assert corr[False] < -0.5
    assert corr[True] > 0.5
    if update == "probability":
        assert details["skipped"] == 0  # thresholds stay below the weights that they follow


def test_walk_depends_on_its_seed_and_guard_only() -> None:
    hessians = np.array([np.diag(np.logspace(-3, -2, 5))] * 2)

    def vote(**options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        net = Quadratic(hessians)
        return Voting(rounds=3, epochs=10, **options).vote(net.run, net.predict, 2, 5)

    assert (vote(seed=1)[0] == vote(seed=1)[0]).all()
    assert (vote(seed=1)[0] != vote(seed=2)[0]).any()
    # with no limit only the energy decides: the published guard lets proposals raise it
    free = (1e9, 1e9)
    assert vote(energy_guard="fixed", limit=free)[1]["acceptance"] == [1, 1]
    assert max(vote(limit=free)[1]["acceptance"]) < 0.9


def test_published_update_rules_and_points() -> None:
    assert follow("probability", True, 1.0) == pytest.approx((0.87, 0.10))
    assert follow("probability", False, 1.0) == pytest.approx((0.81, 0.04))
    assert follow("hard", False, 0.3) == (0.5, 0.0)
    assert follow("soft", True, 0.25) == (0.25, 0.75)
    threshold = np.array([[0.9, 0.1, 0.5]])
    assert points(threshold, np.random.default_rng(0)).tolist() == [[1, 3, 2]]
    assert points(threshold, np.random.default_rng(0), most_to_highest=True).tolist() == [[3, 1, 2]]
