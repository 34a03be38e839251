"""Black-box tuning with Optuna: ask and tell on a study in SQLite (or any Optuna storage URL).

A killed process leaves a trial in state RUNNING; the next tuner on the same study marks it failed and proposes the same
values again, so that every trial ends in the table once and ghosts do not bias the sampler.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from rwopt.errors import UserError
from rwopt.tuners import SAMPLERS, Candidate, Parameter, Trial


def choose_sampler(name: str, dimension: int, trials: int) -> str:
    """`auto`: Gaussian process up to 30 numbers and 250 trials, CMA-ES from 1000 trials, else TPE (Optuna's table)."""
    if name not in SAMPLERS:
        raise UserError(f"tuner.sampler={name} is unknown: one of {', '.join(SAMPLERS)}")
    if name != "auto":
        return name
    if dimension <= 30 and trials <= 250:
        return "gp"
    return "cmaes" if trials >= 1000 else "tpe"


def _sampler(name: str, seed: int, start: Mapping[str, float] | None) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8, deterministic_objective=False)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
        if name == "cmaes":
            if importlib.util.find_spec("cmaes") is None:
                raise UserError("tuner.sampler=cmaes needs the package cmaes: pip install cmaes, or tuner.sampler=tpe")
            return optuna.samplers.CmaEsSampler(seed=seed, x0=dict(start) if start else None)
        return optuna.samplers.RandomSampler(seed=seed)


class OptunaTuner:
    """One study. `starts` are named points to try first (clipped to the box); a study is resumed if it exists.

    Raises `UserError` if the stored study was made for another `fingerprint` (recipe, model, box).
    """

    def __init__(
        self,
        study: str,
        space: Sequence[Parameter],
        storage: str | optuna.storages.BaseStorage,
        trials: int,
        seed: int = 0,
        sampler: str = "auto",
        starts: Mapping[str, Mapping[str, float]] | None = None,
        fingerprint: str = "",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = list(space)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            p.name: FloatDistribution(p.low, p.high, log=p.log, step=p.step) for p in self.space
        }
        kind = choose_sampler(sampler, len(self.space), trials)
        points = {name: self._clip(values) for name, values in (starts or {}).items()}
        self.study = optuna.create_study(study_name=study, storage=storage, direction="maximize", load_if_exists=True)
        known = self.study.user_attrs.get("fingerprint")
        if known is None:
            self.study.set_user_attr("fingerprint", fingerprint)
        elif known != fingerprint:
            raise UserError(f"study {study} in {storage} belongs to another recipe: use a new run folder")
        self._open: dict[int, optuna.Trial] = {}
        told = self._recover()
        first = next(iter(points.values()), None)
        # a sampler's random state is not stored: a resumed run goes on from a seed of its own
        self.study.sampler = _sampler(kind, zlib.crc32(f"{seed}/{study}/{told}".encode()), first)
        for name, values in points.items():
            self.study.enqueue_trial(values, user_attrs={"origin": name}, skip_if_exists=True)

    def _clip(self, values: Mapping[str, float]) -> dict[str, float]:
        return {p.name: p.clip(values[p.name]) for p in self.space}

    def _recover(self) -> int:
        """Put what a killed process had in hand back into the queue; the number of trials that were ever started."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {t.user_attrs.get("retry_of") for t in trials}
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            # the values of a start are in `fixed_params` before the trial has them as parameters
            values = {**trial.params, **trial.system_attrs.get("fixed_params", {})}
            if values and trial.number not in retried:
                about = {"origin": trial.user_attrs.get("origin", "sampler"), "retry_of": trial.number}
                self.study.enqueue_trial(values, user_attrs=about)
            # told last: a kill in between loses no proposal, and `retry_of` keeps it from being queued twice
            self.study.tell(trial.number, state=TrialState.FAIL)
        return sum(t.state != TrialState.WAITING for t in trials)

    def propose(self) -> Candidate:
        trial = self.study.ask(self._distributions)
        self._open[trial.number] = trial
        return Candidate(trial.number, self._clip(trial.params), trial.user_attrs.get("origin", "sampler"))

    def observe(self, candidate: Candidate, score: float, calls: int = 0) -> None:
        """A score that is not finite fails the trial; it is never replaced by a made-up number."""
        trial = self._open.pop(candidate.number, None)
        if trial is not None and calls:
            trial.set_user_attr("calls", calls)
        if math.isfinite(score):
            self.study.tell(candidate.number, score)
        else:
            self.study.tell(candidate.number, state=TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """Scored trials in the order of their numbers."""
        return [
            Trial(
                Candidate(t.number, self._clip(t.params), t.user_attrs.get("origin", "sampler")),
                float(t.value),
                int(t.user_attrs.get("calls", 0)),
            )
            for t in self.study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
            if t.value is not None
        ]
