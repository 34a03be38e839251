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
from rwopt.tuners import Candidate, Parameter, Trial, Tuner
from rwopt.tuners.gradient import GradientTuner, Problem
from rwopt.tuners.loop import Outcome, Report, ended, work
from rwopt.tuners.optuna import OptunaTuner, Sharing
from rwopt.tuners.spsa import SpsaTuner
from rwopt.weights import WeightFunction


@dataclass
class Arm:
    """One way of making pictures and how it was found. Scores are means of the objective over the split's cases."""

    name: str
    dials: Dials
    schedule: Schedule | None = None
    train: float | None = None
    validation: float | None = None
    evaluations: int = 0  # candidates scored on train cases to find it, with those of the arms it started from
    calls: int = 0  # U-Net calls (batches of pictures) spent likewise
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


def near(parameter: Parameter, centre: float, share: float = 0.25) -> Parameter:
    """The part of a dial's range within `share` of its width around `centre`.

    Over the whole range, most candidates lose by their dials alone.
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

    def prepare(self, cases: Sequence[Case], draws: int | None = None) -> Task:
        """The recipe's task on some cases; each has the same start noises in whatever company."""
        wanted = self.settings.task
        draws = wanted.draws if draws is None else draws
        return make_task(wanted.name, self.model, cases, wanted.steps, draws, wanted.batch, wanted.method, self.base)

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
        study: str,
        make: Callable[[str], Tuner],
        decode: Meaning,
        trials: int,
        note: str = "",
        spent: tuple[int, int] = (0, 0),
    ) -> Arm:
        """Ask the tuner that `make(study)` opens for `trials` candidates, scored on train cases; the arm is what does
        best on validation cases of the best `top_k`.

        `study` lets two arms share (and continue) one study; `spent`: evaluations and U-Net calls that went into the
        starts. Goes on where a killed run was.
        """
        done = self.kept(name)
        if done is not None:
            self._skip(name, study, trials)
            return done
        self.task("train")  # made first: its own calls are nobody's
        before = self.model.calls
        tuner = make(study)
        opening = self.model.calls - before
        there = ended(tuner)
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

        work(tuner, trials, evaluate, told, f"arm {name}", together=self.measure.together(decode))
        self.task("validation")
        before = self.model.calls
        chosen, outcome, choice = self.measure.choose(name, finished, decode, self.settings.tuner.top_k)
        assert outcome.scores is not None
        tried = ended(tuner)  # with those given up, and what the tuner itself spent on its proposals
        calls = spent[1] + opening + sum(t.calls for t in tried) + self.model.calls - before
        return self.keep(Arm(
            name, *decode(chosen.candidate.values), chosen.score, outcome.scores[0], spent[0] + len(tried), calls,
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
        note: str = "", spent: tuple[int, int] = (0, 0), around: Dials | None = None,
    ) -> Arm:  # fmt: skip
        """The best guidance (and strength) for a schedule: in the recipe's box, or the part of it `around` some."""
        space, seed = dial_box(self.settings.task.name, self.settings.dials), self.settings.tuner.seed
        if around is not None:
            space = [near(p, around.to_dict()[p.name]) for p in space]
        meaning = Meaning(self.base, schedule=schedule)
        return self.tune(
            name, study or name, lambda study: self._optuna(study, space, meaning, starts, trials, seed), meaning,
            trials, note, spent,
        )  # fmt: skip

    def tune_weights(
        self,
        name: str,
        function: WeightFunction,
        dials: Dials,
        starts: Mapping[str, np.ndarray],
        seed: int,
        note: str = "",
        spent: tuple[int, int] = (0, 0),
    ) -> Arm:
        """The best theta at fixed dials. The box is each start +- radius; the `tuner` settings say who searches it."""
        trials, radius = self.settings.tuner.trials, self.settings.weights.radius
        points = {o: dict(zip(function.names, theta.tolist(), strict=True)) for o, theta in starts.items()}
        span = np.array(list(starts.values()))
        space = [
            Parameter(n, low - radius, high + radius)
            for n, low, high in zip(function.names, span.min(0).tolist(), span.max(0).tolist(), strict=True)
        ]

        meaning = Meaning(dials, function)

        def make(study: str) -> Tuner:
            kind = self.tuner_kind(function.dimension)
            if kind == "optuna":
                return self._optuna(study, space, meaning, points, trials, seed)
            place = self.folder / "studies"
            if kind == "spsa":
                return SpsaTuner(study, space, place, trials, seed, points, self.fingerprint)
            options = self.settings.gradient
            task = self.prepare(self.cases("train"), options.draws)
            problem = Problem(function, task, self.composites[OBJECTIVE], dials)

            def log(record: dict[str, float]) -> None:
                self.log({"study": study, **record, "update": int(record["update"])})

            alone = options.devices == 1  # else a forked process would write to this one's trackers
            return GradientTuner(
                study, space, problem, place, seed, points, self.fingerprint, options, log if alone else None
            )

        return self.tune(name, name, make, meaning, trials, note, spent)

    @property
    def differentiable(self) -> bool:
        """Whether every term of the objective has a gradient."""
        return all(term.spec.differentiable for term in self.composites[OBJECTIVE].objectives.values())

    def tuner_kind(self, dimension: int) -> str:
        """`tuner.name`; auto: gradient if every term of the objective has one, else by the number of weights.

        Optuna where only Optuna can: other objectives than the recipe's mean, limits, giving up early.
        """
        wanted = self.settings.tuner
        if wanted.name != "auto":
            return wanted.name
        if wanted.only_optuna:
            return "optuna"
        if self.differentiable:
            return "gradient"
        return "optuna" if dimension <= 30 else "spsa"
