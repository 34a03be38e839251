"""Reward gradient: which weights would raise the reward, all steps and sites in one backward pass?

First order: a reward is not at its maximum at the plain model, so unlike the teacher's error it has a slope there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, choice, mean_interval
from rwopt.probes.teacher import TRAJECTORIES, Teacher
from rwopt.sampling.backprop import GradientPath, Reward, keeps_activations, unroll
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment


@dataclass(frozen=True)
class RewardGradient:
    """Score: mean over pictures of `d reward / d w[k, s]` at w = 1 (equally: with respect to the log-gain); signed.

    reward: scores [N] of final latents [N, C, h, w], differentiable (`rwopt.tasks.reward.task_reward` makes one).
    trajectory: "student" follows every path of the gradient to the final latents; "teacher" stops it at the input of
    each U-Net call, so that a row answers for its own step alone. The price is the same, 3 N calls: N forward, N
    backward counted as two; N more where activations are not kept but computed again. Decoder and reward come on top.
    """

    reward: Reward | None = None
    trajectory: str = "student"
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        choice("trajectory", self.trajectory, TRAJECTORIES)

    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        if self.reward is None:
            raise UserError("probe reward_gradient needs a reward: make one with rwopt.tasks.reward.task_reward")
        path = GradientPath("full" if self.trajectory == "student" else "detached")
        sigmas = Teacher(model, attachment, x, cond, course).sigmas
        table = torch.ones(len(course), len(x), len(attachment.sites), device=x.device, requires_grad=True)
        column = {sigma: k for k, sigma in enumerate(course.sigmas)}
        kept = keeps_activations(model, attachment, x, cond, len(course))
        with torch.enable_grad():
            end = unroll(model, attachment, x, cond, course, lambda sigma: table[column[sigma]], path)
            # pictures do not see each other: the gradient of the sum holds every picture's own
            gradient = torch.autograd.grad(self.reward(end).sum(), table)[0]  # [K, N, S]
        mean, low, high = mean_interval(gradient.transpose(1, 2).double().cpu().numpy(), signed=True)
        about = {"trajectory": self.trajectory, "mode": attachment.mode, "pictures": len(x)}
        calls = path.price(len(course), kept=kept)
        return Importance(attachment.sites, sigmas, mean, low, high, calls, "reward_gradient", about)
