"""The probes of a run, each made once and kept in its folder, and the starts that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwopt.probes import Importance, make_probe
from rwopt.schedule import Schedule
from rwopt.schedule.weights import WeightFunction
from rwopt.search import starts
from rwopt.search.baselines import PUBLISHED
from rwopt.search.experiment import Experiment
from rwopt.tasks.reward import task_reward
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

FILES = {"voting": "votes.json", "gradient_norm": "gradient_norms.json"}
"""Where the probes behind the published schedules are kept."""


class Probing:
    """Runs probes on an experiment's first train cases, at the recipe's own dials."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.settings = experiment.settings

    def probe(self, name: str, file: str, ids: Sequence[str], cases: int, mode: str, **options: object) -> Importance:
        """What a probe finds at some sites on the first `cases` train cases; from `file` if it is there."""
        path = self.folder / file
        if path.exists():
            return Importance.load(path)
        experiment = self.experiment
        task = experiment.splits.task("train")
        cases = min(cases, len(task))
        if name == "reward_gradient":
            options = {"reward": task_reward(task, experiment.objective, slice(0, cases)), **options}
        probe = make_probe(name, **options)
        with Attachment(experiment.model.unet, ids, mode) as attachment:
            x, cond, course = task.inputs(attachment, experiment.base, slice(0, cases))
            importance = probe(experiment.model, attachment, x, cond, course)
        importance.save(path)
        return importance

    def importance(self) -> Importance:
        """The recipe's probe, at the sites where the weights will act."""
        wanted = self.settings.probe
        ids = [s.id for s in list_sites(self.experiment.model.unet, self.settings.weights.kinds)]
        mode = make_probe(wanted.name, **wanted.options).mode
        return self.probe(wanted.name, "importance.json", ids, wanted.cases, mode, **wanted.options)

    def start(self, function: WeightFunction, how: str = "") -> tuple[np.ndarray, int]:
        """Theta [d] where the search for weights begins (how: default `probe.start`), and its probes' U-Net calls."""
        wanted = self.settings.probe
        how = how or wanted.start
        if how == "auto":
            how = "gauss_newton" if self.experiment.differentiable else "scores"
        if how == "scores":
            importance = self.importance()
            return starts.analytic(function, importance, wanted.low, wanted.high), importance.calls
        slope = self.probe("reward_gradient", "slope.json", function.sites, wanted.cases, function.mode)
        if how == "gradient":
            return starts.gradient_step(function, slope, wanted.trust), slope.calls
        gram = self.probe("gram", "gram.json", function.sites, wanted.cases, function.mode)
        return starts.gauss_newton(function, slope, gram, wanted.trust), slope.calls + gram.calls

    def published(self, form: str) -> tuple[Schedule, int]:
        """A published schedule (or control) of `baselines.PUBLISHED` at this task's noise levels; its U-Net calls."""
        wanted = self.settings.analytic
        sites = list_sites(self.experiment.model.unet)
        ids = [s.id for s in sites]
        name, make = PUBLISHED[form]
        if name == "voting":
            options: dict[str, object] = {"rounds": wanted.rounds, "epochs": wanted.epochs, "teacher": "cached"}
            importance = self.probe(name, FILES[name], ids, wanted.cases, "output", **options)
        else:
            importance = self.probe(name, FILES[name], ids, min(4, wanted.cases), "output")
        return make(importance, sites, wanted.low, wanted.high), importance.calls
