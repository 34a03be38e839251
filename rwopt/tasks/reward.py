"""A task's objective as a function of the final latents: what gradients start from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives.composite import Composite
from rwopt.sampling.backprop import Reward
from rwopt.tasks.task import Task


def task_reward(task: Task, objective: Composite, rows: slice) -> Reward:
    """The objective of some of a task's pictures as a function of their latents.

    Raises `UserError` if a term of the objective has no gradient.
    """
    for name, term in objective.objectives.items():
        if not term.spec.differentiable:
            raise UserError(f"objective.terms: {name} has no gradient; use a tuner that needs none (optuna, spsa)")
    blank = torch.zeros(len(task), 3, 1, 1, device=task.model.device)
    known = task.describe(blank).rows(rows)  # once: judges remember what they have seen

    def reward(latents: Tensor) -> Tensor:
        images = task.model.decode(latents) if objective.pictures else known.images
        return objective(replace(known, images=images, latents=latents))

    return reward
