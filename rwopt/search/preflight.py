"""Before the first trial: what a search will do, what it takes, and what is missing.

Calls of the U-Net are counted in batches of `task.batch` pictures, as everywhere. Time and memory are those of a call
and of a decoded batch that are made here, on this machine; what a gradient takes beyond them is counted on fake tensors
(`rwopt.sampling.memory`). What objectives take is left out. `benchmarks/preflight.py` holds them against a whole run.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from rwopt.config import Settings
from rwopt.errors import UserError
from rwopt.models.memory import most_memory
from rwopt.objectives import make_set, objective_spec
from rwopt.objectives.judges import panel
from rwopt.objectives.weights import in_bytes
from rwopt.sampling.backprop import GradientPath, keeps_activations
from rwopt.sampling.denoise import Condition, predict
from rwopt.sampling.memory import update_memory
from rwopt.search.arms import ArmSpec, dials_alone
from rwopt.search.experiment import Experiment
from rwopt.tasks import Task
from rwopt.tasks.cases import SPLITS, notes
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

GIB = 2**30
SMALL = 50_000_000  # parameters of a U-Net below which the activations of an update are not counted
DISK = 0.2 * GIB  # what a run folder may take, teachers aside


@dataclass
class Plan:
    """calls: U-Net calls by what they are for; seconds: of one; lines: for people; missing: what stops a run; decodes,
    decode: batches of pictures that are decoded, and seconds of one; memory: bytes at the peak, 0 if unknown."""

    calls: dict[str, int]
    seconds: float
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    decodes: float = 0.0
    decode: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    @property
    def time(self) -> float:
        """Seconds of all calls and decoded batches."""
        return self.total * self.seconds + self.decodes * self.decode

    def check(self) -> None:
        """Raise `UserError` with the first thing that is missing."""
        if self.missing:
            more = f" (and {len(self.missing) - 1} more missing)" if len(self.missing) > 1 else ""
            raise UserError(self.missing[0] + more)


def rewards(experiment: Experiment) -> tuple[list[str], list[str]]:
    """Lines that name every objective in use with its licence, its weights and their size, those of the same weights in
    one; and lines of what is missing: networks and packages, and what the cases do not give. Loads the networks."""
    options, groups = experiment.objectives.options, dict[str, list[str]]()
    missing = experiment.objectives.missing(experiment.specs)
    specs = {name: experiment.objectives.spec(name) for name in experiment.specs}  # of those made: with their options
    specs |= {name: objective_spec(name) for name in experiment.settings.objective.sets}
    for name, spec in specs.items():
        given = ", ".join(f"{key}={value}" for key, value in options.get(name, {}).items())
        about = [spec.licence, f"{spec.weights}, {in_bytes(spec.size)}" if spec.weights else "no weights"]
        groups.setdefault("; ".join([*about, *([given] if given else [])]), []).append(name)
    lines = [f"rewards: {', '.join(names)}: {about}" for about, names in groups.items()]
    test = experiment.settings.task.test * experiment.settings.task.draws
    for name in experiment.settings.objective.sets:
        try:
            least = make_set(name, **experiment.objectives.given(name)).least
            if test < least:
                missing[name] = f"objective.sets: {name} says nothing of {test} test pictures: give task.test={least}"
        except UserError as error:
            missing[name] = str(error)
    lacking = [line for split in SPLITS for line in experiment.splits.lacking(split)]
    asked = {spec.judges for spec in specs.values() if spec.judges and "target" in spec.needs}
    for model, split in product(sorted(asked), SPLITS) if not lacking else ():
        try:
            panel("judge", model).wanted([case.target for case in experiment.splits.cases(split)])
        except UserError as error:
            what = f"task.cases={experiment.settings.task.cases} ({split}) are not for the judges of {model}"
            lacking.append(f"{what}: {error}")
    return lines, [*missing.values(), *dict.fromkeys(lacking)]


def planned_calls(
    settings: Settings, arms: list[ArmSpec], sites: int, taught: bool, kept: bool, calibrated: bool = False,
    search: int = 0,
) -> dict[str, int]:  # fmt: skip
    """About how many U-Net calls a whole run makes, {what for: calls}. kept: activations are, in a gradient; search:
    calls that finding a plan of actions takes.

    Probes are counted as ablation counts, N (1 + S) calls, and the published votes by their rounds and epochs. What
    runs under a budget counts as the full calls that it pays.
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
    solvers = len(settings.steps.samplers) * len(settings.steps.grids)
    gradient = settings.gradient
    path = GradientPath(gradient.mode, gradient.last, gradient.stride)
    update = path.price(task.affordable, kept=kept) * gradient.batch * gradient.accumulate / task.batch
    for spec in arms:
        own = task.affordable if spec.solver or spec.learned or spec.planned else n
        evaluations, chosen = spec.evaluations(tuner), tuner.top_k * validation * own
        if spec.solver:
            calls = solvers * validation * own + (4 * own * own + own) * test  # worth: N + 1 to 3 N plain calls
        elif spec.planned:
            calls = search
        elif spec.learned:
            first = dials_alone(spec, arms, settings.steps.learn)
            probed = spec.weights and settings.probe.start not in ("none", "dials")
            starts = 1 + (probed or (settings.probe.start == "dials" and first is not None))
            rounds = max(0, tuner.trials - starts) if tuner.name in ("auto", "gradient") else 0
            calls = evaluations * train * own + round(rounds * gradient.updates * update) + chosen
        elif spec.budget == "none":
            calls = validation * own
        else:
            calls = evaluations * train * own + chosen
        out[spec.name] = calls + test * own
    if search and not any(spec.planned for spec in arms):
        out["plan"] = search
    shown = batches(min(8, task.test))  # the picture grid
    out["pictures"] = shown * (n * (len(arms) + 1) + task.teacher.steps * taught)
    out["dials"] = tuner.dial_trials * train * n
    out["probes"] = n * (1 + sites)
    if settings.tuner.guard:
        looks = sum(1 + (spec.learned or spec.budget != "none") for spec in arms)
        out["guard"] = looks * validation * n  # at least; one more for each trial that is the best so far
    if calibrated:
        out["calibration"] = train * n
    if settings.objective.sets:
        out["sets"] = len(arms) * test * n
    if any(spec.published for spec in arms):
        out["probes"] += 2 * n * settings.analytic.rounds * settings.analytic.epochs
    return {name: calls for name, calls in out.items() if calls}


