"""One-at-a-time ablation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.probes import K, N, Quadratic, S, attach, coupled, inputs, spearman

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.ablation import ablate
from rwopt.sampling.denoise import predict


def test_ablation_is_the_relative_error_of_a_skip(model: Model) -> None:
    x, cond, course = inputs(model)
    weights = torch.ones(S)
    weights[3] = 0
    with attach(model, "residual") as attachment, torch.no_grad():
        found = make_probe("ablation")(model, attachment, x, cond, course)
        plain, cut = (predict(model, attachment, x, course.told[0], cond, w) for w in (None, weights))
        by_block = make_probe("ablation", by="block")(model, attachment, x, cond, course)
    ratios = [
        float((cut[[n, N + n]] - plain[[n, N + n]]).square().sum() / plain[[n, N + n]].square().sum()) for n in (0, 1)
    ]
    assert found.scores[0, 3] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert by_block.calls == K * (1 + 5)
    assert by_block.scores[0, 3] == by_block.scores[0, 4]


def test_ablation_in_output_mode_would_cut_the_stream(model: Model) -> None:
    with attach(model, "output") as attachment:
        for name in ("gram", "shapley"):
            with pytest.raises(UserError, match="mode=residual"):
                make_probe(name)(model, attachment, *inputs(model))
        with pytest.raises(UserError, match="mode=residual"):
            make_probe("ablation")(model, attachment, *inputs(model))
        found = make_probe("ablation", value=0.97)(model, attachment, *inputs(model))
    assert (found.scores > 0).all()


def test_ablation_ranks_known_sensitivities() -> None:
    rng = np.random.default_rng(1)
    hessians = np.array([coupled(rng, 7, 1.0, 0.5) for _ in range(200)])
    net = Quadratic(hessians)
    errors = ablate(net.predict, net.run(), [[s] for s in range(7)], 7, 1)[..., 0]
    assert net.calls == 200 * (1 + 7)
    truth = hessians.diagonal(axis1=1, axis2=2)
    scale = net.plain.square().mean((1, 2, 3, 4)).numpy()[:, None]
    np.testing.assert_allclose(errors * scale, truth, rtol=1e-9)
    shapley = hessians.sum(2)  # of the game v(A) = 1_A' H 1_A
    assert np.mean([spearman(e, t) for e, t in zip(errors, shapley, strict=True)]) >= 0.9
