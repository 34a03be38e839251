"""The search space: what a point of the box means, also after a journey as text."""

from __future__ import annotations

import json

import numpy as np

from rwopt.schedule import Schedule
from rwopt.schedule.weights import WeightFunction
from rwopt.search.space import Decoder
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