def planned_decodes(settings: Settings, calls: Mapping[str, int]) -> float:
    """About how many batches of pictures the calls of a plan end in. Probes end in none; a gradient runs the decoder as
    often as it runs each call."""
    steps = {"teacher": settings.task.teacher.steps, "probes": math.inf}
    return sum(count / steps.get(name, settings.task.steps) for name, count in calls.items())


def timed_decode(task: Task) -> float:
    """Seconds of decoding a batch of the task's pictures: the second time, unless the first was long."""
    latents, seconds = task.noise[: task.batch], math.inf
    for _ in range(2):
        _wait(latents.device)
        start = time.perf_counter()
        task.decoded(latents)
        _wait(latents.device)
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > 2:
            break
    return seconds * task.batch / len(latents)


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


def preflight(experiment: Experiment, arms: list[ArmSpec], folder: Path, search: int = 0) -> Plan:
    """The plan of a search. Makes a few U-Net calls, of one batch; loads the cases. search: see `planned_calls`."""
    settings, model = experiment.settings, experiment.model
    told, missing = rewards(experiment)
    if missing:
        return Plan({}, 0.0, [*told, *(f"missing: {line}" for line in missing)], missing)
    before = model.calls
    sites = list_sites(model.unet, settings.weights.kinds)
    task = experiment.splits.prepare(experiment.splits.cases("validation")[: settings.task.batch], taught=False)
    with Attachment(model.unet, [s.id for s in sites], settings.weights.mode) as hooks:
        x, cond, course = task.inputs(hooks, experiment.base, slice(0, settings.gradient.batch))
        kept = keeps_activations(model, hooks, x, cond, len(course))
    loaded = most_memory(model.device)
    calls = planned_calls(settings, arms, len(sites), experiment.splits.taught, kept, experiment.calibrated, search)
    plan = Plan(calls, timed_call(experiment, task))
    plan.decodes, plan.decode = planned_decodes(settings, calls), timed_decode(task)
    model.calls = before
    plan.memory = max(most_memory(model.device), loaded + _update_bytes(experiment, arms, hooks, x, cond, kept))
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
        *told,
        f"arms: {', '.join(spec.name for spec in arms)}",
        f"U-Net calls of {settings.task.batch} pictures: about {plan.total:,} ({_shares(calls)})",
        f"time: about {duration(plan.time)} at {plan.seconds:.3g} s a call and {plan.decode:.3g} s for decoding "
        f"{settings.task.batch} pictures, objectives aside",
    ]
    plan.lines += _memory(experiment, kept, plan.memory)
    place = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    plan.lines.append(f"disk: {free / GIB:.1f} GiB free at {folder}")
    if free < DISK:
        plan.missing.append(f"{folder}: {free / GIB:.2f} GiB of disk are free, a run takes {DISK / GIB:.1f}: make room")
    return plan


def _update_bytes(
    experiment: Experiment, arms: Sequence[ArmSpec], hooks: Attachment, x: Tensor, cond: Condition, kept: bool
) -> float:
    """What an update of a gradient takes beside the networks; 0 where there is none, and for small networks, whose
    activations do not matter beside the libraries. `x`, `cond`: of such an update's pictures."""
    settings, model, gradient = experiment.settings, experiment.model, experiment.settings.gradient
    wanted = settings.tuner.name == "gradient" or (settings.tuner.name == "auto" and experiment.differentiable)
    small = sum(p.numel() for p in model.unet.parameters()) < SMALL
    if small or not wanted or not any(spec.learned for spec in arms):
        return 0.0
    path = GradientPath(gradient.mode, gradient.last, gradient.stride)
    tokens, guided = cond.positive.shape[1], cond.negative is not None
    found = update_memory(model, hooks.sites, gradient.batch, path, 1, tokens, guided)
    more = 0.0
    if kept:  # of all calls, and the decoder's backward pass ends before theirs begins
        each = model.row_bytes(hooks.sites, hooks.mode, x.shape[1:], cond.positive.shape[1:])
        more = (settings.task.steps - 1) * gradient.batch * cond.each * each
    return found.peak - found.weights + more


def _memory(experiment: Experiment, kept: bool, most: float) -> list[str]:
    model = experiment.model
    weights = sum(
        p.numel() * p.element_size() for net in (model.unet, model.vae) for p in net.parameters()
    )  # fmt: skip
    how = "are kept" if kept else "are made twice"
    line = f"memory: about {most / GIB:.1f} GiB at the peak; U-Net and VAE {weights / GIB:.2f} GiB; activations of a "
    line += f"gradient {how}"
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
