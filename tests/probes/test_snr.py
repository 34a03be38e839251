"""What scaling a branch does to signal and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.probes import attach, inputs

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.snr import Moments, watch
from rwopt.sampling.denoise import predict
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites


@pytest.mark.parametrize("kinds", [("transformer",), ("self", "cross", "ff")])
def test_snr_slope_agrees_with_scaling_the_branch(kinds: tuple[str, ...], model: Model) -> None:
    """The derivative of the log-SNR that one reads after really scaling the branch by 1 +- h."""
    x, cond, _ = inputs(model, guided=False)
    sites = list_sites(model.unet, kinds)
    site = next(i for i, s in enumerate(sites) if s.path.startswith("up_blocks.1"))  # one transformer block each
    draws = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(3)) * 0.5

    def moments(weight: float) -> Moments:
        out, weights = Moments(), torch.ones(len(sites))
        weights[site] = weight
        with Attachment(model.unet, [s.id for s in sites]) as attachment, torch.no_grad():
            for noise in draws:
                with watch(model.unet, sites) as seen:
                    predict(model, attachment, x + noise, 300, cond, weights)
                out.add(*seen[site, 0])
        return out

    slope = (moments(1.01).log_snr() - moments(0.99).log_snr()) / 0.02
    np.testing.assert_allclose(moments(1.0).slope(), slope, rtol=2e-2, atol=2e-3)


def test_snr_needs_a_branch(model: Model) -> None:
    with attach(model, "output") as attachment, pytest.raises(UserError, match="keeps its SNR"):
        make_probe("snr")(model, attachment, *inputs(model))


def test_snr_estimator_finds_known_parts() -> None:
    rng = np.random.default_rng(5)
    s, sa = rng.standard_normal((2, 1, 4000))
    mix, own = 0.5, 0.3  # n_a = mix n + own noise
    moments = Moments()
    for _ in range(400):
        n = rng.standard_normal((1, 4000)) * 2
        moments.add(torch.tensor(s + n), torch.tensor(sa + mix * n + own * rng.standard_normal((1, 4000))))
    truth = 2 * (s @ sa.T)[0, 0] / (s @ s.T)[0, 0] - 2 * mix
    assert moments.slope()[0] == pytest.approx(truth, abs=0.02)
    assert moments.log_snr()[0] == pytest.approx(np.log((s @ s.T)[0, 0] / (4 * 4000)), abs=0.02)
