"""One-at-a-time ablation: how far does the U-Net's output move when one site is skipped?

Per-step, teacher-forced; N (1 + S) calls. Single-site output errors are close to additive in diffusion U-Nets
(LAPTOP-Diff, arXiv 2404.11098), so this cheap reading ranks sites nearly as exact Shapley values do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.apply import Attachment
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, mean_interval
from rwopt.probes.teacher import Teacher
from rwopt.sampling import Condition
from rwopt.sites import find_sites, group_sites

Predict = Callable[[int, np.ndarray], Tensor]  # (step, weights [S]) -> raw output, rows first


@dataclass(frozen=True)
class Ablation:
    """Score: mean over pictures of `|out(site at value) - out|^2 / |out|^2`, outputs raw, before guidance.

    value: the weight that a probed site gets; 0 skips a residual branch, .97 reads local sensitivity.
    by: what is ablated together, as `group_sites` says ("site": each alone); members share one score.
    """

    value: float = 0.0
    by: str = "site"
    mode: ClassVar[str] = "residual"

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, ts: list[int]
    ) -> Importance:
        if attachment.mode == "output" and self.value == 0:
            raise UserError(
                "probe.value=0 in output mode zeroes the whole stream, not a branch: use mode=residual"
            )
        groups = list(group_sites(find_sites(model.unet, attachment.sites), self.by).values())
        teacher = Teacher(model, attachment, x, cond, ts)
        errors = ablate(teacher.predict, teacher.run(), groups, len(attachment.sites), len(x), self.value)
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

    `outputs` yields the plain raw output of each step, and comes before that step's `predict` calls.
    They have N rows or (with guidance) 2N, negative before positive; both halves of a picture count alike.
    """
    table = []
    for i, plain in enumerate(outputs):
        row = np.zeros((sites, pictures))
        scale = _per_picture(plain, pictures)
        for members in groups:
            weights = np.ones(sites)
            weights[members] = value
            row[members] = _per_picture(predict(i, weights) - plain, pictures) / np.maximum(scale, 1e-30)
        table.append(row)
    return np.array(table)


def _per_picture(out: Tensor, pictures: int) -> np.ndarray:
    """Mean square [N] over a picture's rows and elements."""
    square = out.detach().double().square().reshape(-1, pictures, out[0].numel())
    return np.asarray(square.mean((0, 2)).cpu().numpy())
