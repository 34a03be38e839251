"""Judges of other models than the default: whose network is asked, and the contract with other attributes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_objectives as single
import torch
from helpers.embedded import ATTRIBUTES, models, save_judges
from test_objectives import N, close, latents, pictures

from rwopt.embedded import DEFAULT
from rwopt.errors import UserError
from rwopt.models.judge import Judge
from rwopt.objectives import Batch, Objectives, judges, make_objective, make_set, objective_spec

METHODS = [name for name in vars(single.TestContract) if name.startswith("test_")]
NAMES = [*(name for name in judges.specs() if name.startswith("judge.")), "teacher.features.judge"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_judges(tmp_path_factory.mktemp("judges")))


@pytest.fixture(params=["other", *models(DEFAULT)])
def model(request: pytest.FixtureRequest, other: str) -> str:
    """A random one, and every embedded one but the default, which `test_objectives.py` has."""
    return other if request.param == "other" else str(request.param)


def batch_of(model: str) -> Batch:
    rng = np.random.default_rng(0)
    values = Judge.load("judge", model).attributes
    target = [{name: str(rng.choice(known)) for name, known in values.items()} for _ in range(N)]
    first, second, *_ = values
    changed, hidden = [[first], [second], [first], [second]], [[], [first], [second], []]
    return Batch(pictures(1), pictures(2), pictures(3), pictures(4), latents(5), latents(6), ["a"] * N, target, changed,
                 hidden)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name: str, method: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "make_objective", partial(make_objective, judges=model))
    getattr(single.TestContract(), method)(name, batch_of(model))


def test_whose_judges_are_asked(model: str) -> None:
    batch = batch_of(model)
    assert batch.target is not None
    judge = Judge.load("judge", model)
    hits = []
    for i, target in enumerate(batch.target):
        verdict, seen = judge(batch.images[i : i + 1]), judge.attributes.keys() - set((batch.hidden or [])[i])
        hits.append(np.mean([judge.attributes[name][int(verdict.logits[name].argmax())] == target[name]
                             for name in seen]))  # fmt: skip
    made = Objectives(model=model)
    close(made["judge.accuracy"](batch), torch.tensor(np.array(hits), dtype=torch.float32))
    close(made["judge.realism"](batch), judge(batch.images).realism.sigmoid())
    assert not torch.equal(made["judge.realism"](batch), make_objective("judge.realism")(batch))
    spec = made.spec("judge.realism")
    assert (spec.judges, spec.weights.startswith(f"{model}/judge")) == (model, True)
    assert spec.size != objective_spec("judge.realism").size


def test_a_model_without_judges_has_the_default_ones(tmp_path: Path, other: str) -> None:
    batch = batch_of(DEFAULT)
    for place in (str(tmp_path), "somebody/model", DEFAULT):
        made = Objectives(model=place)
        assert made.given("judge.identity") == {"judges": DEFAULT}
        assert torch.equal(made["judge.identity"](batch), make_objective("judge.identity")(batch))
    assert Objectives(model=other).given("truth.psnr") == {}
    chosen = Objectives({"judge.realism": {"judges": other}})
    assert chosen.given("judge.realism") == {"judges": other}
    assert torch.equal(chosen["judge.realism"](batch), make_objective("judge.realism", judges=other)(batch))


def test_features_of_sets_are_those_of_the_model(other: str) -> None:
    def distance(**options: str) -> float:
        made = make_set("set.kid", features="judge", **options)
        made.update(pictures(1, 64), real=True)
        made.update(pictures(2, 64), real=False)
        return made.compute().value

    assert distance() == distance(judges=DEFAULT)
    assert distance(judges=other) != distance()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_objective("judge.kept", judges="no/where"), "^model no/where has no scorer: use avatars, "),
        (lambda: make_objective("teacher.features.judge", judges="no/where"), "^model no/where has no judge: use "),
        (lambda: make_objective("teacher.psnr", judges=DEFAULT), "teacher.psnr has no option judges: it takes none$"),
        (lambda: make_objective("judge.kept", judge=DEFAULT), "judge.kept has no option judge: it takes judges$"),
    ],
)
def test_judges_that_are_none(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_targets_of_another_world_are_named(other: str) -> None:
    batch = batch_of(DEFAULT)
    with pytest.raises(UserError, match=f"^target of picture 0 lacks style: give {', '.join(ATTRIBUTES)}$"):
        make_objective("judge.accuracy", judges=other)(batch)
