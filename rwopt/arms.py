"""Arms of a comparison: dials and a schedule, found on train cases, chosen on validation cases, kept on disk.

Every tuned arm goes through the same procedure with the same number of evaluations, whether it is the learned
schedule, the best constant weights or the best guidance scale; only its box differs. A finished arm is one JSON file
and is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwopt.config import DialSettings, Settings, to_yaml
from rwopt.errors import UserError
from rwopt.evaluation import HELD_OUT, OBJECTIVE, Scores, score
from rwopt.files import write_text
from rwopt.measure import Measure
from rwopt.models import Model
from rwopt.objectives import Composite, make_objective
from rwopt.points import Meaning, Point
from rwopt.progress import Progress
from rwopt.schedule import Schedule
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import Case, load_cases
from rwopt.tuners import Candidate, Parameter, Trial
from rwopt.tuners.loop import Outcome, Report, work
from rwopt.tuners.optuna import OptunaTuner, Sharing
from rwopt.weights import WeightFunction


@dataclass
class Arm:
    """One way of making pictures and how it was found. Scores are means of the objective over the split's cases."""

    name: str
    dials: Dials
    schedule: Schedule | None = None
    train: float | None = None
    validation: float | None = None
    evaluations: int = 0
    calls: int = 0  # U-Net calls (batches of pictures) spent to find it, with what it started from
    values: dict[str, float] = field(default_factory=dict)  # the chosen point of the box
    history: list[tuple[str, float]] = field(default_factory=list)  # (origin, score) of each trial
    note: str = ""
    choice: dict[str, Any] = field(default_factory=dict)  # rule, front, limits: see `rwopt.measure`

    def save(self, path: Path) -> None:
        data = {**asdict(self), "dials": self.dials.to_dict(), "schedule": None}
        if self.schedule is not None:
            data["schedule"] = self.schedule.to_dict()
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Arm:
        data = json.loads(path.read_text())
        data["dials"] = Dials(**data["dials"])
        data["schedule"] = None if data["schedule"] is None else Schedule.from_dict(data["schedule"])
        data["history"] = [(origin, value) for origin, value in data["history"]]
        return cls(**data)


def dial_box(task: str, dials: DialSettings) -> list[Parameter]:
    """The box of guidance scale and, for an edit, strength (on a grid of 0.05, so that inversions are shared)."""
    low, high = dials.guidance_bounds
    box = [Parameter("guidance", low, high, step=0.25)]
    if task == "editing":
        low, high = dials.strength_bounds
        box.append(Parameter("strength", low, high, step=0.05))
    return box


def near(parameter: Parameter, centre: float, share: float = 0.15) -> Parameter:
    """The part of a dial's range within `share` of its width around `centre`.

    Over the whole range, most candidates lose by their dials alone and say nothing of their weights.
    """
    reach = share * (parameter.high - parameter.low)
    return replace(parameter, low=parameter.clip(centre - reach), high=parameter.clip(centre + reach))


