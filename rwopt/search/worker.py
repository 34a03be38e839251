"""`rwopt worker`: join the studies of a search from another process or machine, until they have all their trials.

A study that a search shares (`tuner.storage`) says itself what it is: recipe, box, objectives, what a point means. A
worker needs the storage's URL and a model of its own; that this is the search's model is checked by its weights.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwopt.config import Settings
from rwopt.errors import UserError
from rwopt.models import load_model
from rwopt.objectives import calibration
from rwopt.search.experiment import Experiment
from rwopt.search.identity import fingerprint, run_name
from rwopt.search.space import Decoder
from rwopt.tuners import Candidate, Trial
from rwopt.tuners.loop import Outcome, Report, work
from rwopt.tuners.optuna import OptunaTuner, Sharing, plan_of
from rwopt.tuners.storage import open_storage

LAST = "learned"  # the study with which a search ends
Say = Callable[[str], None]
Read = Callable[[str], Settings]  # a recipe's text, composed


def resolve(target: str, storage: str | None, read: Read) -> tuple[str, str]:
    """(name of a run or study, storage URL) of a run folder, or of a name with a URL."""
    recipe = Path(target) / "recipe.yaml"
    if recipe.exists():
        wanted = read(recipe.read_text(encoding="utf-8")).tuner
        if not (storage or wanted.storage):
            raise UserError(f"{target} keeps its studies to itself: start the search with tuner.storage=URL")
        return run_name(Path(target)), storage or wanted.storage
    if storage is None:
        raise UserError(f"{target} is no run folder (it has no recipe.yaml): name one, or a study with storage=URL")
    return target.rstrip("/"), storage


def join(target: str, storage: str | None, read: Read, wait: float, say: Say) -> int:
    """Work on a run's studies, or on one study, until the last is met; the number of trials that this worker ended.

    read: makes settings of a recipe's text; a model may have another place here. wait: seconds after which a worker
    without work gives up. Raises `UserError` if the study is of another recipe or model, or there is none.
    """
    name, url = resolve(target, storage, read)
    store = open_storage(url)
    experiment: Experiment | None = None
    tuners: dict[str, OptunaTuner] = {}
    done, idle = 0, time.monotonic()
    while True:
        ready = _studies(name, store)
        for study, attrs in ready.items():
            if experiment is None:
                settings = read(attrs["plan"]["recipe"])
                model = load_model(**asdict(settings.model), size=settings.task.size, method=settings.task.kind)
                experiment, mark = Experiment(settings, model), fingerprint(settings, model)
                sharing = Sharing(settings.tuner.heartbeat, settings.tuner.grace)
                if "calibration" in attrs["plan"]:
                    experiment.calibrate(calibration.from_json(attrs["plan"]["calibration"]))
                store = open_storage(url, sharing.heartbeat, sharing.grace)  # as all others of this study have it
            if study not in tuners:
                tuners[study] = OptunaTuner.join(study, store, mark, sharing)
            if not tuners[study].look().met:
                done += _help(tuners[study], Decoder.from_dict(attrs["plan"]["decoder"]), experiment, say)
                idle = time.monotonic()
        if any(study in (name, f"{name}/{LAST}") for study in ready):
            return done
        if time.monotonic() - idle > wait:
            known = _names(store)
            near = difflib.get_close_matches(name, known, 1, 0)
            hint = f"; nearest is {near[0]}" if near and not ready else ""
            raise UserError(f"{name}: no work for {wait:g} s{hint}: is its search running? (--wait sets the time)")
        time.sleep(0.5)


def _names(store: Any) -> list[str]:
    import optuna

    return sorted(optuna.study.get_all_study_names(store))


def _studies(name: str, store: Any) -> dict[str, dict[str, Any]]:
    """The shared studies of a run, or the one study of that name, that are ready to be joined, with what they say."""
    out = {}
    for study in _names(store):
        if study == name or study.rpartition("/")[0] == name:
            try:
                out[study] = plan_of(study, store)
            except UserError:  # its search is just making it
                continue
    return out


def _help(tuner: OptunaTuner, decode: Decoder, experiment: Experiment, say: Say) -> int:
    """Work on one study until it is met."""
    study, best, evaluator = tuner.study.study_name, float("-inf"), experiment.evaluator
    experiment.splits.task("train")

    def on_trial(trial: Trial) -> None:
        nonlocal best
        best = max(best, trial.score)

    def evaluate(candidate: Candidate, report: Report) -> Outcome:
        outcome = evaluator.train(*decode(candidate.values), candidate.number, report)
        score = "given up" if outcome.scores is None else f"{outcome.scores[0]:.4f}"
        say(f"{study}: trial {candidate.number}, {candidate.origin}: {score} (best before {best:.4f})")
        return outcome

    return work(tuner, int(tuner.asked), evaluate, on_trial, study, batched=evaluator.batched(decode))
