"""Every group of objectives on twins of SD1.5 and SDXL: a whole search to the report, with rewards' networks in a small
size; what is optimised, held out and guarded is what the group says, each with a score of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.rewards import small
from test_every_model_and_task import SMALL, Twin
from test_every_model_and_task import cases as cases  # the fixtures
from test_every_model_and_task import twin as twin

from rwopt import config
from rwopt.config.groups import groups
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.search import Search

TASKS = {"aesthetic": "generation", "teacher": "few-steps", "identity": "sdedit",
         "portrait": "sdedit", "edit": "sdedit", "edit-masked": "inpaint"}  # fmt: skip
"""Each group with a group of tasks that it is made for."""

FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}


@pytest.fixture(scope="session")
def two(cases: Path) -> Path:
    """The cases with a second one to train on: one score has no deviation, so that terms could not be calibrated."""
    rows = cases.read_text().splitlines()
    other = json.loads(rows[0]) | {"caption": "portrait, brown skin, smile mouth"}
    place = cases.with_name("two.jsonl")
    place.write_text("\n".join([*rows, json.dumps(other)]))
    return place


def small_networks(settings: config.Settings) -> tuple[list[str], list[str]]:
    """Overrides that give all objectives networks of a small size, and the names of those that cannot be made here."""
    changes, absent = [], []
    takers = {"objective.report": settings.objective.report, "tuner.guard": settings.tuner.guard}
    for name in dict.fromkeys([*settings.objective.terms, *settings.objective.report, *settings.tuner.guard]):
        options, lacks = small(name)
        if lacks:
            absent.append(name)
            changes += [f"{group}.{name}=null" for group, names in takers.items() if name in names]
        else:
            changes += [f"objective.options.{name}.{key}={value}" for key, value in options.items()]
    return changes, absent


def test_every_group_has_its_place() -> None:
    own = {"avatars"}  # its networks read attributes that only the embedded model's own cases have; recipes test it
    assert set(TASKS) | own == {name.partition("/")[2] for name in groups() if name.startswith("objective/")}


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("group", TASKS)
def test_a_search_optimises_holds_out_and_guards_what_a_group_says(
    group: str, model: str, tmp_path: Path, twin: Twin, two: Path
) -> None:
    place = twin(FAMILIES[model], 4)
    changes = [f"model={model}", f"task={TASKS[group]}", f"objective={group}", *SMALL, f"model.name={place}",
               f"task.cases={two}", "task.train=2"]  # fmt: skip
    said = config.load("few-steps", changes)
    more, absent = small_networks(said)
    assert not set(absent) & set(said.objective.terms)
    search = Search(config.load("few-steps", [*changes, *more]), tmp_path / "run", Silent())
    told = "\n".join(search.preflight().lines)
    search.run("rwopt search")
    for name in ("schedule.json", "report.html", "grid.png"):
        assert (tmp_path / "run" / name).exists(), name
    Schedule.load(tmp_path / "run" / "schedule.json")
    report, page = search.settings.objective.report, (tmp_path / "run" / "report.html").read_text()
    assert report == {name: chosen for name, chosen in said.objective.report.items() if name not in absent}
    written = {arm: json.loads((tmp_path / "run" / "arms" / f"{arm}.test.json").read_text())
               for arm in ("plain", "learned")}  # fmt: skip
    for name in report:
        assert name in page
        for scores in written.values():
            assert len(scores[name]) == 2
            assert np.isfinite(scores[name]).all()
    for name in said.objective.terms:
        assert name in told
    assert all(np.isfinite(scores[OBJECTIVE]).all() for scores in written.values())
