"""The main job: probe, analytic baseline and controls, search, validation, one look at test cases, report.

Each stage leaves its result in the run folder and is skipped if it is there, so that a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.config import Settings, to_yaml
from rwopt.errors import UserError
from rwopt.files import locked, sweep, write_text
from rwopt.models import load_model
from rwopt.objectives import objective_spec
from rwopt.probes import make_probe
from rwopt.progress import Progress
from rwopt.report import Report
from rwopt.sampling.course import course_by_rule, course_of_steps
from rwopt.schedule import Schedule
from rwopt.schedule.steps import StepFunction
from rwopt.schedule.weights import WeightFunction
from rwopt.search.arms import ARMS, LEARNED, Arm, ArmSpec, chosen, dials_alone
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.experiment import Experiment
from rwopt.search.identity import NAME, fingerprint, run_name
from rwopt.search.preflight import Plan, preflight
from rwopt.search.probing import Probing
from rwopt.search.publish import Publisher, describe
from rwopt.search.speed import Speed
from rwopt.search.tuning import ArmTuner
from rwopt.search.verdict import report_metrics
from rwopt.search.worth import worth
from rwopt.tasks import Dials
from rwopt.tasks.cases import SPLITS, digest
from rwopt.tracking import FanOut, open_tracker, wandb_mode
from rwopt.unet.sites import group_sites, list_sites

FINE = 1 / 3
"""Pace of a gradient from learned dials on: at the whole one its first steps lose much of what they had reached (10
calls of `benchmarks/few_steps.py`: 0.1 dB above the dials, with this 0.6)."""


class Search:
    """One run in one folder. `run()` does everything; benchmarks call the stages one by one, and let several runs share
    a folder of `teachers`."""

    def __init__(
        self, settings: Settings, folder: Path, progress: Progress, teachers: Path | None = None
    ) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        if settings.track.wandb == "online":
            wandb_mode("online")  # a missing key is told before anything is done
        self.arms = chosen(settings.arms)
        text = to_yaml(settings)
        stored = folder / "recipe.yaml"
        if stored.exists() and stored.read_text() != text:
            raise UserError(f"{stored} differs from this recipe: resume without overrides, or use a new folder")
        model = load_model(**asdict(settings.model), size=settings.task.size, method=settings.task.kind)
        self.experiment = Experiment(settings, model, teachers or folder / "teacher", folder)
        self.tuner = ArmTuner(self.experiment, folder, progress, fingerprint(settings, model))
        self.probing = Probing(self.experiment, folder)
        self.speed = Speed(self.experiment, self.tuner, folder)
        self._check()
        self._check_cases()
        if not stored.exists():
            write_text(folder / NAME, run_name(folder) + "\n")
            write_text(stored, text)

    def _check(self) -> None:
        """What the typed border cannot know: names and ranges that depend on the model and the cases."""
        settings, model = self.settings, self.experiment.model
        report_metrics(settings)
        self.speed.check()
        if settings.steps.learn and settings.tuner.dial_trials:
            raise UserError(
                f"steps.learn={settings.steps.learn} with tuner.dial_trials={settings.tuner.dial_trials}: strength and "
                "guidance are in the learned steps already, set tuner.dial_trials=0"
            )
        make_probe(settings.probe.name, **settings.probe.options)
        if settings.probe.start == "dials" and dials_alone(ARMS[LEARNED], self.arms, settings.steps.learn) is None:
            raise UserError(
                f"probe.start=dials with steps.learn={settings.steps.learn}: no arm learns these alone, add one to "
                "arms (sampler dials: clock, told and guidance) or set probe.start=none"
            )
        list_sites(model.unet, settings.weights.kinds)
        for name in settings.objective.sets:
            if objective_spec(name).level != "set":
                raise UserError(f"objective.sets: {name} scores single pictures: put it in objective.report")
        for name in settings.objective.options:
            objective_spec(name)
        least = settings.dials.strength_bounds[0] if settings.task.has_strength else 1.0
        course_by_rule(model, settings.task.steps, settings.task.sampler, settings.task.grid, least)

    def _check_cases(self) -> None:
        """That they are those with which the run began."""
        cases = [case for split in SPLITS for case in self.experiment.splits.cases(split)]
        kept, found = self.folder / "cases.txt", digest(cases) + "\n"
        if not kept.exists():
            write_text(kept, found)
        elif kept.read_text() != found:
            place = self.settings.task.cases
            raise UserError(f"task.cases={place} has changed since {self.folder} began: use a new folder")

    @property
    def evaluations(self) -> int:
        """Candidate evaluations of a whole run, for the progress bar."""
        return self.settings.tuner.dial_trials + sum(spec.evaluations(self.settings.tuner) for spec in self.arms)

    def preflight(self) -> Plan:
        """What this run will do and take. Raises `UserError` for what is missing."""
        plan = self.plan()
        plan.check()
        return plan

    def plan(self) -> Plan:
        """`preflight` that leaves it to the caller to check what is missing."""
        return preflight(self.experiment, self.arms, self.folder, self.speed.calls if self.planned else 0)

    # stages

    def dials(self) -> Arm:
        """Tuned dials without a schedule, from which every other tuned arm starts; without trials the recipe's own."""
        base, trials = self.experiment.base.to_dict(), self.settings.tuner.dial_trials
        if not trials:
            return self.tuner.fixed("dials")
        return self.tuner.tune_dials("dials", None, trials, {"recipe": base}, study="guidance")

    def dial_starts(self, dials: Arm) -> dict[str, dict[str, float]]:
        """Where the dials of a schedule begin: the tuned ones; for an edit also a lower strength, which changes less.

        Weights that make an edit surer can do with less of it, and a short search may not think of that by itself.
        """
        tuned = dials.dials.to_dict()
        if not self.settings.task.has_strength:
            return {"tuned": tuned}
        return {"tuned": tuned, "weaker": {**tuned, "strength": tuned["strength"] - 0.1}}

    def make(self, spec: ArmSpec, dials: Arm) -> Arm:
        """One arm, found within its budget."""
        if spec.learned:
            return self.learn(dials, self.settings.tuner.seed, spec)
        if spec.planned:
            return self.speed.plan(spec.name, spec.note)
        if spec.solver:
            return self.tuner.best_of(spec.name, self.solvers(), spec.note)
        if spec.published:
            return self._published(spec, dials)
        if spec.budget == "none":
            return self.tuner.fixed(spec.name, note=spec.note)
        start = {"recipe": dials.dials.to_dict()}
        if not self.settings.tuner.dial_trials:  # a control of sampler dials: the best plain sampler, guidance tuned
            solver, trials = self.tuner.kept("best solver"), spec.evaluations(self.settings.tuner)
            schedule = None if solver is None else solver.schedule
            return self.tuner.tune_dials(spec.name, schedule, trials, start, note=spec.note)
        # the study of the dials, gone on with until it has had as many evaluations as a learned arm, its start included
        trials = spec.evaluations(self.settings.tuner) + self.settings.tuner.dial_trials
        return self.tuner.tune_dials(spec.name, None, trials, start, "guidance", spec.note)

    def solvers(self, steps: int | None = None) -> dict[str, Schedule]:
        """The recipe's plain samplers on its grids, those that allow `steps` calls (default: `task.steps`, or what the
        budget pays)."""
        wanted, steps = self.settings.steps, steps or self.speed.affordable
        names = [f"{sampler}, {grid}" for sampler in wanted.samplers for grid in wanted.grids]
        found = {name: self.solver(name, steps) for name in names}
        return {name: schedule for name, schedule in found.items() if schedule is not None}

    def solver(self, name: str, steps: int) -> Schedule | None:
        """The plain model on a sampler and grid, "ddim, karras"; None where the grid has no `steps` calls."""
        sampler, _, grid = name.partition(", ")
        try:
            return self.experiment.plain(self.experiment.course(self.experiment.base, steps, sampler, grid))
        except UserError:  # a list of levels has one length
            return None

    def _published(self, spec: ArmSpec, dials: Arm) -> Arm:
        schedule, price = self.probing.published(spec.published)
        return self.tuner.tune_dials(
            spec.name, schedule, spec.evaluations(self.settings.tuner), self.dial_starts(dials), note=spec.note,
            spent=(dials.evaluations, dials.calls + price), around=dials.dials,
        )  # fmt: skip

    def function(self, spec: ArmSpec, dials: Dials) -> WeightFunction:
        """The weight function of a learned arm at some dials: knots, groups, and what it has of the sampler's dials."""
        wanted, settings, model = self.settings.weights, self.settings, self.experiment.model
        sites = list_sites(model.unet, wanted.kinds)
        learn = settings.steps.learn if spec.steps is None else spec.steps
        plan = self.speed.plan().schedule if self.planned else None
        if plan is not None and plan.steps is not None:
            course = course_of_steps(model, plan.steps)
        else:
            course = self.experiment.course(dials if learn else self.experiment.base)
        first, last = np.log(course.sigmas[0]), np.log(course.sigmas[-1])
        knots = np.exp(np.linspace(first, last, wanted.knots)) if wanted.knots else np.array(course.sigmas)
        if spec.constant or wanted.knots == 1:
            knots = np.exp([(first + last) / 2])
        steps = None
        if learn or plan is not None:
            steps = StepFunction(settings.task.sampler, course.sigmas, model.table.tolist(), dials.guidance, learn)
        groups = group_sites(sites, wanted.group_by) if spec.weights else {}
        rank = 0 if spec.constant or not spec.weights else wanted.rank
        actions = None if plan is None else plan.actions
        return WeightFunction([s.id for s in sites], knots, groups, wanted.mode, rank, steps, actions)

    @property
    def planned(self) -> bool:
        """Whether learned arms take a plan of actions."""
        return self.settings.task.budget < 1

    def learn(self, dials: Arm, seed: int, spec: ArmSpec = ARMS[LEARNED], name: str = "") -> Arm:
        """A learned arm: weights and the sampler's dials at the tuned guidance and strength, then these once more."""
        name, function = name or spec.name, self.function(spec, dials.dials)
        starts, price, tried = {"plain": np.zeros(function.dimension)}, dials.calls, dials.evaluations
        how = self.settings.probe.start
        alone = dials_alone(spec, self.arms, self.settings.steps.learn) if how == "dials" else None
        if alone is not None:
            first = self.learn(dials, seed, alone, alone.name + name.removeprefix(spec.name))
            starts["dials"] = np.array([first.values.get(number, 0.0) for number in function.names])
            price, tried = first.calls, first.evaluations  # with those of `dials` and of a plan
        elif how not in ("none", "dials") and spec.weights:
            starts["probe"], probed = self.probing.start(function)
            price += probed
        if self.planned and alone is None:
            price += self.speed.plan().calls
        trials = 2 * self.settings.tuner.dial_trials
        weights = self.tuner.tune_weights(
            f"{name} weights" if trials else name, function, dials.dials, starts, seed, note=spec.note,
            spent=(tried, price), pace=1.0 if alone is None else FINE,
        )  # fmt: skip
        if not trials:
            return weights
        return self.tuner.tune_dials(
            name, weights.schedule, trials, self.dial_starts(dials), note=spec.note,
            spent=(weights.evaluations, weights.calls), around=dials.dials,
        )  # fmt: skip

    def chosen(self, arms: Sequence[Arm]) -> Arm:
        """The arm whose schedule is the run's: the learned one, or under a budget what does best on validation cases of
        it, the plan and the best solver."""
        names = (LEARNED, "plan", "best solver") if self.planned else (LEARNED,)
        return max((arm for arm in arms if arm.name in names), key=lambda arm: arm.validation or -np.inf)

    def worths(self, arms: Sequence[Arm]) -> list[str]:
        """What the learned arms are worth in plain calls of the best solver, N to 3 N of them, on the test cases."""
        solver = next((arm for arm in arms if arm.choice.get("best")), None)
        if solver is None:
            return []
        calls, metrics = self.speed.affordable, list(self.settings.objective.report)
        plain = {calls: self.tuner.test(solver, metrics).values[OBJECTIVE]}
        for more in range(calls + 1, 3 * calls + 1):
            schedule = self.solver(solver.choice["best"], more)
            if schedule is not None:
                arm = Arm(f"best solver, {more} calls", self.experiment.base, schedule)
                plain[more] = self.tuner.test(arm, metrics).values[OBJECTIVE]
        lines = []
        for name in (LEARNED, "sampler dials"):
            found = next((arm for arm in arms if arm.name == name), None)
            if found is not None:
                reached = worth(self.tuner.test(found, metrics).values[OBJECTIVE], plain)
                lines.append(f"{calls} calls, {name}: as good as {reached} of {solver.choice['best']}.")
        return lines

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
            learned = self.chosen(arms)
            path = self.folder / "schedule.json"
            if not path.exists():
                describe(self.experiment, learned, command).save(path)
            self.progress.advance("test", None, 0)
            publisher = Publisher(self.experiment, self.tuner, self.folder)
            report = publisher.report(arms, command)
            report.verdict[:0] = self.worths(arms)
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
