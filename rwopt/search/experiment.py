"""What a recipe measures: one model, its cases, its objective, and how a candidate is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rwopt.config import Settings
from rwopt.models import Model
from rwopt.objectives.composite import Composite
from rwopt.schedule import Schedule
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, Scores, score
from rwopt.search.evaluator import Evaluator
from rwopt.search.splits import Splits
from rwopt.tasks import Dials


class Experiment:
    """A recipe made ready on a model. Keeps nothing on disk but teachers, in the folder `teachers`.

    base: the recipe's own dials; composites: its objective, and the same by the held-out judge; splits: its cases;
    evaluator: how candidates are scored and chosen.
    """

    def __init__(self, settings: Settings, model: Model, teachers: Path | None = None) -> None:
        self.settings, self.model = settings, model
        self.base = Dials(settings.dials.guidance, settings.dials.strength)
        terms = settings.objective.terms
        # the held-out twin takes the scorer's terms alone: others (source.ssim) have no second opinion
        held_out = {n.replace("scorer.", "judge."): w for n, w in terms.items() if n.startswith("scorer.")}
        self.composites = {OBJECTIVE: Composite(terms)} | ({HELD_OUT: Composite(held_out)} if held_out else {})
        names = (*terms, *settings.objective.report, *settings.tuner.objectives, *settings.tuner.limits)
        single = [name for name in dict.fromkeys(names) if name != OBJECTIVE]
        self.splits = Splits(settings.task, model, self.base, single, teachers)
        self.evaluator = Evaluator(settings.tuner, self.splits, self.objective)

    @property
    def objective(self) -> Composite:
        """What the search raises."""
        return self.composites[OBJECTIVE]

    @property
    def differentiable(self) -> bool:
        """Whether every term of the objective has a gradient."""
        return all(term.spec.differentiable for term in self.objective.objectives.values())

    def scores(
        self, split: str, dials: Dials, schedule: Schedule | None, metrics: Sequence[str] = ()
    ) -> Scores:
        """Both composites, and `metrics`, of one schedule (None: the plain model) on all cases of a split."""
        task = self.splits.task(split)
        return score(task, task.made(dials, schedule), self.composites, metrics)

    def value(self, split: str, dials: Dials, schedule: Schedule | None) -> float:
        """Mean objective over the cases of a split."""
        task = self.splits.task(split)
        return score(task, task.made(dials, schedule), {OBJECTIVE: self.objective}).mean(OBJECTIVE)
