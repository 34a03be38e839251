"""Tuning by gradients: reward of the final picture, back through the sampler, to the weight function's numbers.

Fulfils the tuners' contract: the starts are scored first, then each proposal is theta after `updates` more steps of
Adam from the best start, to be scored like any other tuner's candidate. Modes of the gradient:
`rwopt.sampling.backprop`. State is on disk after each call and after each update (`<study>/trials.json`,
`<study>/last.ckpt`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwopt.errors import UserError
from rwopt.tuners import Candidate, Parameter, Trial
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.problem import Problem
from rwopt.tuners.table import Table
from rwopt.unet.attachment import Attachment


class GradientTuner:
    """One study in `folder/<study>/`. `space` bounds theta (its other parameters, the dials, stay as they are).

    A trial's `calls` count its scoring and the updates before it: forward passes, their re-run and the backward pass
    as two, in batches of the size in which candidates are scored. Raises `UserError` if the
    folder belongs to another `fingerprint`. `log` gets reward, gradient norm and calls after each update.
    """

    def __init__(
        self,
        study: str,
        space: Sequence[Parameter],
        problem: Problem,
        folder: Path,
        seed: int = 0,
        starts: Mapping[str, Mapping[str, float]] | None = None,
        fingerprint: str = "",
        options: GradientOptions | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.problem, self.seed, self.log = problem, seed, log
        self.options = options or GradientOptions()
        self.names = problem.function.names
        box = {p.name: (p.low, p.high) for p in space}
        wide = [box.get(n, (-np.inf, np.inf)) for n in self.names]
        self.bounds = np.array([low for low, _ in wide]), np.array([high for _, high in wide])
        self.starts = dict(starts or {"plain": dict.fromkeys(self.names, 0.0)})
        self.folder = folder / study
        self.table = Table(self.folder / "trials.json", f"{fingerprint}/{seed}/{self.options}")

    def propose(self) -> Candidate:
        """The next start, or theta after the next `updates` steps (which are made now)."""
        left = self.table.left_over()
        if left is not None:
            return left
        tried = {r.origin for r in self.table.rows}
        for name, point in self.starts.items():
            if name not in tried:
                theta = np.clip([point[n] for n in self.names], *self.bounds)
                return self.table.add(self._values(theta), name)
        done = [r for r in self.table.rows if "updates" in r.note]  # not by origin: a start may have any name
        target = (len(done) + 1) * self.options.updates
        theta, calls = self._advance(target)
        size = min(self.problem.pictures, getattr(getattr(self.problem, "task", None), "batch", self.problem.pictures))
        spent = -(-calls // size) - sum(r.note["spent"] for r in done)
        return self.table.add(self._values(theta), "gradient", spent, updates=target, spent=spent)

    def ready(self) -> bool:
        return any(name not in {r.origin for r in self.table.rows} for name in self.starts)

    def observe(self, candidate: Candidate, score: float, calls: int = 0) -> None:
        self.table.close(candidate.number, score, calls)

    def trials(self) -> list[Trial]:
        return self.table.trials()

    def _advance(self, updates: int) -> tuple[np.ndarray, int]:
        from rwopt.tuners import ascent  # Lightning takes seconds to import

        function, model = self.problem.function, self.problem.model
        with Attachment(model.unet, function.sites, function.mode) as attachment:
            module = ascent.Ascent(
                self.problem, attachment, self._start(), self.bounds, self.options, self.seed
            )
            ascent.ascend(module, updates, self.folder, self.options.devices, self.log)
        state = ascent.read(self.folder / "last.ckpt")
        return state["theta"], state["calls"]

    def _start(self) -> np.ndarray:
        scored = [r for r in self.table.rows if r.origin in self.starts and r.score is not None]
        if not scored:
            raise UserError("no start has a finite score yet: score the starts first, or check objective.terms")
        best = max(scored, key=lambda r: r.score or 0.0)
        return np.array([best.values[n] for n in self.names])

    def _values(self, theta: np.ndarray) -> dict[str, float]:
        return {**self.problem.values(), **dict(zip(self.names, theta.tolist(), strict=True))}
