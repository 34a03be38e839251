"""The published Importance Probe (UNetReweighting, arXiv 2504.03471), restated, its quirks as named options.

A random walk shrinks block weights while the output error stays under a limit; per-block thresholds follow
the walk; rounds vote on the blocks by their thresholds. Kept as the baseline to beat: its score prefers
blocks that *can* be shrunk, so it runs against sensitivity (`reversed=True` turns it round), and it costs
2NRE calls where ablation costs N(1 + S).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, choice
from rwopt.probes.teacher import TRAJECTORIES, Teacher
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import Site, find_sites, group_sites

Run = Callable[[], Iterable[Tensor]]  # a plain run: one raw output a step
Student = Callable[[int, np.ndarray, np.ndarray], Tensor]  # (step, weights [B], skipped [B]) -> raw output


@dataclass(frozen=True)
class Voting:
    """Score: points [R, R B] over R rounds; in each the *lowest* threshold earns its block B, the highest 1.

    rounds, epochs: R and E. seed: of the walk. by: what shares a weight and a score ("block": as published).
    update: how thresholds follow the walk: "probability", "hard" or "soft".
    energy_guard: "published" lets a proposal raise weights (its guard has no effect), "fixed" does not.
    teacher: "rerun" recomputes the plain run each epoch (2NRE calls), "cached" keeps it (N + NRE).
    limit: largest accepted mean squared error at the first and last step, linear between; the mean is over
    the whole batch and both halves, before guidance. step: half-width of a proposal, likewise.
    eps: how far below a weight its threshold aims. reversed: the highest threshold gets B points.
    trajectory: "teacher" as published; "student" has the error of the final latents, for N (N + 3) R E / 2 calls.
    """

    rounds: int = 15
    epochs: int = 20
    seed: int = 0
    by: str = "block"
    update: str = "probability"
    energy_guard: str = "published"
    teacher: str = "rerun"
    limit: tuple[float, float] = (1e-4, 2e-4)
    step: tuple[float, float] = (0.02, 0.05)
    eps: float = 1e-2
    reversed: bool = False
    trajectory: str = "teacher"
    mode: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        choice("update", self.update, ("probability", "hard", "soft"))
        choice("energy_guard", self.energy_guard, ("published", "fixed"))
        choice("teacher", self.teacher, ("rerun", "cached"))
        choice("trajectory", self.trajectory, TRAJECTORIES)
        for name in ("rounds", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"probe.{name}={getattr(self, name)} must be at least 1")

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        sites = find_sites(model.unet, attachment.sites)
        groups = group_sites(sites, self.by)
        column = np.zeros(len(sites), dtype=int)  # block of each site
        for b, members in enumerate(groups.values()):
            column[members] = b
        output = attachment.mode == "output"
        teacher = Teacher(model, attachment, x, cond, course)

        def student(i: int, weights: np.ndarray, skipped: np.ndarray) -> Tensor:
            off = skipped[column]
            if output:
                with _skip(model.unet, [s for s, o in zip(sites, off, strict=True) if o]):
                    out = teacher.predict(i, weights[column])
            else:
                out = teacher.predict(i, np.where(off, 0.0, weights[column]))
            return teacher.follow(i, out) if self.trajectory == "student" else out

        run: Run = lambda: teacher.view(self.trajectory)[1]  # noqa: E731
        if self.teacher == "cached":
            kept = list(run())
            run = lambda: kept  # noqa: E731
        scores, details = self.vote(run, student, len(course), len(groups))
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        details = {**options, "mode": attachment.mode, "blocks": list(groups), "pictures": len(x), **details}
        return Importance(
            attachment.sites,
            teacher.sigmas,
            scores[:, column],
            calls=teacher.calls,
            method="voting",
            details=details,
        )

    def vote(self, run: Run, student: Student, steps: int, blocks: int) -> tuple[np.ndarray, dict[str, Any]]:
        """All rounds: scores [K, B], and "acceptance" (share of proposals, a step) and "skipped" (blocks)."""
        rng = np.random.default_rng(self.seed)
        scores, accepted, skipped = np.zeros((steps, blocks)), np.zeros(steps), 0
        for _ in range(self.rounds):
            threshold, yes, skips = self.walk(run, student, steps, blocks, rng)
            scores += points(threshold, rng, most_to_highest=self.reversed)
            accepted, skipped = accepted + yes, skipped + skips
        share = accepted / (self.rounds * self.epochs)
        return scores, {"acceptance": share.tolist(), "skipped": skipped}

    def walk(
        self, run: Run, student: Student, steps: int, blocks: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """One round: final thresholds [K, B], accepted proposals [K], number of blocks skipped on the way."""
        limit, size = np.linspace(*self.limit, steps), np.linspace(*self.step, steps)
        up = 0.0 if self.energy_guard == "fixed" else 1.0
        best, threshold = rng.uniform(0.995, 1, (steps, blocks)), np.zeros((steps, blocks))
        accepted, skips = np.zeros(steps, dtype=int), 0
        for epoch in range(1, self.epochs + 1):
            for i, plain in enumerate(run()):
                weights = np.clip(best[i] + rng.uniform(-size[i], up * size[i], blocks), 0, 1)
                skipped = weights + 1e-6 < threshold[i]
                error = float((student(i, weights, skipped) - plain).square().mean())
                # the walker's own weights count no skips: the published code compares 1 with thresholds there
                fitter = _shrinkage(weights) + np.mean(weights < threshold[i]) > _shrinkage(best[i])
                yes = bool(error <= limit[i] and fitter)
                if yes:
                    best[i] = weights
                keep, pull = follow(self.update, yes, epoch / self.epochs)
                threshold[i] = np.clip(keep * threshold[i] + pull * (best[i] - self.eps), 0, 1)
                accepted[i] += yes
                skips += int(skipped.sum())
        return threshold, accepted, skips


def follow(update: str, accepted: bool, c: float) -> tuple[float, float]:
    """(keep, pull) of `T <- keep T + pull (w - eps)`, `c` in (0, 1] the share of epochs done.

    "probability" is an expectation: T is halved, kept or set to w - eps with odds that move with `c`.
    """
    if update == "hard":
        return (0.0, 1.0) if accepted else (0.5, 0.0)
    if update == "soft":
        return (c, 1 - c) if accepted else (c, 0.0)
    if accepted:
        return 0.06 / 2 + 0.47 + 0.37 * c, 0.47 - 0.37 * c
    return (0.48 - 0.18 * c) / 2 + 0.48 + 0.18 * c, 0.04


def points(threshold: np.ndarray, rng: np.random.Generator, most_to_highest: bool = False) -> np.ndarray:
    """One round's points 1 .. B for each row of thresholds [K, B]; noise of 1e-6 breaks ties."""
    noisy = threshold + rng.uniform(-1e-6, 1e-6, threshold.shape)
    order = noisy if most_to_highest else -noisy
    return order.argsort(1).argsort(1) + 1.0


def _shrinkage(weights: np.ndarray) -> float:
    """Fitness of a walker without skips: B / sum w^2."""
    return len(weights) / max(float((weights**2).sum()), 1e-12)


@contextmanager
def _skip(unet: Any, sites: Sequence[Site]) -> Iterator[None]:
    """Exact skips of transformers for the calls inside, over whatever the attachment does.

    In output mode no weight says "input unchanged", so hooks that run after the attachment's own put the
    input in place of the output. They live for one student call only: the teacher's calls in between must
    never see them.
    """

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else type(out)(sample=hidden)

    handles = [unet.get_submodule(s.path).register_forward_hook(hook, with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
