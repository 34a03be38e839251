"""A second embedded model: its name is enough, its own judges speak, and nothing of it is taken for another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.embedded import ATTRIBUTES, CHANNELS, SIDE, models, save_other_model
from helpers.tiny import SETTINGS
from PIL import Image

from rwopt import config
from rwopt.embedded import DEFAULT, FOLDERS
from rwopt.models import Model, load_model
from rwopt.models.judge import Judge
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, score
from rwopt.search.experiment import Experiment
from rwopt.search.preflight import rewards
from rwopt.search.search import Search
from rwopt.search.splits import Splits
from rwopt.tasks import Dials
from rwopt.tasks.cases import SPLITS
from rwopt.unet.sites import BRANCHES, list_sites

OTHER = ["model.name=other", "task.cases=other"]
EDITS = [*SETTINGS, "task.train=2", "task.validation=1", "task.test=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other_model(tmp_path_factory.mktemp("other") / "model")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two edits to train on and one of each other split, with sheets of its pictures."""
    folder, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        lines = []
        for cell in range(2 if split == "train" else 1):
            target = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
            lines.append(json.dumps({
                "id": f"{split}-{cell}", "task": "editing", "caption": ", ".join(target.values()), "cell": cell,
                "source_caption": f"{split} {cell}", "change": {"skin": target["skin"]}, "target": target,
                "hidden": [],
            }))  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        for name in ("source", "truth"):
            sheet = rng.integers(0, 256, (SIDE, 16 * SIDE, 3), np.uint8)
            Image.fromarray(sheet).save(folder / f"{split}_{name}.png")
    return folder


@pytest.fixture
def other(place: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The random model, as if it were the second embedded one."""
    monkeypatch.setitem(FOLDERS, "other", place)
    return load_model("other", "cpu", "float32")


def test_its_name_is_enough(other: Model, said: Any) -> None:
    assert (other.name, other.picture_size, other.latent_shape) == ("other", (SIDE, SIDE), (CHANNELS, 12, 12))
    code, out, _ = said("sites", "other")
    assert code == 0
    assert "mid_block.attentions.0.cross" in out
    for recipe, task in (("few-steps", "generation"), ("editing", "editing"), ("generation", "generation"),
                         ("speed", "generation"), ("few-steps-editing", "editing")):  # fmt: skip
        settings = config.load(recipe, OTHER)
        assert (settings.model.name, settings.task.cases, settings.task.name) == ("other", "other", task)
        assert settings.objective == config.load(recipe).objective
    assert config.load("few-steps", [*OTHER, "task.cases=prompts"]).task.cases == "prompts"


def test_its_own_judges_score_its_pictures(other: Model, cases: Path, place: Path) -> None:
    experiment = Experiment(config.load("editing", [*EDITS, "model.name=other", f"task.cases={cases}"]), other)
    task = experiment.splits.task("train")
    made = task.made(experiment.base)
    found = score(task, made, experiment.composites, ["judge.realism", "judge.accuracy"], experiment.objectives)
    judge = Judge.load("judge", str(place))
    assert found.values["judge.realism"] == pytest.approx(judge(made.images).realism.sigmoid().numpy(), abs=1e-5)
    assert np.isfinite([found.mean(name) for name in (OBJECTIVE, HELD_OUT, "judge.accuracy")]).all()
    assert experiment.objectives.spec("judge.kept").weights == "other/judge, embedded"
    alone = score(task, made, {}, ["judge.realism"])  # whoever names no objectives is asked about the task's model
    assert np.array_equal(alone.values["judge.realism"], found.values["judge.realism"])


def test_cases_of_another_world_are_told_before_the_first_trial(other: Model, tmp_path: Path) -> None:
    settings = config.load("editing", [*EDITS, "model.name=other", "task.cases=avatars"])
    missing = rewards(Search(settings, tmp_path / "run", Silent()).experiment)[1]
    assert len(missing) == 3
    for line, split in zip(missing, SPLITS, strict=True):
        said = f"task.cases=avatars ({split}) are not for the judges of other: target of picture 0 lacks style"
        assert line.startswith(said)


def test_a_teacher_is_kept_for_one_model(other: Model) -> None:
    """The same prompts and dials: the key still tells models apart, but not a model from its copy in another place."""
    settings = config.load("few-steps", [*EDITS, "model.name=other", "task.cases=prompts"])
    copy, changed = (load_model(str(FOLDERS["other"]), "cpu", "float32") for _ in range(2))
    next(changed.unet.parameters()).mul_(1.5)
    keys = []
    for model in (other, copy, changed, replace(other, name="avatars")):
        splits = Splits(settings.task, model, Dials())
        keys.append(splits._key(splits.prepare(splits.cases("train"))))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("recipe", ["few-steps", "editing"])
@pytest.mark.parametrize("name", models(DEFAULT))
def test_its_group_is_all_that_a_recipe_needs(tmp_path: Path, name: str, recipe: str) -> None:
    settings = config.load(recipe, [*EDITS, f"model={name}", "arms=[plain,learned]", "probe.start=none",
                                    "tuner.dial_trials=0", "task.teacher.steps=4"])  # fmt: skip
    assert (settings.model.name, settings.task.cases) == (name, name)
    search = Search(settings, tmp_path / "run", Silent())
    assert search.preflight().lines
    search.run("rwopt search")
    schedule = Schedule.load(tmp_path / "run" / "schedule.json")
    assert {*schedule.sites} <= {site.id for site in list_sites(search.experiment.model.unet, BRANCHES)}
    assert all((tmp_path / "run" / file).exists() for file in ("report.html", "grid.png"))
