"""The main job: probe, analytic baseline and controls, search, validation, one look at test cases, report.

Each stage leaves its result in the run folder and is skipped if it is there, so that a killed run goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.config import Settings, to_yaml
from rwopt.errors import UserError
from rwopt.files import locked, sweep, write_text
from rwopt.models import load_model
from rwopt.probes import make_probe
from rwopt.progress import Progress
from rwopt.report import Report
from rwopt.sampling.noise import timesteps
from rwopt.schedule import Schedule
from rwopt.schedule.weights import WeightFunction
from rwopt.search.arms import ARMS, LEARNED, Arm, ArmSpec, chosen
from rwopt.search.experiment import Experiment
from rwopt.search.identity import NAME, fingerprint, run_name
from rwopt.search.probing import Probing
from rwopt.search.publish import Publisher, describe
from rwopt.search.tuning import ArmTuner
from rwopt.search.verdict import report_metrics
from rwopt.tasks.cases import SPLITS
from rwopt.tracking import FanOut, open_tracker, wandb_mode
from rwopt.unet.sites import group_sites, list_sites


class Search:
    """One run in one folder. `run()` does everything; benchmarks call the stages one by one."""

    def __init__(self, settings: Settings, folder: Path, progress: Progress) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        if settings.track.wandb == "online":
            wandb_mode("online")  # a missing key is told before anything is done
        self.arms = chosen(settings.arms)
        text = to_yaml(settings)
        stored = folder / "recipe.yaml"
        if stored.exists() and stored.read_text() != text:
            raise UserError(f"{stored} differs from this recipe: resume without overrides, or use a new folder")
        model = load_model(**asdict(settings.model))
        self.experiment = Experiment(settings, model)
        self.tuner = ArmTuner(self.experiment, folder, progress, fingerprint(settings, model))
        self.probing = Probing(self.experiment, folder)
        self._check()
        if not stored.exists():
            write_text(folder / NAME, run_name(folder) + "\n")
            write_text(stored, text)

    def _check(self) -> None:
        """What the typed border cannot know: names and ranges that depend on the model and the cases."""
        settings, model = self.settings, self.experiment.model
        report_metrics(settings)
        make_probe(settings.probe.name, **settings.probe.options)
        list_sites(model.unet, settings.weights.kinds)
        least = settings.dials.strength_bounds[0] if settings.task.name == "editing" else 1.0
        timesteps(model, settings.task.steps, least)
        for split in SPLITS:
            self.experiment.splits.cases(split)

    @property
    def evaluations(self) -> int:
        """Candidate evaluations of a whole run, for the progress bar."""
        return self.settings.tuner.dial_trials + sum(spec.evaluations(self.settings.tuner) for spec in self.arms)

    # stages

    def dials(self) -> Arm:
        """Tuned dials without a schedule; every other tuned arm starts from them."""
        base = self.experiment.base.to_dict()
        trials = self.settings.tuner.dial_trials
        return self.tuner.tune_dials("dials", None, trials, {"recipe": base}, study="guidance")

    def dial_starts(self, dials: Arm) -> dict[str, dict[str, float]]:
        """Where the dials of a schedule begin: the tuned ones; for an edit also a lower strength, which changes less.

        Weights that make an edit surer can do with less of it, and a short search may not think of that by itself.
        """
        tuned = dials.dials.to_dict()
        if self.settings.task.name != "editing":
            return {"tuned": tuned}
        return {"tuned": tuned, "weaker": {**tuned, "strength": tuned["strength"] - 0.1}}

    def make(self, spec: ArmSpec, dials: Arm) -> Arm:
        """One arm, found within its budget."""
        if spec.learned:
            return self.learn(dials, self.settings.tuner.seed, spec.name, spec.constant)
        if spec.published:
            return self._published(spec, dials)
        if spec.budget == "none":
            return self.tuner.fixed(spec.name, note=spec.note)
        # the study of the dials, gone on with until it has had as many evaluations as a learned arm, its start included
        trials = spec.evaluations(self.settings.tuner) + self.settings.tuner.dial_trials
        return self.tuner.tune_dials(spec.name, None, trials, {"recipe": dials.dials.to_dict()}, "guidance", spec.note)

    def _published(self, spec: ArmSpec, dials: Arm) -> Arm:
        schedule, price = self.probing.published(spec.published)
        return self.tuner.tune_dials(
            spec.name, schedule, spec.evaluations(self.settings.tuner), self.dial_starts(dials), note=spec.note,
            spent=(dials.evaluations, dials.calls + price), around=dials.dials,
        )  # fmt: skip

    def functions(self) -> tuple[WeightFunction, WeightFunction]:
        """The weight function of the recipe, and the same with one knot (constant over noise)."""
        wanted, model = self.settings.weights, self.experiment.model
        sites = list_sites(model.unet, wanted.kinds)
        ids, groups = [s.id for s in sites], group_sites(sites, wanted.group_by)
        strength = self.experiment.base.strength if self.settings.task.name == "editing" else 1.0
        ts = timesteps(model, self.settings.task.steps, strength)
        first, last = np.log(model.sigma(ts[0])), np.log(model.sigma(ts[-1]))
        middle = np.exp([(first + last) / 2])
        knots = middle if wanted.knots == 1 else np.exp(np.linspace(first, last, wanted.knots))
        return (
            WeightFunction(ids, knots, groups, wanted.mode, wanted.rank),
            WeightFunction(ids, middle, groups, wanted.mode),
        )

    def learn(self, dials: Arm, seed: int, name: str = LEARNED, constant: bool = False) -> Arm:
        """The learned arm, or its constant control: weights at the tuned dials, then dials for these weights."""
        function = self.functions()[1 if constant else 0]
        start, price = self.probing.start(function)
        weights = self.tuner.tune_weights(
            f"{name} weights", function, dials.dials, {"plain": np.zeros(function.dimension), "probe": start}, seed,
            spent=(dials.evaluations, dials.calls + price),
        )  # fmt: skip
        note = ARMS["constant" if constant else LEARNED].note
        return self.tuner.tune_dials(
            name, weights.schedule, 2 * self.settings.tuner.dial_trials, self.dial_starts(dials), note=note,
            spent=(weights.evaluations, weights.calls), around=dials.dials,
        )  # fmt: skip

    # the whole way

    def run(self, command: str) -> Report:
        """All stages. Leaves the report, pictures, schedule and records in the folder, which it keeps to itself."""
        with locked(self.folder):
            sweep(self.folder)
            return self._run(command)

    def _run(self, command: str) -> Report:
        track = self.settings.track
        with open_tracker(self.folder, track.wandb, track.project, config=asdict(self.settings)) as tracker:
            self._log_once(tracker)
            self.progress.start(self.evaluations)
            dials = self.dials()
            importance = self.probing.importance()
            arms = [self.make(spec, dials) for spec in self.arms]
            learned = next(arm for arm in arms if arm.name == LEARNED)
            path = self.folder / "schedule.json"
            if not path.exists():
                describe(self.experiment, learned, command).save(path)
            self.progress.advance("test", None, 0)
            publisher = Publisher(self.experiment, self.tuner, self.folder)
            report = publisher.report(arms, command)
            publisher.publish(report, arms, Schedule.load(path), importance, tracker)
        return report

    def _log_once(self, tracker: FanOut) -> None:
        """Send each trial, and each update of a gradient, once, also when a resumed run tells it again."""
        names = ("study", "trial", "update")
        seen = {tuple(map(r.get, names)) for r in tracker.read("log")}

        def log(record: dict[str, Any]) -> None:
            key = tuple(map(record.get, names))
            if key not in seen:
                seen.add(key)
                tracker.log(record)

        self.tuner.log = log
