"""What candidates are scored by, on the embedded model's own train and validation cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from rwopt import config
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.experiment import Experiment
from rwopt.search.space import Decoder
from rwopt.tasks import Dials
from rwopt.tuners import Candidate, Trial, pareto

SMALL = ["task.train=5", "task.validation=4", "task.test=2", "task.steps=2", "track.wandb=off", "model.dtype=float32",
         "tuner.name=optuna"]  # fmt: skip
Make = Callable[..., Experiment]


@pytest.fixture
def make(avatars: Model) -> Make:
    return lambda *settings: Experiment(config.load("editing", [*SMALL, *settings]), avatars)


def never(scores: Mapping[int, float]) -> bool:
    return False


def test_parts_give_what_the_whole_gives(make: Make) -> None:
    experiment = make("tuner.prune=0.1", "tuner.part=2", "tuner.limits={source.ssim: 0.5}")
    seen: dict[int, float] = {}
    begun = []

    def report(scores: Mapping[int, float]) -> bool:
        begun.append(next(iter(scores)))
        assert not seen.keys() & scores.keys() or len(seen) == 5
        seen.update(scores)
        return False

    whole = experiment.evaluator.of("train", (experiment.base, None))[0]
    parts = experiment.evaluator.train(experiment.base, None, 0, report)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-5)
    assert parts.excess == pytest.approx(whole.excess, abs=1e-5)
    assert parts.calls == whole.calls == 2  # three small batches are charged as the one that they could have been
    assert sorted(seen) == list(range(5))
    assert np.mean(list(seen.values())) == pytest.approx(whole.scores[0], abs=1e-5)  # type: ignore[index]
    experiment.evaluator.train(experiment.base, None, 1, report)
    assert begun[0] != begun[3]  # another candidate begins elsewhere


def test_who_is_given_up_has_no_score_and_costs_less(make: Make) -> None:
    experiment = make("tuner.prune=0.1", "tuner.part=1", "task.batch=1")
    assert experiment.evaluator.train(experiment.base, None, 0, lambda scores: True).scores is None
    calls = experiment.evaluator.train(experiment.base, None, 0, lambda scores: True).calls
    assert (calls, experiment.evaluator.train(experiment.base, None, 0, never).calls) == (2, 10)
    experiment = make("tuner.prune=0.1", "tuner.part=5")
    outcome = experiment.evaluator.train(experiment.base, None, 0, lambda scores: True)
    assert outcome.scores is not None  # nothing is left to save


def test_less_is_better_counts_negative(make: Make) -> None:
    experiment = make("tuner.objectives=[objective,judge.distance]", "tuner.limits={judge.distance: 0.01}")
    assert experiment.evaluator.labels == [OBJECTIVE, "-judge.distance"]
    outcome = experiment.evaluator.of("train", (experiment.base, None))[0]
    assert outcome.scores is not None
    assert outcome.scores[1] < 0
    assert outcome.excess["judge.distance"] == pytest.approx(-outcome.scores[1] - 0.01)  # the distance above its limit


def test_the_front_is_chosen_from_by_the_rule(make: Make) -> None:
    """Edits of growing strength trade what changes against what stays."""
    experiment = make("tuner.objectives=[scorer.success,source.ssim]", "tuner.top_k=9")
    decode = Decoder(experiment.base)
    points = [{"strength": s, "guidance": 4.0} for s in (0.35, 0.5, 0.7, 0.9, 1.0)]
    trials = []
    for i, point in enumerate(points):
        outcome = experiment.evaluator.train(*decode(point), i, never)
        assert outcome.scores is not None
        trials.append(Trial(Candidate(i, point), outcome.scores[0], 2, outcome.scores))
    chosen, outcome, about = experiment.evaluator.choose("learned", trials, decode, 9)
    values = np.array([experiment.evaluator.of("validation", decode(t.candidate.values))[0].scores for t in trials])
    plain = np.array(experiment.evaluator.of("validation", (experiment.base, None))[0].scores)
    train = np.array([t.scores for t in trials])
    fits = [i for i in pareto.front(train) if values[i, 1] >= plain[1]]
    assert chosen.candidate.number == max(fits, key=lambda i: values[i, 0])
    np.testing.assert_allclose(outcome.scores, values[chosen.candidate.number], atol=1e-6)
    assert about["rule"] == pareto.rule(["scorer.success", "source.ssim"], 0.0)
    assert sorted(map(tuple, about["front"])) == sorted(map(tuple, train[pareto.front(train)].tolist()))
    assert about["hypervolume"] == pareto.hypervolume(train, np.array(about["reference"]))
    assert about["hypervolume"] > 0


def test_a_broken_limit_comes_last_and_is_told(make: Make) -> None:
    decode = Decoder(Dials(4.0, 0.7))
    for bound, kept in ((0.0, True), (1.0, False)):  # no edit leaves the picture as it was
        experiment = make(f"tuner.limits={{source.ssim: {bound}}}")
        trials = [Trial(Candidate(i, {"strength": s}), 0.1 * i) for i, s in enumerate((0.4, 1.0))]
        chosen, outcome, about = experiment.evaluator.choose("learned", trials, decode, 2)
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
