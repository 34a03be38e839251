"""What a recipe's `gradient` group says. Loads no torch, as recipes are read before anything heavy is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwopt.errors import at_least_one, check, one_of
from rwopt.sampling import GRADIENTS


@dataclass
class GradientOptions:
    """For `tuner.name=gradient`: the way through the sampler (`rwopt.sampling.backprop.GradientPath`), and Adam.

    mode: full, truncated (the `last` steps) or detached (every `stride`-th step); draws: start noises of each train
    case that it sees, so that it does not learn those of the scored ones by heart; updates: Adam steps from one
    scored candidate to the next, each on `accumulate` x `batch` pictures; rate: step in log-gain; average: what is
    scored is a running mean of theta (Polyak & Juditsky, 1992), of which an update keeps this share: 0 is theta itself,
    0.8 the mean of about the last five; clip: largest gradient norm; pull: weight of |theta - start|^2; devices:
    processes that share out the `accumulate` batches (DDP).
    """

    mode: str = "detached"
    last: int = 2
    stride: int = 1
    draws: int = 4
    updates: int = 5
    batch: int = 32
    accumulate: int = 1
    rate: float = 0.05
    average: float = 0.0
    clip: float = 1.0
    pull: float = 0.0
    devices: int = 1

    def __post_init__(self) -> None:
        one_of(GRADIENTS, "gradient.mode", self.mode)
        at_least_one(self, "gradient", "last", "stride", "draws", "updates", "batch", "accumulate", "devices")
        for name in ("rate", "clip"):
            check(0 < getattr(self, name) < math.inf, f"gradient.{name}", getattr(self, name), "must be above 0")
        check(0 <= self.average < 1, "gradient.average", self.average, "must be 0 or more and below 1")
        check(0 <= self.pull < math.inf, "gradient.pull", self.pull, "must be 0 or more")
        fits = self.accumulate >= self.devices
        check(fits, "gradient.accumulate", self.accumulate, f"must be at least gradient.devices={self.devices}")
