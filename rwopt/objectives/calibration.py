"""Terms of unlike ranges on one scale: how far a score lies from the plain model's, in its standard deviations.

Mean and standard deviation are those of the plain model's pictures of the train cases, taken once at the start of a
run and kept in its folder, so that a candidate's score never depends on the others that were tried. A likeness to the
plain model's own picture has no spread: there one unit is about the distance to another case's picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.files import write_text


@dataclass(frozen=True)
class Scale:
    """Of one objective: mean and standard deviation of the plain model's scores, and how many pictures had one."""

    mean: float
    sd: float
    n: int


Scales = Mapping[str, Scale]


def measure(name: str, scores: Tensor, strangers: Callable[[], Tensor] | None = None) -> Scale:
    """The scale of scores [N], NaN left out; standard deviation over N - 1.

    strangers: scores of the same pictures, each beside what belongs to another case. They say how far is far where all
    scores are the same, as of a picture's likeness to itself: sd is then the root mean square of how far they are from
    the mean. Raises `UserError` if fewer than two pictures have a score, or if there is nothing to divide by.
    """
    known = _known(scores)
    if len(known) < 2:
        raise UserError(f"objective.terms: {name} has a score for {len(known)} of {len(scores)} pictures of the plain "
                        "model, which gives it no scale: give more train cases or leave it out")  # fmt: skip
    mean, sd = float(known.mean()), float(known.std())
    least = 1e-5 * max(1.0, abs(mean))  # rounding errors are no spread
    if not sd > least and strangers is not None:
        sd = float((_known(strangers()) - mean).square().mean().sqrt())
    if not sd > least:
        raise UserError(f"objective.terms: {name} is {mean:g} for every picture of the plain model, which gives it no "
                        "scale: leave it out, or set objective.combine=geometric")  # fmt: skip
    return Scale(mean, sd, len(known))


def _known(scores: Tensor) -> Tensor:
    scores = scores.detach().double().cpu()
    return scores[~scores.isnan()]


def save(scales: Scales, path: Path) -> None:
    write_text(path, json.dumps(to_json(scales), indent=1) + "\n")


def load(path: Path) -> dict[str, Scale]:
    """What `save` wrote. Raises `UserError` if it is something else."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"{path} is no calibration: remove it, and it is made again") from None


def to_json(scales: Scales) -> dict[str, dict[str, Any]]:
    """As it is kept, and as a shared study tells its workers."""
    return {name: asdict(scale) for name, scale in scales.items()}


def from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Scale]:
    return {name: Scale(float(x["mean"]), float(x["sd"]), int(x["n"])) for name, x in data.items()}


def standard(scores: Tensor, scale: Scale) -> Tensor:
    """(scores - mean) / sd."""
    return torch.div(scores - scale.mean, scale.sd)
