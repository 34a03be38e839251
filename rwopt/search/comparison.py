"""Schedules side by side: files compared on a recipe's test cases, and single pictures with and without a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.config import Settings
from rwopt.config.settings import DialSettings
from rwopt.embedded import DEFAULT
from rwopt.errors import UserError, one_of
from rwopt.models import load_model
from rwopt.report import Report, image_grid
from rwopt.results import ArmMeans
from rwopt.sampling.course import course_by_rule
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.search.arms import Arm
from rwopt.search.evaluation import compare
from rwopt.search.experiment import Experiment
from rwopt.search.verdict import report_metrics
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import Case, fit_picture
from rwopt.tasks.pictures import to_pictures
from rwopt.tasks.teacher import teach


def own_dials(schedule: Schedule | None, base: Dials) -> Dials:
    """The dials a schedule was calibrated with, else those of `base`."""
    made: Mapping[str, Any] = {} if schedule is None else schedule.calibrated
    names = {"guidance": "guidance_scale", "strength": "strength", "image_guidance": "image_guidance_scale"}
    return replace(base, **{name: float(made[key]) for name, key in names.items() if key in made})


def compare_schedules(settings: Settings, schedules: Mapping[str, Schedule], split: str) -> Report:
    """Each schedule at its own calibrated dials, the plain model at the recipe's, on one split, paired to the first."""
    model = load_model(**asdict(settings.model), size=settings.task.size, method=settings.task.kind)
    experiment = Experiment(settings, model)
    columns = report_metrics(settings)
    arms = [Arm("plain", experiment.base)]
    for name, schedule in schedules.items():
        dials = own_dials(schedule, experiment.base)
        arms.append(Arm(name, dials, schedule, calls=int(schedule.provenance.get("calls", 0))))
    names = list(settings.objective.report)
    scores = {a.name: experiment.scores(split, a.dials, a.schedule, names) for a in arms}
    first = next(iter(schedules))
    paired = [
        compare([scores[first]], [scores[other]], m.name, (first, other), m.optimised, split, m.higher_is_better)
        for other in scores
        if other != first
        for m in columns
    ]
    return Report(
        title="rwopt compare", recipe="", task=settings.task.name, metrics=columns,
        arms=[ArmMeans(a.name, scores[a.name].means(), a.calls) for a in arms],
        paired=paired, split=split, cases=len(experiment.splits.cases(split)), settings=asdict(settings),
    )  # fmt: skip


USUAL = Dials(DialSettings.guidance, DialSettings.strength)
"""Of a model that has none of its own."""
LONG = 50
"""U-Net calls of the plain picture that a schedule with steps is shown beside."""


def carried_over(
    schedule: Schedule, calls: int | None, sampler: str | None, guidance: float | None, table: np.ndarray,
    say: Callable[[str], None],
) -> Schedule:  # fmt: skip
    """A schedule's steps for what was asked instead, each change told. table: the model's VE sigmas [T]."""
    steps = schedule.steps
    assert steps is not None
    if calls is not None and calls != len(steps):
        say(f"steps: the file's dials are for {len(steps)} calls, here carried over to {calls}: not measured")
        steps = steps.resampled(calls, table)
    if sampler is not None and sampler != steps.sampler:
        one_of(tuple(SAMPLERS), "--sampler", sampler)
        say(f"sampler: the file's dials are for {steps.sampler}, here used with {sampler}: not measured")
        steps = replace(steps, sampler=sampler)
    if guidance is not None and steps.guidance:
        say(f"guidance: {guidance:g} takes the place of the file's {', '.join(f'{g:.2f}' for g in steps.guidance)}")
        steps = replace(steps, guidance=())
    return replace(schedule, steps=steps)


def pictures(
    cases: Sequence[Case],
    out: Path,
    schedule: Schedule | None = None,
    model: str = DEFAULT,
    steps: int | None = None,
    guidance: float | None = None,
    strength: float | None = None,
    sampler: str | None = None,
    grid: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    usual: Dials = USUAL,
) -> Path:
    """Pictures of the cases, plain and scheduled side by side in one file; edits if the cases have source pictures.

    steps, guidance, strength, sampler: None for what the schedule was calibrated with, else 20 DDIM steps at
    the `usual` dials. A schedule with steps of its own also stands beside the plain model's picture in `LONG` calls.
    say: takes a line for each thing that was changed on the way: a picture cut to the model's size, the end of a
    caption that is lost, steps carried over to another use.
    """
    loaded = load_model(model)
    if schedule is not None and schedule.steps is not None:
        schedule = carried_over(schedule, steps, sampler, guidance, loaded.table, say)
        own_steps = schedule.steps
        assert own_steps is not None
        if strength is not None:
            raise UserError(
                f"--strength {strength:g}: the file's steps start at noise level {own_steps.sigmas[0]:.3g}, which is "
                "their strength: leave it out"
            )
        steps, sampler = len(own_steps), own_steps.sampler
    edit = cases[0].source is not None
    own = own_dials(schedule, usual)
    given = own.strength if strength is None else strength
    dials = replace(own, guidance=own.guidance if guidance is None else guidance, strength=given if edit else 1.0)
    made: Mapping[str, Any] = {} if schedule is None else schedule.calibrated
    steps = int(made.get("num_inference_steps", 20)) if steps is None else steps
    for case in cases:
        if case.source is not None:
            case.source, done = fit_picture(case.source, loaded.picture_size)
            if done:
                say(f"picture {case.id}: {done}")
    for caption in dict.fromkeys(case.caption for case in cases):
        if lost := loaded.lost_words(caption):
            end = lost if len(lost) <= 100 else f"{lost[:100]} ..."
            say(f"caption: the text window is full, so its end is cut off and does nothing: {end}")
    method = str(made.get("method", "sdedit"))
    task = make_task(
        "editing" if edit else "generation", loaded, cases, steps, method=method, plain=dials,
        sampler=sampler or "ddim", grid=grid or "trailing",
    )  # fmt: skip
    columns: dict[str, list[np.ndarray]] = {}
    if edit:
        columns["source"] = [case.source for case in cases if case.source is not None]
    for name, table in (("plain", None), ("scheduled", schedule)):
        if name == "plain" or schedule is not None:
            columns[name] = to_pictures(task.images(dials, table))
    if schedule is not None and schedule.steps is not None:
        teach(task, dials, course_by_rule(loaded, LONG, "dpmpp_2m", "trailing", task.reach(dials)))
        assert task.teacher is not None
        columns[f"plain, {LONG} calls"] = to_pictures(task.teacher)
    if all(case.truth is not None for case in cases):
        columns["truth"] = [case.truth for case in cases if case.truth is not None]
    return image_grid(columns, out, [c.caption for c in cases])
