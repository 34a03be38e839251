"""What candidates are scored by, on the embedded model's own train and validation cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from rwopt import config
from rwopt.arms import Workshop
from rwopt.errors import UserError
from rwopt.evaluation import OBJECTIVE
from rwopt.models import Model
from rwopt.points import Meaning
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.tasks import Dials
from rwopt.tuners import Candidate, Trial, pareto
from rwopt.weights import WeightFunction

SMALL = ["task.train=5", "task.validation=4", "task.test=2", "task.steps=2", "track.wandb=off", "model.dtype=float32",
         "tuner.name=optuna"]  # fmt: skip
Make = Callable[..., Workshop]


@pytest.fixture
def make(avatars: Model, tmp_path: Path) -> Make:
    return lambda *settings: Workshop(config.load("editing", [*SMALL, *settings]), tmp_path, avatars, Silent())


def never(scores: Mapping[int, float]) -> bool:
    return False


def test_parts_give_what_the_whole_gives(make: Make) -> None:
    shop = make("tuner.prune=0.1", "tuner.part=2", "tuner.limits={source.ssim: 0.5}")
    seen: dict[int, float] = {}
    begun = []

    def report(scores: Mapping[int, float]) -> bool:
        begun.append(next(iter(scores)))
        assert not seen.keys() & scores.keys() or len(seen) == 5
        seen.update(scores)
        return False

    whole = shop.measure.of("train", (shop.base, None))[0]
    parts = shop.measure.train(shop.base, None, 0, report)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-5)
    assert parts.excess == pytest.approx(whole.excess, abs=1e-5)
    assert parts.calls == whole.calls == 2  # three small batches are charged as the one that they could have been
    assert sorted(seen) == list(range(5))
    assert np.mean(list(seen.values())) == pytest.approx(whole.scores[0], abs=1e-5)  # type: ignore[index]
    shop.measure.train(shop.base, None, 1, report)
    assert begun[0] != begun[3]  # another candidate begins elsewhere


def test_who_is_given_up_has_no_score_and_costs_less(make: Make) -> None:
    shop = make("tuner.prune=0.1", "tuner.part=1", "task.batch=1")
    assert shop.measure.train(shop.base, None, 0, lambda scores: True).scores is None
    calls = shop.measure.train(shop.base, None, 0, lambda scores: True).calls
    assert (calls, shop.measure.train(shop.base, None, 0, never).calls) == (2, 10)
    shop = make("tuner.prune=0.1", "tuner.part=5")
    assert shop.measure.train(shop.base, None, 0, lambda scores: True).scores is not None  # nothing is left to save


def test_less_is_better_counts_negative(make: Make) -> None:
    shop = make("tuner.objectives=[objective,judge.distance]", "tuner.limits={judge.distance: 0.01}")
    assert shop.measure.labels == [OBJECTIVE, "-judge.distance"]
    outcome = shop.measure.of("train", (shop.base, None))[0]
    assert outcome.scores is not None
    assert outcome.scores[1] < 0
    assert outcome.excess["judge.distance"] == pytest.approx(-outcome.scores[1] - 0.01)  # the distance above its limit


def test_the_front_is_chosen_from_by_the_rule(make: Make) -> None:
    """Edits of growing strength trade what changes against what stays."""
    shop = make("tuner.objectives=[scorer.success,source.ssim]", "tuner.top_k=9")
    decode = Meaning(shop.base)
    points = [{"strength": s, "guidance": 4.0} for s in (0.35, 0.5, 0.7, 0.9, 1.0)]
    trials = []
    for i, point in enumerate(points):
        outcome = shop.measure.train(*decode(point), i, never)
        assert outcome.scores is not None
        trials.append(Trial(Candidate(i, point), outcome.scores[0], 2, outcome.scores))
    chosen, outcome, about = shop.measure.choose("learned", trials, decode, 9)
    values = np.array([shop.measure.of("validation", decode(t.candidate.values))[0].scores for t in trials])
    plain = np.array(shop.measure.of("validation", (shop.base, None))[0].scores)
    train = np.array([t.scores for t in trials])
    fits = [i for i in pareto.front(train) if values[i, 1] >= plain[1]]
    assert chosen.candidate.number == max(fits, key=lambda i: values[i, 0])
    np.testing.assert_allclose(outcome.scores, values[chosen.candidate.number], atol=1e-6)
    assert about["rule"] == pareto.rule(["scorer.success", "source.ssim"], 0.0)
    assert sorted(map(tuple, about["front"])) == sorted(map(tuple, train[pareto.front(train)].tolist()))
    assert about["hypervolume"] == pareto.hypervolume(train, np.array(about["reference"]))
    assert about["hypervolume"] > 0


def test_a_broken_limit_comes_last_and_is_told(make: Make) -> None:
    decode = Meaning(Dials(4.0, 0.7))
    for bound, kept in ((0.0, True), (1.0, False)):  # no edit leaves the picture as it was
        shop = make(f"tuner.limits={{source.ssim: {bound}}}")
        trials = [Trial(Candidate(i, {"strength": s}), 0.1 * i) for i, s in enumerate((0.4, 1.0))]
        chosen, outcome, about = shop.measure.choose("learned", trials, decode, 2)
        assert about == {"limits": {"source.ssim": bound}, "kept": kept}
        assert (max(outcome.excess.values()) <= 0) == kept
        if not kept:
            assert chosen.candidate.values["strength"] == 0.4  # it breaks the limit least


@pytest.mark.parametrize(
    ("setting", "said"),
    [("tuner.objectives=[objective,scorer.kep]", "scorer.kept"), ("tuner.limits={source.sim: 1}", "source.ssim")],
)
def test_unknown_objectives_are_refused_at_once(make: Make, setting: str, said: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {said}"):
        make(setting)


def test_a_meaning_survives_as_text(make: Make) -> None:
    import json

    function = WeightFunction(("mid_block.attentions.0",), np.array([7.0, 1 / 3]), {"all": [0]}, "output")
    fixed = Schedule(("mid_block.attentions.0",), np.array([7.0, 1 / 3]), np.array([[1 / 3], [1.1]]))
    point = {"guidance": 3.25, "k0/all": 0.123456789, "k1/all": -1 / 7}
    for meaning in (Meaning(Dials(4, 0.7)), Meaning(Dials(4, 0.7), function), Meaning(Dials(4, 0.7), schedule=fixed)):
        again = Meaning.from_dict(json.loads(json.dumps(meaning.to_dict())))
        (dials, schedule), (dials2, schedule2) = meaning(point), again(point)
        assert dials == dials2 == Dials(3.25, 0.7)
        assert (schedule is None) == (schedule2 is None)
        if schedule is not None and schedule2 is not None:
            assert (schedule.weights == schedule2.weights).all()  # to the last bit
            assert (schedule.sigmas == schedule2.sigmas).all()
            assert (schedule.sites, schedule.mode) == (schedule2.sites, schedule2.mode)
