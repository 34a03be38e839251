"""Both trajectories are those of the sampler."""

from __future__ import annotations

import pytest
import torch
from helpers.probes import K, S, attach, inputs

from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.sample import sample

SAMPLERS = ["ddim", "dpmpp_2m", "uni_pc"]  # of one step, of two, and one that looks back at what it corrected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_probes_follow_the_plain_trajectory(model: Model, sampler: str) -> None:
    x, cond, _ = inputs(model)
    course = course_by_rule(model, 4, sampler)
    states: list[torch.Tensor] = []
    with attach(model, "residual") as attachment:
        teacher = Teacher(model, attachment, x, cond, course)
        with torch.no_grad():
            list(teacher.run())
        sample(model, attachment, x, cond, course, callback=lambda i, x: states.append(x))
    assert all(torch.equal(a, b) for a, b in zip(teacher.states, states, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_is_followed_to_the_end_that_sampling_has(model: Model, sampler: str) -> None:
    """From any step, with what a multistep solver remembers there."""
    x, cond, _ = inputs(model)
    course = course_by_rule(model, 4, sampler)
    weights = torch.ones(4, S)
    weights[2, 2] = 0
    rows = dict(zip(course.sigmas, weights, strict=True))
    with attach(model, "residual") as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, course)
        outs = list(teacher.run())
        plain = sample(model, attachment, x, cond, course)
        for i, out in enumerate(outs):
            assert torch.equal(teacher.follow(i, out), plain)
        moved = teacher.follow(2, teacher.predict(2, weights[2]))
        torch.testing.assert_close(moved, sample(model, attachment, x, cond, course, lambda sigma: rows[sigma]))
        assert not torch.allclose(moved, plain)


def test_student_trajectory_ends_where_sampling_ends(model: Model) -> None:
    x, cond, course = inputs(model)
    weights = torch.ones(K, S)
    weights[0, 2] = 0
    rows = {sigma: w for sigma, w in zip(course.sigmas, weights, strict=True)}
    with attach(model, "residual") as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, course)
        predict_end, ends = teacher.view("student")
        plain = sample(model, attachment, x, cond, course)
        assert all(torch.equal(end, plain) for end in ends)
        moved = predict_end(0, weights[0].numpy())
        torch.testing.assert_close(moved, sample(model, attachment, x, cond, course, lambda sigma: rows[sigma]))
        found = make_probe("ablation", trajectory="student")(model, attachment, x, cond, course)
    ratio = (moved - plain).square().sum((1, 2, 3)) / plain.square().sum((1, 2, 3))
    assert found.scores[0, 2] == pytest.approx(float(ratio.mean()), rel=1e-4)
