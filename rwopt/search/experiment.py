"""What a recipe measures: one model, its cases, its objective, and how a candidate is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rwopt.config import Settings
from rwopt.models import Model
from rwopt.objectives import Objectives, ObjectiveSpec, calibration
from rwopt.objectives.calibration import Scales
from rwopt.objectives.composite import Composite
from rwopt.sampling.course import Course, course_by_rule
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.schedule.steps import Steps
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, Scores, score
from rwopt.search.evaluator import Evaluator
from rwopt.search.splits import Splits
from rwopt.tasks import Dials
from rwopt.unet.sites import list_sites

CALIBRATION = "calibration.json"
"""In a run folder: the scales of a calibrated objective's terms."""


class Experiment:
    """A recipe made ready on a model. Keeps nothing on disk but teachers, in the folder `teachers`, and a calibration,
    in the run folder `keep`.

    base: the recipe's own dials; objectives: with the recipe's options; specs: of all that it measures; splits: its
    cases; evaluator: how candidates are scored and chosen.
    """

    def __init__(
        self, settings: Settings, model: Model, teachers: Path | None = None, keep: Path | None = None
    ) -> None:
        self.settings, self.model, self.keep = settings, model, keep
        self.base = Dials(settings.dials.guidance, settings.dials.strength)
        if settings.task.kind == "instruct":
            self.base = replace(self.base, image_guidance=settings.dials.image_guidance)
        wanted, tuner = settings.objective, settings.tuner
        self.objectives = Objectives(wanted.options, wanted.invalid, model.name)
        objective = Composite(wanted.terms, self.objectives, wanted.combine)
        self._composites = {OBJECTIVE: objective}
        # the held-out twin takes the scorer's terms alone: others (source.ssim) have no second opinion
        held_out = {n.replace("scorer.", "judge."): w for n, w in wanted.terms.items() if n.startswith("scorer.")}
        if held_out:
            combine = objective.combine if len(held_out) > 1 or objective.calibrated else "auto"
            self._composites[HELD_OUT] = Composite(held_out, self.objectives, combine)
        names = (*wanted.terms, *wanted.report, *tuner.objectives, *tuner.limits, *tuner.guard)
        single = [name for name in dict.fromkeys(names) if name != OBJECTIVE]
        every = dict.fromkeys((*single, *held_out))
        self.specs: dict[str, ObjectiveSpec] = {name: self.objectives.spec(name) for name in every}
        self.splits = Splits(settings.task, model, self.base, single, teachers)
        self.evaluator = Evaluator(tuner, self.splits, objective, self.objectives)

    def course(
        self, dials: Dials, steps: int | None = None, sampler: str | None = None, grid: str | None = None
    ) -> Course:
        """The course of a picture at these dials, for which no task needs to be made; by default of the recipe's number
        of calls, sampler and grid. Raises `UserError` as `course_by_rule`."""
        task = self.settings.task
        reach = dials.strength if task.has_strength else 1.0  # as `Task.reach`
        return course_by_rule(self.model, steps or task.steps, sampler or task.sampler, grid or task.grid, reach)

    def plain(self, course: Course, actions: Actions | None = None) -> Schedule:
        """The plain model on a course, with a plan of actions or none."""
        sites = [site.id for site in list_sites(self.model.unet, self.settings.weights.kinds)]
        steps = Steps(course.sampler, course.sigmas)
        return Schedule.constant(sites, course.sigmas, steps=steps, actions=actions)

    @property
    def composites(self) -> Mapping[str, Composite]:
        """The recipe's objective, and the same by the held-out judge, ready to score: see `calibrate`."""
        self.calibrate()
        return self._composites

    @property
    def objective(self) -> Composite:
        """What the search raises, ready to score."""
        return self.composites[OBJECTIVE]

    @property
    def calibrated(self) -> bool:
        """Whether terms are brought to one scale by the plain model's scores."""
        return any(composite.calibrated for composite in self._composites.values())

    @property
    def differentiable(self) -> bool:
        """Whether every term of the objective has a gradient."""
        return self._composites[OBJECTIVE].differentiable

    def calibrate(self, scales: Scales | None = None) -> Scales:
        """Give terms their scales, if the objective is calibrated and has none: those given, those of the run folder,
        else of the plain model's pictures of the train cases, once. Their U-Net calls are nobody's.

        Never while hooks are on the U-Net.
        """
        waiting = [c for c in self._composites.values() if c.calibrated and c.scales is None]
        if not waiting:
            return self._composites[OBJECTIVE].scales or {}
        file = None if self.keep is None else self.keep / CALIBRATION
        if scales is None and file is not None and file.exists():
            scales = calibration.load(file)
        if scales is None:
            scales = self._measured([name for c in waiting for name in c.weights])
            if file is not None:
                calibration.save(scales, file)
        for composite in waiting:
            composite.scales = scales
        return scales

    def _measured(self, names: Sequence[str]) -> Scales:
        task, before = self.splits.task("train"), self.model.calls
        made = task.made(self.base, None)
        self.model.calls = before
        draws = self.settings.task.draws
        own = made.latents
        latents = None if own is None else own.roll(draws, 0)
        moved = replace(made, images=made.images.roll(draws, 0), latents=latents)  # each beside the case after its own
        return {
            name: calibration.measure(name, objective(made), partial(objective, moved))
            for name, objective in ((name, self.objectives[name]) for name in names)
        }

    def scores(
        self, split: str, dials: Dials, schedule: Schedule | None, metrics: Sequence[str] = ()
    ) -> Scores:
        """Both composites, and `metrics`, of one schedule (None: the plain model) on all cases of a split."""
        task = self.splits.task(split)
        return score(task, task.made(dials, schedule), self.composites, metrics, self.objectives)

    def value(self, split: str, dials: Dials, schedule: Schedule | None) -> float:
        """Mean objective over the cases of a split."""
        task = self.splits.task(split)
        return score(task, task.made(dials, schedule), {OBJECTIVE: self.objective}).mean(OBJECTIVE)
