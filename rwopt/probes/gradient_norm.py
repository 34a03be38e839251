"""Gradient norm: how steeply does the size of the U-Net's output answer to each site's weight?

The published analytic schedule asks for "attention gradient norms" and leaves the loss open. The teacher's
own error has zero gradient at the plain model, its minimum, so the loss here is the output's mean square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.models import Model
from rwopt.probes import Importance, mean_interval
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class GradientNorm:
    """Score: mean over rows r of `|dL_r / dw_rs|` at w = 1, with `L_r` the mean square of row r's raw output.

    Rows are pictures times guidance halves, before guidance. By the chain rule it is `|<dL_r / da, a>|` with
    `a` what the weight scales (residual mode: the branch; output mode: the block's output), the size of the
    activation gradient along the one direction in which a weight can move it.
    N forward and N backward passes on N steps, a backward pass counted as two calls: 3 N calls.
    """

    mode: ClassVar[str] = "residual"

    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        teacher = Teacher(model, attachment, x, cond, course)
        halves = 1 if cond.negative is None else 2
        norms = []
        for i in range(len(course)):
            weights = torch.ones(halves * len(x), len(attachment.sites), device=x.device, requires_grad=True)
            with torch.enable_grad():
                out = teacher.predict(i, weights)
                gradient = output_gradient(out, weights)
            teacher.advance(i, out.detach())  # weights of one are the plain model, so this is its trajectory
            norms.append(gradient.abs().reshape(halves, len(x), -1).mean(0).T.double().cpu().numpy())
        mean, low, high = mean_interval(np.array(norms))
        calls = 3 * teacher.calls  # a backward pass costs about two forward passes
        about = {"mode": attachment.mode, "pictures": len(x)}
        return Importance(attachment.sites, teacher.sigmas, mean, low, high, calls, "gradient_norm", about)


def output_gradient(out: Tensor, weights: Tensor) -> Tensor:
    """Gradient [R, S] of each row's mean-square output with respect to that row's weights; `out` [R, ...].

    Rows do not see each other in a U-Net, so the gradient of the sum holds every row's own.
    """
    return torch.autograd.grad(out.float().square().flatten(1).mean(1).sum(), weights)[0]
