"""The plain run that every probe follows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rwopt.apply import Attachment
from rwopt.models import Model
from rwopt.sampling import Condition, ddim_step, guide, predict


class Teacher:
    """The plain trajectory x_0, x_1, ... of N pictures, at each state of which a probe asks "what if?".

    Following the plain states keeps steps independent: an error at one step is never blamed on a later one.
    The price of that is that error which travels along the trajectory is not seen.
    """

    def __init__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, ts: list[int]
    ) -> None:
        self.model, self.attachment, self.cond, self.ts = model, attachment, cond, ts
        self.states = [x]
        self.sigmas = np.array([float(model.sigma(t)) for t in ts])
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
        return predict(self.model, self.attachment, x, self.ts[i], self.cond, weights)

    def advance(self, i: int, out: Tensor) -> None:
        """Make the state of step `i + 1` from the plain output of step `i`."""
        if i + 1 < len(self.ts):
            step = ddim_step(self.model, guide(out, self.cond), self.states[i], self.ts[i], self.ts[i + 1])
            self.states[i + 1 :] = [step]

    def run(self) -> Iterator[Tensor]:
        """The plain outputs, step by step, computed anew at each run: N calls."""
        for i in range(len(self.ts)):
            out = self.predict(i)
            self.advance(i, out)
            yield out
