"""One stage of the training: what is trained on which batches, for so many steps or so many minutes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch

from training.common import fit

WARM, TIMED = 5, 20


@dataclass(frozen=True)
class Stage:
    """`module(steps)` is trained on `make(rng)`, then `finish(module)` publishes it."""

    name: str
    module: Callable[[int], L.LightningModule]
    make: Callable[[np.random.Generator], Any]
    finish: Callable[[L.LightningModule], None]
    seed: int
    ema: float = 0.999

    def steps_in(self, minutes: float) -> int:
        """How many steps this machine makes in that time, by a short trial whose results are thrown away."""
        L.seed_everything(self.seed, verbose=False)
        rng, device = np.random.default_rng(0), "cuda" if torch.cuda.is_available() else "cpu"
        module = self.module(WARM + TIMED).to(device)
        module.log_dict = module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        (optimizer, *_), _ = module.configure_optimizers()  # type: ignore[misc]
        for step in range(WARM + TIMED):
            if step == WARM:
                start = _now()
            module.training_step(self.make(rng), step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return max(int(60 * minutes / ((_now() - start) / TIMED)), 50)

    def run(self, steps: int, minutes: float | None, processes: int = 1) -> None:
        """Train and publish."""
        if minutes is not None:
            steps = self.steps_in(minutes)
        print(f"{self.name}: {steps} steps", flush=True)
        start = time.perf_counter()
        module = fit(self.module(steps), self.make, f"emoji/{self.name}", steps, self.seed, self.ema, processes)
        if module is not None:
            print(f"{self.name}: {time.perf_counter() - start:.0f} s", flush=True)
            self.finish(module)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def command_line(
    text: str | None, steps: int, batch: int, rate: float, stages: tuple[str, ...] = (), shared: bool = False
) -> argparse.Namespace:
    """Options that every training has; `--stage` where it has several, `--processes` where some may share it."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if stages:
        parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--minutes", type=float, help="instead of --steps")
    parser.add_argument("--batch", type=int, default=batch)
    if shared:
        parser.add_argument("--processes", type=int, default=1, help="of which each has a part of the batch")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if shared and args.processes > 1 and args.minutes is not None:  # each would find another number of steps
        parser.error("--processes: give --steps, not --minutes")
    return args
