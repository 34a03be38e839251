"""Do two whole sets of pictures look like draws of one distribution? For reports; no search sees them.

Both are a squared maximum mean discrepancy (MMD) between features x_i of n real and y_j of m generated pictures, by its
unbiased estimator (Gretton et al. 2012, equation 3; it is around 0 for sets of one kind, on either side):

    mean over i != j of k(x_i, x_j)  +  mean over i != j of k(y_i, y_j)  -  2 mean over i, j of k(x_i, y_j)

- `set.kid`: kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401), k(x, y) = (x.y / D + 1)^3. All
  pictures at once, so that no random subsets are drawn; torchmetrics gives the same with one subset of all.
- `set.cmmd`: 1000 times the MMD of Jayasumana et al. 2024, arXiv:2401.09603, features scaled to length 1 and
  k(x, y) = exp(-|x - y|^2 / 200). The paper's own estimator counts each picture as its own neighbour, which adds about
  1/n of noise to a distance; this one does not. Its numbers are the paper's only with CLIP's features, see below.

Features: the option `features` is "effnet" (EfficientNet-lite0, pooled), "judge" (the held-out judge of the model that
the option `judges` names) or a function of pictures [n, 3, H, W] that gives [n, D]; numbers of different features do
not compare. `sd` is the jackknife's, over pictures of both sides; `p` is the share of 1000 random exchanges of pictures
between the sides that give at least this distance. Below 256 pictures a side, what tells them apart must be plain to be
told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rwopt.embedded import DEFAULT
from rwopt.errors import UserError, one_of
from rwopt.objectives import effnet
from rwopt.objectives.judges import panel
from rwopt.objectives.objective import ObjectiveSpec, SetObjective, SetScore, check_options

Features = Callable[[Tensor], Tensor]
FEATURES = ("effnet", "judge")
LEAST, USABLE = 64, 256
EXCHANGES = 1000

_SPECS = {
    name: ObjectiveSpec(name, False, False, (-np.inf, np.inf), about=about, level="set", judges=DEFAULT)
    for name, about in {
        "set.kid": "kernel distance of two sets of pictures (polynomial kernel)",
        "set.cmmd": "kernel distance of two sets of pictures (Gaussian kernel), times 1000",
    }.items()
}


def specs() -> Mapping[str, ObjectiveSpec]:
    return _SPECS


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return effnet.absent(name) if given.get("features", FEATURES[0]) == "effnet" else ""


def make(name: str, **given: Any) -> SetObjective:
    """The objective. Options: features ("effnet", "judge" or a function); judges: the model whose "judge" that is
    ("avatars"); seed of the random exchanges (0).

    Raises `UserError` for others, and where the network's packages are missing.
    """
    check_options(name, given, ("features", "judges", "seed"))
    features, seed, judges = given.get("features", FEATURES[0]), given.get("seed", 0), given.get("judges", DEFAULT)
    if not callable(features):
        one_of(FEATURES, f"objective {name}: features", str(features))
        lacking = missing(name, **given)
        if lacking:
            raise UserError(lacking)
        features = _effnet if features == "effnet" else _judged(judges)
    spec, kernel = replace(_SPECS[name], judges=judges), {"set.kid": cubic, "set.cmmd": gaussian}[name]
    return KernelDistance(spec, features, kernel, seed)


def tiny(name: str) -> dict[str, Any]:
    """Options of a network that is always there and small."""
    return {"features": "judge"}


class KernelDistance(SetObjective):
    """The unbiased squared MMD of two sets of pictures in `features`, by `kernel`: [n, D], [m, D] -> [n, m].

    Needs room for a table of (n + m)^2 numbers in double precision: 0.8 GB for 5,000 pictures a side.
    """

    least = LEAST

    def __init__(
        self, spec: ObjectiveSpec, features: Features, kernel: Callable[[Tensor, Tensor], Tensor], seed: int = 0
    ) -> None:
        self.spec, self.features, self.kernel, self.seed = spec, features, kernel, seed
        self.reset()

    def reset(self) -> None:
        self._sides: dict[bool, list[Tensor]] = {True: [], False: []}

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        self._sides[real].append(self.features(images.float()).double().cpu())

    def compute(self) -> SetScore:
        """value, sd, n (of the smaller side), p. Raises `UserError` if a side has fewer than 64 pictures."""
        real, made = (sum(len(part) for part in self._sides[side]) for side in (True, False))
        if min(real, made) < self.least:
            raise UserError(
                f"objective {self.spec.name}: {real} real and {made} generated pictures: below {self.least} it is "
                f"noise, from {USABLE} usable; give more"
            )
        both = torch.cat([*self._sides[True], *self._sides[False]])
        table = self.kernel(both, both).fill_diagonal_(0).numpy()
        value = mmd(table, np.arange(len(table)) < real)
        sd = jackknife(table, real)
        return SetScore(value, sd, min(real, made), exchanged(table, real, value, self.seed))


def cubic(first: Tensor, second: Tensor) -> Tensor:
    """KID's kernel, of torchmetrics."""
    from torchmetrics.image.kid import poly_kernel

    values: Tensor = poly_kernel(first, second)
    return values


