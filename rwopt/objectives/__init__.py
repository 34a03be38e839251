"""Objectives: per-image scores with a declared direction, range, differentiability, inputs and licence.

`make_objective("judge.kept")` gives one; `objective_names()` lists them. One contract suite (`tests/objectives`) runs
them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError


@dataclass
class Batch:
    """N pictures and what is known of their cases. Pictures are [N, 3, H, W], float32, in [0, 1].

    reference: the picture to stay close to (the source of an edit; the plain model's picture from the same noise);
    truth: the true edited picture; target: attribute values wanted, for each picture; changed: the attributes that the
    edit changes; hidden: the attributes that the true picture does not show.
    """

    images: Tensor
    reference: Tensor | None = None
    truth: Tensor | None = None
    prompts: list[str] | None = None
    target: list[dict[str, str]] | None = None
    changed: list[list[str]] | None = None
    hidden: list[list[str]] | None = None


@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective declares. `needs` names fields of `Batch`; `ceiling` is the score of a perfect picture."""

    name: str
    higher_is_better: bool
    differentiable: bool
    range: tuple[float, float]
    needs: frozenset[str] = field(default_factory=frozenset)
    licence: str = "Apache-2.0"
    about: str = ""


class Objective:
    """A frozen function of a `Batch`: `spec`, and a call that gives one score a picture, [N].

    A score that is not defined for a picture (nothing visible to judge) is NaN; averages leave it out.
    """

    def __init__(self, spec: ObjectiveSpec, function: Callable[[Batch], Tensor]) -> None:
        self.spec, self.function = spec, function

    def __call__(self, batch: Batch) -> Tensor:
        for name in sorted(self.spec.needs):
            if getattr(batch, name) is None:
                raise UserError(f"objective {self.spec.name} needs {name}, which this task does not give")
        with torch.set_grad_enabled(self.spec.differentiable and torch.is_grad_enabled()):
            scores = self.function(batch)
        if scores.shape != (len(batch.images),):
            shape = tuple(scores.shape)
            raise RuntimeError(f"objective {self.spec.name} gave {shape} for {len(batch.images)} pictures")
        return scores


def objective_names() -> list[str]:
    """Every name that `make_objective` takes."""
    from rwopt.objectives import avatar, pixel

    return [*avatar.names(), *pixel.names()]


def make_objective(name: str, **options: Any) -> Objective:
    """The objective of that name; `UserError` with the nearest valid one otherwise."""
    from rwopt.objectives import avatar, pixel

    if name in avatar.names():
        return avatar.make(name, **options)
    if name in pixel.names():
        return pixel.make(name, **options)
    near = difflib.get_close_matches(name, objective_names(), 1, 0)
    raise UserError(f"objective {name} is unknown: did you mean {near[0]}? (all: {', '.join(objective_names())})")


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
