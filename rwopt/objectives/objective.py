"""The contract of an objective: a batch of pictures in, one score a picture out, and what it declares of itself.

A family of objectives is a module with `specs() -> Mapping[str, ObjectiveSpec]`, which imports and loads nothing heavy,
and `make(name, **options) -> Objective` (or `SetObjective`), which loads what it needs or raises `UserError` with one
line that names what is missing and how to get it. It may have `missing(name, **options) -> str`, the same line without
loading, "" if nothing is (packages of an `extra` are looked for without it). A family with large networks also has
`tiny(name) -> options`: the same architecture in a small size with random weights, for the contract suite in
`tests/objectives`. `rwopt.objectives.registry` finds families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError, one_of

INVALID = ("drop", "fail")
"""What a picture without a score does: it leaves the mean, or counts as the worst of the range."""

@dataclass
class Batch:
    """N pictures and what is known of their cases. Pictures are [N, 3, H, W], floating point, in [0, 1].

    reference: the picture to stay close to (the source of an edit; the plain model's picture from the same noise);
    truth: the true edited picture; teacher: the plain model's picture in many calls; latents, teacher_latents: what the
    pictures and the teacher's were decoded from, [N, C, h, w]; mask: [N, 1, H, W] of 0 and 1, 1 where the edit belongs;
    prompts, source_prompts: captions of the pictures wanted and of the references; target: attribute values wanted, for
    each picture; changed: the attributes that the edit changes; hidden: those that the true picture does not show.
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
    mask: Tensor | None = None
    source_prompts: list[str] | None = None

    def rows(self, index: slice) -> Batch:
        """Some of the pictures, with what is known of them."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in known.items() if value is not None})

    def full(self) -> Batch:
        """The same with float16 and bfloat16 tensors as float32, which networks and small differences need."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        halves = (torch.float16, torch.bfloat16)
        found: dict[str, Any] = {n: v.float() for n, v in known.items() if isinstance(v, Tensor) and v.dtype in halves}
        return replace(self, **found) if found else self

def against(field: str, compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """Scores [N] of the pictures by `compare` with those of a batch's `field`, such as truth or teacher."""

    def score(batch: Batch) -> Tensor:
        other: Tensor | None = getattr(batch, field)
        assert other is not None
        return compare(batch.images, other)

    return score

@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective declares.

    range: least and greatest score, inf where there is no end; needs: fields of `Batch`; level: "image", or "set" for
    a `SetObjective`; licence: of the code or the weights, whichever asks for more; weights: where they come from, a hub
    id or a file name, "" for none; sha256: of the weights' file, if it is known; size: of the weights in bytes; extra:
    what `pip install rwopt[extra]` it needs, "" for none; about: what it is, in a few words; pictures: whether it looks
    at the pictures at all, or at latents alone; judges: the model whose judges it asks, "" if it asks none, else it has
    an option of that name; version: changes where the same pictures get other scores.
    """

    name: str
    higher_is_better: bool
    differentiable: bool
    range: tuple[float, float]
    needs: frozenset[str] = field(default_factory=frozenset)
    licence: str = "Apache-2.0"
    about: str = ""
    pictures: bool = True
    level: str = "image"
    weights: str = ""
    sha256: str | None = None
    size: int = 0
    extra: str = ""
    judges: str = ""
    version: str = "1"

    def __post_init__(self) -> None:
        one_of(("image", "set"), f"objective {self.name}: level", self.level)
        unknown = sorted(self.needs - {f.name for f in fields(Batch)})
        if unknown:
            raise UserError(f"objective {self.name}: needs {unknown[0]}, which is no field of a Batch: take it out")

    @property
    def unit(self) -> bool:
        """Whether it runs from 0, nothing, to 1, perfect."""
        return self.range == (0.0, 1.0) and self.higher_is_better

    @property
    def worst(self) -> float:
        """The end of the range that nobody wants; infinite where there is no such end."""
        return self.range[0] if self.higher_is_better else self.range[1]

class Objective:
    """A frozen function of a `Batch`: `spec`, and a call that gives one score a picture, [N].

    A score that is not defined for a picture (nothing visible to judge, no face, an empty mask) is NaN, never a zero;
    `settle` says what becomes of it. `function` gets half-precision tensors as float32, runs without autocast, and puts
    networks on the pictures' device; what it says of a picture may not depend on the others of the batch.
    """

    def __init__(self, spec: ObjectiveSpec, function: Callable[[Batch], Tensor]) -> None:
        self.spec, self.function = spec, function

    def __call__(self, batch: Batch) -> Tensor:
        """Scores [N]; with a gradient to the pictures (or latents) if the spec says so.

        Raises `UserError` if the batch lacks what the objective needs.
        """
        for name in sorted(self.spec.needs):
            if getattr(batch, name) is None:
                raise UserError(f"objective {self.spec.name} needs {name}, which this task does not give")
        grad = torch.set_grad_enabled(self.spec.differentiable and torch.is_grad_enabled())
        with grad, torch.autocast(batch.images.device.type, enabled=False):
            scores = self.function(batch.full())
        if scores.shape != (len(batch.images),):
            shape = tuple(scores.shape)
            raise RuntimeError(f"objective {self.spec.name} gave {shape} for {len(batch.images)} pictures")
        return scores

def settle(scores: Tensor, spec: ObjectiveSpec, invalid: str) -> Tensor:
    """Scores [N] with the policy applied: `drop` leaves NaN, which means take no part; `fail` makes it the worst."""
    return scores if invalid == "drop" else torch.where(scores.isnan(), spec.worst, scores)

def check_options(name: str, options: Collection[str], known: Collection[str] = ()) -> None:
    """Raise `UserError` for the first of `options` that objective `name` does not know."""
    for key in options:
        if key not in known:
            remedy = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"objective.options: {name} has no option {key}: {remedy}")

@dataclass(frozen=True)
class SetScore:
    """A set objective's result: its value, the standard deviation of that value, pictures on each side, and the p-value
    that both sides are of one distribution (NaN where it was not tested)."""

    value: float
    sd: float
    n: int
    p: float = float("nan")

    def to_dict(self) -> Mapping[str, float]:
        return {"value": self.value, "sd": self.sd, "n": self.n, "p": self.p}

class SetObjective(ABC):
    """A number for two whole sets of pictures (KID, CMMD): for reports, never for a search.

    spec: of level "set"; least: pictures on each side below which the number says nothing.
    """

    spec: ObjectiveSpec
    least: int

    @abstractmethod
    def update(self, images: Tensor, real: bool) -> None:
        """Add pictures [n, 3, H, W] in [0, 1] to the real or to the generated side."""

    @abstractmethod
    def compute(self) -> SetScore:
        """The score of what was added. Raises `UserError` if either side has fewer than `least` pictures."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all pictures."""

AnyObjective = Objective | SetObjective
