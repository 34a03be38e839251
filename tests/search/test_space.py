"""The search space: what a point of the box means, also after a journey as text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwopt.schedule import Schedule
from rwopt.schedule.steps import StepFunction
from rwopt.schedule.weights import WeightFunction
from rwopt.search.space import Decoder, theta_box
from rwopt.tasks import Dials


def test_a_decoder_survives_as_text() -> None:
    function = WeightFunction(("mid_block.attentions.0",), np.array([7.0, 1 / 3]), {"all": [0]}, "output")
    fixed = Schedule(("mid_block.attentions.0",), np.array([7.0, 1 / 3]), np.array([[1 / 3], [1.1]]))
    point = {"guidance": 3.25, "k0/all": 0.123456789, "k1/all": -1 / 7}
    for decoder in (Decoder(Dials(4, 0.7)), Decoder(Dials(4, 0.7), function), Decoder(Dials(4, 0.7), schedule=fixed)):
        again = Decoder.from_dict(json.loads(json.dumps(decoder.to_dict())))
        (dials, schedule), (dials2, schedule2) = decoder(point), again(point)
        assert dials == dials2 == Dials(3.25, 0.7)
        assert (schedule is None) == (schedule2 is None)
        if schedule is not None and schedule2 is not None:
            assert (schedule.weights == schedule2.weights).all()  # to the last bit
            assert (schedule.sigmas == schedule2.sigmas).all()
            assert (schedule.sites, schedule.mode) == (schedule2.sites, schedule2.mode)


TABLE = np.exp(np.linspace(np.log(0.03), np.log(14.6), 1000))  # VE noise levels of training timesteps


@pytest.mark.parametrize("rank", [0, 1])
def test_a_decoder_with_the_samplers_dials_survives_as_text(rank: int) -> None:
    steps = StepFunction("uni_pc", TABLE[[999, 666, 333]], TABLE, 4.0, ("told", "clock", "guidance"))
    sites = ("down_blocks.0.attentions.0", "mid_block.attentions.0")
    function = WeightFunction(sites, np.array([7.0, 1 / 3]), {"a": [0], "b": [1]}, rank=rank, steps=steps)
    rng = np.random.default_rng(0)
    point = dict(zip(function.names, rng.uniform(-0.5, 0.5, function.dimension).tolist(), strict=True))
    decoder = Decoder(Dials(4, 0.7), function)
    made = decoder(point)[1]
    fixed = Decoder(Dials(4, 0.7), schedule=made)
    for one in (decoder, fixed):
        again = Decoder.from_dict(json.loads(json.dumps(one.to_dict())))
        dials, schedule = again(point)
        assert dials == Dials(4, 0.7)
        assert made is not None
        assert schedule is not None
        assert made.steps is not None
        assert schedule.steps is not None
        assert schedule.steps.sampler == "uni_pc"
        assert schedule.steps == made.steps  # to the last bit, as weights are
        assert (schedule.weights == made.weights).all()
        assert (schedule.sigmas == made.sigmas).all()
    assert again.function is None
    assert Decoder.from_dict(json.loads(json.dumps(decoder.to_dict()))).function.names == function.names  # type: ignore[union-attr]


def test_the_box_has_each_numbers_own_reach() -> None:
    starts = [np.array([0.0, 0.0, 0.0]), np.array([0.2, -0.1, 0.0])]
    box = theta_box(["k0/all", "k1/all", "clock0"], starts, np.array([0.4, 0.4, 2.0]))
    assert [p.name for p in box] == ["k0/all", "k1/all", "clock0"]
    np.testing.assert_allclose([(p.low, p.high) for p in box], [(-0.4, 0.6), (-0.5, 0.4), (-2.0, 2.0)])
