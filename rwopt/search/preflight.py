"""Before the first trial: what a search will do, what it takes, and what is missing.

Calls of the U-Net are counted in batches of `task.batch` pictures, as everywhere. Their time comes from two timed calls
on this machine, and so do not count what decoders and objectives take.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwopt.config import Settings
from rwopt.sampling.backprop import GradientPath, keeps_activations
from rwopt.sampling.denoise import predict
from rwopt.search.arms import ArmSpec
from rwopt.search.experiment import Experiment
from rwopt.tasks import Task
from rwopt.tasks.cases import SPLITS, notes
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

GIB = 2**30
DISK = 0.2 * GIB  # what a run folder may take, teachers aside


@dataclass
class Plan:
    """calls: U-Net calls by what they are for; seconds: of one call; lines: for people; missing: what stops a run."""

    calls: dict[str, int]
    seconds: float
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.calls.values())


def planned_calls(settings: Settings, arms: list[ArmSpec], sites: int, taught: bool, kept: bool) -> dict[str, int]:
    """About how many U-Net calls a whole run makes, {what for: calls}. kept: activations are, in a gradient.

    Probes are counted as ablation counts, N (1 + S) calls, and the published votes by their rounds and epochs.
    """
    task, tuner, n = settings.task, settings.tuner, settings.task.steps
    draws = task.draws

    def batches(cases: int, each: int = draws) -> int:
        return -(-cases * each // task.batch)

    train, validation, test = (batches(getattr(task, split)) for split in SPLITS)
    out = {"cases": n * (train + validation + test) if task.name == "generation" else 0}
    if taught:
        mine = settings.gradient.draws if settings.gradient.draws != draws else 0
        out["teacher"] = task.teacher.steps * (train + validation + test + (batches(task.train, mine) if mine else 0))
    chosen = tuner.top_k * validation * n
    solvers = len(settings.steps.samplers) * len(settings.steps.grids)
    gradient = settings.gradient
    path = GradientPath(gradient.mode, gradient.last, gradient.stride)
    update = path.price(n, kept=kept) * gradient.batch * gradient.accumulate / task.batch
    for spec in arms:
        evaluations = spec.evaluations(tuner)
        if spec.solver:
            calls = solvers * validation * n + (4 * n * n + n) * test  # N + 1 to 3 N plain calls: what a gain is worth
        elif spec.learned:
            starts = 1 if settings.probe.start == "none" or not spec.weights else 2
            rounds = max(0, tuner.trials - starts) if tuner.name in ("auto", "gradient") else 0
            calls = evaluations * train * n + round(rounds * gradient.updates * update) + chosen
        elif spec.budget == "none":
            calls = validation * n
        else:
            calls = evaluations * train * n + chosen
        out[spec.name] = calls + test * n
    shown = batches(min(8, task.test))  # the picture grid
    out["pictures"] = shown * (n * (len(arms) + 1) + task.teacher.steps * taught)
    out["dials"] = tuner.dial_trials * train * n
    out["probes"] = n * (1 + sites)
    if any(spec.published for spec in arms):
        out["probes"] += 2 * n * settings.analytic.rounds * settings.analytic.epochs
    return {name: calls for name, calls in out.items() if calls}


def timed_call(experiment: Experiment, task: Task) -> float:
    """Seconds of a U-Net call with a batch of the task's pictures, the second of two."""
    seconds = 0.0
    with Attachment(experiment.model.unet, ()) as hooks, torch.no_grad():
        x, cond, course = task.inputs(hooks, experiment.base, slice(0, task.batch))
        for _ in range(2):
            _wait(x.device)
            start = time.perf_counter()
            predict(experiment.model, hooks, x, course.told[0], cond)
            _wait(x.device)
            seconds = time.perf_counter() - start
        return seconds * task.batch / len(x)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def preflight(experiment: Experiment, arms: list[ArmSpec], folder: Path) -> Plan:
    """The plan of a search. Makes a few U-Net calls, of one batch; loads the cases."""
    settings, model = experiment.settings, experiment.model
    before = model.calls
    sites = list_sites(model.unet, settings.weights.kinds)
    task = experiment.splits.prepare(experiment.splits.cases("validation")[: settings.task.batch], taught=False)
    with Attachment(model.unet, [s.id for s in sites], settings.weights.mode) as hooks:
        x, cond, course = task.inputs(hooks, experiment.base, slice(0, settings.gradient.batch))
        kept = keeps_activations(model, hooks, x, cond, len(course))
    calls = planned_calls(settings, arms, len(sites), experiment.splits.taught, kept)
    plan = Plan(calls, timed_call(experiment, task))
    model.calls = before
    height, width = model.picture_size
    every = [case for split in SPLITS for case in experiment.splits.cases(split)]
    cases = ", ".join(f"{getattr(settings.task, split)} {split}" for split in SPLITS)
    plan.lines = [
        f"model: {model.name} ({type(model.unet).__name__}, {width} x {height} pixels, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device})",
        f"sites: {len(sites)} ({', '.join(settings.weights.kinds)})",
        f"cases: {cases} of {settings.task.cases}; {settings.task.steps} calls of {settings.task.sampler}, "
        f"{settings.task.grid}",
        *(f"pictures: {note}" for note in notes(every)),
        f"arms: {', '.join(spec.name for spec in arms)}",
        f"U-Net calls of {settings.task.batch} pictures: about {plan.total:,} ({_shares(calls)})",
        f"time: about {duration(plan.total * plan.seconds)} at {plan.seconds:.3g} s a call, decoders, objectives aside",
    ]
    plan.lines += _memory(experiment, kept)
    place = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    plan.lines.append(f"disk: {free / GIB:.1f} GiB free at {folder}")
    if free < DISK:
        plan.missing.append(f"{folder}: {free / GIB:.2f} GiB of disk are free, a run takes {DISK / GIB:.1f}: make room")
    return plan


def _memory(experiment: Experiment, kept: bool) -> list[str]:
    model = experiment.model
    weights = sum(
        p.numel() * p.element_size() for net in (model.unet, model.vae) for p in net.parameters()
    )  # fmt: skip
    how = "are kept" if kept else "are made twice"
    line = f"memory: U-Net and VAE {weights / GIB:.2f} GiB; activations of a gradient {how}"
    if model.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(model.device)
        line += f"; {free / GIB:.1f} of {whole / GIB:.1f} GiB are free on the card"
    return [line]


def _shares(calls: Mapping[str, int]) -> str:
    most = sorted(calls.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {count:,}" for name, count in most) + (", ..." if len(calls) > 4 else "")


def duration(seconds: float) -> str:
    """"45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
