"""Both trajectories are those of the sampler."""

from __future__ import annotations

import pytest
import torch
from helpers.probes import K, S, attach, inputs

from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.teacher import Teacher
from rwopt.sampling.sample import sample


def test_probes_follow_the_plain_trajectory(model: Model) -> None:
    x, cond, ts = inputs()
    states: list[torch.Tensor] = []
    with attach(model, "residual") as attachment:
        teacher = Teacher(model, attachment, x, cond, ts)
        with torch.no_grad():
            list(teacher.run())
        sample(model, attachment, x, cond, ts, callback=lambda i, t, x: states.append(x))
    assert all(torch.equal(a, b) for a, b in zip(teacher.states, states, strict=True))


def test_student_trajectory_ends_where_sampling_ends(model: Model) -> None:
    x, cond, ts = inputs()
    weights = torch.ones(K, S)
    weights[0, 2] = 0
    rows = {model.sigma(t): w for t, w in zip(ts, weights, strict=True)}
    with attach(model, "residual") as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, ts)
        predict_end, ends = teacher.view("student")
        plain = sample(model, attachment, x, cond, ts)
        assert all(torch.equal(end, plain) for end in ends)
        moved = predict_end(0, weights[0].numpy())
        torch.testing.assert_close(moved, sample(model, attachment, x, cond, ts, lambda sigma: rows[sigma]))
        found = make_probe("ablation", trajectory="student")(model, attachment, x, cond, ts)
    ratio = (moved - plain).square().sum((1, 2, 3)) / plain.square().sum((1, 2, 3))
    assert found.scores[0, 2] == pytest.approx(float(ratio.mean()), rel=1e-4)