class Workshop:
    """Model, tasks and objective of one recipe, with a folder in which arms are found and kept."""

    def __init__(
        self, settings: Settings, folder: Path, model: Model, progress: Progress, fingerprint: str = ""
    ) -> None:
        self.settings, self.folder, self.model, self.progress = settings, folder, model, progress
        self.fingerprint = fingerprint
        terms = settings.objective.terms
        # the held-out twin takes the scorer's terms alone: others (source.ssim) have no second opinion
        held_out = {n.replace("scorer.", "judge."): w for n, w in terms.items() if n.startswith("scorer.")}
        self.composites = {OBJECTIVE: Composite(terms), HELD_OUT: Composite(held_out or terms)}
        self.base = Dials(settings.dials.guidance, settings.dials.strength)
        self.log: Callable[[dict[str, Any]], None] = lambda record: None
        self.measure = Measure(self)
        self._tasks: dict[str, Task] = {}
        self._counted: dict[str, int] = {}  # trials of each study that the progress knows of

    def cases(self, split: str) -> list[Case]:
        """The recipe's cases of one split."""
        wanted = self.settings.task
        return load_cases(wanted.cases, split, wanted.name, getattr(wanted, split))

    def prepare(self, cases: Sequence[Case]) -> Task:
        """The recipe's task on some cases; each has the same start noise in whatever company."""
        wanted = self.settings.task
        return make_task(
            wanted.name, self.model, cases, wanted.steps, wanted.draws, wanted.batch, wanted.method, self.base
        )

    def task(self, split: str) -> Task:
        """The prepared task of one split, made when first asked for."""
        if split not in self._tasks:
            self._tasks[split] = self.prepare(self.cases(split))
            self._check_needs(split)
        return self._tasks[split]

    def _check_needs(self, split: str) -> None:
        """Everything that the table shows must be measurable, or a long search would fail at its last step."""
        task, wanted = self._tasks[split], self.settings.objective
        given = task.describe(torch.zeros(len(task), 3, 1, 1))
        for name in dict.fromkeys((*wanted.terms, *wanted.report, *self.measure.signs)):
            if name == OBJECTIVE:
                continue
            for need in sorted(make_objective(name).spec.needs):
                if getattr(given, need) is None:
                    raise UserError(f"objective {name} needs {need}, which {task.name} cases ({split}) do not give")

    def value(self, split: str, dials: Dials, schedule: Schedule | None) -> float:
        """Mean objective over the cases of `split`."""
        task = self.task(split)
        return score(task, task.images(dials, schedule), {OBJECTIVE: self.composites[OBJECTIVE]}).mean(OBJECTIVE)

    def test(self, arm: Arm, metrics: Sequence[str], split: str = "test") -> Scores:
        """Every metric of one arm on the cases of `split`; kept in `arms/<name>.<split>.json`."""
        path = self.folder / "arms" / f"{arm.name}.{split}.json"
        if path.exists():
            return Scores.from_json(json.loads(path.read_text()))
        task = self.task(split)
        data = score(task, task.images(arm.dials, arm.schedule), self.composites, metrics).to_json()
        write_text(path, json.dumps(data))
        return Scores.from_json(data)  # as a later run reads them, to the last digit

    def kept(self, name: str) -> Arm | None:
        """A finished arm of an earlier, killed run."""
        path = self.folder / "arms" / f"{name}.json"
        return Arm.load(path) if path.exists() else None

    def keep(self, arm: Arm) -> Arm:
        arm.save(self.folder / "arms" / f"{arm.name}.json")
        return arm

    def fixed(self, name: str, schedule: Schedule | None = None, note: str = "") -> Arm:
        """An arm with the recipe's own dials: nothing to tune."""
        return self.kept(name) or self.keep(
            Arm(name, self.base, schedule, validation=self.value("validation", self.base, schedule), note=note)
        )

    def tune(
        self,
        name: str,
        space: Sequence[Parameter],
        decode: Meaning,
        starts: Mapping[str, Point],
        trials: int,
        seed: int = 0,
        study: str | None = None,
        note: str = "",
        spent: int = 0,
    ) -> Arm:
        """Search the box on train cases; the best `top_k` are scored on validation cases, and the winner is the arm.

        `study` lets two arms share (and continue) one study; `spent` U-Net calls went into the starts. Resumes from
        `study.db`.
        """
        study = study or name
        done = self.kept(name)
        if done is not None:
            self._skip(name, study, trials)
            return done
        tuner = self._optuna(study, space, decode, starts, trials, seed)
        there = tuner.ended()
        self._skip(name, study, len(there))
        known, finished, best = {t.candidate.number for t in there}, list[Trial](), -np.inf

        def told(trial: Trial) -> None:
            nonlocal best
            if not np.isnan(trial.score):
                finished.append(trial)
                best = max(best, trial.score)
                about = {"arm": name, "study": study, "trial": trial.candidate.number}
                self.log({**about, "origin": trial.candidate.origin, "score": trial.score, "best": best})
            if trial.candidate.number not in known:
                self._counted[study] += 1
                self.progress.advance(name, best)

        def evaluate(candidate: Candidate, report: Report) -> Outcome:
            return self.measure.train(*decode(candidate.values), candidate.number, report)

        self.task("train")  # made first: its own calls are nobody's
        work(tuner, trials, evaluate, told, f"arm {name}")
        self.task("validation")
        before = self.model.calls
        chosen, outcome, choice = self.measure.choose(name, finished, decode, self.settings.tuner.top_k)
        assert outcome.scores is not None
        calls = spent + sum(t.calls for t in tuner.ended()) + self.model.calls - before
        return self.keep(Arm(
            name, *decode(chosen.candidate.values), chosen.score, outcome.scores[0], len(tuner.ended()), calls,
            dict(chosen.candidate.values), [(t.candidate.origin, t.score) for t in finished], note, choice,
        ))  # fmt: skip

    @property
    def shared(self) -> bool:
        """Whether other processes may work on this recipe's studies."""
        return bool(self.settings.tuner.storage)

    def _optuna(
        self, study: str, space: Sequence[Parameter], meaning: Meaning, starts: Mapping[str, Point], trials: int,
        seed: int,
    ) -> OptunaTuner:  # fmt: skip
        """The tuner of one study: in the run folder, or in `tuner.storage` under the run's name, with all that a
        worker must know."""
        wanted = self.settings.tuner
        storage, name, sharing, about = f"sqlite:///{(self.folder / 'study.db').absolute()}", study, None, {}
        if self.shared:
            storage, name = wanted.storage, f"{self.folder.absolute().name}/{study}"
            sharing = Sharing(wanted.heartbeat, wanted.grace)
            about = {"recipe": to_yaml(self.settings), "meaning": meaning.to_dict()}
        return OptunaTuner(
            name, space, storage, trials, seed, wanted.sampler, starts, self.fingerprint, self.measure.labels,
            bool(wanted.limits), wanted.prune, sharing, about,
        )  # fmt: skip

    def _skip(self, name: str, study: str, trials: int) -> None:
        """Tell the progress of trials that are there already, once each where arms share a study."""
        known = self._counted.get(study, 0)
        self._counted[study] = max(known, trials)
        self.progress.skip(name, self._counted[study] - known)

    def tune_dials(
        self, name: str, schedule: Schedule | None, trials: int, starts: Mapping[str, Point], study: str | None = None,
        note: str = "", spent: int = 0,
    ) -> Arm:  # fmt: skip
        """The best guidance (and strength) for a given schedule."""
        space = dial_box(self.settings.task.name, self.settings.dials)
        return self.tune(
            name, space, Meaning(self.base, schedule=schedule), starts, trials,
            self.settings.tuner.seed, study, note, spent,
        )  # fmt: skip

    def tune_weights(
        self,
        name: str,
        function: WeightFunction,
        centre: np.ndarray,
        dials: Dials,
        starts: Mapping[str, np.ndarray],
        trials: int,
        seed: int,
        note: str = "",
        spent: int = 0,
    ) -> Arm:
        """The best theta in `centre` +- radius (widened to hold theta = 0), with dials near the tuned ones."""
        radius = self.settings.weights.radius
        box = dial_box(self.settings.task.name, self.settings.dials)
        space = [near(p, dials.to_dict()[p.name]) for p in box] + [
            Parameter(n, min(c - radius, 0.0), max(c + radius, 0.0))
            for n, c in zip(function.names, centre.tolist(), strict=True)
        ]

        points = {
            origin: {**dials.to_dict(), **dict(zip(function.names, theta.tolist(), strict=True))}
            for origin, theta in starts.items()
        }
        return self.tune(name, space, Meaning(self.base, function), points, trials, seed, note=note, spent=spent)
