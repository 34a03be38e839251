"""`rwopt search` with a shared storage and `rwopt worker` beside it: the real command lines on a tiny model."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import optuna
import pytest
import torch
from helpers.tiny import SETTINGS, check_files, rwopt, save_tiny_pipeline
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from rwopt import config
from rwopt.cli import main
from rwopt.errors import UserError
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search import worker
from rwopt.search.publish import describe
from rwopt.search.search import Search
from rwopt.tuners.storage import open_storage

Run = tuple[Path, str, Path]
ASKED = 12
"""Trials of each study of weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(run folder, storage URL, model) of a search that two workers helped, of which one was killed."""
    place = tmp_path_factory.mktemp("shared")
    folder, url = place / "run", f"sqlite:///{place / 'studies.db'}"
    open_storage(url)  # its tables: both processes start at once, so that the worker is there before it is over
    victim = rwopt("worker", "run", f"storage={url}", "--wait", 300)
    changes = [*SETTINGS, "tuner.name=optuna", "task.train=8", f"tuner.trials={ASKED}",
               "arms=[plain,best guidance,constant,learned]"]  # fmt: skip
    search = rwopt("search", "recipe=editing", *changes, f"model.name={model}", f"tuner.storage={url}", "--out", folder)
    assert victim.stderr is not None
    assert re.search(r"run/.*: trial \d+", victim.stderr.readline())  # a line for each trial: it has done one
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert main(["worker", "run", f"storage={url}", "--wait", "300"]) == 0  # until the last study is met
    output, errors = search.communicate(timeout=300)
    assert search.returncode == 0, errors
    assert "schedule.json" in output
    return folder, url, model


def test_the_search_ends_with_all_its_trials_and_files(shared: Run) -> None:
    folder, url, _ = shared
    storage = open_storage(url)
    names = optuna.study.get_all_study_names(storage)
    assert {"run/guidance", "run/learned weights", "run/constant weights", "run/learned"} <= set(names)
    workers = set[int]()
    for name in names:
        study = optuna.load_study(study_name=name, storage=storage)
        states = [t.state for t in study.get_trials()]
        assert states.count(TrialState.COMPLETE) == study.user_attrs["trials"]
        assert TrialState.RUNNING not in states
        workers |= {t.user_attrs["lease"]["pid"] for t in study.get_trials() if "lease" in t.user_attrs}
    assert optuna.load_study(study_name="run/learned weights", storage=storage).user_attrs["trials"] == ASKED
    assert len(workers) == 3  # the search, the killed one, and the one that stayed
    assert Schedule.load(folder / "schedule.json").provenance["evaluations"] > ASKED
    assert check_files(folder) > 20
    assert not (folder / "study.db").exists()


def test_a_worker_that_comes_late_has_nothing_to_do(shared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, url, _ = shared
    assert main(["worker", str(folder)]) == 0
    assert "has all its trials; 0 of them from here" in capsys.readouterr().out
    assert main(["worker", "run/learned weights", f"storage={url}"]) == 0


def test_another_model_or_recipe_is_refused(shared: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, url, model = shared
    other = shutil.copytree(model, tmp_path / "other")
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    first = next(iter(tensors))
    tensors[first] = tensors[first] + torch.ones_like(tensors[first])
    save_file(tensors, weights, {"format": "pt"})
    assert main(["worker", "run", f"storage={url}", f"model.name={other}"]) == 2
    assert "another recipe or model" in capsys.readouterr().err
    same = shutil.copytree(model, tmp_path / "same")  # the same model in another place is the same
    assert main(["worker", "run", f"storage={url}", f"model.name={same}"]) == 0
    assert main(["worker", "run", f"storage={url}", "task.steps=3"]) == 2
    assert "task.steps=3: a worker has its study's settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "is no run folder"),
        (["nowhere", "storage=nonsense:x"], "did you mean"),
        (["run/lerned", "storage={}", "--wait", "0"], "nearest is run/learned"),
    ],
)
def test_what_cannot_be_joined_is_one_line(
    shared: Run, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["worker", *(a.format(shared[1]) for a in arguments)]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_a_run_that_does_not_share_is_told_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(config.load("editing", [f"model.name={model}"])))
    with pytest.raises(UserError, match=r"start the search with tuner\.storage=URL"):
        worker.resolve(str(tmp_path), None, lambda text: config.parse(text, "recipe"))


@pytest.mark.parametrize(
    "settings",
    [
        ["tuner.objectives=[scorer.success,source.ssim]", "tuner.sampler=nsga2", "tuner.limits={source.ssim: 0.01}"],
        ["tuner.prune=0.1", "tuner.part=1"],
    ],
)
def test_a_search_of_several_objectives_or_that_gives_up_early(
    model: Path, tmp_path: Path, settings: list[str]
) -> None:
    """The stages that lead to the schedule, and what the schedule file says of the choice."""
    wanted = config.load("editing", [*SETTINGS, f"model.name={model}", "tuner.name=optuna", *settings])
    search = Search(wanted, tmp_path / "run", Silent())
    learned = search.learn(search.dials(), 0)
    describe(search.experiment, learned, "rwopt search recipe=editing").save(tmp_path / "schedule.json")
    choice = Schedule.load(tmp_path / "schedule.json").provenance.get("choice", {})
    if "tuner.prune=0.1" in settings:
        assert choice == {}
        return
    assert choice["objectives"] == ["scorer.success", "source.ssim"]
    assert "highest scorer.success among points whose source.ssim" in choice["rule"]
    assert choice["kept"]
    assert len(choice["front"][0]) == len(choice["plain"]) == 2
    assert search.tuner.kept("learned").choice == choice  # type: ignore[union-attr]


def test_a_run_knows_its_studies_whatever_its_folder_is_called(model: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    wanted = config.load("editing", [*SETTINGS, f"model.name={model}", "tuner.name=optuna", f"tuner.storage={url}"])
    dials = Search(wanted, tmp_path / "old", Silent()).dials()
    (tmp_path / "old" / "arms" / "dials.json").unlink()  # as if it had been killed just before
    (tmp_path / "old").rename(tmp_path / "new")
    progress = Silent()
    again = Search(wanted, tmp_path / "new", progress).dials()
    assert (again.dials, again.history) == (dials.dials, dials.history)
    assert optuna.study.get_all_study_names(url) == ["old/guidance"]
    assert worker.resolve(str(tmp_path / "new"), None, lambda text: config.parse(text, "recipe")) == ("old", url)
