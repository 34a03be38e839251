"""What a candidate is scored by: one objective or several, limits that it must keep, and when it is given up early.

Higher is better throughout: an objective of which less is better counts negative; its label has a minus then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rwopt.config import TunerSettings
from rwopt.errors import UserError
from rwopt.objectives import Objectives
from rwopt.objectives.composite import Composite
from rwopt.schedule import Schedule
from rwopt.search.evaluation import OBJECTIVE, score
from rwopt.search.guard import Guard, Watch
from rwopt.search.splits import Splits
from rwopt.tasks import Dials, Task
from rwopt.tuners import Trial, pareto, top
from rwopt.tuners.loop import Batched, Outcome, Report

Decode = Callable[[Mapping[str, float]], tuple[Dials, Schedule | None]]


class Evaluator:
    """Scores and chooses candidates by the `tuner` settings' objectives, limits and early stopping, on a recipe's
    cases.

    objective: what the name "objective" stands for; objectives: all others. Raises `UserError` for an unknown name.
    """

    def __init__(
        self, settings: TunerSettings, splits: Splits, objective: Composite, objectives: Objectives | None = None
    ) -> None:
        self.settings, self.splits, self.objective = settings, splits, objective
        self.objectives = objectives or Objectives(model=splits.model.name)
        self.guard = Guard(settings.guard, splits, self.objectives, splits.base)
        self.limits, self.slack, self.prune = dict(settings.limits), settings.slack, settings.prune
        self.names = list(settings.objectives) or [OBJECTIVE]
        self.signs = {name: 1.0 if self._up(name) else -1.0 for name in (*self.names, *self.limits)}
        self.labels = [name if self.signs[name] > 0 else f"-{name}" for name in self.names]
        self._parts: list[tuple[Task, list[int]]] = []

    @property
    def several(self) -> bool:
        return len(self.names) > 1

    def _up(self, name: str) -> bool:
        return name == OBJECTIVE or self.objectives.spec(name).higher_is_better

    def cases(self, task: Task, candidates: Sequence[tuple[Dials, Schedule | None]]) -> list[dict[str, np.ndarray]]:
        """Of each candidate and objective or limit each case's score [C], higher is better; NaN where undefined."""
        wanted = list(dict.fromkeys((*self.names, *self.limits)))
        composites = {OBJECTIVE: self.objective} if OBJECTIVE in wanted else {}
        singles = [name for name in wanted if name != OBJECTIVE]
        out = []
        for batch in task.candidates(candidates):
            values = score(task, batch, composites, singles, self.objectives).values
            out.append({name: self.signs[name] * values[name] for name in wanted})
        return out

    def outcome(self, values: Mapping[str, np.ndarray], calls: int = 0) -> Outcome:
        """Means over the cases that have a value, and by how much they break the limits."""
        means = {n: float(v[~np.isnan(v)].mean()) if not np.isnan(v).all() else np.nan for n, v in values.items()}
        excess = {name: self.signs[name] * bound - means[name] for name, bound in self.limits.items()}
        return Outcome(tuple(means[name] for name in self.names), calls, excess)

    def of(self, split: str, *candidates: tuple[Dials, Schedule | None]) -> list[Outcome]:
        """Candidates on all cases of a split, together; U-Net calls are shared out evenly."""
        task, before = self.splits.task(split), self.splits.model.calls
        values = self.cases(task, candidates)
        calls, rest = divmod(self.splits.model.calls - before, len(candidates))
        return [self.outcome(v, calls + (i < rest)) for i, v in enumerate(values)]

    def train(self, dials: Dials, schedule: Schedule | None, number: int, report: Report) -> Outcome:
        """One candidate on the train cases, part by part if it may be given up on the way.

        Parts are the same for all candidates, drawn once; a candidate's `number` says with which it begins, so that no
        case decides about all. Calls are counted as if the parts had shared full batches.
        """
        if not self.prune:
            return self.of("train", (dials, schedule))[0]
        parts, model = self.parts(), self.splits.model
        before, batch = model.calls, parts[0][0].batch
        values: dict[str, np.ndarray] = {}
        seen, total = 0, sum(len(rows) for _, rows in parts)
        pictures = sum(len(task) for task, _ in parts)
        fraction = -(-pictures // batch) / sum(-(-len(task) // batch) for task, _ in parts)
        begin = number % len(parts)
        for task, rows in parts[begin:] + parts[:begin]:
            for name, column in self.cases(task, [(dials, schedule)])[0].items():
                values.setdefault(name, np.full(total, np.nan))[rows] = column
            calls = max(1, round((model.calls - before) * fraction))
            own, seen = values[self.names[0]], seen + len(rows)
            if np.isinf(own[rows]).any():
                return Outcome((np.nan,), calls)
            if report({case: float(own[case]) for case in rows if not np.isnan(own[case])}) and seen < total:
                return Outcome(None, calls)
        return self.outcome(values, calls)

    def batched(self, decode: Decode) -> Batched:
        """Scores several candidates on the train cases at once, as many as `tuner.batched` says."""
        size = self.settings.batched
        return Batched(size, lambda candidates: self.of("train", *(decode(c.values) for c in candidates)))

    def parts(self) -> list[tuple[Task, list[int]]]:
        """The train cases in random parts of `tuner.part`: a task of each and its cases' numbers."""
        if not self._parts:
            cases, size = self.splits.cases("train"), self.settings.part
            order = np.random.default_rng(0).permutation(len(cases)).tolist()
            for i in range(0, len(order), size):
                rows = order[i : i + size]
                self._parts.append((self.splits.prepare([cases[j] for j in rows]), rows))
        return self._parts

    def watch(self, decode: Decode) -> Watch:
        """Who keeps the guard while one study is worked on."""
        return Watch(self.guard, self.settings.guard_patience, decode)

    def choose(
        self, name: str, trials: Sequence[Trial], decode: Decode, k: int, watch: Watch | None = None
    ) -> tuple[Trial, Outcome, dict[str, Any]]:
        """The best on validation cases of the k that did best on train cases, and how it was chosen.

        Several objectives: of the Pareto front, by `pareto.rule`. A point that breaks a limit comes after all that keep
        it; one that breaks the guard is no choice, unless all do. Raises `UserError` if there is none with a finite
        score.
        """
        watch = watch or self.watch(decode)
        ordered, about = top(trials, len(trials)), dict[str, Any]()
        if self.several:
            ordered, about = self._from_front(ordered)
        best = watch.first(ordered, k)
        validated = self.of("validation", *(decode(t.candidate.values) for t in best))
        rows = [i for i, v in enumerate(validated) if v.scores is not None and np.isfinite(v.scores).all()]
        if not rows:
            raise UserError(f"arm {name} has no finite objective on validation cases; check objective.terms")
        points = np.array([validated[i].scores for i in rows])
        plain = self._plain("validation") if self.several else points[0]
        over = np.array([max((*validated[i].excess.values(), 0.0)) for i in rows])
        chosen = rows[pareto.ranked(points, plain, self.slack, over)[0]]
        if self.limits:
            about |= {"limits": self.limits, "kept": bool(over[rows.index(chosen)] <= 0)}
        if self.guard:
            about["guard"] = watch.about(best[chosen])
        return best[chosen], validated[chosen], about

    def _plain(self, split: str) -> np.ndarray:
        return np.array(self.of(split, (self.splits.base, None))[0].scores)

    def _from_front(self, trials: Sequence[Trial]) -> tuple[list[Trial], dict[str, Any]]:
        """The front, best first by the rule, on train cases; and what the result says of the front."""
        keeping = [t for t in trials if t.excess <= 0] or list(trials)
        points, plain = np.array([t.scores for t in keeping]), self._plain("train")
        front = sorted(pareto.front(points), key=lambda i: -points[i, 0])
        worst = np.array([self._worst(name, points[:, j]) for j, name in enumerate(self.names)])
        order = pareto.ranked(points[front], plain, self.slack, np.array([keeping[i].excess for i in front]))
        return [keeping[front[i]] for i in order], {
            "rule": pareto.rule(self.labels, self.slack),
            "objectives": self.labels,
            "plain": plain.tolist(),
            "front": points[front].tolist(),
            "hypervolume": pareto.hypervolume(points, worst),
            "reference": worst.tolist(),
        }

    def _worst(self, name: str, seen: np.ndarray) -> float:
        """Where hypervolume is counted from: the worst possible score, or the worst seen if there is no end to it."""
        low, high = self.objective.range if name == OBJECTIVE else self.objectives.spec(name).range
        worst = low if self.signs[name] > 0 else -high
        return worst if np.isfinite(worst) else float(seen.min())
