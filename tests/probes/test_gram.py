"""Gauss-Newton Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.probes import K, N, S, attach, inputs

from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.shapley import skip_loss
from rwopt.probes.teacher import Teacher


@pytest.mark.parametrize("trajectory", ["teacher", "student"])
def test_gram_holds_the_ablation_and_all_pairs(trajectory: str, model: Model) -> None:
    x, cond, course = inputs(model)
    with attach(model, "residual") as attachment:
        ablation = make_probe("ablation", trajectory=trajectory)(model, attachment, x, cond, course)
        gram = make_probe("gram", trajectory=trajectory)(model, attachment, x, cond, course)
        sums = make_probe("gram", trajectory=trajectory, score="shapley")(model, attachment, x, cond, course)
    np.testing.assert_allclose(gram.scores, ablation.scores, rtol=1e-6)
    matrices = np.array(gram.details["gram"])
    np.testing.assert_allclose(matrices, matrices.transpose(0, 2, 1), rtol=1e-9)
    np.testing.assert_allclose(matrices.diagonal(axis1=1, axis2=2), gram.scores, rtol=1e-9)
    np.testing.assert_allclose(matrices.sum(2), sums.scores, atol=1e-12)
    if trajectory == "student":  # steps share the final latents, so they interact too
        table = np.array(gram.details["table"]).reshape(K, S, K, S)
        np.testing.assert_allclose([table[k, :, k] for k in range(K)], matrices, rtol=1e-9)


def test_gram_predicts_a_small_joint_move(model: Model) -> None:
    x, cond, course = inputs(model)
    move = np.array([0.02, -0.01, 0.0, 0.02, 0.01, -0.02, 0.01])
    with attach(model, "residual") as attachment, torch.no_grad():
        found = make_probe("gram", value=0.98)(model, attachment, x, cond, course)
        teacher = Teacher(model, attachment, x, cond, course)
        for i, plain in enumerate(teacher.run()):
            error = skip_loss(lambda i, w: teacher.predict(i, 1 + move), i, plain, N)(np.ones(S, dtype=bool)).mean()
            assert move @ np.array(found.details["gram"][i]) @ move == pytest.approx(error, rel=0.15)
