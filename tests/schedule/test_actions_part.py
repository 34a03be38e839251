"""The part `actions` of a schedule file, and what a plan says of each noise level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions, Level, actions_of, by_letters
from rwopt.schedule.document import VERSION

FILES = Path(__file__).parent / "files"
SIGMAS = (12.0, 8.0, 5.0, 3.0, 2.0, 1.2, 0.7, 0.3)
MIXED = (*by_letters("FFobXN"), Action("sites", sites=(("up_blocks.1.attentions.0.cross", "skip"), ("ff", "reuse"))),
         FULL)  # fmt: skip


def schedule(actions: Actions | None) -> Schedule:
    return Schedule.constant(["down_blocks.0.attentions.0"], [3.0, 1.0], 1.1, actions=actions)


def plan() -> Actions:
    return Actions.along(SIGMAS, MIXED, max_gap=5)


def test_a_file_gives_back_its_actions(tmp_path: Path) -> None:
    made = schedule(plan())
    read = Schedule.load(made.save(tmp_path / "a.json"))
    assert read == made
    assert read.actions is not None
    assert read.actions.text == plan().text == "FFobXN[sites up_blocks.1.attentions.0.cross skip ff reuse]F"
    assert [level.sigma for level in read.actions.levels] == list(SIGMAS)
    for a, b in zip(read.actions.levels, plan().levels, strict=True):
        assert a.action == b.action
        assert a.max_ratio == pytest.approx(b.max_ratio, rel=1e-5)
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["version"] == VERSION == "1.4"
    assert document["actions"]["levels"][3] == {
        "sigma": 3.0, "action": "cut", "k": 2, "order": 1, "max_ratio": pytest.approx(1.1 * 8 / 3, rel=1e-5),
    }  # fmt: skip


ONE_SIDE = Action("sites", sites=(("cross", "mean"), ("self", "reuse")), cfg_branch="uncond")


def test_a_file_gives_back_calls_of_one_side(tmp_path: Path) -> None:
    made = schedule(Actions.along(SIGMAS[:3], [FULL, ONE_SIDE, Action("sites", sites=(("ff", "skip"),))]))
    read = Schedule.load(made.save(tmp_path / "a.json"))
    assert read == made
    assert read.actions is not None
    assert read.actions.text == "F[sites cross mean self reuse uncond][sites ff skip]"
    levels = read.to_dict()["actions"]["levels"]
    assert [level.get("cfg_branch") for level in levels] == [None, "uncond", None]  # as in files of before
    assert levels[1]["sites"] == {"cross": "mean", "self": "reuse"}
    assert read.actions.about == (
        "Calls marked uncond compute the unconditional rows alone and are not guided. "
        "There cross is the mean over both sides of an earlier, guided call."
    )
    assert plan().about == ""
    assert [a.paired for a in read.actions.patterns] == [False, True, False]
    assert ONE_SIDE.unpaired == Action("sites", sites=(("cross", "reuse"), ("self", "reuse")))
    assert [a.unpaired for a in by_letters("Gg1")] == [FULL, FULL, Action("cut", 1)]


def test_a_file_of_version_1_3_is_what_it_was() -> None:
    old = json.loads((FILES / "schedule-1.3.json").read_text())
    read = Schedule.load(FILES / "schedule-1.3.json")
    assert read.actions is not None
    assert read.actions.text == "FFobXN[sites up_blocks.1.attentions.0.cross skip ff reuse]F"
    assert read.to_dict()["actions"] == old["actions"]
    assert read.digest() == "5e72ce9d8139898a13d9591927c94f4a749dc7059080074e34a7840724eb724a"


def test_the_digest_counts_actions_and_is_what_it_was_without(tmp_path: Path) -> None:
    plans = (None, plan(), Actions.along([3, 1], "FF"))
    assert len({schedule(actions).digest() for actions in plans}) == 3
    assert "actions" not in schedule(None).to_dict()
    old = json.loads((FILES / "schedule-1.2.json").read_text())
    read = Schedule.load(FILES / "schedule-1.2.json")
    assert read.actions is None
    assert read.steps is not None
    assert read.steps.guidance == (4.0, 5.0, 6.0)
    written = read.to_dict()
    assert {k: written[k] for k in ("sites", "weights", "steps")} == {k: old[k] for k in ("sites", "weights", "steps")}
    assert read.digest() == "a57f1fc4d6cd326acdcfaa51fa0963f79918c20b8ed875bced4e64c07c14e446"


BAD: list[tuple[str, Any, str]] = [
    ("levels", [], "actions.levels is []: give a list of 1 to 1000 levels"),
    ("max_gap", 0, "actions.max_gap is 0: give the number of calls"),
    ("levels.2.action", "jump", "actions.levels[2].action is 'jump': give full, cut"),
    ("levels.2.sigma", "x", "actions.levels[2].sigma is 'x': give a VE noise level"),
    ("levels.2.order", 2, "actions.levels[2].order is 2: give 0, the stored value"),
    ("levels.2.max_ratio", 0.5, "actions.levels[2].max_ratio is 0.5: give the largest sigma"),
    ("levels.2.k", 3, "actions.levels[2]: k is 3 of action output"),
    ("levels.2.extra", 3, "actions.levels[2] has the unknown entry 'extra'"),
    ("levels.4.sites.cross", "jump", "actions.levels[4].sites.cross is 'jump': give reuse"),
    ("levels.4.sites", {"where": "reuse"}, "actions.levels[4]: sites names 'where'"),
    ("levels.4.sites.cross", "mean", "actions.levels[4]: sites.'cross' is mean, and the call has both sides: give"),
    ("levels.4.cfg_branch", "left", "actions.levels[4].cfg_branch is 'left': give the rows that a call of sites"),
    ("levels.2.cfg_branch", "cond", "actions.levels[2]: cfg_branch is 'cond' of action output: give sites one of"),
    ("levels.2.sigma", 9.0, "actions.levels has sigma 9 after 8: give falling levels"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD)
def test_a_bad_part_is_refused_in_one_line(place: str, value: Any, message: str) -> None:
    document = schedule(plan()).to_dict()
    inner: Any = document["actions"]
    *path, last = place.split(".")
    for name in path:
        inner = inner[int(name) if name.isdigit() else name]
    inner[last] = value
    with pytest.raises(UserError) as raised:
        Schedule.from_dict(document)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_cheap_level_needs_its_ratio() -> None:
    part = plan().to_dict()
    del part["levels"][2]["max_ratio"]
    with pytest.raises(UserError, match=r"actions.levels\[2\]: action output lacks 'max_ratio'"):
        actions_of(part)


def test_private_entries_are_left_out_and_levels_are_not_rounded() -> None:
    part = plan().to_dict()
    part["x-note"] = 1
    part["levels"][0]["x-note"] = 2
    part["levels"][0]["sigma"] = 12.000000001
    read = actions_of(part)
    assert read is not None
    assert read.levels[0] == Level(12.000000001)


def test_a_call_follows_the_nearest_level_in_ln_sigma() -> None:
    actions = Actions((Level(8.0), Level(2.0, Action("output"), 5.0)))
    assert [actions.index(s) for s in (np.inf, 9.0, 4.01, 3.99, 0.01)] == [0, 0, 0, 1, 1]


def test_only_what_can_still_be_read_is_kept() -> None:
    actions = Actions.along(SIGMAS, "FFFoFFaF")
    kept = ["".join(action.letter for action in actions.read_later(sigma)) for sigma in SIGMAS]
    # the first F: two other full calls lie before o; the third: o, and before a there are two more
    assert kept == ["", "o", "o", "o", "a", "a", "a", ""]


@pytest.mark.parametrize(("letters", "why"), [("oFFF", "action 0 is o"), ("FoFF", "give 2 before"),
                                              ("FF111F", "at most 2"), ("FFF", "3 actions for 4")])  # fmt: skip
def test_a_plan_that_could_not_be_followed_is_refused(letters: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Actions.along(SIGMAS[: len(letters) + (len(letters) == 3)], letters)


@pytest.mark.parametrize("fields", [{"kind": "cut"}, {"kind": "full", "order": 1}, {"kind": "sites"}, {"k": 2},
                                    {"kind": "sites", "sites": (("skip", "reuse"),)}])  # fmt: skip
def test_an_action_that_does_not_exist_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Action(**fields)
