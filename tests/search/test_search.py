"""A whole search on a tiny random model: what it leaves, what it counts, and that it can be repeated."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import (
    CONTROLS,
    DIAL_TRIALS,
    SETTINGS,
    STUDIES,
    TRIALS,
    check_files,
    save_tiny_pipeline,
    scored_trials,
)
from PIL import Image

from rwopt import config, files
from rwopt.errors import UserError
from rwopt.probes import Importance
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search.arms import ARMS as SPECS
from rwopt.search.arms import Arm
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE
from rwopt.search.publish import describe
from rwopt.search.search import Search
from rwopt.search.space import dial_box
from rwopt.search.verdict import explain, headline
from rwopt.tracking import JsonlTracker

ARMS = ["plain", "best guidance", "analytic", *CONTROLS, "constant", "learned"]
COMMAND = "rwopt search recipe=editing"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> config.Settings:
    model = save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")
    return config.load("editing", [*SETTINGS, f"model.name={model}"])


def arm(folder: Path, name: str) -> Arm:
    return Arm.load(folder / "arms" / f"{name}.json")


def test_every_promised_file_is_there_and_whole(finished: Any) -> None:
    folder, _, _ = finished
    promised = """recipe.yaml study.db metrics.jsonl schedule.json importance.json votes.json gradient_norms.json
                  report.html grid.png schedule.png probe.png history.png"""
    for name in promised.split():
        assert (folder / name).stat().st_size > 0, name
    assert check_files(folder) > 20
    assert [path.name for path in folder.rglob(".*")] == [".lock"]
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 5, path
    page = (folder / "report.html").read_text()
    shown = re.findall(r'<img[^>]*src="([^"]+)"', page)
    assert {"grid.png", "schedule.png", "probe.png", "history.png"} <= set(shown)
    assert all((folder / name).exists() for name in shown)
    assert Schedule.load(folder / "schedule.json").sites == Importance.load(folder / "importance.json").sites


def test_the_stored_recipe_is_the_recipe(finished: Any, settings: config.Settings) -> None:
    folder, _, _ = finished
    assert config.load(str(folder / "recipe.yaml")) == settings


def test_evaluations_are_as_asked_and_as_counted(finished: Any) -> None:
    folder, search, _ = finished
    assert scored_trials(folder) == STUDIES
    assert search.evaluations == search.progress.done == search.progress.total == sum(STUDIES.values())
    counts = {name: arm(folder, name).evaluations for name in ARMS}
    same = TRIALS + 3 * DIAL_TRIALS  # what every tuned arm gets, the dials that it starts from included
    tuned = dict.fromkeys(("best guidance", "analytic", "constant", "learned"), same)
    assert counts == {"plain": 0, **tuned, **dict.fromkeys(CONTROLS, DIAL_TRIALS + 1)}
    with JsonlTracker(folder) as record:
        records = list(record.read("log"))
        logged = [(r["study"], r["trial"]) for r in records if "trial" in r]
        updates = [(r["study"], r["update"]) for r in records if "update" in r]
    assert len(logged) == len(set(logged)) == sum(STUDIES.values())
    assert updates == [("constant weights", 1), ("learned weights", 1)]  # TRIALS, but for the two starts


def test_prices_cover_the_start_the_probe_the_trials_and_the_validation(
    finished: Any, settings: config.Settings
) -> None:
    folder, _, report = finished
    steps, calls = settings.task.steps, {row.name: row.calls for row in report.arms}
    dials = arm(folder, "dials")
    ranked = len({tuple(t) for t in dials.history})
    assert dials.calls == steps * (DIAL_TRIALS + ranked)
    files = ("importance", "votes", "gradient_norms")
    probes = {name: Importance.load(folder / f"{name}.json").calls for name in files}
    assert calls["plain"] == 0
    assert calls["best guidance"] > steps * (TRIALS + 3 * DIAL_TRIALS)
    assert calls["analytic"] > dials.calls + probes["votes"] + steps * (TRIALS + 2 * DIAL_TRIALS)
    assert calls["gradient norm"] == dials.calls + probes["gradient_norms"] + steps * 2
    weights = arm(folder, "learned weights")
    # an update: forward, backward as two (nothing is re-run), on 2 of the 6 pictures that a batch call holds
    update = -(-3 * steps * settings.gradient.batch // (settings.gradient.draws * settings.task.train))
    # train; and the top k on validation cases, which fit into one batch, but for the plain model, which has no hooks
    searched = steps * (TRIALS + 2)
    assert weights.calls - (dials.calls + probes["importance"] + searched) == update
    assert calls["learned"] > weights.calls + steps * 2 * DIAL_TRIALS


def test_the_plain_arm_is_untouched_and_dials_stay_in_their_box(finished: Any, settings: config.Settings) -> None:
    folder, search, _ = finished
    plain = arm(folder, "plain")
    assert plain.schedule is None
    assert plain.dials == search.experiment.base
    assert plain.history == []
    box = {p.name: p for p in dial_box(settings.task, settings.dials)}
    centre = arm(folder, "dials").dials.to_dict()
    for name in [*ARMS[1:], "dials"]:
        made = arm(folder, name)
        for dial, value in made.dials.to_dict().items():
            assert box[dial].clip(value) == value
            if made.schedule is not None:  # near the dials that the plain model likes
                assert abs(value - centre[dial]) <= 0.25 * (box[dial].high - box[dial].low) + box[dial].step
        assert made.train in [score for _, score in made.history]
        assert (made.schedule is None) == (name in ("best guidance", "dials"))
        assert made.validation is not None


def test_arms_start_where_they_should(finished: Any) -> None:
    folder, search, _ = finished
    assert [origin for origin, _ in arm(folder, "dials").history] == ["recipe", "sampler"]
    origins = [origin for origin, _ in arm(folder, "learned").history]
    assert origins == ["tuned", "weaker", *["sampler"] * (2 * DIAL_TRIALS - 2)]
    tuned, weaker = (search.dial_starts(arm(folder, "dials"))[name] for name in ("tuned", "weaker"))
    assert weaker == {**tuned, "strength": pytest.approx(tuned["strength"] - 0.1)}
    for name in ("learned weights", "constant weights"):
        assert [origin for origin, _ in arm(folder, name).history] == ["plain", "probe", "gradient"]
        assert arm(folder, name).dials == arm(folder, "dials").dials
    best = max(score for _, score in arm(folder, "dials").history)
    learned = dict(arm(folder, "learned weights").history)
    assert learned["plain"] == pytest.approx(arm(folder, "dials").train, abs=1e-6)  # theta 0 with the tuned dials
    assert best >= arm(folder, "dials").train


def test_learned_weights_lie_in_their_box_and_constant_ones_are_constant(
    finished: Any, settings: config.Settings
) -> None:
    folder, search, _ = finished
    learned, constant, weights = arm(folder, "learned"), arm(folder, "constant"), arm(folder, "learned weights")
    assert learned.schedule is not None
    assert weights.schedule is not None
    assert constant.schedule is not None
    assert len(constant.schedule.sigmas) == 1
    assert len(learned.schedule.sigmas) == settings.weights.knots
    reach = settings.weights.radius + np.log(settings.probe.high)
    assert (np.abs(np.log(learned.schedule.weights)) <= reach + 1e-6).all()
    function = search.function(SPECS["learned"], arm(folder, "dials").dials)
    theta = np.array([weights.values[name] for name in function.names])
    np.testing.assert_allclose(function.table(theta), weights.schedule.weights, atol=1e-5)
    np.testing.assert_array_equal(learned.schedule.weights, weights.schedule.weights)
    written = Schedule.load(folder / "schedule.json")
    np.testing.assert_allclose(written.weights, learned.schedule.weights, atol=1e-5)
    assert written.calibrated["num_inference_steps"] == settings.task.steps
    assert written.calibrated["guidance_scale"] == learned.dials.guidance
    assert written.calibrated["resolution"] == [64, 64]
    assert written.provenance["command"] == COMMAND


def test_the_report_has_all_arms_metrics_and_pairs(finished: Any, settings: config.Settings) -> None:
    _, _, report = finished
    assert [row.name for row in report.arms] == ARMS
    names = [metric.name for metric in report.metrics]
    assert names == [OBJECTIVE, HELD_OUT, *settings.objective.report]
    assert all(row.means.keys() == set(names) for row in report.arms)
    pairs = {(p.a, p.b) for p in report.paired}
    assert pairs == {("learned", other) for other in ARMS[:-1]} | {("constant", "best guidance")}
    assert all(p.cases <= settings.task.test and p.low <= p.mean <= p.high for p in report.paired)
    assert len(report.verdict) == 3
    assert report.title == "rwopt search: editing"
    assert headline(settings) == [OBJECTIVE, HELD_OUT]
    assert all(term in explain(settings) for term in settings.objective.terms)
    assert all(row.note.startswith(SPECS[row.name].note) for row in report.arms)


def test_resuming_a_finished_run_computes_nothing_and_says_the_same(finished: Any, settings: config.Settings) -> None:
    folder, _, report = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.suffix in (".json", ".html", ".png", ".db", ".yaml")}
    search = Search(settings, folder, Silent())
    again = search.run(COMMAND)
    assert search.experiment.model.calls == 0
    assert search.experiment.splits._tasks == {}
    assert again == report
    assert search.progress.done == search.evaluations  # type: ignore[attr-defined]
    assert {p: p.read_bytes() for p in before} == before
    with JsonlTracker(folder) as record:
        assert len(record.read("log")) == sum(STUDIES.values()) + 2  # and an update of each gradient


def test_two_searches_do_not_share_a_folder(finished: Any, settings: config.Settings) -> None:
    folder, _, _ = finished
    with files.locked(folder), pytest.raises(UserError, match="another search: wait for it"):
        Search(settings, folder, Silent()).run(COMMAND)


def test_a_resumed_run_makes_only_what_is_missing(
    finished: Any, settings: config.Settings, tmp_path: Path
) -> None:
    """Without its last arm and what follows from it, a run ends as it had: the study has all the trials already."""
    import shutil

    folder, _, report = finished
    part = shutil.copytree(folder, tmp_path / "run")
    for name in ("arms/learned weights.json", "arms/learned.json", "arms/learned.test.json", "schedule.json",
                 "report.html", "grid.png"):  # fmt: skip
        (part / name).unlink()
    search = Search(settings, part, Silent())
    again = search.run(COMMAND)
    assert again == report
    # validation, test, grid
    assert 0 < search.experiment.model.calls <= settings.task.steps * (TRIALS + 2 * DIAL_TRIALS + 1 + 4)
    assert (part / "schedule.json").read_bytes() == (folder / "schedule.json").read_bytes()
    assert scored_trials(part) == STUDIES


def test_the_same_seed_gives_the_same_schedule(finished: Any, settings: config.Settings, tmp_path: Path) -> None:
    """The stages that lead to the schedule, once more in a new folder."""
    folder, _, _ = finished
    search = Search(settings, tmp_path / "run", Silent())
    learned = search.learn(search.dials(), settings.tuner.seed)
    describe(search.experiment, learned, COMMAND).save(tmp_path / "schedule.json")
    new, old = (json.loads((f / "schedule.json").read_text()) for f in (tmp_path, folder))
    assert new == old
    with pytest.raises(UserError, match="differs from this recipe"):
        Search(replace(settings, tuner=replace(settings.tuner, seed=1)), tmp_path / "run", Silent())


@pytest.mark.parametrize(
    ("change", "origins"),
    [
        (["tuner.name=optuna"], ["plain", "probe", "sampler"]),
        (["tuner.name=spsa", "tuner.trials=5"], ["plain", "probe", "pair", "pair", "centre"]),
        (["objective.terms.judge.accuracy=1"], ["plain", "probe", "sampler"]),  # auto: a term without gradient
        (["tuner.name=optuna", "tuner.batched=3"], ["plain", "probe", "sampler"]),
        (["probe.start=gradient"], ["plain", "probe", "gradient"]),
        (["weights.kinds=[ff,resnet,skip]", "probe.start=auto"], ["plain", "probe", "gradient"]),
        (["probe.start=auto", "probe.name=reward_gradient"], ["plain", "probe", "gradient"]),
        (["probe.start=auto", "objective.terms.judge.accuracy=1"], ["plain", "probe", "sampler"]),
    ],
)
def test_other_tuners_search_the_same_box(
    settings: config.Settings, tmp_path: Path, change: list[str], origins: list[str]
) -> None:
    few = ["weights.group_by=kind", "tuner.name=auto", *change]
    other = config.load("editing", [*SETTINGS, f"model.name={settings.model.name}", *few])
    search = Search(other, tmp_path / "run", Silent())
    made = search.learn(search.dials(), 0)
    assert [origin for origin, _ in arm(tmp_path / "run", "learned weights").history][: len(origins)] == origins
    assert made.schedule is not None
    reach = other.weights.radius + np.log(other.probe.high)
    assert (np.abs(np.log(made.schedule.weights)) <= reach + 1e-6).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["objective.terms.scorer.kep=1"], "scorer.kept"),
        (["objective.terms.truth.psnr=1", "objective.combine=geometric"], "geometric mean"),
        (["task.grid=14.6,2.9,0.3"], "has 3 noise levels: give 2"),
        (["objective.report.judge.kep=false"], "judge.kept"),
        (["probe.options={drws: 2}"], "drws"),
        (["task.steps=400"], "steps=400"),
        (["task.test=9999"], "9999 were asked for"),
        (["task.cases=/nowhere"], "/nowhere"),
        (["model.name=/nowhere"], "/nowhere"),
        (["track.wandb=online"], "no key"),
    ],
)
def test_what_cannot_work_is_said_at_once_and_nothing_is_written(
    settings: config.Settings, tmp_path: Path, change: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wrong = config.load("editing", [*SETTINGS, f"model.name={settings.model.name}", *change])
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Search(wrong, tmp_path / "run", Silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_metrics_that_the_cases_cannot_give_are_refused_before_the_search(
    settings: config.Settings, tmp_path: Path
) -> None:
    change = [f"model.name={settings.model.name}", "objective.report.truth.psnr=false"]
    wrong = config.load("generation", [*SETTINGS, *change])
    with pytest.raises(UserError, match=r"truth\.psnr needs truth"):
        Search(wrong, tmp_path / "run", Silent()).dials()
