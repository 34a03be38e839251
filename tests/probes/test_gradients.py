"""Gradient norm and reward gradient, against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.probes import K, S, attach, inputs

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.gradient_norm import output_gradient
from rwopt.sampling.denoise import predict
from rwopt.sampling.sample import sample


def test_reward_gradient_agrees_with_finite_differences(model: Model) -> None:
    x, cond, course = inputs(model)
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def reward(z: torch.Tensor) -> torch.Tensor:
        return -(z - target).square().flatten(1).sum(1)

    with attach(model, "residual") as attachment:
        full = make_probe("reward_gradient", reward=reward)(model, attachment, x, cond, course)
        local = make_probe("reward_gradient", reward=reward, trajectory="teacher")(model, attachment, x, cond, course)
        for k, s in ((0, 2), (1, 5)):
            ends = []
            for h in (1e-2, -1e-2):
                table = torch.ones(K, S)
                table[k, s] += h
                rows = {sigma: row for sigma, row in zip(course.sigmas, table, strict=True)}
                ends.append(reward(sample(model, attachment, x, cond, course, lambda sigma, r=rows: r[sigma])).mean())
            assert full.scores[k, s] == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=0.03, abs=1e-4)
        with pytest.raises(UserError, match="task_reward"):
            make_probe("reward_gradient")(model, attachment, x, cond, course)
    np.testing.assert_allclose(local.scores[-1], full.scores[-1], rtol=1e-5)  # after the last step no input is left
    assert (local.scores[0] != full.scores[0]).all()


@pytest.mark.parametrize("mode", ["residual", "output"])
def test_gradient_norm_agrees_with_finite_differences(mode: str, model: Model) -> None:
    x, cond, course = inputs(model)
    with attach(model, mode) as attachment:
        found = make_probe("gradient_norm")(model, attachment, x, cond, course)
        for s in (0, 2, 6):
            with torch.no_grad():
                up, down = (
                    predict(model, attachment, x, course.told[0], cond, torch.ones(S) + h * torch.eye(S)[s])
                    .square()
                    .flatten(1)
                    .mean(1)
                    for h in (1e-2, -1e-2)
                )
            assert found.scores[0, s] == pytest.approx(float((up - down).abs().mean() / 2e-2), rel=0.02, abs=1e-5)


def test_output_gradient_keeps_rows_apart() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    out = (weights * torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]])).sum(1)[:, None, None, None].expand(3, 1, 2, 2)
    assert output_gradient(out, weights).tolist() == [[6, 12], [42, 56], [0, 2]]
