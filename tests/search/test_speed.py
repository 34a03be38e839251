"""A plan under a budget: proposed, chosen on validation cases, kept, and learned with."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import SETTINGS, save_tiny_pipeline

from rwopt import config
from rwopt.errors import UserError
from rwopt.models import load_model
from rwopt.progress import Silent
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL
from rwopt.search.arms import Arm
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.experiment import Experiment
from rwopt.search.search import Search
from rwopt.search.speed import Speed
from rwopt.search.tuning import ArmTuner
from rwopt.tasks.task import attach
from rwopt.unet.cost import CostTable

RECIPE = "speed"
COMMAND = f"rwopt search recipe={RECIPE}"
CALLS = 5
CHANGES = [
    *SETTINGS, f"task.steps={CALLS}", "task.budget=0.6", "task.teacher.steps=8", "weights.group_by=stage_kind",
    "weights.knots=0", "tuner.dial_trials=0", "probe.start=none", "tuner.name=gradient",
    "steps.samplers=[ddim,dpmpp_2m]", "steps.grids=[trailing]", "speed.cases=2", "speed.proposals=3",
    "speed.actions=ho1g", "arms=[best solver,plan,sampler dials,learned]",
]  # fmt: skip


def arm(folder: Path, name: str) -> Arm:
    return Arm.load(folder / "arms" / f"{name}.json")


def test_its_recipe_says_a_budget(settings: config.Settings) -> None:
    assert config.load("speed").task.budget == 0.5
    assert settings.objective.terms == {"teacher.psnr": 1.0}
    with pytest.raises(UserError, match=r"task\.budget.*above 0 and at most 1"):
        config.load("speed", ["task.budget=1.5"])
    with pytest.raises(UserError, match="stands for no action"):
        config.load("speed", ["speed.actions=hz"])


def test_the_plan_is_within_the_budget_and_the_best_on_validation_cases(finished: Any) -> None:
    folder, search, _ = finished
    plan = arm(folder, "plan")
    scores = dict(plan.history)
    assert plan.validation == max(scores.values()) == scores[plan.choice["best"]]
    assert plan.choice["price"] <= 0.6 * CALLS + 1e-6
    assert "FFF" in scores  # the plain sampler with what the budget pays is among them
    assert len(scores) > 3
    assert plan.choice["first"] in scores
    assert search.speed.lengths == (5, 4)
    measured = sum(search.speed.errors(n).calls for n in (5, 4))
    assert plan.choice["measured"] == measured
    assert plan.calls > measured


def test_what_finding_a_plan_takes_is_told_before(finished: Any) -> None:
    folder, search, _ = finished
    plan, most = arm(folder, "plan"), 2 * 3 + 1  # plans of two lengths, and full calls
    assert len(plan.history) <= most
    errors = plan.choice["measured"] * 2 / search.settings.task.batch  # on 2 cases
    assert search.speed.calls == round(errors + most * search.speed.affordable)
    assert search.plan().calls["plan"] == search.speed.calls + search.speed.affordable  # and its test cases


def test_errors_and_prices_are_kept(finished: Any) -> None:
    folder, search, _ = finished
    assert {"cost.json", "actions-5.json", "actions-4.json"} <= {p.name for p in folder.iterdir()}
    cost = search.speed.cost()
    assert 0 < cost.time["1"] < 1.5
    assert set(cost.time) == {"1", "G"}
    assert [p.text for p in search.speed.proposed(5)] == [p.text for p in search.speed.proposed(5)]
    assert all(p.price <= search.speed.most for p in search.speed.proposed(4))


def test_a_plan_changes_the_picture_as_the_sampler_does(finished: Any) -> None:
    """The arm's pictures are those of `sample` with its actions."""
    _, search, _ = finished
    text = next(p for p in search.speed.proposed(5) if any(a != FULL for a in p.actions))
    schedule, task, base = search.speed.schedule(text.actions), search.experiment.splits.task("test"), None
    base = search.experiment.base
    made = task.made(base, schedule).latents
    with attach(search.experiment.model, schedule) as hooks:
        x, cond, course = task.inputs(hooks, base, slice(None), task.course(base, schedule.steps))
        expected = sample(search.experiment.model, hooks, x, cond, course, actions=schedule.actions)
        plain = sample(search.experiment.model, hooks, x, cond, course)
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=1e-5)
    assert float((made - plain).abs().max()) > 1e-4


def test_what_is_learned_takes_the_plan(finished: Any) -> None:
    folder, _, report = finished
    plan, learned = arm(folder, "plan").schedule, arm(folder, "learned").schedule
    assert plan is not None
    assert learned is not None
    assert plan.steps is not None
    assert learned.steps is not None
    assert len(learned.steps) == len(plan.steps)
    assert (learned.actions is None) == (plan.actions is None)
    if learned.actions is not None:
        assert learned.actions.text == plan.actions.text  # type: ignore[union-attr]
        assert [level.sigma for level in learned.actions.levels] == pytest.approx(list(learned.steps.sigmas))
    assert {row.name for row in report.arms} == {"best solver", "plan", "sampler dials", "learned"}
    assert all(np.isfinite(row.means[OBJECTIVE]) for row in report.arms)


