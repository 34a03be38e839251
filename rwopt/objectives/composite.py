"""One objective, or several as one number: the score that a search raises."""

from __future__ import annotations

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch, make_objective


class Composite:
    """One term: its own score, negative where less is better. Several, all from 0 to 1: their weighted geometric mean,
    prod_i max(score_i, 0) ** (weight_i / sum of weights).

    A picture that fails one of several terms altogether (an untouched source: edit success 0) scores 0, whatever else
    it keeps.
    """

    def __init__(self, terms: dict[str, float]) -> None:
        if not terms or not all(0 < w < float("inf") for w in terms.values()):
            raise UserError(f"objective.terms={terms} must name at least one objective, each with a weight above 0")
        self.objectives = {name: make_objective(name) for name in terms}
        total = sum(terms.values())
        self.exponents = {name: weight / total for name, weight in terms.items()}
        for name, objective in self.objectives.items():
            spec = objective.spec
            if len(terms) > 1 and (spec.range != (0.0, 1.0) or not spec.higher_is_better):
                raise UserError(
                    f"objective.terms: {name} has range {spec.range}, a geometric mean takes 0 to 1: let it be alone"
                )

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest score that there can be."""
        spec = next(iter(self.objectives.values())).spec
        return spec.range if spec.higher_is_better else (-spec.range[1], -spec.range[0])

    @property
    def pictures(self) -> bool:
        """Whether a term looks at pictures; else latents are enough."""
        return any(objective.spec.pictures for objective in self.objectives.values())

    def __call__(self, batch: Batch) -> Tensor:
        """Scores [N], higher is better; of several, NaN terms (nothing to judge) count as 1."""
        first = next(iter(self.objectives.values()))
        if first.spec.range != (0.0, 1.0) or not first.spec.higher_is_better:  # then it is alone
            return first(batch) if first.spec.higher_is_better else -first(batch)
        score = torch.ones(len(batch.images), device=batch.images.device)
        for name, objective in self.objectives.items():
            value = objective(batch).nan_to_num(1.0)
            # the floor keeps the root's gradient finite; a term that is nothing makes the score exactly 0 all the same
            score = score * (value > 0) * value.clamp(1e-8, 1) ** self.exponents[name]
        return score
