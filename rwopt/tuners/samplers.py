"""Which Optuna sampler proposes: by name, or `auto` by the number of weights, trials and objectives."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Mapping

import optuna

from rwopt.errors import UserError
from rwopt.tuners import SAMPLERS

STARTUP = 8  # random trials before a model is fitted


def choose_sampler(name: str, dimension: int, trials: int, objectives: int = 1, limited: bool = False) -> str:
    """The sampler meant by `name`; for `auto` by Optuna's table of budgets:

    Gaussian process up to 30 numbers, 250 trials and 3 objectives; from 1000 trials CMA-ES, or for several objectives
    NSGA-II (more than 3: NSGA-III); else, and with limits, which slow evolution down, TPE.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, 1, 0)[0]
        raise UserError(f"tuner.sampler={name}: did you mean {near}? (one of {', '.join(SAMPLERS)})")
    if name == "cmaes" and objectives > 1:
        raise UserError(f"tuner.sampler=cmaes takes one objective, not {objectives}: use gp, tpe, nsga2 or nsga3")
    if name != "auto":
        return name
    if dimension <= 30 and trials <= 250 and objectives <= 3:
        return "gp"
    if trials < 1000 or limited:
        return "tpe"
    return "cmaes" if objectives == 1 else "nsga2" if objectives <= 3 else "nsga3"


def make_sampler(
    name: str, seed: int, trials: int, start: Mapping[str, float] | None = None
) -> optuna.samplers.BaseSampler:
    """A chosen sampler (not `auto`). `start`: CMA-ES's first mean, since it does not look at queued trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, deterministic_objective=False)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        if name == "cmaes":
            if importlib.util.find_spec("cmaes") is None:
                raise UserError("tuner.sampler=cmaes needs the package cmaes: pip install cmaes, or tuner.sampler=tpe")
            return optuna.samplers.CmaEsSampler(seed=seed, x0=dict(start) if start else None)
        population = max(STARTUP, min(50, trials // 5))  # 50, Optuna's own, leaves small budgets without a generation
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        if name == "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=population)
        return optuna.samplers.RandomSampler(seed=seed)
