"""What a gradient climbs: the objective of a task's pictures as a function of a weight function's numbers."""

from __future__ import annotations

from torch import Tensor

from rwopt.models import Model
from rwopt.objectives.composite import Composite
from rwopt.sampling.backprop import Reward
from rwopt.sampling.course import Course, learned_course
from rwopt.sampling.denoise import Condition
from rwopt.schedule.weights import WeightFunction
from rwopt.tasks import Dials, Task
from rwopt.tasks.reward import task_reward
from rwopt.unet.attachment import Attachment


class Problem:
    """What is to be raised: the objective of a task's pictures at fixed dials, as a function of the weights.

    Noise is the task's own, one for each case: the same candidate gives the same reward.
    """

    def __init__(self, function: WeightFunction, task: Task, objective: Composite, dials: Dials) -> None:
        self.function, self.task, self.objective, self.dials = function, task, objective, dials
        self.model: Model = task.model
        self.pictures, self.steps = len(task), task.steps
        if function.actions is not None:  # calls that ask the U-Net
            self.steps = sum(level.action.kind != "output" for level in function.actions.levels)
        self._rewards: dict[int, Reward] = {}

    def batch(
        self, attachment: Attachment, rows: slice, theta: Tensor
    ) -> tuple[Tensor, Condition, Course, Reward]:
        """Where sampling starts for some of the pictures, its course at theta [d], the reward of the final latents."""
        if rows.start not in self._rewards:
            self._rewards[rows.start] = task_reward(self.task, self.objective, rows)
        steps, course = self.function.steps, None
        if steps is not None:
            course = learned_course(self.model, steps, theta[self.function.weight_count :])
        return (*self.task.inputs(attachment, self.dials, rows, course), self._rewards[rows.start])

    def values(self) -> dict[str, float]:
        """The dials, as values of a candidate."""
        return self.dials.to_dict()
