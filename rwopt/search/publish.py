"""What a finished search leaves behind: the schedule file's notes, the report, its pictures, records of the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwopt.objectives import objective_spec
from rwopt.probes import Importance
from rwopt.report import (
    Report,
    image_grid,
    importance_heatmap,
    schedule_heatmap,
    search_history,
    write_html,
)
from rwopt.results import ArmMeans
from rwopt.schedule import Schedule, noise_block
from rwopt.schedule.samplers import SAMPLERS
from rwopt.search.arms import LEARNED, Arm
from rwopt.search.evaluation import Scores, compare
from rwopt.search.experiment import Experiment
from rwopt.search.guard import sentence
from rwopt.search.identity import version, versions
from rwopt.search.space import dial_box
from rwopt.search.tuning import ArmTuner
from rwopt.search.verdict import report_metrics, shares, verdict
from rwopt.tasks.pictures import to_pictures
from rwopt.tracking import FanOut

SHOWN = ("plain", "best solver", "best guidance", "analytic", "sampler dials", LEARNED)
"""The arms whose pictures stand side by side."""


def describe(experiment: Experiment, arm: Arm, command: str) -> Schedule:
    """The arm's schedule with everything that another machine must know."""
    assert arm.schedule is not None
    settings, model = experiment.settings, experiment.model
    task, edit = settings.task, settings.task.name == "editing"
    references = experiment.splits.task("train").references
    assert references is not None
    return replace(
        arm.schedule,
        model=model.card(),
        noise=noise_block(model.scheduler),
        calibrated={
            "task": task.name,
            **({"method": task.method} if edit else {}),
            "num_inference_steps": task.steps,
            "scheduler": scheduler_of(task.sampler, task.grid),
            "guidance_scale": arm.dials.guidance,
            **({"strength": arm.dials.strength} if task.has_strength else {}),
            **({"image_guidance_scale": arm.dials.image_guidance} if task.kind == "instruct" else {}),
            "resolution": [int(n) for n in references.shape[-2:]],
        },
        provenance={
            "rwopt": version("rwopt"),
            "command": command,
            "objective": dict(settings.objective.terms),
            "seed": settings.tuner.seed,
            "evaluations": arm.evaluations,
            "calls": arm.calls,
            "validation": arm.validation,
            **({"choice": arm.choice} if arm.choice else {}),
        },
    )


def scheduler_of(sampler: str, grid: str) -> dict[str, Any]:
    """The stock diffusers scheduler that a sampler equals, and its grid."""
    known = SAMPLERS[sampler]
    spacing = {"timestep_spacing": grid} if grid in ("trailing", "leading", "linspace") else {"grid": grid}
    return {"_class_name": known.scheduler, **known.options, **spacing}