def test_the_solver_has_the_calls_that_the_budget_pays(finished: Any) -> None:
    folder, search, _ = finished
    assert search.speed.affordable == 3
    best = arm(folder, "best solver").schedule
    assert best is not None
    assert best.steps is not None
    assert len(best.steps) == 3


def test_the_file_is_that_of_the_best_arm_on_validation_cases(finished: Any) -> None:
    folder, search, _ = finished
    arms = [arm(folder, name) for name in ("best solver", "plan", "learned")]
    best = max(arms, key=lambda a: a.validation or -np.inf)
    assert search.chosen(arms).name == best.name
    assert best.schedule is not None
    written = Schedule.load(folder / "schedule.json")
    assert written.steps is not None
    assert len(written.steps) == len(best.schedule.steps or ())
    assert (written.actions is None) == (best.schedule.actions is None)


def test_a_finished_stage_is_not_made_again(finished: Any, settings: config.Settings) -> None:
    folder, _, _ = finished
    again = Search(settings, folder, Silent())
    before = again.experiment.model.calls
    assert again.speed.plan().choice == arm(folder, "plan").choice
    assert again.experiment.model.calls == before


def test_edits_by_instruction_start_from_noise_in_plans_as_in_samplers(tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model")
    words = ["task.name=editing", "task.method=instruct", "dials.strength=0.5", f"model.name={model}"]
    settings = config.load("speed", [*CHANGES, *words])
    experiment = Experiment(settings, load_model(str(model)))
    speed = Speed(experiment, ArmTuner(experiment, tmp_path, Silent()), tmp_path)
    whole = course_by_rule(experiment.model, 4, settings.task.sampler, settings.task.grid)
    assert speed.course(4).sigmas == experiment.course(experiment.base, 4).sigmas == whole.sigmas


def costs(**changes: Any) -> dict[str, Any]:
    """A table for the tiny model's calls, in which every action costs next to nothing."""
    time = dict.fromkeys(("1", "G"), 0.01)
    table = CostTable(time, time, 1.0, 1e9, (2, 4, 8, 8), True, "another machine", "float32", 1)
    return table.to_json() | changes


@pytest.fixture(scope="module")
def priced(settings: config.Settings) -> Any:
    """The stage with the prices of a file and the actions 1 and g, on one model."""
    model = load_model(settings.model.name, dtype="float32")

    def make(folder: Path, file: Path, letters: str = "1g", guidance: float = 4.0, budget: float = 0.6) -> Speed:
        wanted = replace(
            settings, speed=replace(settings.speed, actions=letters, cost=str(file)),
            dials=replace(settings.dials, guidance=guidance), task=replace(settings.task, budget=budget),
        )  # fmt: skip
        experiment = Experiment(wanted, model)
        return Speed(experiment, ArmTuner(experiment, folder, Silent()), folder)

    return make


def test_a_plan_takes_what_is_cheap_by_the_given_costs(priced: Any, tmp_path: Path) -> None:
    """Either way round, so it is the price and not the error that decides. The run keeps its own copy."""
    file, kept = tmp_path / "cost.json", tmp_path / "run" / "cost.json"
    speed = priced(tmp_path / "run", file)
    for cheap, time in (("g", {"1": 1.5, "G": 0.01}), ("1", {"1": 0.01, "G": 1.5})):
        file.write_text(json.dumps({"model": "mine", **costs(time=time), "shares": []}))
        speed.check()
        assert kept.read_bytes() == file.read_bytes()
        file.unlink()
        speed.check()
        assert speed.cost().device == "another machine"
        plans = {letter for p in speed.proposed(4) for letter in p.text}
        assert plans == {"F", cheap}
        kept.unlink()


@pytest.mark.parametrize(
    ("document", "options", "said"),
    [
        (costs(guided=False), {}, "is of calls without guidance, this run's are with: measure without --no-guidance"),
        (costs(), {"guidance": 1.0}, "with guidance, this run's are without: measure with --no-guidance"),
        (costs(), {"letters": "1x"}, "has no cost of action x: leave it out of speed.actions, or measure again"),
        (costs(shape=[2, 4, 16, 16]), {}, "is of latents 4 x 16 x 16, this run's are 4 x 8 x 8"),
        (costs(), {"budget": 1.0}, "at task.budget=1 no plan is searched for"),
        ([], {}, "no cost table"),
    ],
)
def test_costs_that_do_not_fit_are_refused(
    priced: Any, tmp_path: Path, document: Any, options: dict[str, Any], said: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(document))
    speed = priced(tmp_path / "run", file, **options)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        speed.check()
    assert "mine.json" in str(error.value)
    assert not (tmp_path / "run" / "cost.json").exists()


def test_a_search_refuses_them_before_it_works(settings: config.Settings, tmp_path: Path) -> None:
    wrong = replace(settings, speed=replace(settings.speed, cost=str(tmp_path / "nowhere.json")))
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        Search(wrong, tmp_path / "run", Silent())
    assert not (tmp_path / "run" / "recipe.yaml").exists()
