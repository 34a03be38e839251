"""Black-box tuning with Optuna: a study in memory, in a file, or in a storage that several processes share.

A killed process leaves a trial in state RUNNING. A tuner that has its study alone takes up whatever runs when it opens
it; tuners that share a study go by leases (`rwopt.tuners.leases`). Either way the trial is marked failed and its values
are proposed again, so that every trial ends in the table once and ghosts do not bias the sampler.
"""

from __future__ import annotations

import math
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from rwopt.errors import UserError
from rwopt.tuners import Candidate, Parameter, Trial
from rwopt.tuners.leases import Heart, Ledger, Reaper, new_lease, values_of
from rwopt.tuners.samplers import choose_sampler, make_sampler
from rwopt.tuners.storage import open_storage

__all__ = ["OptunaTuner", "Sharing", "choose_sampler"]
LOOKS = 8  # cases that must be there before a candidate can be stopped


@dataclass(frozen=True)
class Sharing:
    """How tuners of one study know of each other: seconds between signs of life, and until one counts as gone."""

    heartbeat: float = 10
    grace: float = 60


class OptunaTuner:
    """One study. `starts` are named points to try first (clipped to the box); a study is resumed if it exists.

    objectives: their names; several make a Pareto study. limited: candidates come with `excess`. prune: p-value below
    which a candidate that loses to the best one, case by case, is stopped (0: never; one objective only).
    sharing: other processes work on the study too, `trials` are what all of them make; `about`: what else those
    should know. Raises `UserError` if the stored study was made for another `fingerprint` (recipe, model, box).
    """

    def __init__(
        self,
        study: str,
        space: Sequence[Parameter],
        storage: str | BaseStorage,
        trials: int,
        seed: int = 0,
        sampler: str = "auto",
        starts: Mapping[str, Mapping[str, float]] | None = None,
        fingerprint: str = "",
        objectives: Sequence[str] = ("objective",),
        limited: bool = False,
        prune: float = 0.0,
        sharing: Sharing | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.sharing, self.several = list(space), sharing, len(objectives) > 1
        kind = choose_sampler(sampler, len(self.space), trials, len(objectives), limited)
        if prune and self.several:
            raise UserError(f"tuner.prune={prune:g} compares by one objective, not {len(objectives)}: set it to 0")
        points = {name: self._clip(values) for name, values in (starts or {}).items()}
        first = next(iter(points.values()), None)
        self.storage = _store(storage, sharing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            pruner = (
                optuna.pruners.WilcoxonPruner(p_threshold=prune, n_startup_steps=LOOKS)
                if prune
                else optuna.pruners.NopPruner()
            )
            self.study = optuna.create_study(
                study_name=study, storage=self.storage, directions=["maximize"] * len(objectives), pruner=pruner,
                load_if_exists=True,
            )  # fmt: skip
            known = self.study.user_attrs.get("fingerprint")
            if known is None:
                self.study.set_user_attr("fingerprint", fingerprint)
                self.study.set_metric_names(list(objectives))  # as `optuna-dashboard` shows them
            elif known != fingerprint:
                raise UserError(f"study {study} in {storage} belongs to another recipe: use a new run folder")
        self._id = self.storage.get_study_id_from_name(study)
        self._lease = new_lease()
        self._reaper = Reaper(self.study, self.storage, 0 if sharing is None else sharing.grace)
        self._open: dict[int, optuna.Trial] = {}
        self._hearts: dict[int, Heart] = {}
        self._asked = trials
        if sharing is None:
            for trial in self._trials():
                if trial.state == TrialState.RUNNING:
                    self._reaper.fail(trial.number)
        told = sum(t.state != TrialState.WAITING for t in self.look().trials)
        # a sampler's random state is not stored: a resumed run goes on from a seed of its own, as does each worker
        seeds = f"{seed}/{study}/{told}" + (f"/{self._lease['key']}" if sharing else "")
        self.study.sampler = make_sampler(kind, zlib.crc32(seeds.encode()), trials, first)
        for name, values in points.items():
            self.study.enqueue_trial(values, user_attrs={"origin": name}, skip_if_exists=True)
        if sharing is not None and starts is not None:  # who has starts has made the study; others may join from here
            self.study.set_user_attr("trials", max(trials, self.study.user_attrs.get("trials", 0)))
            self.study.set_user_attr("plan", {
                "space": [asdict(p) for p in self.space], "seed": seed, "sampler": kind, "first": first,
                "objectives": list(objectives), "limited": limited, "prune": prune, **(about or {}),
            })  # fmt: skip

    @classmethod
    def join(cls, study: str, storage: BaseStorage, fingerprint: str, sharing: Sharing) -> OptunaTuner:
        """Another tuner of a study that is being shared. Raises `UserError` if it does not exist or differs."""
        attrs = plan_of(study, storage)
        plan = attrs["plan"]
        if attrs["fingerprint"] != fingerprint:  # before anything is changed
            raise UserError(f"study {study} belongs to another recipe or model: join with those that it was made with")
        tuner = cls(
            study, [Parameter(**p) for p in plan["space"]], storage, attrs["trials"], plan["seed"], plan["sampler"],
            None, fingerprint, plan["objectives"], plan["limited"], plan["prune"], sharing,
        )  # fmt: skip
        return tuner

    def _clip(self, values: Mapping[str, float]) -> dict[str, float]:
        return {p.name: p.clip(values[p.name]) for p in self.space}

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def look(self) -> Ledger:
        """The table as it is now, after what killed processes had in hand is back in the queue."""
        asked, trials = self.asked, self._trials()
        if self.sharing is not None and self._reaper.reap(trials, list(self._open)):
            trials = self._trials()
        ledger = Ledger(trials, asked)
        if not ledger.owed:
            return ledger
        for trial in ledger.owed:
            about = {"origin": trial.user_attrs.get("origin", "sampler"), "retry_of": trial.number}
            about["attempt"] = trial.user_attrs.get("attempt", 0) + 1
            self.study.enqueue_trial(values_of(trial), user_attrs=about)
        return Ledger(self._trials(), asked)

    @property
    def asked(self) -> float:
        """Trials wanted: of a shared study as its maker says, who may want more later; else whoever proposes knows."""
        return math.inf if self.sharing is None else self.study.user_attrs.get("trials", self._asked)

    def tidy(self, ledger: Ledger) -> None:
        """Close what still waits in a study that is met, such as the second of two retries of one loss."""
        for trial in ledger.trials:
            if trial.state == TrialState.WAITING:
                self._reaper.fail(trial.number, "surplus")

    def claim(self, ledger: Ledger | None = None) -> Candidate | None:
        """A candidate to evaluate; None if the study is shared and the trials that are missing are in others' hands."""
        ledger = ledger or self.look()
        for waiting in ledger.waiting():
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._id, waiting.number)
            try:
                if self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                    return self._take(trial_id)
            except UpdateFinishedTrialError:
                pass
        if ledger.full:
            return None
        trial_id = self.storage.create_new_trial(self._id)
        if self.sharing is not None:
            number = self.storage.get_trial_number_from_id(trial_id)
            if not Ledger(self._trials(), ledger.asked).has_place(number):
                self._reaper.fail(number, "surplus")  # another process was a little faster
                return None
        return self._take(trial_id)

    def _take(self, trial_id: int) -> Candidate:
        trial = optuna.trial.Trial(self.study, trial_id)
        self._open[trial.number] = trial
        if self.sharing is not None:
            self._hearts[trial.number] = Heart(self.storage, trial_id, self._lease, self.sharing.heartbeat)
        for p in self.space:
            trial.suggest_float(p.name, p.low, p.high, step=p.step, log=p.log)
        return Candidate(trial.number, self._clip(trial.params), trial.user_attrs.get("origin", "sampler"))

    def ready(self) -> bool:
        return True

    def propose(self) -> Candidate:
        """`claim`, waiting while others have the last trials in hand."""
        while (candidate := self.claim(ledger := self.look())) is None:
            if ledger.met:
                raise UserError(f"study {self.study.study_name} has its {ledger.asked:.0f} trials: ask for more")
            time.sleep(0.2)
        return candidate

    def report(self, candidate: Candidate, scores: Mapping[int, float]) -> bool:
        """Take scores of single cases {case: score}; whether the candidate may be given up."""
        trial = self._open[candidate.number]
        for case, score in scores.items():
            trial.report(score, case)
        return trial.should_prune()

    def observe(
        self,
        candidate: Candidate,
        score: float | Sequence[float],
        calls: int = 0,
        excess: Mapping[str, float] | None = None,
    ) -> None:
        """A score that is not finite fails the trial; it is never replaced by a made-up number.

        excess: for each limit by how much it is exceeded (0 or less: kept). In a shared study the score of a trial
        that others took for lost is dropped: it has been queued again.
        """
        scores = [float(s) for s in score] if isinstance(score, Sequence) else [float(score)]
        if all(math.isfinite(x) for x in (*scores, *(excess or {}).values())):
            self._end(candidate, calls, scores, excess)
        else:
            self._end(candidate, calls, None)

    def prune(self, candidate: Candidate, calls: int = 0) -> None:
        """End a candidate that `report` gave up. It counts as tried; what it has of scores is no score."""
        self._end(candidate, calls, None, pruned=True)

    def _end(
        self, candidate: Candidate, calls: int, scores: Sequence[float] | None,
        excess: Mapping[str, float] | None = None, pruned: bool = False,
    ) -> None:  # fmt: skip
        trial, heart = self._open.pop(candidate.number, None), self._hearts.pop(candidate.number, None)
        try:
            if trial is not None:
                if calls:
                    trial.set_user_attr("calls", calls)
                for name, value in (excess or {}).items():
                    trial.set_constraint(name, value)
                if scores is None and not pruned:
                    trial.set_user_attr("reason", "not finite")
            state = None if scores is not None else TrialState.PRUNED if pruned else TrialState.FAIL
            self.study.tell(candidate.number, scores, state, skip_if_finished=self.sharing is not None)
        except UpdateFinishedTrialError:
            if self.sharing is None:
                raise
        finally:
            if heart is not None:
                heart.stop()

    def release(self) -> None:
        """Give back what this tuner has in hand, as if its process had been killed."""
        for number in list(self._open):
            del self._open[number]
            heart = self._hearts.pop(number, None)
            if heart is not None:
                heart.stop()
            self._reaper.fail(number)

    def trials(self) -> list[Trial]:
        """Scored trials in the order of their numbers, without those that were stopped early."""
        return [t for t in self.ended() if not math.isnan(t.score)]

    def ended(self, ledger: Ledger | None = None) -> list[Trial]:
        """`trials` with those that were stopped early: they count, cost what they cost, and have no score (NaN)."""
        out = []
        for t in (ledger or Ledger(self._trials(), math.inf)).scored:
            candidate = Candidate(t.number, self._clip(t.params), t.user_attrs.get("origin", "sampler"))
            scores = (math.nan,) if t.state == TrialState.PRUNED else tuple(map(float, t.values))
            excess = max((max(v, 0.0) for v in t.constraints.values()), default=0.0)
            calls = int(t.user_attrs.get("calls", 0))
            out.append(Trial(candidate, scores[0], calls, scores if self.several else (), excess))
        return out


def _store(storage: str | BaseStorage, sharing: Sharing | None) -> BaseStorage:
    if not isinstance(storage, str):
        return optuna.storages.get_storage(storage)
    return open_storage(storage) if sharing is None else open_storage(storage, sharing.heartbeat, sharing.grace)


def plan_of(study: str, storage: BaseStorage) -> dict[str, Any]:
    """What a shared study says of itself (`fingerprint`, `trials`, `plan`). Raises `UserError` if it does not exist."""
    names = optuna.study.get_all_study_names(storage)
    if study not in names:
        raise UserError(f"study {study} is not in the storage: it has {', '.join(sorted(names)) or 'none'}")
    attrs = storage.get_study_user_attrs(storage.get_study_id_from_name(study))
    if not {"fingerprint", "trials", "plan"} <= attrs.keys():
        raise UserError(f"study {study} is not shared (yet): start the search with tuner.storage=URL")
    return dict(attrs)
