"""What a comparison compares: the arms as data, a recipe's choice among them, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import CONTROL_TRIALS, DIAL_TRIALS, SETTINGS, TRIALS, save_tiny_pipeline

from rwopt import config
from rwopt.errors import UserError
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.schedule.steps import DIALS, Steps
from rwopt.search.arms import ARMS, BUDGETS, LEARNED, USUAL, Arm, chosen
from rwopt.search.baselines import PUBLISHED
from rwopt.search.search import Search
from rwopt.tasks import Dials


def test_every_arm_is_made_in_one_way_and_its_budget_is_known() -> None:
    tuner = config.TunerSettings(trials=5, dial_trials=3, control_trials=2)
    for name, spec in ARMS.items():
        assert spec.name == name
        assert spec.budget in BUDGETS
        assert bool(spec.learned) + bool(spec.published) + spec.solver <= 1
        assert spec.learned or (spec.weights and spec.steps is None)  # which are about what is learned
        assert spec.weights or spec.steps  # something is
        assert set(spec.steps or ()) <= set(DIALS)
        assert not spec.published or spec.published in PUBLISHED
        assert spec.learned or not spec.constant
        assert spec.evaluations(tuner) == {"none": 0, "control": 2, "full": 11}[spec.budget]
    assert {spec.published for spec in ARMS.values()} - {""} == PUBLISHED.keys()
    tuner = config.TunerSettings(trials=5, dial_trials=0, control_trials=2)  # no dials are tuned, but as a control
    some = ("plain", "best solver", "best guidance", "analytic", LEARNED)
    assert [ARMS[name].evaluations(tuner) for name in some] == [0, 0, 2, 5, 5]


def test_those_that_are_weighed_against_each_other_get_the_same_budget() -> None:
    assert {ARMS[name].budget for name in ("best guidance", "analytic", "constant", LEARNED)} == {"full"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["learned", "lerned"], "did you mean learned"),
        (["learned", "plain", "plain"], "names plain twice"),
        (["plain", "analytic"], "lacks learned"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        chosen(names)
    assert "\n" not in str(caught.value)


def test_a_choice_keeps_its_order_and_none_is_the_usual_ones() -> None:
    assert [spec.name for spec in chosen(["learned", "plain"])] == ["learned", "plain"]
    assert [spec.name for spec in chosen([])] == list(USUAL)
    assert set(USUAL) <= ARMS.keys()
    assert [spec.name for spec in chosen(list(ARMS))] == list(ARMS)


def test_a_file_gives_the_arm_back(tmp_path: Path) -> None:
    schedule = Schedule(("mid_block.attentions.0",), np.array([7.0, 0.3]), np.array([[1.5], [0.25]]))
    values, history = {"guidance": 3.0}, [("plain", 0.1)]
    arm = Arm("x", Dials(3.0, 0.5), schedule, 0.1, 0.2, 3, 4, values, history, "note", {"rule": "r"})
    arm.save(tmp_path / "x.json")
    assert Arm.load(tmp_path / "x.json") == arm


def test_a_file_keeps_all_digits_of_a_schedule(tmp_path: Path) -> None:
    """Or a resumed run would go on with another one than the run that was killed."""
    steps = Steps("dpmpp_2m", (12 + 1 / 3, 1 / 7), told=(11 + 1 / 3, 1 / 9), guidance=(10 / 3, 4.0))
    schedule = Schedule(("mid_block.attentions.0",), np.array([7.0, 1 / 3]), np.array([[1 / 3], [1 / 7]]), steps=steps)
    Arm("x", Dials(3.0, 0.5), schedule).save(tmp_path / "x.json")
    again = Arm.load(tmp_path / "x.json").schedule
    assert again is not None
    assert (again.weights == schedule.weights).all()
    assert again.steps == steps


@pytest.mark.parametrize("names", [["learned"], ["plain", "constant", "learned", "gradient norm"]])
def test_a_search_makes_the_arms_that_its_recipe_names_and_no_other(tmp_path: Path, names: list[str]) -> None:
    model = save_tiny_pipeline(tmp_path / "model")
    settings = config.load("editing", [*SETTINGS, f"model.name={model}", f"arms=[{','.join(names)}]"])
    progress = Silent()
    search = Search(settings, tmp_path / "run", progress)
    report = search.run("rwopt search recipe=editing")
    assert [row.name for row in report.arms] == names
    assert {(p.a, p.b) for p in report.paired} == {("learned", name) for name in names if name != "learned"}
    assert len(report.verdict) == ("constant" in names)
    full = TRIALS + 2 * DIAL_TRIALS
    costs: dict[str, int] = {"plain": 0, "gradient norm": CONTROL_TRIALS}
    assert progress.total == progress.done == DIAL_TRIALS + sum(costs.get(name, full) for name in names)
    probes: dict[str, Any] = {"votes.json": False, "gradient_norms.json": "gradient norm" in names}
    assert {name: (tmp_path / "run" / name).exists() for name in probes} == probes  # nobody pays for what is not asked
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "grid.png").exists()
    assert Schedule.load(tmp_path / "run" / "schedule.json").calibrated["num_inference_steps"] == 2
