"""The contract of an objective: a batch of pictures in, one score a picture out, and what it declares of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rwopt.errors import UserError


@dataclass
class Batch:
    """N pictures and what is known of their cases. Pictures are [N, 3, H, W], float32, in [0, 1].

    reference: the picture to stay close to (the source of an edit; the plain model's picture from the same noise);
    truth: the true edited picture; teacher: the plain model's picture in many calls; latents, teacher_latents: what the
    pictures and the teacher's were decoded from, [N, C, h, w]; target: attribute values wanted, for each picture;
    changed: the attributes that the edit changes; hidden: the attributes that the true picture does not show.
    """

    images: Tensor
    reference: Tensor | None = None
    truth: Tensor | None = None
    teacher: Tensor | None = None
    latents: Tensor | None = None
    teacher_latents: Tensor | None = None
    prompts: list[str] | None = None
    target: list[dict[str, str]] | None = None
    changed: list[list[str]] | None = None
    hidden: list[list[str]] | None = None

    def rows(self, index: slice) -> Batch:
        """Some of the pictures, with what is known of them."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in known.items() if value is not None})


def against(field: str, compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """Scores [N] of the pictures by `compare` with those of a batch's `field`, such as truth or teacher."""

    def score(batch: Batch) -> Tensor:
        other: Tensor | None = getattr(batch, field)
        assert other is not None
        return compare(batch.images, other)

    return score


@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective declares. `needs`: fields of `Batch`; `pictures`: whether it looks at the pictures at all."""

    name: str
    higher_is_better: bool
    differentiable: bool
    range: tuple[float, float]
    needs: frozenset[str] = field(default_factory=frozenset)
    licence: str = "Apache-2.0"
    about: str = ""
    pictures: bool = True


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
