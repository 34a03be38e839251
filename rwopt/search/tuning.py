"""How an arm is found: candidates proposed by a tuner, scored on train cases, chosen on validation cases, kept on disk.

Every tuned arm goes through the same procedure, whether it is the learned schedule, the best constant weights or the
best guidance scale; only its box differs. A finished arm is one JSON file and is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.config import to_yaml
from rwopt.files import write_text
from rwopt.objectives import calibration, make_set
from rwopt.progress import Progress
from rwopt.schedule import Schedule
from rwopt.schedule.weights import WeightFunction
from rwopt.search.arms import Arm
from rwopt.search.evaluation import Scores
from rwopt.search.experiment import Experiment
from rwopt.search.guard import Broken
from rwopt.search.identity import run_name
from rwopt.search.space import Decoder, Point, dial_box, near, theta_box
from rwopt.tasks import Dials
from rwopt.tuners import Candidate, Parameter, Trial, Tuner
from rwopt.tuners.gradient import GradientTuner
from rwopt.tuners.loop import Outcome, Report, ended, work
from rwopt.tuners.optuna import OptunaTuner, Sharing
from rwopt.tuners.problem import Problem
from rwopt.tuners.spsa import SpsaTuner


class ArmTuner:
    """Finds the arms of one experiment and keeps them in a run folder (`arms/`, `studies/`, `study.db`).

    fingerprint: of recipe and model, so that no study goes on with another; log: takes a record of each trial.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, progress: Progress, fingerprint: str = ""
    ) -> None:
        self.experiment, self.folder, self.progress, self.fingerprint = experiment, folder, progress, fingerprint
        self.settings = experiment.settings
        self.log: Callable[[dict[str, Any]], None] = lambda record: None
        self._counted: dict[str, int] = {}  # trials of each study that the progress knows of

    def kept(self, name: str) -> Arm | None:
        """A finished arm of an earlier, killed run."""
        path = self.folder / "arms" / f"{name}.json"
        return Arm.load(path) if path.exists() else None

    def keep(self, arm: Arm) -> Arm:
        arm.save(self.folder / "arms" / f"{arm.name}.json")
        return arm

    def test(self, arm: Arm, metrics: Sequence[str], split: str = "test") -> Scores:
        """Every metric of one arm on the cases of `split`; kept in `arms/<name>.<split>.json`."""
        path = self.folder / "arms" / f"{arm.name}.{split}.json"
        if path.exists():
            return Scores.from_json(json.loads(path.read_text()))
        data = self.experiment.scores(split, arm.dials, arm.schedule, metrics).to_json()
        write_text(path, json.dumps(data))
        return Scores.from_json(data)  # as a later run reads them, to the last digit

    def sets(self, arm: Arm, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Set objectives of one arm's test pictures against the true ones, those of the teacher, or the sources,
        whichever there are first: {name: value, sd, n, p}; kept in `arms/<name>.sets.json`."""
        path = self.folder / "arms" / f"{arm.name}.sets.json"
        if path.exists():
            kept: dict[str, dict[str, float]] = json.loads(path.read_text())
            return kept
        batch = self.experiment.splits.task("test").made(arm.dials, arm.schedule)
        real = next(x for x in (batch.truth, batch.teacher, batch.reference) if x is not None)
        out = {}
        for name in names:
            objective = make_set(name, **self.experiment.objectives.given(name))
            objective.update(real, real=True)
            objective.update(batch.images, real=False)
            out[name] = dict(objective.compute().to_dict())
        write_text(path, json.dumps(out))
        return out

    def fixed(self, name: str, schedule: Schedule | None = None, note: str = "") -> Arm:
        """An arm with the recipe's own dials: nothing to tune."""
        done = self.kept(name)
        if done is not None:
            return done
        base = self.experiment.base
        return self.keep(
            Arm(name, base, schedule, validation=self.experiment.value("validation", base, schedule), note=note)
        )

    def best_of(self, name: str, schedules: Mapping[str, Schedule], note: str = "") -> Arm:
        """The schedule, at the recipe's own dials, that does best on validation cases; its name goes into the note."""
        done = self.kept(name)
        if done is not None:
            return done
        self.experiment.calibrate()
        base, evaluator, before = self.experiment.base, self.experiment.evaluator, self.experiment.model.calls
        scores = {
            key: (evaluator.of("validation", (base, schedule))[0].scores or (np.nan,))[0]
            for key, schedule in schedules.items()
        }
        best = max(scores, key=lambda key: -np.inf if np.isnan(scores[key]) else scores[key])
        calls = self.experiment.model.calls - before
        return self.keep(Arm(
            name, base, schedules[best], validation=scores[best], evaluations=len(scores), calls=calls,
            history=list(scores.items()), note=f"{note}: {best}", choice={"best": best},
        ))  # fmt: skip

    def tune_dials(
        self, name: str, schedule: Schedule | None, trials: int, starts: Mapping[str, Point], study: str | None = None,
        note: str = "", spent: tuple[int, int] = (0, 0), around: Dials | None = None,
    ) -> Arm:  # fmt: skip
        """The best guidance (and strength) for a schedule: in the recipe's box, or the part of it `around` some."""
        space = dial_box(self.settings.task, self.settings.dials)
        if around is not None:
            space = [near(p, around.to_dict()[p.name]) for p in space]
        decode = Decoder(self.experiment.base, schedule=schedule)
        seed = self.settings.tuner.seed
        return self.tune(
            name, study or name, lambda study: self._optuna(study, space, decode, starts, trials, seed), decode,
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
        pace: float = 1.0,
    ) -> Arm:
        """The best theta at fixed dials. The box is each start +- radius; the `tuner` settings say who searches it.

        pace: share of `gradient.rate` at which a gradient goes.
        """
        trials = self.settings.tuner.trials
        space = theta_box(function.names, list(starts.values()), function.reach(self.settings.weights.radius))
        points = {o: dict(zip(function.names, theta.tolist(), strict=True)) for o, theta in starts.items()}
        decode = Decoder(dials, function)

        def make(study: str) -> Tuner:
            kind = self.tuner_kind(function.dimension)
            if kind == "optuna":
                return self._optuna(study, space, decode, points, trials, seed)
            place = self.folder / "studies"
            if kind == "spsa":
                return SpsaTuner(study, space, place, trials, seed, points, self.fingerprint)
            options = replace(self.settings.gradient, rate=pace * self.settings.gradient.rate)
            splits = self.experiment.splits
            task = splits.prepare(splits.cases("train"), options.draws)
            problem = Problem(function, task, self.experiment.objective, dials)

            def log(record: dict[str, float]) -> None:
                self.log({"study": study, **record, "update": int(record["update"])})

            alone = options.devices == 1  # else a forked process would write to this one's trackers
            return GradientTuner(
                study, space, problem, place, seed, points, self.fingerprint, options, log if alone else None
            )

        return self.tune(name, name, make, decode, trials, note, spent)

    def tune(
        self,
        name: str,
        study: str,
        make: Callable[[str], Tuner],
        decode: Decoder,
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
        self.experiment.calibrate()
        model, splits, evaluator = self.experiment.model, self.experiment.splits, self.experiment.evaluator
        tasks = [splits.task("train"), splits.task("validation")]  # made first: their own calls are nobody's
        before = model.calls - splits.teaching
        tuner = make(study)
        if isinstance(tuner, GradientTuner):
            tasks.append(tuner.problem.task)
        opening = model.calls - splits.teaching - before + splits.price(*tasks)  # teachers' calls are not forgotten
        there = ended(tuner)
        self._skip(name, study, len(there))
        known, finished, best = {t.candidate.number for t in there}, list[Trial](), -np.inf
        watch, guarding = evaluator.watch(decode), 0

        def on_trial(trial: Trial) -> None:
            nonlocal best, guarding
            if not np.isnan(trial.score):
                finished.append(trial)
                best = max(best, trial.score)
                about = {"arm": name, "study": study, "trial": trial.candidate.number}
                self.log({**about, "origin": trial.candidate.origin, "score": trial.score, "best": best})
            if trial.candidate.number not in known:
                self._counted[study] += 1
                self.progress.advance(name, best)
            if not np.isnan(trial.score):
                before = model.calls
                try:
                    watch.see(trial)
                finally:
                    guarding += model.calls - before

        def evaluate(candidate: Candidate, report: Report) -> Outcome:
            return evaluator.train(*decode(candidate.values), candidate.number, report)

        try:
            work(tuner, trials, evaluate, on_trial, f"arm {name}", batched=evaluator.batched(decode))
        except Broken:  # what was found before is what there is
            self._skip(name, study, trials)
        before = model.calls
        chosen, outcome, choice = evaluator.choose(name, finished, decode, self.settings.tuner.top_k, watch)
        assert outcome.scores is not None
        tried = ended(tuner)  # with those given up, and what the tuner itself spent on its proposals
        calls = spent[1] + opening + sum(t.calls for t in tried) + guarding + model.calls - before
        return self.keep(Arm(
            name, *decode(chosen.candidate.values), chosen.score, outcome.scores[0], spent[0] + len(tried), calls,
            dict(chosen.candidate.values), [(t.candidate.origin, t.score) for t in finished], note, choice,
        ))  # fmt: skip

    def _skip(self, name: str, study: str, trials: int) -> None:
        """Tell the progress of trials that are there already, once each where arms share a study."""
        known = self._counted.get(study, 0)
        self._counted[study] = max(known, trials)
        self.progress.skip(name, self._counted[study] - known)

    @property
    def shared(self) -> bool:
        """Whether other processes may work on this recipe's studies."""
        return bool(self.settings.tuner.storage)

    def _optuna(
        self, study: str, space: Sequence[Parameter], decode: Decoder, starts: Mapping[str, Point], trials: int,
        seed: int,
    ) -> OptunaTuner:  # fmt: skip
        """The tuner of one study: in the run folder, or in `tuner.storage` under the run's name, with all that a
        worker must know."""
        wanted = self.settings.tuner
        storage, name, sharing, about = f"sqlite:///{(self.folder / 'study.db').absolute()}", study, None, {}
        if self.shared:
            storage, name = wanted.storage, f"{run_name(self.folder)}/{study}"
            sharing = Sharing(wanted.heartbeat, wanted.grace)
            about = {"recipe": to_yaml(self.settings), "decoder": decode.to_dict()}
            if self.experiment.calibrated:
                about["calibration"] = calibration.to_json(self.experiment.calibrate())
        return OptunaTuner(
            name, space, storage, trials, seed, wanted.sampler, starts, self.fingerprint,
            self.experiment.evaluator.labels, bool(wanted.limits), wanted.prune, sharing, about,
        )  # fmt: skip

    def tuner_kind(self, dimension: int) -> str:
        """`tuner.name`; auto: gradient if every term of the objective has one, else by the number of weights.

        Optuna where only Optuna can: other objectives than the recipe's mean, limits, giving up early.
        """
        wanted = self.settings.tuner
        if wanted.name != "auto":
            return wanted.name
        if wanted.only_optuna:
            return "optuna"
        if self.experiment.differentiable:
            return "gradient"
        return "optuna" if dimension <= 30 else "spsa"
