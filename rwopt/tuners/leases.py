"""Whose a running trial is, and what becomes of it when its process is killed.

Several processes write one table, so every rule here is a function of the table alone (trials in the order of their
numbers, which the storage gives out one by one), and two that apply it at once cannot do harm:

- a trial whose process is gone is failed; the first to do so wins, a late score of that process is refused;
- a failed trial without a `reason` is owed: its values are queued again, as a trial that says `retry_of`;
- of several trials for one start or one retry, the lowest number is meant, the others are duplicates and fail;
- live is what runs, waits, has a score, was stopped early, or is owed. Of n trials asked for, a trial has a place if
  fewer than n live ones have lower numbers. A trial never comes to life again, so at most n ever have a place.

A process is gone if its machine is this one and has no such process any more; else if its lease (databases: Optuna's
heartbeat) has not moved for the grace period, by the clock of who looks on: no two clocks are compared.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

RETRIES = 10  # a candidate that kills its process that often is given up
SCORED = (TrialState.COMPLETE, TrialState.PRUNED)


@cache
def place() -> str:
    """This machine until it is started again, and the namespace in which process ids mean something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> int | None:
    """When a process of this machine began (an id alone may be given again); None if it is gone, 0 if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def new_lease() -> dict[str, Any]:
    """What a trial carries in `user_attrs["lease"]`: who works on it, and a count that goes up while he does."""
    pid = os.getpid()
    worker = f"{socket.gethostname()}:{pid}"
    return {"worker": worker, "place": place(), "pid": pid, "start": process_start(pid), "key": secrets.token_hex(4),
            "beat": 0}  # fmt: skip


def gone(lease: dict[str, Any]) -> bool:
    """Whether the lease's process is known to be dead; False for other machines, of which nothing is known."""
    return bool(lease["place"] == place() and process_start(lease["pid"]) != lease["start"])


def values_of(trial: FrozenTrial) -> dict[str, float]:
    """What a trial was to try: a start has its values before it has parameters."""
    return {**trial.params, **trial.system_attrs.get("fixed_params", {})}


class Ledger:
    """One reading of a study's table: which trials are duplicates, owed, live, scored; numbers are trial numbers."""

    def __init__(self, trials: Sequence[FrozenTrial], asked: float) -> None:
        self.trials, self.asked = list(trials), asked
        followed, starts = set[int](), set[tuple[Any, ...]]()
        scored = {t.number for t in trials if t.state in SCORED}
        self.duplicates = set[int]()
        for trial in self.trials:
            earlier = trial.user_attrs.get("retry_of")
            if earlier is not None:
                if earlier in followed or earlier in scored:
                    self.duplicates.add(trial.number)
                followed.add(earlier)
            elif "origin" in trial.user_attrs:
                key = (trial.user_attrs["origin"], *sorted(values_of(trial).items()))
                if key in starts:
                    self.duplicates.add(trial.number)
                starts.add(key)
        self.owed = [t for t in self.trials if t.number not in followed and _owed(t)]
        owed = {t.number for t in self.owed}
        self.live = [
            t.number
            for t in self.trials
            if t.number not in self.duplicates and (t.state != TrialState.FAIL or t.number in owed)
        ]
        self.scored = [t for t in self.trials if t.state in SCORED and t.number not in self.duplicates]

    @property
    def met(self) -> bool:
        return len(self.scored) >= self.asked

    @property
    def full(self) -> bool:
        """Whether nothing new is needed, unless something that is live fails."""
        return len(self.live) >= self.asked

    def has_place(self, number: int) -> bool:
        return number not in self.duplicates and sum(n < number for n in self.live) < self.asked

    def waiting(self) -> list[FrozenTrial]:
        """What may be taken up, first come first."""
        return [t for t in self.trials if t.state == TrialState.WAITING and self.has_place(t.number)]


def _owed(trial: FrozenTrial) -> bool:
    about = trial.user_attrs
    lost = trial.state == TrialState.FAIL and "reason" not in about and ("lease" in about or "lost" in about)
    return lost and bool(values_of(trial)) and about.get("attempt", 0) < RETRIES


class Heart:
    """A thread that shows that a trial is worked on, until `stop`."""

    def __init__(self, storage: BaseStorage, trial_id: int, lease: dict[str, Any], every: float) -> None:
        self._stop, self._mark = threading.Event(), marker(storage, trial_id, lease)
        self._mark()
        # last, so that a trial with a lease has a heartbeat too where the storage keeps them
        storage.set_trial_user_attr(trial_id, "lease", lease)
        self._thread = threading.Thread(target=self._run, args=(every,), daemon=True)
        self._thread.start()

    def _run(self, every: float) -> None:
        while not self._stop.wait(every):
            try:
                self._mark()
            except UpdateFinishedTrialError:
                return
            except Exception:  # a storage that is away for a while: the next beat tries again, the score will tell
                continue

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def has_heartbeat(storage: BaseStorage) -> bool:
    """Whether the storage keeps heartbeats (databases that were opened with an interval)."""
    ask = getattr(storage, "get_heartbeat_interval", None)
    return ask is not None and ask() is not None


def marker(storage: BaseStorage, trial_id: int, lease: dict[str, Any]) -> Callable[[], None]:
    """One sign of life: a heartbeat in the database's own time, else a step of the lease's count."""
    if has_heartbeat(storage):
        record: Callable[[int], None] = storage.record_heartbeat  # type: ignore[attr-defined]
        return lambda: record(trial_id)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        storage.set_trial_user_attr(trial_id, "lease", {**lease, "beat": count})

    return step


class Reaper:
    """Fails the running trials of killed processes. Looks on between trials; remembers what it saw and when."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, grace: float) -> None:
        self.study, self.storage, self.grace = study, storage, grace
        self.study_id = storage.get_study_id_from_name(study.study_name)
        self._seen: dict[int, tuple[object, float]] = {}

    def reap(self, trials: Sequence[FrozenTrial], own: Sequence[int]) -> bool:
        """Whether anything was failed."""
        found, beating = False, has_heartbeat(self.storage)
        if beating:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)  # by the database's clock
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in own:
                lease = trial.user_attrs.get("lease")
                left = gone(lease) if lease is not None else False
                if not left and (lease is None or not beating):  # no lease: killed before it had one
                    left = self._still(trial.number, lease)
                if left:
                    self.fail(trial.number)
                    found = True
        return found

    def _still(self, number: int, lease: dict[str, Any] | None) -> bool:
        token, now = None if lease is None else (lease["key"], lease["beat"]), time.monotonic()
        if number not in self._seen or self._seen[number][0] != token:
            self._seen[number] = (token, now)
        return now - self._seen[number][1] > self.grace

    def fail(self, number: int, reason: str | None = None) -> None:
        """End a trial without a score: for a `reason`, or (None) as lost, so that its values come again."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        try:
            self.storage.set_trial_user_attr(trial_id, *(("lost", True) if reason is None else ("reason", reason)))
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass  # another was first, or it was alive and has a score now
