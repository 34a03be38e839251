"""The loop of who works on a study, alone or with others: claim, evaluate, tell, until all trials are there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from optuna.exceptions import StorageInternalError

from rwopt.errors import UserError
from rwopt.tuners import Candidate, Trial, Tuner
from rwopt.tuners.leases import Ledger
from rwopt.tuners.optuna import OptunaTuner

Report = Callable[[Mapping[int, float]], bool]
"""Takes scores of single cases {case: score}; whether the candidate may be given up."""


@dataclass(frozen=True)
class Outcome:
    """scores: one an objective, higher is better; None if the candidate was given up. calls: U-Net calls it took.

    excess: for each limit by how much it was exceeded; 0 or less if it was kept.
    """

    scores: tuple[float, ...] | None
    calls: int = 0
    excess: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batched:
    """How many candidates are proposed before they are scored, and who scores them."""

    size: int
    evaluate: Callable[[Sequence[Candidate]], Sequence[Outcome]]


def work(
    tuner: Tuner,
    trials: int,
    evaluate: Callable[[Candidate, Report], Outcome],
    on_trial: Callable[[Trial], None] = lambda trial: None,
    name: str = "study",
    pause: float = 0.3,
    batched: Batched | None = None,
) -> int:
    """Evaluate candidates until the study has `trials`, or all that it was asked for; the number that this loop ended.

    on_trial: called once for each trial that is scored or was stopped early (score NaN), whoever evaluated it, first
    for those that are there already. batched: for several candidates at once, if the tuner has them. Raises
    `UserError` if more candidates than that had no finite score, or if the storage fails.
    """
    try:
        return _work(tuner, trials, evaluate, on_trial, name, pause, batched or Batched(1, lambda _: []))
    except StorageInternalError as error:
        why = " ".join(str(error.__cause__ or error).split("\n", 1)[0].split())
        raise UserError(f"{name}: the study's storage failed ({why}): start again, scored trials are kept") from None


def _work(
    tuner: Tuner,
    trials: int,
    evaluate: Callable[[Candidate, Report], Outcome],
    on_trial: Callable[[Trial], None],
    name: str,
    pause: float,
    batched: Batched,
) -> int:
    seen, done, failed = set[int](), 0, 0
    shared = tuner if isinstance(tuner, OptunaTuner) else None
    try:
        while True:
            table = shared.look() if shared else None
            for trial in ended(tuner, table):
                if trial.candidate.number not in seen:
                    seen.add(trial.candidate.number)
                    on_trial(trial)
            if shared and table is not None and table.met:
                shared.tidy(table)
                return done
            if len(seen) >= trials:
                return done
            candidates = _claim(tuner, min(batched.size, trials - len(seen)), table)
            if not candidates:  # others have the last ones in hand
                time.sleep(pause)
                continue
            if len(candidates) > 1:
                outcomes = batched.evaluate(candidates)
            else:
                report = partial(shared.report, candidates[0]) if shared else _go_on
                outcomes = [evaluate(candidates[0], report)]
            for candidate, outcome in zip(candidates, outcomes, strict=True):
                if shared and outcome.scores is None:
                    shared.prune(candidate, outcome.calls)
                elif shared:
                    shared.observe(candidate, outcome.scores or (), outcome.calls, outcome.excess)
                else:
                    tuner.observe(candidate, math.nan if outcome.scores is None else outcome.scores[0], outcome.calls)
                if outcome.scores is None or all(map(math.isfinite, outcome.scores)):
                    done += 1
                elif (failed := failed + 1) > trials:
                    raise UserError(f"{name}: {failed} candidates had no finite objective; check objective.terms")
    finally:
        if shared:
            shared.release()


def _claim(tuner: Tuner, most: int, table: Ledger | None) -> list[Candidate]:
    """Up to `most` candidates; fewer if the tuner wants scores first, none if others have the last ones in hand."""
    out = list[Candidate]()
    while len(out) < max(1, most) and (not out or tuner.ready()):
        candidate = tuner.claim(None if out else table) if isinstance(tuner, OptunaTuner) else tuner.propose()
        if candidate is None:
            break
        out.append(candidate)
    return out


def ended(tuner: Tuner, table: Ledger | None = None) -> list[Trial]:
    """The trials that count: scored ones, and (score NaN) those that were given up."""
    return tuner.ended(table) if isinstance(tuner, OptunaTuner) else tuner.trials()


def _go_on(scores: Mapping[int, float]) -> bool:
    return False
