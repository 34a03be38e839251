"""Schedules side by side: files compared on a recipe's test cases, and single pictures with and without a schedule."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.arms import Arm, Workshop
from rwopt.config import Settings
from rwopt.evaluation import compare, score
from rwopt.models import load_model
from rwopt.progress import Silent
from rwopt.report import Report, image_grid
from rwopt.results import Arm as Row
from rwopt.schedule import Schedule
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import Case
from rwopt.verdict import report_metrics


def own_dials(schedule: Schedule | None, guidance: float, strength: float) -> Dials:
    """The dials a schedule was calibrated with, else the given ones."""
    made: Mapping[str, Any] = {} if schedule is None else schedule.calibrated
    return Dials(float(made.get("guidance_scale", guidance)), float(made.get("strength", strength)))


def compare_schedules(settings: Settings, schedules: Mapping[str, Schedule], split: str) -> Report:
    """Each schedule at its own calibrated dials, the plain model at the recipe's, on one split, paired to the first."""
    model = load_model(settings.model.name, settings.model.device, settings.model.dtype)
    shop = Workshop(settings, Path(), model, Silent())
    columns = report_metrics(settings)
    arms = [Arm("plain", shop.base)]
    for name, schedule in schedules.items():
        dials = own_dials(schedule, shop.base.guidance, shop.base.strength)
        arms.append(Arm(name, dials, schedule, calls=int(schedule.provenance.get("calls", 0))))
    task = shop.task(split)
    scores = {
        a.name: score(task, task.images(a.dials, a.schedule), shop.composites, list(settings.objective.report))
        for a in arms
    }
    first = next(iter(schedules))
    paired = [
        compare([scores[first]], [scores[other]], m.name, (first, other), m.optimised, split, m.higher_is_better)
        for other in scores
        if other != first
        for m in columns
    ]
    return Report(
        title="rwopt compare", recipe="", task=task.name, metrics=columns,
        arms=[Row(a.name, scores[a.name].means(), a.calls) for a in arms],
        paired=paired, split=split, cases=len(set(task.owner.tolist())), settings=asdict(settings),
    )  # fmt: skip


def pictures(args: Namespace, case: Case | None) -> Path:
    """The pictures of `rwopt sample` (case None) or `rwopt edit`, plain and scheduled side by side in one PNG."""
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    model = load_model(args.model)
    dials = own_dials(schedule, 4.0, 0.7)
    strength = getattr(args, "strength", None)
    dials = Dials(
        dials.guidance if args.guidance is None else args.guidance,
        1.0 if case is None else dials.strength if strength is None else strength,
    )
    made: Mapping[str, Any] = {} if schedule is None else schedule.calibrated
    steps = int(made.get("num_inference_steps", 20)) if args.steps is None else args.steps
    if case is None:
        cases = [Case(f"sample-{args.seed}-{i}", args.caption) for i in range(4)]
    else:
        if args.seed:  # the start noise is a function of the id; seed 0 is the one that searches use
            case = replace(case, id=f"{case.id}/{args.seed}")
        cases = [case]
        assert case.source is not None
        size = model.latent_shape[1] * 2 ** (len(model.vae.config.block_out_channels) - 1)
        if case.source.shape[:2] != (size, size):
            from PIL import Image

            case.source = np.asarray(Image.fromarray(case.source).resize((size, size), Image.Resampling.LANCZOS))
    method = str(made.get("method", "sdedit"))
    task = make_task("editing" if case else "generation", model, cases, steps, method=method, plain=dials)
    columns: dict[str, list[np.ndarray]] = {}
    if case is not None and case.source is not None:
        columns["source"] = [case.source]
    for name, table in (("plain", None), ("scheduled", schedule)):
        if name == "plain" or schedule is not None:
            images = task.images(dials, table)
            columns[name] = list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    if case is not None and case.truth is not None:
        columns["truth"] = [case.truth]
    return image_grid(columns, args.out, [c.caption for c in cases])

