"""The typed border: what a recipe may say, and what is said of one that may not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rwopt import config
from rwopt.errors import UserError

OWN = "objective: {terms: {scorer.kept: 1.0}}\n"


def refused(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config.load(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_installed_recipes_are_valid_and_say_what_they_are() -> None:
    found = config.recipes()
    assert {"editing", "generation"} <= found.keys()
    for name, (path, first) in found.items():
        assert path.read_text().startswith("# "), path
        assert 20 < len(first) < 140, path
        settings = config.load(name)
        assert settings == config.load(str(path))
        assert settings.task.name in name or name in {"few-steps", "speed"}
        terms = settings.objective.terms
        assert len(terms) == 1 or set(terms) <= set(settings.objective.report)  # one term is the objective's own column


def test_an_override_takes_names_out_again() -> None:
    whole = config.load("editing", ["objective=portrait"])
    assert {"face.dlib", "laion.v2"} <= whole.objective.report.keys()
    assert "face.dlib" in whole.tuner.guard
    fewer = config.load("editing", ["objective=portrait", "objective.report.face.dlib=null", "tuner.guard.face.*=null",
                                    "objective.report.l*=null", "objective.report.clip.i=false"])  # fmt: skip
    gone = {"face.dlib", "laion.v2"}
    kept = {name: chosen for name, chosen in whole.objective.report.items() if name not in gone}
    assert fewer.objective.report == kept | {"clip.i": False}
    assert fewer.tuner.guard.keys() == whole.tuner.guard.keys() - {"face.dlib"}
    assert "objective.report has no face: choose from image_reward" in refused("editing", "objective=portrait",
                                                                              "objective.report.face=null")  # fmt: skip
    assert "terms is empty" in refused("editing", "objective.terms.*=null")


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"# mine\n{OWN}task: {{steps: 9, test: 30}}\n")
    settings = config.load(str(path), ["task.test=31", "tuner.trials=7", "tuner.trials=8"])
    assert (settings.task.steps, settings.task.test, settings.task.train) == (9, 31, config.TaskSettings().train)
    assert settings.tuner.trials == 8


def test_values_take_their_declared_types() -> None:
    settings = config.load("editing", [
        "dials.guidance=5", "weights.radius=1e-1", "weights.kinds=[self,ff]", "probe.options={a: 1}",
        "dials.guidance_bounds=[1,3]", "model.name=123", "track.project=no", "track.wandb=off", "tuner.seed=-4",
    ])  # fmt: skip
    assert settings.dials.guidance == 5.0
    assert isinstance(settings.dials.guidance, float)
    assert settings.weights.radius == 0.1
    assert settings.weights.kinds == ["self", "ff"]
    assert settings.probe.options == {"a": 1}
    assert settings.dials.guidance_bounds == [1.0, 3.0]
    assert settings.model.name == "123"
    assert (settings.track.project, settings.track.wandb) == ("no", "off")
    assert settings.tuner.seed == -4


def test_a_bare_off_in_a_file_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{OWN}track: {{wandb: off}}\n")
    assert config.load(str(path)).track.wandb == "off"


def test_names_with_dots_can_be_set_and_added() -> None:
    settings = config.load("editing", ["objective.terms.scorer.kept=2", "objective.report.judge.alignment=false"])
    assert settings.objective.terms["scorer.kept"] == 2.0
    assert settings.objective.terms["scorer.success"] == 1.0
    assert settings.objective.report["judge.alignment"] is False


@pytest.mark.parametrize("overrides", [[], ["track.wandb=off", "probe.options={a: [1, x]}", "weights.knots=1"]])
def test_round_trip_through_yaml(tmp_path: Path, overrides: list[str]) -> None:
    settings = config.load("editing", overrides)
    text = config.to_yaml(settings)
    path = tmp_path / "resolved.yaml"
    path.write_text(text)
    again = config.load(str(path))
    assert again == settings
    assert config.to_yaml(again) == text


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("tuner.trails=3", "tuner.trials"),
        ("tunr.trials=3", "tuner"),
        ("objective.term={}", "objective.terms"),
        ("task.step=3", "task.steps"),
        ("dials.guidence=3", "dials.guidance"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    message = refused("editing", key)
    assert key.partition("=")[0] in message
    assert f"did you mean {near}?" in message
    group, _, name = key.partition("=")[0].partition(".")  # the same in a file, which the message names
    path = tmp_path / "own.yaml"
    path.write_text(f"{OWN if group != 'objective' else ''}{group}: {{{name}: 3}}\n")
    message = refused(str(path))
    assert str(path) in message
    assert f"did you mean {near}?" in message


@pytest.mark.parametrize(
    "override",
    ["tuner.trials=abc", "tuner.trials=1.5", "tuner.trials=[1]", "tuner.trials.x=3", "tuner.trials=null", "task=5",
     "tuner=", "weights.kinds=self", "dials.guidance=high", "objective.terms.scorer.kept=high", "probe.options=3",
     "tuner.trials=${nowhere}"],
)  # fmt: skip
def test_wrong_types_are_refused(override: str) -> None:
    key, _, value = override.partition("=")
    message = refused("editing", override)
    assert key.removesuffix(".x") in message
    assert value in message


@pytest.mark.parametrize(
    "override",
    ["tuner.trials=0", "tuner.dial_trials=-1", "tuner.name=gradent", "gradient.mode=half", "gradient.batch=0",
     "gradient.rate=0", "gradient.pull=-1", "gradient.devices=2", "tuner.top_k=-1",
     "tuner.control_trials=0", "tuner.sampler=gpp", "task.steps=0", "task.test=0",
     "task.name=edit", "task.method=sdedi", "dials.guidance_bounds=[3,2]", "dials.guidance_bounds=[1]",
     "dials.guidance_bounds=[1,2,3]", "dials.guidance_bounds=[1,.inf]", "dials.guidance=.nan",
     "dials.strength_bounds=[0.3,1.5]", "dials.strength_bounds=[0,1]", "dials.strength=0", "weights.knots=-1",
     "weights.radius=0", "weights.mode=residul", "weights.kinds=[slef]", "weights.kinds=[]", "weights.group_by=kin",
     "probe.name=ablate", "probe.cases=0", "probe.low=2", "analytic.epochs=0", "analytic.low=1.2", "track.wandb=of"],
)  # fmt: skip
def test_values_out_of_range_are_refused(override: str) -> None:
    assert override.partition("=")[0] in refused("editing", override)


@pytest.mark.parametrize("override", ["foo", "=3", "tuner.trials", ".=2", "tuner..trials=2", "tuner.trials=[1"])
def test_what_is_no_override(override: str) -> None:
    assert override.strip("=.") in refused("editing", override)


def test_missing_recipes_name_the_nearest() -> None:
    assert "did you mean editing?" in refused("editng")
    assert "did you mean generation?" in refused("somewhere/generatio.yaml")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", b"task: [1\n  a", "cannot be read"),
        ("b.yaml", b"\xfe\x00\xff", "cannot be read"),
        ("c.yaml", b"- a\n- b\n", "a mapping"),
        ("d.yaml", b"", "objective.terms is empty"),
        ("e.yaml", b"task: {steps: 3}\n", "objective.terms is empty"),
        ("f.txt", OWN.encode(), "ends in .yaml"),
        ("g.yaml", b"task: 3\n", "task is a group"),
        ("h.yaml", b"task: {steps: 0}\n" + OWN.encode(), "task.steps=0"),
        ("i.yaml", b"task: {steps: x}\n" + OWN.encode(), "task.steps"),
    ],
)
def test_own_files_that_do_not_fit(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(str(path))
    assert said in message
    assert name in message or "task.steps" in message


def test_folders_are_no_recipes(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(str(tmp_path))


def test_every_group_of_settings_is_documented() -> None:
    for field in dataclasses.fields(config.Settings):
        group = type(getattr(config.Settings(), field.name))
        assert group.__doc__
        assert not group.__doc__.startswith(f"{group.__name__}("), group  # dataclass' own text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tuner.storage=sqllite:///a.db"], "did you mean sqlite"),
        (["tuner.storage=postgresql://u:hush@h/d"], "PGPASSWORD"),
        (["tuner.prune=0.7"], "p-value"),
        (["tuner.prune=0.1", "tuner.objectives=[objective,scorer.kept]"], "compares by one objective"),
        (["tuner.objectives=[objective,objective]"], "names one twice"),
        (["tuner.sampler=cmaes", "tuner.objectives=[objective,scorer.kept]"], "takes one objective"),
        (["tuner.sampler=nsga4"], "did you mean nsga"),
        (["tuner.limits={source.ssim: .nan}"], r"tuner\.limits\.source\.ssim=nan: must be finite"),
        (["tuner.slack=-1"], "must be 0 or more"),
        (["tuner.part=0"], "at least 1"),
        (["tuner.heartbeat=0"], "at least 1"),
        (["tuner.grace=15"], "at least twice"),
        (["tuner.name=gradient", "tuner.prune=0.1"], r"use tuner\.name=optuna"),
        (["tuner.name=spsa", "tuner.limits.source.ssim=0.5"], r"use tuner\.name=optuna"),
    ],
)
def test_what_the_tuner_of_optuna_cannot_take(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config.load("editing", ["tuner.name=optuna", *overrides])
    assert "\n" not in str(caught.value)


def test_what_the_tuner_of_optuna_takes() -> None:
    given = ["tuner.name=optuna", "tuner.storage=journal:/a/b.log", "tuner.limits.source.ssim=0.5",
             "tuner.objectives=[objective,judge.distance]", "tuner.slack=0.01"]  # fmt: skip
    tuner = config.load("editing", given).tuner
    assert tuner.limits == {"source.ssim": 0.5}
    assert (tuner.objectives, tuner.storage, tuner.slack) == (["objective", "judge.distance"], "journal:/a/b.log", 0.01)
