"""A search for few calls: the sampler's own dials beside weights, the teacher as the truth, plain solvers to beat."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import CONTROL_TRIALS, SETTINGS, TRIALS, check_files

from rwopt import config
from rwopt.errors import UserError
from rwopt.progress import Silent
from rwopt.sampling.course import course_by_rule
from rwopt.schedule import Schedule
from rwopt.search import tuning
from rwopt.search.arms import ARMS, Arm, dials_alone
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.search import Search
from rwopt.tuners.gradient import GradientTuner
from rwopt.tuners.options import GradientOptions

NAMES = ["plain", "best solver", "best guidance", "sampler dials", "weights", "learned"]
RECIPE = "few-steps"
COMMAND = f"rwopt search recipe={RECIPE}"
CHANGES = [
    *SETTINGS, "task.steps=3", "task.sampler=dpmpp_2m", "task.teacher.steps=8", "weights.knots=0",
    "weights.group_by=stage_kind", "tuner.dial_trials=0", "probe.start=none", "tuner.name=gradient",
    "steps.learn=[clock,told,guidance]", "steps.samplers=[ddim,dpmpp_2m]",
    "steps.grids=[trailing,karras,'14.6,2.9,0.3','14.6,0.3']", f"arms=[{','.join(NAMES)}]",
]  # fmt: skip
PLAIN_SOLVERS = [f"{s}, {g}" for s in ("ddim", "dpmpp_2m") for g in ("trailing", "karras", "14.6,2.9,0.3")]


def arm(folder: Path, name: str) -> Arm:
    return Arm.load(folder / "arms" / f"{name}.json")


def test_its_recipe_is_about_the_teacher_alone(settings: config.Settings) -> None:
    assert settings.objective.terms == {"teacher.psnr": 1.0}
    assert settings.weights.knots == settings.tuner.dial_trials == 0


def test_the_report_has_no_second_judge_and_all_arms(finished: Any, settings: config.Settings) -> None:
    folder, search, report = finished
    assert [row.name for row in report.arms] == NAMES
    assert [metric.name for metric in report.metrics] == [OBJECTIVE, *settings.objective.report]
    assert {(p.a, p.b) for p in report.paired} == {("learned", name) for name in NAMES[:-1]}
    assert [sentence.split(":")[0] for sentence in report.verdict if sentence.startswith("Learned")] == [
        "Learned against the best plain sampler and grid",
        "Learned against all of the sampler's dials (what block weights add)",
        "Learned against tuned guidance without weights",
    ]
    assert search.progress.done == search.progress.total == search.evaluations
    assert check_files(folder) > 15
    scores = {row.name: row.means[OBJECTIVE] for row in report.arms}
    assert all(5 < psnr < 100 for psnr in scores.values())  # decibels, not a mean of zeros and ones


def test_the_best_plain_solver_is_chosen_on_validation_cases(finished: Any) -> None:
    folder, search, _ = finished
    best = arm(folder, "best solver")
    assert [name for name, _ in best.history] == PLAIN_SOLVERS  # a list of two levels is not for three calls
    scores = dict(best.history)
    assert best.validation == max(scores.values()) == scores[best.choice["best"]]
    assert len(set(scores.values())) == len(scores)
    assert best.evaluations == len(PLAIN_SOLVERS)
    assert best.calls == 3 * len(PLAIN_SOLVERS)
    assert best.note.endswith(f": {best.choice['best']}")
    assert best.schedule is not None
    assert best.schedule.is_plain
    sampler, grid = best.choice["best"].split(", ", 1)
    assert best.schedule.steps is not None
    assert best.schedule.steps.sampler == sampler
    model, task = search.experiment.model, search.experiment.splits.task("validation")
    course = course_by_rule(model, 3, sampler, grid)
    np.testing.assert_allclose(best.schedule.steps.sigmas, course.sigmas)
    plain = search.experiment.value("validation", best.dials, None)
    assert plain == pytest.approx(scores["dpmpp_2m, trailing"], abs=1e-3)  # the recipe's own sampler and grid
    assert len(task) == 3
    # once more, with a second one of the same pictures: the first stays; and one of no value does not win
    tuner, made = search.tuner, search.solvers()
    keys = [best.choice["best"], *(key for key in made if key != best.choice["best"])][:2]
    again = tuner.best_of("twice", {key: made[key] for key in [*keys, keys[0] + " again"] if key in made}, "note")
    assert again.choice == {"best": keys[0]}
    assert tuner.best_of("twice", {}, "kept") == Arm.load(folder / "arms" / "twice.json")
    for path in folder.glob("arms/twice*"):
        path.unlink()


def test_knots_are_the_calls_and_dials_are_those_that_an_arm_learns(finished: Any, settings: config.Settings) -> None:
    _, search, _ = finished
    base = search.experiment.base
    sigmas = course_by_rule(search.experiment.model, 3, "dpmpp_2m").sigmas
    learned = search.function(ARMS["learned"], base)
    np.testing.assert_allclose(learned.sigmas, sigmas)
    assert learned.dimension == 3 * len(learned.groups) + 3 * 3
    assert learned.names[-9:] == [f"{d}{i}" for d in ("clock", "told", "guidance") for i in range(3)]
    weights, dials = search.function(ARMS["weights"], base), search.function(ARMS["sampler dials"], base)
    assert weights.steps is None
    assert weights.names == learned.names[:-9]
    assert dials.names == learned.names[-9:]
    both, clock = search.function(ARMS["weights and clock"], base), search.function(ARMS["clock"], base)
    assert both.names == learned.names[:-6]
    assert clock.names == learned.names[-9:-6]
    constant = search.function(ARMS["constant"], base)
    assert len(constant.sigmas) == 1
    assert constant.names[-9:] == learned.names[-9:]


def test_arms_have_what_they_learn_and_no_more(finished: Any, settings: config.Settings) -> None:
    folder, search, _ = finished
    origins = ["plain", *["gradient"] * (TRIALS - 1)]
    for name in ("sampler dials", "weights", "learned"):
        made = arm(folder, name)
        assert [origin for origin, _ in made.history] == origins  # no probe; and no dials after the weights
        assert made.dials == search.experiment.base
        assert made.evaluations == TRIALS
        assert not (folder / "arms" / f"{name} weights.json").exists()
        assert made.schedule is not None
        assert (made.schedule.steps is not None) == (name != "weights")
        function = search.function(ARMS[name], made.dials)
        theta = np.array([made.values[n] for n in function.names])
        np.testing.assert_array_equal(function.schedule(theta).weights, made.schedule.weights)
        assert made.schedule.is_plain == (name == "sampler dials" or (theta == 0).all())
    assert len(arm(folder, "best guidance").history) == CONTROL_TRIALS
    assert arm(folder, "dials").evaluations == 0
    teachers = {name: 8 * n for name, n in (("sampler dials", 3), ("weights", 3), ("learned", 3), ("best guidance", 2))}
    for name, calls in teachers.items():  # train and validation, and the two draws of each train case
        made = arm(folder, name)
        spent = made.calls - calls
        ranked = min(len(made.history), settings.tuner.top_k)
        if name == "best guidance":
            assert spent == 3 * (CONTROL_TRIALS + ranked)
        else:
            assert 3 * TRIALS < spent < 3 * (TRIALS + ranked + 20), name
    starts = {dict(arm(folder, name).history)["plain"] for name in ("sampler dials", "weights", "learned")}
    assert max(starts) == pytest.approx(min(starts), abs=1e-3)  # theta 0 is the plain model on the recipe's own grid
    kept = len(list((folder / "teacher").iterdir()))
    assert kept == len(search.experiment.splits.teacher_calls) == 4  # train, two draws of it, validation, test


def test_the_file_holds_the_steps(finished: Any, settings: config.Settings) -> None:
    folder, search, _ = finished
    written, learned = Schedule.load(folder / "schedule.json"), arm(folder, "learned").schedule
    assert learned is not None
    assert written.steps is not None
    assert learned.steps is not None
    assert written.steps.sampler == "dpmpp_2m"
    assert len(written.steps) == len(written.steps.told) == len(written.steps.guidance) == 3
    for name in ("sigmas", "told", "guidance"):
        np.testing.assert_allclose(getattr(written.steps, name), getattr(learned.steps, name), rtol=1e-5)
    np.testing.assert_allclose(written.sigmas, written.steps.sigmas, rtol=1e-5)  # a knot for each call
    assert written.calibrated["scheduler"]["_class_name"] == "DPMSolverMultistepScheduler"
    # a file is worth what the arm was
    task = search.experiment.splits.task("test")
    psnr = [search.experiment.value("test", task_dials, s) for task_dials, s in
            [(arm(folder, "learned").dials, s) for s in (learned, written)]]  # fmt: skip
    assert psnr[0] == pytest.approx(psnr[1], abs=1e-3)
    assert len(task) == settings.task.test


def test_without_its_last_arms_a_run_ends_as_it_had(
    finished: Any, settings: config.Settings, tmp_path: Path
) -> None:
    folder, _, report = finished
    part = shutil.copytree(folder, tmp_path / "run")
    files = [f"arms/{name}{end}" for name in ("weights", "learned") for end in (".json", ".test.json")]
    for name in (*files, "schedule.json", "report.html"):
        (part / name).unlink()
    again = Search(settings, part, Silent()).run(COMMAND)
    for a, b in zip(again.arms, report.arms, strict=True):
        assert a == b
    assert again == report
    assert (part / "schedule.json").read_bytes() == (folder / "schedule.json").read_bytes()
    shutil.rmtree(part / "studies" / "learned")  # and made from nothing
    for name in ("arms/learned.json", "arms/learned.test.json", "schedule.json"):
        (part / name).unlink()
    assert Search(settings, part, Silent()).run(COMMAND) == report
    assert (part / "schedule.json").read_bytes() == (folder / "schedule.json").read_bytes()


def test_what_is_read_back_is_tested_as_what_was_made(
    finished: Any, settings: config.Settings, tmp_path: Path
) -> None:
    """A run that is killed between an arm and its test reads the arm from its file."""
    folder, _, report = finished
    part = shutil.copytree(folder, tmp_path / "run")
    for path in part.glob("arms/*.test.json"):
        path.unlink()
    (part / "schedule.json").unlink()
    search = Search(settings, part, Silent())
    assert search.run(COMMAND) == report
    assert (part / "schedule.json").read_bytes() == (folder / "schedule.json").read_bytes()


def test_weights_may_begin_where_the_dials_alone_have_come(
    settings: config.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """That arm's price is part of theirs, their pace is finer; weights without dials begin from the plain model."""
    rates = {}

    class Seen(GradientTuner):
        def __init__(self, study: str, *args: Any, **rest: Any) -> None:
            rates[study] = next(arg for arg in args if isinstance(arg, GradientOptions)).rate
            super().__init__(study, *args, **rest)

    monkeypatch.setattr(tuning, "GradientTuner", Seen)
    changes = [*CHANGES, f"model.name={settings.model.name}", "probe.start=dials"]
    search = Search(config.load(RECIPE, changes), tmp_path / "run", Silent(), tmp_path / "teacher")
    dials = search.dials()
    learned, weights = (search.make(ARMS[name], dials) for name in ("learned", "weights"))
    alone = arm(tmp_path / "run", "sampler dials")  # made on the way
    assert search.make(ARMS["sampler dials"], dials) == alone
    history = dict(learned.history)
    assert [origin for origin, _ in learned.history] == ["plain", "dials", *["gradient"] * (TRIALS - 2)]
    assert [origin for origin, _ in weights.history] == ["plain", *["gradient"] * (TRIALS - 1)]
    assert history["dials"] in [pytest.approx(value, abs=1e-4) for _, value in alone.history]
    assert history["dials"] != history["plain"]
    rate = search.settings.gradient.rate
    assert rates == {"sampler dials": rate, "weights": rate, "learned": pytest.approx(rate / 3)}
    assert learned.evaluations == alone.evaluations + TRIALS
    assert learned.calls > alone.calls + 3 * TRIALS
    second = search.learn(dials, 1, name="learned 1")
    assert dict(second.history)["dials"] in [
        pytest.approx(value, abs=1e-4) for _, value in arm(tmp_path / "run", "sampler dials 1").history
    ]
    changes += ["steps.learn=[guidance]"]
    with pytest.raises(UserError, match=r"probe.start=dials with steps.learn=\['guidance'\]: no arm learns these"):
        Search(config.load(RECIPE, changes), tmp_path / "other", Silent(), tmp_path / "teacher")


def test_which_arm_learns_the_dials_alone() -> None:
    every = list(ARMS.values())

    def alone(name: str, learn: list[str]) -> str | None:
        found = dials_alone(ARMS[name], every, learn)
        return found and found.name

    assert alone("learned", ["guidance", "clock", "told"]) == alone("constant", ["clock", "told", "guidance"])
    assert alone("learned", ["clock", "told", "guidance"]) == "sampler dials"
    assert alone("learned", ["told", "clock"]) == "clock and told"
    assert alone("weights and clock", ["clock", "told", "guidance"]) == "clock"
    assert alone("learned", ["told"]) is None
    assert alone("learned", []) is None  # "plain" learns nothing
    assert alone("weights", ["clock"]) is None
    assert alone("sampler dials", ["clock"]) is None
    assert dials_alone(ARMS["learned"], [ARMS["learned"]], ["clock"]) is None
