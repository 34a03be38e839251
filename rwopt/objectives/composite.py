"""Several objectives as one number, the score that a search raises."""

from __future__ import annotations

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch, make_objective


class Composite:
    """Weighted geometric mean of scores in [0, 1]: prod_i max(score_i, 0) ** (weight_i / sum of weights).

    A picture that fails one term altogether (an untouched source: edit success 0) scores 0, whatever else it keeps.
    """

    def __init__(self, terms: dict[str, float]) -> None:
        if not terms or not all(0 < w < float("inf") for w in terms.values()):
            raise UserError(f"objective.terms={terms} must name at least one objective, each with a weight above 0")
        self.objectives = {name: make_objective(name) for name in terms}
        total = sum(terms.values())
        self.exponents = {name: weight / total for name, weight in terms.items()}
        for name, objective in self.objectives.items():
            spec = objective.spec
            if spec.range != (0.0, 1.0) or not spec.higher_is_better:
                raise UserError(f"objective.terms: {name} has range {spec.range}, a geometric mean takes 0 to 1")

    def __call__(self, batch: Batch) -> Tensor:
        """Scores [N]; NaN terms (nothing to judge) count as 1."""
        score = torch.ones(len(batch.images), device=batch.images.device)
        for name, objective in self.objectives.items():
            value = objective(batch).nan_to_num(1.0)
            # the floor keeps the root's gradient finite; a term that is nothing makes the score exactly 0 all the same
            score = score * (value > 0) * value.clamp(1e-8, 1) ** self.exponents[name]
        return score