def picture_grid(experiment: Experiment, arms: Mapping[str, Arm], path: Path, rows: int = 8) -> None:
    """Cases of the test split: source, what of plain, best guidance, analytic, learned there is, truth."""
    settings, splits = experiment.settings, experiment.splits
    edit = settings.task.name == "editing"
    cases = splits.cases("test")
    chosen = cases[:: max(1, len(cases) // rows)]
    if edit:  # one of each kind of edit first
        first = {c.kind: c for c in reversed(cases)}
        chosen = [*first.values(), *(c for c in chosen if c not in first.values())]
    chosen = chosen[:rows]
    task = splits.prepare(chosen)

    def pictures(images: torch.Tensor) -> list[np.ndarray]:
        return to_pictures(images[:: settings.task.draws])

    columns: dict[str, list[np.ndarray]] = {}
    if edit and task.references is not None:
        columns["source"] = pictures(task.references)
    for name in SHOWN:
        if name in arms:
            columns[name] = pictures(task.images(arms[name].dials, arms[name].schedule))
    about = task.describe(torch.zeros(len(task), 3, 1, 1))
    for name, images in (("teacher", about.teacher), ("truth", about.truth)):
        if images is not None:
            columns[name] = pictures(images)
    captions = [", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in c.change.items()) or c.caption for c in chosen]
    image_grid(columns, path, captions)


def _set_line(name: str, arms: Mapping[str, Mapping[str, float]]) -> str:
    spec = objective_spec(name)
    told = []
    for arm, x in arms.items():
        p = "" if np.isnan(x["p"]) else f", p {x['p']:.2g}"
        told.append(f"{arm} {x['value']:.4g} (sd {x['sd']:.2g}{p})")
    count = int(next(iter(arms.values()))["n"])
    direction = "higher" if spec.higher_is_better else "lower"
    return f"{name} of {count} test pictures ({direction} is better): {', '.join(told)}."


class Publisher:
    """Reports the arms of one run into its folder."""

    def __init__(self, experiment: Experiment, tuner: ArmTuner, folder: Path) -> None:
        self.experiment, self.tuner, self.folder = experiment, tuner, folder
        self.settings = experiment.settings

    def report(self, arms: Sequence[Arm], command: str) -> Report:
        """The one look at the test cases."""
        settings = self.settings
        words = [word.removeprefix("recipe=") for word in shlex.split(command) if word.startswith("recipe=")]
        recipe = Path(words[-1]).stem if words else "own"
        columns = report_metrics(settings)
        names = list(settings.objective.report)
        scores = {arm.name: self.tuner.test(arm, names) for arm in arms}
        pairs = [(LEARNED, other) for other in scores if other != LEARNED]
        if {"constant", "best guidance"} <= scores.keys():
            pairs.append(("constant", "best guidance"))
        paired = [
            compare([scores[a]], [scores[b]], m.name, (a, b), m.optimised, "test", m.higher_is_better)
            for a, b in pairs
            for m in columns
        ]
        return Report(
            title=f"rwopt search: {recipe}",
            recipe=recipe,
            task=settings.task.name,
            metrics=columns,
            arms=[ArmMeans(a.name, scores[a.name].means(), a.calls, f"{a.note}; {self._dials(a)}") for a in arms],
            paired=paired,
            split="test",
            cases=settings.task.test,
            settings=asdict(settings),
            versions=versions(),
            command=command,
            verdict=[*verdict(paired), *self._guarded(arms), *self._shares(scores), *self._sets(arms)],
        )

    def _guarded(self, arms: Sequence[Arm]) -> list[str]:
        """What became of the guard: of the learned arm, and of all others that broke it or were stopped."""
        weights = self.tuner.kept(f"{LEARNED} weights")  # the first half of the learned arm
        lines = []
        for arm in [*arms, *([weights] if weights else [])]:
            about = arm.choice.get("guard")
            if about and (arm.name == LEARNED or about["stopped"] or not about["kept"]):
                lines.append(sentence(arm.name, about))
        return lines

    def _shares(self, scores: Mapping[str, Scores]) -> list[str]:
        """Which metrics do not have a score for every picture."""
        metrics = self.settings.objective.report
        return shares({name: {arm: found.valid(name) for arm, found in scores.items()} for name in metrics})

    def _sets(self, arms: Sequence[Arm]) -> list[str]:
        """What the set objectives say, a sentence each."""
        names = self.settings.objective.sets
        found = {arm.name: self.tuner.sets(arm, names) for arm in arms} if names else {}
        return [_set_line(name, {arm: values[name] for arm, values in found.items()}) for name in names]

    def _dials(self, arm: Arm) -> str:
        names = [p.name for p in dial_box(self.settings.task, self.settings.dials)]
        return ", ".join(f"{n} {arm.dials.to_dict()[n]:g}" for n in names)

    def publish(
        self, report: Report, arms: Sequence[Arm], schedule: Schedule, importance: Importance, tracker: FanOut
    ) -> None:
        """Pictures, the page, and what trackers keep."""
        folder = self.folder
        schedule_heatmap(schedule, folder / "schedule.png")
        importance_heatmap(importance, folder / "probe.png")
        weights = self.tuner.kept(f"{LEARNED} weights") or self.tuner.kept(LEARNED)
        assert weights is not None  # the learned arm was made of it
        history = weights.history
        marks = {origin: i for i, (origin, _) in enumerate(history) if origin in ("plain", "probe")}
        search_history([value for _, value in history], folder / "history.png", starts=marks)
        if not (folder / "grid.png").exists():
            picture_grid(self.experiment, {a.name: a for a in arms}, folder / "grid.png")
        write_html(report, folder)
        for name in ("schedule", "probe", "history", "grid"):
            tracker.image(name, folder / f"{name}.png")
        tracker.artifact(folder / "schedule.json", "schedule", "schedule", dict(schedule.calibrated))
        tracker.summary({f"{row.name}/{k}": v for row in report.arms for k, v in row.means.items()})