def gaussian(first: Tensor, second: Tensor) -> Tensor:
    """CMMD's kernel of features scaled to length 1, with a standard deviation of 10, times 1000."""
    unit = functional.normalize(first, dim=1), functional.normalize(second, dim=1)
    apart = 2 - 2 * unit[0] @ unit[1].mT
    return 1000 * (-apart / (2 * 10**2)).exp()


def mmd(table: np.ndarray, first: np.ndarray) -> float:
    """Unbiased squared MMD from kernel values [N, N] with a diagonal of 0, and which of the N are of the first set."""
    return float(_mmds(table, first[None].astype(float))[0])


def _mmds(table: np.ndarray, first: np.ndarray) -> np.ndarray:
    """`mmd` of many divisions [P, N] of 0 and 1 at once."""
    ones, total = first.sum(1), table.sum()
    zeros = first.shape[1] - ones
    rows = first @ table
    inside = (rows * first).sum(1)
    across = rows.sum(1) - inside
    outside = total - inside - 2 * across
    return np.asarray(inside / (ones * (ones - 1)) + outside / (zeros * (zeros - 1)) - 2 * across / (ones * zeros))


def jackknife(table: np.ndarray, real: int) -> float:
    """Standard deviation of the MMD of the first `real` pictures and the others: leaves out one of them at a time."""
    n, m = real, len(table) - real
    own, other = table[:, :n].sum(1), table[:, n:].sum(1)  # what each picture adds to the sums, with either side
    inside, outside, across = own[:n].sum(), other[n:].sum(), other[:n].sum()

    def distance(inside: np.ndarray, outside: np.ndarray, across: np.ndarray, n: int, m: int) -> np.ndarray:
        return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)

    left = distance(inside - 2 * own[:n], outside, across - other[:n], n - 1, m)
    right = distance(inside, outside - 2 * other[n:], across - own[n:], n, m - 1)
    return float(np.sqrt((n - 1) * left.var() + (m - 1) * right.var()))


def exchanged(table: np.ndarray, real: int, value: float, seed: int) -> float:
    """One-sided p-value of a distance against random divisions into sets of the same sizes."""
    rng = np.random.default_rng(seed)
    divisions = rng.permuted(np.tile(np.arange(len(table)) < real, (EXCHANGES, 1)).astype(float), axis=1)
    # the slack keeps a division into the same sets, summed in another order, from counting as nearer
    return float((1 + (_mmds(table, divisions) >= value - 1e-12 * abs(table).max()).sum()) / (1 + EXCHANGES))


def _effnet(images: Tensor) -> Tensor:
    return effnet.network()(images).pooled


def _judged(model: str) -> Features:
    judges = panel("judge", model)
    return lambda images: judges.verdict(images).features
