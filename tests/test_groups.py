"""Groups of recipes: composition, choices, what a null takes out, and the errors that name what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwopt import config
from rwopt.config.groups import GROUPS, groups, merged
from rwopt.errors import UserError


def test_every_group_says_what_it_is_and_fits_the_settings() -> None:
    found = groups()
    assert {name.partition("/")[0] for name in found} == set(GROUPS)
    for name, (path, about) in found.items():
        assert path.read_text().startswith("# "), name
        assert len(about) > 10
        group, _, choice = name.partition("/")
        config.load("few-steps", [f"{group}={choice}"])


def test_the_recipe_lies_over_its_groups_and_choices_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("use: [task/few-steps, objective/teacher]\ntask: {steps: 5}\ndials: {guidance: 3}\n")
    own = config.load(str(path))
    assert (own.task.steps, own.task.sampler, own.dials.guidance) == (5, "dpmpp_2m", 3.0)
    chosen = config.load(str(path), ["model=sdxl", "dials.guidance=6", "budget=quick"])
    assert chosen.model.name == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (chosen.task.steps, chosen.task.train, chosen.dials.guidance) == (5, 8, 6.0)


def test_a_null_takes_a_free_name_out_and_nothing_else() -> None:
    base = {"objective": {"report": {"a": True, "b": False}}, "task": {"steps": 3}}
    more = {"objective": {"report": {"a": None, "unknown": None}}, "task": {"steps": None}}
    assert merged(base, more) == {"objective": {"report": {"b": False}}, "task": {"steps": None}}
    assert base["objective"]["report"] == {"a": True, "b": False}


def test_other_models_leave_the_avatars_judges_out() -> None:
    report = config.load("few-steps", ["model=sdxl"]).objective.report
    assert report
    assert not [name for name in report if "judge" in name or "scorer" in name]


def test_a_resolved_recipe_is_whole(tmp_path: Path) -> None:
    settings = config.load("few-steps", ["model=sd15"])
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml(settings))
    assert "use:" not in path.read_text()
    assert config.load(str(path)) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [("use: [model/sdx]\n", "did you mean model/sdxl?"), ("use: model/sdxl\n", "use is a list of groups"),
     ("use: [5]\n", "use is a list of groups")],
)  # fmt: skip
def test_groups_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: [^\n]*") as error:
        config.load(str(path))
    assert said in str(error.value)


def test_a_wrong_choice_names_those_that_are_there() -> None:
    with pytest.raises(UserError, match=r"model=sdx: model is a group: .*, or choose .*sdxl"):
        config.load("few-steps", ["model=sdx"])
