"""The plan before the first trial: its calls are those of the run, its lines say what somebody would ask."""

from __future__ import annotations

import pytest
from helpers.tiny import SETTINGS, save_tiny_pipeline

from rwopt import config
from rwopt.errors import UserError
from rwopt.progress import Silent
from rwopt.search import preflight
from rwopt.search.arms import chosen
from rwopt.search.search import Search

CHANGES = [*SETTINGS, "task.train=4", "task.batch=2", "task.steps=3", "task.teacher.steps=6", "tuner.dial_trials=0",
           "steps.samplers=[ddim]", "steps.grids=[trailing,karras]",
           "arms=[plain,best solver,best guidance,sampler dials,learned]"]  # fmt: skip


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    place = save_tiny_pipeline(tmp_path_factory.mktemp("model"))
    settings = config.load("few-steps", [*CHANGES, f"model.name={place}"])
    return Search(settings, tmp_path_factory.mktemp("search") / "run", Silent())


def test_calls_are_those_of_the_run(search: Search) -> None:
    plan = search.preflight()
    assert search.experiment.model.calls == 0  # its own do not count
    search.run("rwopt search")
    updates = 2 * search.settings.gradient.updates * (search.settings.tuner.trials - 1)
    counted = search.experiment.model.calls + 2 * 3 * updates  # a backward pass counts as two, and nobody calls it
    assert plan.total == pytest.approx(counted, rel=0.25)


def test_lines_say_what_will_happen(search: Search) -> None:
    text = "\n".join(search.preflight().lines)
    for said in ("64 x 64 pixels", "sites: ", "4 train, 3 validation, 5 test", "3 calls of dpmpp_2m",
                 "learned", "U-Net calls of 2 pictures: about", "s a call", "GiB free"):  # fmt: skip
        assert said in text


def test_a_full_disk_is_told_before_the_first_trial(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DISK", 2.0**60)
    with pytest.raises(UserError, match=r"^[^\n]*of disk are free[^\n]*make room$"):
        search.preflight()


def test_a_start_takes_the_place_of_a_round_of_updates() -> None:
    arms = chosen(["plain", "sampler dials", "weights", "learned"])

    def planned(start: str) -> dict[str, int]:
        settings = config.load("few-steps", [f"probe.start={start}"])
        return preflight.planned_calls(settings, arms, 21, taught=True, kept=True)

    plain, dials, probed = planned("none"), planned("dials"), planned("gradient")
    assert {name for name in plain if plain[name] != dials[name]} == {"learned"}  # weights alone have no dials
    assert {name for name in plain if plain[name] != probed[name]} == {"learned", "weights"}
    assert plain["learned"] - dials["learned"] == plain["learned"] - probed["learned"] > 0


@pytest.mark.parametrize(("seconds", "said"), [(12.3, "12 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert preflight.duration(seconds) == said
