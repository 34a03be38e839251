"""A second embedded model: its name is enough, its own judges speak, and nothing of it is taken for another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.embedded import ATTRIBUTES, CHANNELS, SIDE, save_other_model
from helpers.tiny import SETTINGS
from PIL import Image

from rwopt import config
from rwopt.embedded import FOLDERS
from rwopt.models import Model, load_model
from rwopt.models.judge import Judge
from rwopt.progress import Silent
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, score
from rwopt.search.experiment import Experiment
from rwopt.search.preflight import rewards
from rwopt.search.search import Search
from rwopt.search.splits import Splits
from rwopt.tasks import Dials
from rwopt.tasks.cases import SPLITS

EMOJI = ["model.name=emoji", "task.cases=emoji"]
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
    monkeypatch.setitem(FOLDERS, "emoji", place)
    return load_model("emoji", "cpu", "float32")


def test_its_name_is_enough(other: Model, said: Any) -> None:
    assert (other.name, other.picture_size, other.latent_shape) == ("emoji", (SIDE, SIDE), (CHANNELS, 12, 12))
    code, out, _ = said("sites", "emoji")
    assert code == 0
    assert "mid_block.attentions.0.cross" in out
    for recipe, task in (("few-steps", "generation"), ("editing", "editing"), ("generation", "generation"),
                         ("speed", "generation"), ("few-steps-editing", "editing")):  # fmt: skip
        settings = config.load(recipe, EMOJI)
        assert (settings.model.name, settings.task.cases, settings.task.name) == ("emoji", "emoji", task)
        assert settings.objective == config.load(recipe).objective
    assert config.load("few-steps", [*EMOJI, "task.cases=prompts"]).task.cases == "prompts"


def test_its_own_judges_score_its_pictures(other: Model, cases: Path, place: Path) -> None:
    experiment = Experiment(config.load("editing", [*EDITS, "model.name=emoji", f"task.cases={cases}"]), other)
    task = experiment.splits.task("train")
    made = task.made(experiment.base)
    found = score(task, made, experiment.composites, ["judge.realism", "judge.accuracy"], experiment.objectives)
    judge = Judge.load("judge", str(place))
    assert found.values["judge.realism"] == pytest.approx(judge(made.images).realism.sigmoid().numpy(), abs=1e-5)
    assert np.isfinite([found.mean(name) for name in (OBJECTIVE, HELD_OUT, "judge.accuracy")]).all()
    assert experiment.objectives.spec("judge.kept").weights == "emoji/judge, embedded"
    alone = score(task, made, {}, ["judge.realism"])  # whoever names no objectives is asked about the task's model
    assert np.array_equal(alone.values["judge.realism"], found.values["judge.realism"])


def test_cases_of_another_world_are_told_before_the_first_trial(other: Model, tmp_path: Path) -> None:
    settings = config.load("editing", [*EDITS, "model.name=emoji", "task.cases=avatars"])
    missing = rewards(Search(settings, tmp_path / "run", Silent()).experiment)[1]
    assert len(missing) == 3
    for line, split in zip(missing, SPLITS, strict=True):
        said = f"task.cases=avatars ({split}) are not for the judges of emoji: target of picture 0 lacks style"
        assert line.startswith(said)


def test_a_teacher_is_kept_for_one_model(other: Model) -> None:
    """The same prompts and dials: the key still tells models apart, but not a model from its copy in another place."""
    settings = config.load("few-steps", [*EDITS, "model.name=emoji", "task.cases=prompts"])
    copy, changed = (load_model(str(FOLDERS["emoji"]), "cpu", "float32") for _ in range(2))
    next(changed.unet.parameters()).mul_(1.5)
    keys = []
    for model in (other, copy, changed, replace(other, name="avatars")):
        splits = Splits(settings.task, model, Dials())
        keys.append(splits._key(splits.prepare(splits.cases("train"))))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
