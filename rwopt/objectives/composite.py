"""One objective, or several as one number: the score that a search raises."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from rwopt.errors import UserError, one_of
from rwopt.objectives.calibration import Scale, Scales, standard
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, settle
from rwopt.objectives.registry import Objectives

COMBINE = ("auto", "geometric", "calibrated")


class Composite:
    """Several terms as one score a picture, by `combine`:

    geometric: of terms from 0 to 1, prod_i max(score_i, 0) ** (weight_i / sum of weights). A picture that fails one of
    several terms altogether (an untouched source: edit success 0) scores 0, whatever else it keeps.
    calibrated: of terms of any range, sum_i weight_i * (score_i - mean_i) / sd_i, with the sign turned where less is
    better; mean and sd are `scales`, of the plain model, which has 0 on average.
    auto: geometric if all terms are from 0 to 1, else calibrated. One term alone is its own score, negative where less
    is better, unless `calibrated` is asked for.
    """

    def __init__(
        self, terms: Mapping[str, float], objectives: Objectives | None = None, combine: str = "geometric"
    ) -> None:
        if not terms or not all(0 < w < float("inf") for w in terms.values()):
            given = dict(terms)
            raise UserError(f"objective.terms={given} must name at least one objective, each with a weight above 0")
        one_of(COMBINE, "objective.combine", combine)
        self.source = objectives or Objectives()
        self.weights = dict(terms)
        self.specs: dict[str, ObjectiveSpec] = {name: self.source.spec(name) for name in terms}
        for name, spec in self.specs.items():
            if spec.level != "image":
                raise UserError(f"objective.terms: {name} scores whole sets, which no search can raise: put it in "
                                "objective.sets")  # fmt: skip
            if self.source.invalid == "fail" and not abs(spec.worst) < float("inf"):
                raise UserError(f"objective.invalid=fail: {name} has no worst score, its range is {spec.range}: set "
                                "objective.invalid=drop")  # fmt: skip
        odd = next((name for name, spec in self.specs.items() if not spec.unit), None)
        if combine == "auto":
            combine = "geometric" if odd is None or len(terms) == 1 else "calibrated"
        if combine == "geometric" and odd is not None and len(terms) > 1:
            raise UserError(f"objective.terms: {odd} has range {self.specs[odd].range}, a geometric mean takes 0 to 1: "
                            "let it be alone, or set objective.combine=calibrated")  # fmt: skip
        self.combine = combine
        self.scales: Scales | None = None

    @cached_property
    def objectives(self) -> dict[str, Objective]:
        """The terms, with their networks; made when first asked for."""
        return {name: self.source[name] for name in self.weights}

    @property
    def calibrated(self) -> bool:
        """Whether it needs `scales` before it can score."""
        return self.combine == "calibrated"

    @property
    def differentiable(self) -> bool:
        """Whether every term has a gradient."""
        return all(spec.differentiable for spec in self.specs.values())

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest score that there can be."""
        if self.calibrated:
            return -float("inf"), float("inf")
        spec = next(iter(self.specs.values()))
        return spec.range if spec.higher_is_better else (-spec.range[1], -spec.range[0])

    @property
    def pictures(self) -> bool:
        """Whether a term looks at pictures; else latents are enough."""
        return any(spec.pictures for spec in self.specs.values())

    def __call__(self, batch: Batch) -> Tensor:
        """Scores [N], higher is better; NaN for a picture that no term has a score for.

        Of several terms, one without a score (`settle`) takes no part: it counts as 1, or, calibrated, as the plain
        model's mean.
        """
        values = {}
        for name, objective in self.objectives.items():
            values[name] = settle(objective(batch), self.specs[name], self.source.invalid)
        if self.calibrated:
            score = self._sum(values)
        elif len(values) == 1:
            name, score = next(iter(values.items()))
            return score if self.specs[name].higher_is_better else -score
        else:
            score = self._mean(values)
        nothing = torch.stack([value.isnan() for value in values.values()]).all(0)
        return score.masked_fill(nothing, torch.nan)

    def _mean(self, values: Mapping[str, Tensor]) -> Tensor:
        total = sum(self.weights.values())
        score = torch.ones_like(next(iter(values.values())))
        for name, value in values.items():
            value = value.nan_to_num(1.0)
            # the floor keeps the root's gradient finite; a term that is nothing makes the score exactly 0 all the same
            score = score * (value > 0) * value.clamp(1e-8, 1) ** (self.weights[name] / total)
        return score

    def _sum(self, values: Mapping[str, Tensor]) -> Tensor:
        score = torch.zeros_like(next(iter(values.values())))
        for name, value in values.items():
            weight = self.weights[name] if self.specs[name].higher_is_better else -self.weights[name]
            score = score + weight * torch.where(value.isnan(), 0.0, standard(value, self._scale(name)))
        return score

    def _scale(self, name: str) -> Scale:
        if self.scales is None or name not in self.scales:
            raise RuntimeError(f"objective.terms: {name} has no calibration yet")
        return self.scales[name]
