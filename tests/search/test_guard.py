"""A guard: what it measures, when it stops a study, what is chosen then, and that a whole search says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny import SETTINGS, save_tiny_pipeline

from rwopt import config
from rwopt.config.groups import groups
from rwopt.errors import UserError
from rwopt.objectives import Objectives, calibration, objective_spec
from rwopt.objectives.composite import Composite
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search.arms import Arm
from rwopt.search.experiment import CALIBRATION
from rwopt.search.guard import Broken, Guard, Watch, sentence
from rwopt.search.search import Search
from rwopt.search.verdict import explain
from rwopt.tasks import Dials
from rwopt.tuners import Candidate, Trial

PLAIN = {"truth.ssim": 0.8, "judge.distance": 0.3}
BASE = Dials(4.0, 0.7)


class Told(Guard):
    """A guard whose pictures are numbers: guidance g has ssim 0.8 - g and distance 0.3 + g; plain is 0."""

    def __init__(self, **slack: float) -> None:
        super().__init__(slack, SimpleNamespace(model=SimpleNamespace(calls=0)), Objectives(), BASE)  # type: ignore[arg-type]
        self.measured = 0

    def measure(self, dials: Dials, schedule: Schedule | None) -> Mapping[str, float]:
        self.measured += 1
        g = 0.0 if dials == BASE else dials.guidance
        return {name: PLAIN[name] + (-g if name == "truth.ssim" else g) for name in self.slack}


def decode(values: Mapping[str, float]) -> tuple[Dials, Schedule | None]:
    return Dials(values["g"], 0.5), None


def trial(number: int, score: float, g: float) -> Trial:
    return Trial(Candidate(number, {"g": g}), score)


def test_worse_is_less_or_more_by_the_direction() -> None:
    guard = Told(**{"truth.ssim": 0.05, "judge.distance": 0.2})
    assert guard.plain == PLAIN
    assert guard.excess({"truth.ssim": 0.7, "judge.distance": 0.4}) == pytest.approx(
        {"truth.ssim": 0.05, "judge.distance": -0.1}
    )
    assert guard.over({"truth.ssim": 0.7, "judge.distance": 0.6}) == pytest.approx(0.1)
    assert guard.over({"truth.ssim": 0.9, "judge.distance": 0.1}) == 0
    assert guard.over({"truth.ssim": np.nan, "judge.distance": 0.1}) == np.inf


def test_only_better_ones_are_measured_and_three_in_a_row_stop() -> None:
    watch = Watch(Told(**{"truth.ssim": 0.1}), 3, decode)
    for one in (trial(0, 0.1, 0.0), trial(1, 0.3, 0.5), trial(2, 0.0, 0.5), trial(3, 0.2, 0.05), trial(4, 0.3, 0.5),
                trial(5, 0.4, 0.4)):  # fmt: skip
        watch.see(one)
    assert sorted(watch.means) == [0, 1, 3, 4, 5]  # 2 is no better than what keeps the guard
    assert watch.best == 0.2  # which put the count back to nothing
    assert watch.broken == [4, 5]
    with pytest.raises(Broken):
        watch.see(trial(6, 0.25, 0.3))
    about = watch.about(trial(3, 0.2, 0.05))
    assert about["kept"]
    assert about["means"] == pytest.approx({"truth.ssim": 0.75})
    assert (about["stopped"], about["broken"], about["worst"]) == (7, 3, pytest.approx({"truth.ssim": 0.4}))
    assert json.loads(json.dumps(about)) == about
    line = sentence("learned", about)
    assert "kept (truth.ssim 0.75, plain 0.8, slack 0.1)" in line
    assert "stopped after 7 trials: 3 in a row scored better and broke it, truth.ssim by 0.4 more" in line


def test_who_breaks_it_is_no_choice_unless_all_do() -> None:
    watch = Watch(Told(**{"truth.ssim": 0.1}), 3, decode)
    trials = [trial(0, 0.9, 0.5), trial(1, 0.8, 0.2), trial(2, 0.7, 0.1), trial(3, 0.6, 0.0), trial(4, 0.5, 0.0)]
    assert [t.candidate.number for t in watch.first(trials, 2)] == [2, 3]
    assert [t.candidate.number for t in watch.first(trials[:2], 2)] == [1, 0]  # the least first
    assert "BROKEN" in sentence("learned", watch.about(trials[0]))
    free = Watch(Told(), 3, decode)
    assert free.first(trials, 2) == trials[:2]
    free.see(trials[0])
    assert free.guard.measured == 0  # type: ignore[attr-defined]


# --- a whole search

REWARDS = '''
def dark(images, batch):
    return 1 - images.mean((1, 2, 3))
dark.spec = {"differentiable": True, "range": (0, 1)}

def bright(images, batch):
    return images.mean((1, 2, 3))

def moved(images, batch):
    return 100 * (images - batch.reference).abs().mean((1, 2, 3))
moved.spec = {"differentiable": True, "higher_is_better": False, "needs": ["reference"], "range": (0, 100)}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    save_tiny_pipeline(folder / "model")
    (folder / "own.py").write_text(REWARDS)
    return folder


def settings(place: Path, *more: str) -> config.Settings:
    bare = place / "bare.yaml"
    bare.write_text("task: {name: generation}\nprobe: {name: ablation, start: none}\narms: [plain, learned]\n")
    change = ["tuner.dial_trials=0", "weights.group_by=site", "weights.radius=2.0", f"model.name={place / 'model'}"]
    return config.load(str(bare), [*SETTINGS, *change, *more])


@pytest.mark.parametrize("tuner", ["optuna", "spsa", "gradient"])
def test_who_is_paid_for_darkness_may_not_change_the_picture(place: Path, tuner: str, tmp_path: Path) -> None:
    own = place / "own.py"
    wanted = settings(
        place, f"tuner.name={tuner}", "tuner.trials=8", f"objective.terms.{own}:dark=1", "tuner.guard_patience=2",
        f"tuner.guard.{own}:moved=0.0001", "gradient.updates=3",
    )  # fmt: skip
    search = Search(wanted, tmp_path / "run", Silent())
    learned = search.make(search.arms[1], search.dials())
    about = learned.choice["guard"]
    assert about["kept"]
    assert about["stopped"] is not None
    assert len(learned.history) < 8  # it did not go on to the end
    assert search.progress.done == search.progress.total or search.progress.total == 0
    name = f"{own}:moved"
    assert about["plain"][name] == 0
    assert search.experiment.scores("validation", learned.dials, learned.schedule, [name]).mean(name) <= 1e-4
    assert about["worst"][name] > 0
    assert max(score for _, score in learned.history) > (learned.train or 0)  # darker ones were found, and not taken
    again = Search(wanted, tmp_path / "run", Silent())  # the study alone is there, the arm is not
    (tmp_path / "run" / "arms" / "learned.json").unlink()
    found = again.make(again.arms[1], again.dials())
    assert found.values == learned.values
    assert found.choice["guard"] == about


def test_a_calibrated_search_keeps_its_scales_and_tells_all(place: Path, tmp_path: Path) -> None:
    own = place / "own.py"
    wanted = settings(
        place, "tuner.name=optuna", f"objective.terms.{own}:dark=2", f"objective.terms.{own}:moved=1",
        f"objective.report.{own}:bright=false", f"tuner.guard.{own}:bright=0.5",
    )  # fmt: skip
    folder = tmp_path / "run"
    search = Search(wanted, folder, Silent())
    text = "\n".join(search.preflight().lines)
    assert f"{own}:dark, {own}:moved, {own}:bright: your own; no weights" in text
    assert "calibration" not in {path.name for path in folder.iterdir()}
    report = search.run("rwopt search")
    scales = calibration.load(folder / CALIBRATION)
    assert set(scales) == {f"{own}:dark", f"{own}:moved"}
    plain = {row.name: row.means for row in report.arms}["plain"]
    assert search.experiment.value("train", search.experiment.base, None) == pytest.approx(0.0, abs=1e-4)
    assert set(plain) >= {"objective", f"{own}:bright"}
    assert any(line.startswith("Guard of learned: kept") for line in report.verdict)
    assert "standard deviations above the plain model's mean" in explain(wanted)
    mine = {name: calibration.Scale(s.mean - s.sd, s.sd, s.n) for name, s in scales.items()}
    calibration.save(mine, folder / CALIBRATION)  # a resumed run takes those of its folder
    again = Search(wanted, folder, Silent()).experiment
    assert again.value("train", again.base, None) == pytest.approx(2.0 - 1.0, abs=1e-4)


def test_what_is_missing_stops_a_search_before_any_work(place: Path, tmp_path: Path) -> None:
    own = place / "own.py"
    wanted = settings(place, f"objective.terms.{own}:dark=1", "objective.report.lpips.alex=false",
                      "objective.report.truth.psnr=false")  # fmt: skip
    search = Search(wanted, tmp_path / "run", Silent())
    plan = search.plan()
    assert [line for line in plan.lines if "lpips.alex" in line and "244 MB" in line and "BSD-3-Clause" in line]
    assert search.experiment.model.calls == 0
    missing = [line for line in plan.lines if line.startswith("missing: ")]
    assert len(missing) == 1 + 3  # and a line for each split
    with pytest.raises(UserError, match=r"^objective lpips\.alex lacks [^\n]* \(and 3 more missing\)$"):
        search.preflight()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tuner.guard.truth.snr=0.1", "did you mean truth.psnr"),
        ("tuner.guard.truth.ssim=-0.1", "must be 0 or more"),
        ("objective.sets=[truth.psnr]", "scores single pictures"),
        ("objective.options.truth.snr.a=1", "did you mean truth.psnr"),
        ("tuner.guard_patience=0", "at least 1"),
        ("objective.invalid=keep", "did you mean"),
    ],
)
def test_wrong_settings_are_told_at_once(place: Path, tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Search(settings(place, f"objective.terms.{place / 'own.py'}:dark=1", change), tmp_path / "run", Silent())
    assert "\n" not in str(caught.value)


def test_options_reach_their_objective(place: Path) -> None:
    made: Any = settings(place, "objective.terms.truth.psnr=1", "objective.options.clip.t.model=a/b",
                         "objective.options.lpips.alex.backbone=x.pth").objective  # fmt: skip
    assert made.options == {"clip.t": {"model": "a/b"}, "lpips.alex": {"backbone": "x.pth"}}
    assert config.parse(config.to_yaml(settings(place, "objective.terms.a.b=1", "objective.options.c.d=1")), "x")


@pytest.mark.parametrize("group", [name for name in groups() if name.startswith("objective/")])
def test_groups_of_objectives_keep_what_is_raised_and_what_is_held_out_apart(group: str) -> None:
    made = config.load("generation", [group.replace("/", "=", 1)])
    terms, report = made.objective.terms, made.objective.report
    for name in (*terms, *report, *made.tuner.guard):
        assert objective_spec(name).level == "image"
    if group == "objective/teacher":  # lies beside what the recipe has
        return
    composite = Composite(terms, combine=made.objective.combine)
    assert composite.differentiable
    assert {name for name, optimised in report.items() if optimised} == set(terms)
    assert len([name for name, optimised in report.items() if not optimised]) >= 4
    assert not set(made.tuner.guard) & set(terms)
    assert ("scorer.realism" in terms) == (group == "objective/avatars")


def test_sets_are_measured_on_test_pictures_if_there_are_enough(place: Path, tmp_path: Path) -> None:
    more = [f"objective.terms.{place / 'own.py'}:dark=1", "objective.sets=[set.kid]"]
    with pytest.raises(UserError, match=r"set\.kid says nothing of 5 test pictures: give task\.test=64"):
        Search(settings(place, *more, "objective.options.set.kid.features=judge"), tmp_path / "a", Silent()).preflight()
    enough = settings(place, *more, "task.test=64", "objective.options.set.kid.features=judge")
    search = Search(enough, tmp_path / "b", Silent())
    search.preflight()
    found = search.tuner.sets(search.tuner.fixed("plain"), ["set.kid"])["set.kid"]
    assert found["n"] == 64
    assert found["p"] > 0.5  # of generation the plain model's own pictures are what it is held against
    assert json.loads((tmp_path / "b" / "arms" / "plain.sets.json").read_text()) == {"set.kid": found}
    other = Arm("other", Dials(12.0))
    assert search.tuner.sets(other, ["set.kid"])["set.kid"]["value"] >= found["value"]
