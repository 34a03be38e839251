"""One-at-a-time ablation: how far does the U-Net's output move when one site is skipped?

N (1 + S) calls teacher-forced, N + S N (N + 1) / 2 along the student's trajectory. Single-site output errors are
close to additive in diffusion U-Nets (LAPTOP-Diff, arXiv 2404.11098), so this cheap reading ranks sites nearly as
exact Shapley values do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.models import Model
from rwopt.probes import Importance, choice, mean_interval
from rwopt.probes.teacher import TRAJECTORIES, Predict, Teacher, branch_only, relative_error
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import find_sites, group_sites


@dataclass(frozen=True)
class Ablation:
    """Score: mean over pictures of `|out(site at value) - out|^2 / |out|^2`, outputs raw, before guidance.

    trajectory: "teacher"; or "student", where `out` are the final latents of the run with that one change.
    value: the weight that a probed site gets; 0 skips a residual branch, .97 reads local sensitivity.
    by: what is ablated together, as `group_sites` says ("site": each alone); members share one score.
    """

    value: float = 0.0
    by: str = "site"
    trajectory: str = "teacher"
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        choice("trajectory", self.trajectory, TRAJECTORIES)

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        branch_only(attachment, self.value)
        groups = list(group_sites(find_sites(model.unet, attachment.sites), self.by).values())
        teacher = Teacher(model, attachment, x, cond, course)
        predict, outputs = teacher.view(self.trajectory)
        errors = ablate(predict, outputs, groups, len(attachment.sites), len(x), self.value)
        mean, low, high = mean_interval(errors)
        about = {**asdict(self), "mode": attachment.mode, "pictures": len(x)}
        return Importance(attachment.sites, teacher.sigmas, mean, low, high, teacher.calls, "ablation", about)


def ablate(
    predict: Predict,
    outputs: Iterable[Tensor],
    groups: Sequence[Sequence[int]],
    sites: int,
    pictures: int,
    value: float = 0.0,
) -> np.ndarray:
    """Relative squared errors [K, S, N] when each group of sites is set to `value` at each step.

    `outputs` yields what the plain run shows at each step, before that step's `predict` calls (`Teacher.view`).
    They have N rows or (with guidance) 2N, negative before positive; both halves of a picture count alike.
    """
    table = []
    for i, plain in enumerate(outputs):
        row = np.zeros((sites, pictures))
        for members in groups:
            weights = np.ones(sites)
            weights[members] = value
            row[members] = relative_error(predict(i, weights), plain, pictures)
        table.append(row)
    return np.array(table)
