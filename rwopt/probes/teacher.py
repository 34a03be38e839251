"""The plain run that every probe follows, and what may be asked beside it.

Two questions make two trajectories. `teacher`: how does the U-Net's output at the plain state move? `student`:
the perturbed step is followed by plain ones, how do the final latents move? The second sees error that travels,
and costs N - i calls at step i where the first costs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import choice
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, predict, told_scale
from rwopt.sampling.sample import advance
from rwopt.sampling.solvers import Memory
from rwopt.unet.attachment import Attachment

TRAJECTORIES = ("teacher", "student")
Predict = Callable[[int, np.ndarray], Tensor]  # (step, weights [S]) -> what is watched, rows first


class Teacher:
    """The plain trajectory x_0, x_1, ... of N pictures, at each state of which a probe asks "what if?".

    Following the plain states keeps steps independent: an error at one step is never blamed on a later one.
    """

    def __init__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> None:
        self.model, self.attachment, self.cond, self.course = model, attachment, cond, course
        self.states: list[Tensor] = [x]
        self.memories: list[Memory] = [()]  # what the solver remembers at each state
        self.sigmas = np.array(course.sigmas)
        self._calls = model.calls

    @property
    def calls(self) -> int:
        """U-Net calls since this teacher was made."""
        return self.model.calls - self._calls

    def predict(self, i: int, weights: Tensor | np.ndarray | None = None) -> Tensor:
        """Raw output ([2N, ...] if guided) at the plain state of step `i`; weights [S], [N, S] or [2N, S]."""
        x = self.states[i]
        if isinstance(weights, np.ndarray):
            weights = torch.as_tensor(weights, dtype=torch.float32, device=x.device)
        return predict(self.model, self.attachment, x, self.course.told[i], self._told(i), weights)

    def advance(self, i: int, out: Tensor) -> None:
        """Make the state of step `i + 1` from the plain output of step `i`."""
        if i + 1 < len(self.course):
            x, memory = self._step(i, out, self.states[i], self.memories[i])
            self.states[i + 1 :], self.memories[i + 1 :] = [x], [memory]

    def run(self) -> Iterator[Tensor]:
        """The plain outputs, step by step, computed anew at each run: N calls."""
        for i in range(len(self.course)):
            out = self.predict(i)
            self.advance(i, out)
            yield out

    def finish(self, i: int, weights: Tensor | np.ndarray | None = None) -> Tensor:
        """Final latents [N, C, h, w] of the run that has `weights` at step `i` and is plain after it: N - i calls."""
        return self.follow(i, self.predict(i, weights))

    def follow(self, i: int, out: Tensor) -> Tensor:
        """Final latents of the run in which step `i` gave `out`, and all later ones are plain: N - i - 1 calls."""
        x, memory = self._step(i, out, self.states[i], self.memories[i])
        for j in range(i + 1, len(self.course)):
            out = predict(self.model, self.attachment, x, self.course.told[j], self._told(j))
            x, memory = self._step(j, out, x, memory)
        return x

    def view(self, trajectory: str) -> tuple[Predict, Iterable[Tensor]]:
        """(what a perturbed step shows, what the plain run shows at each step); take the second's first.

        teacher: raw outputs, [2N, ...] if guided. student: final latents [N, ...], each step the same plain ones.
        """
        choice("trajectory", trajectory, TRAJECTORIES)
        return (self.predict, self.run()) if trajectory == "teacher" else (self.finish, self._ends())

    def _ends(self) -> Iterator[Tensor]:
        *_, out = self.run()
        end, _ = self._step(len(self.course) - 1, out, self.states[-1], self.memories[-1])
        for _ in self.course.sigmas:
            yield end

    def _told(self, i: int) -> Condition:
        """The condition, with the guidance that a U-Net may be told."""
        return told_scale(self.model, self.cond, self.course.scale_at(i))

    def _step(self, i: int, out: Tensor, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return advance(self.model, self.course, i, out, self.cond, x, memory)


def relative_error(out: Tensor, plain: Tensor, pictures: int) -> np.ndarray:
    """`|out - plain|^2 / |plain|^2` [N] over the rows and elements of each picture."""
    square = by_picture(out - plain, pictures).square().sum(1), by_picture(plain, pictures).square().sum(1)
    return np.asarray((square[0] / square[1].clamp(min=1e-30)).cpu().numpy())


def by_picture(out: Tensor, pictures: int) -> Tensor:
    """float64 [N, D] of [N, ...], or of [2N, ...] with both halves of a picture side by side."""
    return out.detach().double().reshape(-1, pictures, out[0].numel()).transpose(0, 1).flatten(1)


def branch_only(attachment: Attachment, value: float) -> None:
    """Raise `UserError` where a weight of `value` would not be a skip of the branch alone."""
    if attachment.mode == "output" and value == 0:
        raise UserError("probe.value=0 in output mode zeroes the whole stream, not a branch: use mode=residual")
