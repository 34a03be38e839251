"""Gauss-Newton Gram matrix: which sites matter, and which matter together?

To first order a change `d` of the weights moves the output by `J d`, so the relative squared error is `d' G d` with
`G = J' J / |out|^2`. The columns of J are the moves of the one-at-a-time ablation, kept instead of only measured: all
pair interactions for the same N (1 + S) calls (N + S N (N + 1) / 2 along the student's trajectory). The diagonal is the
ablation score; the row sums are the exact Shapley values of the quadratic model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, choice, mean_interval
from rwopt.probes.teacher import TRAJECTORIES, Predict, Teacher, branch_only, by_picture
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class Gram:
    """Score: mean over pictures of G's diagonal (`score="diagonal"`) or row sums (`"shapley"`, may be negative).

    value: columns are secants from weight 1 to this one; 0 skips the branch, .97 comes close to the derivative.
    trajectory: "teacher"; or "student", where J is that of the final latents.
    details: "gram" [K, S, S], mean over pictures; for the student also "table" [K S, K S], which couples steps.
    """

    value: float = 0.0
    score: str = "diagonal"
    trajectory: str = "teacher"
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        choice("score", self.score, ("diagonal", "shapley"))
        choice("trajectory", self.trajectory, TRAJECTORIES)
        if self.value == 1:
            raise UserError("probe.value=1 changes nothing: give a weight below or above 1")

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        branch_only(attachment, self.value)
        teacher = Teacher(model, attachment, x, cond, course)
        predict, outputs = teacher.view(self.trajectory)
        student = self.trajectory == "student"
        grams, kept = [], []
        for moves in columns(predict, outputs, len(attachment.sites), len(x), self.value):
            grams.append(products(moves, moves))
            if student:
                kept.append(moves)
        table = np.array(grams)  # [K, N, S, S]
        per_picture = table.diagonal(axis1=2, axis2=3) if self.score == "diagonal" else table.sum(3)
        mean, low, high = mean_interval(per_picture.transpose(0, 2, 1), signed=self.score == "shapley")
        about = {**asdict(self), "mode": attachment.mode, "pictures": len(x), "gram": table.mean(1).tolist()}
        if student:
            everything = torch.cat(kept)
            about["table"] = products(everything, everything).mean(0).tolist()
        return Importance(attachment.sites, teacher.sigmas, mean, low, high, teacher.calls, "gram", about)


def columns(
    predict: Predict, outputs: Iterable[Tensor], sites: int, pictures: int, value: float = 0.0
) -> Iterator[Tensor]:
    """For each step the moves [S, N, D] of each picture's output for one unit of each weight, relative to its size."""
    for i, plain in enumerate(outputs):
        flat = by_picture(plain, pictures)
        scale = flat.norm(dim=1, keepdim=True).clamp(min=1e-15) * (1 - value)
        moves = []
        for s in range(sites):
            weights = np.ones(sites)
            weights[s] = value
            moves.append(by_picture(plain - predict(i, weights), pictures) / scale)
        yield torch.stack(moves)


def products(a: Tensor, b: Tensor) -> np.ndarray:
    """Inner products [N, A, B] of the moves [A, N, D] and [B, N, D] of each picture."""
    return np.asarray(torch.einsum("and,bnd->nab", a, b).cpu().numpy())
