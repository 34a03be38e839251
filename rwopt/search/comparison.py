"""Schedules side by side: files compared on a recipe's test cases, and single pictures with and without a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.config import Settings
from rwopt.models import load_model
from rwopt.report import Report, image_grid
from rwopt.results import ArmMeans
from rwopt.schedule import Schedule
from rwopt.search.arms import Arm
from rwopt.search.evaluation import compare
from rwopt.search.experiment import Experiment
from rwopt.search.verdict import report_metrics
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import Case, fit_picture


def own_dials(schedule: Schedule | None, guidance: float, strength: float) -> Dials:
    """The dials a schedule was calibrated with, else the given ones."""
    made: Mapping[str, Any] = {} if schedule is None else schedule.calibrated
    return Dials(float(made.get("guidance_scale", guidance)), float(made.get("strength", strength)))


def compare_schedules(settings: Settings, schedules: Mapping[str, Schedule], split: str) -> Report:
    """Each schedule at its own calibrated dials, the plain model at the recipe's, on one split, paired to the first."""
    model = load_model(**asdict(settings.model))
    experiment = Experiment(settings, model)
    columns = report_metrics(settings)
    arms = [Arm("plain", experiment.base)]
    for name, schedule in schedules.items():
        dials = own_dials(schedule, experiment.base.guidance, experiment.base.strength)
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


def pictures(
    cases: Sequence[Case],
    out: Path,
    schedule: Schedule | None = None,
    model: str = "avatars",
    steps: int | None = None,
    guidance: float | None = None,
    strength: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Pictures of the cases, plain and scheduled side by side in one file; edits if the cases have source pictures.

    steps, guidance, strength: None for what the schedule was calibrated with. say: takes a line for each thing that was
    changed on the way: a picture cut to the model's size, the end of a caption that is lost.
    """
    loaded = load_model(model)
    edit = cases[0].source is not None
    own = own_dials(schedule, 4.0, 0.7)
    given = own.strength if strength is None else strength
    dials = Dials(own.guidance if guidance is None else guidance, given if edit else 1.0)
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
    task = make_task("editing" if edit else "generation", loaded, cases, steps, method=method, plain=dials)
    columns: dict[str, list[np.ndarray]] = {}
    if edit:
        columns["source"] = [case.source for case in cases if case.source is not None]
    for name, table in (("plain", None), ("scheduled", schedule)):
        if name == "plain" or schedule is not None:
            images = task.images(dials, table)
            columns[name] = list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    if all(case.truth is not None for case in cases):
        columns["truth"] = [case.truth for case in cases if case.truth is not None]
    return image_grid(columns, out, [c.caption for c in cases])
